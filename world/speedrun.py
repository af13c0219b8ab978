"""The speedrun: every step from an empty folder to a model that answers, as the commands a person would type.

    python speedrun.py --minutes 15        (bash speedrun.sh installs first)

One dial, the minutes, sets sizes and steps; they do not depend on how fast the machine is, so on one machine the same
dial and seed give the same numbers. A run that was stopped goes on where it was, and the minutes of the step it was in
count from there. The report is out/speedrun/report.md.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from world import report

OUT = Path("out/speedrun")
TRIAL = (
    "import torch; from fast import linear; from training import ranks; "
    "linear.need_compiler(torch.device(ranks.choose_device(None)))"
)


def plan(
    minutes: float, seed: int, out: Path, ablation: bool, compiled: list[str]
) -> list[tuple[str, list[str], Path]]:
    """(name, command, the file that shows it is done) of every step, for a run of so many minutes on two cores.

    Args: compiled: flags of stage 2, the longest.
    """
    world, common = out / "world", ["--world", str(out / "world"), "--seed", str(seed)]
    questions = ["--questions", str(world / "questions.jsonl"), "--images", str(world)]

    def train(name: str, stage: int, steps: float, folder: str, *flags: str):
        command = ["train.py", "--stage", str(stage), "--out", str(out / folder), "--steps", str(int(steps * minutes))]
        tower = name if stage == 0 else ""  # each tower of stage 0 is a run of its own in that folder
        return name, [*command, *common, *flags], out / folder / tower / "run.json"

    def evaluate(name: str, folder: str, answers: str, *flags: str):
        return name, ["eval.py", "--model", str(out / folder), *questions, *flags], out / folder / answers

    towers = ["--vision", str(out / "stage0/clip"), "--llm", str(out / "stage0/decoder")]
    clip, decoder = (
        ["--tower", tower, "--batch-size", batch, "--lr", rate]
        for tower, batch, rate in (("clip", "128", "1e-3"), ("decoder", "16", "4e-4"))
    )
    probing = ["eval.py", "--task", "probes", "--model", str(out / "stage2"), "--out", str(out / "probes")]
    draw = ["-m", "world", "write", "--out", str(world), "--n", str(int(1000 * minutes)), "--seed", str(seed)]
    ablated = [  # the same stage 2 on a new projector, as LLaVA would start it; first, so that the newest run is whole
        train("no-stage1", 2, 720, "no-stage1", *towers, *compiled),
        evaluate("ablation evaluation", "no-stage1", "answers.jsonl"),
    ]
    return [
        ("world", draw, world / "instruct.json"),
        train("clip", 0, 16, "stage0", *clip),
        train("decoder", 0, 110, "stage0", *decoder),
        train("stage1", 1, 24, "stage1", *towers, "--whiten"),
        *(ablated if ablation else []),
        train("stage2", 2, 720, "stage2", "--model", str(out / "stage1"), *compiled),
        evaluate("evaluation", "stage2", "answers.jsonl"),
        evaluate("blind evaluation", "stage2", "answers-blank.jsonl", "--blank"),
        ("probes", probing, out / "probes/probes.json"),
    ]


def worth_compiling(minutes: float) -> list[str]:
    """--compile where it works, and saves more than the half minute that it takes."""
    if minutes < 10:
        return []
    print("trying torch's compiler ...", flush=True)
    tried = subprocess.run([sys.executable, "-c", TRIAL], capture_output=True, text=True)
    if tried.returncode:
        reason = tried.stderr.splitlines()[-1].removeprefix("ValueError: ")
        print(f"stage 2 will take a third longer: {reason}", file=sys.stderr)
        return []
    return ["--compile"]


def main():
    """Run every step that is not done yet, note its minutes, and write the report; a step that fails ends it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--minutes", type=float, default=15, help="the dial: how long it may take on two cores, installation aside")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=OUT)
    add(
        "--ablation",
        action="store_true",
        help="also train stage 2 on a new projector, beyond the minutes; added later, it is then the newest run",
    )
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error("--minutes must be above 0")
    args.out.mkdir(parents=True, exist_ok=True)
    times_file = args.out / "minutes.json"
    times = json.loads(times_file.read_text()) if times_file.exists() else {}
    compiled = [] if "stage2" in times else worth_compiling(args.minutes)
    for name, command, done in plan(args.minutes, args.seed, args.out, args.ablation, compiled):
        if name in times:
            continue
        resume = ["--resume"] if command[0] == "train.py" and done.exists() else []
        print(f"\n=== {name}: python {' '.join(command + resume)}", flush=True)
        begin = time.time()
        if subprocess.run([sys.executable, *command, *resume]).returncode:
            sys.exit(f"speedrun.py: {name} stopped; the same command goes on from here")
        times[name] = (time.time() - begin) / 60
        times_file.write_text(json.dumps(times, indent=2) + "\n")
    report.write(args.out, times, args.minutes)


if __name__ == "__main__":
    main()
