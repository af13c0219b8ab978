"""Filters of generated dialogues. Each has a name, drops a record or keeps it, and says why.

    format      a question without an answer, other text than questions and answers, an answer that was cut
    echo        eight words in a row from the prompt or its examples
    source      talk of captions, boxes or coordinates, which a person who sees the image does not know
    refusal     "I cannot see the image"
    length      a question or an answer that is too short or too long for its kind
    repetition  an answer that runs in circles, or a question that comes twice
    noun        an object that neither captions nor boxes have (CHAIR's rule)
    box         a box that is none of the image's, or that of an object with another name
    duplicate   nearly the text of an earlier record
    balance     more than its share of a kind or of a type of question (off by default)

A record is dropped as a whole: later turns may refer to earlier ones.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

from datagen.asking import KINDS, Request, Turns
from datagen.duplicates import DuplicateFinder
from datagen.nouns import Nouns, nouns_of

LENGTHS = {"conversation": (1, 150), "detail": (6, 400), "reasoning": (5, 400), "referring": (1, 60)}  # words, answer
QUESTION_LENGTH = (2, 80)  # words
ECHO = 8  # words in a row
SAME_IMAGE, OTHER_IMAGE, LONG = 0.8, 0.95, 40  # Jaccard; texts about two images are compared from LONG words on
BOX = re.compile(r"[\[(]\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*[\])]")
BOX_TOLERANCE = 0.02

SOURCE = re.compile(
    r"\b(captions?|bounding[- ]box(es)?|coordinates?|annotat(ion|ions|ed)|metadata|object (list|detector|detection)s?"
    r"|(these|those|your|given|provided|following) (sentences?|notes?|texts?|descriptions?|objects)"
    r"|(according to|based on|judging by|given|from|in|by) the (sentences?|notes?|texts?|information|data)"
    r"|the ((input|label|source) )?(notes|sentences|text|data|information|prompt)"
    r" (do|does|did|say|says|said|mentions?|states?|shows?|tells?|lists?|describes?)"
    r"|(i was|have been|was i) told|the detected objects"
    r"|the (image |textual |written |original )?descriptions?|(list|set) of (the )?objects"
    r"|(provided|given|available|supplied) (information|data|details?|facts?|text|context)"
    r"|(information|data|details?|facts?|text|context)( that| which)?( is| are| was| were| you| i)?( have| has)?"
    r"( been)? (provided|given|available|supplied))\b",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\b(as an? (ai|artificial intelligence|(large )?language model|text-based|virtual assistant)"
    r"|i(['’]m| am| was) (sorry|afraid|unable|not able|just an? ai|only an? ai|an ai)|apologi[sz]e|my apologies"
    r"|i (can ?not|can['’]t|could ?not|couldn['’]t|am not able to|won['’]t|will not)( \w+)? (see|view|look|access|help|"
    r"assist|provide|process|display|open|analy[sz]e|answer|determine|tell|comply|fulfil+|do|describe|inspect|say|"
    r"observe|perceive|give|make|identify|generate)"
    r"|i (do not|don['’]t|have no|lack)( \w+){0,3} (access|ability|way|means|image|picture|information|eyes|capability|"
    r"capacity|images|pictures|details?|context)|(not|n['’]t) (have )?enough (information|details?|context)"
    r"|i (do not|don['’]t) know|(image|picture|photo) (was|is|has been) not (been )?(provided|attached|shared|given)"
    r"|insufficient (information|details?|context)|answer (is|remains) (unknown|unclear|not known|uncertain)"
    r"|(unable|not able|not possible|impossible) (for me )?to (see|view|answer|determine|tell|describe|help|assist|"
    r"provide|access|say)|no (image|picture|photo) (was|is|has been) (provided|attached|shared|given|uploaded)"
    r"|(can ?not|can['’]t) be (determined|answered|known|told|inferred))\b",
    re.IGNORECASE,
)
NEGATION = re.compile(r"\b(no|not|never|without|neither|nor|none|nothing)\b|n['’]t\b", re.IGNORECASE)


@dataclass
class Draft:
    """An answer of a teacher. fault: why its text has no turns; cut: it reached the limit of tokens."""

    request: Request
    turns: Turns = field(default_factory=list)
    fault: str = ""
    cut: bool = False
    text: str = ""

    @property
    def words(self) -> str:
        return "\n".join(part for turn in self.turns for part in turn) or self.text


class Context:
    """What the filters know besides the draft. Args: prompts: of asking.read_prompts, None for the templates."""

    def __init__(self, nouns: Nouns, prompts: dict[str, list[dict]] | None, lengths: dict | None = None):
        self.nouns, self.lengths = nouns, LENGTHS | (lengths or {})
        texts = [message["content"] for kind in KINDS for message in (prompts or {}).get(kind, [])]
        self.prompt = {run for text in texts for run in word_runs(text, ECHO)}
        self.finder, self.objects = DuplicateFinder(), {}

    def objects_of(self, item) -> set[str]:
        if item.id not in self.objects:
            self.objects[item.id] = nouns_of(item, self.nouns).objects(item)
        return self.objects[item.id]


def split_words(text: str) -> list[str]:
    return re.findall(r"[\w'’]+", text.lower())


def word_runs(text: str, size: int) -> set[tuple[str, ...]]:
    words = split_words(text)
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


# ---------------------------------------------------------------------------------------------------------------------
# filters of one record: each returns the reason to drop it, or ""


def bad_format(draft: Draft, context: Context) -> str:
    return draft.fault or ("the answer was cut at the limit of tokens" if draft.cut else "")


def echo(draft: Draft, context: Context) -> str:
    found = context.prompt & word_runs(draft.words, ECHO) if context.prompt else ()
    return f"repeats the prompt: {' '.join(min(found))!r}" if found else ""


def source(draft: Draft, context: Context) -> str:
    """With kind "referring", boxes are what is asked for."""
    found = SOURCE.search(draft.words) or (draft.request.kind != "referring" and BOX.search(draft.words))
    return f"speaks of its source: {found[0]!r}" if found else ""


def refusal(draft: Draft, context: Context) -> str:
    found = next(filter(None, (REFUSAL.search(answer) for _, answer in draft.turns)), None)
    return f"refuses: {found[0]!r}" if found else ""


def length(draft: Draft, context: Context) -> str:
    for name, i, (least, most) in (
        ("question", 0, QUESTION_LENGTH),
        ("answer", 1, context.lengths[draft.request.kind]),
    ):
        counts = [len(split_words(turn[i])) for turn in draft.turns]
        if bad := [count for count in counts if not least <= count <= most]:
            return f"{name} of {bad[0]} words, {least} to {most} are allowed"
    return ""


def repetition(draft: Draft, context: Context) -> str:
    questions = [" ".join(split_words(question)) for question, _ in draft.turns]
    if len(set(questions)) < len(questions):
        return "asks the same question twice"
    for _, answer in draft.turns:
        sentences = [" ".join(split_words(text)) for text in re.split(r"[.!?\n]+", answer)]
        sentences = [text for text in sentences if text.count(" ") >= 3]
        if len(set(sentences)) < len(sentences):
            return "says a sentence twice"
        if run := find_loop(split_words(BOX.sub(join_box, answer))):
            return f"repeats {' '.join(run)!r}"
    return ""


def join_box(match: re.Match) -> str:
    """A box as one word: its numbers may be equal."""
    return " box" + re.sub(r"\D", "", match[0])


def find_loop(words: list[str]) -> list[str]:
    """The words that come again at once: 1 word four times, 2 to 9 words three times, 10 to 20 words twice. (A
    list may say "on the left, a small red star on the left, a small red star on the right".)"""
    for size in range(1, 21):
        times = 4 if size == 1 else 3 if size < 10 else 2
        run = 0
        for i in range(size, len(words)):
            run = run + 1 if words[i] == words[i - size] else 0
            if run >= size * (times - 1):
                return words[i - size + 1 : i + 1]
    return []


def noun(draft: Draft, context: Context) -> str:
    """CHAIR's rule for the answers, except that "there is no dog" mentions no dog, and neither does a question."""
    item = draft.request.item
    nouns, objects = nouns_of(item, context.nouns), context.objects_of(item)
    for _, answer in draft.turns:
        for name, place in nouns.mentions(answer):
            clause = re.split(r"[.,;:!?]", answer[:place])[-1]
            if name not in objects and not NEGATION.search(clause):
                return f"mentions {name!r}, which is not in the image"
    return ""


def box(draft: Draft, context: Context) -> str:
    """Of "referring": every box must be one of the item's, and its turn must name that object."""
    if draft.request.kind != "referring":
        return ""
    item = draft.request.item
    nouns = nouns_of(item, context.nouns)
    for turn in draft.turns:
        text = " ".join(turn)
        spoken = set(split_words(BOX.sub(" ", text)))
        found = list(BOX.finditer(text))
        for match in found:
            corners = [number(v) for v in match.groups()]
            near = [box for box in item.boxes if all(abs(a - b) <= BOX_TOLERANCE for a, b in zip(corners, box[1:]))]
            if not near:
                return f"{match[0]} is none of the image's boxes"
            named = any(
                spoken >= set(split_words(name)) or nouns.names_in(name) & nouns.names_in(text) for name, *_ in near
            )
            if not named:
                return f"{match[0]} is the box of {near[0][0]!r}, which its question and answer do not name"
        if not found:
            return "a turn about a place without a box"
    return ""


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "1.2.3"
        return float("inf")


def duplicate(draft: Draft, context: Context) -> str:
    """Of the same image, or long texts of two images: short ones, such as "Is it red? Yes.", may well be equal."""
    text, image = draft.words, draft.request.item.image
    is_long = len(split_words(text)) >= LONG

    def threshold(key: str) -> float:
        return SAME_IMAGE if key.split("\n")[1] == image else OTHER_IMAGE if is_long else 2.0

    key = f"{draft.request.item.id}-{draft.request.kind}\n{image}\n{draft.request.id}"
    found = context.finder.find(key, text, threshold)
    return f"nearly the text of {found.splitlines()[0]}" if found else ""


FILTERS = {"format": bad_format, "echo": echo, "source": source, "refusal": refusal, "length": length}
FILTERS |= {"repetition": repetition, "noun": noun, "box": box, "duplicate": duplicate}
NAMES = (*FILTERS, "balance")


def find_fault(draft: Draft, names: list[str], context: Context) -> tuple[str, str]:
    """Name and reason of the first filter that takes a draft; two empty texts if none does. Without turns, only
    "format" applies, and it cannot be switched off."""
    if reason := bad_format(draft, context) if draft.fault or "format" in names else "":
        return "format", reason
    for name in names:
        if name in FILTERS and name != "format" and (reason := FILTERS[name](draft, context)):
            return name, reason
    return "", ""


# ---------------------------------------------------------------------------------------------------------------------
# balance


def question_type(draft: Draft) -> str:
    """The type of a record's first question: its first words, with the answer of a yes-or-no question."""
    question, answer = draft.turns[0]
    words = split_words(question)
    first = " ".join(words[:2]) if words[:1] == ["how"] else words[0] if words else ""
    if first in ("is", "are", "do", "does", "did", "can", "could", "has", "have", "was", "were", "will", "should"):
        said = {"yes", "no"} & {*split_words(answer)[:1], *split_words(answer)[-1:]}
        return f"yes or no: {min(said)}" if said else "yes or no"
    return first


def over_share(drafts: list[Draft], share: float = 0.5) -> list[tuple[Draft, str]]:
    """The drafts that "balance" drops, with the reason: no type of question may have more than `share` of its kind,
    then no kind more than `share` of all records. The hash of the request decides which records go."""
    dropped = []
    for level in ("type", "kind"):
        scopes = defaultdict(lambda: defaultdict(list))
        for draft in drafts:
            kind = draft.request.kind
            name = kind if level == "kind" else question_type(draft)
            scopes["" if level == "kind" else kind][name].append(draft)
        for groups in scopes.values():
            name, largest = max(groups.items(), key=lambda pair: len(pair[1]))
            others = sum(map(len, groups.values())) - len(largest)
            most = int(others * share / (1 - share))
            if others and len(largest) > most:
                chosen = sorted(largest, key=lambda draft: draft.request.id)[most:]
                dropped += [(draft, f"{level} {name!r} has more than {share:.0%} of the records") for draft in chosen]
        gone = {id(draft) for draft, _ in dropped}
        drafts = [draft for draft in drafts if id(draft) not in gone]
    return dropped
