"""Claims about training a LLaVA (docs/claims.md), tested on a real language model: a table of measurements.

    python -m world.claims --decoder smollm2 --speedrun out/speedrun --minutes 15     all of it takes a day
    python -m world.claims --decoder smollm2 --speedrun out/speedrun --only lora qlora

Every variant trains the same number of steps on the same world, for each seed. Accuracy is on held-out questions,
perplexity on English text; memory is the largest resident memory of the training process. Differences are means over
the seeds, with their standard error. The same command resumes; a later one may add variants and seeds. The table is
OUT/claims.md.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from evaluation.scores import accuracy_by_category
from inputs import cli
from inputs.files import OUTPUT_ROOT, read_json, write_atomic, write_json
from world.knowledge import stamp_text
from world.real_decoder import (
    BATCH,
    CONNECTOR_FLAGS,
    LORA,
    STAGE_1,
    STEPS,
    WARMUP,
    add_decoder_flags,
    check_speedrun,
    evaluate,
    find_decoder,
    refuse_newer_world,
)
from world.report import read_rows
from world.speedrun import Runner, Step, refuse_other_flags, run_steps


@dataclass(frozen=True)
class Variant:
    """One way to train. projector: of the new model; share: of the records; fewer are repeated more often; bits: 4
    keeps the frozen decoder in NF4."""

    flags: tuple[str, ...] = LORA
    projector: str = "expand"
    stage1: bool = True
    share: float = 1.0
    bits: int = 16


PROJECTOR_FLAGS = {**CONNECTOR_FLAGS, "linear": ("--projector", "linear")}
VARIANTS = {
    "lora": Variant(),
    "no-stage1": Variant(stage1=False),
    "mlp": Variant(projector="mlp2x_gelu"),
    "linear": Variant(projector="linear"),
    "quarter": Variant(share=0.25),
    "half": Variant(share=0.5),
    "qlora": Variant(bits=4),
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
    Claim("stage 2 needs a rate of 2e-5, not 1e-3", "full", "full-x50"),
    Claim("the same, for what the decoder knows", "full", "full-x50", "perplexity"),
    Claim("the decoder must train in stage 2", "full", "frozen"),
    Claim("LoRA comes close to full fine-tuning", "lora", "full", equal=True),
    Claim("LoRA forgets less than full fine-tuning", "lora", "full", "perplexity"),
    Claim("QLoRA is as good as LoRA", "qlora", "lora", equal=True),
    Claim("QLoRA needs less memory than LoRA", "qlora", "lora", "gigabytes"),
    Claim("an MLP projects better than one layer", "mlp", "linear"),
    Claim("six tokens of a patch are better than one", "lora", "mlp"),
    Claim("twice the data is better: all against half", "lora", "half"),
    Claim("twice the data is better: half against a quarter", "half", "quarter"),
)
UNITS = {"accuracy": (" points", 1), "perplexity": (" of perplexity", -1), "gigabytes": (" GB", -1)}  # -1: less wins


# ---------------------------------------------------------------------------------------------------------------------
# the runs


def plan(args: argparse.Namespace, speedrun: Path, template: list[str]) -> list[Step]:
    """Return the steps: for each seed and variant, stage 1, stage 2 and the measurements.

    Args: speedrun: folder of world and tower; template: flags that set stage 2's template.
    """
    steps, world = [], speedrun / "world"
    towers = ("--vision", f"{speedrun}/stage2", "--llm", str(args.llm), "--whiten")
    count = [max(1, int(rate * args.minutes)) for rate in STEPS[args.dtype]]  # steps of stage 1, stage 2

    def train(folder: Path, seed: int, stage: int, steps: int, *flags: str) -> Step:
        command = ["train.py", "--stage", str(stage), "--out", str(folder), "--steps", str(steps), *BATCH]
        data = () if "--data" in flags else ("--world", str(world))
        command += ["--seed", str(seed), "--dtype", args.dtype, *data, *flags]
        return Step(f"seed {seed}, {folder.name}", command, folder)

    def stage1(root: Path, variant: Variant, seed: int) -> Step:
        """LoRA needs a LLaVA, also without stage 1: then it gets one that has learned nothing."""
        flags = (*towers, *PROJECTOR_FLAGS[variant.projector])
        if not variant.stage1:
            return train(root / f"untrained-{variant.projector}", seed, 1, 1, *flags, "--lr", "0")
        flags += STAGE_1.get(variant.projector, WARMUP)
        return train(root / f"stage1-{variant.projector}", seed, 1, count[0], *flags)

    needed = count[1] * int(BATCH[1])
    if any(VARIANTS[name].share < 1 for name in args.only):
        check_dialogues(world, needed)
    for seed in args.seeds:
        root = args.out / f"seed{seed}"
        for name in args.only:
            variant, folder = VARIANTS[name], root / name
            start = stage1(root, variant, seed)
            flags, bits = ("--model", str(start.run)), ("--bits", "4") if variant.bits == 4 else ()
            if variant.share < 1:
                data = subset(world, int(variant.share * needed), args.out)
                flags += ("--data", str(data), "--images", str(world))
            ask = ["-m", "world.knowledge", "ask", "--model", str(folder), "--out", f"{folder}/knowledge.json", *bits]
            steps += [
                start,
                train(folder, seed, 2, count[1], *flags, *template, *variant.flags, *bits),
                Step(f"seed {seed}, {name} evaluation", evaluate(args.minutes, folder, world, args.dtype, *bits)),
                Step(f"seed {seed}, {name} knowledge", ask + (["--text", str(args.text)] if args.text else [])),
            ]
    return list({step.name: step for step in steps}.values())  # variants share a stage 1


def subset(world: Path, count: int, out: Path) -> Path:
    """Write `count` of the world's dialogues, evenly spaced over its scenes; return the file."""
    path = out / f"instruct-{count}.json"
    if not path.exists():
        records = json.loads((world / "instruct.json").read_text())
        write_atomic(path, json.dumps([records[i * len(records) // count] for i in range(count)], indent=0).encode())
    return path


def check_dialogues(world: Path, needed: int):
    """Raise ValueError if a run of all dialogues reads some twice: a run of fewer would not differ in what it says."""
    found = len(json.loads((world / "instruct.json").read_text()))
    if found < needed:
        few = f"{found} dialogues, and a run reads {needed}"
        raise ValueError(f"{world}: {few}: set fewer --minutes or name another world")


# ---------------------------------------------------------------------------------------------------------------------
# the table


def measure(folder: Path) -> dict[str, float]:
    """Return the accuracy, perplexity and memory of one trained variant."""
    return {
        "accuracy": accuracy_by_category(read_rows(folder / "answers.jsonl"))["overall"],
        "perplexity": read_json(folder / "knowledge.json")["perplexity"],
        "gigabytes": max(row["memory_gb"] for row in read_rows(folder / "log.jsonl")),
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
    clear, ahead = abs(mean) > 2 * error, mean * UNITS[claim.value][1] > 0
    if claim.equal:
        return "no" if clear and not ahead else "not refuted"
    return ("yes" if ahead else "no") if clear else "not shown"


def write_table(out: Path, minutes: float, measured: dict[str, dict[int, dict]]):
    """Write claims.json and claims.md. Args: measured: what `measure` returned, by variant and seed."""
    runs = {f"{name}, seed {seed}": values for name in measured for seed, values in measured[name].items()}
    write_json(out / "claims.json", runs)
    lines = [f"# Claims, {minutes:g} minutes a run", ""]
    lines += ["| variant | seeds | accuracy, % | perplexity | memory, GB |", "|---|---|---:|---:|---:|"]
    for name, seeds in measured.items():
        cells = [mean_and_error([values[key] for values in seeds.values()]) for key in UNITS]
        lines.append(f"| {name} | {', '.join(map(str, seeds))} | {' | '.join(cells)} |")
    lines += ["", "| claim | measured: difference | holds |", "|---|---|---|"]
    for claim in CLAIMS:
        better, worse = measured.get(claim.better, {}), measured.get(claim.worse, {})
        if differences := [better[seed][claim.value] - worse[seed][claim.value] for seed in better if seed in worse]:
            what = f"{claim.better} - {claim.worse}: {mean_and_error(differences)}{UNITS[claim.value][0]}"
            lines.append(f"| {claim.text} | {what} | {judge(claim, differences)} |")
    (out / "claims.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def find_seeds(done: Iterable[str], step: str) -> list[int]:
    """The seeds with which a step is done, also by earlier commands. Args: done: names of steps, as "seed 0, STEP"."""
    found = (re.fullmatch(f"seed ([0-9]+), {re.escape(step)}", name) for name in done)
    return sorted(int(match[1]) for match in found if match)


def read_flags() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and flags that set stage 2's template. Raises ValueError if decoder or text cannot be read."""
    parser = cli.make_parser(__doc__, "python -m world.claims")
    add_decoder_flags(parser)
    add = parser.add_argument
    add("--speedrun", type=Path, default=OUTPUT_ROOT / "speedrun", help="a speedrun's folder, for its world and tower")
    add("--minutes", type=cli.above_zero, default=15, help="about how long one training takes on two cores")
    add("--seeds", type=cli.seed, nargs="+", default=[0, 1, 2], help="seeds of the trainings")
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to train")
    add("--out", type=Path, default=OUTPUT_ROOT / "claims", help="folder to write everything to")
    args = parser.parse_args()
    cli.refuse_repeats(parser, args.seeds)
    check_speedrun(args.speedrun)
    return args, find_decoder(args, args.out / "claims-flags.json")


def main():
    """Train and measure every variant that is not done yet, then write the table."""
    args, template = read_flags()
    args.out.mkdir(parents=True, exist_ok=True)
    flags = {"minutes": args.minutes, "llm": str(args.llm), "speedrun": str(args.speedrun)}
    flags |= {"text": stamp_text(args.text) if args.text else "None", "dtype": args.dtype}
    refuse_other_flags(args.out / "claims-flags.json", flags)
    for run in args.out.glob("seed*/*"):
        refuse_newer_world(run, args.speedrun)
    done = run_steps(plan(args, args.speedrun, template), args.out / "minutes.json", Runner())
    seeds = {name: find_seeds(done, f"{name} knowledge") for name in VARIANTS}
    measured = {name: {seed: measure(args.out / f"seed{seed}" / name) for seed in seeds[name]} for name in VARIANTS}
    write_table(args.out, args.minutes, {name: runs for name, runs in measured.items() if runs})


if __name__ == "__main__":
    cli.run(main, "claims")
