"""Where a model of the embedded world goes wrong: five probes, each a question asked under one condition at a time.

    python eval.py --task probes --model out/speedrun/stage2

Pictures and questions are drawn for it, from the held-out side of the world, as large as the model sees them. The
metric of the world's descriptions stands here too.
"""

import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from PIL import Image

from evaluation import metrics
from evaluation.metrics import plain_form, yes_no_llava, yes_no_scores
from training import plots
from world import shapes
from world.shapes import COLORS, SHAPES, Scene, Thing

# ---------------------------------------------------------------------------------------------------------------------
# the metric of the world's descriptions; its other questions are scored by exact match


def objects_f1(answer: str, truth: str) -> float:
    """F1 over the objects that two descriptions name. A shape is right if size, color, kind and position are; a sign if
    text and position are."""
    named, wanted = find_objects(answer), find_objects(truth)
    right = sum(min(named.count(name), wanted.count(name)) for name in set(wanted))
    return 2 * right / (len(named) + len(wanted)) if right else 0.0


def find_objects(text: str) -> list[str]:
    """Every object that a description of the embedded world names, as "large red star in the top left"."""
    name = rf"(?:\w+ (?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})|sign that says \w+)"
    return re.findall(rf"{name} (?:in|at|on) the (?:top left|top right|bottom left|bottom right|\w+)", text.lower())


METRICS = metrics.METRICS | {"objects_f1": objects_f1}


def default_metric(category: str, path: Path) -> str:
    """The metric of a question that names none: exact match. Worlds written before questions named their metric are
    recognized by the scenes.jsonl beside the question file; their descriptions are scored by the objects."""
    return "objects_f1" if category == "description" and (path.parent / "scenes.jsonl").exists() else "exact"


# ---------------------------------------------------------------------------------------------------------------------
# five probes
#
# Each makes rows: a question as eval.py asks it, and under "probe" what it is for. The picture is a scene, drawn later.

SEED = 6
SEEN = 3000  # training scenes that frequencies are counted in


def ask(probe: str, condition: str, scene: Scene, text: str, truth: str, **more) -> dict:
    return {"text": text, "answer": truth, "probe": probe, "condition": condition, "scene": scene} | more


def held_out(draw, rng: random.Random) -> Scene:
    return shapes.draw_until(lambda: draw(rng), True)


def pairs_of(scene: Scene) -> set[tuple[str, str]]:
    return {(thing.color, thing.shape) for thing in scene.shapes}


def probe_existence(count: int, rng: random.Random) -> list[dict]:
    """Is there a red star? Half of the answers are no; which absent things are asked after makes the split, as in POPE
    (Li et al. 2023, section 4): any, the most frequent ones in the training scenes, those that most often stand there
    beside what is in the picture. And a near miss: color and shape are both there, but not in one thing."""
    seen = [pairs_of(shapes.make_scene(0, index, False)[0]) for index in range(SEEN)]
    frequent = Counter(pair for pairs in seen for pair in pairs)
    beside = Counter(both for pairs in seen for both in combinations(sorted(pairs), 2))
    every, rows = [(color, shape) for color in COLORS for shape in SHAPES], []
    for _ in range(count):
        scene = held_out(shapes.draw_scene, rng)
        there = sorted(pairs_of(scene))
        absent = rng.sample([pair for pair in every if pair not in there], len(every) - len(there))
        near = [(c, s) for c, s in absent if c in {c for c, _ in there} and s in {s for _, s in there}]
        company = {pair: sum(beside[tuple(sorted((pair, other)))] for other in there) for pair in absent}
        splits = {
            "random": absent,
            "popular": sorted(absent, key=lambda pair: -frequent[pair]),
            "adversarial": sorted(absent, key=lambda pair: -company[pair]),
            "near miss": near,
        }
        for split, negatives in splits.items():
            for pair, truth in [(p, "yes") for p in there] + [(p, "no") for p in negatives[: len(there)]]:
                if split != "near miss" or truth == "no":
                    article = "an" if pair[0] == "orange" else "a"
                    rows.append(ask("existence", split, scene, f"Is there {article} {' '.join(pair)}?", truth))
    return rows


def some_shapes(count: int, rng: random.Random) -> Scene:
    cells = rng.sample(range(9), count)
    things = [Thing(rng.choice(SHAPES), rng.choice([*COLORS]), rng.choice([*shapes.RADIUS]), cell) for cell in cells]
    tint = tuple(rng.randint(200, 250) for _ in range(3))
    return Scene(tuple(shapes.place(thing, rng) for thing in things), rng.choice(shapes.BACKGROUNDS), tint)


def probe_counting(count: int, rng: random.Random) -> list[dict]:
    """How many shapes? By the true number; training scenes never hold more than three."""
    rows = []
    for number in range(1, 6):
        for _ in range(count):
            scene = held_out(lambda rng, number=number: some_shapes(number, rng), rng)
            rows.append(ask("counting", str(number), scene, "How many shapes are there?", str(number)))
    return rows


def probe_relations(count: int, rng: random.Random) -> list[dict]:
    """Where is one of two shapes, seen from the other? By the steps between them on the board, 1 to 4."""
    rows = []
    for distance in range(1, 5):
        places = [(a, b) for a in range(9) for b in range(9) if steps(a, b) == distance]
        for _ in range(count):
            kinds = rng.sample(SHAPES, 2)

            def draw(rng, kinds=kinds, places=places):
                scene, cells = some_shapes(2, rng), rng.choice(places)
                things = (replace(t, shape=k, cell=c) for t, k, c in zip(scene.things, kinds, cells))
                return replace(scene, things=tuple(things))

            scene = held_out(draw, rng)
            one, other = scene.things
            text = f"Where is the {one.shape}, seen from the {other.shape}?"
            rows.append(ask("relations", str(distance), scene, text, " and ".join(shapes.directions_of(one, other))))
    return rows


def steps(a: int, b: int) -> int:
    return abs(a // 3 - b // 3) + abs(a % 3 - b % 3)


SCALES = (0.4, 0.55, 0.7, 0.85, 1.0, 1.3)  # of a sign, against those of the training pictures


def probe_reading(count: int, rng: random.Random) -> list[dict]:
    """What does the sign say? By the height of its text, which goes with the size of the sign and of the picture; words
    are written smaller than digits."""
    rows = []
    for scale in SCALES:
        for _ in range(count):

            def draw(rng):
                scene = shapes.draw_scene(rng)
                while scene.sign is None:
                    scene = shapes.draw_scene(rng)
                return scene

            scene = held_out(draw, rng)
            rows.append(ask("reading", "", scene, "What does the sign say?", scene.sign.text, scale=scale))
    return rows


def probe_prior(count: int, rng: random.Random) -> list[dict]:
    """The world's own questions as they are, with the picture blanked, and with the picture of another question: what
    is still right then was guessed from the words alone."""
    rows, index, number = [], rng.randrange(10**6), 0
    while number < count:
        question = shapes.questions_of(SEED, index, number)
        if question:
            scenes = [shapes.make_scene(SEED, i, held_out=True)[0] for i in (index, index + 10**7)]
            same = {"text": question["text"], "truth": question["answer"], "category": question["category"]}
            same |= {"metric": question["metric"]} if "metric" in question else {}
            rows.append(ask("language prior", "its picture", scenes[0], **same))
            rows.append(ask("language prior", "blank", scenes[0], **same, blank=True))
            rows.append(ask("language prior", "another picture", scenes[1], **same))
            number += 1
        index += 1
    return rows


PROBES = (probe_existence, probe_counting, probe_relations, probe_reading, probe_prior)


def make_probes(folder: Path, side: int, count: int) -> list[dict]:
    """Questions of all probes, `count` for each condition (of existence, scenes), with their pictures in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for probe in PROBES for row in probe(count, random.Random(f"{SEED} {probe.__name__}"))]
    drawn = {}
    for number, row in enumerate(rows):
        key = (row.pop("scene"), row.pop("scale", 1.0))
        if key not in drawn:
            drawn[key] = f"{len(drawn):06d}.png"
            draw_scaled(*key, side).save(folder / drawn[key], compress_level=1)
        if row["probe"] == "reading":
            text = key[0].sign.text
            row["condition"] = f"{'digit' if len(text) == 1 else 'word'}, {text_height(text, key[1], side)} px"
        row |= {"question_id": number, "image": drawn[key]}
    return rows


def draw_scaled(scene: Scene, scale: float, side: int) -> Image.Image:
    """The scene with its sign enlarged: drawn alone on a larger or smaller picture, then put in its place."""
    if scale == 1 or scene.sign is None:
        return shapes.render(scene, side)
    others = replace(scene, things=tuple(thing for thing in scene.things if not thing.text))
    picture, large = shapes.render(others, side), round(side * scale)
    sign = shapes.render(replace(scene, things=(scene.sign,)), large)
    sign = sign.crop(tuple(round(large * v) for v in scene.sign.box))
    x, y = (round(side * v) for v in scene.sign.center)
    picture.paste(sign, (x - sign.width // 2, y - sign.height // 2))
    return picture


def text_height(text: str, scale: float, side: int) -> int:
    """Pixels of a digit, or a capital letter, from top to bottom in the font of a sign (see shapes.draw_sign)."""
    font = shapes.font_of(round(4 * round(side * scale) * (0.27 if len(text) == 1 else 0.155)))
    _, top, _, bottom = font.getbbox("8")
    return round((bottom - top) / 4)


# ---------------------------------------------------------------------------------------------------------------------
# what came of them


def right(row: dict, answer: str) -> float:
    """Whether a probe's answer is right: of a relation, what it concludes; of a sign, its text."""
    if row["probe"] == "relations":
        return float(plain_form(answer.split(", so ")[-1]) == plain_form(row["answer"]))
    if row["probe"] == "reading":
        return float(plain_form(answer).split(" ")[-1] == row["answer"].lower())
    return METRICS[row.get("metric", "exact")](answer, row["answer"])


def results(rows: list[dict], answers: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """By probe and condition: how many questions, how many per cent are right, and what else the probe tells."""
    groups = defaultdict(list)
    for row, answer in zip(rows, answers):
        groups[row["probe"], row["condition"]].append((row, answer))
    found = defaultdict(dict)
    for (probe, condition), pairs in groups.items():
        values = {"questions": len(pairs), "right": 100 * sum(right(*pair) for pair in pairs) / len(pairs)}
        if probe == "existence":
            said, labels = [yes_no_llava(answer) for _, answer in pairs], [row["answer"] for row, _ in pairs]
            measured = yes_no_scores(said, labels)
            wanted = ("precision", "recall", "f1", "yes ratio") if "yes" in labels else ("yes ratio",)
            values |= {name: measured[name] for name in wanted}
        if probe == "counting":
            numbers = [(int(form), int(row["answer"])) for row, a in pairs if (form := plain_form(a)).isdecimal()]
            off = [abs(said - truth) for said, truth in numbers]
            values |= {"numbers": len(numbers), "mean error": sum(off) / len(off) if off else None}
        found[probe][condition] = values
    heights = sorted(found["reading"], key=lambda name: (name.split()[0], int(name.split()[1])))
    return found | {"reading": {name: found["reading"][name] for name in heights}}


BY = {
    "existence": "absent things asked after",
    "counting": "true number",
    "relations": "steps apart",
    "reading": "height of the text",
    "language prior": "shown",
}


def markdown(found: dict, side: int) -> str:
    """Every probe as a table."""
    lines = ["# Probes", "", f"Held-out scenes, drawn {side} pixels square.", ""]
    for probe, conditions in found.items():
        columns = list(next(iter(conditions.values())))
        lines += [f"## {probe.capitalize()}", "", f"| {BY[probe]} | {' | '.join(columns)} |"]
        lines.append("|---|" + "---:|" * len(columns))
        for name, values in conditions.items():
            cells = [shown(column, values.get(column)) for column in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, "![probes](probes.png)", ""])


def shown(column: str, value: float | None) -> str:
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    return f"{value:.2f}" if column == "mean error" else f"{value:.1f}"


def draw_bars(found: dict, path: Path):
    """A panel of bars for each probe: per cent right by condition."""
    panels = {probe: {name: values["right"] for name, values in rows.items()} for probe, rows in found.items()}
    plots.bars(path, panels, {probe: BY[probe] for probe in panels})
