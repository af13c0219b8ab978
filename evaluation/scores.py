"""The scores of each benchmark, computed from items and answers and named as the official scorer names them.

Every function takes the items and, for each item, its answer or None. A missing answer counts as wrong, whatever the
official scorer would do with an empty one. Scores are in per cent, except those of captions and ANLS.
"""

from collections import Counter, defaultdict
from collections.abc import Callable

from evaluation import metrics
from evaluation.captions import caption_scores
from evaluation.predictions import Item
from inputs.records import DataError

Answers = list[str | None]
Metric = Callable[[str, object], float]  # (answer, truth) to a score between 0 and 1


def mean(values: list[float]) -> float:
    """The mean in per cent."""
    return 100 * sum(values) / len(values)


def accuracy_by_category(rows: list[dict]) -> dict[str, float]:
    """The mean score, in per cent, over all rows ("overall") and in each category.

    Args: rows: of an answers file, each with "category" and "score" in its metadata.
    """
    scores = defaultdict(list)
    for row in rows:
        scores[row["metadata"]["category"]].append(row["metadata"]["score"])
    everything = [value for values in scores.values() for value in values]
    return {"overall": mean(everything)} | {name: mean(values) for name, values in sorted(scores.items())}


def require_truth(items: list[Item]):
    for item in items:
        if item.truth is None:
            raise DataError(f"question {item.id}: no answer to compare with in the files; see --submission")


def score_each(metric: Metric, items: list[Item], answers: Answers) -> list[float]:
    """metric(answer, truth) for every item, 0 for a missing answer. Raises DataError if a truth is missing."""
    require_truth(items)
    return [0.0 if answer is None else float(metric(answer, item.truth)) for item, answer in zip(items, answers)]


def mean_by_group(items: list[Item], values: list[float]) -> dict[str, float]:
    """The mean, in per cent, over the items of each group, under "KIND NAME"."""
    groups = defaultdict(list)
    for item, value in zip(items, values):
        for kind, name in item.groups.items():
            groups[f"{kind} {name}"].append(value)
    return {name: mean(groups[name]) for name in sorted(groups)}


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

    Only balanced questions count, except in consistency: the accuracy on all questions that a correctly answered one
    entails.
    """
    answers = [None if answer is None else metrics.normalize_gqa(answer) for answer in answers]
    values = score_each(lambda answer, truth: answer == truth["answer"], items, answers)
    keys = [str(item.id) for item in items]
    right, said = dict(zip(keys, values)), dict(zip(keys, answers))
    rows = [(str(item.id), item.truth) for item in items if item.truth.get("isBalanced", True)]
    if not rows:
        raise DataError("no question is balanced: GQA scores balanced questions only")
    groups, consistency = defaultdict(list), []
    for key, truth in rows:
        types = truth.get("types", {})
        if "structural" in types:
            groups["open" if types["structural"] == "query" else "binary"].append(right[key])
        for kind in ("structural", "semantic"):
            if kind in types:
                groups[f"{kind} {types[kind]}"].append(right[key])
        for kind, name in (("valid", "validity"), ("plausible", "plausibility")):
            if kind in truth:
                groups[name].append(said[key] in (COMMON if "Common" in types.get("detailed", "") else truth[kind]))
        entailed = [right[other] for other in truth.get("entailed", []) if other != key and other in right]
        if right[key] and entailed:
            consistency.append(sum(entailed) / len(entailed))
    result = {"accuracy": mean([right[key] for key, _ in rows])}
    result |= {name: mean(groups[name]) for name in sorted(groups)}
    result |= {"consistency": mean(consistency)} if consistency else {}
    return result | gqa_distribution(rows, said)


def gqa_distribution(rows: list[tuple[str, dict]], said: dict[str, str | None]) -> dict[str, float]:
    """Chi-square of the given answers against the true ones within each question group, averaged over groups weighted
    by size, / 100. Empty if questions have no groups."""
    wanted, given = defaultdict(Counter), defaultdict(Counter)
    for key, truth in rows:
        group = (truth.get("groups") or {}).get("global")
        if group is not None:
            wanted[group][truth["answer"]] += 1
            given[group][said[key]] += 1
    total, weighted = sum(counts.total() for counts in wanted.values()), 0.0
    for group, counts in wanted.items():
        chi_square = sum((given[group][answer] - count) ** 2 / count for answer, count in counts.items())
        weighted += chi_square * counts.total()
    return {"distribution (lower is better)": weighted / total / 100} if total else {}


def pope(items: list[Item], answers: Answers) -> dict[str, float]:
    """POPE's scores by split, by LLaVA's and by lmms-eval's rule, and the mean F1 by LLaVA's rule, which papers quote.

    A missing answer counts as the wrong one of yes and no. (LLaVA's rule would read it as a yes.)
    """
    require_truth(items)
    result, f1 = {}, []
    for split in dict.fromkeys(item.groups["split"] for item in items):
        rows = [(text, item.truth) for item, text in zip(items, answers) if item.groups["split"] == split]
        labels = [label for _, label in rows]
        for suffix, read, lmms in (("", metrics.yes_no_llava, False), (" (lmms-eval)", metrics.yes_no_whole, True)):
            said = [("no" if label == "yes" else "yes") if text is None else read(text) for text, label in rows]
            values = metrics.yes_no_scores(said, labels, lmms)
            result |= {f"{split} {name}{suffix}": value for name, value in values.items()}
        f1.append(result[f"{split} f1"])
    return {"mean f1": sum(f1) / len(f1)} | result


PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]


def mme(items: list[Item], answers: Answers) -> dict[str, float]:
    """MME's score of each subtask, up to 200: accuracy + accuracy+ (images with both answers right); and the sums."""
    right = score_each(lambda answer, truth: metrics.yes_no_mme(answer) == truth, items, answers)
    subtasks = defaultdict(lambda: defaultdict(list))
    for item, value in zip(items, right):
        subtasks[item.groups["subtask"]][item.groups["image"]].append(value)
    result = {}
    for name, images in subtasks.items():
        for image, values in images.items():
            if len(values) != 2:
                raise DataError(f"{name}/{image}: {len(values)} questions, MME asks two about each image")
        accuracy = mean([value for values in images.values() for value in values])
        both = mean([all(values) for values in images.values()])
        result |= {name: accuracy + both, f"{name} accuracy": accuracy, f"{name} accuracy+": both}
    perception, cognition = (sum(result.get(name, 0) for name in names) for names in (PERCEPTION, COGNITION))
    return {"perception": perception, "cognition": cognition} | result


def scienceqa(items: list[Item], answers: Answers) -> dict[str, float]:
    """ScienceQA's accuracy, overall and for questions with an image (SQA-I in LLaVA's tables) and without."""
    return accuracy(lambda answer, truth: metrics.science_letter(answer) == truth, items, answers)


ROTATION = 1_000_000  # question i with rotated options has the index i + n * ROTATION


def mmbench(items: list[Item], answers: Answers) -> dict[str, float]:
    """MMBench's accuracy: vanilla (each question once) and circular (right only in every order of the options)."""
    values = score_each(lambda answer, truth: metrics.option_letter(answer, truth[1]) == truth[0], items, answers)
    rotations = defaultdict(list)
    for item, value in zip(items, values):
        rotations[int(item.id) % ROTATION].append(value)
    originals = [(item, value) for item, value in zip(items, values) if int(item.id) < ROTATION]
    if not originals:
        raise DataError("every question is a rotation of a question that is not in the file")
    result = {"vanilla": mean([value for _, value in originals])}
    if len(originals) == len(items):
        return result | mean_by_group(items, values)
    asked = [item for item, _ in originals]
    circular = [float(all(rotations[int(item.id)])) for item in asked]
    return result | {"circular": mean(circular)} | mean_by_group(asked, circular)


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
    rows = {"open": [], "closed": []}
    for item, answer in zip(items, answers):
        rows[item.groups["kind"]].append((answer, item.truth))
    result, zeros = {}, dict.fromkeys(metrics.word_overlap("", ""), 0.0)
    if rows["open"]:
        overlaps = [zeros if answer is None else metrics.word_overlap(answer, truth) for answer, truth in rows["open"]]
        result |= {f"open {name}": mean([overlap[name] for overlap in overlaps]) for name in zeros}
    if rows["closed"]:
        right = [answer is not None and metrics.contains_truth(answer, truth) for answer, truth in rows["closed"]]
        forms = [metrics.normalize_answer((answer or "").lower()) for answer, _ in rows["closed"]]
        says = ["yes" in form or "no" in form for form in forms]
        kept = [value and said for value, said in zip(right, says) if value or not said]
        result["closed accuracy"] = mean(right)
        result["closed accuracy (LLaVA-Med)"] = mean(kept) if kept else 0.0
    return result
