"""Measures how much a model forgets while it learns something new, and how much of it each remedy brings back.

    python -m world.forgetting remedies --speedrun out/speedrun --shift palette
    python -m world.forgetting matrix --models out/first out/second --worlds out/world out/other [--text book.txt]

`remedies` continues the speedrun's model on a world with other colors, in every way of REMEDIES. New accuracy is on the
new world, old accuracy on the old one; both worlds ask the same questions about the same held-out scenes.
`matrix` measures models that were trained one after the other, the j-th last on the j-th world, on every world; or the
stages of one run on one world, and the decoder before them.
The same command resumes.
"""

import argparse
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from evaluation.scores import accuracy_by_category
from formats.adapters import is_adapter
from formats.weights import open_model
from inputs import cli
from inputs.files import OUTPUT_ROOT, read_json, write_json
from training import plots
from world.claims import mean_and_error, subset
from world.drawing import SHIFTS
from world.knowledge import read_text, stamp_text
from world.language import FAMILIES
from world.real_decoder import finished
from world.real_report import table
from world.report import read_rows
from world.speedrun import Runner, Step, refuse_other_flags, run_steps, stamp

IMAGES = 2000  # of the new world
KEPT = 3000  # dialogues of the old world that replay draws from
GOAL = 80, 1  # per cent of the loss brought back, points lost on the new task


@dataclass(frozen=True)
class Remedy:
    """One way to continue. shares: of old and new data, "" for new only; averaged: the remedy whose model is averaged
    with the model before, instead of a training."""

    flags: tuple[str, ...] = ()
    shares: str = ""
    averaged: str = ""


REMEDIES = {
    "none": Remedy(),
    "replay 5 %": Remedy(shares="5/95"),
    "replay 20 %": Remedy(shares="20/80"),
    "80/20 to 20/80": Remedy(shares="80/20:20/80:4"),
    "EWC": Remedy(("--ewc", "1000")),
    "distillation": Remedy(("--distill", "0.5:2")),
    "average": Remedy(averaged="none"),
    "LoRA": Remedy(("--lora", "llm", "--lora-rank", "16", "--lora-dropout", "0", "--lr", "1e-3")),
    "a fifth of the rate": Remedy(("--lr", "1e-4")),
    "replay 5 %, weight 4": Remedy(("--task-weights", f"instruct-{KEPT}=4"), "5/95"),
    "replay 5 %, average": Remedy(averaged="replay 5 %"),
}


# ---------------------------------------------------------------------------------------------------------------------
# measures of a matrix R: R[i][j] is the accuracy on task j after stage i


def backward_transfer(matrix: list[list[float]]) -> float:
    """Mean over all tasks but the last of R[last][j] - R[j][j] (Lopez-Paz & Ranzato 2017, arXiv 1706.08840, eq. 2)."""
    return statistics.mean(matrix[-1][j] - matrix[j][j] for j in range(len(matrix) - 1))


def forgetting(matrix: list[list[float]]) -> float:
    """Mean over all tasks but the last of the largest earlier R[i][j] - R[last][j] (Chaudhry et al. 2018, arXiv
    1801.10112, equation 3). It is the best earlier value, not that right after the task was learned."""
    last = len(matrix) - 1
    return statistics.mean(max(matrix[i][j] for i in range(last)) - matrix[last][j] for j in range(last))


def brought_back(before: float, none: float, remedy: float) -> float | None:
    """Per cent of the accuracy lost without a remedy that a remedy brings back. None if nothing was lost."""
    return 100 * (remedy - none) / (before - none) if before > none else None


# ---------------------------------------------------------------------------------------------------------------------
# steps and figures of both commands


def evaluate(name: str, model: Path, world: Path, out: Path, count: int) -> Step:
    """Return the step that answers `count` held-out questions of a world, equally many of each family."""
    asked = ["--questions", f"{world}/questions.jsonl", "--images", str(world), "--limit", str(count)]
    return Step(name, ["eval.py", "--model", str(model), *asked, "--dtype", "float32", "--out", str(out)])


def accuracy(path: Path) -> dict[str, float]:
    return accuracy_by_category(read_rows(path))


def draw_heat_map(path: Path, panels: dict[str, dict[str, dict[str, float]]]):
    """Draw {world: {model: {family: per cent}}}: a panel for each world, a row for each model."""
    rows = list(next(iter(panels.values())))
    widths = [0.55 * (len(FAMILIES) + 1) + 1.9] * len(panels)
    for axis, name, models in plots.draw_panels(path, panels, widths, 1.7 + 0.34 * len(rows)):
        columns = ["overall", *FAMILIES]
        values = [[values.get(column, float("nan")) for column in columns] for values in models.values()]
        axis.imshow(values, cmap="YlGn", vmin=0, vmax=100, aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value == value:
                    color = "white" if value > 60 else "black"
                    axis.text(j, i, f"{value:.0f}", color=color, ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set_title(f"right answers, %: {name}", fontsize=9)
        axis.tick_params(length=0)


# ---------------------------------------------------------------------------------------------------------------------
# the remedies


def plan_remedies(args: argparse.Namespace) -> list[Step]:
    """Return the steps: the new world, a copy of the model before with its Fisher information, every training."""
    old, new, before, out = args.speedrun / "world", args.out / "world", args.out / "before", args.out
    draw = ["-m", "world", "write", "--out", str(new), "--n", str(IMAGES), "--shift", args.shift]
    draw += ["--questions", str(args.questions), "--seed", str(read_json(args.speedrun / "speedrun.json")["seed"])]
    copy = ["-m", "formats", "convert", f"{args.speedrun}/{args.run_name}", str(before)]
    fisher = ["-m", "training.fisher", "--model", str(before), "--data", f"{old}/instruct.json"]
    steps = [Step("new world", draw)] + ([] if before.exists() else [Step("copy of the model before", copy)])
    if any("--ewc" in REMEDIES[name].flags for name in args.only):
        steps.append(Step("Fisher information", fisher))
    for world, folder in (("old", old), ("new", new)):
        steps.append(evaluate(f"before, {world}", before, folder, out / f"before-{world}.jsonl", args.questions))
    for seed in args.seeds:
        for name in args.only:
            remedy, folder = REMEDIES[name], run_folder(out, name, seed)
            if remedy.averaged:
                command = ["-m", "formats", "average", str(before), str(run_folder(out, remedy.averaged, seed))]
                command += [str(folder), "--share", "0.5"]
                steps += [] if folder.exists() else [Step(f"seed {seed}, {name}", command)]
            else:
                steps.append(train(args, remedy, f"seed {seed}, {name}", folder, seed))
            for world, data in (("old", old), ("new", new)):
                answers = folder / f"{world}.jsonl"
                steps.append(evaluate(f"seed {seed}, {name}, {world}", folder, data, answers, args.questions))
    return steps


def run_folder(out: Path, name: str, seed: int) -> Path:
    return out / f"seed{seed}" / re.sub("[^A-Za-z0-9]+", "-", name).strip("-")


def train(args: argparse.Namespace, remedy: Remedy, name: str, folder: Path, seed: int) -> Step:
    """Return the step that continues the model before with a remedy."""
    old, new = args.speedrun / "world", args.out / "world"
    data = ["--data", f"{new}/instruct.json", "--images", str(new)]
    if remedy.shares:
        kept = subset(old, KEPT, args.out)
        data = ["--data", str(kept), f"{new}/instruct.json", "--images", str(old), str(new), "--shares", remedy.shares]
    command = ["train.py", "--stage", "2", "--model", f"{args.out}/before", "--out", str(folder), *data]
    command += ["--steps", str(args.steps), "--seed", str(seed), "--dtype", "float32", "--save-every", "1000"]
    return Step(name, [*command, *remedy.flags], folder)


def measure_remedies(args: argparse.Namespace) -> dict[str, list[dict[str, dict[str, float]]]]:
    """Return, for "before" and every remedy, for each seed, {"old": accuracy by family, "new": the same}."""
    found = {"before": [{world: accuracy(args.out / f"before-{world}.jsonl") for world in ("old", "new")}]}
    for name in args.only:
        folders = [run_folder(args.out, name, seed) for seed in args.seeds]
        found[name] = [{world: accuracy(folder / f"{world}.jsonl") for world in ("old", "new")} for folder in folders]
    return found


def report_remedies(args: argparse.Namespace):
    """Write remedies.json, remedies.md and remedies.png, and print the table."""
    found = measure_remedies(args)
    before, none = found["before"][0], found["none"]
    rows = [["before", f"{before['new']['overall']:.1f}", f"{before['old']['overall']:.1f}", "", ""]]
    verdicts = []
    for name in args.only:
        runs = found[name]
        new, old = ([run[world]["overall"] for run in runs] for world in ("new", "old"))
        cells = [name, mean_and_error(new), mean_and_error(old)]
        if name == "none":
            rows.append([*cells, "", ""])
            continue
        pairs = list(zip(none, runs))
        shares = [brought_back(before["old"]["overall"], a["old"]["overall"], b["old"]["overall"]) for a, b in pairs]
        known = None not in shares
        differences = [b["new"]["overall"] - a["new"]["overall"] for a, b in pairs]
        rows.append([*cells, mean_and_error(shares) if known else "a seed lost nothing", mean_and_error(differences)])
        reached = known and statistics.mean(shares) >= GOAL[0] and statistics.mean(differences) >= -GOAL[1]
        verdicts += [name] if reached else []
    lost = [before["old"]["overall"] - run["old"]["overall"] for run in none]
    head = ["remedy", "new task, %", "old task, %"]
    head += ["lost accuracy that is brought back, %", "new task minus that of `none`, points"]
    lines = [f"# Remedies against forgetting: {args.shift}, {args.steps} steps, seeds {' '.join(map(str, args.seeds))}"]
    lines += ["", *table(head, rows), f"Lost without a remedy: {mean_and_error(lost)} points."]
    goal = f"At least {GOAL[0]} % of it back and at most {GOAL[1]} point lost on the new task"
    lines += [f"{goal}: {', '.join(verdicts) or 'no remedy'}.", "", "![accuracy by family](remedies.png)"]
    write_json(args.out / "remedies.json", found)
    (args.out / "remedies.md").write_text("\n".join(lines) + "\n")
    means = {
        f"{world} world": {name: mean_of([run[world] for run in runs]) for name, runs in found.items()}
        for world in ("old", "new")
    }
    draw_heat_map(args.out / "remedies.png", means)
    print("\n".join(lines))


def mean_of(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.mean(run[key] for run in runs) for key in runs[0]}


def remedies(args: argparse.Namespace):
    """Continue a speedrun's model on a shifted world in every way; measure what is learned and what is lost."""
    if not finished(args.speedrun / args.run_name):
        raise ValueError(f"--speedrun {args.speedrun}: holds no finished {args.run_name}")
    needed = {"none", *args.only, *(REMEDIES[name].averaged for name in args.only)}
    args.only = [name for name in REMEDIES if name in needed]
    args.out.mkdir(parents=True, exist_ok=True)
    flags = {
        "speedrun": str(args.speedrun),
        "run": args.run_name,
        "shift": args.shift,
        "steps": args.steps,
        "questions": args.questions,
    }
    refuse_other_flags(args.out / "forgetting.json", flags)
    run_steps(plan_remedies(args), args.out / "minutes.json", Runner())
    report_remedies(args)


# ---------------------------------------------------------------------------------------------------------------------
# the matrix


def matrix(args: argparse.Namespace):
    """Measure each model on each world, and its perplexity; write matrix.json, matrix.md and matrix.png."""
    extra = len(args.models) - len(args.worlds)
    if len(args.worlds) > 1 and extra not in (0, 1):
        text = "give a model for each world; one more model, before all others, is allowed; or one world"
        raise ValueError(f"--models {len(args.models)}, --worlds {len(args.worlds)}: {text}")
    sees = [is_adapter(model) or open_model(model)[0].vision_config is not None for model in args.models]
    if len(args.worlds) > 1 and not all(sees[extra:]):
        raise ValueError("--models: only one more model, before those of the worlds, may be a decoder without a tower")
    args.out.mkdir(parents=True, exist_ok=True)
    flags = {"models": list(map(stamp, args.models)), "worlds": list(map(str, args.worlds))}
    flags["text"] = stamp_text(args.text) if args.text else "None"
    refuse_other_flags(args.out / "matrix-flags.json", flags | {"questions": args.questions})
    run_steps(plan_matrix(args, sees), args.out / "minutes.json", Runner())

    worlds = range(len(args.worlds))
    found = [
        [accuracy(args.out / f"answers-{i}-{j}.jsonl") if sees[i] else {} for j in worlds] for i in range(len(sees))
    ]
    values = [[own.get("overall") for own in row] for row in found]
    cells = [["" if value is None else f"{value:.1f}" for value in row] for row in values]
    if args.text:
        for i, row in enumerate(cells):
            row.append(f"{read_json(args.out / f'knowledge-{i}.json')['perplexity']:.2f}")
    head = ["right answers, %, after", *map(str, args.worlds), *(["perplexity"] if args.text else [])]
    rows = [[str(model), *row] for model, row in zip(args.models, cells)]
    lines, result = ["# Forgetting matrix", "", *table(head, rows)], {"matrix": values}
    if len(args.worlds) > 1:
        result |= {"backward transfer": backward_transfer(values[extra:]), "forgetting": forgetting(values[extra:])}
        lines += [f"{name}: {result[name]:+.1f} points." for name in ("backward transfer", "forgetting")] + [""]
    panels = {str(args.worlds[j]): {str(m): row[j] for m, row in zip(args.models, found) if row[j]} for j in worlds}
    write_json(args.out / "matrix.json", result | {"families": panels})
    (args.out / "matrix.md").write_text("\n".join([*lines, "![accuracy by family](matrix.png)"]) + "\n")
    draw_heat_map(args.out / "matrix.png", panels)
    print("\n".join(lines))


def plan_matrix(args: argparse.Namespace, sees: list[bool]) -> list[Step]:
    """Return the steps. Args: sees: for each model, whether it has a vision tower; a decoder is only asked for text."""
    steps = []
    for i, model in enumerate(args.models):
        for j, world in enumerate(args.worlds if sees[i] else ()):
            answers = args.out / f"answers-{i}-{j}.jsonl"
            steps.append(evaluate(f"{model} on {world}", model, world, answers, args.questions))
        if args.text:
            ask = ["-m", "world.knowledge", "ask", "--model", str(model), "--out", f"{args.out}/knowledge-{i}.json"]
            steps.append(Step(f"{model} on {args.text}", [*ask, "--text", str(args.text)]))
    return steps


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def main():
    """Run every step that is not done yet, then write the table."""
    parser = cli.make_parser(__doc__, "python -m world.forgetting")
    commands = parser.add_subparsers(required=True)
    for run in (remedies, matrix):
        command = commands.add_parser(run.__name__, help=run.__doc__.splitlines()[0])
        command.set_defaults(run=run)
        command.add_argument("--questions", type=int, default=500, help="held-out questions to ask of each world")
        command.add_argument("--out", type=Path, default=OUTPUT_ROOT / "forgetting", help="folder to write to")
    add = commands.choices["remedies"].add_argument
    add("--speedrun", type=Path, default=OUTPUT_ROOT / "speedrun", help="folder of a finished speedrun")
    add("--run", dest="run_name", default="stage2", help="run of the speedrun that goes on, such as stage2-frozen")
    add("--shift", choices=[name for name in SHIFTS if name != "none"], default="palette", help="look of the new world")
    add("--steps", type=int, default=300, help="steps of each training, of 16 records")
    add("--seeds", type=cli.seed, nargs="+", default=[0, 1, 2], help="seeds of the trainings")
    add("--only", nargs="+", choices=REMEDIES, default=list(REMEDIES), help="remedies to try")
    add = commands.choices["matrix"].add_argument
    add("--models", type=Path, nargs="+", required=True, help="models or adapters, in the order of their training")
    add("--worlds", type=Path, nargs="+", required=True, help="the world that each of them was trained on last, or one")
    add("--text", type=Path, help="also measure the perplexity on this English text, in UTF-8")
    args = parser.parse_args()
    if min(args.questions, getattr(args, "steps", 1)) < 1:
        parser.error("--questions and --steps must be above 0")
    cli.refuse_repeats(parser, getattr(args, "seeds", []))
    if getattr(args, "text", None):
        read_text(args.text)
    args.run(args)


if __name__ == "__main__":
    cli.run(main, "forgetting")
