"""An answer and the truth: what the official scorers of each kind of benchmark make of them, quirks included.

Nothing here reads files; scores.py makes tables of these. Answers are text as the model wrote it.
"""

import re
from collections import Counter

# ---------------------------------------------------------------------------------------------------------------------
# questions of your own


def plain_form(text: str) -> str:
    """The text in lower case, without punctuation."""
    return re.sub(r"[^\w ]", "", text.lower()).strip()


def exact_match(answer: str, truth: str) -> float:
    """1 if answer and truth are equal, case and punctuation aside; otherwise 0."""
    return float(plain_form(answer) == plain_form(truth))


# ---------------------------------------------------------------------------------------------------------------------
# VQA: ten people's answers to one question

NUMBERS = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = dict(zip(NUMBERS, ["0", *map(str, range(11))]))
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Meant to spare the point of a number. The look-behind is misspelled, so only a digit after it does; and the flag that
# followed landed in the place of `count`: 32 points at most are removed. Both are part of every published score.
POINT, POINTS = re.compile(r"(?!<=\d)\.(?!\d)"), 32
DIGIT_COMMA = re.compile(r"\d,\d")
# Words of the official table, which knows each without one of its apostrophes. (Those with a capital I can never match,
# since text is in lower case by then, and are left out.)
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
CONTRACTIONS["somebody'd"] = "somebodyd"  # the table's slip


def normalize_answer(text: str) -> str:
    """The official form of an answer (GT-Vision-Lab/VQA, vqaEval.py): "Two dogs." is "2 dogs", "black/white" two words.

    A mark beside a space, anywhere, goes without a trace, one that never stands there leaves a space; and all go
    without a trace if the text has a comma between digits.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out, number = text, bool(DIGIT_COMMA.search(text))
    for mark in PUNCTUATION:
        beside = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if beside or number else " ")
    words = [NUMBERS.get(word, word) for word in POINT.sub("", out, count=POINTS).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_m4c(text: str) -> str:
    """The form of TextVQA's and VizWiz's scorers (EvalAI's processor, LLaVA's m4c_evaluator.py).

    That of VQA, but for "it's", which becomes "it 's", and for commas and question marks, which go before all else.
    """
    return normalize_answer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def agreement(answer: str, answers: list[str]) -> float:
    """Leave-one-out accuracy: the mean, over the people, of min(1, how many of the others said the same / 3).

    Of ten people who agree with the answer, 0, 1, 2, 3, 4 give 0, 0.3, 0.6, 0.9, 1.
    """
    same = [other == answer for other in answers]
    return sum(min(1, (sum(same) - mine) / 3) for mine in same) / len(same)


def vqa_accuracy(answer: str, answers: list[str]) -> float:
    """VQA's official accuracy. Answers are normalized only if the people disagree; if not, letter for letter."""
    answer, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *answers))
    if len(set(answers)) > 1:
        answer, *answers = map(normalize_answer, (answer, *answers))
    return agreement(answer, answers)


def soft_accuracy(answer: str, answers: list[str]) -> float:
    """min(n / 3, 1), as the accuracy is often quoted: no leaving out, always normalized."""
    return min(1, [*map(normalize_answer, answers)].count(normalize_answer(answer)) / 3)


def m4c_accuracy(answer: str, answers: list[str]) -> float:
    """TextVQA's accuracy, always normalized (TextVQAAccuracyEvaluator)."""
    answer, *answers = map(normalize_m4c, (answer, *answers))
    return agreement(answer, answers)


# ---------------------------------------------------------------------------------------------------------------------
# documents and charts


def anls(answer: str, answers: list[str], threshold: float = 0.5) -> float:
    """Normalized Levenshtein similarity to the nearest of the true answers, 0 below one half (Biten et al. 2019).

    Case and white space do not count. (lmms-eval divides by the length with its white space, see README.)
    """
    answer = " ".join(answer.lower().split())
    return max((similarity(answer, " ".join(truth.lower().split()), threshold) for truth in answers), default=0.0)


def similarity(one: str, other: str, threshold: float) -> float:
    """1 - distance / longer length, 0 below the threshold; two empty texts are the same."""
    longer = max(len(one), len(other))
    if not longer:
        return 1.0
    if abs(len(one) - len(other)) / longer > 1 - threshold:  # the least the distance can be: the rest is not worth it
        return 0.0
    value = 1 - levenshtein(one, other) / longer
    return value if value >= threshold else 0.0


def levenshtein(one: str, other: str) -> int:
    """The fewest letters to put in, take out or change."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, its in enumerate(other, 1):
            diagonal, row[j] = row[j], min(diagonal + (letter != its), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def relaxed(answer: str, truth: str) -> bool:
    """ChartQA's relaxed accuracy: a number within 5 %, anything else letter for letter, case aside.

    (Masry et al. 2022, section 5.1; Qwen-VL's scorer, lmms-eval's.) "12%" is 0.12. A truth of 0 must be written alike.
    """
    mine, its = number(answer), number(truth)
    if mine is not None and its:
        return abs(mine - its) / abs(its) <= 0.05
    return answer.lower() == truth.lower()


def number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# yes or no


def yes_no_llava(text: str) -> str:
    """LLaVA's reading of an answer to POPE (eval_pope.py): "no" if a No, no or not stands alone before the first full
    stop, or else "yes". So an empty answer is a yes, and so are "NO", "no!" and "no\\n"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def yes_no_whole(text: str) -> str:
    """lmms-eval's reading: the whole answer is yes or no, case aside, and anything else ("Yes.", "no, it is not") is
    neither."""
    text = text.lower().strip()
    return text if text in ("yes", "no") else "other"


def yes_no_mme(text: str) -> str:
    """MME's reading (its calculation.py): yes or no somewhere in the first four letters, yes first; or "other"."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def yes_no_scores(answers: list[str], labels: list[str], lmms: bool = False) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of yes, all in per cent; "yes" is what is to be found (POPE, Li et
    al. 2023). Args: answers: "yes", "no" or "other", which is wrong and, where "yes" is true, a miss; labels; lmms: as
    lmms-eval counts, to which only "no" is a miss, and whose share of yes is that of the labels."""
    pairs = Counter(zip(answers, labels))
    hit, false = pairs["yes", "yes"], pairs["yes", "no"]
    precision = hit / (hit + false) if hit + false else 0.0
    found = hit + pairs["no", "yes"] if lmms else labels.count("yes")
    recall = hit / found if found else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    right = hit + pairs["no", "no"]
    values = {"accuracy": right / len(labels), "precision": precision, "recall": recall, "f1": f1}
    values["yes ratio"] = (labels.count("yes") if lmms else hit + false) / len(labels)
    return {name: 100 * value for name, value in values.items()}


# ---------------------------------------------------------------------------------------------------------------------
# one of several options

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def science_letter(text: str) -> str:
    """ScienceQA's reading (LLaVA's eval_science_qa.py): the letter alone, or "B. ..." in front, or one "The answer is
    B" with any character behind it, since the dot of its pattern is bare; "" if there is none."""
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else ""


def option_letter(text: str, options: dict[str, str]) -> str:
    """The option that an answer names, "" if none or several: by its letter, standing alone; or else by its own text.

    A rule of our own, for MMBench, whose server has a language model read what is no letter. Two letters are none. "A"
    alone in an answer of more than three words is an article, and no letter. Args: options: text by letter.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [letter for letter in options if letter in words]
    if not named or (named == ["A"] and len(words) > 3):
        named = [letter for letter, option in options.items() if option.strip() and option.lower() in text.lower()]
    return named[0] if len(named) == 1 else ""


# ---------------------------------------------------------------------------------------------------------------------
# medicine


def overlap(answer: str, truth: str) -> dict[str, float]:
    """Word precision, recall and F1, and LLaVA-Med's "exact match", between 0 and 1 (its evaluate_metrics.py).

    Words are counted as they stand in the answer where both have them, in the truth where only it has: an answer that
    says a true word twice raises them. "Exact match" there is the share of the answer's words that are different true
    words; `same` is what the name says.
    """
    mine, its = (
        Counter(normalize_answer(normalize_answer(text.lower())).replace(",", "").split()) for text in (answer, truth)
    )
    both, only = sum(mine[word] for word in mine if word in its), sum(its[word] for word in its if word not in mine)
    precision, recall = (both / sum(mine.values()), both / (both + only)) if both else (0.0, 0.0)
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    exact = len(mine.keys() & its.keys()) / sum(mine.values()) if mine else 0.0
    return {"recall": recall, "precision": precision, "f1": f1, "exact match": exact, "same": float(mine == its)}


def contains_truth(answer: str, truth: str) -> bool:
    """Of a closed question: the true answer is somewhere in the given one, once both are normalized (LLaVA-Med)."""
    return normalize_answer(truth.lower()) in normalize_answer(answer.lower())


# ---------------------------------------------------------------------------------------------------------------------

# The metrics that a question of your own may name under "metric": (answer, truth) to a score between 0 and 1.
METRICS = {
    "exact": exact_match,
    "contains": lambda answer, truth: float(contains_truth(answer, truth)),
    "relaxed": lambda answer, truth: float(relaxed(answer, truth)),
    "anls": lambda answer, truth: anls(answer, [truth]),
}
