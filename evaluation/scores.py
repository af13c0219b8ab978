"""The scores of each benchmark, computed from items and answers and named as the official scorer names them.

Every function takes the items and, for each item, its answer or None. A missing answer counts as wrong, whatever the
official scorer would do with an empty one. Scores are in per cent, except those of captions and ANLS.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from evaluation import metrics
from evaluation.captions import caption_scores
from evaluation.predictions import Item, group
from inputs.records import DataError

Answers = list[str | None]
Metric = Callable[[str, object], float]  # (answer, truth) to a score between 0 and 1


def mean(values: list[float]) -> float:
    """The mean in per cent."""
    return 100 * sum(values) / len(values)


def mean_by_name(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean, in per cent, of the values of each name."""
    return {name: mean(values) for name, values in sorted(group(pairs).items())}


def mean_by_group(items: list[Item], values: list[float]) -> dict[str, float]:
    """The mean, in per cent, over the items of each group, under "KIND NAME"."""
    rows = zip(items, values)
    return mean_by_name((f"{kind} {name}", value) for item, value in rows for kind, name in item.groups.items())


def accuracy_by_category(rows: list[dict]) -> dict[str, float]:
    """The mean score, in per cent, of all rows of an answers file ("overall"), and of those of each category."""
    pairs = [(row["metadata"]["category"], row["metadata"]["score"]) for row in rows]
    return {"overall": mean([score for _, score in pairs])} | mean_by_name(pairs)


def require_truth(items: list[Item]):
    for item in items:
        if item.truth is None:
            raise DataError(f"question {item.id}: no answer to compare with in the files; see --submission")


def score_each(metric: Metric, items: list[Item], answers: Answers) -> list[float]:
    """metric(answer, truth) for every item, 0 for a missing answer. Raises DataError if a truth is missing."""
    require_truth(items)
    return [0.0 if answer is None else float(metric(answer, item.truth)) for item, answer in zip(items, answers)]


def accuracy(metric: Metric, items: list[Item], answers: Answers) -> dict[str, float]:
    """The mean of the metric, overall and by group."""
    values = score_each(metric, items, answers)
    return {"accuracy": mean(values)} | mean_by_group(items, values)


def vqa(items: list[Item], answers: Answers) -> dict[str, float]:
    """VQAv2's official accuracy, overall and by answer and question type, and the mean of min(n / 3, 1)."""
    values = score_each(metrics.vqa_accuracy, items, answers)
    soft = mean(score_each(metrics.soft_accuracy, items, answers))
    return {"overall": mean(values), "min(n/3, 1)": soft} | mean_by_group(items, values)


def textvqa(items: list[Item], answers: Answers) -> dict[str, float]:
    """TextVQA's accuracy. Like its scorer, this requires ten true answers to each question."""
    for item in items:
        if item.truth is not None and len(item.truth) != 10:
            raise DataError(f"question {item.id}: {len(item.truth)} true answers, TextVQA has 10")
    return accuracy(metrics.m4c_accuracy, items, answers)


COMMON = ("color", "material", "shape")  # valid answers to what two objects have in common; the choices lack them


def gqa(items: list[Item], answers: Answers) -> dict[str, float]:
    """The scores of GQA's eval.py for which the files have the data (there are no attention maps, so no grounding).
    Only balanced questions count, except in consistency: the accuracy on all that a correctly answered one entails."""
    answers = [None if answer is None else metrics.normalize_gqa(answer) for answer in answers]
    values = score_each(lambda answer, truth: answer == truth["answer"], items, answers)
    right = {str(item.id): value for item, value in zip(items, values)}
    rows = [row for row in zip(right, answers, [item.truth for item in items]) if row[2].get("isBalanced", True)]
    if not rows:
        raise DataError("no question is balanced: GQA scores balanced questions only")
    result = mean_by_name(pair for row in rows for pair in gqa_parts(*row, right))
    return result | gqa_distribution([(truth, answer) for _, answer, truth in rows])


def gqa_parts(key: str, answer: str | None, truth: dict, right: dict[str, float]) -> Iterator[tuple[str, float]]:
    """The scores to which a question contributes, each with its share. Args: right: by id, the values of all."""
    value, types = right[key], truth.get("types", {})
    yield "accuracy", value
    if "structural" in types:
        yield "open" if types["structural"] == "query" else "binary", value
    for kind in types.keys() & {"structural", "semantic"}:
        yield f"{kind} {types[kind]}", value
    for kind, name in (("valid", "validity"), ("plausible", "plausibility")):
        if kind in truth:
            yield name, answer in (COMMON if "Common" in types.get("detailed", "") else truth[kind])
    entailed = [right[other] for other in truth.get("entailed", []) if other != key and other in right]
    if value and entailed:
        yield "consistency", sum(entailed) / len(entailed)


def gqa_distribution(rows: list[tuple[dict, str | None]]) -> dict[str, float]:
    """Chi-square of the given answers against the true ones within each question group, averaged over groups weighted
    by size, / 100. Empty if questions have no groups."""
    groups = group((truth.get("groups", {}).get("global"), (truth["answer"], answer)) for truth, answer in rows)
    groups.pop(None, None)
    total, weighted = sum(map(len, groups.values())), 0.0
    for pairs in groups.values():
        wanted, given = map(Counter, zip(*pairs))
        weighted += len(pairs) * sum((given[answer] - count) ** 2 / count for answer, count in wanted.items())
    return {"distribution (lower is better)": weighted / total / 100} if total else {}


def pope(items: list[Item], answers: Answers) -> dict[str, float]:
    """POPE's scores by split, by LLaVA's and by lmms-eval's rule, and the mean F1 by LLaVA's rule, which papers quote.
    A missing answer counts as the wrong one of yes and no. (LLaVA's rule would read it as a yes.)"""
    require_truth(items)
    result, splits = {}, group((item.groups["split"], (text, item.truth)) for item, text in zip(items, answers))
    for split, rows in splits.items():
        labels = [label for _, label in rows]
        for suffix, read, lmms in (("", metrics.yes_no_llava, False), (" (lmms-eval)", metrics.yes_no_whole, True)):
            said = [("no" if label == "yes" else "yes") if text is None else read(text) for text, label in rows]
            values = metrics.yes_no_scores(said, labels, lmms)
            result |= {f"{split} {name}{suffix}": value for name, value in values.items()}
    return {"mean f1": sum(result[f"{split} f1"] for split in splits) / len(splits)} | result


PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]


def mme(items: list[Item], answers: Answers) -> dict[str, float]:
    """MME's score of each subtask, up to 200: accuracy + accuracy+ (images with both answers right); and the sums."""
    right = score_each(lambda answer, truth: metrics.yes_no_mme(answer) == truth, items, answers)
    result = {}
    for name, rows in group((item.groups["subtask"], (item, value)) for item, value in zip(items, right)).items():
        images = group((item.groups["image"], value) for item, value in rows)
        for image, values in images.items():
            if len(values) != 2:
                raise DataError(f"{name}/{image}: {len(values)} questions, MME asks two about each image")
        accuracy, both = mean([value for _, value in rows]), mean([all(values) for values in images.values()])
        result |= {name: accuracy + both, f"{name} accuracy": accuracy, f"{name} accuracy+": both}
    perception, cognition = (sum(result.get(name, 0) for name in names) for names in (PERCEPTION, COGNITION))
    return {"perception": perception, "cognition": cognition} | result


ROTATION = 1_000_000  # question i with rotated options has the index i + n * ROTATION


def mmbench(items: list[Item], answers: Answers) -> dict[str, float]:
    """MMBench's accuracy: vanilla (each question once) and circular (right only in every order of the options)."""
    values = score_each(lambda answer, truth: metrics.option_letter(answer, truth[1]) == truth[0], items, answers)
    originals = [(item, value) for item, value in zip(items, values) if int(item.id) < ROTATION]
    if not originals:
        raise DataError("every question is a rotation of a question that is not in the file")
    rotations = group((int(item.id) % ROTATION, value) for item, value in zip(items, values))
    circular = [float(all(rotations[int(item.id)])) for item, _ in originals]  # without rotations: vanilla
    result = {"vanilla": mean([value for _, value in originals])}
    result |= {"circular": mean(circular)} if len(originals) < len(items) else {}
    return result | mean_by_group([item for item, _ in originals], circular)


MAX_CAPTION = 10_000  # characters; the time to tokenize one grows with the square of its length


def captions(items: list[Item], answers: Answers) -> dict[str, float]:
    """BLEU, METEOR (if its tool is installed), ROUGE-L and CIDEr-D over all images that have references."""
    require_truth(items)
    for item, answer in zip(items, answers):
        if answer is not None and len(answer) > MAX_CAPTION:
            raise DataError(f"question {item.id}: a caption of {len(answer):,} characters, {MAX_CAPTION:,} at most")
    return caption_scores(answers, [item.truth for item in items])


def docvqa(items: list[Item], answers: Answers) -> dict[str, float]:
    return {"ANLS": mean(score_each(metrics.anls, items, answers)) / 100}


def chartqa(items: list[Item], answers: Answers) -> dict[str, float]:
    """ChartQA's relaxed accuracy: the mean of the splits, which papers quote, over all questions, and by split."""
    values = score_each(metrics.relaxed_match, items, answers)
    splits = mean_by_group(items, values)
    return {"relaxed": sum(splits.values()) / len(splits), "over all questions": mean(values)} | splits


def medical(items: list[Item], answers: Answers) -> dict[str, float]:
    """Word overlap on open questions, accuracy on closed ones; also the closed accuracy of LLaVA-Med's run_eval.py,
    which leaves out a closed question if its answer contains yes or no and is wrong (see docs/evaluation.md)."""
    require_truth(items)
    rows = group((item.groups["kind"], (answer, item.truth)) for item, answer in zip(items, answers))
    result = {}
    if "open" in rows:
        zeros = dict.fromkeys(metrics.word_overlap("", ""), 0.0)
        overlaps = [zeros if answer is None else metrics.word_overlap(answer, truth) for answer, truth in rows["open"]]
        result |= {f"open {name}": mean([overlap[name] for overlap in overlaps]) for name in zeros}
    if "closed" in rows:
        right = [answer is not None and metrics.contains_truth(answer, truth) for answer, truth in rows["closed"]]
        forms = [metrics.normalize_answer((answer or "").lower()) for answer, _ in rows["closed"]]
        says = ["yes" in form or "no" in form for form in forms]
        kept = [value and said for value, said in zip(right, says) if value or not said]
        result["closed accuracy"] = mean(right)
        result["closed accuracy (LLaVA-Med)"] = mean(kept) if kept else 0.0
    return result
