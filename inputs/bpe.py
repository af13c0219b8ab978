"""Three codecs for byte-pair encoding (BPE): byte-level BPE on tiktoken, SentencePiece's, and CLIP's.

A codec normalizes text and turns it into ids, and ids into text, without special tokens. tiktoken has neither
SentencePiece's BPE (LLaMA-1 and 2, Vicuna, Mistral, TinyLlama) nor CLIP's, so this file implements both.

Sources: Sennrich et al. 2016 (arXiv 1508.07909), Kudo & Richardson 2018 (arXiv 1808.06226), OpenAI's CLIP.
"""

import heapq
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise

import regex
import tiktoken

SPACE = "\u2581"  # ▁, SentencePiece's character for a space
CACHE = 1 << 16  # number of words whose ids are kept


class PickledByFields:
    """Base class of dataclasses that derive tables and caches from their fields: a pickle holds the fields only."""

    def __reduce__(self):
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


@dataclass(eq=False)
class ByteLevel(PickledByFields):
    """Byte-level BPE, as in GPT-2, LLaMA-3 and Qwen2.

    Bytes without an id (SmolLM2 has some) are dropped, as in Hugging Face's tokenizers.
    """

    ranks: dict[bytes, int]  # the bytes of each token -> its rank in the order of merging, which is its id
    split: str  # pattern that cuts text into words before merging
    nfc: bool = False  # compose letters and accents first (Unicode NFC), as Qwen2 does
    ids: tuple[int, ...] = ()  # the id of each rank, if they differ, as in RoBERTa

    def __post_init__(self):
        self.missing_bytes = bytes(byte for byte in range(256) if bytes([byte]) not in self.ranks)
        self.encoding = tiktoken.Encoding("llava", pat_str=self.split, mergeable_ranks=self.ranks, special_tokens={})
        self.spelled = {self.ids[rank] if self.ids else rank: token for token, rank in self.ranks.items()}
        self.highest_id = max(self.spelled)

    def normalize(self, text: str, prefix: bool = True) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def encode_normalized(self, text: str, prefix: bool = True) -> list[int]:
        if self.missing_bytes and set(self.missing_bytes) & set(text.encode()):
            words = (word.encode().translate(None, self.missing_bytes) for word in regex.findall(self.split, text))
            ranks = [rank for word in words if word for rank in self.encoding._encode_single_piece(word)]
        else:
            ranks = self.encoding.encode_ordinary(text)
        return [self.ids[rank] for rank in ranks] if self.ids else ranks

    def decode(self, ids: list[int], words: dict[int, str]) -> str:
        """Text of `ids`; an embedding may have unused rows. Args: words: added tokens, which stand for themselves."""
        parts = [words[i].encode() if i in words else self.spelled.get(i, b"") for i in ids]
        return b"".join(parts).decode(errors="replace")

    def merges(self) -> Iterator[list[bytes]]:
        """Yields the two parts of each merged token, found by merging its bytes with the earlier ranks only.

        Some of LLaMA-3's tokens have no such parts: tiktoken encodes a whole word that is a token without merging.
        """
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                pairs = [self.ranks.get(a + b, rank) for a, b in pairwise(parts)]
                i = min(range(len(pairs)), key=pairs.__getitem__)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2 and all(part in self.ranks for part in parts):
                yield parts


@dataclass(eq=False)
class SentencePiece(PickledByFields):
    """SentencePiece's BPE: cut a text into characters, then merge the neighboring pair with the best score, repeatedly.

    A space is a character, written ▁. Characters without a piece are encoded as bytes. A text gets a space in front
    (the "dummy prefix"), so that its first word has the same ids as later in a text.
    """

    ids: dict[str, int]  # piece -> id
    scores: dict[str, float]  # piece -> score of merging two parts to it
    byte_ids: list[int]  # the ids of all 256 bytes, or empty
    unknown: int  # id of a character without a piece if byte_ids is empty
    scheme: str  # which texts get the prefix: a key of vocabularies.PREFIXES

    def __post_init__(self):
        self.spelled = {i: bytes([byte]) for byte, i in enumerate(self.byte_ids)}
        self.spelled |= {i: piece.replace(SPACE, " ").encode() for piece, i in self.ids.items()}
        self.highest_id = max(self.spelled)
        # If no piece has a space after another character, merges never cross the start of a word: words can be cached.
        cuts_at_spaces = not any(SPACE in piece.lstrip(SPACE) for piece in self.scores)
        self.words = regex.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+" if cuts_at_spaces else "(?s).+")
        self.encode_word = lru_cache(maxsize=CACHE)(self.encode_uncached)

    def normalize(self, text: str, prefix: bool = True) -> str:
        """The text that added tokens are found in. Args: prefix: False if it continues another one."""
        if self.scheme not in ("prepend", "double", "never"):
            return text
        text = text.replace(" ", SPACE)
        prefix = prefix and self.scheme != "never" and text.startswith(SPACE if self.scheme == "double" else text[:1])
        return SPACE + text if prefix and text else text

    def encode_normalized(self, text: str, prefix: bool = True) -> list[int]:
        """Ids of a part of a normalized text. Args: prefix: as in `normalize`."""
        text = text.replace(" ", SPACE)
        if prefix and self.scheme not in ("prepend", "never") and not text.startswith(SPACE):
            text = SPACE + text
        return [i for word in self.words.findall(text) for i in self.encode_word(word)]

    def encode_uncached(self, word: str) -> list[int]:
        ids = []
        for part in merge_parts(list(word), self.scores):
            if part in self.ids:
                ids.append(self.ids[part])
            else:  # a character without a piece
                ids += [self.byte_ids[byte] for byte in part.encode()] if self.byte_ids else [self.unknown]
        return ids

    def decode(self, ids: list[int], words: dict[int, str]) -> str:
        """Text of `ids` without the dummy prefix. Args: words: added tokens, which stand for themselves."""
        parts = [words[i].replace(SPACE, " ").encode() if i in words else self.spelled.get(i, b"") for i in ids]
        text = b"".join(parts).decode(errors="replace")
        return text if self.scheme == "never" else text.removeprefix(" ")


@dataclass(eq=False)
class ClipBPE(PickledByFields):
    """The BPE of CLIP's text tower: text in lower case, with an end mark after every word instead of spaces."""

    SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+"
    ids: dict[str, int]  # token, spelled in `byte_alphabet` -> id
    merged: list[str]  # the tokens that are merged from two others, in order of merging

    def __post_init__(self):
        self.scores, self.alphabet = {token: -rank for rank, token in enumerate(self.merged)}, byte_alphabet()
        to_byte = {char: byte for byte, char in self.alphabet.items()}
        letters = {i: bytes(map(to_byte.get, token.removesuffix("</w>"))) for token, i in self.ids.items()}
        self.spelled = {i: letters[i] + b" " * token.endswith("</w>") for token, i in self.ids.items()}
        self.highest_id = max(self.spelled)
        self.encode_word = lru_cache(maxsize=CACHE)(self.encode_uncached)

    def normalize(self, text: str, prefix: bool = True) -> str:
        # Character by character: str.lower() of a whole text would treat a sigma at the end of a word differently.
        return "".join(char.lower() for char in unicodedata.normalize("NFC", text))

    def encode_normalized(self, text: str, prefix: bool = True) -> list[int]:
        return [i for word in regex.findall(self.SPLIT, text) for i in self.encode_word(word)]

    def encode_uncached(self, word: str) -> list[int]:
        parts = [self.alphabet[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        return [self.ids[part] for part in merge_parts(parts, self.scores)]

    def decode(self, ids: list[int], words: dict[int, str]) -> str:
        """Text of `ids`, with a space after every word. Args: words: added tokens, which stand for themselves."""
        parts = [words[i].encode() + b" " if i in words else self.spelled.get(i, b"") for i in ids]
        return b"".join(parts).decode(errors="replace").strip()


Codec = ByteLevel | SentencePiece | ClipBPE


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte. tokenizer.json and CLIP's file spell their tokens in it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merge_parts(parts: list[str | None], scores: dict[str, float]) -> list[str]:
    """Byte-pair encoding of one word: merge the neighbors with the best score, the leftmost of equals, and repeat.

    Candidate merges wait in a heap: n log n steps for n characters, as a text without spaces is one long word. A
    candidate whose parts have changed since it was pushed is dropped when it is popped.
    """
    after, before = list(range(1, len(parts) + 1)), list(range(-1, len(parts)))  # the nearest parts that still exist
    candidates: list[tuple[float, int, str]] = []

    def push(left: int, right: int):
        if left >= 0 and right < len(parts) and (merged := parts[left] + parts[right]) in scores:
            heapq.heappush(candidates, (-scores[merged], left, merged))

    for i in range(len(parts) - 1):
        push(i, i + 1)
    while candidates:
        _, left, merged = heapq.heappop(candidates)
        right = after[left]
        if parts[left] is None or right == len(parts) or parts[left] + parts[right] != merged:
            continue
        parts[left], parts[right] = merged, None
        after[left] = after[right]
        before[after[left]] = left
        push(before[left], left)
        push(left, after[left])
    return [part for part in parts if part is not None]
