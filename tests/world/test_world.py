"""The embedded world: a seed gives the same world everywhere, its sides share no scene, and all its text is true."""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from inputs.index import read_records
from world.drawing import SHIFTS, draw_background, draw_scene
from world.language import (
    CELL_NAMES,
    DESCRIBE,
    DIALOGUE_FAMILIES,
    FAMILIES,
    describe_object,
    describe_scene,
    make_dialogues,
    write_caption,
    write_notes,
)
from world.scenes import (
    COLORS,
    COUNTS,
    GROUP_SIZE,
    RADIUS,
    SHAPES,
    SIGN_RADIUS,
    SIGN_TEXTS,
    Scene,
    SceneObject,
    make_scene,
)
from world.writer import FAMILY_METRICS, make_questions, make_records, write_world

SCENES = 2000
# Written out again, to catch a mistake in language.py's own tables: the (row, column) of every phrase for a cell.
PHRASES = {
    **{"in the top left": (0, 0), "at the top": (0, 1), "in the top right": (0, 2)},
    **{"on the left": (1, 0), "in the center": (1, 1), "on the right": (1, 2)},
    **{"in the bottom left": (2, 0), "at the bottom": (2, 1), "in the bottom right": (2, 2)},
}
PHRASE = "|".join(sorted(PHRASES, key=len, reverse=True))
SHAPE, COLOR, SIZE = "|".join(SHAPES), "|".join(COLORS), "|".join(RADIUS)
NAME = rf"(?:(?P<size>{SIZE}) (?P<color>{COLOR}) (?P<shape>{SHAPE})|sign that says (?P<text>\w+))"
SIDES = "to the left of|to the right of|above|below"


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(0, index, held_out=False)[0] for index in range(SCENES)]


@pytest.fixture(scope="module")
def asked():
    """family -> [(scene, question, answer)]: every family asked about every scene, on both sides of the split."""
    result = {family: [] for family in FAMILIES}
    for index in range(SCENES):
        scene, rng = make_scene(1, index, held_out=index % 2 == 0)
        for family, ask in FAMILIES.items():
            for _ in range(2):
                if pair := ask(scene, rng):
                    result[family].append((scene, *pair))
    return result


def find_cell(obj):
    """The (row, column) of the third of the image that holds the object's center, from its pixels' position alone."""
    x, y = obj.center
    return math.floor(3 * y), math.floor(3 * x)


def phrase(obj):
    return only(words for words, where in PHRASES.items() if where == find_cell(obj))


def only(objects):
    objects = list(objects)
    assert len(objects) == 1, objects  # "the star" must name one object
    return objects[0]


def beside(obj, side, anchor):
    (row, column), (anchor_row, anchor_column) = find_cell(obj), find_cell(anchor)
    return {
        "to the left of": column < anchor_column,
        "to the right of": column > anchor_column,
        "above": row < anchor_row,
        "below": row > anchor_row,
    }[side]


def truth(scene, question):
    """The answer to a question, computed from the list of objects alone; None for a request to describe the image."""
    objects = [obj for obj in scene.objects if obj.shape != "sign"]

    def the(shape):
        return only(obj for obj in scene.objects if obj.shape == shape)

    def having(**facts):
        return [obj for obj in objects if all(getattr(obj, key) == value for key, value in facts.items())]

    def ask(pattern):
        return (found.groups() or (question,)) if (found := re.fullmatch(pattern, question)) else None

    if m := ask(rf"(?:Is there|Do you see) an? (?:({COLOR}) )?({SHAPE})(?: in the image)?\?"):
        found = [obj.color for obj in sorted(having(shape=m[1]), key=find_cell)]
        reasons = [f"There is no {m[1]}", f"The {m[1]} is ", f"The {m[1]}{'es' if m[1] == 'cross' else 's'} are "]
        return conclude(reasons, found, found and m[0] in (None, *found))
    if m := ask(rf"(?:Is there|Do you see) an? ({COLOR}) shape(?: in the image)?\?"):
        found = [f"a {obj.shape}" for obj in sorted(having(color=m[0]), key=find_cell)]
        reasons = [f"There is no {m[0]} shape", f"The {m[0]} one is ", f"The {m[0]} ones are "]
        return conclude(reasons, found, found)
    if m := ask(rf"(?:What color is|Which color does) the ({SHAPE})(?: have)?\?"):
        return f"The {m[0]} is {the(m[0]).color}."
    if m := ask(rf"What shape is ({PHRASE})\?"):
        found = only(obj for obj in objects if find_cell(obj) == PHRASES[m[0]])
        return f"{m[0][0].upper()}{m[0][1:]} is a {found.shape}."
    if m := ask(rf"(?:What shape is the|Which shape is) ({COLOR})(?: one)?\?"):
        return f"The {m[0]} one is a {only(having(color=m[0])).shape}."
    if ask(r"How many shapes are there\?"):
        return str(len(objects))
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
        assert find_cell(one) != find_cell(other)
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
        answer = m[1] if (RADIUS[one] > RADIUS[other]) == (m[0] == "larger") else m[2]
        return f"The {m[1]} is {one} and the {m[2]} is {other}, so the {answer}."
    if m := ask(rf"(What color is the|Which) shape (?:is )?({SIDES}) the ({SHAPE}|sign)\?"):
        found = only(obj for obj in objects if beside(obj, m[1], the(m[2])))
        return found.color if m[0].startswith("What color") else found.shape
    if m := ask(rf"Which other shape has the color of the ({SHAPE})\?"):
        return only(obj for obj in having(color=the(m[0]).color) if obj is not the(m[0])).shape
    assert question in ("Describe the image.", "Describe the image in detail.", "What do you see?"), question
    return None


def conclude(reasons, found, holds):
    """Reasons for nothing, one thing and several, then what was found, then yes or no."""
    listed = " and ".join(", ".join(found).rsplit(", ", 1))
    return f"{reasons[min(len(found), 2)]}{listed}, so {'yes' if holds else 'no'}."


def facts(scene):
    """The attributes of a scene's objects, sorted."""
    return sorted((obj.shape, obj.color, obj.size, obj.cell, obj.text) for obj in scene.objects)


def named_in(text):
    """The attributes and cells of the objects that a description names, sorted."""
    found = [m.groupdict() for m in re.finditer(rf"{NAME} (?P<place>{PHRASE})", text)]
    found += [m.groupdict() for m in re.finditer(rf"(?P<place>{PHRASE}) there is a {NAME}", text)]
    assert len(found) == len(re.findall(NAME, text))
    rows = [(m["size"], m["color"], m["shape"], m["text"], PHRASES[m["place"]]) for m in found]
    return sorted(rows, key=str)


def named_by(scene):
    signs = [(None, None, None, obj.text, find_cell(obj)) for obj in scene.objects if obj.text]
    return sorted(
        [(t.size, t.color, t.shape, None, find_cell(t)) for t in scene.objects if not t.text] + signs, key=str
    )


def check_description(scene, text):
    assert named_in(text) == named_by(scene), text


# ---------------------------------------------------------------------------------------------------------------------
# scenes


def fingerprint():
    """A digest of scenes, images and text of both sides."""
    digest = hashlib.sha256()
    for held_out in (False, True):
        for index in range(40):
            scene, rng = make_scene(5, index, held_out)
            words = [write_caption(scene, rng), write_notes(scene, rng), make_dialogues(scene, rng, 3)]
            digest.update(repr((scene, words)).encode() + draw_scene(scene, 48).tobytes())
    digest.update(repr([make_records(5, index, 6) for index in range(40)]).encode())
    digest.update(repr(make_questions(5, 40)).encode())
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
        command = [sys.executable, "-c", "import test_world; print(test_world.fingerprint())"]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert output.strip() == mine


def test_a_seed_keeps_its_scenes():
    """So worlds written before still match what a resumed run or a probe makes again."""
    digest = hashlib.sha256()
    for held_out in (False, True):
        for index in range(400):
            scene, _ = make_scene(5, index, held_out)
            objects = [(o.shape, o.color, o.size, o.cell, o.dx, o.dy, o.text) for o in scene.objects]
            digest.update(repr((objects, scene.background, scene.tint)).encode())
    assert digest.hexdigest() == "8a29052f16180d68202b12dbd6e9c7fabf61db5fc44488d902ab8dfe1b49fbcc"


def test_a_scene_does_not_depend_on_what_was_made_before():
    alone = make_scene(0, 7, False)[0]
    assert [make_scene(0, index, False)[0] for index in range(9)][7] == alone
    assert make_scene(1, 7, False)[0] != alone != make_scene(0, 7, True)[0]


def test_train_and_heldout_share_no_scene():
    sides = [{str(facts(make_scene(seed, i, side)[0])) for seed in range(3) for i in range(2000)} for side in (0, 1)]
    assert not sides[0] & sides[1]
    assert min(map(len, sides)) > 3000  # and there is no end of different ones


def test_siblings_differ_in_one_fact(scenes):
    differences = Counter()
    for index, scene in enumerate(scenes):
        base = scenes[index - index % GROUP_SIZE]
        assert len(scene.objects) == len(base.objects)
        named = ("shape", "color", "size", "cell", "text")
        count = sum(getattr(a, f) != getattr(b, f) for a, b in zip(scene.objects, base.objects) for f in named)
        differences[count] += 1
    assert set(differences) <= {0, 1} and differences[1] > 0.9 * SCENES * (1 - 1 / GROUP_SIZE)


def test_scenes_are_well_formed(scenes):
    kinds = Counter()
    for scene in scenes:
        assert len({obj.cell for obj in scene.objects}) == len(scene.objects) and scene.shapes
        assert sum(obj.shape == "sign" for obj in scene.objects) <= 1
        for obj in scene.objects:
            assert obj.cell == 3 * find_cell(obj)[0] + find_cell(obj)[1]  # well inside its third of the image
            x, y = obj.center
            assert all(abs(3 * v - round(3 * v)) > 0.1 for v in (x, y))
            assert min(obj.box) > -0.05 and max(obj.box) < 1.05  # at most an edge is cut off
            kinds.update((obj.shape, obj.color, (obj.shape == "sign", obj.size), obj.cell, obj.text))
    sizes = [*((False, size) for size in RADIUS), *((True, size) for size in SIGN_RADIUS)]
    assert all(kinds[kind] > 20 for kind in [*SHAPES, *COLORS, *sizes, *range(9), *SIGN_TEXTS])


def test_scenes_have_one_to_six_shapes_and_few_large_ones_among_many(scenes):
    counts = Counter(len(scene.shapes) for scene in scenes)
    assert set(counts) == set(COUNTS) == {1, 2, 3, 4, 5, 6} and min(counts.values()) > 0.08 * SCENES
    crowd = [obj.size for scene in scenes if len(scene.shapes) > 3 for obj in scene.shapes]
    assert 0.2 < crowd.count("large") / len(crowd) < 0.3


# ---------------------------------------------------------------------------------------------------------------------
# images


def test_boxes_lie_around_the_objects():
    side = 120
    kinds = [(shape, color, "") for shape, color in zip(SHAPES, COLORS)] + [("sign", "white", "8")]
    for shape, color, text in kinds:
        for size in SIGN_RADIUS if text else RADIUS:
            for cell in range(9):
                obj = SceneObject(shape, color, size, cell, dx=0.02, dy=-0.01, text=text)
                empty, drawn = (Scene(objects, "plain", (220, 220, 220)) for objects in ((), (obj,)))
                pixels, before = (np.array(draw_scene(scene, side)).astype(int) for scene in (drawn, empty))
                y, x = np.nonzero(np.abs(pixels - before).sum(-1) > 60)
                x1, y1, x2, y2 = (side * v for v in obj.box)
                assert x1 - 2 <= x.min() and x.max() <= x2 + 2 and y1 - 2 <= y.min() and y.max() <= y2 + 2, obj
                assert np.ptp(x) > 0.75 * (x2 - x1) and np.ptp(y) > 0.75 * (y2 - y1), obj  # and not far around them


def test_colors_can_be_told_apart():
    colors = {**COLORS, "sign": (252, 252, 248)}
    for (one, a), (other, b) in combinations(colors.items(), 2):
        assert math.dist(a, b) > 60, (one, other)


def test_every_shape_shows_its_color_in_its_middle(scenes):
    # A later object may cover an edge of an earlier one, never its middle; the background never shines through.
    for scene in scenes[:200]:
        pixels = np.array(draw_scene(scene, 96)).astype(float)
        assert pixels.shape == (96, 96, 3)
        for obj in scene.shapes:
            x, y = (int(96 * v) for v in obj.center)
            assert math.dist(pixels[y, x], COLORS[obj.color]) < 20, obj


def test_background_is_pale(scenes):
    for scene in scenes[:100]:
        pixels = np.array(draw_background(scene, 48)).astype(float)
        nearest = min(np.linalg.norm(pixels - color, axis=-1).min() for color in COLORS.values())
        assert nearest > 60 and pixels.mean() > 190


@pytest.mark.parametrize("size", SIGN_RADIUS)
def test_signs_differ_in_their_pixels(size):
    def sign(text):
        obj = SceneObject("sign", "white", size, 4, text=text)
        return np.array(draw_scene(Scene((obj,), "plain", (220, 220, 220)), 72)).astype(int)

    for one, other in combinations(map(sign, SIGN_TEXTS), 2):
        assert (np.abs(one - other).max(-1) > 80).sum() >= 4  # "1" and "7", "6" and "8"


# ---------------------------------------------------------------------------------------------------------------------
# text


@pytest.mark.parametrize("family", FAMILIES)
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


def test_a_third_of_the_absent_pairs_are_near_misses(asked):
    near = []
    for scene, question, answer in asked["existence"]:
        if (m := re.search(rf"an? ({COLOR}) ({SHAPE})", question)) and answer.endswith("no."):
            near.append(all(value in {v for o in scene.shapes for v in (o.color, o.shape)} for value in m.groups()))
    assert sum(near) > len(near) / 3


def test_half_of_the_same_colors_are_yes(asked):
    rows = [answer for _, question, answer in asked["comparison"] if question.startswith("Do ")]
    answers = Counter(answer.rstrip(".").split()[-1] for answer in rows)
    assert 0.45 < answers["yes"] / answers.total() < 0.55


@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_is_the_usual_one(family, asked):
    answers = Counter(answer for *_, answer in asked[family])
    assert max(answers.values()) < 0.6 * answers.total(), answers.most_common(3)


def test_sample_asks_for_a_description_as_training_did():
    assert sample.DESCRIBE == DESCRIBE


def test_captions_and_descriptions_say_all_there_is():
    openings = set()
    for index in range(SCENES):
        scene, rng = make_scene(2, index, held_out=False)
        check_description(scene, describe_scene(scene))
        text = write_caption(scene, rng)
        check_description(scene, text)
        openings.add(text.split()[0])
    assert len(openings) > 4  # more than one way to say it


def test_notes_say_all_there_is(scenes):
    for index in range(500):
        scene, rng = make_scene(2, index, held_out=False)
        lines = sorted(line.strip() for line in write_notes(scene, rng).split(" .")[:-1])
        assert lines == sorted(f"{describe_object(obj)} {CELL_NAMES[obj.cell]}" for obj in scene.objects)


def test_dialogues_are_true_and_do_not_repeat():
    followed = 0
    for index in range(500):
        scene, rng = make_scene(3, index, held_out=False)
        said = make_dialogues(scene, rng, 3)
        questions = [question for pairs in said for question, _ in pairs if " it?" not in question]
        assert 1 <= len(questions) <= len(DIALOGUE_FAMILIES) + 1 and len(set(questions)) == len(questions)
        assert all(1 <= len(pairs) <= 4 for pairs in said)
        for turns, i in [(pairs, i) for pairs in said for i in range(len(pairs))]:
            question, answer = turns[i]
            if " it?" in question:  # the object that the turn before, in the same dialogue, was about
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
    write_world(folder, n=12, seed=4, side=40, questions=30, turns=5)
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
        with Image.open(world / caption["image"]) as image:
            assert image.size == (40, 40) and image.mode == "RGB"
    assert len({record["image"] for record in captions}) == 12


def test_written_questions_are_balanced_and_held_out(world):
    questions, captions = lines(world / "questions.jsonl"), read_records(world / "captions.json")
    assert [question["question_id"] for question in questions] == list(range(30))
    counts = Counter(question["category"] for question in questions)
    assert set(counts) == set(FAMILIES) and max(counts.values()) - min(counts.values()) <= 1
    assert all(question.get("metric") == FAMILY_METRICS.get(question["category"]) for question in questions)
    assert len({question["image"] for question in questions}) == 30  # each about an image of its own
    assert not {question["image"] for question in questions} & {record["image"] for record in captions}
    for question in questions:
        scene, _ = make_scene(4, int(Path(question["image"]).stem), held_out=True)
        assert scene.is_held_out() and np.array_equal(Image.open(world / question["image"]), draw_scene(scene, 40))
        expected = truth(scene, question["text"])
        assert question["answer"] == expected or (expected is None and question["category"] == "description")


def test_written_scenes_match_their_images(world):
    rows = {row["image"]: row for row in lines(world / "scenes.jsonl")}
    assert len(rows) == 12 + 30 and all((world / name).is_file() for name in rows)
    for record in read_records(world / "captions.json"):
        row = rows[record["image"]]
        assert len(row["things"]) == len(named_in(record["conversations"][1]["value"]))
        for obj in row["things"]:
            x1, y1, x2, y2 = obj["box"]
            assert -0.05 < x1 < x2 < 1.05 and -0.05 < y1 < y2 < 1.05


def test_a_larger_world_begins_with_the_smaller_one(world):
    # No scene depends on how many are made, so a run can be given more images and keep those it has.
    records = [make_records(4, index, 5) for index in range(20)]
    assert [captioned for captioned, _, _ in records][:12] == list(read_records(world / "captions.json"))
    instructions = [instructed for _, several, _ in records[:12] for instructed in several]
    assert instructions == list(read_records(world / "instruct.json"))


@pytest.mark.parametrize("shift", [name for name in SHIFTS if name != "none"])
def test_a_shifted_world_says_the_same_of_other_images(world, tmp_path, shift):
    write_world(tmp_path, 12, 4, 40, 30, 5, shift)
    for name in ("captions.json", "instruct.json", "questions.jsonl", "scenes.jsonl"):
        assert (tmp_path / name).read_bytes() == (world / name).read_bytes()
    for row in lines(world / "scenes.jsonl"):
        before, after = (np.array(Image.open(folder / row["image"]), dtype=int) for folder in (world, tmp_path))
        assert np.abs(after - before).mean() > 3
        if shift == "gray":
            assert (after == after[..., :1]).all() and after.mean() < before.mean()
        if shift == "noise":
            assert 20 < (after - before).std() < 45


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_writer_and_its_processes(tmp_path, number):
    command = [sys.executable, "-m", "world", "write", "--out", tmp_path, "--n", "1000000"]
    root = Path(__file__).parents[2]
    # A test run in the background of a shell script ignores SIGINT, and its children would inherit that.
    restore = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True, **restore)
    limit = time.monotonic() + 60
    while not any(tmp_path.rglob("*.png")) and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in error
    with pytest.raises(ProcessLookupError):  # no process of its group is left
        os.killpg(process.pid, 0)
