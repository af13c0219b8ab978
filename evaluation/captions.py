"""CIDEr-D, BLEU and ROUGE-L as coco-caption (pycocoevalcap 1.2) computes them; METEOR by its reference tool.

The metrics take tokenized captions (see ptb.py): candidates are one list of words for each image, references one list
of such lists for each image. Each returns the score of the corpus and a list with the score of each image.
"""

import functools
import importlib.util
import math
import shutil
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np

from evaluation.metrics import levenshtein
from evaluation.ptb import ptb_words

Words = list[str]
Scores = tuple[float, list[float]]
N = 4  # the longest n-gram


def count_ngrams(words: Words) -> list[Counter]:
    """Count the n-grams of a caption, for n = 1 to 4."""
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, N + 1)]


def cider(candidates: list[Words], references: list[list[Words]], sigma: float = 6.0) -> Scores:
    """CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726, section 6; cider_scorer.py), from 0 to 10.

    10 x the cosine of tf-idf vectors of n-grams, n = 1 to 4, averaged over n and references. A word counts no more
    often than in the reference, and a Gaussian penalizes a difference in length. Two details follow the code, not the
    paper: the length of a caption is its number of bigrams, and a corpus of one image scores 0, as every idf is log(1).
    """
    reference_counts = [[count_ngrams(words) for words in group] for group in references]
    grams = ({gram for caption in group for counts in caption for gram in counts} for group in reference_counts)
    log_documents = math.log(len(references))
    idf = {gram: log_documents - math.log(count) for gram, count in Counter(chain.from_iterable(grams)).items()}

    def tf_idf(caption: list[Counter]) -> tuple[list[dict], list[float], int]:
        """Vector and norm for each n, and the caption's length."""
        vectors = [{gram: n * idf.get(gram, log_documents) for gram, n in counts.items()} for counts in caption]
        norms = [math.sqrt(sum(weight * weight for weight in vector.values())) for vector in vectors]
        return vectors, norms, sum(caption[1].values())

    scores = []
    for words, group in zip(candidates, reference_counts):
        vectors, norms, length = tf_idf(count_ngrams(words))
        total = 0.0
        for caption in group:
            reference_vectors, reference_norms, reference_length = tf_idf(caption)
            penalty = math.e ** (-((length - reference_length) ** 2) / (2 * sigma**2))
            for vector, norm, other, other_norm in zip(vectors, norms, reference_vectors, reference_norms):
                dot = sum(min(weight, other[gram]) * other[gram] for gram, weight in vector.items() if gram in other)
                total += dot / (norm * other_norm or 1.0) * penalty
        scores.append(total / N / len(group) * 10)
    return sum(scores) / len(scores), scores


SMALL, TINY = 1e-9, 1e-15  # avoid a division by zero; a precision of 0 becomes slightly more than 0 (bleu_scorer.py)


def bleu(candidates: list[Words | None], references: list[list[Words]]) -> list[Scores]:
    """BLEU 1 to 4 (Papineni et al. 2002; bleu_scorer.py); the closest reference gives the length for the penalty.

    A missing candidate (None) has no words, but counts as many wrong n-grams as its longest reference has n-grams: if
    it counted none, leaving out a bad caption could raise the precision of the corpus.
    """
    rows = []  # for each image: number of words, length of the closest reference, correct n-grams, possible n-grams
    for candidate, group in zip(candidates, references):
        words = candidate or []
        length = min((abs(len(other) - len(words)), len(other)) for other in group)[1]
        allowed = [functools.reduce(Counter.__or__, counts) for counts in zip(*map(count_ngrams, group))]
        correct = [(counts & most).total() for counts, most in zip(count_ngrams(words), allowed)]
        counted = max(map(len, group)) if candidate is None else len(words)
        rows.append([len(words), length, *correct, *(max(0, counted - n) for n in range(N))])
    rows = np.array([np.sum(rows, axis=0), *rows], dtype=float)  # the corpus first
    lengths, correct, possible = rows[:, :2], rows[:, 2 : 2 + N], rows[:, 2 + N :]
    ratio = (lengths[:, :1] + TINY) / (lengths[:, 1:] + SMALL)
    precision = np.cumprod((correct + TINY) / (possible + SMALL), axis=1) ** (1 / np.arange(1, N + 1))
    scores = precision * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    return [(corpus, images) for corpus, *images in scores.T.tolist()]


def rouge(candidates: list[Words | None], references: list[list[Words]], beta: float = 1.2) -> Scores:
    """ROUGE-L (Lin 2004, section 3; rouge.py): precision and recall are each the best over the references.
    A missing candidate (None) scores 0; an empty one scores 1 if a reference has no words either."""
    scores = []
    for candidate, group in zip(candidates, references):
        words = candidate or [""]  # the official code calls "".split(" "), which has one element
        group = [other or [""] for other in group]
        common = [(len(words) + len(other) - levenshtein(words, other, 2)) // 2 for other in group]
        precision = 0.0 if candidate is None else max(common) / len(words)
        recall = max(length / len(other) for length, other in zip(common, group))
        scores.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision) if precision else 0.0)
    return sum(scores) / len(scores), scores


def meteor_tool() -> Path | None:
    """Path of meteor-1.5.jar in an installed pycocoevalcap; None without it or without Java."""
    found = importlib.util.find_spec("pycocoevalcap")
    folders = list(found.submodule_search_locations or []) if found else []
    jars = [Path(folder) / "meteor/meteor-1.5.jar" for folder in folders]
    return next((jar for jar in jars if jar.exists()), None) if shutil.which("java") else None


def meteor(jar: Path, candidates: list[Words], references: list[list[Words]]) -> Scores:
    """METEOR 1.5 (Denkowski & Lavie 2014) by its reference tool, which has the tables of synonyms and paraphrases.
    Raises ValueError if the tool does not answer with numbers."""

    def run(lines: list[str]) -> list[str]:
        command = ["java", "-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
        text = "".join(f"{line}\n" for line in lines)
        tool = subprocess.run(command, cwd=jar.parent, input=text, stdout=subprocess.PIPE, encoding="utf-8")
        return tool.stdout.splitlines()

    rows = zip(candidates, references)
    clean = [[" ".join(words).replace("|||", "") for words in (said, *others)] for said, others in rows]
    stats = run([f"SCORE ||| {' ||| '.join(others)} ||| {' '.join(said.split())}" for said, *others in clean])
    try:
        *images, corpus = map(float, run([f"EVAL ||| {' ||| '.join(stats)}"]))
    except ValueError as error:
        raise ValueError(f"{jar}: {error}") from None
    return corpus, images


def caption_scores(candidates: list[str | None], references: list[list[str]]) -> dict[str, float]:
    """All metrics of captions that are not tokenized yet (None for a missing one), by coco-caption's names."""
    references = [[ptb_words(text) for text in group] for group in references]
    candidates = [None if text is None else ptb_words(text) for text in candidates]
    words = [candidate or [] for candidate in candidates]
    scores = {f"Bleu_{n}": score for n, (score, _) in enumerate(bleu(candidates, references), 1)}
    if jar := meteor_tool():
        scores["METEOR"] = meteor(jar, words, references)[0]
    else:
        print("METEOR is left out: it needs Java and pycocoevalcap", file=sys.stderr)
    return scores | {"ROUGE_L": rouge(candidates, references)[0], "CIDEr": cider(words, references)[0]}
