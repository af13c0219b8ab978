"""Metrics of one answer against the truth, each computed as the official scorer computes it, quirks included.

Nothing here reads files; scores.py builds the tables of a benchmark from these. Answers are the model's own text.
"""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------------
# VQA: one answer against those of ten people

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {word: str(value) for value, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Two errors of the official code are part of every published score. The look-behind, meant to spare decimal points, is
# misspelled, so that only a digit after the point spares it. And re.UNICODE (32) was passed as `count`, so that at most
# 32 points are removed.
POINT, MAX_POINTS = re.compile(r"(?!<=\d)\.(?!\d)"), 32
DIGIT_COMMA = re.compile(r"\d,\d")
# The official table maps each of these words, written without one of its apostrophes, to the word. (Its entries with a
# capital I are left out: they never match, because the text is in lower case by then.)
WORDS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in WORDS.split() for i in range(len(word)) if word[i] == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # an error of the official table


def normalize_answer(text: str) -> str:
    """The normalized answer of VQA's scorer (GT-Vision-Lab/VQA, vqaEval.py): "Two dogs." becomes "2 dogs".

    A punctuation mark is deleted if it stands beside a space anywhere in the text, or if the text has a comma between
    digits; otherwise it becomes a space ("black/white" becomes two words).
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    result, has_number = text, bool(DIGIT_COMMA.search(text))
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if beside_space or has_number else " ")
    words = [NUMBERS.get(word, word) for word in POINT.sub("", result, count=MAX_POINTS).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_m4c(text: str) -> str:
    """The normalized answer of TextVQA's and VizWiz's scorers (EvalAI's processor, LLaVA's m4c_evaluator.py): VQA's,
    after "it's" became "it 's" and commas and question marks were deleted."""
    return normalize_answer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def normalize_gqa(text: str) -> str:
    """The answer as LLaVA passes it to GQA's scorer (convert_gqa_for_eval.py)."""
    return text.rstrip(".").lower()


def leave_one_out(answer: str, answers: list[str]) -> float:
    """The mean, over the people, of min(1, number of other people who gave this answer / 3): 0, 0.3, 0.6, 0.9 or 1 if
    0, 1, 2, 3 or 4 of ten people gave it."""
    same = [other == answer for other in answers]
    return sum(min(1, (sum(same) - own) / 3) for own in same) / len(same)


def vqa_accuracy(answer: str, answers: list[str]) -> float:
    """VQA's official accuracy. Answers are normalized only if the people disagree; otherwise compared literally."""
    answer, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *answers))
    if len(set(answers)) > 1:
        answer, *answers = map(normalize_answer, (answer, *answers))
    return leave_one_out(answer, answers)


def soft_accuracy(answer: str, answers: list[str]) -> float:
    """min(n / 3, 1) for n people with this answer, as papers often state the accuracy; always normalized."""
    return min(1, [*map(normalize_answer, answers)].count(normalize_answer(answer)) / 3)


def m4c_accuracy(answer: str, answers: list[str]) -> float:
    """TextVQA's and VizWiz's accuracy, always normalized (TextVQAAccuracyEvaluator)."""
    answer, *answers = map(normalize_m4c, (answer, *answers))
    return leave_one_out(answer, answers)


# ---------------------------------------------------------------------------------------------------------------------
# VQA by classification (Teney et al. 2017, arXiv 1708.02711): one output for each of the most frequent answers, trained
# with soft targets and binary cross-entropy, since several answers may be right. This is how VQA models answered before
# they generated text, and it is still a cheap head on a frozen tower.


def answer_classes(humans: list[list[str]], k: int = 3129, at_least: int = 1) -> list[str]:
    """The k normalized answers that are the most frequent answer to most questions; ties in alphabetical order.

    Args: humans: for each question, the answers of its people; at_least: an answer that is the most frequent one of
    fewer questions is left out.
    """
    counts = Counter(Counter(map(normalize_answer, answers)).most_common(1)[0][0] for answers in humans)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [answer for answer, count in ranked[:k] if count >= at_least]


def soft_targets(humans: list[list[str]], classes: list[str]) -> torch.Tensor:
    """min(n / 3, 1) for each class, given by n people: (B, K) float32 in [0, 1]."""
    counts = [Counter(map(normalize_answer, answers)) for answers in humans]
    return torch.tensor([[min(count[name] / 3, 1) for name in classes] for count in counts])


def soft_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of (B, K) logits, summed over classes, averaged over questions. (An average over classes
    would scale the loss, and the learning rate it needs, with 1 / K.)"""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(targets)


def classifier_accuracy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean soft accuracy, in per cent, of the class with the largest logit; `soft_accuracy` of its text. With the
    targets as logits, it is the accuracy that no training can exceed."""
    return 100 * targets.gather(1, logits.argmax(dim=1, keepdim=True)).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# other benchmarks, and questions of your own


def anls(answer: str, answers: list[str], threshold: float = 0.5) -> float:
    """Normalized Levenshtein similarity to the nearest true answer, 0 below the threshold (Biten et al. 2019). Case
    and extra white space are ignored. (lmms-eval divides by the length with white space, see docs/evaluation.md.)"""
    answer = " ".join(answer.lower().split())
    best = 0.0
    for truth in answers:
        truth = " ".join(truth.lower().split())
        longer = max(len(answer), len(truth), 1)
        if abs(len(answer) - len(truth)) / longer <= 1 - threshold:  # the distance is at least the difference in length
            best = max(best, 1 - levenshtein(answer, truth) / longer)
    return best if best >= threshold else 0.0


def levenshtein(one: Sequence, other: Sequence, replacing: int = 1) -> int:
    """The smallest number of letters (or words) to insert, delete or replace; a replacement counts `replacing`. With 2,
    the longest common subsequence has (len(one) + len(other) - result) / 2 letters. Keeps one row of the table."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, other_letter in enumerate(other, 1):
            diagonal, row[j] = row[j], min(diagonal + replacing * (letter != other_letter), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def relaxed_match(answer: str, truth: str) -> bool:
    """ChartQA's relaxed accuracy: numbers may differ by 5 %, other answers must be equal, case aside. A truth of 0 must
    match literally. (Masry et al. 2022, section 5.1; the scorers of Qwen-VL and lmms-eval.)"""
    number, true_number = parse_number(answer), parse_number(truth)
    if number is not None and true_number:
        return abs(number - true_number) / abs(true_number) <= 0.05
    return answer.lower() == truth.lower()


def parse_number(text: str) -> float | None:
    """The number that a text is, or None if it is none; "12%" is 0.12."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def yes_no_llava(text: str) -> str:
    """LLaVA's reading of an answer to POPE (eval_pope.py): "no" if No, no or not is a word before the first full stop,
    otherwise "yes". So an empty answer is a yes, and so are "NO", "no!" and "no\\n"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def yes_no_whole(text: str) -> str:
    """lmms-eval's reading: "yes" or "no" if that is the whole answer, case aside; otherwise ("Yes.") "other"."""
    text = text.lower().strip()
    return text if text in ("yes", "no") else "other"


def yes_no_mme(text: str) -> str:
    """MME's reading (its calculation.py): "yes" or "no" if the first four letters contain it; otherwise "other"."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def yes_no_scores(answers: list[str], labels: list[str], lmms: bool = False) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and ratio of yes in per cent; "yes" is the positive class (POPE, Li et al. 2023).

    Args: answers: "yes", "no" or "other", which is wrong, and a miss if the label is "yes"; lmms: count as lmms-eval,
    where only "no" is a miss and the ratio of yes counts the labels.
    """
    pairs = Counter(zip(answers, labels))
    hits, false_alarms = pairs["yes", "yes"], pairs["yes", "no"]
    precision = hits / (hits + false_alarms) if hits + false_alarms else 0.0
    positives = hits + pairs["no", "yes"] if lmms else labels.count("yes")
    recall = hits / positives if positives else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    values = {"accuracy": (hits + pairs["no", "no"]) / len(labels), "precision": precision, "recall": recall, "f1": f1}
    values["yes ratio"] = (labels.count("yes") if lmms else hits + false_alarms) / len(labels)
    return {name: 100 * value for name, value in values.items()}


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def science_letter(text: str) -> str:
    """The letter ScienceQA's scorer reads (LLaVA's eval_science_qa.py), "" if none: the letter alone, "B. ..." at the
    start, or one "The answer is B" followed by any character (the dot of the official pattern is not escaped)."""
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else ""


def option_letter(text: str, options: dict[str, str]) -> str:
    """The one option that an answer names, by its letter as a word of its own, else by its text; "" if none or several.

    Our own rule, for MMBench, whose server asks a language model what an answer means. "A" alone in an answer of more
    than three words is an article, not a letter. Args: options: text by letter.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [letter for letter in options if letter in words]
    if not named or (named == ["A"] and len(words) > 3):
        named = [letter for letter, option in options.items() if option.strip() and option.lower() in text.lower()]
    return named[0] if len(named) == 1 else ""


def word_overlap(answer: str, truth: str) -> dict[str, float]:
    """LLaVA-Med's word precision, recall, F1 and "exact match", between 0 and 1 (its evaluate_metrics.py), and "same".

    A common word counts as often as the answer has it, so an answer that repeats a true word scores higher.
    "Exact match" is the number of different common words / that of the answer's words; "same" is 1 if all are equal.
    """
    forms = (normalize_answer(normalize_answer(text.lower())) for text in (answer, truth))
    said, wanted = (Counter(form.replace(",", "").split()) for form in forms)
    common = sum(said[word] for word in said if word in wanted)
    missed = sum(wanted[word] for word in wanted if word not in said)
    precision, recall = (common / sum(said.values()), common / (common + missed)) if common else (0.0, 0.0)
    f1 = 2 * precision * recall / (precision + recall) if common else 0.0
    exact = len(said.keys() & wanted.keys()) / sum(said.values()) if said else 0.0
    return {"recall": recall, "precision": precision, "f1": f1, "exact match": exact, "same": float(said == wanted)}


def contains_truth(answer: str, truth: str) -> bool:
    """Whether the normalized truth is part of the normalized answer: LLaVA-Med's rule for closed questions."""
    wanted = normalize_answer(truth.lower())  # "" if the truth is an article, such as the choice A
    return wanted in normalize_answer(answer.lower()) if wanted else exact_match(answer, truth) == 1


def plain_form(text: str) -> str:
    """The text in lower case, without punctuation; but numbers keep sign, point and slash: -3.5 is not 35."""
    return re.sub(r"(?!(?<!\w)[-.](?=\d)|(?<=\d)[./](?=\d))[^\w ]", "", text.lower()).strip()


def exact_match(answer: str, truth: str) -> float:
    """1 if answer and truth are equal, case and punctuation aside; otherwise 0."""
    forms = plain_form(answer), plain_form(truth)
    return float(forms[0] == forms[1] if any(forms) else answer.strip() == truth.strip())


# The metrics that a question may name under "metric": (answer, truth) to a score between 0 and 1.
METRICS = {
    "exact": exact_match,
    "contains": lambda answer, truth: float(contains_truth(answer, truth)),
    "relaxed": lambda answer, truth: float(relaxed_match(answer, truth)),
    "anls": lambda answer, truth: anls(answer, [truth]),
}
