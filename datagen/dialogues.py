"""Dialogues in the forms that other projects use, as LLaVA's records.

{"messages": [{"role": "user", "content": "<image>Who is it?"}, ...], "images": ["1.jpg"]}    LLaMA-Factory, OpenAI
{"conversations": [{"from": "human", "value": ...}, ...], "image": ...}                       LLaVA, ShareGPT
{"image_id": 7, "conversations": [{"content": [{"from": "user", "value": ...}, ...]}, ...]}   SVIT
"""

from collections import Counter
from collections.abc import Iterator

from inputs.records import MARKER, SYSTEM_KEYS

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
OTHER_MEDIA = ("videos", "video", "audios", "audio")
IMAGE_KEYS = ("image", "images", "image_path")


def dialogues_of(row: dict, notes: Counter) -> Iterator[dict]:
    """Yields {"image", "system", "conversations"}: one record, or for SVIT one for each dialogue of the image.

    Args: notes: counts what is left out of a record that is kept. Raises ValueError with the reason if a dialogue
    cannot be read: a role that LLaVA does not have, a video, a turn that is no text.
    """
    if media := [key for key in OTHER_MEDIA if row.get(key)]:
        raise ValueError(f"has {media[0]}, which is not read")
    messages = row.get("messages", row.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise ValueError("without a dialogue")
    first = messages[0] if isinstance(messages[0], dict) else {}
    nested = isinstance(first.get("content"), list) and "role" not in first
    for dialogue in [part.get("content") for part in messages if isinstance(part, dict)] if nested else [messages]:
        if not isinstance(dialogue, list) or not dialogue:
            raise ValueError("without a dialogue")
        paths = listed_images(row)
        turns = [read_turn(message, paths) for message in dialogue]
        if row.get("tools"):
            notes["with tools, which are left out"] += 1
        if any("<st>" in turn["value"] for turn in turns):
            notes["with boxes as <st>object<ed> [x1, y1, x2, y2], kept as they are"] += 1
        record = {"image": paths if len(paths) > 1 else paths[0]} if paths else {}
        record |= {key: row[key] for key in SYSTEM_KEYS if row.get(key)}
        yield record | {"conversations": turns}


def listed_images(row: dict) -> list[str]:
    """A row's images, under any of the usual keys. Raises ValueError if one is not a path."""
    found = next((row[key] for key in IMAGE_KEYS if row.get(key)), [])
    found = found if isinstance(found, list) else [found]
    paths = [path.get("path") if isinstance(path, dict) else path for path in found]
    if not all(isinstance(path, str) and path for path in paths):
        raise ValueError("an image is not a path")
    return paths


def read_turn(message: object, paths: list[str]) -> dict:
    """{"from", "value"} of a message; images that stand in its content are added to `paths`."""
    if not isinstance(message, dict):
        raise ValueError("a turn is not an object")
    role = message.get("role", message.get("from"))
    if role not in ROLES:
        raise ValueError(f"a turn is from {role!r}, which LLaVA does not have")
    content = message.get("content", message.get("value"))
    parts = content if isinstance(content, list) else [content]
    return {"from": ROLES[role], "value": "".join(read_part(part, paths) for part in parts)}


def read_part(part: object, paths: list[str]) -> str:
    """The text of one part of a message; an image becomes a marker, and its path is added to `paths`."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in ("image", "image_url"):
        raise ValueError(f"a part of a message is {kind!r}, not text or an image" if kind else "a turn has no text")
    value = next((part[key] for key in ("image_url", "image", "path", "url") if part.get(key)), None)
    value = value.get("url") if isinstance(value, dict) else value
    if value is None:  # the path stands in the row's list, in the same order
        return f"{MARKER}\n"
    if not isinstance(value, str) or "://" in value or value.startswith("data:"):
        raise ValueError("an image is an address or data, not a file: save it and name the file")
    paths.append(value.removeprefix("file:"))
    return f"{MARKER}\n"
