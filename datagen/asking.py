"""The request that asks a language model about an image, and the turns of a dialogue in its answer.

The model sees no pixels. It reads captions and boxes as text and writes a dialogue as if it saw the image (Liu et al.
2023, arXiv 2304.08485, section 3). A request is a system message, examples, and the facts of one image:

    system       prompts/KIND/system.txt
    user         prompts/KIND/shot_1_facts.txt      assistant    prompts/KIND/shot_1_answer.txt
    user         A dog runs on a beach.
                 dog: [0.320, 0.455, 0.610, 0.880]

These files are plain text to be edited; more examples (shot_2_...) may be added. The id of a request is a hash of
kind, image, model, messages and options, so an answer is never taken for that to another prompt.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from datagen.items import Item
from inputs.records import MARKER, DataError

PROMPTS = Path(__file__).parent / "prompts"
KINDS = ("conversation", "detail", "reasoning", "referring")
MOST_BOXES = 40  # of an image, the largest; more would cost more than they tell
DETAIL_QUESTIONS = (
    "Describe the image in detail.",
    "What do you see in this image? Give a full description.",
    "Please describe this scene as precisely as you can.",
    "Can you walk me through everything in this image?",
    "Write a thorough description of the image.",
    "What is going on here, in detail?",
    "Explain what is visible in this image, from the whole to the details.",
    "Give me a detailed account of this image.",
)
SPEAKER = re.compile(r"^[\s*#>_-]*(question|answer|q|a)\s*\d*\s*:[\s*_]*", re.IGNORECASE | re.MULTILINE)
DIVIDER = re.compile(r"^\s*={3,}\s*$", re.MULTILINE)

Turns = list[tuple[str, str]]  # question, answer


@dataclass(frozen=True)
class Request:
    """One call. id: hash of kind, image, model, messages and options; messages: empty for the templates."""

    id: str
    kind: str
    item: Item
    messages: tuple[dict, ...] = ()

    def body(self, model: str, options: dict) -> dict:
        """The body of a chat completion."""
        return {"model": model, "messages": list(self.messages), **options}


def read_prompts(folder: Path = PROMPTS) -> dict[str, list[dict]]:
    """The messages before the facts, for every kind. Raises DataError if a file is missing or empty."""
    return {kind: read_kind(folder / kind) for kind in KINDS}


def read_kind(folder: Path) -> list[dict]:
    messages = [message("system", folder / "system.txt")]
    for facts in sorted(folder.glob("shot_*_facts.txt")):
        messages.append(message("user", facts))
        messages.append(message("assistant", facts.with_name(facts.name.replace("_facts", "_answer"))))
    return messages


def message(role: str, path: Path) -> dict:
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts: {path}: {getattr(error, 'strerror', None) or 'is not UTF-8'}") from None
    if not text:
        raise DataError(f"--prompts: {path}: is empty")
    return {"role": role, "content": text}


def make_request(
    item: Item,
    kind: str,
    model: str,
    prompts: dict[str, list[dict]] | None,
    no_system: bool = False,
    options: dict | None = None,
) -> Request:
    """The request for one record. Args: model: name of the teacher; prompts: of read_prompts, None for templates;
    no_system: put the system prompt before the first question, for models that take none; options: those that change
    the answer, such as max_tokens."""
    messages = (*prompts[kind], {"role": "user", "content": facts_of(item)}) if prompts else ()
    if no_system and messages:
        system, first, *rest = messages
        messages = (first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest)
    fields = [kind, item.id, item.image, model, messages] + ([sorted(options.items())] if options else [])
    content = json.dumps(fields, ensure_ascii=False)
    return Request(hashlib.sha256(content.encode()).hexdigest()[:32], kind, item, messages)


def facts_of(item: Item) -> str:
    """Captions and boxes as text: one caption a line, a blank line, one box a line, three decimals."""
    largest = sorted(item.boxes, key=lambda box: (box[1] - box[3]) * (box[4] - box[2]))[:MOST_BOXES]
    boxes = [f"{name}: {box_text(corners)}" for name, *corners in item.boxes if (name, *corners) in largest]
    return "\n".join([*item.captions, "", *boxes]).strip()


def box_text(corners) -> str:
    return "[" + ", ".join(f"{v:.3f}" for v in corners) + "]"


# ---------------------------------------------------------------------------------------------------------------------
# from an answer to turns


def read_turns(request: Request, text: str) -> Turns:
    """Questions and answers in the text of a teacher. Raises ValueError with the reason if they do not pair up."""
    if MARKER in text:
        raise ValueError(f"{MARKER} stands in the text")
    parts = SPEAKER.split(DIVIDER.sub("", text).strip())  # text before, then name, text, name, text, ...
    if request.kind == "detail":
        if len(parts) > 1 or not parts[0].strip():
            raise ValueError("a description with questions in it" if len(parts) > 1 else "is empty")
        return [(DETAIL_QUESTIONS[int(request.id, 16) % len(DETAIL_QUESTIONS)], parts[0].strip())]
    names = [name[0].lower() for name in parts[1::2]]
    texts = [part.strip() for part in parts[2::2]]
    if not names:
        raise ValueError("no questions and answers")
    if parts[0].strip():
        raise ValueError("text before the first question")
    for i, (name, value) in enumerate(zip(names, texts)):
        if name != "qa"[i % 2]:
            raise ValueError("a question without an answer" if name == "q" else "an answer without a question")
        if not value:
            raise ValueError("an empty question" if name == "q" else "a question without an answer")
    if len(names) % 2:
        raise ValueError("a question without an answer")
    return list(zip(texts[::2], texts[1::2]))


def write_turns(turns: Turns) -> str:
    """The text that read_turns reads."""
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in turns)


def make_record(request: Request, turns: Turns) -> dict:
    """A record of LLaVA's JSON, with the image before the first question."""
    texts = [text for turn in turns for text in turn]
    texts[0] = f"{MARKER}\n{texts[0]}"
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": f"{request.item.id}-{request.kind}", "image": request.item.image, "conversations": conversations}
