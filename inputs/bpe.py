"""The two tokenizers that tiktoken does not know, written out: SentencePiece's BPE and that of CLIP's text tower.

SentencePiece belongs to LLaMA-1 and 2, Vicuna, Mistral and TinyLlama. Text is cut into characters, and again and again
the neighboring pair with the best score is joined. A space is a character like any other, written ▁; a text gets one
in front (the "dummy prefix"), so that a word has the same ids at the start of a text as within it. What no piece
covers is spelled in bytes.

Sources: Kudo & Richardson 2018 (arXiv 1808.06226); the field numbers are those of sentencepiece_model.proto.
"""

import gzip
import heapq
import math
import struct
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import regex

SPACE = "\u2581"  # ▁
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the types of a piece


class WordMemory:
    """Remembers the ids of words. A codec that goes to another process (pickle) leaves what it remembers behind."""

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "encode_word"}

    def __setstate__(self, state: dict):
        vars(self).update(state)
        self.encode_word = lru_cache(maxsize=1 << 16)(self.pieces)


class SentencePiece(WordMemory):
    """Text to ids and back, as sentencepiece does it.

    Args: ids: piece -> id. scores: piece -> what joining two parts to it is worth. byte_ids: 256 ids, of every byte,
    or none. unknown: id of a character that is no piece, where there are no bytes. unless_spaced: no dummy prefix
    where the text starts with a space anyway, as with the newer, "non-legacy" files of transformers.
    """

    def __init__(
        self, ids: dict[str, int], scores: dict[str, float], byte_ids: list[int], unknown: int, unless_spaced: bool
    ):
        self.ids, self.scores, self.byte_ids = ids, scores, byte_ids
        self.unknown, self.unless_spaced = unknown, unless_spaced
        self.spelled = {i: bytes([byte]) for byte, i in enumerate(byte_ids)}
        self.spelled |= {i: piece.replace(SPACE, " ").encode() for piece, i in ids.items()}
        self.highest_id = max(self.spelled)
        # Where no piece has a space after another character, none reaches over that border: words can be remembered.
        bordered = not any(SPACE in piece.lstrip(SPACE) for piece in scores)
        self.words = regex.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+" if bordered else "(?s).+")
        self.encode_word = lru_cache(maxsize=1 << 16)(self.pieces)

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """Ids of a text; with `prefix` False it goes on from something and gets no space in front."""
        text = text.replace(" ", SPACE)
        if text and prefix and not (self.unless_spaced and text.startswith(SPACE)):
            text = SPACE + text
        return [i for word in self.words.findall(text) for i in self.encode_word(word)]

    def pieces(self, word: str) -> tuple[int, ...]:
        return tuple(i for part in join(list(word), self.scores) for i in self.spell(part))

    def spell(self, part: str) -> list[int]:
        """The id of a piece; of a character that is none, the ids of its bytes, or else of the unknown."""
        if part in self.ids:
            return [self.ids[part]]
        return [self.byte_ids[byte] for byte in part.encode()] if self.byte_ids else [self.unknown]

    def decode(self, ids: list[int]) -> str:
        """Text of the ordinary tokens among `ids`, without the space that encode put in front."""
        text = b"".join(self.spelled.get(i, b"") for i in ids).decode(errors="replace")
        return text.removeprefix(" ")


def join(parts: list[str], scores: dict[str, float]) -> list[str]:
    """Byte-pair encoding of one word: neighbors join, the best score first; of equal ones, the leftmost."""
    if len(parts) > LONG:
        return join_long(parts, scores)
    worth = [scores.get(left + right, -math.inf) for left, right in pairwise(parts)]
    while worth and (best := max(worth)) > -math.inf:
        i = worth.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del worth[i]
        if i > 0:
            worth[i - 1] = scores.get(parts[i - 1] + parts[i], -math.inf)
        if i < len(worth):
            worth[i] = scores.get(parts[i] + parts[i + 1], -math.inf)
    return parts


LONG = 60  # up to here going through all pairs again is faster, 1.7 times for words of 5 characters


def join_long(parts: list[str | None], scores: dict[str, float]) -> list[str]:
    """The same for text without spaces, in n log n steps for n characters.

    Candidates wait in a heap; what has become of their halves in the meantime is looked at when they come up.
    """
    after, before = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))  # the living neighbors of a part
    candidates: list[tuple[float, int, str]] = []

    def consider(left: int, right: int):
        if left >= 0 and right < len(parts) and (joined := parts[left] + parts[right]) in scores:
            heapq.heappush(candidates, (-scores[joined], left, joined))

    for i in range(len(parts) - 1):
        consider(i, i + 1)
    while candidates:
        _, left, joined = heapq.heappop(candidates)
        right = after[left]
        if parts[left] is None or right == len(parts) or parts[left] + parts[right] != joined:
            continue
        parts[left], parts[right] = joined, None  # a part that was joined to the one before it is gone
        after[left] = after[right]
        if after[left] < len(parts):
            before[after[left]] = left
        consider(before[left], left)
        consider(left, after[left])
    return [part for part in parts if part is not None]


class ClipBPE(WordMemory):
    """The tokenizer of CLIP's text tower: lower case, and a mark at the end of every word instead of spaces.

    Args: ids: token -> id. scores: token -> what joining two parts to it is worth. Both are in `alphabet`, GPT-2's
    printable stand-in for every byte.
    """

    SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+"

    def __init__(self, ids: dict[str, int], scores: dict[str, float], alphabet: dict[int, str]):
        self.ids, self.scores, self.alphabet = ids, scores, alphabet
        self.highest_id = max(ids.values())
        self.encode_word = lru_cache(maxsize=1 << 16)(self.pieces)

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        text = "".join(char.lower() for char in unicodedata.normalize("NFC", text))  # a final sigma is no exception
        return [i for word in regex.findall(self.SPLIT, text) for i in self.encode_word(word)]

    def pieces(self, word: str) -> tuple[int, ...]:
        parts = [self.alphabet[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        return tuple(self.ids[part] for part in join(parts, self.scores))

    def decode(self, ids: list[int]) -> str:
        names = {i: token for token, i in self.ids.items()}
        to_byte = {char: byte for byte, char in self.alphabet.items()}
        words = "".join(names[i] for i in ids).split("</w>")
        return " ".join(bytes(to_byte[char] for char in word).decode(errors="replace") for word in words).strip()


# ---------------------------------------------------------------------------------------------------------------------
# files


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: an int, or raw bytes. Raises ValueError if it is none."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(message) and shift < 64:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value
        raise ValueError(f"no number at byte {at}")

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(message)}")
        yield number, message[at : at + size]
        at += size


def read_model(path: Path, unless_spaced: bool) -> tuple[SentencePiece, dict[str, int]]:
    """A `tokenizer.model`, and its special tokens by name. Raises ValueError or whatever a broken file leads to."""
    fields = list(read_fields(path.read_bytes()))
    pieces = [read_piece(value) for number, value in fields if number == 1]
    trainer, normalizer = (
        dict(entry for number, value in fields if number == wanted for entry in read_fields(value)) for wanted in (2, 3)
    )
    if not pieces or trainer.get(3) != 2:
        raise ValueError("not SentencePiece, or not its BPE")
    if (
        normalizer.get(2)
        or not normalizer.get(3, 1)
        or normalizer.get(4, 1)
        or any(kind == USER_DEFINED for _, _, kind in pieces)
    ):
        raise ValueError("it rewrites its text before encoding, which is not built")
    specials = {text: i for i, (text, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL)}
    return from_pieces(pieces, unless_spaced), specials


def read_piece(message: bytes) -> tuple[str, float, int]:
    values = {1: b"", 2: bytes(4), 3: NORMAL} | dict(read_fields(message))
    return values[1].decode(), struct.unpack("<f", values[2])[0], values[3]


def from_pieces(pieces: list[tuple[str, float, int]], unless_spaced: bool) -> SentencePiece:
    """From (text, score, type) of every id. Raises ValueError if some bytes have an id and others none."""
    ids = {text: i for i, (text, _, kind) in enumerate(pieces) if kind == NORMAL}
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    by_byte = {int(text[3:5], 16): i for i, (text, _, kind) in enumerate(pieces) if kind == BYTE}
    unknown = next((i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), 0)
    if len(by_byte) not in (0, 256):
        raise ValueError(f"{len(by_byte)} of 256 bytes have an id")
    return SentencePiece(ids, scores, [by_byte[byte] for byte in range(len(by_byte))], unknown, unless_spaced)


def read_llama2c(path: Path) -> tuple[SentencePiece, dict[str, int]]:
    """llama2.c's tokenizer.bin: an int32, then per piece its score (float32), length (int32) and text, bytes from 3 on.

    Raises ValueError or struct.error if the file ends within a piece.
    """
    data, at, pieces, length = path.read_bytes(), 4, [], -1
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        text, at = data[at + 8 : at + 8 + length], at + 8 + length
        i = len(pieces)
        kind = UNKNOWN if i == 0 else CONTROL if i < 3 else BYTE if i < 259 else NORMAL
        pieces.append((f"<0x{i - 3:02X}>" if kind == BYTE else text.decode().replace(" ", SPACE), score, kind))
    if at != len(data) or length < 0:
        raise ValueError(f"it ends within piece {len(pieces)}")
    return from_pieces(pieces, unless_spaced=False), {"<unk>": 0, "<s>": 1, "</s>": 2}


def from_json(model: dict, specials: dict[str, int], unless_spaced: bool) -> SentencePiece:
    """The "model" of a tokenizer.json: pieces, and merges in order. Raises any of a dozen errors if it is none."""
    vocabulary, merges = model["vocab"], model["merges"]
    byte_ids = [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)]
    others = {*specials.values(), *byte_ids}
    ordinary, scores = {text: i for text, i in vocabulary.items() if i not in others}, {}
    for rank, merge in enumerate(merges):
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        scores.setdefault(left + right, -float(rank))  # ways to the same piece stand together
    unknown = vocabulary.get(model.get("unk_token"), 0)
    return SentencePiece(ordinary, scores, byte_ids, unknown, unless_spaced)


CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")


def read_clip(path: Path, alphabet: dict[int, str]) -> tuple[ClipBPE, dict[str, int]]:
    """OpenAI's bpe_simple_vocab_16e6.txt.gz: a line of title, then merges, of which CLIP uses the first 48,894.

    Ids go to the bytes, the bytes that end a word, what the merges make, and two special tokens.
    """
    with gzip.open(path) as file:
        lines = file.read(20_000_000).decode().split("\n")[1 : 1 + 48_894]
    merged = [line.replace(" ", "") for line in lines]
    names = [*alphabet.values(), *(char + "</w>" for char in alphabet.values()), *merged, *CLIP_SPECIALS]
    ids = {name: i for i, name in enumerate(names)}
    scores = {name: -float(rank) for rank, name in enumerate(merged)}
    return ClipBPE(ids, scores, alphabet), {name: ids.pop(name) for name in CLIP_SPECIALS}


def clip_from_json(model: dict, specials: dict[str, int], alphabet: dict[int, str]) -> ClipBPE:
    """The same vocabulary as a tokenizer.json spells it."""
    ids = {name: i for name, i in model["vocab"].items() if name not in specials}
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    return ClipBPE(ids, {left + right: -float(rank) for rank, (left, right) in enumerate(merges)}, alphabet)


def merges_of(codec: SentencePiece) -> list[list[str]]:
    """Every way to join two pieces to a third, the best first: how tokenizer.json tells what joins with what."""
    ways = [
        (-score, codec.ids[piece[:cut]], codec.ids[piece[cut:]], [piece[:cut], piece[cut:]])
        for piece, score in codec.scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in codec.ids and piece[cut:] in codec.ids
    ]
    return [halves for *_, halves in sorted(ways)]
