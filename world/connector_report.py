"""The report of python -m world.connectors: tables of connectors and of token budgets, and a figure.

A difference is measured against the connector with the best mean accuracy at the same budget. Cells with several seeds
are compared seed by seed; the others question by question, with the first seed of both. A difference under two
standard errors counts as none.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from evaluation.scores import accuracy_by_category
from fast.accelerate import accelerate
from formats.weights import load_model
from inputs.files import read_optional_json, write_json
from llava import IGNORE, KVCache, Llava
from training.plots import draw_panels
from world.claims import mean_and_error
from world.report import read_rows

ROUNDS, BATCH, WORDS = 15, 16, 32  # of the timing: turns, prompts at once, their words


@dataclass
class Cell:
    """A connector at a budget; its seeds so far, in OUT/KIND-TOKENS/seedN. given: its --visual-tokens, or None."""

    kind: str
    tokens: int
    folder: Path
    given: int | None = None
    seeds: list[int] = field(default_factory=list)

    def answers(self, seed: int) -> list[dict]:
        return read_rows(self.folder / f"seed{seed}/stage2/answers.jsonl")


def read_accuracy(cell: Cell, seed: int) -> float:
    """Percent of the questions that are answered right."""
    return accuracy_by_category(cell.answers(seed))["overall"]


# ---------------------------------------------------------------------------------------------------------------------
# time


def prefill(model: Llava, features: torch.Tensor, ids: torch.Tensor):
    """Read prompts up to the first token of the answers: connector and decoder, without the vision tower."""
    decoder = model.language_model.model
    with torch.inference_mode():
        cache = KVCache(model.config.text_config, len(ids), ids.shape[1], like=decoder.embed_tokens.weight)
        model.language_model.lm_head(decoder(model.embed(ids, features), None, cache)[:, -1])


def train_step(model: Llava, features: torch.Tensor, ids: torch.Tensor):
    """Forward, backward and AdamW on connector and decoder. The rate is 0: weights stay."""
    labels = ids.masked_fill(ids == model.config.image_token_index, IGNORE)
    labels[:, : -WORDS // 2] = IGNORE
    model(ids, labels, vision_features=features).backward()
    model.optimizer.step()
    model.optimizer.zero_grad()


def measure_speed(folders: dict[str, Path]) -> dict[str, dict]:
    """Milliseconds of a prefill and of a training step with BATCH prompts, tokens and parameters of each model.

    CPU time of one thread, which other programs disturb less than the clock on the wall; median of ROUNDS, in which all
    models take turns. The prompts are random words.
    """
    torch.set_num_threads(1)
    models, inputs = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, folder in folders.items():
        model = models[name] = load_model(folder)
        accelerate(model)
        model.train().vision_tower.requires_grad_(False)
        model.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        vision, image = model.config.vision_config, model.config.image_token_index
        words = torch.randint(5, 200, (BATCH, WORDS), generator=generator)
        images = torch.full((BATCH, model.config.tokens_per_image), image)
        features = torch.randn(BATCH, vision.num_patches, vision.hidden_size, generator=generator)
        inputs[name] = features, torch.cat([images, words], dim=1)
    times = {name: {"prefill_ms": [], "step_ms": []} for name in models}
    for turn in range(-1, ROUNDS):  # the first round does not count
        for name, model in models.items():
            for kind, run in (("prefill_ms", prefill), ("step_ms", train_step)):
                milliseconds = clock(run, model, *inputs[name])
                if turn >= 0:
                    times[name][kind].append(milliseconds)
    result = {name: {kind: statistics.median(v) for kind, v in values.items()} for name, values in times.items()}
    for name, model in models.items():
        result[name]["tokens"] = model.config.tokens_per_image
        result[name]["parameters"] = sum(p.numel() for p in model.multi_modal_projector.parameters())
    return result


def clock(run: Callable, *arguments) -> float:
    begin = time.process_time()
    run(*arguments)
    return 1000 * (time.process_time() - begin)


# ---------------------------------------------------------------------------------------------------------------------
# differences


def difference(cell: Cell, best: Cell) -> tuple[float, float]:
    """Points of accuracy by which `best` is above `cell`, and the standard error, as the file's first lines say."""
    shared = [seed for seed in cell.seeds if seed in best.seeds]
    if len(shared) > 1:
        values = [read_accuracy(best, seed) - read_accuracy(cell, seed) for seed in shared]
    else:
        pairs = zip(best.answers(shared[0]), cell.answers(shared[0]))
        values = [100 * (a["metadata"]["score"] - b["metadata"]["score"]) for a, b in pairs]
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def describe_difference(cell: Cell, best: Cell) -> str:
    if cell is best:
        return "best"
    mean, error = difference(cell, best)
    text = f"{-mean:.1f} ± {error:.1f}" if abs(mean) > 2 * error else f"none ({-mean:.1f} ± {error:.1f})"
    return text + ", first seed" * (len(cell.seeds) < len(best.seeds))


def mean_accuracy(cell: Cell) -> float:
    return statistics.mean(read_accuracy(cell, seed) for seed in cell.seeds)


# ---------------------------------------------------------------------------------------------------------------------
# the report


def write_report(args: argparse.Namespace, patches: int, cells: list[Cell]):
    """Write report.md, report.json and report.png to args.out, and print the tables."""
    out, first = args.out, args.seeds[0]
    speed = read_optional_json(out / "speed.json")
    if speed.keys() != {cell.folder.name for cell in cells}:
        speed = measure_speed({cell.folder.name: cell.folder / f"seed{first}/stage2" for cell in cells})
        write_json(out / "speed.json", speed)
    curve, blind = read_curve(out, args.budgets), accuracy_of(out / "plain/answers-blank.jsonl")
    rows = []
    for cell in sorted(cells, key=lambda cell: (-cell.tokens, -mean_accuracy(cell))):
        rivals = [other for other in cells if other.tokens == cell.tokens]
        best = max(rivals, key=mean_accuracy)
        row = {"connector": cell.kind, "budget": cell.tokens, **speed[cell.folder.name]}
        row |= {"seeds": {str(seed): read_accuracy(cell, seed) for seed in cell.seeds}}
        row |= {"families": accuracy_by_category(cell.answers(first))}
        rows.append(row | {"difference": describe_difference(cell, best)})
    write_json(out / "report.json", {"connectors": rows, "budgets": curve, "blind": blind, "minutes": args.minutes})
    lines = [f"# Connectors and token budgets, --minutes {args.minutes:g}", ""]
    count = len(cells[0].answers(first))
    lines += [
        f"{patches} patches an image, {count} questions. The plain model without images: {blind:.1f} %. With one seed,"
    ]
    lines += [
        f"the standard error of an accuracy is at most {50 / math.sqrt(count):.1f} points.",
        "",
        *connector_table(rows),
    ]
    lines += ["", *budget_table(curve, args.budgets), "", "![accuracy by tokens](report.png)"]
    (out / "report.md").write_text("\n".join(lines) + "\n")
    draw(out / "report.png", rows, curve, blind)
    print("\n".join(lines))


def accuracy_of(answers: Path) -> float:
    return accuracy_by_category(read_rows(answers))["overall"]


def read_curve(out: Path, budgets: list[int]) -> dict[str, dict[int, float]]:
    """Accuracy by method and budget of the plain model, and of the one trained with nested pooling."""
    curve = {}
    for model in ("plain", "nested"):
        for path in sorted((out / model / "curve").glob("*/answers.jsonl")):
            tokens, method = path.parent.name.split("-")[:2]
            name = method if model == "plain" else "pool, nested training"
            curve.setdefault(name, {})[int(tokens)] = accuracy_of(path)
    for name in curve:
        if "nested" not in name:
            curve[name][budgets[0]] = accuracy_of(out / "plain/answers.jsonl")
    return {name: dict(sorted(values.items(), reverse=True)) for name, values in curve.items()}


def connector_table(rows: list[dict]) -> list[str]:
    names = "connector", "budget", "tokens", "seeds", "accuracy, %", "from the best", "prefill, ms", "step, ms"
    lines = [f"| {' | '.join(names)} | parameters |", "|---|---:|---:|---:|---:|---|---:|---:|---:|"]
    for row in rows:
        values = list(row["seeds"].values())
        cells = [row["connector"], row["budget"], row["tokens"], len(values), mean_and_error(values), row["difference"]]
        cells += [f"{row['prefill_ms']:.1f}", f"{row['step_ms']:.1f}", f"{row['parameters']:,}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def budget_table(curve: dict[str, dict[int, float]], budgets: list[int]) -> list[str]:
    lines = [f"| method | {' | '.join(f'{tokens} tokens' for tokens in budgets)} |", "|---|" + "---:|" * len(budgets)]
    for name, values in curve.items():
        lines.append(f"| {name} | {' | '.join(f'{values[tokens]:.1f}' for tokens in budgets)} |")
    return lines


def draw(path: Path, rows: list[dict], curve: dict[str, dict[int, float]], blind: float):
    """Accuracy by tokens: a line for each connector, and one for each method."""
    connectors = {}
    for row in rows:
        connectors.setdefault(row["connector"], {})[row["budget"]] = statistics.mean(row["seeds"].values())
    panels = {"connectors": connectors, "plain model, fewer tokens": curve}
    for axis, name, lines in draw_panels(path, panels, [6, 6], 3.8):
        for i, (label, values) in enumerate(lines.items()):
            axis.plot(values.keys(), values.values(), "os^Dv<>*P"[i % 9] + "-", color=f"C{i}", label=label)
        axis.axhline(blind, color="gray", linestyle=":", label="blind")
        axis.set_xscale("log")
        ticks = sorted({tokens for values in lines.values() for tokens in values})
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.set(title=name, xlabel="visual tokens", ylabel="correct, %", ylim=(0, 102))
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
