"""The metric of the world's descriptions, and five probes: tests that vary one condition and show where a model fails.

    python eval.py --task probes --model out/speedrun/stage2

The probes ask about held-out scenes, drawn at the image size of the model.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path

from evaluation import metrics
from evaluation.metrics import plain_form, yes_no_llava, yes_no_scores
from inputs.files import write_json
from training import plots
from world.drawing import draw_scene, font_size, load_font
from world.language import find_directions, with_article
from world.scenes import COLORS, SHAPES, SIGN_RADIUS, Scene, make_scene, sample_scene, sample_shapes, sample_until
from world.writer import make_questions

# ---------------------------------------------------------------------------------------------------------------------
# the metric of descriptions; exact match scores the world's other questions


def objects_f1(answer: str, truth: str) -> float:
    """Return the F1 score over the objects that two descriptions name; every attribute and the cell must be right."""
    found, wanted = find_objects(answer), find_objects(truth)
    right = (Counter(found) & Counter(wanted)).total()
    return 2 * right / (len(found) + len(wanted)) if right else 0.0


def find_objects(text: str) -> list[str]:
    """Return every object that a description of a scene names, as in "large red star in the top left"."""
    name = rf"(?:\w+ (?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})|sign that says \w+)"
    return re.findall(rf"{name} (?:in|at|on) the (?:top left|top right|bottom left|bottom right|\w+)", text.lower())


METRICS = metrics.METRICS | {"objects_f1": objects_f1}


def default_metric(category: str, path: Path) -> str:
    """Return the metric of a question that names none: exact match, but objects_f1 for the descriptions of an older
    world, whose questions.jsonl (with a scenes.jsonl beside it) names no metrics."""
    is_world = path.name == "questions.jsonl" and (path.parent / "scenes.jsonl").exists()
    return "objects_f1" if category == "description" and is_world else "exact"


# ---------------------------------------------------------------------------------------------------------------------
# the five probes
#
# Each function yields rows: a question as eval.py reads it, its probe and condition, and the scene to draw.

SEED = 6
TRAINING_SCENES = 3000  # number of scenes in which probe_existence counts objects


def make_row(probe: str, condition: str, scene: Scene, text: str, truth: str, **more) -> dict:
    return {"text": text, "answer": truth, "probe": probe, "condition": condition, "scene": scene} | more


def probe_existence(count: int, rng: random.Random) -> Iterator[dict]:
    """Ask if there is an object, as many present as absent ones. Condition: how the absent objects are chosen.

    As in POPE (Li et al. 2023, section 4): random; popular, the most frequent in training scenes; adversarial, those
    that training scenes most often show together with the scene's objects. Near miss: one object has the color and
    another the shape.
    """
    seen = [make_scene(0, index, False)[0].color_shape_pairs for index in range(TRAINING_SCENES)]
    frequency = Counter(pair for pairs in seen for pair in pairs)
    co_occurrence = Counter(both for pairs in seen for both in combinations(sorted(pairs), 2))
    every = list(product(COLORS, SHAPES))
    for _ in range(count):
        scene = sample_until(partial(sample_scene, rng), True)
        present = sorted(scene.color_shape_pairs)
        absent = rng.sample([pair for pair in every if pair not in present], len(every) - len(present))
        colors, shapes = zip(*present)
        company = {pair: sum(co_occurrence[tuple(sorted((pair, other)))] for other in present) for pair in absent}
        negatives = {
            "random": absent,
            "popular": sorted(absent, key=lambda pair: -frequency[pair]),
            "adversarial": sorted(absent, key=lambda pair: -company[pair]),
            "near miss": [(color, shape) for color, shape in absent if color in colors and shape in shapes],
        }
        for condition, pairs in negatives.items():
            positives = [] if condition == "near miss" else present
            for pair in positives + pairs[: len(present)]:
                text, truth = f"Is there {with_article(' '.join(pair))}?", "yes" if pair in present else "no"
                yield make_row("existence", condition, scene, text, truth)


def probe_counting(count: int, rng: random.Random) -> Iterator[dict]:
    """Ask how many shapes there are. Condition: the true number, up to seven; training scenes hold at most six."""
    for number in range(1, 8):
        for _ in range(count):
            scene = sample_until(partial(sample_shapes, number, rng), True)
            yield make_row("counting", str(number), scene, "How many shapes are there?", str(number))


def probe_relations(count: int, rng: random.Random) -> Iterator[dict]:
    """Ask where one shape is, seen from another. Condition: the steps between their cells, 1 to 4."""

    def sample(kinds: list[str], cell_pairs: list[tuple[int, int]]) -> Scene:
        scene, cells = sample_shapes(2, rng), rng.choice(cell_pairs)
        objects = (replace(obj, shape=kind, cell=cell) for obj, kind, cell in zip(scene.objects, kinds, cells))
        return replace(scene, objects=tuple(objects))

    for distance in range(1, 5):
        cell_pairs = [(a, b) for a, b in product(range(9), repeat=2) if count_steps(a, b) == distance]
        for _ in range(count):
            scene = sample_until(partial(sample, rng.sample(SHAPES, 2), cell_pairs), True)
            first, second = scene.objects
            text = f"Where is the {first.shape}, seen from the {second.shape}?"
            yield make_row("relations", str(distance), scene, text, " and ".join(find_directions(first, second)))


def count_steps(a: int, b: int) -> int:
    """Return the number of rows plus the number of columns between two cells."""
    return abs(a // 3 - b // 3) + abs(a % 3 - b % 3)


SCALES = (0.4, 0.55, 0.7, 0.85, 1.0, 1.3)  # size of a sign, relative to the largest of the training images


def probe_reading(count: int, rng: random.Random) -> Iterator[dict]:
    """Ask what the sign says. Condition: height of the text in pixels (make_probes sets it), digit or word."""
    for scale in SCALES:
        for _ in range(count):
            while not (scene := sample_until(partial(sample_scene, rng), True)).sign or scene.sign.size != "large":
                pass
            yield make_row("reading", "", scene, "What does the sign say?", scene.sign.text, scale=scale)


def probe_prior(count: int, rng: random.Random) -> Iterator[dict]:
    """Ask the world's held-out questions. Condition: their own image, a blank one, or the image of another question.

    An answer that is right without the image was guessed from the question alone.
    """
    for question in make_questions(SEED, count, first=rng.randrange(10**6)):
        index = int(Path(question.pop("image")).stem)
        own, other = (make_scene(SEED, i, held_out=True)[0] for i in (index, index + 10**7))
        for condition, scene in (("own image", own), ("blank", own), ("another image", other)):
            shown = {"condition": condition, "scene": scene, "blank": condition == "blank"}
            yield question | {"probe": "language prior"} | shown


PROBES = (probe_existence, probe_counting, probe_relations, probe_reading, probe_prior)


# ---------------------------------------------------------------------------------------------------------------------
# images


def make_probes(folder: Path, side: int, count: int) -> list[dict]:
    """Return the questions of all probes and draw their images into `folder`.

    Args: side: side of an image in pixels; count: questions per condition, for existence scenes per condition.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for probe in PROBES for row in probe(count, random.Random(f"{SEED} {probe.__name__}"))]
    files = {}
    for number, row in enumerate(rows):
        scene, scale = key = row.pop("scene"), row.pop("scale", 1.0)
        if key not in files:
            files[key] = f"{len(files):06d}.png"
            draw_scene(scene, side, scale).save(folder / files[key], compress_level=1)
        if row["probe"] == "reading":
            text = scene.sign.text
            row["condition"] = f"{'digit' if len(text) == 1 else 'word'}, {text_height(text, scale, side)} px"
        row |= {"question_id": number, "image": files[key]}
    return rows


def text_height(text: str, scale: float, side: int) -> int:
    """Return the height of a digit or capital letter on a sign of this scale, in pixels."""
    _, top, _, bottom = load_font(font_size(text, 4 * side * scale * SIGN_RADIUS["large"])).getbbox("8")
    return round((bottom - top) / 4)


# ---------------------------------------------------------------------------------------------------------------------
# results


def score_probe(row: dict, answer: str) -> float:
    """Score an answer. In "existence" and "relations" only the conclusion counts, in "reading" the last word."""
    if row["probe"] in ("existence", "relations"):
        return float(plain_form(answer.split(", so ")[-1]) == plain_form(row["answer"]))
    if row["probe"] == "reading":
        return float(plain_form(answer).split(" ")[-1] == row["answer"].lower())
    return METRICS[row.get("metric", "exact")](answer, row["answer"])


def summarize(rows: list[dict], answers: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Return probe -> condition -> {"questions": count, "right": percent, other measures of the probe}."""
    groups = defaultdict(list)
    for row, answer in zip(rows, answers):
        groups[row["probe"], row["condition"]].append((row, answer))
    found = defaultdict(dict)
    for (probe, condition), pairs in groups.items():
        values = {"questions": len(pairs), "right": 100 * sum(score_probe(*pair) for pair in pairs) / len(pairs)}
        if probe == "existence":  # POPE's metrics; if no true answer is yes, only the ratio of yes answers is defined
            labels = [row["answer"] for row, _ in pairs]
            measured = yes_no_scores([yes_no_llava(answer) for _, answer in pairs], labels)
            names = ("precision", "recall", "f1") if "yes" in labels else ()
            values |= {name: measured[name] for name in (*names, "yes ratio")}
        if probe == "counting":
            said = [(plain_form(answer), int(row["answer"])) for row, answer in pairs]
            errors = [abs(int(number) - truth) for number, truth in said if number.isdecimal()]
            values |= {"numbers": len(errors), "mean error": sum(errors) / len(errors) if errors else None}
        found[probe][condition] = values
    heights = sorted(found["reading"], key=lambda name: (name.split()[0], int(name.split()[1])))
    return found | {"reading": {name: found["reading"][name] for name in heights}}


CONDITIONS = {  # probe -> what its condition varies
    "existence": "absent objects asked about",
    "counting": "true number",
    "relations": "steps apart",
    "reading": "height of the text",
    "language prior": "image shown",
}


def to_markdown(found: dict, side: int) -> str:
    """Return a table per probe."""
    lines = ["# Probes", "", f"Held-out scenes, drawn {side} pixels square.", ""]
    for probe, conditions in found.items():
        columns = list(next(iter(conditions.values())))
        lines += [f"## {probe.capitalize()}", "", f"| {CONDITIONS[probe]} | {' | '.join(columns)} |"]
        lines.append("|---|" + "---:|" * len(columns))
        for name, values in conditions.items():
            cells = [format_value(column, values.get(column)) for column in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, "![probes](probes.png)", ""])


def format_value(column: str, value: float | None) -> str:
    digits = 0 if isinstance(value, int) else 2 if column == "mean error" else 1
    return "" if value is None else f"{value:.{digits}f}"


def write_report(rows: list[dict], answers: list[str], folder: Path, side: int) -> str:
    """Write probes.json, probes.md and probes.png into a folder; return the Markdown."""
    found = summarize(rows, answers)
    table = to_markdown(found, side)
    write_json(folder / "probes.json", found)
    (folder / "probes.md").write_text(table)
    right = {probe: {name: values["right"] for name, values in rows.items()} for probe, rows in found.items()}
    plots.bars(folder / "probes.png", right, CONDITIONS)
    return table
