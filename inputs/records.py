"""Check one record of LLaVA's JSON, split it into turns, and cut a long dialogue into pieces.

{"id": "7", "image": "cat.jpg",                                     a path, a list of paths, or absent
 "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                   {"from": "gpt", "value": "a cat"}]}              human and gpt alternate, human first
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from inputs.templates import TEMPLATES

MARKER = "<image>"  # an image in the questions of a record that has images; elsewhere it is ordinary text
# Markers of images that a record without images does not have. "<image> ... </image>" is a text about XML or HTML.
LOST_MARKER = re.compile(r"<(image|video)>(?!.*</\1>)", re.DOTALL)
IMAGE_KEY = re.compile(
    r"(image|img|picture|pic|photo|video|frame)s?[_-]?(path|file|name|filename|url)?s?", re.IGNORECASE
)
OTHER_LAYOUTS = {  # by a key that LLaVA's records do not have
    "messages": "LLaMA-Factory and OpenAI: rename messages to conversations, role to from (user to human, assistant to "
    "gpt), content to value, images to image",
    "instruction": "Alpaca: write instruction and output as conversations",
}
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
    """A question, with `images` images before or after it, and its answer; None if the model must answer."""

    question: str
    answer: str | None
    images: int = 0
    image_last: bool = False


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
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            hint = ": LLaVA's keys are 'from' and 'value'" if isinstance(message, dict) and "content" in message else ""
            raise ValueError(f"turn {i} has no text value{hint}")
        role, given = ("human", "gpt")[i % 2], message.get("from")
        if given != role:
            raise ValueError(f"turn {i} is from {given!r}, should be {role!r}: turns alternate, human first")
        if SURROGATE.search(message["value"]):
            raise ValueError(f"turn {i} holds half a surrogate pair, which is not text")
    if len(messages) % 2:
        raise ValueError("the last question has no answer")
    if record.get("template", "plain") not in list(TEMPLATES):
        raise ValueError(f"template {record['template']!r} is none of {', '.join(TEMPLATES)}")
    markers = sum(message["value"].count(MARKER) for message in messages[::2])
    if paths and markers != len(paths):
        raise ValueError(f"{markers} {MARKER} markers for {len(paths)} images")
    if not paths:
        check_text_only(record)


def check_text_only(record: dict):
    """Raise ValueError if a record without images seems to have some: under another key, or as a marker."""
    keys = [key for key, value in record.items() if IMAGE_KEY.fullmatch(key) and names_files(value)]
    if keys:
        raise ValueError(f"no image under the key 'image', which alone is read; {keys[0]!r} looks like one: rename it")
    if found := next(filter(None, (LOST_MARKER.search(turn["value"]) for turn in record["conversations"][::2])), None):
        raise ValueError(f"{found[0]} stands in a question, but the key 'image' names no file")


def names_files(value: object) -> bool:
    """True for a text, an object, or a list that begins with one."""
    return bool(value) and isinstance(value[0] if isinstance(value, list) else value, (str, dict))


def image_paths(record: dict) -> list[str]:
    image = record.get("image")
    return [] if image is None else image if isinstance(image, list) else [image]


def turns_of(record: dict, image_last: bool = False) -> list[Turn]:
    """The turns of a record. Markers are cut out of the questions; `image_last` puts images after their question."""
    has_image = bool(image_paths(record))
    messages, turns = record["conversations"], []
    for human, gpt in zip(messages[::2], messages[1::2]):
        count = human["value"].count(MARKER) if has_image else 0
        question = human["value"].replace(MARKER, "").strip() if count else human["value"]
        turns.append(Turn(question, gpt["value"], count, image_last and count > 0))
    return turns


def cut_dialogue(record: dict, questions: int) -> list[dict]:
    """Cut a dialogue into records of at most `questions` questions; each starts with all images shown so far.

    Later answers often follow from earlier ones, so a model may learn them without the image. A cut prevents it.
    """
    messages, images, pieces, shown = record["conversations"], image_paths(record), [], 0
    for start in range(0, len(messages), 2 * questions):
        first, *rest = messages[start : start + 2 * questions]
        repeated = MARKER * shown + "\n" if shown else ""
        if images:
            shown += sum(message["value"].count(MARKER) for message in [first, *rest][::2])
        dialogue = [first | {"value": repeated + first["value"]}, *rest]
        pieces.append(record | {"image": images[:shown], "conversations": dialogue})
    return pieces
