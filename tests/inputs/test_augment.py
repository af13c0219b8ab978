"""inputs/augment.py: what a change leaves true, with the embedded world's scenes as exact truth."""

import pickle
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageOps

from data import Records
from inputs.augment import (
    Augment,
    Drawn,
    crop_limits,
    crop_window,
    cut,
    flip_record,
    flip_text,
    mark_steps,
    other_forms,
)
from inputs.check import Skips
from training.flags import read_flags
from world.drawing import draw_scene
from world.language import CELL_PHRASES, RELATIONS, find_directions, make_dialogues
from world.scenes import RADIUS, SHAPES, Scene, make_scene

SCENES = 1000
PLACE = "|".join(sorted(CELL_PHRASES, key=len, reverse=True))
NAME = "|".join((*SHAPES, "sign"))
RELATION = "|".join(RELATIONS.values())
DIRECTIONS = {text: direction for direction, text in RELATIONS.items()}


def mirror(scene: Scene) -> Scene:
    """The scene of the mirrored image."""
    objects = [replace(obj, cell=obj.cell // 3 * 3 + 2 - obj.cell % 3, dx=-obj.dx) for obj in scene.objects]
    return replace(scene, objects=tuple(objects))


def record_of(pairs: list[tuple[str, str]], **more) -> dict:
    turns = [{"from": ("human", "gpt")[i], "value": text} for pair in pairs for i, text in enumerate(pair)]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return {"image": "a.png", "conversations": turns, **more}


def pairs_of(record: dict) -> list[tuple[str, str]]:
    values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2]))


def records(turns: int = 2, with_boxes: bool = False):
    """(scene, record) of the dialogues about the scenes of a seed."""
    for index in range(SCENES):
        scene, rng = make_scene(5, index, False)
        boxes = {"boxes": [outer_box(obj) for obj in scene.objects]} if with_boxes else {}
        for pairs in make_dialogues(scene, rng, turns):
            yield scene, record_of(pairs, **boxes)


def outer_box(obj) -> list[float]:
    """The box of an object with its outline, half of which is drawn outside."""
    return [side + (-0.01, -0.01, 0.01, 0.01)[i] for i, side in enumerate(obj.box)]


def find(scene: Scene, words: str) -> list:
    """The objects that "small red star", "red star" or "star" names."""
    found = [obj for obj in scene.objects if obj.shape == words.split()[-1]]
    return [obj for obj in found if all(word in (obj.color, obj.size, obj.shape) for word in words.split())]


def judge(scene: Scene, question: str, answer: str) -> list[bool]:
    """For each claim of a place or direction in a question and its answer: if it is true of the scene."""
    claims, end = [], answer.rpartition(", so ")[2].removesuffix(".")
    for words, place in re.findall(rf"[Tt]he ((?:\w+ )?(?:{NAME})) is ({PLACE})", answer):
        claims.append([CELL_PHRASES[obj.cell] for obj in find(scene, words)] == [place])
    for words, place in re.findall(rf"a (\w+ \w+ (?:{NAME})) ({PLACE})", answer):
        claims.append(place in [CELL_PHRASES[obj.cell] for obj in find(scene, words)])
    if asked := re.fullmatch(rf"What shape is ({PLACE})\?", question):
        shapes = [obj.shape for obj in scene.shapes if CELL_PHRASES[obj.cell] == asked[1]]
        claims.append(answer == f"{asked[1].capitalize()} is a {''.join(shapes)}.")
    if asked := re.fullmatch(rf"Is the (\w+) ({RELATION}) the (\w+)\?", question):
        (first,), (second,) = find(scene, asked[1]), find(scene, asked[3])
        claims.append((DIRECTIONS[asked[2]] in find_directions(first, second)) == (end == "yes"))
    if asked := re.fullmatch(r"Where is the (\w+), seen from the (\w+)\?", question):
        (first,), (second,) = find(scene, asked[1]), find(scene, asked[2])
        claims.append(end.split(" and ") == find_directions(first, second))
    if asked := re.fullmatch(rf"(What color is the shape|Which shape is) ({RELATION}) the (\w+)\?", question):
        (anchor,) = find(scene, asked[3])
        others = [obj for obj in scene.shapes if obj is not anchor]
        there = [obj for obj in others if DIRECTIONS[asked[2]] in find_directions(obj, anchor)]
        claims.append([obj.color if "color" in asked[1] else obj.shape for obj in there] == [answer])
    return claims


def test_left_and_right_are_still_right_in_1000_flipped_scenes():
    true, stale, seen, flipped_records, all_records = 0, 0, 0, 0, 0
    for scene, record in records():
        all_records += 1
        assert all(claim for pair in pairs_of(record) for claim in judge(scene, *pair))
        flipped, there = flip_record(record), mirror(scene)
        if flipped is None:
            assert re.search("sign", str(record))
            continue
        flipped_records += 1
        for old, new in zip(pairs_of(record), pairs_of(flipped)):
            claims = judge(there, *new)
            assert all(claims), (old, new)
            assert claims or not re.search("left|right", str(new)), new  # every direction has been judged
            true, seen = true + len(claims), seen + bool(claims)
            stale += not all(judge(there, *old))
    print(f"{flipped_records} of {all_records} records flipped: {true} claims in {seen} questions, {stale} were false")
    assert flipped_records > 0.7 * all_records and true > 3000 and stale > 1000


def test_a_mirrored_image_shows_the_mirrored_scene():
    for index in range(20):
        scene = replace(make_scene(5, index, False)[0], background="plain")
        scene = replace(scene, objects=tuple(scene.shapes))
        difference = ImageChops.difference(ImageOps.mirror(draw_scene(scene, 72)), draw_scene(mirror(scene), 72))
        assert np.asarray(difference).mean() < 2  # the outlines, by a pixel; another cell makes 10 and more
        assert np.asarray(ImageChops.difference(draw_scene(scene, 72), draw_scene(mirror(scene), 72))).mean() != 0


@pytest.mark.parametrize(
    ("text", "flipped"),
    [
        ("The dog is to the left of the cat.", "The dog is to the right of the cat."),
        ("From left to right: a cup, a bowl.", "From right to left: a cup, a bowl."),
        ("On the LEFT, his right hand; the Leftmost one.", "On the RIGHT, his left hand; the Rightmost one."),
        ("Is it on the left or the right?\nAnswer the question using a single word or phrase.", None),
        ("A dog at [0.10, 0.2, 0.45, 0.8].", "A dog at [0.55, 0.2, 0.90, 0.8]."),
        ("A dog.", "A dog."),
        *((text, "left as it is") for text in (
            "The bus has left the stop.", "How many are left?", "He stands right behind her.", "That is right.",
            "You have the right to vote.", "It is a dog, right?", "The sign says no left turn.", "What time is it?",
            "A dog at [10, 20, 45, 80].", "A dog at (0.1, 0.2).", "El perro está a la derecha.", "狗在左边",
        )),
    ],
)  # fmt: skip
def test_only_directions_are_swapped(text, flipped):
    if flipped is None:
        flipped = "Is it on the right or the left?" + text[text.index("\n") :]
    assert flip_text(text) == (None if flipped == "left as it is" else flipped)


def test_an_answer_of_one_word_is_swapped_if_a_side_was_asked_for():
    assert pairs_of(flip_record(record_of([("Which side is the dog on?", "left")]))) == [
        ("Which side is the dog on?", "right")
    ]
    assert flip_record(record_of([("Is this true?", "Right.")])) is None


def test_a_crop_keeps_every_pixel_of_what_is_named_in_1000_scenes():
    rng, cropped, smallest = random.Random(0), 0, 1.0
    for i, (scene, record) in enumerate(records(with_boxes=True)):
        if not (limits := crop_limits(record)):
            continue
        x1, y1, x2, y2 = window = crop_window(rng, *limits)
        assert 0.8 - 1e-9 <= x2 - x1 <= 1 and x2 - x1 == pytest.approx(y2 - y1)
        assert min(x1, y1) >= 0 and max(x2, y2) <= 1 + 1e-9
        for a1, b1, a2, b2 in (np.clip(obj.box, 0, 1) for obj in scene.objects):
            assert x1 <= a1 + 1e-9 and y1 <= b1 + 1e-9 and a2 <= x2 + 1e-9 and b2 <= y2 + 1e-9
        for obj in scene.shapes:  # small ones still look small, and large ones large
            assert (obj.radius / (x2 - x1) < sum(RADIUS.values()) / 2) == (obj.size == "small")
        cropped, smallest = cropped + 1, min(smallest, x2 - x1)
        if i % 50 == 0:
            image = draw_scene(replace(scene, background="plain"), 72)
            assert count_drawn(cut(image, window), scene) == count_drawn(image, scene)
    print(f"{cropped} records cropped, the smallest to {smallest:.2f} of a side")
    assert cropped > 500 and smallest < 0.85


def count_drawn(image: Image.Image, scene: Scene) -> int:
    return int((np.asarray(image) != np.array(scene.tint)).any(-1).sum())


@pytest.mark.parametrize("question", ["Where is the dog?", "How many dogs are there?", "What does the sign say?"])
def test_without_boxes_questions_about_the_whole_image_are_not_cropped(question):
    assert crop_limits(record_of([("What animal is it?", "a dog")])) == (0.9, [])
    assert crop_limits(record_of([(question, "it depends")])) is None


def test_each_form_of_a_question_is_a_form_of_the_others():
    for line in (
        "Is there a red star?",
        "What color is the star?",
        "Where is the star?",
        "Describe the image in detail.",
    ):
        for form in other_forms(line):
            assert line in other_forms(form) and form != line
    assert other_forms("Where is the man going?") == other_forms("Is there a reason that he runs?") == []


def test_changes_depend_on_seed_sample_and_step_only():
    record = record_of([("What shape is on the left?", "On the left is a star."), ("Do you see a cup?", "yes")])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    steps = [drawn(3, step) for step in range(12)]

    def results(augment, numbers):
        found = [augment(record, number) for number in numbers]
        return [(pairs_of(changed), change(image).tobytes()) for changed, change in found]

    first = results(Augment("flip,color,crop,paraphrase", 0), steps)
    assert first == results(Augment("flip,color,crop,paraphrase", 0), pickle.loads(pickle.dumps(steps)))
    assert len({str(result) for result in first}) > 4
    assert first != results(Augment("flip,color,crop,paraphrase", 1), steps)
    assert Augment("flip", 0)({"conversations": []}, 0)[0] == {"conversations": []}  # no image: as it is


def test_color_is_left_alone_where_it_is_asked_for():
    augment = Augment("color", 0)
    for number in range(20):
        image = Image.new("RGB", (4, 4), (200, 30, 30))
        assert augment(record_of([("Is the cup red?", "no")]), number)[1](image).tobytes() == image.tobytes()


def test_skip_bad_draws_the_sample_with_its_step(tmp_path):
    class Noted:
        def sample(self, number):
            return number

    assert (
        Skips(1, 5, tmp_path / "skipped.jsonl")
        .load(type("", (Noted,), {"__len__": lambda self: 5})(), drawn(2, 7))
        .step
        == 7
    )


def drawn(number: int, step: int) -> Drawn:
    return next(iter(mark_steps([[number]], step)))[0]


def test_an_unknown_change_is_named():
    with pytest.raises(ValueError, match="--augment rotate: choose from crop, flip, color, paraphrase"):
        Augment("flip,rotate", 0)


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--stage", "2", "--augment", "rotate"], "choose from"),
        (["--stage", "0", "--augment", "flip"], "does nothing in"),
    ],
)
def test_train_refuses_flags_that_make_no_sense(argv, error, capsys):
    with pytest.raises(SystemExit):
        read_flags("", argv)
    assert error in capsys.readouterr().err


def test_text_and_pixels_change_together(tiny):
    from formats.configs import read_config
    from inputs.mixture import open_sources
    from inputs.tokenizer import Tokenizer

    sources = open_sources([str(tiny.world / "instruct.json")], None)
    options = (Tokenizer.load(tiny.stage2), read_config(tiny.stage2), 1024)
    plain, changed = Records(sources, *options), Records(sources, *options, augment=Augment("flip", 0))
    kinds = set()
    for number in range(30):
        before, after = plain[number], changed[number]
        mirrored = bool((before["pixel_values"][0].flip(-1) == after["pixel_values"][0]).all())
        kinds.add((mirrored, before["ids"] == after["ids"]))
        assert mirrored or before["ids"] == after["ids"]
    assert {(True, False), (False, True)} <= kinds
