"""Metrics: values by hand, and every case recorded from the official code."""

import json
import os
from pathlib import Path

import pytest
import torch

from evaluation.metrics import (
    anls,
    answer_classes,
    classifier_accuracy,
    contains_truth,
    exact_match,
    levenshtein,
    m4c_accuracy,
    normalize_answer,
    normalize_m4c,
    option_letter,
    relaxed_match,
    science_letter,
    soft_accuracy,
    soft_loss,
    soft_targets,
    vqa_accuracy,
    word_overlap,
    yes_no_llava,
    yes_no_mme,
    yes_no_scores,
    yes_no_whole,
)

METRICS = Path(os.environ.get("LLAVA_DATA", Path(__file__).parents[2] / "../shared/data")).resolve() / "metrics"
recorded = pytest.mark.skipif(
    not METRICS.exists(), reason=f"no recorded scores in {METRICS} (LLAVA_DATA names the folder)"
)


def cases(name):
    path = METRICS / name
    return json.loads(path.read_text()) if path.exists() else {"cases": [], "items": []}


# ---------------------------------------------------------------------------------------------------------------------
# VQA


@pytest.mark.parametrize("text, form", [
    ("Two dogs", "2 dogs"), ("U.S.A.", "usa"), ("1,000", "1000"), ("3.5", "3.5"), ("1.5.", "1.5"), ("$5.00", "$5.00"),
    ("50%", "50%"), ("10:30 a.m.", "10:30 am"), ("T-shirt", "t shirt"), ("a, b", "b"), ("A", ""), ("none", "0"),
    ("black/white", "black white"), ("black / white", "black white"), ("dont", "don't"), ("St. Louis", "st louis"),
    ("2 - 3", "2 3"), ("yes, it is", "yes it is"), ("I'm", "i'm"), ("couldn'tve", "couldn't've"),
    ("ow's'at", "'ow's'at"),
    ("somebody'd", "somebodyd"), ("let's", "let's"), ("ten\n", "10"), ("." * 40, "." * 8), ("", ""),
])  # fmt: skip
def test_the_form_of_an_answer(text, form):
    assert normalize_answer(text) == form


@pytest.mark.parametrize("text, form", [
    ("it's", "it 's"), ("john's car", "john 's car"), ("let's go", "let 's go"), ("Two dogs.", "2 dogs"),
    ("a, b?", "b"),
])  # fmt: skip
def test_the_form_of_an_answer_to_textvqa(text, form):
    assert normalize_m4c(text) == form


@pytest.mark.parametrize("same, official, soft", [
    (0, 0, 0), (1, 0.3, 1 / 3), (2, 0.6, 2 / 3), (3, 0.9, 1), (4, 1, 1), (10, 1, 1),
])  # fmt: skip
def test_points_go_with_how_many_agree(same, official, soft):
    answers = ["cat"] * same + [f"dog{i}" for i in range(10 - same)]
    assert vqa_accuracy("cat", answers) == pytest.approx(official, abs=1e-12)
    assert m4c_accuracy("cat", answers) == pytest.approx(official, abs=1e-12)
    assert soft_accuracy("Cat.", answers) == pytest.approx(soft, abs=1e-12)


def test_where_all_agree_the_official_code_compares_letter_for_letter():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0 and vqa_accuracy(" yes\n", ["yes"] * 10) == 1
    assert m4c_accuracy("Yes", ["yes"] * 10) == 1 and vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1


@recorded
@pytest.mark.parametrize("case", cases("vqa_accuracy_golden.json")["cases"], ids=lambda case: str(case["question_id"]))
def test_recorded_vqa_scores(case):
    said, answers = case["prediction"], case["answers"]
    assert round(100 * vqa_accuracy(said, answers), 2) == case["official_vqaEval_py"]
    assert 100 * m4c_accuracy(said, answers) == pytest.approx(case["m4c_textvqa_acc"], abs=1e-9)
    assert normalize_m4c(said) == case["m4c_processed"]
    assert anls(said, answers) == pytest.approx(case["stvqa_anls"], abs=1e-12)


@recorded
def test_recorded_vqa_mean():
    record = cases("vqa_accuracy_golden.json")
    scores = [vqa_accuracy(case["prediction"], case["answers"]) for case in record["cases"]]
    assert len(scores) == 172 and round(100 * sum(scores) / len(scores), 4) == record["overall_vqaEval"]


@recorded
def test_recorded_textvqa_scores():
    record = cases("textvqa30.json")
    for who, want in (("llava15_13b", "llava15_13b"), ("doc_prediction", "doc")):
        scores = []
        for item in record["items"]:
            scores.append(m4c_accuracy(item[who], item["answers"]))
            assert scores[-1] == pytest.approx(item[f"{want}_m4c_score"], abs=1e-12)
            assert normalize_m4c(item[who]) == item[f"{want}_processed"]
        assert sum(scores) / 30 == pytest.approx(
            record[f"mean_{'llava15_13b' if who == 'llava15_13b' else 'doc'}"], abs=1e-12
        )


# ---------------------------------------------------------------------------------------------------------------------
# the rest


@pytest.mark.parametrize("said, truths, value", [
    ("stop", ["stop"], 1), ("STOP ", ["x", "stop"], 1), ("stap", ["stop"], 0.75), ("stnn", ["stop"], 0.5),
    ("snnn", ["stop"], 0),
    ("", ["stop"], 0), ("", [""], 1), ("a  b", ["a b"], 1), ("x" * 50_000, ["stop"], 0),
])  # fmt: skip
def test_anls(said, truths, value):
    assert anls(said, truths) == value


def test_levenshtein():
    assert levenshtein("kitten", "sitting") == 3 and levenshtein("", "abc") == 3 and levenshtein("abc", "") == 3


@pytest.mark.parametrize("said, truth, good", [
    ("105", "100", True), ("105.1", "100", False), ("-95", "-100", True), ("12%", "0.12", True), ("12", "12%", False),
    ("0.0", "0", False), ("0", "0", True), ("Red", "red", True), ("reds", "red", False), ("nan", "5", False),
    ("", "5", False),
    ("inf", "5", False), ("1e2", "100", True),
])  # fmt: skip
def test_relaxed(said, truth, good):
    assert relaxed_match(said, truth) is good


@pytest.mark.parametrize("text, llava, whole, mme", [
    ("Yes", "yes", "yes", "yes"), ("no", "no", "no", "no"), ("No, there is not.", "no", "other", "no"),
    ("Yes. No.", "yes", "other", "yes"), ("Yes, there is no cat", "no", "other", "yes"), ("NO", "yes", "no", "no"),
    ("", "yes", "other", "other"), ("yes.", "yes", "other", "yes"), ("It is not there", "no", "other", "other"),
    (" no ", "no", "no", "no"), ("I know", "yes", "other", "other"), ("no\n", "yes", "no", "no"),
    ("knot", "yes", "other", "no"),
])  # fmt: skip
def test_three_readings_of_yes_and_no(text, llava, whole, mme):
    assert (yes_no_llava(text), yes_no_whole(text), yes_no_mme(text)) == (llava, whole, mme)


def test_existence_by_hand():
    said, labels = ["yes", "yes", "no", "no", "other"], ["yes", "no", "no", "yes", "yes"]
    figures = yes_no_scores(said, labels)
    assert figures == pytest.approx({"accuracy": 40, "precision": 50, "recall": 100 / 3, "f1": 40, "yes ratio": 40})
    theirs = yes_no_scores(said, labels, lmms=True)  # "other" is no miss
    assert theirs == pytest.approx({"accuracy": 40, "precision": 50, "recall": 50, "f1": 50, "yes ratio": 60})
    assert yes_no_scores(["no"], ["yes"])["f1"] == 0 and yes_no_scores(["no"], ["no"])["accuracy"] == 100


@recorded
@pytest.mark.parametrize("split, count", [("random", 2910), ("popular", 3000), ("adversarial", 3000)])
def test_pope_label_files(split, count):
    """Facts that hold for any scorer: all yes is right for the true half, the truth itself always."""
    path = METRICS / f"pope/coco_pope_{split}.json"
    labels = [json.loads(line)["label"] for line in path.read_text().splitlines()]
    assert len(labels) == count and yes_no_scores(labels, labels)["f1"] == 100
    always = yes_no_scores([yes_no_llava("Yes")] * count, labels)
    share = labels.count("yes") / count
    assert always["accuracy"] == always["precision"] == pytest.approx(100 * share) and always["recall"] == 100
    assert always["f1"] == pytest.approx(200 * share / (1 + share)) and always["yes ratio"] == 100


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("B. a cat", "B"), ("The answer is C.", "C"), ("The answer is C", ""), ("b", ""), ("B.", ""), ("", ""),
    ("The answer is A. The answer is B.", ""), ("A cat", ""), ("The answer is B, since", "B"),
])  # fmt: skip
def test_letters_of_scienceqa(text, letter):
    assert science_letter(text) == letter


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("(B)", "B"), ("B. dog", "B"), ("The answer is B.", "B"), ("dog", "B"), ("It is a DOG.", "B"),
    ("A", "A"),
    ("A dog, so B it is", ""), ("A or B: the dog is it", ""),
    ("A dog is in it", "B"), ("A and B", ""), ("cat or dog", ""), ("", ""), ("E", ""), ("none of them", ""),
])  # fmt: skip
def test_letters_of_mmbench(text, letter):
    assert option_letter(text, {"A": "cat", "B": "dog", "C": "bus"}) == letter


def test_medical_measures_by_hand():
    found = word_overlap("The left lung lung", "left lung base")
    assert found["recall"] == pytest.approx(3 / 4) and found["precision"] == 1  # lung counts twice, as it was said
    assert found["exact match"] == pytest.approx(2 / 3) and found["same"] == 0
    assert word_overlap("", "left")["f1"] == 0 and word_overlap("Left.", "left")["same"] == 1
    assert contains_truth("Yes, it is", "yes") and not contains_truth("no", "yes")
    assert contains_truth("A.", "A") and not contains_truth("B", "A") and not contains_truth("42", "-")


def test_numbers_keep_their_sign_and_point():
    same = [("5.", "5"), ("1,000", "1000"), ("A!", "a"), ("-", "-")]
    assert all(exact_match(*pair) for pair in same)
    pairs = [("5", "-5"), ("35", "3.5"), ("1/2", "12"), ("+", "-")]
    assert not any(exact_match(*pair) for pair in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# classification

PEOPLE = [["cat"] * 10, ["Cat"] * 4 + ["dog"] * 2 + ["a bus"] * 3 + ["x"], ["dog"] * 6 + ["Dogs."] * 4]


def test_soft_targets():
    classes = answer_classes(PEOPLE, 2)
    assert classes == ["cat", "dog"]
    targets = soft_targets(PEOPLE, classes)
    assert torch.allclose(targets, torch.tensor([[1, 0], [1, 2 / 3], [0, 1]]))
    assert answer_classes(PEOPLE, 9, at_least=2) == ["cat"] and classifier_accuracy(targets, targets) == 100
    for row, answers in zip(targets, PEOPLE):
        for name, value in zip(classes, row):
            assert value.item() == pytest.approx(soft_accuracy(name, answers))


def test_the_best_logits_are_those_of_the_targets():
    targets = soft_targets(PEOPLE, ["cat", "dog"])
    best = torch.special.logit(targets, eps=1e-6).requires_grad_()
    loss = soft_loss(best, targets)
    (gradient,) = torch.autograd.grad(loss, best)
    assert gradient.abs().max() < 1e-5 and soft_loss(-best, targets) > loss
    assert classifier_accuracy(best, targets) == 100
    assert classifier_accuracy(torch.tensor([[0, 1.0]] * 3), targets) == pytest.approx(100 * (2 / 3 + 1) / 3)
