"""Random access to the records of a JSON file of any size, without holding the file in memory.

A RecordFile reads one record at a time, with an index that is built in one pass over the file. The pass maps the file
into memory and checks one record after another. (LLaVA's 665K records: 0.1 GB a process; json.load takes 3.5 GB.)

The index of a large file is kept, and memory-mapped by every process that reads the file:

    out/index/<path>-<version>/    two hashes; a new version if the file or the code that builds the index changes
        records.npy      first byte and size, questions and images of each record: (N,) of ROW
        facts.json       number of different images; faults: record number, its name, the reason; keys that are not read
        lengths-*.npy    tokens of each sample, see data.Records.lengths
"""

import io
import json
import mmap
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from inputs import files
from inputs.files import publish_folder, reject_duplicate_keys, write_atomic
from inputs.records import DataError, Fault, check_record, image_paths, name_keys, unread_keys

MIN_KEPT = 1_000_000  # bytes; the index of a smaller file is not kept but built again, which takes milliseconds
CODE_FILES = ("data.py", "inputs/*.py", "variants/*.py")  # what an index, and the lengths beside it, depend on
ROW = np.dtype([("span", np.int64, 2), ("rounds", np.int32), ("images", np.int32)])


class RecordFile:
    """The records of one JSON file as a sequence. Raises DataError if the file is not a list of records.

    Attributes: spans: first byte and number of bytes of each record, (N, 2); rounds and image_counts: its questions and
    images, (N,); distinct_images: number of different paths; faults: by record number; unread: keys that nothing reads.
    Args: version: of the file, if it must not have changed since.
    """

    def __init__(self, path: str | Path, version: tuple[int, int] | None = None):
        self.path, self.version, self.folder = Path(path), version, None
        with self.open() as file:
            if self.version[0] < MIN_KEPT:
                rows, facts = build_index(self.path, file)
            else:
                self.folder = self.kept_index(file)
                rows = np.load(self.folder / "records.npy", mmap_mode="r")
                facts = json.loads((self.folder / "facts.json").read_text())
        self.spans, self.rounds, self.image_counts = (rows[name] for name in ROW.names)
        self.distinct_images, self.unread = facts["distinct_images"], name_keys(facts["unread"])
        self.faults = {i: Fault(f"{path}: {name}", reason) for i, name, reason in facts["faults"]}

    def __reduce__(self):
        """For pickle: a spawned process opens the file again instead of receiving the index."""
        return RecordFile, (self.path, self.version)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Context with the open file. Raises DataError if it cannot be read, or has changed since the first time."""
        try:
            with self.path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                version = status.st_size, status.st_mtime_ns
                self.version = self.version or version
                if version != self.version:
                    raise DataError(f"{self.path}: has changed since it was opened; start again")
                yield file
        except OSError as error:
            raise DataError(f"{error.filename or self.path}: {error.strerror}") from None

    def kept_index(self, file: BinaryIO) -> Path:
        """The folder of the index. If it does not exist, one process builds it while the others wait."""
        place = sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        root = Path(__file__).parents[1]
        code = b"".join(path.read_bytes() for name in CODE_FILES for path in sorted(root.glob(name)))
        version = sha256(repr(self.version).encode() + code).hexdigest()[:16]
        folder = files.OUTPUT_ROOT.resolve() / "index" / f"{place}-{version}"
        folder.parent.mkdir(parents=True, exist_ok=True)

        def write(partial: Path):
            rows, facts = build_index(self.path, file)
            np.save(partial / "records.npy", rows)
            (partial / "facts.json").write_text(json.dumps(facts))

        with file_lock(folder.parent / f"{place}.lock"):
            if not folder.exists():
                publish_folder(folder, write)
                for old in set(folder.parent.glob(f"{place}-*")) - {folder}:  # of older versions of the file
                    shutil.rmtree(old)
        return folder

    def cached(self, name: str, key: list, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return compute() and save it beside a kept index. Args: key: everything that the result depends on."""
        if not self.folder:
            return compute()
        path = self.folder / f"{name}-{sha256(repr(key).encode()).hexdigest()[:16]}.npy"
        with file_lock(path.with_suffix(".lock")):
            if not path.exists():
                content = io.BytesIO()
                np.save(content, compute())
                write_atomic(path, content.getvalue())
        return np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> dict:
        # Opening the file for each record costs less than decoding an image, and forked processes share no position.
        start, size = map(int, self.spans[number])
        with self.open() as file:
            file.seek(start)
            return json.loads(file.read(size))

    def where(self, number: int) -> str:
        """File, number and id of a record, for messages."""
        return f"{self.path}: {record_name(number, self[number])}"


def read_records(path: str | Path) -> RecordFile:
    """Open a RecordFile. Raises DataError that names the first bad record and the reason."""
    file = RecordFile(path)
    for fault in file.faults.values():
        raise DataError(f"{fault.record}: {fault.reason}")
    return file


def record_name(number: int, record: object) -> str:
    """Number and id of a record, for messages; any JSON value may stand in its place."""
    return f"record {number}" + (f" (id {record['id']!r:.80})" if isinstance(record, dict) and "id" in record else "")


@contextmanager
def file_lock(path: Path):
    """Context that one process at a time can enter. The system frees the lock when its holder dies."""
    import fcntl  # missing on Windows, where files below MIN_KEPT still work

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_index(path: Path, file: BinaryIO) -> tuple[np.ndarray, dict]:
    """The rows of an index, and its facts. A progress bar appears after a second."""
    images, faults, unread = set(), [], Counter()  # hashes of the paths; number, name, reason of the bad records
    size = os.fstat(file.fileno()).st_size
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""

    def rows() -> Iterator[tuple]:
        with tqdm(total=size, desc=f"index of {path.name}", unit="B", unit_scale=True, delay=1) as bar:
            for number, (record, fault, span) in enumerate(scan(path, content)):
                try:
                    if not fault:
                        check_record(record)
                except ValueError as error:
                    fault = str(error)
                if fault:
                    faults.append([number, record_name(number, record), fault])
                    yield span, 0, 0
                else:
                    images.update(map(hash, image_paths(record)))
                    unread.update(unread_keys(record))
                    yield span, len(record["conversations"]) // 2, len(image_paths(record))
                bar.update(sum(span) - bar.n)

    table = np.fromiter(rows(), ROW)
    return table, {"distinct_images": len(images), "faults": faults, "unread": unread.most_common()}


# ---------------------------------------------------------------------------------------------------------------------
# the items of a JSON list


def reject_constant(name: str):
    raise ValueError(f"{name} is not a JSON value")


STRICT = json.JSONDecoder(parse_constant=reject_constant, object_pairs_hook=reject_duplicate_keys)
LENIENT = json.JSONDecoder(parse_int=str)  # for the id of a record that STRICT rejects
STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
INSIDE = rb'(?:[^\[\]{}"]++|%s)*+' % STRING  # up to a bracket outside strings
for _ in range(3):  # also past pairs of brackets: a record has three levels of them
    INSIDE = rb'(?:[^\[\]{}"]++|%s|[\[{]%s[\]}])*+' % (STRING, INSIDE)
BRACKET = re.compile(rb"%s([\[\]{}])" % INSIDE, re.DOTALL)
BRACKET_OR_COMMA = re.compile(rb'(?:[^\[\]{}",]++|%s|[\[{]%s[\]}])*+([\[\]{,])' % (STRING, INSIDE), re.DOTALL)


def scan(path: Path, content: bytes | mmap.mmap) -> Iterator[tuple[object, str, tuple[int, int]]]:
    """Yields each item of a JSON list: its value, the reason if it is rejected (else ""), its first byte and its size.

    The border of an item is the next comma or ] outside brackets and strings; parsing the item proves it right. Raises
    DataError if the file is not a list with at least one item.
    """
    begin = re.match(rb"(\xef\xbb\xbf)?[ \t\n\r]*\[", content)  # Windows editors write a byte order mark
    if not begin:
        hint = "JSON Lines? Put [ before the first record, commas between, ] at the end"
        raise DataError(f"{path}: not JSON in UTF-8 that holds a list of records ({hint})")
    number, depth, start = 0, 1, begin.end()
    end = start
    while depth and (found := (BRACKET_OR_COMMA if depth == 1 else BRACKET).match(content, end)):
        end = found.end()
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1, b",": 0}[found[1]]
        if depth == 0 or found[1] == b",":
            text = content[start : end - 1]
            if depth == 0 and number == 0 and not text.strip():
                raise DataError(f"{path}: must hold a list of records, and at least one")
            yield *parse_item(path, number, start, text), (start, len(text))
            number, start = number + 1, end
    if depth:
        parse_item(path, number, start, content[start:])  # raises unless the last item is whole
        raise DataError(f"{path}: not JSON (no ] at the end, record {number + 1})")
    if content[end:].strip():
        raise DataError(f"{path}: not JSON (Extra data, at byte {end:,}, record {number})")


def parse_item(path: Path, number: int, start: int, content: bytes) -> tuple[object, str]:
    """The value of an item, and the reason if it is rejected (else ""). Raises DataError if it is not JSON."""
    try:
        text = content.decode()
        try:
            return STRICT.decode(text), ""
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # NaN, a duplicate key, 5,000 digits: only this item is bad, not the file
            return LENIENT.decode(text), f"not JSON ({error})"
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, at byte {start + len(text[: error.pos].encode()):,}"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error.reason}, at byte {start + error.start:,}"
    except RecursionError:
        reason = "nested too deeply"
    raise DataError(f"{path}: not JSON ({reason}, record {number})")
