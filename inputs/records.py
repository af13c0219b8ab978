"""LLaVA's JSON: what a record is, and an index, so that a file of any size is read one record at a time.

A record is {"id", "image" (path, or list of paths, or absent), "conversations": [{"from": "human"|"gpt", "value"}]}.

The index is built in one pass that holds a few megabytes of the file at a time and checks every record. That of a file
above SMALL is kept, and memory-mapped by every process that reads it:

    out/index/<path>-<version>/     hashes; a file that changes, or this code, makes a new one
        spans.npy      (N, 2)  int64   byte at which a record starts, bytes it has
        rounds.npy     (N,)    int32   questions it asks
        image_counts.npy  (N,) int32   images it shows
        facts.json     how many different pictures, and the faults: number, id and reason
        lengths-*.npy  tokens of each sample, see data.py
"""

import codecs
import json
import os
import re
import shutil
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from inputs import files
from inputs.files import publish_folder, reject_duplicate_keys
from inputs.templates import TEMPLATES, Turn

MARKER = "<image>"  # stands for a picture in the human turns of a record that has one; everywhere else it is text
SMALL = 1_000_000  # bytes; the index of a smaller file is built in less time than a folder is worth
CHUNK = 4_000_000  # bytes read at a time; a longer record is read in chunks that double


class DataError(ValueError):
    """A record that cannot be used; the message is one line: file, record, reason."""

    def __init__(self, message: str):
        # A DataLoader hands on a worker's error as its traceback; its last line is what was said.
        super().__init__(message.rstrip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class Fault(NamedTuple):
    """Why a record cannot be used. record: its file, number and id, as messages name it."""

    record: str
    reason: str


# ---------------------------------------------------------------------------------------------------------------------
# one record


def check_record(record: dict):
    """Raise ValueError with the reason if a record is not LLaVA's JSON, or says something about pictures it has not."""
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, not an object")
    for path in image_paths(record):
        if not isinstance(path, str) or not path:
            raise ValueError(f"image {path!r} is not a path")
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise ValueError("no conversations")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise ValueError(f"turn {i} has no text value")
        role = ("human", "gpt")[i % 2]
        if message.get("from") != role:
            raise ValueError(
                f"turn {i} is from {message.get('from')!r}, should be {role!r}: turns alternate, human first"
            )
        if SURROGATE.search(message["value"]):
            raise ValueError(f"turn {i} holds half a surrogate pair, which is not text")
    if len(messages) % 2:
        raise ValueError("the last question has no answer")
    if record.get("template", "plain") not in list(TEMPLATES):
        raise ValueError(f"template {record['template']!r} is none of {', '.join(TEMPLATES)}")
    images = len(image_paths(record))
    markers = sum(message["value"].count(MARKER) for message in messages[::2])
    if images and markers != images:
        raise ValueError(f"{markers} {MARKER} markers for {images} pictures")


SURROGATE = re.compile("[\ud800-\udfff]")


def image_paths(record: dict) -> list[str]:
    image = record.get("image")
    return [] if image is None else image if isinstance(image, list) else [image]


def turns_of(record: dict, image_last: bool = False) -> list[Turn]:
    """The dialogue of a record; its markers taken out of the questions, each picture put before (or after) its text."""
    has_image = bool(image_paths(record))
    messages, turns = record["conversations"], []
    for human, gpt in zip(messages[::2], messages[1::2]):
        count = human["value"].count(MARKER) if has_image else 0
        question = human["value"].replace(MARKER, "").strip() if count else human["value"]
        turns.append(Turn(question, gpt["value"], count, image_last and count > 0))
    return turns


def cut_dialogue(record: dict, questions: int) -> list[dict]:
    """Pieces of a dialogue, of at most so many questions each; a piece starts with all pictures shown up to then.

    Later answers often follow from earlier ones, so a model may learn them without a look at the picture.
    """
    messages, images, pieces, shown = record["conversations"], image_paths(record), [], 0
    for start in range(0, len(messages), 2 * questions):
        first, *rest = messages[start : start + 2 * questions]
        again = MARKER * shown + "\n" if shown else ""
        if images:
            shown += sum(message["value"].count(MARKER) for message in [first, *rest][::2])
        dialogue = [first | {"value": again + first["value"]}, *rest]
        pieces.append(record | {"image": images[:shown], "conversations": dialogue})
    return pieces


# ---------------------------------------------------------------------------------------------------------------------
# one pass over a file


def refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON value")


STRICT = json.JSONDecoder(parse_constant=refuse_constant, object_pairs_hook=reject_duplicate_keys)
LENIENT = json.JSONDecoder(parse_int=str)  # finds the end of what STRICT refuses
SPACE = re.compile(r"[ \t\n\r]*")
MARGIN = 16  # characters; longer than any name or escape that the end of a chunk may cut


class Reader:
    """JSON values of a file one after another, with little of it in memory. Args: chunk: bytes read at a time."""

    def __init__(self, file: BinaryIO, chunk: int):
        self.file, self.chunk = file, chunk
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.at = "", 0  # what was read and may still be needed; where in it we are
        self.byte = 0  # the same place in the file
        while not self.text and self.more():
            pass
        if self.text.startswith("\ufeff"):  # Windows editors put a byte order mark in front
            self.skip(1)

    def more(self) -> bool:
        """Read on; False at the end of the file, where nothing changes."""
        content = self.file.read(max(self.chunk, len(self.text) - self.at))
        new = self.decode(content, final=not content)
        if content:
            self.text, self.at = self.text[self.at :] + new, 0
        return bool(content)

    def skip(self, end: int) -> tuple[int, int]:
        """Go on to text[end]; returns the byte we were at, and how many were passed."""
        start, passed = self.byte, len(self.text[self.at : end].encode())
        self.at, self.byte = end, start + passed
        return start, passed

    def peek(self) -> str:
        """The next character that is not white space; at the end of the file none."""
        while True:
            self.skip(SPACE.match(self.text, self.at).end())
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> tuple[object, str, int]:
        """The value that starts here: itself, why it is refused ("" if it is not), and where in `text` it ends.

        Raises JSONDecodeError where no value can be read, RecursionError where it is nested too deeply.
        """
        decoder, fault = STRICT, ""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                torn, problem = end > len(self.text) - MARGIN, None  # 12 may be the start of 12e3
            except json.JSONDecodeError as error:  # what fails at the end of the chunk may be whole with the next one
                torn = error.pos > len(self.text) - MARGIN or error.msg.startswith("Unterminated string")
                problem = error
            except ValueError as error:  # NaN, a key given twice, 5,000 digits: this value is spoiled, not the file
                decoder, fault = LENIENT, f"not JSON ({error})"
                continue
            if torn and self.more():
                continue
            if problem:
                raise problem
            return value, fault, end


def scan(path: Path, file: BinaryIO, chunk: int) -> Iterator[tuple[object, str, tuple[int, int]]]:
    """Every record of a list: its value, why it is refused, its first byte and its bytes. Raises DataError."""
    number = 0
    try:
        reader = Reader(file, chunk)
        is_list = reader.peek() == "["
        reader.skip(reader.at + is_list)
        ended = is_list and reader.peek() == "]"
        reader.skip(reader.at + ended)
        while not ended:
            reader.peek()
            value, fault, end = reader.value()
            span = reader.skip(end)
            if not is_list:
                break
            yield value, fault, span
            number, sign = number + 1, reader.peek()
            if sign not in ("]", ","):
                raise json.JSONDecodeError("Expecting ',' delimiter", reader.text, reader.at)
            reader.skip(reader.at + 1)
            ended = sign == "]"
        if reader.peek():
            hint = "" if is_list else "; JSON Lines? Put [ before the first record, commas between, ] at the end"
            raise json.JSONDecodeError("Extra data" + hint, reader.text, reader.at)
    except RecursionError:
        raise DataError(f"{path}: nested too deeply, in record {number}") from None
    except json.JSONDecodeError as error:
        reader.skip(error.pos)
        raise DataError(f"{path}: not JSON ({error.msg}, at byte {reader.byte:,}, record {number})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not JSON (not UTF-8: {error.reason}, after record {number})") from None
    if not number:
        raise DataError(f"{path}: must hold a list of records, and at least one")


def build_index(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of an index by name, and its facts. A bar is shown if it takes longer than a second."""
    spans, rounds, images, names, faults = array("q"), array("i"), array("i"), set(), []
    with tqdm(total=size, desc=f"index of {path.name}", unit="B", unit_scale=True, delay=1) as bar:
        for number, (record, fault, span) in enumerate(scan(path, file, CHUNK)):
            if not fault:
                try:
                    check_record(record)
                except ValueError as error:
                    fault = str(error)
            if fault:
                name = repr(record["id"])[:80] if isinstance(record, dict) and "id" in record else ""
                faults.append([number, name, fault])
            shown = [] if fault else image_paths(record)
            names.update(map(hash, shown))
            spans.extend(span)
            rounds.append(0 if fault else len(record["conversations"]) // 2)
            images.append(len(shown))
            bar.update(sum(span) - bar.n)
    arrays = {"spans": np.array(spans).reshape(-1, 2), "rounds": np.array(rounds), "image_counts": np.array(images)}
    return arrays, {"distinct_images": len(names), "faults": faults}


# ---------------------------------------------------------------------------------------------------------------------
# the file as a sequence


class RecordFile:
    """The records of one JSON file, each read when it is asked for. Raises DataError if it is no list of records.

    `spans`, `rounds`, `image_counts`: see above. `distinct_images`: how many different ones. `faults`: by number, why a
    record cannot be used. The file is opened for each record: that costs less than decoding its image, and no process
    that is forked or spawned shares a position in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.version = version_of(file)
                size = self.version[0]
                if size < SMALL:
                    self.folder, (arrays, facts) = None, build_index(self.path, file, size)
                else:
                    self.folder = self.kept(lambda: build_index(self.path, file, size))
                    arrays, facts = None, json.loads((self.folder / "facts.json").read_text())
        except OSError as error:
            raise DataError(f"{error.filename or path}: {error.strerror}") from None
        self.distinct_images = facts["distinct_images"]
        self.faults = {
            number: Fault(f"{path}: record {number}{name and f' (id {name})'}", reason)
            for number, name, reason in facts["faults"]
        }
        self.attach(arrays)

    def kept(self, build: Callable) -> Path:
        """The folder of the index; if there is none yet, it is made, by one process while the others wait."""
        place = sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        version = sha256(repr(self.version).encode() + Path(__file__).read_bytes()).hexdigest()[:16]
        folder = files.OUTPUT_ROOT.resolve() / "index" / f"{place}-{version}"
        folder.parent.mkdir(parents=True, exist_ok=True)

        def write(partial: Path):
            for name, values in arrays.items():
                np.save(partial / f"{name}.npy", values)
            (partial / "facts.json").write_text(json.dumps(facts))

        with alone(folder.parent / f"{place}.lock"):
            if not folder.exists():
                arrays, facts = build()
                publish_folder(folder, write)
                for old in folder.parent.glob(f"{place}-*"):  # of what the file was before
                    if old != folder:
                        shutil.rmtree(old)
        return folder

    def attach(self, arrays: dict[str, np.ndarray] | None):
        for name in ("spans", "rounds", "image_counts"):
            setattr(self, name, arrays[name] if arrays else np.load(self.folder / f"{name}.npy", mmap_mode="r"))

    def __getstate__(self) -> dict:
        """For a process that is spawned: it maps the same files, and no array travels."""
        mapped = ("spans", "rounds", "image_counts") if self.folder else ()
        return {name: value for name, value in vars(self).items() if name not in mapped}

    def __setstate__(self, state: dict):
        vars(self).update(state)
        if self.folder:
            self.attach(None)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> dict:
        start, size = map(int, self.spans[number])
        try:
            with self.path.open("rb", buffering=0) as file:
                if version_of(file) != self.version:
                    raise DataError(f"{self.path}: has changed since it was opened; start again")
                file.seek(start)
                return json.loads(file.read(size))
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from None

    def where(self, number: int) -> str:
        """File, record and its id, as messages name it."""
        return f"{self.path}: record {number} (id {self[number].get('id')!r})"


def version_of(file: BinaryIO) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds: whether a file is still the one that was indexed."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


@contextmanager
def alone(path: Path):
    """Hold the lock file `path`: one process at a time is inside. The system frees it when its holder dies."""
    import fcntl  # not on Windows, where small files work all the same

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_records(path: str | Path) -> RecordFile:
    """LLaVA's JSON, of which every record is good. Raises DataError naming the file, the first bad one and why."""
    file = RecordFile(path)
    for fault in file.faults.values():
        raise DataError(f"{fault.record}: {fault.reason}")
    return file
