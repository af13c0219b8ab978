"""Measure a model whose question chooses the patches, on the embedded world: how many does it keep, where, and is it
worth it?

    python -m insight.relevance --model out/relevance --base out/speedrun/stage2 --world out/speedrun/world

Asks the first held-out questions of all families and prints three tables:

    kept patches    of each family; beside it, of "Describe the image." about the same images
    in the box      of questions about one object: share of the kept patches that touch the object's box, and that lie
                    in it with their center; beside it, of all patches
    accuracy        beside the base with all patches, and with at least as many tokens by other methods

A difference under two standard errors counts as none. The questions are asked in batches and, some of them, alone: kept
patches and answers have to be the same.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluation.answering import Cost, answer_batch
from formats.adapters import load_with_adapter
from inputs import cli
from insight.look import token_boxes
from insight.score import FAMILIES, compare_boxes, find_object, mean_and_error
from llava import Llava
from training.ranks import choose_device
from variants.token_budget import METHODS, Budget, limit_visual_tokens
from world.language import DESCRIBE
from world.probes import METRICS
from world.report import read_rows

BATCH, ALONE = 64, 50  # questions of a batch; questions that are asked alone as well
NEW_TOKENS = 128


def read_questions(world: Path, count: int, file: Path | None = None) -> list[dict]:
    """The first `count` held-out questions, or those of `file`; "object" is the one that is asked about, or None;
    "boxes" (objects, 4) are those of the scene."""
    objects = {row["image"]: row["things"] for row in read_rows(world / "scenes.jsonl")}
    rows = read_rows(file or world / "questions.jsonl")[:count]
    if len(rows) < count:
        raise ValueError(f"{file or world}: {len(rows)} questions, not {count}")
    if unknown := [row["image"] for row in rows if row["image"] not in objects]:
        raise ValueError(f"{world}/scenes.jsonl: has no image {unknown[0]}")
    specific = [row["category"] in FAMILIES for row in rows]
    found = [find_object(row["text"], objects[row["image"]]) if one else None for row, one in zip(rows, specific)]
    boxes = [np.array([thing["box"] for thing in objects[row["image"]]]) for row in rows]
    return [row | {"object": thing, "boxes": own} for row, thing, own in zip(rows, found, boxes)]


def ask(model: Llava, tokenizer, questions: list[dict], world: Path, size: int = BATCH, new=NEW_TOKENS) -> list[dict]:
    """{"text", "score", "kept"} of each question; kept: the patches (P,) that were kept, or None."""
    found = []
    for first in tqdm(range(0, len(questions), size), "questions", unit="batch"):
        batch = questions[first : first + size]
        texts = answer_batch(model, tokenizer, batch, world, new, Cost())
        kept = getattr(model, "kept_patches", None)
        for i, (row, text) in enumerate(zip(batch, texts)):
            score = METRICS[row.get("metric", "exact")](text, row["answer"])
            found.append({"text": text, "score": score, "kept": None if kept is None else kept[i].numpy()})
    return found


# ---------------------------------------------------------------------------------------------------------------------
# the three tables


def kept_table(questions: list[dict], answers: list[dict], described: list[dict]) -> Iterator[str]:
    """Mean kept patches by family, those of a description of the same image, and the ratio of the means."""
    own, whole = (np.array([answer["kept"].sum() for answer in some]) for some in (answers, described))
    yield "| family | questions | kept | of a description | ratio |\n|---|---:|---:|---:|---:|"
    families = np.array([row["category"] for row in questions])
    specific = np.array([row["object"] is not None for row in questions])
    chosen = {name: families == name for name in sorted(set(families))} | {"about one object": specific}
    for name, which in (chosen | {"all": np.ones(len(questions), bool)}).items():
        ratio = own[which].mean() / whole[which].mean()
        error = (own[which] - ratio * whole[which]).std() / which.sum() ** 0.5 / whole[which].mean()
        means = f"{own[which].mean():.2f} | {whole[which].mean():.2f}"
        yield f"| {name} | {which.sum()} | {means} | {ratio:.2f} ± {error:.2f} |"


def box_table(questions: list[dict], answers: list[dict], config) -> Iterator[str]:
    """Where the kept patches of questions about one object lie, by family; and where all patches lie."""
    boxes = np.array(token_boxes((1, 1), config))  # the world's images are square
    families = sorted({question["category"] for question in questions if question["object"]})
    rows = {name: [] for name in (*families, "all of these", "all patches")}
    for question, answer in zip(questions, answers):
        if question["object"]:
            shares, centers = compare_boxes(boxes, np.array(question["object"]["box"]))
            kept = answer["kept"]
            touched = np.max([compare_boxes(boxes, box)[0] > 0 for box in question["boxes"]], axis=0)
            for names, which in (((question["category"], "all of these"), kept), (("all patches",), kept | True)):
                values = (shares[which] > 0).mean(), centers[which].mean(), (centers & which).any()
                values += (touched[which].mean(),)
                for name in names:
                    rows[name].append(values)
    yield "| kept for | questions | touch the box | center in the box | box is seen | touch any object |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, values in rows.items():
        cells = " | ".join(mean_and_error(column) for column in zip(*values))
        yield f"| {name} | {len(values)} | {cells} |"


def accuracy_table(scores: dict[str, list[float]], tokens: dict[str, float]) -> Iterator[str]:
    """Percent of right answers, and how far the first row is above each other one, question by question."""
    yield "| | tokens | accuracy | the question's choice is better by |\n|---|---:|---:|---:|"
    first = np.array(next(iter(scores.values())))
    for name, values in scores.items():
        differences = 100 * (first - np.array(values))
        mean, error = differences.mean(), differences.std(ddof=1) / len(first) ** 0.5
        verdict = "" if name == next(iter(scores)) else f"{mean:+.1f} ± {error:.1f}"
        verdict += " (none)" if verdict and abs(mean) <= 2 * error else ""
        yield f"| {name} | {tokens[name]:.2f} | {mean_and_error(list(values))} | {verdict} |"


def compare(args: argparse.Namespace, questions: list[dict], answers: list[dict]) -> Iterator[str]:
    """The accuracy table: the base with all patches, and with at least as many tokens as the question keeps.

    pool has the next square number; if that is all patches, the one below.
    """
    mean = float(np.mean([answer["kept"].sum() for answer in answers]))
    scores, tokens = {"the question's choice": [answer["score"] for answer in answers]}, {"the question's choice": mean}
    for method in ("all", *args.methods):
        model, tokenizer = load_with_adapter(args.base, args.base_adapter, args.device, torch.float32)
        patches = model.config.vision_config.num_patches
        count = patches if method == "all" else int(np.ceil(mean))
        if method == "pool":
            count = min(int(np.ceil(mean**0.5)), int(patches**0.5) - 1) ** 2
        limit_visual_tokens(model, None if method == "all" else Budget(count, method))
        name = f"base, {method}"
        scores[name] = [answer["score"] for answer in ask(model, tokenizer, questions, args.world)]
        tokens[name] = count
    return accuracy_table(scores, tokens)


def compare_alone(model: Llava, tokenizer, questions: list[dict], answers: list[dict], world: Path) -> str:
    """Ask some questions alone; say how many keep the same patches and get the same answer as in their batch."""
    alone = ask(model, tokenizer, questions[:ALONE], world, size=1)
    same = [a["text"] == b["text"] and (a["kept"] == b["kept"]).all() for a, b in zip(alone, answers)]
    return f"asked alone: {sum(same)} of {len(same)} with the same patches and the same answer"


def read_flags() -> argparse.Namespace:
    """The command line; an unknown flag or value ends the program with status 2."""
    parser = cli.make_parser(__doc__, "python -m insight.relevance")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a model that train.py --relevance has trained")
    add("--adapter", type=Path, help="folder of an adapter that LoRA trained for --model")
    add("--base", type=Path, required=True, help="folder of the model that reads all patches")
    add("--base-adapter", type=Path, help="folder of an adapter for --base")
    add("--world", type=Path, required=True, help="folder of the world: questions.jsonl, scenes.jsonl, images")
    add("--questions", type=int, default=500, help="number of questions")
    add("--asked", type=Path, help="file of questions about the world's held-out images; default: its questions.jsonl")
    methods = [method for method in METHODS if method != "fastv"]  # which needs a layer, too
    add("--methods", nargs="*", choices=methods, default=methods, help="methods of --visual-tokens")
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    args = parser.parse_args()
    if args.questions < 2:
        parser.error("--questions must be at least 2")
    args.device = choose_device(args.device)
    return args


def main():
    """Print the three tables."""
    args = read_flags()
    questions = read_questions(args.world, args.questions, args.asked)
    model, tokenizer = load_with_adapter(args.model, args.adapter, args.device, torch.float32)
    if not model.config.relevance_bounds:
        raise ValueError(f"{args.model}: its question chooses no patches: train.py --relevance makes such a model")
    answers = ask(model, tokenizer, questions, args.world)
    described = ask(model, tokenizer, [row | {"text": DESCRIBE} for row in questions], args.world, new=1)
    print("", *kept_table(questions, answers, described), "", sep="\n")
    print(*box_table(questions, answers, model.config), "", sep="\n")
    print(*compare(args, questions, answers), "", sep="\n")
    print(compare_alone(model, tokenizer, questions, answers, args.world))


if __name__ == "__main__":
    cli.run(main, "insight.relevance")
