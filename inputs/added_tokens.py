"""Tokens added to a vocabulary: the files that list them, and how text is cut around those that are not special.

Special ones control a dialogue; text never becomes one. The others are words of the vocabulary ("<loc_03>", "[SEG]"),
found whole in text before it is normalized or, if `normalized`, after that. As in Hugging Face's tokenizers.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import regex

from inputs.files import read_json

FLAGS = ("special", "normalized", "single_word", "lstrip", "rstrip")
WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")
BLANKS = "\t\n\v\f\r \x85\u00a0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
ROLE_TOKENS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image"))
EXTRA = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """An added token and its flags, named as in tokenizer.json."""

    id: int
    special: bool = True
    normalized: bool = False  # found in normalized text
    single_word: bool = False  # found only between characters that are no letters and digits
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False  # takes the white space after it

    @classmethod
    def parse(cls, i: int, values: dict) -> "AddedToken":
        special = bool(values.get("special", True))
        return cls(i, special, *(bool(values.get(name, name == "normalized" and not special)) for name in FLAGS[1:]))


def read_added(folder: Path, settings: dict) -> tuple[dict[str, AddedToken], dict]:
    """The added tokens that the files beside a vocabulary list, by name, and the settings completed by these files.

    Files: tokenizer_config.json, whose content is `settings`, or else added_tokens.json and special_tokens_map.json.
    """
    decoder = settings.get("added_tokens_decoder")
    if decoder is not None:
        return {token["content"]: AddedToken.parse(int(i), token) for i, token in decoder.items()}, settings
    path = folder / "special_tokens_map.json"
    settings = settings | (read_json(path) if path.exists() else {})
    path = folder / "added_tokens.json"
    ids, special = read_json(path) if path.exists() else {}, special_names(settings)
    flags = {name: {"special": name in special, "normalized": name not in special} for name in ids}
    return {name: AddedToken.parse(i, flags[name]) for name, i in ids.items()}, settings


def special_names(settings: dict) -> set[str]:
    """The names of the special tokens in a tokenizer_config.json."""
    tokens = [settings[role] for role in ROLE_TOKENS if settings.get(role)]
    for key in EXTRA:
        more = settings.get(key) or []
        tokens += more.values() if isinstance(more, dict) else more
    return {token["content"] if isinstance(token, dict) else token for token in tokens}


def compile_names(names: Iterable[str]) -> re.Pattern | None:
    """A pattern that finds the longest of the names that start at a place; None if there are none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def split_text(
    text: str, pattern: re.Pattern | None, tokens: dict[str, AddedToken]
) -> Iterator[tuple[str, AddedToken | None]]:
    """Yields the parts of a text in order: (text, None) or, for a token that `pattern` finds, ("", the token)."""
    start = 0
    for found in pattern.finditer(text) if pattern else ():
        (left, right), token = found.span(), tokens[found[0]]
        around = text[max(left - 1, 0) : left], text[right : right + 1]
        if token.single_word and any(WORD.match(char) for char in around if char):
            continue
        if token.lstrip:
            left = max(start, len(text[:left].rstrip(BLANKS)))
        if token.rstrip:
            right = len(text) - len(text[right:].lstrip(BLANKS))
        if start < left:
            yield text[start:left], None
        yield "", token
        start = right
    if start < len(text):
        yield text[start:], None
