"""Read the published files of benchmarks whose answers are yes or no, or one of several options (see readers.py)."""

import base64
import csv
import glob
import sys
from pathlib import Path

from evaluation.metrics import LETTERS
from evaluation.predictions import (
    Item,
    Row,
    bare_question,
    get_list,
    load_files,
    load_json,
    rows_by_id,
    rows_of,
    split_tabs,
)
from evaluation.readers import refuse
from inputs.files import write_atomic
from inputs.images import resolve_inside
from inputs.records import DataError


def add_options(question: str, options: dict[str, str]) -> str:
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])


def read_pope(paths: list[Path]) -> list[Item]:
    """POPE's label files, coco_pope_SPLIT.json. The ids are SPLIT/1, SPLIT/2 and so on. Predictions may also use the
    number alone if there is only one file, or the ids of LLaVA's list if it is given too."""
    listed, others = load_files(paths)
    items = []
    for path, content in others:
        split = path.stem.removeprefix("coco_pope_")
        for row in rows_of(path, content):
            number, label = row.need("question_id", int), row.need("label")
            if label not in ("yes", "no"):
                raise DataError(f"{row.where}: label {label!r} is neither yes nor no")
            keys = (str(number),) if len(paths) == 1 else ()
            items.append(Item(f"{split}/{number}", row.need("text"), row.need("image"), label, {"split": split}, keys))
    known = {(item.groups["split"], item.image, bare_question(item.text)): item for item in items}
    for question in listed if items else ():
        item = known.get((question.groups.get("category"), question.image, bare_question(question.text)))
        if item is None:
            refuse(paths, f"question {question.id} is in no label file")
        item.keys = (str(question.id),)
    return items or listed


def read_mme(paths: list[Path]) -> list[Item]:
    """MME's folders, one for each subtask, with a text file of two questions for each image; or the folder of MME's
    scoring tool: SUBTASK.txt with tab-separated lines of image, question, answer."""
    items = []
    for root in paths:
        for folder in sorted(path for path in root.glob("*") if path.is_dir()):
            inner = folder / "questions_answers_YN"
            for path in sorted((inner if inner.exists() else folder).glob("*.txt")):
                stem = glob.escape(path.stem)
                found = [*folder.glob(f"{stem}.[jp][pn]*g"), *folder.glob(f"images/{stem}.[jp][pn]*g")]
                image = str(found[0].relative_to(root)) if found else f"{folder.name}/{path.stem}.png"
                items += read_mme_rows(folder.name, path, [[image, *row] for row in split_tabs(path, 2)])
        for path in sorted(root.glob("*.txt")):
            items += read_mme_rows(path.stem, path, split_tabs(path, 3))
        if not items:
            raise DataError(f"{root}: neither MME's folders nor its SUBTASK.txt")
    return items


def read_mme_rows(subtask: str, path: Path, rows: list[list[str]]) -> list[Item]:
    items = []
    for number, (image, question, answer) in enumerate(rows, 1):
        name, truth = Path(image).name, answer.split("\t")[0].strip().lower()  # results have a fourth column
        if truth not in ("yes", "no"):
            raise DataError(f"{path}: line {number}: answer {answer!r} is neither yes nor no")
        groups, keys = {"subtask": subtask, "image": name}, (f"{subtask}/{name}\n{bare_question(question)}",)
        image = image if "/" in image else f"{subtask}/{image}"
        text = question.replace("Please answer yes or no.", "").strip()
        items.append(Item(f"{subtask}/{name}/{number}", text, image, truth, groups, keys))
    return items


def read_scienceqa(paths: list[Path]) -> list[Item]:
    """The test split (pid_splits.json) of problems.json as LLaVA's CQM prompts: context, question, options."""
    problems, split, cqm_rows = {}, None, []
    for path in paths:
        content = load_json(path)
        if isinstance(content, list):
            cqm_rows += rows_of(path, content)
        elif isinstance(content, dict) and "test" in content:
            split = [str(key) for key in Row(content, str(path)).need("test", list)]
        elif isinstance(content, dict):
            problems |= rows_by_id(path, content)
    items = []
    for key in split if split is not None else problems:
        if key not in problems:
            refuse(paths, f"question {key} is in pid_splits.json but not in problems.json")
        row = problems[key]
        choices, answer = row.need("choices", list), row.need("answer", int)
        if not 0 <= answer < len(choices) <= len(LETTERS):
            raise DataError(f"{row.where}: answer {answer} is none of {len(choices)} choices")
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))
        text = f"Context: {row.get('hint') or 'N/A'}\nQuestion: {row.need('question')}\nOptions: {options}"
        image = f"{key}/{row['image']}" if row.get("image") else None
        items.append(Item(key, text, image, LETTERS[answer]))
    items = read_cqm(cqm_rows, {item.id: item for item in items}) if cqm_rows else items
    for item in items:
        item.groups = {"questions": "with image" if item.image else "without image"}
    return items


def read_cqm(rows: list[Row], problems: dict[str, Item]) -> list[Item]:
    """LLaVA's llava_test_CQM-A.json, with the true answers of `problems` unless that is empty."""
    items = []
    for row in rows:
        key, messages, image = str(row.need("id", int, str)), row.need("conversations", list), row.get("image")
        if problems and key not in problems:
            raise DataError(f"{row.where}: is not in problems.json")
        text = str(messages[0].get("value") if messages and isinstance(messages[0], dict) else "")
        truth = problems[key].truth if problems else None
        items.append(Item(key, text.replace("<image>", "").strip(), image, truth))
    return items


def read_mmbench(paths: list[Path]) -> list[Item]:
    """MMBench's tab-separated table, with images in base64. Rotations of a question are rows of their own."""
    csv.field_size_limit(sys.maxsize)
    items = []
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t"))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: {error}") from None
        images = {row.get("index"): row.get("image") or "" for row in rows}
        for number, row in enumerate(rows, 2):
            if None in row.values() or None in row or not str(row.get("index")).isdecimal() or "question" not in row:
                columns = "a numeric index, a question, options A, B, ... and as many columns"
                raise DataError(f"{path}: line {number}: needs {columns} as the header")
            options = {letter: row[letter] for letter in LETTERS if row.get(letter, "").lower() not in ("", "nan")}
            hint, answer = row.get("hint", ""), row.get("answer") or ""
            question = row["question"] if hint.lower() in ("", "nan", "none") else f"{hint}\n{row['question']}"
            item = Item(int(row["index"]), add_options(question, options), f"{row['index']}.jpg", options=options)
            item.data = images.get(row.get("image"), row.get("image") or "")  # some rows name the row with their image
            item.truth = (answer, options) if answer.lower() not in ("", "nan") else None
            item.groups = {kind: row[kind] for kind in ("l2-category", "category") if row.get(kind)}
            items.append(item)
    return items


def unpack_images(items: list[Item], folder: Path):
    """Write the items' base64 images into a folder, unless they are there already. Raises DataError."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        if item.data:
            path = resolve_inside(folder, item.image)
            try:
                content = base64.b64decode(item.data, validate=True)
            except ValueError as error:
                raise DataError(f"question {item.id}: its image is not base64 ({error})") from None
            if not path.exists() or path.read_bytes() != content:
                write_atomic(path, content)
        item.data = ""


def read_seed(paths: list[Path]) -> list[Item]:
    """SEED-Bench.json, with image paths as in LLaVA's instructions; for a video, its middle frame."""
    items = []
    for path in paths:
        content = load_json(path)
        kinds = content.get("question_type") if isinstance(content, dict) else None
        names = {str(number): name for name, number in kinds.items()} if isinstance(kinds, dict) else {}
        for row in rows_of(path, get_list(content, "questions")):
            key, kind, number = (
                row.need("question_id", int, str),
                row.need("data_type"),
                str(row.get("question_type_id")),
            )
            options = {letter: row.need(f"choice_{letter.lower()}") for letter in "ABCD"}
            image = f"SEED-Bench-image/{row.get('data_id')}" if kind != "video" else f"SEED-Bench-video-image/{key}.png"
            groups = {"kind": kind, "type": names.get(number, number)}
            items.append(Item(key, add_options(row.need("question"), options), image, row.need("answer"), groups))
    return items
