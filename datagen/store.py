"""The folder of a run: what was asked and answered, so that a kill loses nothing that was paid for.

    requests.jsonl    all requests, one a line, in the format of OpenAI's batches
    answers.jsonl     one line for each answer, written in one call as soon as it arrives
    failures.jsonl    requests that were given up, with the reason; they are asked again by the next command

All three are only ever appended to. The same command goes on: a request whose id has an answer is not asked again.
"""

import fcntl
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from datagen.asking import Request
from inputs.files import read_complete_lines
from inputs.records import DataError

REQUESTS, ANSWERS, FAILURES = "requests.jsonl", "answers.jsonl", "failures.jsonl"
MOST_LINES, MOST_BYTES = 50_000, 190_000_000  # of one file of a batch: OpenAI takes 50,000 lines and 200 MB


class Store:
    """The three files of a folder, open for appending by one process; a context that closes them.

    Args: secret: a text that is never written; where it would be, it is replaced by "[key]". Raises DataError if
    another process has the files open.
    """

    def __init__(self, folder: Path, secret: str = ""):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.secret, self.lock, self.files = folder, secret, threading.Lock(), {}
        for name in (REQUESTS, ANSWERS, FAILURES):
            self.files[name] = os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self.files[name], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DataError(f"{folder}: another process is writing into it") from None
            os.ftruncate(self.files[name], len(read_complete_lines(folder / name)))  # half a line of a power failure

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for file in self.files.values():
            os.close(file)

    def append(self, name: str, rows: Iterable[dict]):
        """Write rows at the end of a file and wait until they are on the disk."""
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        content = b"".join(f"{scrub(line, self.secret)}\n".encode(errors="backslashreplace") for line in lines)
        with self.lock:
            while content:  # one call, unless the disk is full
                content = content[os.write(self.files[name], content) :]
            os.fsync(self.files[name])

    def read(self, name: str) -> list[dict]:
        """The rows of a file. Raises DataError if it holds anything else."""
        path = self.folder / name
        try:
            rows = [json.loads(line) for line in read_complete_lines(path).split(b"\n") if line]
            if not all(isinstance(row, dict) and isinstance(row.get("custom_id"), str) for row in rows):
                raise ValueError
        except ValueError:
            raise DataError(f"{path}: was changed by another program: move it away, or name another --out") from None
        return rows

    def answers(self) -> dict[str, dict]:
        """The answers so far by id, of each id the first."""
        found = {}
        for row in self.read(ANSWERS):
            found.setdefault(row["custom_id"], row)
        return found

    def keep_requests(self, requests: list[Request], model: str, options: dict):
        """Append the requests that are not there yet."""
        known = {row["custom_id"] for row in self.read(REQUESTS)}
        self.append(REQUESTS, [batch_line(r, model, options) for r in requests if r.id not in known])


def scrub(text: str, secret: str) -> str:
    """A text without the secret, also as JSON writes it."""
    for form in {secret, json.dumps(secret)[1:-1]} - {""}:
        text = text.replace(form, "[key]")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# batch files


def batch_line(request: Request, model: str, options: dict) -> dict:
    body = request.body(model, options)
    return {"custom_id": request.id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write_batches(path: Path, requests: list[Request], model: str, options: dict) -> list[Path]:
    """Write requests as batch files: PATH, then PATH with -2, -3 before its suffix, each within OpenAI's limits."""
    groups, size = [[]], 0
    for request in requests:
        line = json.dumps(batch_line(request, model, options), ensure_ascii=False).encode() + b"\n"
        if groups[-1] and (len(groups[-1]) == MOST_LINES or size + len(line) > MOST_BYTES):
            groups.append([])
            size = 0
        groups[-1].append(line)
        size += len(line)
    paths = [path if i == 1 else path.with_stem(f"{path.stem}-{i}") for i in range(1, len(groups) + 1)]
    if taken := [path for path in paths if path.exists()]:
        raise DataError(f"--batch-file {taken[0]}: exists already; it may be running: name another file")
    for path, group in zip(paths, groups):
        path.write_bytes(b"".join(group))
    return paths


def read_batches(paths: list[Path]) -> Iterable[tuple[str, str | None, dict | None, str]]:
    """Yield where, custom_id, body and error of each line of a batch's results, in any order. Raises DataError."""
    for path in paths:
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                row = json.loads(line)
                response = row.get("response") or {}
                body, error = response.get("body"), row.get("error") or {}
                status = response.get("status_code", 200)
            except (ValueError, AttributeError):
                yield where, None, None, "not JSON of a batch's results"
                continue
            if status != 200 or body is None:
                detail = error or (body or {}).get("error") or {}
                message = detail.get("message") if isinstance(detail, dict) else detail
                yield where, row.get("custom_id"), None, f"status {status}: {message or 'no answer'}"
            else:
                yield where, row.get("custom_id"), body, ""
