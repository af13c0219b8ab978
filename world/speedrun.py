"""The speedrun: the commands that a person would type, from an empty folder to a model that answers questions.

    python -m world.speedrun --minutes 20        (bash speedrun.sh installs first)

--minutes sets the number of images and of training steps. Neither depends on the machine's speed, so on one machine
the same minutes and seed give the same results. The same command resumes a stopped speedrun; the report,
out/speedrun/report.md, then counts the minutes of the stopped step from there.
`bash speedrun.sh --decoder smollm2` runs world/real_decoder.py instead, whose language model is pretrained.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from inputs import cli
from inputs.files import OUTPUT_ROOT, fingerprint, read_optional_json, write_json
from inputs.tokenizer import Tokenizer, train_bpe
from llava import LlavaConfig
from training.towers import new_clip, new_decoder
from world.language import TURNS
from world.report import write_report
from world.writer import make_records


def new_model() -> tuple[LlavaConfig, Tokenizer]:
    """Return config and tokenizer of an untrained model of the speedrun's shape, for the figures and for bench/."""
    records = [record for i in range(300) for record in make_records(0, i, TURNS)[1]]
    texts = [message["value"] for record in records for message in record["conversations"]]
    tokenizer = train_bpe([*texts, *["USER: ", " ASSISTANT:"] * 300], merges=600)
    config = new_decoder("small", tokenizer, "llava_hf").config
    config.vision_config = new_clip("small", 24, tokenizer.vocab_size).config.vision_config
    return config, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# the steps


@dataclass
class Step:
    """A step. command: the arguments of python; run: the folder of the run that it trains, or None."""

    name: str
    command: list[str]
    run: Path | None = None

    def resumed(self) -> list[str]:
        """Return the command, with --resume if its training run has begun."""
        begun = self.run is not None and (self.run / "run.json").exists()
        return [*self.command, "--resume"] if begun else self.command


def plan(minutes: float, seed: int, out: Path, ablation: bool, stage2_flags: list[str]) -> list[Step]:
    """Return the steps of a speedrun that takes about this many minutes on two cores."""

    def train(name: str, stage: int, folder: str, steps_per_minute: float, *flags: str) -> Step:
        steps = str(max(1, int(steps_per_minute * minutes)))
        steps = ["--steps", steps, "--world", f"{out}/world", "--seed", str(seed)]
        command = ["train.py", "--stage", str(stage), "--out", f"{out}/{folder}", *steps, *flags]
        return Step(name, command, out / folder / name if stage == 0 else out / folder)  # a tower of stage 0 is a run

    def evaluate(name: str, folder: str, *flags: str) -> Step:
        questions = ["--questions", f"{out}/world/questions.jsonl", "--images", f"{out}/world"]
        return Step(name, ["eval.py", "--model", f"{out}/{folder}", *questions, *flags])

    towers = ("--vision", f"{out}/stage0/clip", "--llm", f"{out}/stage0/decoder")
    draw = ["-m", "world", "write", "--out", f"{out}/world", "--n", str(int(750 * minutes)), "--seed", str(seed)]
    everything = ("--train", "vision,projector,llm", "--lr", "3e-4")

    def train_stage2(name: str, *start: str) -> list[Step]:
        """Stage 2 with a frozen tower, as in LLaVA-1.5, then a quarter as many steps of everything, as in LLaVA-NeXT,
        in which the tower learns what the decoder misses in its features."""
        frozen = f"{name}-frozen"
        return [
            train(frozen, 2, frozen, 510, *start, *stage2_flags),
            train(name, 2, name, 127.5, "--model", f"{out}/{frozen}", *everything, *stage2_flags),
        ]

    without_stage1 = [  # stage 2 on an untrained projector; it runs first, so that the usual stage 2 is the newest
        *train_stage2("no-stage1", *towers),
        evaluate("ablation evaluation", "no-stage1"),
    ]
    return [
        Step("world", draw),
        train("clip", 0, "stage0", 36, "--tower", "clip", "--batch-size", "128", "--lr", "1e-3"),
        train("decoder", 0, "stage0", 82.5, "--tower", "decoder", "--batch-size", "16", "--lr", "4e-4"),
        train("stage1", 1, "stage1", 18, *towers, "--whiten"),
        *(without_stage1 if ablation else []),
        *train_stage2("stage2", "--model", f"{out}/stage1"),
        evaluate("evaluation", "stage2"),
        evaluate("blind evaluation", "stage2", "--blank"),
        Step("probes", ["eval.py", "--task", "probes", "--model", f"{out}/stage2", "--out", f"{out}/probes"]),
    ]


COMPILER_TEST = (
    "import torch; from fast.compile import require_compiler; from training.ranks import choose_device; "
    "require_compiler(torch.device(choose_device(None)))"
)


def choose_compile(minutes: float) -> list[str]:
    """Return ["--compile"] if the compiler works and the run is long enough for the half minute that it takes."""
    if minutes < 10:
        return []
    print("testing torch's compiler ...", flush=True)
    # In its own process, which frees the memory that compiling takes.
    test = subprocess.run([sys.executable, "-c", COMPILER_TEST], capture_output=True, text=True)
    if test.returncode == 0:
        return ["--compile"]
    reason = (test.stderr.splitlines() or ["it was stopped"])[-1].removeprefix("ValueError: ")
    print(f"stage 2 trains without --compile: {reason}", file=sys.stderr)
    return []


# ---------------------------------------------------------------------------------------------------------------------
# running the steps


class Runner:
    """Run one command at a time. SIGINT and SIGTERM let the command save and end, and then end the speedrun."""

    def __init__(self):
        self.process, self.signal = None, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame):
        self.signal = number
        # A terminal sends Ctrl-C to the command as well. A second signal would end it without a checkpoint.
        if self.process and not (number == signal.SIGINT and in_foreground()):
            self.process.send_signal(number)

    def run(self, command: list[str]) -> int:
        """Run python with these arguments; return its exit status."""
        if self.signal:
            return 128 + self.signal
        self.process = subprocess.Popen([sys.executable, *command])
        if self.signal:  # it arrived while the command was being started
            self.process.send_signal(self.signal)
        status, self.process = self.process.wait(), None
        return status


def in_foreground() -> bool:
    """True if a terminal's Ctrl-C reaches this process and its children."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def run_steps(steps: list[Step], minutes_file: Path, runner: Runner) -> dict[str, float]:
    """Run the steps that `minutes_file` does not list yet; return the minutes that each step took.

    A step that fails, or a signal, ends the program with one line.
    """
    minutes = read_optional_json(minutes_file)
    for step in steps:
        if step.name in minutes:
            continue
        command, begin = step.resumed(), time.time()
        print(f"\n=== {step.name}: python {' '.join(command)}", flush=True)
        status = runner.run(command)
        if status:
            print(f"speedrun: stopped in {step.name}; the same command resumes it", file=sys.stderr)
            sys.exit(128 + runner.signal if runner.signal else 1)
        minutes[step.name] = (time.time() - begin) / 60
        write_json(minutes_file, minutes)
    return minutes


def stamp(path: Path) -> str:
    """A path and what tells its content: a file's checksum; the time when a run ended, or a model was written."""
    if path.is_file():
        return f"{path} (sha256 {fingerprint(path)['sha256'][:12]})"
    files = [*path.glob("*.safetensors"), *path.glob("*.bin")]
    written = max((file.stat().st_mtime for file in files), default=0)
    ended = read_optional_json(path / "run.json").get("finished", written)
    return f"{path} (of {datetime.fromtimestamp(ended, UTC):%Y-%m-%d %H:%M:%S})"


def refuse_other_flags(path: Path, flags: dict):
    """End the program with one line if the folder was begun with other flags: its finished steps would be kept."""
    begun = read_optional_json(path) or flags
    if begun != flags:
        keys = [key for key in {**begun, **flags} if begun.get(key) != flags.get(key)]
        text = ", ".join(f"--{key} {begun.get(key, 'None')}, not {flags.get(key, 'None')}" for key in keys)
        sys.exit(f"speedrun: {path.parent} was begun with {text}; give another --out, or delete the folder")
    write_json(path, flags)


def main():
    """Run every step that is not done yet, then write the report."""
    parser = cli.make_parser(__doc__, "python -m world.speedrun")
    add = parser.add_argument
    text = "about how long it takes on two cores, without the installation"
    add("--minutes", type=cli.above_zero, default=20, help=text)
    add("--seed", type=cli.seed, default=0, help="seed of the world and of every training run")
    add("--out", type=Path, default=OUTPUT_ROOT / "speedrun", help="folder to write everything to")
    ablation = "also train stage 2 without stage 1, in extra time; added to a finished speedrun, it is the newest run"
    add("--ablation", action="store_true", help=ablation)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    refuse_other_flags(args.out / "speedrun.json", {"minutes": args.minutes, "seed": args.seed})
    minutes_file, runner = args.out / "minutes.json", Runner()
    stage2_flags = [] if "stage2" in read_optional_json(minutes_file) else choose_compile(args.minutes)
    steps = plan(args.minutes, args.seed, args.out, args.ablation, stage2_flags)
    write_report(args.out, run_steps(steps, minutes_file, runner), args.minutes)


if __name__ == "__main__":
    cli.run(main, "speedrun")
