"""Questions and the answers to them, as files hold them: nothing is guessed, skipped or counted twice.

A predictions file is LLaVA's answers (a line each: "question_id", "text"), a results list as the servers take them
(VQA, VizWiz, GQA, COCO, DocVQA, SEED), MM-Vet's object of answers by id, or MME's folder of SUBTASK.txt.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from inputs.files import reject_duplicate_keys
from inputs.records import DataError

IDS = ("question_id", "questionId", "image_id", "qid", "index", "id", "image")  # the first that a row has is its id
TEXTS = ("text", "prediction", "caption", "answer")  # and its answer
LONGEST = 100_000  # characters; a longer answer is a broken file


@dataclass
class Item:
    """One question. truth: what the task's scorer wants, None where the files have none; groups: kind to name, what
    scores are told apart by; keys: what a predictions file may call it besides its id; data: its picture, in base64;
    options: what there is to choose from, by letter."""

    id: int | str
    text: str
    image: str | None = None
    truth: object = None
    groups: dict[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    data: str = ""
    options: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# files


def parse(text: str) -> object:
    """JSON in which no key is given twice. (NaN is let in: no reader takes it for an answer.) Raises ValueError."""
    try:
        return json.loads(text, object_pairs_hook=reject_duplicate_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def load(path: Path) -> object:
    """A JSON file, or the list of what the lines of a jsonl hold. Raises DataError naming file, line and reason."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    lines = text.split("\n")  # not at U+2028, as splitlines does
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    if path.suffix == ".jsonl" or (len(lines) > 1 and lines[0].rstrip().endswith("}") and lines[0].startswith("{")):
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(parse(line))
            except ValueError as error:
                raise DataError(f"{path}: line {number}: not JSON ({error})") from None
        return rows
    try:
        content = parse(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    one_row = isinstance(content, dict) and not content.keys().isdisjoint(IDS) and not content.keys().isdisjoint(TEXTS)
    return [content] if one_row else content


def entries(path: Path, rows: object) -> Iterator[tuple[str, dict]]:
    """The objects of a list, each with how messages name it. Raises DataError on anything else."""
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds a {type(rows).__name__} where a list of objects should be")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: entry {number}: is a {type(row).__name__}, not an object")
        key = next((row[name] for name in IDS if isinstance(row.get(name), (int, str))), None)
        yield f"{path}: entry {number}" + (f" ({shown(key)})" if key is not None else ""), row


def by_id(path: Path, content: object) -> Iterator[tuple[str, str, dict]]:
    """Key, how messages name it, and object of every entry of a JSON object. Raises DataError on anything else."""
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__} where an object of questions by id should be")
    for key, row in content.items():
        if not isinstance(row, dict):
            raise DataError(f"{path}: question {shown(key)}: is a {type(row).__name__}, not an object")
        yield key, f"{path}: question {shown(key)}", row


def want(row: dict, key: str, kind, where: str):
    """The value under a key, which must be of a kind. Raises DataError."""
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
        raise DataError(f"{where}: {key} is {shown(value)}, not {names}")
    return value


def listed(content: object, key: str) -> list:
    """The list under a key of a JSON object, or none."""
    found = content.get(key) if isinstance(content, dict) else None
    return found if isinstance(found, list) else []


def shown(value: object) -> str:
    """A value for a message: on one line, and short."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# answers


def read_predictions(path: Path, items: list[Item]) -> list[str | None]:
    """The answer to each item, None where there is none. Raises DataError naming file, id and reason.

    An id that comes twice, one that no question has, an answer that is not text: each is an error. A missing answer is
    none: whoever scores counts it as wrong, and says how many there are.
    """
    places = defaultdict(list)
    for place, item in enumerate(items):
        for key in (str(item.id), *item.keys):
            places[key].append(place)
    answers = [None] * len(items)
    for where, candidates, text in folder_answers(path) if path.is_dir() else file_answers(path):
        named = next((places[key] for key in candidates if key in places), None)
        if named is None:
            raise DataError(f"{where}: no question has this id")
        place = next((place for place in named if answers[place] is None), None)
        if place is None:
            raise DataError(f"{where}: a second answer to question {shown(items[named[0]].id)}")
        if len(text) > LONGEST:
            raise DataError(f"{where}: an answer of {len(text):,} characters, more than {LONGEST:,}")
        answers[place] = text
    return answers


def file_answers(path: Path) -> Iterator[tuple[str, list[str], str]]:
    """Of every row: how messages name it, what the question may be called, the answer."""
    content = load(path)
    if isinstance(content, dict):
        for key, text in content.items():
            if not isinstance(text, str):
                raise DataError(f"{path}: id {shown(key)}: the answer is {shown(text)}, not text")
            yield f"{path}: id {shown(key)}", [key], text
        return
    for where, row in entries(path, content):
        name = next((name for name in IDS if name in row), None)
        if name is None:
            raise DataError(f"{where}: has no id ({', '.join(IDS)})")
        key = str(want(row, name, (int, str), where))
        kind = next((kind for kind in TEXTS if kind in row), None)
        if kind is None:
            raise DataError(f"{where}: has no answer ({', '.join(TEXTS)})")
        # LLaVA's lists number some questions by their pictures, others anew in every category
        asked = [f"{key}\n{question_of(row['prompt'])}"] if isinstance(row.get("prompt"), str) else []
        asked += [f"{row['category']}/{key}"] if isinstance(row.get("category"), str) else []
        yield where, [*asked, key], want(row, kind, str, where)


def folder_answers(folder: Path) -> Iterator[tuple[str, list[str], str]]:
    """MME's results: SUBTASK.txt with the lines "picture, question, truth, answer", cut at tabs."""
    for path in sorted(folder.glob("*.txt")):
        for number, (picture, question, _, text) in enumerate(tabbed(path, 4), 1):
            yield f"{path}: line {number} ({shown(picture)})", [f"{path.stem}/{picture}\n{question_of(question)}"], text


def tabbed(path: Path, columns: int) -> list[list[str]]:
    """The first so many columns of each line, cut at tabs. Raises DataError naming a line with fewer."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    rows = [line.rstrip("\r").split("\t", columns - 1) for line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) < columns:
            raise DataError(f"{path}: line {number}: {len(row)} columns, needs {columns}")
    return rows


def question_of(prompt: str) -> str:
    """The question in a prompt, without what LLaVA's lists put around it, in lower case."""
    lines = prompt.split("\n")
    line = lines[1] if lines[0].startswith("Reference OCR token:") and len(lines) > 1 else lines[0]
    return line.replace("Please answer yes or no.", "").strip().lower()


def llava_items(path: Path, rows: list[dict]) -> list[Item]:
    """LLaVA's list of questions, which holds no truth (but may hold an answer and a category, as ours does)."""
    items = []
    for where, row in entries(path, rows):
        groups = {"category": row["category"]} if isinstance(row.get("category"), str) else {}
        image = want(row, "image", (str, type(None)), where)
        key, text = want(row, "question_id", (int, str), where), want(row, "text", str, where)
        items.append(Item(key, text, image, groups=groups))
    return items


def is_llava(content: object) -> bool:
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict) and "text" in content[0]
