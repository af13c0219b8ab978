"""Score the maps of insight/maps.py against the boxes of the embedded world: which of them can be believed?

    python -m insight.score --model out/speedrun/stage2 --world out/speedrun/world --questions 500

Asks held-out questions about one object (its color, shape, place, or what the sign says) and makes each map for the
word that answers it, in the true answer. Three measures, for each map:

    in the box   share of the map's positive values that lies in the object's box
    pointing     share of questions in which the center of the map's highest patch lies in the box
    deletion     mean probability of the word while patches are removed in the map's order, highest first: by the mean
                 feature, as in the map of occlusion, or by covering pixels with the mean color

Beside them: a random map, the same value everywhere ("area alone"), and the box itself as a map.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import load_image, render_dialogue
from formats.adapters import load_with_adapter
from inputs import cli
from inputs.records import Turn
from inputs.tokenizer import Tokenizer
from insight import maps
from insight.look import token_boxes
from insight.maps import NEWLINE, Answer, Word
from llava import IGNORE, Llava
from training.ranks import choose_device
from world.language import CELL_NAMES, CELL_PHRASES
from world.report import read_rows
from world.scenes import COLORS, SHAPES

FAMILIES = ("color", "shape", "position", "reading")  # questions about one object
STEPS = 20  # most points of a deletion curve after the first


def find_object(question: str, objects: list[dict]) -> dict | None:
    """The one object that fits the shape, the color and the place in a question; None if there is not exactly one."""
    words = set(re.findall(r"\w+", question))
    wanted = {"color": words & {*COLORS}, "shape": words & {*SHAPES, "sign"}}
    wanted["cell"] = {cell for cell, phrase in enumerate(CELL_PHRASES) if question.endswith(f" {phrase}?")}
    found = [obj for obj in objects if all(obj[key] in values for key, values in wanted.items() if values)]
    return found[0] if len(found) == 1 else None


def read_questions(world: Path, count: int) -> list[dict]:
    """The first `count` questions about one object, each with that object. Raises ValueError if there are fewer."""
    objects = {row["image"]: row["things"] for row in read_rows(world / "scenes.jsonl")}
    rows = [row for row in read_rows(world / "questions.jsonl") if row["category"] in FAMILIES]
    rows = [row | {"object": find_object(row["text"], objects.get(row["image"], []))} for row in rows]
    found = [row for row in rows if row["object"]]
    if len(found) < count:
        raise ValueError(f"{world}: {len(found)} questions about one object with its box, not {count}")
    return found[:count]


def make_answer(question: dict, world: Path, model: Llava, tokenizer: Tokenizer) -> tuple[Answer, list[int]]:
    """The true answer, with the word that answers the question alone, and the positions of all its tokens.

    A place of two words ("top left") counts as one word.
    """
    image = load_image(world, question["image"], model.config)
    turn = Turn(question["text"], question["answer"], 1)
    ids, labels = render_dialogue([turn], tokenizer, model.config.template, image.tokens)
    answered = [i for i, label in enumerate(labels) if label != IGNORE]
    words = maps.find_words(ids[: answered[0]], ids[answered[0] :], question["answer"], tokenizer)
    place = CELL_NAMES[question["object"]["cell"]] if question["category"] == "position" else ""
    last = words[-max(1, len(place.split())) :]
    word = Word(" ".join(w.text for w in last), [i for w in last for i in w.positions])
    return Answer(ids, [word], [image]), answered


def is_right(model: Llava, answer: Answer, answered: list[int]) -> bool:
    """True if greedy decoding gives the true answer: each of its tokens is the likeliest after those before it."""
    states = maps.read(model, answer)[1][[i - 1 for i in answered]]
    return model.language_model.lm_head(states).argmax(-1).tolist() == [answer.ids[i] for i in answered]


def make_maps(model: Llava, answer: Answer) -> dict[str, np.ndarray]:
    """The positive values (I,) of each map of the answer's one word."""
    layers = maps.layer_attention(model, answer)[:, 0]
    found = {"attention": layers.mean(0)} | {f"attention, layer {i}": layer for i, layer in enumerate(layers, 1)}
    found |= {"gradient": maps.gradient_map(model, answer)[0], "occlusion": maps.occlusion_map(model, answer)[0]}
    return {name: values.clamp(min=0).numpy() for name, values in found.items()}


def compare_boxes(boxes: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For boxes (I, 4): the share of each that lies in the box `target` (4,), and whether its center does."""
    low, high = boxes[:, :2], boxes[:, 2:]
    common = (np.minimum(high, target[2:]) - np.maximum(low, target[:2])).clip(0)
    center = (low + high) / 2
    return common.prod(1) / (high - low).prod(1), ((target[:2] <= center) & (center <= target[2:])).all(1)


def cover(pixels: torch.Tensor, numbers: list[int], side: int) -> torch.Tensor:
    """A copy of tiles (N, 3, S, S) in which these patches are zero, the mean color of CLIP's training images."""
    patches = F.unfold(pixels, side, stride=side).transpose(1, 2).contiguous()  # (N, P, 3 * side * side)
    patches.view(-1, patches.shape[-1])[numbers] = 0
    return F.fold(patches.transpose(1, 2), pixels.shape[-2:], side, stride=side)


@torch.no_grad()
def deletion_areas(model: Llava, answer: Answer, order: list[int]) -> dict[str, float]:
    """Mean probability of the word over the curve from no removed patch to all, which are removed in this order."""
    pixels, side = answer.images[0].pixels.to(model.device), model.config.vision_config.patch_size
    counts = sorted({round(n) for n in np.linspace(0, len(order), STEPS + 1)})
    features = model.vision_features(pixels)
    removed = {"deletion, features": [maps.remove_patches(features, order[:n]) for n in counts]}
    covered = torch.cat([cover(pixels, order[:n], side) for n in counts])
    removed["deletion, pixels"] = model.vision_features(covered).split(len(pixels))
    curves = {name: maps.log_probabilities(model, answer, some)[:, 0].exp().numpy() for name, some in removed.items()}
    return {name: float(np.trapezoid(curve, counts) / len(order)) for name, curve in curves.items()}


def score_questions(model: Llava, tokenizer: Tokenizer, world: Path, questions: list[dict]) -> Iterator[dict]:
    """For each question and map: {"map", "family", "right", and the three measures}."""
    rng = np.random.default_rng(0)
    for question in tqdm(questions, "questions", unit="question"):
        answer, answered = make_answer(question, world, model, tokenizer)
        (height, width), patches = answer.images[0].size, np.array(maps.all_patches(answer, model.config))
        boxes = np.array([box for box in token_boxes((height, width), model.config) if box])
        inside, centers = compare_boxes(boxes, np.array(question["object"]["box"]) * [width, height, width, height])
        shown = patches != NEWLINE
        found = {name: values[shown] for name, values in make_maps(model, answer).items()}
        found |= {"random": rng.random(len(boxes)), "area alone": np.ones(len(boxes)), "the box": inside}
        row = {"family": question["category"], "right": is_right(model, answer, answered)}
        for name, values in found.items():
            values = values if values.any() else np.ones(len(values))  # a map of zeros says nothing
            order = patches[shown][np.argsort(-values, kind="stable")].tolist()
            row |= {"map": name, "in the box": values @ inside / values.sum()}
            row |= {"pointing": centers[values == values.max()].mean()}
            areas = deletion_areas(model, answer, order)
            yield row | (dict.fromkeys(areas, np.nan) if name == "area alone" else areas)


def mean_and_error(values: list[float]) -> str:
    """ "mean ± standard error" in percent."""
    values = 100 * np.array(values)
    return f"{values.mean():.1f} ± {values.std(ddof=1) / len(values) ** 0.5:.1f}" if np.isfinite(values).all() else "-"


def make_table(rows: list[dict]) -> str:
    """The measures of each map in Markdown, and pointing by family."""
    measures = ("in the box", "pointing", "deletion, features", "deletion, pixels")
    columns = [(name, name, None) for name in measures] + [(f"pointing: {name}", "pointing", name) for name in FAMILIES]
    lines = ["| map | " + " | ".join(title for title, *_ in columns) + " |", "|---|" + "---:|" * len(columns)]
    for name in dict.fromkeys(row["map"] for row in rows):
        cells = []
        for _, measure, family in columns:
            chosen = [row[measure] for row in rows if row["map"] == name and family in (None, row["family"])]
            cells.append(mean_and_error(chosen) if len(chosen) > 1 else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """Print the tables of all questions and of those that the model answers rightly."""
    parser = cli.make_parser(__doc__, "python -m insight.score")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a model of the embedded world")
    add("--adapter", type=Path, help="folder of an adapter that LoRA trained for --model")
    add("--world", type=Path, required=True, help="folder of the world: questions.jsonl, scenes.jsonl, images")
    add("--questions", type=int, default=500, help="number of questions about one object")
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    args = parser.parse_args()
    if args.questions < 2:
        parser.error("--questions must be at least 2")
    questions = read_questions(args.world, args.questions)
    model, tokenizer = load_with_adapter(args.model, args.adapter, choose_device(args.device), torch.float32)
    if model.config.vision_config is None:
        raise ValueError(f"{args.model}: a decoder without a vision tower has no map of an image")
    rows = list(score_questions(model, tokenizer, args.world, questions))
    for title, chosen in (("all", rows), ("answered rightly", [row for row in rows if row["right"]])):
        families = Counter(row["family"] for row in chosen if row["map"] == "random")
        print(f"\n{title}: {families.total()} questions ({', '.join(f'{n} {name}' for name, n in families.items())})\n")
        print(make_table(chosen))


if __name__ == "__main__":
    cli.run(main, "insight.score")
