"""insight.score: the object of a question, the measures on maps made by hand, and a whole run."""

from itertools import pairwise

import numpy as np
import pytest

from formats.weights import load_model
from inputs.tokenizer import Tokenizer
from insight import score
from insight.maps import log_probabilities
from insight.score import compare_boxes, find_object, make_answer, read_questions
from llava import generate
from world.language import FAMILIES
from world.scenes import make_scene


@pytest.mark.parametrize("family", score.FAMILIES)
def test_the_object_of_a_question_is_the_one_that_the_answer_describes(family):
    """The answer names facts of the object that the question does not."""
    found = 0
    for index in range(200):
        scene, rng = make_scene(3, index, True)
        if not (pair := FAMILIES[family](scene, rng)):
            continue
        obj = find_object(pair[0], [vars(obj) for obj in scene.objects])
        fact = {"color": obj["color"], "shape": obj["shape"], "reading": obj["text"]}
        fact["position"] = score.CELL_PHRASES[obj["cell"]]
        assert pair[1].endswith(f" {fact[family]}.")
        found += 1
    assert found > 50


def test_no_object_or_several_are_none():
    objects = [{"shape": "star", "color": "red", "cell": 0}, {"shape": "star", "color": "blue", "cell": 1}]
    assert find_object("What color is the star?", objects) is find_object("What color is the cross?", objects) is None
    assert find_object("What shape is at the top?", objects)["color"] == "blue"
    assert find_object("Where is the red star?", objects)["cell"] == 0


def test_shares_and_centers():
    targets = {(0, 0, 100, 100): (1, True), (15, 12, 30, 17): (0.25, True), (16, 0, 30, 30): (0.4, False)}
    targets |= {(20, 10, 30, 20): (0, False), (40, 0, 50, 50): (0, False), (11, 11, 14, 14): (0.09, False)}
    for target, want in targets.items():
        inside, centers = compare_boxes(np.array([(10, 10, 20, 20)]), np.array(target))
        assert (inside.tolist(), centers.tolist()) == ([want[0]], [want[1]])


@pytest.fixture(scope="module")
def models(tiny, babbler):
    return load_model(babbler), Tokenizer.load(babbler)


def test_right_means_that_greedy_decoding_gives_the_answer(models, tiny):
    """With the model's own answer as the true one, and with one word of it changed."""
    model, tokenizer = models
    (question,) = read_questions(tiny.world, 1)
    answer, answered = make_answer(question, tiny.world, model, tokenizer)
    prompt = answer.ids[: answered[0]]
    features = model.vision_features(answer.images[0].pixels)
    own = [row[0] for row in generate(model, [prompt], features, max_new_tokens=5)]
    answer.ids[:] = prompt + own
    places = list(range(len(prompt), len(answer.ids)))
    assert score.is_right(model, answer, places)
    answer.ids[places[2]] += 1
    assert not score.is_right(model, answer, places)


def test_the_deletion_curve_is_that_of_its_order(models, tiny):
    model, tokenizer = models
    (question,) = read_questions(tiny.world, 1)
    answer, _ = make_answer(question, tiny.world, model, tokenizer)
    order, pixels, curves = [2, 5, 6, 7, 8, 0, 4, 3, 1], answer.images[0].pixels.clone(), ([], [])
    features = model.vision_features(pixels).detach()
    mean = features.mean((0, 1))
    for patch in (None, *order):
        if patch is not None:
            pixels[0].unflatten(1, (3, 24)).unflatten(3, (3, 24))[:, patch // 3, :, patch % 3] = 0
            features[0, patch] = mean
        for curve, one in zip(curves, (features.clone(), model.vision_features(pixels))):
            curve.append(log_probabilities(model, answer, [one]).exp().item())
    for curve, area in zip(curves, score.deletion_areas(model, answer, order).values()):
        assert area == pytest.approx(sum((a + b) / 2 for a, b in pairwise(curve)) / 9, rel=1e-5)
        assert max(curve) > 1.5 * min(curve)


def test_the_place_of_two_words_is_one(models, tiny):
    model, tokenizer = models
    for question in read_questions(tiny.world, 6):
        answer, answered = make_answer(question, tiny.world, model, tokenizer)
        text = tokenizer.decode([answer.ids[i] for i in answered])
        assert text.strip() == question["answer"]
        (word,) = answer.words
        assert question["answer"].endswith(f" {word.text}.")
        assert tokenizer.decode([answer.ids[i] for i in word.positions]).strip() == word.text


def test_a_run_prints_both_tables(tiny, babbler, capsys, command):
    command(score, "--model", babbler, "--world", tiny.world, "--questions", 4, "--device", "cpu")
    out = capsys.readouterr().out
    assert "all: 4 questions" in out and "answered rightly: 0 questions" in out
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in out.splitlines() if line[:1] == "|"}
    maps = ["attention", "attention, layer 1", "attention, layer 2", "gradient", "occlusion"]
    assert list(rows)[2:] == [*maps, "random", "area alone", "the box"]
    assert rows["the box"][1] == "100.0 ± 0.0" and rows["area alone"][1] == "11.1 ± 0.0"


def test_too_few_questions_and_a_decoder_alone_are_refused(tiny, command, tmp_path):
    for argv, reason in (
        (["--model", tiny.stage2, "--world", tmp_path], "0 questions about one object"),
        (["--model", tiny.decoder, "--world", tiny.world, "--questions", 2], "a decoder without a vision tower"),
    ):
        with pytest.raises(SystemExit) as caught:
            command(score, *argv)
        assert reason in caught.value.code and len(caught.value.code.splitlines()) == 1
