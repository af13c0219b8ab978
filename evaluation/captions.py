"""CIDEr-D, BLEU and ROUGE-L of captions, as coco-caption (pycocoevalcap 1.2) computes them; METEOR by its own tool.

Everything here takes captions that were cut into words, see ptb.py: candidates are one list of words for each picture,
references a list of such lists for each. Every measure returns its figure for all, and a list of one for each picture.
"""

import importlib.util
import math
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from evaluation.ptb import ptb_words

Words = list[str]
Measured = tuple[float, list[float]]
N = 4  # the longest n-gram


def ngrams(words: Words, n: int) -> Counter:
    return Counter(zip(*(words[i:] for i in range(n))))


# ---------------------------------------------------------------------------------------------------------------------
# CIDEr-D


def cider(candidates: list[Words], references: list[list[Words]], sigma: float = 6.0) -> Measured:
    """CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726, section 6; cider_scorer.py), from 0 to 10.

    Cosine of tf-idf vectors of n-grams, n = 1 to 4, a word counted no more often than in the reference, times a
    Gaussian of the difference in length; mean over n and references, times 10. Two things are as in that code, not the
    paper: a caption's length is its number of bigrams, and a corpus of one picture scores 0, every idf being log(1).
    """
    counted = [[[ngrams(words, n + 1) for n in range(N)] for words in group] for group in references]
    document = Counter()
    for group in counted:
        document.update({gram for caption in group for counts in caption for gram in counts})
    everything = math.log(len(references))
    idf = {gram: everything - math.log(count) for gram, count in document.items()}

    def vectors(caption: list[Counter]) -> tuple[list[dict], list[float], int]:
        weights = [{gram: count * idf.get(gram, everything) for gram, count in part.items()} for part in caption]
        norms = [math.sqrt(sum(weight * weight for weight in part.values())) for part in weights]
        return weights, norms, sum(caption[1].values())

    scores = []
    for words, group in zip(candidates, counted):
        candidate, norms, length = vectors([ngrams(words, n + 1) for n in range(N)])
        total = [0.0] * N
        for caption in group:
            reference, reference_norms, reference_length = vectors(caption)
            penalty = math.e ** (-((length - reference_length) ** 2) / (2 * sigma**2))
            for n in range(N):
                mine, its = candidate[n], reference[n]
                dot = sum(min(weight, its[gram]) * its[gram] for gram, weight in mine.items() if gram in its)
                if norms[n] and reference_norms[n]:
                    dot /= norms[n] * reference_norms[n]
                total[n] += dot * penalty
        scores.append(sum(total) / N / len(group) * 10)
    return sum(scores) / len(scores), scores


# ---------------------------------------------------------------------------------------------------------------------
# BLEU and ROUGE-L

SMALL, TINY = 1e-9, 1e-15  # keep quotients defined; a precision of 0 then is not quite 0 (bleu_scorer.py)


def bleu(candidates: list[Words | None], references: list[list[Words]]) -> list[Measured]:
    """BLEU 1 to 4 (Papineni et al. 2002; bleu_scorer.py), the reference of the closest length for the penalty.

    A missing candidate (None) has no words, and as many n-grams that are wrong as its longest reference has: left out,
    or empty, it could raise the precision of the rest.
    """
    rows = []
    for said, group in zip(candidates, references):
        words = said or []
        length = min((abs(len(other) - len(words)), len(other)) for other in group)[1]
        right = []
        for n in range(1, N + 1):
            most = Counter()
            for other in group:
                most |= ngrams(other, n)
            right.append(sum((ngrams(words, n) & most).values()))
        most = max(map(len, group)) if said is None else len(words)
        rows.append((len(words), length, right, [max(0, most - n) for n in range(N)]))
    total = [sum(row[0] for row in rows), sum(row[1] for row in rows)]
    total += [[sum(column) for column in zip(*(row[i] for row in rows))] for i in (2, 3)]
    corpus, each = bleu_of(*total), [bleu_of(*row) for row in rows]
    return [(corpus[n], [scores[n] for scores in each]) for n in range(N)]


def bleu_of(length: int, reference: int, right: list[int], possible: list[int]) -> list[float]:
    """BLEU 1 to 4 of counts: words, words of the reference, n-grams that are right and that there are, by n."""
    ratio = (length + TINY) / (reference + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(N):
        product *= (right[n] + TINY) / (possible[n] + SMALL)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores


def rouge(candidates: list[Words | None], references: list[list[Words]], beta: float = 1.2) -> Measured:
    """ROUGE-L (Lin 2004, section 3; rouge.py): precision and recall are each the best over the references.

    A missing candidate (None) has 0, and an empty one 1 if a reference has no words either.
    """
    scores = []
    for said, group in zip(candidates, references):
        if said is None:
            scores.append(0.0)
            continue
        words = said or [""]  # "".split(" ") has one word there
        common = [(longest_common(words, other or [""]), len(other) or 1) for other in group]
        precision = max(length / len(words) for length, _ in common)
        recall = max(length / size for length, size in common)
        score = (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if precision and recall else 0.0
        scores.append(score)
    return sum(scores) / len(scores), scores


def longest_common(one: Words, other: Words) -> int:
    """Length of the longest common subsequence, row by row."""
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for i, its in enumerate(other, 1):
            above = row[i]
            row[i] = diagonal + 1 if word == its else max(above, row[i - 1])
            diagonal = above
    return row[-1]


# ---------------------------------------------------------------------------------------------------------------------
# METEOR


def meteor_tool() -> Path | None:
    """meteor-1.5.jar of an installed pycocoevalcap, if there is also a Java to run it."""
    found = importlib.util.find_spec("pycocoevalcap")
    folders = list(found.submodule_search_locations or []) if found else []
    jars = [Path(folder) / "meteor/meteor-1.5.jar" for folder in folders]
    return next((jar for jar in jars if jar.exists()), None) if shutil.which("java") else None


def meteor(jar: Path, candidates: list[Words], references: list[list[Words]]) -> Measured:
    """METEOR 1.5 (Denkowski & Lavie 2014) by its reference tool; its tables of synonyms are nothing to write anew.

    Raises ValueError if the tool answers anything else than numbers.
    """
    command = ["java", "-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    tool = subprocess.Popen(command, cwd=jar.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    def ask(line: str) -> str:
        tool.stdin.write(line + "\n")
        tool.stdin.flush()
        return tool.stdout.readline().strip()

    try:
        groups = ([hyp, *refs] for hyp, refs in zip(candidates, references))
        clean = [[" ".join(words).replace("|||", "") for words in group] for group in groups]
        counts = [ask(f"SCORE ||| {' ||| '.join(refs)} ||| {' '.join(hyp.split())}") for hyp, *refs in clean]
        first = ask(f"EVAL ||| {' ||| '.join(counts)}")
        each = [float(first), *(float(tool.stdout.readline()) for _ in counts[1:])]
        return float(tool.stdout.readline()), each
    except (ValueError, OSError) as error:
        raise ValueError(f"{jar}: {error}") from None
    finally:
        tool.kill()
        tool.wait()


# ---------------------------------------------------------------------------------------------------------------------


def caption_scores(candidates: list[str | None], references: list[list[str]], cut=ptb_words) -> dict[str, float]:
    """Every measure of captions as they were written, None for a missing one, under coco-caption's names.

    Args: cut: into words.
    """
    others = [[cut(text) for text in group] for group in references]
    told = [None if text is None else cut(text) for text in candidates]
    words = [said or [] for said in told]
    scores = {f"Bleu_{n}": score for n, (score, _) in enumerate(bleu(told, others), 1)}
    if jar := meteor_tool():
        scores["METEOR"] = meteor(jar, words, others)[0]
    return scores | {"ROUGE_L": rouge(told, others)[0], "CIDEr": cider(words, others)[0]}
