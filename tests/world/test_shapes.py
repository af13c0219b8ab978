"""The embedded world: the same everywhere, never the same on both sides, and every word about a picture is true."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inputs.records import read_records
from world import shapes

SCENES = 2000
# Written out again, so that a slip in shapes.py's own tables is seen: (row, column) of every phrase for a place.
PHRASES = {
    **{"in the top left": (0, 0), "at the top": (0, 1), "in the top right": (0, 2)},
    **{"on the left": (1, 0), "in the center": (1, 1), "on the right": (1, 2)},
    **{"in the bottom left": (2, 0), "at the bottom": (2, 1), "in the bottom right": (2, 2)},
}
PHRASE = "|".join(sorted(PHRASES, key=len, reverse=True))
SHAPE, COLOR, SIZE = "|".join(shapes.SHAPES), "|".join(shapes.COLORS), "|".join(shapes.RADIUS)
NAME = rf"(?:(?P<size>{SIZE}) (?P<color>{COLOR}) (?P<shape>{SHAPE})|sign that says (?P<text>\w+))"
SIDES = "to the left of|to the right of|above|below"


@pytest.fixture(scope="module")
def scenes():
    return [shapes.make_scene(0, index, held_out=False)[0] for index in range(SCENES)]


@pytest.fixture(scope="module")
def asked():
    """family -> [(scene, question, answer)]: every family asked about every scene, on both sides of the split."""
    result = {family: [] for family in shapes.FAMILIES}
    for index in range(SCENES):
        scene, rng = shapes.make_scene(1, index, held_out=index % 2 == 0)
        for family, ask in shapes.FAMILIES.items():
            for _ in range(2):
                if pair := ask(scene, rng):
                    result[family].append((scene, *pair))
    return result


def place(thing):
    """(row, column) of the third of the picture that the thing's center is in, as an eye would judge it."""
    x, y = thing.center
    return math.floor(3 * y), math.floor(3 * x)


def phrase(thing):
    return only(words for words, where in PHRASES.items() if where == place(thing))


def only(things):
    things = list(things)
    assert len(things) == 1, things  # "the star" must name one thing
    return things[0]


def beside(thing, side, anchor):
    (row, column), (anchor_row, anchor_column) = place(thing), place(anchor)
    return {
        "to the left of": column < anchor_column,
        "to the right of": column > anchor_column,
        "above": row < anchor_row,
        "below": row > anchor_row,
    }[side]


def truth(scene, question):
    """The answer to a question, worked out here from the list of things alone. None: a request to describe."""
    things = [thing for thing in scene.things if thing.shape != "sign"]

    def the(shape):
        return only(thing for thing in scene.things if thing.shape == shape)

    def having(**facts):
        return [thing for thing in things if all(getattr(thing, key) == value for key, value in facts.items())]

    def ask(pattern):
        return (found.groups() or (question,)) if (found := re.fullmatch(pattern, question)) else None

    if m := ask(rf"(?:Is there|Do you see) an? ({COLOR}) ({SHAPE})(?: in the picture)?\?"):
        return "yes" if having(color=m[0], shape=m[1]) else "no"
    if m := ask(rf"(?:Is there|Do you see) an? ({COLOR}) shape(?: in the picture)?\?"):
        return "yes" if having(color=m[0]) else "no"
    if m := ask(rf"(?:Is there|Do you see) a ({SHAPE})(?: in the picture)?\?"):
        return "yes" if having(shape=m[0]) else "no"
    if m := ask(rf"(?:What color is|Which color does) the ({SHAPE})(?: have)?\?"):
        return f"The {m[0]} is {the(m[0]).color}."
    if m := ask(rf"What shape is ({PHRASE})\?"):
        found = only(thing for thing in things if place(thing) == PHRASES[m[0]])
        return f"{m[0][0].upper()}{m[0][1:]} is a {found.shape}."
    if m := ask(rf"(?:What shape is the|Which shape is) ({COLOR})(?: one)?\?"):
        return f"The {m[0]} one is a {only(having(color=m[0])).shape}."
    if ask(r"How many shapes are there\?"):
        return str(len(things))
    if m := ask(rf"How many ({COLOR}) shapes are there\?"):
        return str(len(having(color=m[0])))
    if m := ask(rf"How many ({SHAPE})(?:s|es) are there\?"):
        return str(len(having(shape=m[0])))
    if m := ask(rf"(?:Where|In which place) is the ({SHAPE}|sign)\?"):
        return f"The {m[0]} is {phrase(the(m[0]))}."
    if m := ask(rf"(?:Where|In which place) is the ({COLOR}) ({SHAPE})\?"):
        return f"The {m[0]} {m[1]} is {phrase(only(having(color=m[0], shape=m[1])))}."
    if m := ask(rf"Where is the ({SHAPE}|sign), seen from the ({SHAPE}|sign)\?"):
        one, other = the(m[0]), the(m[1])
        holds = [side for side in ("above", "below") if beside(one, side, other)]
        holds += [f"to the {side}" for side in ("left", "right") if beside(one, f"to the {side} of", other)]
        return f"The {m[0]} is {phrase(one)} and the {m[1]} is {phrase(other)}, so {' and '.join(holds)}."
    if m := ask(rf"Is the ({SHAPE}|sign) ({SIDES}) the ({SHAPE}|sign)\?"):
        one, other = the(m[0]), the(m[2])
        assert place(one) != place(other)
        verdict = "yes" if beside(one, m[1], other) else "no"
        return f"The {m[0]} is {phrase(one)} and the {m[2]} is {phrase(other)}, so {verdict}."
    if ask(r"What does the sign say\?|What is written on the sign\?"):
        return f"The sign says {the('sign').text}."
    if m := ask(rf"Do the ({SHAPE}) and the ({SHAPE}) have the same color\?"):
        one, other = the(m[0]).color, the(m[1]).color
        return f"The {m[0]} is {one} and the {m[1]} is {other}, so {'yes' if one == other else 'no'}."
    if m := ask(rf"Which is (larger|smaller), the ({SHAPE}) or the ({SHAPE})\?"):
        one, other = the(m[1]).size, the(m[2]).size
        assert one != other
        answer = m[1] if (shapes.RADIUS[one] > shapes.RADIUS[other]) == (m[0] == "larger") else m[2]
        return f"The {m[1]} is {one} and the {m[2]} is {other}, so the {answer}."
    if m := ask(rf"(What color is the|Which) shape (?:is )?({SIDES}) the ({SHAPE}|sign)\?"):
        found = only(thing for thing in things if beside(thing, m[1], the(m[2])))
        return found.color if m[0].startswith("What color") else found.shape
    if m := ask(rf"Which other shape has the color of the ({SHAPE})\?"):
        return only(thing for thing in having(color=the(m[0]).color) if thing is not the(m[0])).shape
    assert question in ("Describe the picture.", "Describe the image in detail.", "What do you see?"), question
    return None


def facts(scene):
    """What a scene shows, in no order."""
    return sorted((thing.shape, thing.color, thing.size, thing.cell, thing.text) for thing in scene.things)


def named_in(text):
    """The things that a description names, each with its place, in no order."""
    found = [m.groupdict() for m in re.finditer(rf"{NAME} (?P<place>{PHRASE})", text)]
    found += [m.groupdict() for m in re.finditer(rf"(?P<place>{PHRASE}) there is a {NAME}", text)]
    assert len(found) == len(re.findall(NAME, text))
    rows = [(m["size"], m["color"], m["shape"], m["text"], PHRASES[m["place"]]) for m in found]
    return sorted(rows, key=str)


def named_by(scene):
    signs = [(None, None, None, thing.text, place(thing)) for thing in scene.things if thing.text]
    return sorted([(t.size, t.color, t.shape, None, place(t)) for t in scene.things if not t.text] + signs, key=str)


def check_description(scene, text):
    assert named_in(text) == named_by(scene), text


# ---------------------------------------------------------------------------------------------------------------------
# scenes


def fingerprint():
    """Of scenes, pictures and words of both sides."""
    digest = hashlib.sha256()
    for held_out in (False, True):
        for index in range(40):
            scene, rng = shapes.make_scene(5, index, held_out)
            words = [shapes.caption(scene, rng), shapes.notes(scene, rng), shapes.dialogues(scene, rng, 3)]
            digest.update(repr((scene, words)).encode() + shapes.render(scene, 48).tobytes())
    digest.update(repr([shapes.records_of(5, index, 6) for index in range(40)]).encode())
    digest.update(repr(shapes.make_questions(5, 40)).encode())
    return digest.hexdigest()


def test_a_seed_means_the_same_everywhere():
    mine = fingerprint()
    assert fingerprint() == mine
    here = Path(__file__).parent
    for salt in "1", "2":  # the order of a set of strings changes with it
        environment = os.environ | {
            "PYTHONHASHSEED": salt,
            "PYTHONPATH": os.pathsep.join((str(here), str(here.parents[1]))),
        }
        command = [sys.executable, "-c", "import test_shapes; print(test_shapes.fingerprint())"]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert output.strip() == mine


def test_a_scene_does_not_depend_on_what_was_made_before():
    alone = shapes.make_scene(0, 7, False)[0]
    assert [shapes.make_scene(0, index, False)[0] for index in range(9)][7] == alone
    assert shapes.make_scene(1, 7, False)[0] != alone != shapes.make_scene(0, 7, True)[0]


def test_train_and_heldout_share_no_scene():
    sides = [
        {str(facts(shapes.make_scene(seed, i, side)[0])) for seed in range(3) for i in range(2000)} for side in (0, 1)
    ]
    assert not sides[0] & sides[1]
    assert min(map(len, sides)) > 3000  # and there is no end of different ones


def test_siblings_differ_in_one_fact(scenes):
    differences = Counter()
    for index, scene in enumerate(scenes):
        base = scenes[index - index % shapes.FAMILY]
        assert len(scene.things) == len(base.things)
        named = ("shape", "color", "size", "cell", "text")
        count = sum(getattr(a, f) != getattr(b, f) for a, b in zip(scene.things, base.things) for f in named)
        differences[count] += 1
    assert set(differences) <= {0, 1} and differences[1] > 0.9 * SCENES * (1 - 1 / shapes.FAMILY)


def test_scenes_are_well_formed(scenes):
    kinds = Counter()
    for scene in scenes:
        assert len({thing.cell for thing in scene.things}) == len(scene.things) and scene.shapes
        assert sum(thing.shape == "sign" for thing in scene.things) <= 1
        for thing in scene.things:
            assert thing.cell == 3 * place(thing)[0] + place(thing)[1]  # well inside the third that its place names
            x, y = thing.center
            assert all(abs(3 * v - round(3 * v)) > 0.1 for v in (x, y))
            assert min(thing.box) > -0.05 and max(thing.box) < 1.05  # at most an edge is cut off
            kinds.update((thing.shape, thing.color, thing.size, thing.cell, thing.text))
    everything = [*shapes.SHAPES, *shapes.COLORS, *shapes.RADIUS, *range(9), *shapes.SIGNS]
    assert all(kinds[kind] > 20 for kind in everything)


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def test_boxes_lie_around_the_things():
    side = 120
    kinds = [(shape, color, "") for shape, color in zip(shapes.SHAPES, shapes.COLORS)] + [("sign", "white", "8")]
    for shape, color, text in kinds:
        for size in shapes.RADIUS:
            for cell in range(9):
                thing = shapes.Thing(shape, color, size, cell, dx=0.02, dy=-0.01, text=text)
                empty, drawn = (shapes.Scene(things, "plain", (220, 220, 220)) for things in ((), (thing,)))
                pixels, before = (np.array(shapes.render(scene, side)).astype(int) for scene in (drawn, empty))
                y, x = np.nonzero(np.abs(pixels - before).sum(-1) > 60)
                x1, y1, x2, y2 = (side * v for v in thing.box)
                assert x1 - 2 <= x.min() and x.max() <= x2 + 2 and y1 - 2 <= y.min() and y.max() <= y2 + 2, thing
                assert np.ptp(x) > 0.75 * (x2 - x1) and np.ptp(y) > 0.75 * (y2 - y1), thing  # and not far around them


def test_colors_can_be_told_apart():
    colors = {**shapes.COLORS, "sign": (252, 252, 248)}
    for (one, a), (other, b) in combinations(colors.items(), 2):
        assert math.dist(a, b) > 60, (one, other)


def test_every_shape_shows_its_color_in_its_middle(scenes):
    # What is drawn later may cover an edge, never the middle; and nothing of the background shines through.
    for scene in scenes[:200]:
        pixels = np.array(shapes.render(scene, 96)).astype(float)
        assert pixels.shape == (96, 96, 3)
        for thing in scene.shapes:
            x, y = (int(96 * v) for v in thing.center)
            assert math.dist(pixels[y, x], shapes.COLORS[thing.color]) < 20, thing


def test_background_is_pale(scenes):
    for scene in scenes[:100]:
        pixels = np.array(shapes.background(scene, 48)).astype(float)
        nearest = min(np.linalg.norm(pixels - color, axis=-1).min() for color in shapes.COLORS.values())
        assert nearest > 60 and pixels.mean() > 190


def test_signs_differ_in_their_pixels():
    def sign(text):
        thing = shapes.Thing("sign", "white", "large", 4, text=text)
        return np.array(shapes.render(shapes.Scene((thing,), "plain", (220, 220, 220)), 72)).astype(int)

    for one, other in combinations(map(sign, shapes.SIGNS), 2):
        assert (np.abs(one - other).max(-1) > 80).sum() >= 4  # "1" and "7", "6" and "8"


# ---------------------------------------------------------------------------------------------------------------------
# words


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_every_answer_is_true(family, asked):
    rows = asked[family]
    assert len(rows) > SCENES // 2
    for scene, question, answer in rows:
        if (expected := truth(scene, question)) is None:
            check_description(scene, answer)
        else:
            assert answer == expected, (question, facts(scene))


@pytest.mark.parametrize("family", ["existence", "relation"])
def test_half_of_the_answers_are_yes(family, asked):
    rows = [answer for _, question, answer in asked[family] if not question.startswith("Where")]
    answers = Counter(answer.rstrip(".").split()[-1] for answer in rows)
    assert set(answers) == {"yes", "no"} and 0.45 < answers["yes"] / answers.total() < 0.55


def test_half_of_the_same_colors_are_yes(asked):
    rows = [answer for _, question, answer in asked["comparison"] if question.startswith("Do ")]
    answers = Counter(answer.rstrip(".").split()[-1] for answer in rows)
    assert 0.45 < answers["yes"] / answers.total() < 0.55


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_no_answer_is_the_usual_one(family, asked):
    answers = Counter(answer for *_, answer in asked[family])
    assert max(answers.values()) < 0.6 * answers.total(), answers.most_common(3)


def test_captions_and_descriptions_say_all_there_is():
    openings = set()
    for index in range(SCENES):
        scene, rng = shapes.make_scene(2, index, held_out=False)
        check_description(scene, shapes.description(scene))
        text = shapes.caption(scene, rng)
        check_description(scene, text)
        openings.add(text.split()[0])
    assert len(openings) > 4  # more than one way to say it


def test_notes_say_all_there_is(scenes):
    for index in range(500):
        scene, rng = shapes.make_scene(2, index, held_out=False)
        lines = sorted(line.strip() for line in shapes.notes(scene, rng).split(" .")[:-1])
        assert lines == sorted(f"{shapes.named(thing)} {shapes.PLACES[thing.cell]}" for thing in scene.things)


def test_dialogues_are_true_and_do_not_repeat():
    followed = 0
    for index in range(500):
        scene, rng = shapes.make_scene(3, index, held_out=False)
        said = shapes.dialogues(scene, rng, 3)
        questions = [question for pairs in said for question, _ in pairs if " it?" not in question]
        assert 1 <= len(questions) <= len(shapes.ASKED) + 1 and len(set(questions)) == len(questions)
        assert all(1 <= len(pairs) <= 4 for pairs in said)
        for turns, i in [(pairs, i) for pairs in said for i in range(len(pairs))]:
            question, answer = turns[i]
            if " it?" in question:  # the thing that the turn before, in the same dialogue, was about
                assert i > 0
                shape = re.search(rf"the ({SHAPE})\?", turns[i - 1][0])[1]
                question = f"What color is the {shape}?"
                followed += 1
            if (expected := truth(scene, question)) is None:
                check_description(scene, answer)
            else:
                assert answer == expected, (turns, facts(scene))
    assert followed > 10


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shapes.write_world(folder, n=12, seed=4, side=40, questions=30, turns=5)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_written_records_are_read(world):
    captions, dialogues, texts = (read_records(world / f"{name}.json") for name in ("captions", "instruct", "text"))
    assert len(captions) == 12 < len(dialogues) and texts
    assert not any("image" in record for record in texts)
    assert {record["image"] for record in dialogues} == {record["image"] for record in captions}
    assert len({record["id"] for record in [*dialogues, *texts]}) == len(dialogues) + len(texts)
    for caption in captions:
        with Image.open(world / caption["image"]) as picture:
            assert picture.size == (40, 40) and picture.mode == "RGB"
    assert len({record["image"] for record in captions}) == 12


def test_written_questions_are_balanced_and_held_out(world):
    questions, captions = lines(world / "questions.jsonl"), read_records(world / "captions.json")
    assert [question["question_id"] for question in questions] == list(range(30))
    counts = Counter(question["category"] for question in questions)
    assert set(counts) == set(shapes.FAMILIES) and max(counts.values()) - min(counts.values()) <= 1
    assert len({question["image"] for question in questions}) == 30  # each about a picture of its own
    assert not {question["image"] for question in questions} & {record["image"] for record in captions}
    for question in questions:
        scene, _ = shapes.make_scene(4, int(Path(question["image"]).stem), held_out=True)
        assert scene.held_out() and np.array_equal(Image.open(world / question["image"]), shapes.render(scene, 40))
        expected = truth(scene, question["text"])
        assert question["answer"] == expected or (expected is None and question["category"] == "description")


def test_written_scenes_match_their_pictures(world):
    rows = {row["image"]: row for row in lines(world / "scenes.jsonl")}
    assert len(rows) == 12 + 30 and all((world / name).is_file() for name in rows)
    for record in read_records(world / "captions.json"):
        row = rows[record["image"]]
        assert len(row["things"]) == len(named_in(record["conversations"][1]["value"]))
        for thing in row["things"]:
            x1, y1, x2, y2 = thing["box"]
            assert -0.05 < x1 < x2 < 1.05 and -0.05 < y1 < y2 < 1.05


def test_a_larger_world_begins_with_the_smaller_one(world):
    # Nothing depends on how many are made, so a run can be given more pictures and keep those it has.
    records = [shapes.records_of(4, index, 5) for index in range(20)]
    assert [captioned for captioned, _, _ in records][:12] == list(read_records(world / "captions.json"))
    instructions = [instructed for _, several, _ in records[:12] for instructed in several]
    assert instructions == list(read_records(world / "instruct.json"))


@pytest.mark.parametrize("shift", [name for name in shapes.SHIFTS if name != "none"])
def test_a_shifted_world_says_the_same_of_other_pictures(world, tmp_path, shift):
    shapes.write_world(tmp_path, 12, 4, 40, 30, 5, shift)
    for name in ("captions.json", "instruct.json", "questions.jsonl", "scenes.jsonl"):
        assert (tmp_path / name).read_bytes() == (world / name).read_bytes()
    for row in lines(world / "scenes.jsonl"):
        before, after = (np.array(Image.open(folder / row["image"]), dtype=int) for folder in (world, tmp_path))
        assert np.abs(after - before).mean() > 3
        if shift == "gray":
            assert (after == after[..., :1]).all() and after.mean() < before.mean()
        if shift == "noise":
            assert 20 < (after - before).std() < 45
