"""Tokens added to a vocabulary: the files that list them, and how text is split at those that are not special.

Special ones control a dialogue; text never becomes one. The others ("<loc_03>", "[SEG]") are words of the vocabulary,
found whole in a text, before it is normalized or after. As in Hugging Face's tokenizers.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import regex

from inputs.files import read_optional_json

FLAGS = ("normalized", "single_word", "lstrip", "rstrip")
WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")
BLANKS = "".join(regex.findall(r"\p{White_Space}", "".join(map(chr, range(0x3001)))))
ROLE_TOKENS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image"))
EXTRA = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """An added token and its flags, named as in tokenizer.json."""

    id: int
    special: bool = True
    normalized: bool = False  # found in normalized text, not before
    single_word: bool = False  # not found beside a letter or a digit
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False  # takes the white space after it

    @classmethod
    def parse(cls, i: int, values: dict) -> "AddedToken":
        special = bool(values.get("special", True))
        flags = {"normalized": not special} | values
        return cls(i, special, *(bool(flags.get(name)) for name in FLAGS))


def read_added(folder: Path, settings: dict) -> tuple[dict[str, AddedToken], dict]:
    """The added tokens that the files beside a vocabulary list, by name, and the settings completed by these files.

    Files: tokenizer_config.json, whose content is `settings`, or else added_tokens.json and special_tokens_map.json.
    """
    decoder = settings.get("added_tokens_decoder")
    if decoder is not None:
        return {token["content"]: AddedToken.parse(int(i), token) for i, token in decoder.items()}, settings
    settings = settings | read_optional_json(folder / "special_tokens_map.json")
    ids, special = read_optional_json(folder / "added_tokens.json"), special_names(settings)
    return {name: AddedToken.parse(i, {"special": name in special}) for name, i in ids.items()}, settings


def content_of(token: str | dict) -> str:
    """The text of a token in a tokenizer_config.json, which is a text or an object with its flags."""
    return token["content"] if isinstance(token, dict) else token


def special_names(settings: dict) -> set[str]:
    """The names of the special tokens in a tokenizer_config.json."""
    tokens = [settings[role] for role in ROLE_TOKENS if settings.get(role)]
    for key in EXTRA:
        more = settings.get(key) or []
        tokens += more.values() if isinstance(more, dict) else more
    return set(map(content_of, tokens))


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
