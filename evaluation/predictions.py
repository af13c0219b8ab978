"""Read question files and prediction files; every fault in one is an error that names file, record and reason.

A predictions file is LLaVA's answers (one JSON object a line with "question_id" and "text"), a results list in the form
of the servers (VQA, VizWiz, GQA, COCO, DocVQA, SEED), MM-Vet's object of answers by id, or MME's folder of SUBTASK.txt.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from inputs.files import reject_duplicate_keys
from inputs.records import DataError

# Keys under which a row may hold its id and its answer; the first that is present counts.
ID_KEYS = ("question_id", "questionId", "image_id", "qid", "index", "id", "image")
ANSWER_KEYS = ("text", "prediction", "caption", "answer")
MAX_ANSWER = 100_000  # characters; a longer answer is a broken file


@dataclass
class Item:
    """One question of a benchmark. Args: truth: in the form the task's scorer takes, None if the files have none;
    groups: kind to name, for scores by group; keys: what a predictions file may call the question besides its id;
    data: its image in base64; options: answers to choose from, by letter."""

    id: int | str
    text: str
    image: str | None = None
    truth: object = None
    groups: dict[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    data: str = ""
    options: dict[str, str] = field(default_factory=dict)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}") from None


def load_json(path: Path) -> object:
    """The content of a JSON file, or the list of values of a jsonl file, recognized by its name or by its first line.

    Raises DataError naming file, line and reason, also for an object that has a key twice. (NaN is accepted here: the
    readers refuse it where text must be.)
    """
    text = read_text(path)
    lines, values = text.rstrip().split("\n"), []  # not splitlines, which also splits at U+2028
    is_jsonl = path.suffix == ".jsonl" or (len(lines) > 1 and lines[0][:1] == "{" and lines[0].rstrip()[-1:] == "}")
    for number, part in enumerate(lines if is_jsonl else [text], 1):
        try:
            values.append(json.loads(part, object_pairs_hook=reject_duplicate_keys))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: {f'line {number}: ' if is_jsonl else ''}not JSON ({error})") from None
    content = values if is_jsonl else values[0]
    is_row = isinstance(content, dict) and any(key in content for key in ID_KEYS) and bool(answer_key(content))
    return [content] if is_row else content


def answer_key(row: dict) -> str | None:
    return next((key for key in ANSWER_KEYS if key in row), None)


class Row(dict):
    """A JSON object of a file. Args: where: file, entry and id, as messages name it."""

    def __init__(self, values: dict, where: str):
        super().__init__(values)
        self.where = where

    def need(self, key: str, *kinds: type):
        """The value under a key. Raises DataError if it is missing or of none of these kinds (default: str)."""
        value, kinds = self.get(key), kinds or (str,)
        if not isinstance(value, kinds) or isinstance(value, bool):
            names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
            raise DataError(f"{self.where}: {key} is {short(value)}, not {names}")
        return value

    def need_id(self) -> int | str:
        return self.need(next((name for name in ID_KEYS if name in self), "question_id"), int, str)


def rows_of(path: Path, rows: object) -> Iterator[Row]:
    """The rows of a list. Raises DataError on anything but a list of objects."""
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds a {type(rows).__name__} where a list of objects should be")
    for number, row in enumerate(rows, 1):
        where = f"{path}: {'line' if path.suffix == '.jsonl' else 'entry'} {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: is a {type(row).__name__}, not an object")
        key = next((row[name] for name in ID_KEYS if isinstance(row.get(name), (int, str))), None)
        yield Row(row, where + (f" ({short(key)})" if key is not None else ""))


def rows_by_id(path: Path, content: object) -> Iterator[tuple[str, Row]]:
    """(id, row) for each entry of a JSON object. Raises DataError on anything but an object of objects."""
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__} where an object of questions by id should be")
    for key, row in content.items():
        if not isinstance(row, dict):
            raise DataError(f"{path}: question {short(key)}: is a {type(row).__name__}, not an object")
        yield key, Row(row, f"{path}: question {short(key)}")


def get_list(content: object, key: str) -> list:
    """The list under a key of a JSON object; empty if there is none."""
    found = content.get(key) if isinstance(content, dict) else None
    return found if isinstance(found, list) else []


def short(value: object) -> str:
    """A value as messages show it: one line of at most 60 ASCII characters."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def load_files(paths: list[Path]) -> tuple[list[Item], list[tuple[Path, object]]]:
    """The items of LLaVA's question lists, which hold no true answers; and path and content of every other file."""
    listed, others = [], []
    for path in paths:
        content = load_json(path)
        keys = content[0] if isinstance(content, list) and content and isinstance(content[0], dict) else {}
        if "text" not in keys or "label" in keys:  # POPE's label files have texts too
            others.append((path, content))
            continue
        for row in rows_of(path, content):
            groups = {"category": row["category"]} if isinstance(row.get("category"), str) else {}
            image = row.need("image", str, type(None))
            listed.append(Item(row.need("question_id", int, str), row.need("text"), image, groups=groups))
    return listed, others


def bare_question(prompt: str) -> str:
    """The question in a prompt, in lower case, without the OCR tokens and instructions that LLaVA's lists add."""
    lines = prompt.split("\n")
    line = lines[1] if lines[0].startswith("Reference OCR token:") and len(lines) > 1 else lines[0]
    return line.replace("Please answer yes or no.", "").strip().lower()


def read_predictions(path: Path, items: list[Item]) -> list[str | None]:
    """The answer to each item, None where the file has none (scorers count that as wrong).

    Raises DataError naming file, id and reason if an id is unknown or comes twice, or if an answer is not text.
    """
    positions = defaultdict(list)
    for position, item in enumerate(items):
        for key in (str(item.id), *item.keys):
            positions[key].append(position)
    answers = [None] * len(items)
    for where, keys, text in answers_in_folder(path) if path.is_dir() else answers_in_file(path):
        candidates = next((positions[key] for key in keys if key in positions), None)
        if candidates is None:
            raise DataError(f"{where}: no question has this id")
        position = next((position for position in candidates if answers[position] is None), None)
        if position is None:
            raise DataError(f"{where}: a second answer to question {short(items[candidates[0]].id)}")
        if len(text) > MAX_ANSWER:
            raise DataError(f"{where}: an answer of {len(text):,} characters, more than {MAX_ANSWER:,}")
        answers[position] = text
    return answers


def answers_in_file(path: Path) -> Iterator[tuple[str, list[str], str]]:
    """(how messages name it, keys the question may have, answer) for each row of a predictions file."""
    content = load_json(path)
    if isinstance(content, dict):
        for key, text in content.items():
            if not isinstance(text, str):
                raise DataError(f"{path}: id {short(key)}: the answer is {short(text)}, not text")
            yield f"{path}: id {short(key)}", [key], text
        return
    for row in rows_of(path, content):
        if not any(key in row for key in ID_KEYS):
            raise DataError(f"{row.where}: has no id ({', '.join(ID_KEYS)})")
        if not answer_key(row):
            raise DataError(f"{row.where}: has no answer ({', '.join(ANSWER_KEYS)})")
        key = str(row.need_id())
        # LLaVA's lists give some questions the id of their image, or number them anew in every category.
        keys = [f"{key}\n{bare_question(row['prompt'])}"] if isinstance(row.get("prompt"), str) else []
        keys += [f"{row['category']}/{key}"] if isinstance(row.get("category"), str) else []
        yield row.where, [*keys, key], row.need(answer_key(row))


def answers_in_folder(folder: Path) -> Iterator[tuple[str, list[str], str]]:
    """answers_in_file for MME's results: SUBTASK.txt with tab-separated lines of image, question, truth, answer."""
    for path in sorted(folder.glob("*.txt")):
        for number, (image, question, _, text) in enumerate(split_tabs(path, 4), 1):
            yield f"{path}: line {number} ({short(image)})", [f"{path.stem}/{image}\n{bare_question(question)}"], text


def split_tabs(path: Path, columns: int) -> list[list[str]]:
    """The lines that are not blank, each split into this many columns. Raises DataError naming a line with fewer."""
    lines = [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()]
    rows = [line.split("\t", columns - 1) for line in lines]
    for number, row in enumerate(rows, 1):
        if len(row) < columns:
            raise DataError(f"{path}: line {number}: {len(row)} columns, needs {columns}")
    return rows
