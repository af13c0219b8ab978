"""Visual question answering by classification: one output for each of the K answers people give most.

How VQA models answered before they generated text, and still a cheap head on top of a frozen tower: each question has a
soft target for every class, min(n / 3, 1) of its ten people, and the loss is binary cross-entropy, since several
answers may be right (Teney et al. 2017, arXiv 1708.02711, who keep the 3,129 answers
given more than 8 times). A generated answer can be any text; a class outside the K is lost from the start: `ceiling`
says how much.
"""

from collections import Counter

import torch
from torch.nn import functional as F

from evaluation.metrics import normalize_answer

PEOPLE = list[list[str]]  # of each question, what the people answered


def answer_classes(people: PEOPLE, k: int = 3129, at_least: int = 1) -> list[str]:
    """The k answers most frequent among the most frequent ones of the questions, in the official form; ties by the
    alphabet. Args: at_least: questions it must be the answer of."""
    counts = Counter(Counter(map(normalize_answer, answers)).most_common(1)[0][0] for answers in people)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [answer for answer, count in ranked[:k] if count >= at_least]


def soft_targets(people: PEOPLE, classes: list[str]) -> torch.Tensor:
    """min(n / 3, 1) of every class, n people having given it: (B, K) float32 in [0, 1]."""
    places, targets = {answer: i for i, answer in enumerate(classes)}, torch.zeros(len(people), len(classes))
    for row, answers in zip(targets, people):
        for answer, count in Counter(map(normalize_answer, answers)).items():
            if answer in places:
                row[places[answer]] = min(count / 3, 1)
    return targets


def soft_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy (B, K), summed over the classes, the mean over questions.

    A mean over classes would make the loss, and the rate it needs, go with 1 / K.
    """
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(targets)


def classes_accuracy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The mean soft accuracy, in per cent, of the likeliest class: what `metrics.soft_accuracy` gives its text."""
    return 100 * targets.gather(1, logits.argmax(dim=1, keepdim=True)).mean().item()


def ceiling(targets: torch.Tensor) -> float:
    """The accuracy of a classifier that always picks the best of its classes, in per cent."""
    return 100 * targets.max(dim=1).values.mean().item()
