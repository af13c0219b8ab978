"""Read the header of a GGUF file, the format of llama.cpp: its metadata, and the place of every tensor.

The file is not trusted: every length is checked against what is left of the file before anything is made of it.
Source: docs/gguf.md of ggml-org/ggml.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC, VERSIONS = b"GGUF", (2, 3)  # version 1 had lengths of 32 bits
# The type of a value -> its code in struct and numpy.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")
ALIGNMENT, MOST_DIMENSIONS = 32, 4
HEADER_BYTES = 1 << 27  # the longest header that is read: ten times that of a vocabulary of 256,000 tokens


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a GGUF file."""

    shape: tuple[int, ...]  # (rows, columns), as in PyTorch; the file has the numbers the other way round
    kind: int  # ggml's number of its format, such as 0 for float32
    offset: int  # of its first byte in the file


@dataclass(frozen=True)
class GGUF:
    """The header of a GGUF file."""

    metadata: dict[str, Any]  # key -> number, text, list of texts, or array of numbers
    tensors: dict[str, StoredTensor]


def find_gguf(path: Path) -> Path | None:
    """Return `path` if it names a GGUF file, or else the only one in a folder without config.json, or None.

    Raises ValueError if such a folder holds several.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"{path}: holds {len(found)} GGUF files: name one, such as {found[0]}")
    return found[0] if found else None


def read_gguf(path: Path) -> GGUF:
    """Read the header of a GGUF file. Raises OSError, or ValueError without the name of the file."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("not a GGUF file: its first bytes are not GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return parse_header(Cursor(content, len(MAGIC)))


class Cursor:
    """Takes the values of a mapped file one after another. Raises ValueError at its end."""

    def __init__(self, content: mmap.mmap, start: int):
        self.content, self.at, self.end = content, start, min(len(content), HEADER_BYTES)

    def overrun(self) -> ValueError:
        if self.end < len(self.content):
            return ValueError(f"its header is longer than {HEADER_BYTES:,} bytes")
        return ValueError("the file is cut short: it ends within its header")

    def take(self, size: int) -> bytes:
        if size > self.end - self.at:
            raise self.overrun()
        self.at += size
        return self.content[self.at - size : self.at]

    def number(self, code: str) -> int | float | bool:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self) -> Any:
        """A type and a value of it."""
        kind = self.number("I")
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a value of its metadata has the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            return self.texts(count)
        if kind not in NUMBERS:
            raise ValueError(f"an array of its metadata has elements of type {kind}, not numbers or texts")
        code = "<" + NUMBERS[kind]
        return np.frombuffer(self.take(count * struct.calcsize(code)), code)

    def texts(self, count: int) -> list[str]:
        """`count` texts. Vocabularies have some hundred thousand, so this loop makes no further calls."""
        content, at, end, found = self.content, self.at, self.end, []
        for _ in range(count):
            start = at + LENGTH.size
            if start <= end:
                at = start + LENGTH.unpack_from(content, at)[0]
            if start > end or at > end:
                raise self.overrun()
            found.append(content[start:at].decode())
        self.at = at
        return found


def parse_header(cursor: Cursor) -> GGUF:
    """Read the header behind its first four bytes. Raises ValueError."""
    version = cursor.number("I")
    if version not in VERSIONS:
        big_endian = version and not version & 0xFFFF
        raise ValueError("a big-endian GGUF" if big_endian else f"GGUF of version {version}, not 2 or 3")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata, places = {}, {}
    for _ in range(value_count):
        if (key := cursor.text()) in metadata:
            raise ValueError(f"its metadata has {key!r:.99} twice")
        metadata[key] = cursor.value()
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.number("I")
        shape = tuple(cursor.number("Q") for _ in range(min(dimensions, MOST_DIMENSIONS + 1)))[::-1]
        if name in places or not 1 <= dimensions <= MOST_DIMENSIONS or 0 in shape:
            raise ValueError(f"its tensor {name!r:.99} is there twice, or its shape is {shape}")
        places[name] = shape, cursor.number("I"), cursor.number("Q")
    step = metadata.get("general.alignment", ALIGNMENT)
    if type(step) is not int or not 1 <= step <= 1 << 20 or step & (step - 1):
        raise ValueError(f"general.alignment is {step!r:.99}, not a power of two")
    start = -(-cursor.at // step) * step  # the tensors begin at a multiple of it
    return GGUF(metadata, {name: StoredTensor(*place, start + offset) for name, (*place, offset) in places.items()})
