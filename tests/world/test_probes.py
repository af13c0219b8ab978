"""The metric of the world's descriptions, and the scenes of the probes."""

import random

import pytest

from world import probes
from world.language import ask_description
from world.scenes import make_scene

STAR = "a large red star in the top left"
SIGN = "a sign that says 7 at the top"
RING = "a small blue circle on the right"


@pytest.mark.parametrize("answer, truth, points", [
    (f"{STAR}.", f"{STAR}.", 1),
    (f"{SIGN} and {STAR}.", f"{STAR} and {SIGN}.", 1),  # in any order
    (f"{STAR.upper()}", f"{STAR}.", 1),
    (f"{STAR}.", f"{STAR} and {SIGN}.", 2 / 3),  # one of one is right, one of two is found
    (f"{STAR}, {SIGN} and {RING}.", f"{STAR} and {SIGN}.", 4 / 5),
    (f"{STAR} and {RING}.", f"{STAR} and {SIGN}.", 1 / 2),
    (f"{STAR}, {STAR}, {STAR} and {STAR}.", f"{STAR}.", 2 / 5),  # saying it four times earns it once
    (f"{STAR}.", f"{STAR} and {STAR}.", 2 / 3),  # and two alike are two
    ("a small red star in the top left.", f"{STAR}.", 0),
    ("a large blue star in the top left.", f"{STAR}.", 0),
    ("a large red heart in the top left.", f"{STAR}.", 0),
    ("a large red star in the top right.", f"{STAR}.", 0),
    ("a large red star at the top.", f"{STAR}.", 0),
    ("a sign that says 8 at the top.", f"{SIGN}.", 0),
    ("a sign that says 7 at the bottom.", f"{SIGN}.", 0),
    ("a large red star", f"{STAR}.", 0),
    ("", f"{STAR}.", 0),
])  # fmt: skip
def test_a_description_is_scored_by_the_objects_it_names(answer, truth, points):
    assert probes.objects_f1(answer, truth) == pytest.approx(points)


def test_objects_of_a_description_by_hand():
    text = f"We see {STAR}, {RING} and {SIGN}. Nothing else in the top left."
    assert probes.find_objects(text) == [
        "large red star in the top left",
        "small blue circle on the right",
        "sign that says 7 at the top",
    ]


def test_every_true_description_is_understood():
    for index in range(300):
        scene, rng = make_scene(0, index, held_out=True)
        _, truth = ask_description(scene, rng)
        assert len(probes.find_objects(truth)) == len(scene.objects), truth
        assert probes.objects_f1(truth, truth) == 1


@pytest.mark.parametrize("probe", [probes.probe_counting, probes.probe_relations, probes.probe_reading])
def test_every_scene_of_a_probe_is_held_out(probe):
    assert all(row["scene"].is_held_out() for row in probe(5, random.Random(0)))
