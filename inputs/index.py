"""Random access to the records of a JSON file of any size, without holding the file in memory.

A RecordFile reads one record at a time, with an index that is built in one pass over the file. The pass holds a few
megabytes and checks every record. (LLaVA's 665K records: 0.1 GB a process; json.load takes 3.5 GB.)

The index of a large file is kept, and memory-mapped by every process that reads the file:

    out/index/<path>-<version>/    two hashes; a new version if the file or the code that builds the index changes
        spans.npy         (N, 2)  int64   first byte and number of bytes of each record
        rounds.npy        (N,)    int32   number of questions in each record
        image_counts.npy  (N,)    int32   number of images in each record
        facts.json        number of different images, and the faults: record number, id, reason
        lengths-*.npy     tokens of each sample, see data.Records.lengths
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
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from inputs import files, records
from inputs.files import fsync, publish_folder, reject_duplicate_keys
from inputs.records import DataError, Fault, check_record, image_paths

MIN_KEPT = 1_000_000  # bytes; the index of a smaller file is not kept but built again, which takes milliseconds
CHUNK = 4_000_000  # bytes read at a time; a longer record is read in chunks that double
ARRAYS = ("spans", "rounds", "image_counts")


class RecordFile:
    """The records of one JSON file as a sequence. Raises DataError if the file is not a list of records.

    Attributes: spans, rounds, image_counts: the arrays above. distinct_images: number of different paths. faults: by
    record number. The file is opened for each record: that costs less than decoding an image, and forked processes do
    not share a position in the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.version = file_version(file)
                size = self.version[0]
                if size < MIN_KEPT:
                    self.folder, (arrays, facts) = None, build_index(self.path, file, size)
                else:
                    self.folder = self.kept_index(file)
                    arrays, facts = None, json.loads((self.folder / "facts.json").read_text())
        except OSError as error:
            raise DataError(f"{error.filename or path}: {error.strerror}") from None
        self.distinct_images = facts["distinct_images"]
        self.faults = {
            number: Fault(f"{path}: record {number}{name and f' (id {name})'}", reason)
            for number, name, reason in facts["faults"]
        }
        self.attach(arrays)

    def kept_index(self, file: BinaryIO) -> Path:
        """The folder of the index. If it does not exist, one process builds it while the others wait."""
        place = sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        code = b"".join(Path(module).read_bytes() for module in (__file__, records.__file__))
        version = sha256(repr(self.version).encode() + code).hexdigest()[:16]
        folder = files.OUTPUT_ROOT.resolve() / "index" / f"{place}-{version}"
        folder.parent.mkdir(parents=True, exist_ok=True)

        def write(partial: Path):
            for name, values in arrays.items():
                np.save(partial / f"{name}.npy", values)
            (partial / "facts.json").write_text(json.dumps(facts))

        with file_lock(folder.parent / f"{place}.lock"):
            if not folder.exists():
                arrays, facts = build_index(self.path, file, self.version[0])
                publish_folder(folder, write)
                for old in folder.parent.glob(f"{place}-*"):  # indexes of older versions of the file
                    if old != folder:
                        shutil.rmtree(old)
        return folder

    def cached(self, name: str, key: list, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return compute() and save it beside a kept index. Args: key: everything that the result depends on."""
        if not self.folder:
            return compute()
        path = self.folder / f"{name}-{sha256(repr(key).encode()).hexdigest()[:16]}.npy"
        with file_lock(path.with_suffix(".lock")):
            if not path.exists():
                partial = path.with_suffix(".partial.npy")
                np.save(partial, compute())
                fsync(partial)
                os.replace(partial, path)
        return np.load(path, mmap_mode="r")

    def attach(self, arrays: dict[str, np.ndarray] | None):
        """Set the arrays as attributes; None maps those of the kept index."""
        for name in ARRAYS:
            setattr(self, name, arrays[name] if arrays else np.load(self.folder / f"{name}.npy", mmap_mode="r"))

    def __getstate__(self) -> dict:
        """For pickle: a spawned process maps the kept arrays again instead of receiving them."""
        mapped = ARRAYS if self.folder else ()
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
                if file_version(file) != self.version:
                    raise DataError(f"{self.path}: has changed since it was opened; start again")
                file.seek(start)
                return json.loads(file.read(size))
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from None

    def where(self, number: int) -> str:
        """File, number and id of a record, for messages."""
        return f"{self.path}: record {number} (id {self[number].get('id')!r})"


def read_records(path: str | Path) -> RecordFile:
    """Open a RecordFile. Raises DataError that names the first bad record and the reason."""
    file = RecordFile(path)
    for fault in file.faults.values():
        raise DataError(f"{fault.record}: {fault.reason}")
    return file


def file_version(file: BinaryIO) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds, to notice that the file has changed."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


@contextmanager
def file_lock(path: Path):
    """Context that one process at a time can enter. The system frees the lock when its holder dies."""
    import fcntl  # missing on Windows, where files below MIN_KEPT still work

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_index(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of an index by name, and its facts. A progress bar appears after a second."""
    spans, rounds, counts, names, faults = array("q"), array("i"), array("i"), set(), []
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
            images = [] if fault else image_paths(record)
            names.update(map(hash, images))
            spans.extend(span)
            rounds.append(0 if fault else len(record["conversations"]) // 2)
            counts.append(len(images))
            bar.update(sum(span) - bar.n)
    arrays = dict(zip(ARRAYS, (np.array(spans).reshape(-1, 2), np.array(rounds), np.array(counts))))
    return arrays, {"distinct_images": len(names), "faults": faults}


# ---------------------------------------------------------------------------------------------------------------------
# a JSON list, read in chunks


def reject_constant(name: str):
    raise ValueError(f"{name} is not a JSON value")


STRICT = json.JSONDecoder(parse_constant=reject_constant, object_pairs_hook=reject_duplicate_keys)
LENIENT = json.JSONDecoder(parse_int=str)  # to find the end of a value that STRICT rejects
SPACE = re.compile(r"[ \t\n\r]*")
MARGIN = 16  # characters; longer than any literal or escape that the end of a chunk may cut


class Reader:
    """Reads the JSON values of a file one after another. Args: chunk: bytes read at a time."""

    def __init__(self, file: BinaryIO, chunk: int):
        self.file, self.chunk = file, chunk
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.at = "", 0  # text that may still be needed, and the position in it
        self.byte = 0  # the same position in the file
        while not self.text and self.read_chunk():
            pass
        if self.text.startswith("\ufeff"):  # the byte order mark that Windows editors write
            self.skip(1)

    def read_chunk(self) -> bool:
        """Append the next chunk to the text. Returns False at the end of the file, where nothing changes."""
        content = self.file.read(max(self.chunk, len(self.text) - self.at))
        new = self.decode(content, final=not content)
        if content:
            self.text, self.at = self.text[self.at :] + new, 0
        return bool(content)

    def skip(self, end: int) -> tuple[int, int]:
        """Move to text[end]. Returns the byte of the old position, and the number of bytes passed."""
        start, passed = self.byte, len(self.text[self.at : end].encode())
        self.at, self.byte = end, start + passed
        return start, passed

    def peek(self) -> str:
        """Skip white space; returns the next character, "" at the end of the file."""
        while True:
            self.skip(SPACE.match(self.text, self.at).end())
            if self.at < len(self.text) or not self.read_chunk():
                return self.text[self.at : self.at + 1]

    def value(self) -> tuple[object, str, int]:
        """The value that starts here, the reason if it is rejected (else ""), and the position of its end in `text`.

        Raises JSONDecodeError if there is no value, RecursionError if it is nested too deeply.
        """
        decoder, fault = STRICT, ""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                incomplete, problem = end > len(self.text) - MARGIN, None  # 12 may be the start of 12e3
            except json.JSONDecodeError as error:  # may be valid once the next chunk is there
                incomplete = error.pos > len(self.text) - MARGIN or error.msg.startswith("Unterminated string")
                problem = error
            except ValueError as error:  # NaN, a duplicate key, 5,000 digits: only this value is bad, not the file
                decoder, fault = LENIENT, f"not JSON ({error})"
                continue
            if incomplete and self.read_chunk():
                continue
            if problem:
                raise problem
            return value, fault, end


def scan(path: Path, file: BinaryIO, chunk: int) -> Iterator[tuple[object, str, tuple[int, int]]]:
    """Yields value, reason if it is rejected (else ""), and (first byte, number of bytes) of each item in a JSON list.

    Raises DataError if the file is not a list with at least one item.
    """
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
