"""Read question files and prediction files; every fault in one is an error that names file, record and reason.

A predictions file is LLaVA's answers (one JSON object a line with "question_id" and "text"), a results list in the form
of the servers (VQA, VizWiz, GQA, COCO, DocVQA, SEED), MM-Vet's object of answers by id, or MME's folder of SUBTASK.txt.
"""

import json
import re
import sys
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from inputs.files import reject_duplicate_keys
from inputs.records import DataError, check_text_only

# Keys under which a row may hold its id (the first that is present counts) and its answer (only one may be present).
ID_KEYS = ("question_id", "questionId", "image_id", "qid", "index", "id", "image")
ANSWER_KEYS = ("text", "prediction", "caption", "answer")
MAX_ANSWER = 100_000  # characters; a longer answer is a broken file
END_TOKEN = re.compile(r"(</s>|<\|\w+\|>|<eos>|<end_of_turn>)\s*$")  # at the end of an answer: left over by a decoder


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


class Row(dict):
    """A JSON object of a file. Args: where: file, entry and id, as messages name it; key: its key, if it is in an
    object. Raises DataError if the values are no object."""

    def __init__(self, values: object, where: str, key: str = ""):
        if not isinstance(values, dict):
            raise DataError(f"{where}: is a {type(values).__name__}, not an object")
        super().__init__(values)
        self.where, self.key = where, key

    def need(self, key: str, *kinds: type):
        """The value under a key. Raises DataError if it is missing or of none of these kinds (default: str)."""
        value, kinds = self.get(key), kinds or (str,)
        if not isinstance(value, kinds) or isinstance(value, bool):
            names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
            raise DataError(f"{self.where}: {key} is {short(value)}, not {names}")
        return value

    def need_any(self, keys: tuple[str, ...], *kinds: type):
        """need() of the first of these keys that is present."""
        return self.need(next((key for key in keys if key in self), " or ".join(keys)), *kinds)

    def need_id(self) -> int | str:
        return self.need_any(ID_KEYS, int, str)


class JsonFile:
    """Path and content of a JSON file; that of a jsonl file, recognized by its name or first line, is a list. Raises
    DataError naming file, line and reason, also for an object that has a key twice. (NaN is accepted here: the readers
    refuse it where text must be.)"""

    def __init__(self, path: Path):
        text = read_text(path)
        lines, values = text.rstrip().split("\n"), []  # not splitlines, which also splits at U+2028
        is_jsonl = path.suffix == ".jsonl" or (len(lines) > 1 and lines[0][:1] == "{" and lines[0].rstrip()[-1:] == "}")
        for number, part in enumerate(lines if is_jsonl else [text], 1):
            try:
                values.append(json.loads(part, object_pairs_hook=reject_duplicate_keys))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: {f'line {number}: ' if is_jsonl else ''}not JSON ({error})") from None
        is_row = isinstance(values[0], dict) and all(values[0].keys() & set(keys) for keys in (ID_KEYS, ANSWER_KEYS))
        self.path, self.content = path, values if is_jsonl or is_row else values[0]

    def get(self, key: str, default: object = None) -> object:
        """The value under a key of the file's object; the default if there is none."""
        return self.content.get(key, default) if isinstance(self.content, dict) else default

    def rows(self, key: str = "") -> Iterator[Row]:
        """The objects in the file's list or object, or in the list under a key (none if there is no such key). Raises
        DataError on anything but objects."""
        rows = self.get(key, []) if key else self.content
        if not isinstance(rows, (list, dict)):
            raise DataError(f"{self.path}: holds a {type(rows).__name__} where a list of objects should be")
        if isinstance(rows, dict):
            yield from (Row(values, f"{self.path}: {short(name)}", name) for name, values in rows.items())
            return
        for number, values in enumerate(rows, 1):
            row = Row(values, f"{self.path}: {'line' if self.path.suffix == '.jsonl' else 'entry'} {number}")
            if names := [row[name] for name in ID_KEYS if isinstance(row.get(name), (int, str))]:
                row.where += f" ({short(names[0])})"
            yield row


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error})") from None


def group(pairs: Iterable[tuple[Hashable, object]]) -> dict[Hashable, list]:
    """For each first element of the pairs, the list of its second elements."""
    groups = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def short(value: object) -> str:
    """A value as messages show it: one line of at most 60 ASCII characters."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def note(paths: list[Path], count: int, what: str):
    """Print how many entries of the files are left out, or completed by a guess; nothing if there are none."""
    if count:
        print(f"{', '.join(map(str, paths))}: {count:,} {what}", file=sys.stderr)


def check_image_key(row: Row):
    """Raise DataError if a question without an image seems to have one: under another key, or as a marker."""
    try:
        if not row.get("image"):
            check_text_only(row, [row["text"]])
    except ValueError as error:
        raise DataError(f"{row.where}: {error}") from None


def load_files(paths: list[Path]) -> tuple[list[Item], list[JsonFile]]:
    """The items of LLaVA's question lists, which hold no true answers; and every other file."""
    listed, others = [], []
    for file in map(JsonFile, paths):
        first = file.content[0] if isinstance(file.content, list) and file.content else None
        # POPE's label files and GPT-4's answers to LLaVA-Bench have texts too.
        if not isinstance(first, dict) or "text" not in first or first.keys() & {"label", "answer_id"}:
            others.append(file)
            continue
        for row in file.rows():
            groups = {"category": row["category"]} if isinstance(row.get("category"), str) else {}
            image = row.need("image", str, type(None))
            listed.append(Item(row.need_id(), row.need("text"), image, groups=groups))
            check_image_key(row)
    return listed, others


def bare_question(prompt: str) -> str:
    """The question in a prompt, in lower case, without the OCR tokens and instructions that LLaVA's lists add."""
    lines = prompt.split("\n")
    line = lines[1] if lines[0].startswith("Reference OCR token:") and len(lines) > 1 else lines[0]
    return line.replace("Please answer yes or no.", "").strip().lower()


def mme_key(key: str, question: str) -> str:
    """MME's name of a question: subtask, image without "images/" and without its suffix, and the question. (LLaVA's
    lists and result files have artwork/images/14777.jpg and artwork/14777.txt for the same image.)"""
    parts = key.split("/")
    return f"{parts[0]}/{Path(parts[-1]).stem}\n{bare_question(question)}"


def answer_of(row: Row) -> str:
    """The answer in a row. Raises DataError if several keys may hold it: of {"text", "answer"}, "text" is the question
    in LLaVA's question lists and the answer in LLaVA's answer files, which hold the question as "prompt"."""
    found = [key for key in ANSWER_KEYS if key in row]
    if len(found) > 1 and not ("text" in found and isinstance(row.get("prompt"), str)):
        raise DataError(f"{row.where}: has {' and '.join(found)}: keep only the key that holds the answer")
    return row.need_any(ANSWER_KEYS)


def read_predictions(path: Path, items: list[Item]) -> list[str | None]:
    """The answer to each item, None where the file has none (scorers count that as wrong). Raises DataError naming
    file, id and reason if an id is unknown or comes twice, if an answer is not text, or if all are their questions."""
    positions = group((key, number) for number, item in enumerate(items) for key in {str(item.id), *item.keys})
    answers = [None] * len(items)
    for row in prediction_rows(path):
        key, text, prompt = str(row.need_id()), answer_of(row), row.get("prompt")
        # LLaVA's lists give some questions the id of their image, or number them anew in every category.
        keys = [f"{key}\n{bare_question(prompt)}", mme_key(key, prompt)] if isinstance(prompt, str) else []
        keys += [f"{row['category']}/{key}"] if isinstance(row.get("category"), str) else []
        candidates = next((positions[key] for key in (*keys, key) if key in positions), None)
        if candidates is None:
            raise DataError(f"{row.where}: no question has this id")
        position = next((position for position in candidates if answers[position] is None), None)
        if position is None:
            raise DataError(f"{row.where}: a second answer to question {short(items[candidates[0]].id)}")
        if len(text) > MAX_ANSWER:
            raise DataError(f"{row.where}: an answer of {len(text):,} characters, more than {MAX_ANSWER:,}")
        answers[position] = text
    pairs = [(item.text, text) for item, text in zip(items, answers) if item.text and text is not None]
    if pairs and all(bare_question(text) == bare_question(question) for question, text in pairs):
        raise DataError(f"{path}: each answer is the question itself: this is a list of questions, not of answers")
    return answers


def prediction_rows(path: Path) -> Iterator[Row]:
    """The rows of a predictions file, of MM-Vet's object, or of MME's folder, where SUBTASK.txt has tab-separated lines
    of image, question, truth, answer."""
    if path.is_dir():
        for table in sorted(path.glob("*.txt")):
            for number, (image, question, _, text) in enumerate(split_tabs(table, 4), 1):
                row = {"id": f"{table.stem}/{image}", "prompt": question, "text": text}
                yield Row(row, f"{table}: line {number} ({short(image)})")
    elif isinstance((file := JsonFile(path)).content, dict):
        for key, text in file.content.items():
            yield Row({"id": key, "text": text}, f"{path}: id {short(key)}")
    else:
        yield from file.rows()


def split_tabs(path: Path, columns: int) -> list[list[str]]:
    """The lines that are not blank, each split into this many columns. Raises DataError naming a line with fewer."""
    rows = [line.split("\t", columns - 1) for line in read_text(path).split("\n") if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) < columns:
            raise DataError(f"{path}: line {number}: {len(row)} columns, needs {columns}")
    return rows
