"""Published data sets as rows: a table with a line for each, and what reads the files that are not plain lists.

docs/convert.md has the sources of all names of files and keys.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from evaluation.choice_readers import science_prompt
from evaluation.metrics import LETTERS
from evaluation.predictions import JsonFile, Row, short
from evaluation.tasks import LETTER, SHORT, TASKS
from inputs.records import DataError

Rows = Iterator[Row]


# ---------------------------------------------------------------------------------------------------------------------
# rows: one question with its answer, or one dialogue


def entries(file: JsonFile, key: str = "") -> Rows:
    """The entries of a file's list or object, or of the list under a key; an empty row for one that is no object."""
    found = file.get(key, []) if key else file.content
    named = found.items() if isinstance(found, dict) else enumerate(found, 1) if isinstance(found, list) else ()
    for name, values in named:
        where = f"{file.path}: {short(name)}" if isinstance(found, dict) else f"{file.path}: entry {name}"
        yield Row(values if isinstance(values, dict) else {}, where, str(name) if isinstance(found, dict) else "")


def change(row: Row, **values) -> Row:
    """The row with more or other values."""
    return Row({**row, **values}, row.where, row.key)


def rows_under(key: str = "") -> Callable[[list[JsonFile]], Rows]:
    """A reader of files with one entry for each question: in a list or object, or in the list under a key."""
    return lambda files: (row for file in files for row in entries(file, key))


def read_vqa(files: list[JsonFile]) -> Rows:
    """The questions, each with its annotation. Annotations without a question are yielded last, to be counted."""
    found = {str(row.get("question_id")): row for file in files for row in entries(file, "annotations")}
    for file in files:
        for row in entries(file, "questions"):
            answers = found.pop(str(row.get("question_id")), {})
            yield change(row, subset=file.get("data_subtype", "train2014"), answers=answers.get("answers"))
    yield from found.values()


def read_ocrvqa(files: list[JsonFile]) -> Rows:
    """One row for each question about a book cover, which has parallel lists of questions and answers."""
    splits = {1: "train", 2: "val", 3: "test"}
    for row in rows_under()(files):
        questions, answers = row.get("questions"), row.get("answers")
        if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
            yield change(row, question=None)
            continue
        split = splits.get(row.get("split")) if isinstance(row.get("split"), int) else None
        for question, answer in zip(questions, answers):
            yield change(row, key=row.key, question=question, answer=answer, split=split)


def read_scienceqa(files: list[JsonFile]) -> Rows:
    """The problems with the split that pid_splits.json, or else their own key, names."""
    lists = ((name, file.get(name) or ()) for file in files for name in ("train", "val", "test"))
    splits = {str(key): name for name, keys in lists for key in keys}
    for row in rows_under()([file for file in files if not isinstance(file.get("test"), list)]):
        try:
            question = science_prompt(row)
        except DataError:
            question = row.get("question")  # its answer is at fault, and counted
        path = f"{row.key}/{row['image']}" if row.get("image") else None
        yield change(row, prompt=question, path=path, split=splits.get(row.key, row.get("split")))


def read_vqarad(files: list[JsonFile]) -> Rows:
    """Rows with their split: one file holds both, and phrase_type begins with "test_" in the test set."""
    for row in rows_under()(files):
        yield change(row, split="test" if str(row.get("phrase_type")).startswith("test_") else "train")


# ---------------------------------------------------------------------------------------------------------------------
# answers


def only(key: str) -> Callable[[Row], object]:
    return lambda row: row.get(key)


def most_frequent(row: Row) -> object:
    """The answer that most people gave; of several, the one that stands first. None if there is none."""
    found = row.get("answers") if isinstance(row.get("answers"), list) else []
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in found]
    counts = Counter(answer.strip() for answer in answers if isinstance(answer, str) and answer.strip())
    return counts.most_common(1)[0][0] if counts else None


def option_letter(row: Row) -> object:
    choices, answer = row.get("choices"), row.get("answer")
    good = isinstance(choices, list) and isinstance(answer, int) and 0 <= answer < min(len(choices), len(LETTERS))
    return LETTERS[answer] if good else None


# ---------------------------------------------------------------------------------------------------------------------
# the table


class Format(NamedTuple):
    """One data set. Args: read: its files to rows; needs: keys that a row of it has; question: key of the question;
    answer: of a row; images: paths of the image, filled from the row: the first that exists is used; suffix: after the
    question; text_too: questions without an image are kept; dialogue: a row is a whole dialogue instead."""

    read: Callable[[list[JsonFile]], Rows]
    needs: tuple[str, ...]
    answer: Callable[[Row], object] = only("answer")
    images: tuple[str, ...] = ()
    suffix: str = SHORT
    question: str = "question"
    text_too: bool = False
    dialogue: bool = False


COCO = ("COCO_{subset}_{image_id:012d}.jpg", "{subset}/COCO_{subset}_{image_id:012d}.jpg")
COCO += ("train2017/{image_id:012d}.jpg", "coco/train2017/{image_id:012d}.jpg", "{image_id:012d}.jpg")
GENOME = ("VG_100K/{image_id}.jpg", "VG_100K_2/{image_id}.jpg", "vg/VG_100K/{image_id}.jpg")
GENOME += ("vg/VG_100K_2/{image_id}.jpg", "{image_id}.jpg")


def talk(*needs: str, images: tuple[str, ...] = ()) -> Format:
    return Format(rows_under(), needs, images=images, suffix="", dialogue=True)


FORMATS = {
    "vqav2": Format(read_vqa, ("image_id", "question"), most_frequent, COCO),
    "okvqa": Format(read_vqa, ("image_id", "question"), most_frequent, COCO),
    "gqa": Format(rows_under(), ("imageId", "question"), images=("{imageId}.jpg", "images/{imageId}.jpg")),
    "textvqa": Format(
        rows_under("data"), ("image_id", "question"), most_frequent, ("{image_id}.jpg", "train_images/{image_id}.jpg")
    ),
    "ocrvqa": Format(read_ocrvqa, ("imageURL", "questions"), images=("{key}.jpg", "images/{key}.jpg")),
    "docvqa": Format(rows_under("data"), ("questionId", "image", "question"), most_frequent, ("{image}",)),
    "chartqa": Format(
        rows_under(), ("imgname", "query", "label"), only("label"), ("{imgname}", "png/{imgname}"),
        TASKS["chartqa"].suffix, "query",
    ),
    "scienceqa": Format(
        read_scienceqa, ("choices", "question"), option_letter, ("{path}", "train/{path}", "images/train/{path}"),
        LETTER, "prompt", text_too=True,
    ),
    "vqa-rad": Format(read_vqarad, ("image_name", "question"), images=("{image_name}",), suffix=""),
    "slake": Format(rows_under(), ("img_name", "question"), images=("{img_name}", "imgs/{img_name}"), suffix=""),
    "pathvqa": Format(
        rows_under(), ("image", "question"), images=("{image}.jpg", "{image}", "train/{image}.jpg"), suffix=""
    ),
    "sharegpt4v": talk("conversations"),
    "llavar": talk("conversations", images=("{image}", "{image}.jpg")),
    "svit": talk("conversations", images=GENOME),
    "messages": talk("messages"),
    "sharegpt": talk("conversations"),
}  # fmt: skip


def find_format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"--from {name}: unknown format; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def read_rows(name: str, paths: list[Path]) -> list[Row]:
    """The rows of a data set's files. Raises ValueError if they are not of this format."""
    for path in paths:
        if path.suffix in (".pkl", ".pickle", ".parquet", ".zip"):
            raise ValueError(f"{path}: only JSON is read; docs/convert.md says how to export {path.suffix}")
    files = [JsonFile(path) for path in paths]
    rows, needs = list(FORMATS[name].read(files)), set(FORMATS[name].needs)
    if not any(needs <= row.keys() for row in rows):
        others = [other for other in FORMATS if other != name and is_like(other, files)]
        keys = ", ".join(sorted(rows[0])[:8]) if rows and rows[0] else "no entries that it has"
        hint = f"; it looks like {' or '.join(others)}" if others else ""
        missing = " and ".join(map(repr, sorted(needs)))
        raise ValueError(f"{', '.join(map(str, paths))}: not of {name}: {missing} missing, found {keys}{hint}")
    return rows


def is_like(name: str, files: list[JsonFile]) -> bool:
    first = next(FORMATS[name].read(files), {})
    return FORMATS[name].needs and set(FORMATS[name].needs) <= first.keys()
