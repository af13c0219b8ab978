"""Check one record of LLaVA's JSON, split it into turns, and cut a long dialogue into pieces.

{"id": "7", "image": "cat.jpg",                                     a path, a list of paths, or absent
 "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                   {"from": "gpt", "value": "a cat"}]}              human and gpt alternate, human first
A system prompt stands under "system" or "system_prompt", or in a turn from "system" before the first.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from inputs.templates import TEMPLATES

MARKER = "<image>"  # an image in the questions of a record that has images; elsewhere it is ordinary text
# Markers of images that a record without images does not have. "<image> ... </image>" is a text about XML or HTML.
LOST_MARKER = re.compile(r"<(image|video)>(?!.*</\1>)", re.DOTALL)
IMAGE_KEY = re.compile(r"(?i)(image|img|picture|pic|photo|video|frame)s?[_-]?(path|file|name|filename|url)?s?")
SYSTEM_KEYS = ("system", "system_prompt")
OTHER_LAYOUTS = {  # by a key that LLaVA's records do not have
    "messages": "LLaMA-Factory and OpenAI: rename messages to conversations, role to from (user to human, assistant to "
    "gpt), content to value, images to image",
    "instruction": "Alpaca: write instruction and output as conversations",
}
RECORD_KEYS, TURN_KEYS = {"id", "image", "boxes", "conversations", "template", "task", *SYSTEM_KEYS}, {"from", "value"}
SURROGATE = re.compile("[\ud800-\udfff]")  # half a UTF-16 pair: JSON can write it, UTF-8 cannot


class DataError(ValueError):
    """A record that cannot be used. The message is one line: file, record, reason."""

    def __init__(self, message: str):
        # DataLoader raises a worker's error again with its traceback as the message: keep the last line.
        super().__init__(message.rstrip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class Fault(NamedTuple):
    """The reason why a record cannot be used. record: its file, number and id, for messages."""

    record: str
    reason: str


@dataclass
class Turn:
    """A question, with `images` images before or after it, and its answer; None if the model must answer.

    parts: of the question, with an image between two of them, if the question has several images. system: the system
    prompt of a dialogue, in its first turn; "" stands for the template's own.
    """

    question: str
    answer: str | None
    images: int = 0
    image_last: bool = False
    parts: tuple[str, ...] = ()
    system: str = ""


def check_record(record: dict):
    """Raise ValueError with the reason if a record is malformed."""
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, not an object")
    paths, messages = image_paths(record), record.get("conversations")
    for path in paths:
        if not isinstance(path, str) or not path:
            raise ValueError(f"image {path!r} is not a path")
    if not isinstance(messages, list) or not messages:
        hints = [f": this is the layout of {hint}" for key, hint in OTHER_LAYOUTS.items() if key in record]
        raise ValueError("no conversations" + "".join(hints[:1]))
    system = isinstance(messages[0], dict) and messages[0].get("from") == "system"  # may come before the first question
    if len(messages) == system:
        raise ValueError("no conversations after the system prompt")
    roles = ["system"] * system + ["human", "gpt"] * len(messages)
    for i, (message, role) in enumerate(zip(messages, roles)):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            hint = ": LLaVA's keys are 'from' and 'value'" if isinstance(message, dict) and "content" in message else ""
            raise ValueError(f"turn {i} has no text value{hint}")
        if message.get("from") != role:
            found = message.get("from")
            raise ValueError(f"turn {i} is from {found!r}, should be {role!r}: turns alternate, human first")
        if SURROGATE.search(message["value"]):
            raise ValueError(f"turn {i} holds half a surrogate pair, which is not text")
    if (len(messages) - system) % 2:
        raise ValueError("the last question has no answer")
    if record.get("template", "plain") not in list(TEMPLATES):
        raise ValueError(f"template {record['template']!r} is none of {', '.join(TEMPLATES)}")
    prompts = [record[key] for key in SYSTEM_KEYS if record.get(key)] + [m["value"] for m in messages[:1] if system]
    if len(prompts) > 1 or not all(isinstance(text, str) and not SURROGATE.search(text) for text in prompts):
        raise ValueError(f"its system prompt is not one text: {prompts!r:.80}")
    questions = [message["value"] for message in messages[system::2]]
    markers = sum(question.count(MARKER) for question in questions)
    if paths and markers != len(paths):
        raise ValueError(f"{markers} {MARKER} markers for {len(paths)} images")
    if not paths:
        check_text_only(record, questions)


def check_text_only(record: dict, questions: list[str]):
    """Raise ValueError if a record without images seems to have some: under another key, or as a marker."""
    keys = [key for key, value in record.items() if IMAGE_KEY.fullmatch(key) and names_files(value)]
    if keys:
        raise ValueError(f"no image under the key 'image', which alone is read; {keys[0]!r} looks like one: rename it")
    if found := next(filter(None, map(LOST_MARKER.search, questions)), None):
        raise ValueError(f"{found[0]} stands in a question, but the key 'image' names no file")


def unread_keys(record: dict) -> set[str]:
    """The keys of a good record, and of its turns, that nothing reads."""
    turns = {f"{key} of a turn" for message in record["conversations"] for key in message.keys() - TURN_KEYS}
    return turns | (record.keys() - RECORD_KEYS)


def name_keys(counts: list[tuple[str, int]], most: int = 8) -> str:
    """Keys and how many have them, for messages: "'hint' (7), 'choices' (2)"."""
    names = [f"{key!r:.60} ({count:,})" for key, count in counts]
    return ", ".join(names[:most] + [f"{len(names) - most:,} more"] * (len(names) > most))


def names_files(value: object) -> bool:
    """True for a text, an object, or a list that begins with one."""
    return bool(value) and isinstance(value[0] if isinstance(value, list) else value, (str, dict))


def image_paths(record: dict) -> list[str]:
    image = record.get("image")
    return [] if image is None else image if isinstance(image, list) else [image]


def split_system(record: dict) -> tuple[str, list[dict]]:
    """The system prompt of a record, "" if it has none, and its other messages."""
    first, *rest = messages = record["conversations"]
    if first["from"] == "system":
        return first["value"], rest
    return next(filter(None, map(record.get, SYSTEM_KEYS)), ""), messages


def turns_of(record: dict, image_last: bool = False) -> list[Turn]:
    """The turns of a record. Args: image_last: as in marked_turn."""
    make_turn = partial(marked_turn, image_last=image_last) if image_paths(record) else Turn
    system, messages = split_system(record)
    turns = [make_turn(human["value"], gpt["value"]) for human, gpt in zip(messages[::2], messages[1::2])]
    turns[0].system = system
    return turns


def marked_turn(question: str, answer: str | None, image_last: bool = False) -> Turn:
    """A turn whose question has a marker for each image.

    A single image goes before its question, as in LLaVA-1.5, or with `image_last` after it; several images stay where
    their markers are, as in LLaVA-NeXT.
    """
    parts = tuple(question.split(MARKER))
    if len(parts) > 2:
        return Turn("".join(parts), answer, len(parts) - 1, parts=parts)
    return Turn("".join(parts).strip(), answer, 1, image_last) if len(parts) == 2 else Turn(question, answer)


def question_turn(question: str, images: int) -> Turn:
    """A question about `images` new images, which stand first if it has no markers. Raises ValueError."""
    if not images:
        if found := LOST_MARKER.search(question):
            raise ValueError(f"{found[0]} stands in the question, but there is no image for it")
        return Turn(question, None)
    markers = question.count(MARKER)
    if markers not in (0, images):
        raise ValueError(f"{markers} {MARKER} markers for {images} images: write one for each image, or none")
    return marked_turn(question, None) if markers else Turn(question, None, images)


def cut_dialogue(record: dict, questions: int) -> list[dict]:
    """Cut a dialogue into records of at most `questions` questions; each starts with all images shown so far.

    Later answers often follow from earlier ones, so a model may learn them without the image. A cut prevents it.
    """
    (system, messages), images, pieces, shown = split_system(record), image_paths(record), [], 0
    for start in range(0, len(messages), 2 * questions):
        first, *rest = messages[start : start + 2 * questions]
        repeated = MARKER * shown + "\n" if shown else ""
        if images:
            shown += sum(message["value"].count(MARKER) for message in [first, *rest][::2])
        dialogue = [first | {"value": repeated + first["value"]}, *rest]
        pieces.append(record | {"image": images[:shown], "system": system, "conversations": dialogue})
    return pieces
