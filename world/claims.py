"""Claims about training a LLaVA (docs/claims.md), tested on a real language model: a table of measurements.

    python -m world.claims --decoder smollm2 --speedrun out/speedrun --minutes 15     all of it takes hours
    python -m world.claims --decoder smollm2 --speedrun out/speedrun --only lora qlora

Every variant trains the same number of steps on the same world, for each seed. Accuracy is on held-out questions,
perplexity on English text; memory is the largest resident memory of the training process. Differences are means over
the seeds, with their standard error. The same command resumes; the table is OUT/claims.md.
"""

import argparse
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.scores import accuracy_by_category
from inputs import cli
from inputs.files import OUTPUT_ROOT, read_json, write_atomic, write_json
from world.real_decoder import BATCH, LORA, STEPS, WARMUP, add_decoder_flags, choose_world, evaluate, find_decoder
from world.report import read_rows
from world.speedrun import Runner, Step, refuse_other_flags, run_steps


@dataclass(frozen=True)
class Variant:
    """One way to train stage 2. start: its stage 1, or None; share: of the records; fewer are repeated more often."""

    flags: tuple[str, ...] = LORA
    start: str | None = "stage1"
    share: float = 1.0


VARIANTS = {
    "lora": Variant(),
    "no-stage1": Variant(start=None),
    "linear": Variant(start="stage1-linear"),
    "quarter": Variant(share=0.25),
    "half": Variant(share=0.5),
    "qlora": Variant((*LORA, "--bits", "4")),
    "frozen": Variant(("--train", "projector", "--lr", "1e-3")),
    "full": Variant(("--lr", "2e-5")),
    "full-x50": Variant(("--lr", "1e-3")),
}


@dataclass(frozen=True)
class Claim:
    """Variant `better` is said to beat `worse` in a value ("accuracy", "perplexity", "gigabytes"), or to equal it."""

    text: str
    better: str
    worse: str
    value: str = "accuracy"
    equal: bool = False


CLAIMS = (
    Claim("stage 1 before stage 2 pays", "lora", "no-stage1"),
    Claim("stage 2 needs a rate 50 times smaller than stage 1's", "full", "full-x50"),
    Claim("the same, for what the decoder knows", "full", "full-x50", "perplexity"),
    Claim("the decoder must train in stage 2", "full", "frozen"),
    Claim("LoRA comes close to full fine-tuning", "lora", "full", equal=True),
    Claim("LoRA forgets less than full fine-tuning", "lora", "full", "perplexity"),
    Claim("QLoRA is as good as LoRA", "qlora", "lora", equal=True),
    Claim("QLoRA needs less memory than LoRA", "qlora", "lora", "gigabytes"),
    Claim("an MLP projects better than one layer", "lora", "linear"),
    Claim("twice the data is better: all against half", "lora", "half"),
    Claim("twice the data is better: half against a quarter", "half", "quarter"),
)
UNITS = {"accuracy": (" points", 1), "perplexity": (" of perplexity", -1), "gigabytes": (" GB", -1)}  # -1: less wins


# ---------------------------------------------------------------------------------------------------------------------
# the runs


@dataclass
class Plan:
    """The steps of all variants and seeds, and the folder of each trained variant."""

    steps: list[Step] = field(default_factory=list)
    folders: dict[tuple[str, int], Path] = field(default_factory=dict)


def make_plan(args: argparse.Namespace, speedrun: Path, template: list[str]) -> Plan:
    """Return the steps: for each seed the stages 1 that the variants need, then each variant and its measurements.

    Args: speedrun: folder of world and tower; template: flags that set stage 2's template.
    """
    plan, world = Plan(), speedrun / "world"
    towers = ("--vision", f"{speedrun}/stage2", "--llm", str(args.llm), "--whiten")
    count = str(max(1, int(STEPS[args.dtype][1] * args.minutes)))

    def train(folder: Path, seed: int, stage: int, *flags: str) -> Step:
        command = ["train.py", "--stage", str(stage), "--out", str(folder), "--world", str(world), "--steps", count]
        command += [*BATCH, "--seed", str(seed), "--dtype", args.dtype, *flags]
        return Step(f"seed {seed}, {folder.name}", command, folder)

    for seed in args.seeds:
        root = args.out / f"seed{seed}"
        for start in dict.fromkeys(VARIANTS[name].start for name in args.only):
            if start:
                projector = ("--projector", "linear") if start == "stage1-linear" else ()
                plan.steps.append(train(root / start, seed, 1, *towers, *WARMUP, *projector))
        for name in args.only:
            variant, folder = VARIANTS[name], root / name
            flags = ("--model", f"{root}/{variant.start}") if variant.start else towers
            if variant.share < 1:
                data = subset(world, int(variant.share * int(count) * int(BATCH[1])), args.out)
                flags += ("--data", str(data), "--images", str(world))
            plan.folders[name, seed] = folder
            ask = ["-m", "world.knowledge", "ask", "--model", str(folder), "--out", f"{folder}/knowledge.json"]
            plan.steps += [
                train(folder, seed, 2, *flags, *template, *variant.flags),
                Step(f"seed {seed}, {name} evaluation", evaluate(args.minutes, folder, world, args.dtype)),
                Step(f"seed {seed}, {name} knowledge", ask + (["--text", str(args.text)] if args.text else [])),
            ]
    return plan


def subset(world: Path, count: int, out: Path) -> Path:
    """Write `count` of the world's dialogues, evenly spaced over its scenes; return the file."""
    path = out / f"instruct-{count}.json"
    if not path.exists():
        records = json.loads((world / "instruct.json").read_text())
        write_atomic(path, json.dumps([records[i * len(records) // count] for i in range(count)], indent=0).encode())
    return path


class PeakRunner(Runner):
    """A runner that keeps the peak memory of every training in memory.json of its folder."""

    def run(self, command: list[str]) -> int:
        status = super().run(command)
        if command[0] == "train.py" and status == 0:
            folder = Path(command[command.index("--out") + 1])
            write_json(folder / "memory.json", {"gigabytes": self.peak / 1e9})
        return status


# ---------------------------------------------------------------------------------------------------------------------
# the table


def measure(folder: Path) -> dict[str, float]:
    """Return the accuracy, perplexity and memory of one trained variant."""
    return {
        "accuracy": accuracy_by_category(read_rows(folder / "answers.jsonl"))["overall"],
        "perplexity": read_json(folder / "knowledge.json")["perplexity"],
        "gigabytes": read_json(folder / "memory.json")["gigabytes"],
    }


def mean_and_error(values: list[float]) -> str:
    """The mean, and its standard error if there are several values."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}"


def judge(claim: Claim, differences: list[float]) -> str:
    """Say if paired differences (better - worse) confirm a claim. "yes" and "no" need two standard errors from 0."""
    if len(differences) < 2:
        return "one seed: open"
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    clear = abs(mean) > 2 * error
    if claim.equal:
        return "no" if clear else "not refuted"
    return ("yes" if mean * UNITS[claim.value][1] > 0 else "no") if clear else "not shown"


def write_table(out: Path, args: argparse.Namespace, measured: dict[tuple[str, int], dict]):
    """Write claims.json and claims.md."""
    seeds, names = args.seeds, args.only
    write_json(out / "claims.json", {f"{name}, seed {seed}": values for (name, seed), values in measured.items()})
    lines = [f"# Claims, {args.minutes:g} minutes a run, seeds {', '.join(map(str, seeds))}", ""]
    lines += ["| variant | accuracy, % | perplexity | memory, GB |", "|---|---:|---:|---:|"]
    for name in names:
        cells = (mean_and_error([measured[name, seed][value] for seed in seeds]) for value in UNITS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| claim | measured: difference | holds |", "|---|---|---|"]
    for claim in CLAIMS:
        if claim.better in names and claim.worse in names:
            pairs = [(measured[claim.better, seed], measured[claim.worse, seed]) for seed in seeds]
            differences = [better[claim.value] - worse[claim.value] for better, worse in pairs]
            what = f"{claim.better} - {claim.worse}: {mean_and_error(differences)}{UNITS[claim.value][0]}"
            lines.append(f"| {claim.text} | {what} | {judge(claim, differences)} |")
    (out / "claims.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def read_flags() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and flags that set stage 2's template. Raises ValueError if decoder or text cannot be read."""
    parser = cli.make_parser(__doc__, "python -m world.claims")
    add_decoder_flags(parser)
    add = parser.add_argument
    add("--speedrun", type=Path, default=OUTPUT_ROOT / "speedrun", help="a speedrun's folder, for its world and tower")
    add("--minutes", type=float, default=15, help="about how long one training takes on two cores")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the trainings")
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to train")
    add("--out", type=Path, default=OUTPUT_ROOT / "claims", help="folder to write everything to")
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error("--minutes must be above 0")
    return args, find_decoder(args)


def main():
    """Train and measure every variant that is not done yet, then write the table."""
    args, template = read_flags()
    speedrun = choose_world(args.speedrun, args.minutes, 0, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    flags = {"minutes": args.minutes, "llm": str(args.llm), "speedrun": str(speedrun), "text": str(args.text)}
    flags["dtype"] = args.dtype
    refuse_other_flags(args.out / "claims-flags.json", flags)
    plan = make_plan(args, speedrun, template)
    run_steps(plan.steps, args.out / "minutes.json", PeakRunner())
    write_table(args.out, args, {key: measure(folder) for key, folder in plan.folders.items()})


if __name__ == "__main__":
    cli.run(main, "claims")
