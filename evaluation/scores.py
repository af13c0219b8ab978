"""From questions and answers to a benchmark's figures, named as its official scorer names them.

Every function takes the items and, for each, the answer, None where a file has none: that one counts as wrong, whatever
the scorer would make of an empty answer. Figures are in per cent; those of captions and ANLS are as they are quoted.
"""

from collections import Counter, defaultdict
from collections.abc import Callable

from evaluation.captions import caption_scores
from evaluation.metrics import (
    agreement,
    anls,
    contains_truth,
    m4c_accuracy,
    normalize_answer,
    normalize_m4c,
    option_letter,
    overlap,
    relaxed,
    science_letter,
    soft_accuracy,
    vqa_accuracy,
    yes_no_llava,
    yes_no_mme,
    yes_no_scores,
    yes_no_whole,
)
from inputs.records import DataError


def mean(values: list[float]) -> float:
    return 100 * sum(values) / len(values)


def each(measure: Callable[[str, object], float], items: list, answers: list[str | None]) -> list[float]:
    """What a measure of (answer, truth) gives each answer, 0 where there is none."""
    need_truth(items)
    return [0.0 if answer is None else float(measure(answer, item.truth)) for item, answer in zip(items, answers)]


def need_truth(items: list):
    """Raise DataError if the files lack an answer to compare with."""
    for item in items:
        if item.truth is None:
            raise DataError(f"question {item.id}: no answer to compare with in the files; see --submission")


def by_group(items: list, values: list[float], kinds: tuple[str, ...] = ()) -> dict[str, float]:
    """Means by every kind of group (or these), as "KIND NAME"."""
    groups = defaultdict(list)
    for item, value in zip(items, values):
        for kind, name in item.groups.items():
            if not kinds or kind in kinds:
                groups[f"{kind} {name}"].append(value)
    return {name: mean(groups[name]) for name in sorted(groups)}


def accuracy_by_category(rows: list[dict]) -> dict[str, float]:
    """The mean score, in per cent, over all rows ("overall") and in each category.

    Args: rows: of an answers file, each with "category" and "score" in its metadata.
    """
    scores = defaultdict(list)
    for row in rows:
        scores[row["metadata"]["category"]].append(row["metadata"]["score"])
    everything = [value for values in scores.values() for value in values]
    return {"overall": mean(everything)} | {name: mean(values) for name, values in sorted(scores.items())}


# ---------------------------------------------------------------------------------------------------------------------
# VQA


def vqa(items: list, answers: list[str | None]) -> dict[str, float]:
    """VQAv2's official accuracy, over all and by answer and question type; and min(n / 3, 1) beside it."""
    values = each(vqa_accuracy, items, answers)
    soft = mean(each(soft_accuracy, items, answers))
    return {"overall": mean(values), "min(n/3, 1)": soft} | by_group(items, values)


def textvqa(items: list, answers: list[str | None]) -> dict[str, float]:
    """TextVQA's accuracy; it asks for ten true answers to each question, as its scorer does."""
    for item in items:
        if item.truth is not None and len(item.truth) != 10:
            raise DataError(f"question {item.id}: {len(item.truth)} true answers, TextVQA has 10")
    return {"accuracy": mean(each(m4c_accuracy, items, answers))}


def vizwiz(items: list, answers: list[str | None]) -> dict[str, float]:
    """VizWiz's accuracy, with the same form of answers as its submission, by answer type too."""
    values = each(lambda answer, truth: agreement(normalize_m4c(answer), [*map(normalize_m4c, truth)]), items, answers)
    return {"accuracy": mean(values)} | by_group(items, values)


COMMON = ("color", "material", "shape")


def gqa_form(answer: str) -> str:
    """As LLaVA hands answers to GQA's scorer (convert_gqa_for_eval.py)."""
    return answer.rstrip(".").lower()


def gqa(items: list, answers: list[str | None]) -> dict[str, float]:
    """GQA's accuracy and what else its eval.py prints, as far as the files have what it needs (no attention maps, so no
    grounding). Only balanced questions count, except where others are entailed by one that was answered rightly."""
    every = each(lambda answer, truth: gqa_form(answer) == truth["answer"], items, answers)
    right = dict(zip((str(item.id) for item in items), every))
    said = {str(item.id): gqa_form(answer) if answer is not None else None for item, answer in zip(items, answers)}
    rows = [(str(item.id), item.truth) for item in items if item.truth.get("isBalanced", True)]
    if not rows:
        raise DataError("no question is balanced: GQA's scores are over those")
    result = {"accuracy": mean([right[key] for key, _ in rows])}
    kinds, chains = defaultdict(list), []
    for key, truth in rows:
        types = truth.get("types", {})
        if "structural" in types:
            kinds["open" if types["structural"] == "query" else "binary"].append(right[key])
        for kind in ("structural", "semantic"):
            if kind in types:
                kinds[f"{kind} {types[kind]}"].append(right[key])
        for kind, name in (("valid", "validity"), ("plausible", "plausibility")):
            if kind in truth:
                common = "Common" in types.get("detailed", "")  # what two things share, of which choices know nothing
                kinds[name].append(said[key] in (COMMON if common else truth[kind]))
        followed = [right[other] for other in truth.get("entailed", []) if other != key and other in right]
        if right[key] and followed:
            chains.append(sum(followed) / len(followed))
    result |= {name: mean(kinds[name]) for name in sorted(kinds)}
    result |= {"consistency": mean(chains)} if chains else {}
    return result | distribution(rows, said)


def distribution(rows: list[tuple[str, dict]], said: dict[str, str | None]) -> dict[str, float]:
    """Chi-square of what was answered against what is true, within each group of like questions, the mean over groups
    by their size, / 100; lower is better. Nothing if questions have no groups."""
    gold, mine = defaultdict(Counter), defaultdict(Counter)
    for key, truth in rows:
        group = (truth.get("groups") or {}).get("global")
        if group is not None:
            gold[group][truth["answer"]] += 1
            mine[group][said[key]] += 1
    total = sum(sum(counts.values()) for counts in gold.values())
    if not total:
        return {}
    parts = (
        sum((mine[group][answer] - count) ** 2 / count for answer, count in counts.items()) * sum(counts.values())
        for group, counts in gold.items()
    )
    return {"distribution (lower is better)": sum(parts) / total / 100}


# ---------------------------------------------------------------------------------------------------------------------
# yes or no


def pope(items: list, answers: list[str | None]) -> dict[str, float]:
    """POPE by split, read by LLaVA's rule and by lmms-eval's, and the mean of LLaVA's F1, which papers quote.

    A missing answer is the wrong one of the two. (To LLaVA's rule, nothing would be a yes.)
    """
    need_truth(items)
    result, headline = {}, []
    splits = dict.fromkeys(item.groups["split"] for item in items)
    for split in splits:
        rows = [(a, item.truth) for item, a in zip(items, answers) if item.groups["split"] == split]
        labels = [label for _, label in rows]
        for rule, read, lmms in (("", yes_no_llava, False), (" (lmms-eval)", yes_no_whole, True)):
            said = [opposite(label) if answer is None else read(answer) for answer, label in rows]
            result |= {f"{split} {name}{rule}": value for name, value in yes_no_scores(said, labels, lmms).items()}
        headline.append(result[f"{split} f1"])
    return {"mean f1": sum(headline) / len(headline)} | result


def opposite(label: str) -> str:
    return "no" if label == "yes" else "yes"


PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]


def mme(items: list, answers: list[str | None]) -> dict[str, float]:
    """MME's score of each subtask, accuracy + accuracy+ (both of a picture right), up to 200; and the sums."""
    right = each(lambda answer, truth: yes_no_mme(answer) == truth, items, answers)
    tasks = defaultdict(lambda: defaultdict(list))
    for item, value in zip(items, right):
        tasks[item.groups["subtask"]][item.groups["picture"]].append(value)
    result = {}
    for name, pictures in tasks.items():
        for picture, values in pictures.items():
            if len(values) != 2:
                raise DataError(f"{name}/{picture}: {len(values)} questions, MME asks two of each picture")
        every = [value for values in pictures.values() for value in values]
        result[name] = mean(every) + mean([all(values) for values in pictures.values()])
        result |= {f"{name} accuracy": mean(every), f"{name} accuracy+": mean([all(v) for v in pictures.values()])}
    sums = {"perception": PERCEPTION, "cognition": COGNITION}
    return {kind: sum(result.get(name, 0) for name in names) for kind, names in sums.items()} | result


# ---------------------------------------------------------------------------------------------------------------------
# options


def scienceqa(items: list, answers: list[str | None]) -> dict[str, float]:
    """ScienceQA's accuracy, over all and over those with a picture (SQA-I of LLaVA's tables)."""
    values = each(lambda answer, truth: science_letter(answer) == truth, items, answers)
    return {"accuracy": mean(values)} | by_group(items, values)


def mmbench(items: list, answers: list[str | None]) -> dict[str, float]:
    """MMBench: vanilla (each question once) and circular (right only with its options in every order)."""
    values = each(lambda answer, truth: option_letter(answer, truth[1]) == truth[0], items, answers)
    groups = defaultdict(list)
    for item, value in zip(items, values):
        groups[int(item.id) % 1_000_000].append(value)
    first = [(item, value) for item, value in zip(items, values) if int(item.id) < 1_000_000]
    if not first:
        raise DataError("every question is a rotation of one that is not there")
    result = {"vanilla": mean([value for _, value in first])}
    if len(first) == len(items):
        return result | by_group(items, values)
    asked = [item for item, _ in first]
    circular = [float(all(groups[int(item.id)])) for item in asked]
    return result | {"circular": mean(circular)} | by_group(asked, circular)


def seed(items: list, answers: list[str | None]) -> dict[str, float]:
    """SEED-Bench: the answer is the letter and nothing else (LLaVA's convert_seed_for_submission.py)."""
    values = each(lambda answer, truth: answer == truth, items, answers)
    return {"accuracy": mean(values)} | by_group(items, values)


# ---------------------------------------------------------------------------------------------------------------------
# free answers


LONGEST_CAPTION = 10_000


def captions(items: list, answers: list[str | None]) -> dict[str, float]:
    """BLEU, METEOR (if its tool is there), ROUGE-L and CIDEr-D over all pictures of the references."""
    need_truth(items)
    for item, answer in zip(items, answers):
        if answer is not None and len(answer) > LONGEST_CAPTION:  # cutting it takes time with its square
            raise DataError(f"question {item.id}: a caption of {len(answer):,} characters, {LONGEST_CAPTION:,} at most")
    return caption_scores(answers, [item.truth for item in items])


def docvqa(items: list, answers: list[str | None]) -> dict[str, float]:
    return {"ANLS": mean(each(anls, items, answers)) / 100}


def chartqa(items: list, answers: list[str | None]) -> dict[str, float]:
    """ChartQA's relaxed accuracy, by split and over all; papers quote the mean of the splits."""
    values = each(relaxed, items, answers)
    splits = by_group(items, values)
    return {"relaxed": sum(splits.values()) / len(splits), "over all questions": mean(values)} | splits


def medical(items: list, answers: list[str | None]) -> dict[str, float]:
    """Of open questions recall and its like, of closed ones accuracy; as LLaVA-Med's run_eval.py prints them too.

    That one leaves a closed question out when the answer says yes or no, and the wrong one: see README.
    """
    need_truth(items)
    result = {}
    rows = [(item.groups["kind"], item.truth, answer) for item, answer in zip(items, answers)]
    nothing = dict.fromkeys(overlap("", ""), 0.0)
    opened = [nothing if said is None else overlap(said, truth) for kind, truth, said in rows if kind == "open"]
    if opened:
        result |= {f"open {name}": mean([row[name] for row in opened]) for name in opened[0]}
    closed = [(truth, answer) for kind, truth, answer in rows if kind == "closed"]
    right = [answer is not None and contains_truth(answer, truth) for truth, answer in closed]
    if closed:
        result["closed accuracy"] = mean(right)
        says = [
            "yes" in form or "no" in form for form in (normalize_answer((answer or "").lower()) for _, answer in closed)
        ]
        kept = [hit and said for hit, said in zip(right, says) if hit or not said]
        result["closed accuracy (LLaVA-Med)"] = mean(kept) if kept else 0.0
    return result
