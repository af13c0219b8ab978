"""Read the published files of benchmarks whose answers are yes or no, or one of several options (see readers.py)."""

import base64
import csv
import glob
import io
import sys
from pathlib import Path

from evaluation.metrics import LETTERS
from evaluation.predictions import Item, JsonFile, Row, bare_question, load_files, mme_key, note, read_text, split_tabs
from evaluation.readers import add_truths, refuse
from evaluation.scores import COGNITION, PERCEPTION
from inputs.files import write_atomic
from inputs.records import DataError


def add_options(question: str, options: dict[str, str]) -> str:
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])


def read_pope(paths: list[Path]) -> list[Item]:
    """POPE's label files, coco_pope_SPLIT.json. The ids are SPLIT/1, SPLIT/2 and so on. Predictions may also use the
    number alone if there is only one file, or the ids of LLaVA's list if it is given too."""
    listed, others = load_files(paths)
    items = []
    for file in others:
        split = file.path.stem.removeprefix("coco_pope_")
        for row in file.rows():
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
    scoring tool: SUBTASK.txt with tab-separated lines of image, question, answer. LLaVA's llava_mme.jsonl beside them,
    or alone without the true answers; its ids are those of the images, so each comes twice."""
    items, (listed, others) = [], load_files([path for path in paths if not path.is_dir()])
    if others:
        refuse([others[0].path], "neither a folder of MME nor LLaVA's list of its questions")
    for number, item in enumerate(listed):
        key, item.id = str(item.id), f"{item.id}/{number}"
        item.groups, item.keys = {"subtask": key.split("/")[0], "image": Path(key).stem}, (mme_key(key, item.text),)
    for root in paths:
        for folder in sorted(path for path in root.glob("*") if path.is_dir()):
            for path in sorted([*folder.glob("*.txt"), *folder.glob("questions_answers_YN/*.txt")]):
                stem = glob.escape(path.stem)
                found = [*folder.glob(f"{stem}.[jp][pn]*g"), *folder.glob(f"images/{stem}.[jp][pn]*g")]
                image = str(found[0].relative_to(root)) if found else f"{folder.name}/{path.stem}.png"
                items += read_mme_rows(folder.name, path, [[image, *row] for row in split_tabs(path, 2)])
        for path in sorted(root.glob("*.txt")):
            items += read_mme_rows(path.stem, path, split_tabs(path, 3))
    items = add_truths(paths, listed, items)
    missing = {*PERCEPTION, *COGNITION} - {item.groups["subtask"] for item in items}
    note(paths, len(missing), "of MME's 14 subtasks are not there: they count as 0 in the sums")
    return items


def read_mme_rows(subtask: str, path: Path, rows: list[list[str]]) -> list[Item]:
    """The items of rows of image, question, answer."""
    items = []
    for number, (image, question, answer) in enumerate(rows, 1):
        name, truth = Path(image).name, answer.split("\t")[0].strip().lower()  # results have a fourth column
        if truth not in ("yes", "no"):
            raise DataError(f"{path}: line {number}: answer {answer!r} is neither yes nor no")
        text = question.replace("Please answer yes or no.", "").strip()
        groups, keys = {"subtask": subtask, "image": name}, (mme_key(f"{subtask}/{name}", question),)
        image = image if "/" in image else f"{subtask}/{image}"
        items.append(Item(f"{subtask}/{name}/{number}", text, image, truth, groups, keys))
    return items


def science_prompt(row: Row) -> str:
    """A problem of ScienceQA in LLaVA's form: context, question, options. Raises DataError, also on a wrong answer."""
    choices, answer = row.need("choices", list), row.need("answer", int)
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise DataError(f"{row.where}: answer {answer} is none of {len(choices)} choices")
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))
    return f"Context: {row.get('hint') or 'N/A'}\nQuestion: {row.need('question')}\nOptions: {options}"


def read_scienceqa(paths: list[Path]) -> list[Item]:
    """The test split (pid_splits.json) of problems.json as LLaVA's CQM prompts (context, question, options), or LLaVA's
    llava_test_CQM-A.json."""
    problems, split, listed, items = {}, None, [], []
    for file in map(JsonFile, paths):
        if isinstance(file.content, list):
            for row in file.rows():
                turns = row.need("conversations", list)
                text = Row(turns[0], f"{row.where}: conversations").need("value") if turns else ""
                listed.append(Item(str(row.need_id()), text.replace("<image>", "").strip(), row.get("image")))
        elif isinstance(test := file.get("test"), list):
            split = list(map(str, test))
        else:
            problems |= {row.key: row for row in file.rows()}
    for key in split if split is not None else problems:
        if key not in problems:
            refuse(paths, f"question {key} is in pid_splits.json but not in problems.json")
        row = problems[key]
        text, image = science_prompt(row), f"{key}/{row['image']}" if row.get("image") else None
        items.append(Item(key, text, image, LETTERS[row["answer"]]))
    items = add_truths(paths, listed, items)
    for item in items:
        item.groups = {"questions": "with image" if item.image else "without image"}
    return items


def read_mmbench(paths: list[Path]) -> list[Item]:
    """MMBench's tab-separated table, with images in base64. Rotations of a question are rows of their own."""
    csv.field_size_limit(sys.maxsize)
    items = []
    for path in paths:
        try:
            rows = list(csv.DictReader(io.StringIO(read_text(path)), delimiter="\t"))
        except csv.Error as error:
            raise DataError(f"{path}: {error}") from None
        images = {row.get("index"): row.get("image") or "" for row in rows}
        for number, row in enumerate(rows, 2):
            if None in row.values() or None in row or not str(row.get("index")).isdecimal() or "question" not in row:
                columns = "a numeric index, a question, options A, B, ... and as many columns"
                raise DataError(f"{path}: line {number}: needs {columns} as the header")
            row = {name: "" if text.lower() == "nan" else text for name, text in row.items()}
            options = {letter: row[letter] for letter in LETTERS if row.get(letter)}
            hint = row.get("hint", "")
            question = row["question"] if hint.lower() in ("", "none") else f"{hint}\n{row['question']}"
            item = Item(int(row["index"]), add_options(question, options), f"{row['index']}.jpg", options=options)
            item.data = images.get(row.get("image"), row.get("image", ""))  # some rows name the row with their image
            item.truth = (row["answer"], options) if row.get("answer") else None
            item.groups = {kind: row[kind] for kind in ("l2-category", "category") if row.get(kind)}
            items.append(item)
    return items


def unpack_images(items: list[Item], folder: Path):
    """Write the items' base64 images into a folder, unless they are there already. Raises DataError."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        if item.data:
            path = folder / item.image
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
    for file in map(JsonFile, paths):
        kinds = file.get("question_type")
        names = {str(number): name for name, number in kinds.items()} if isinstance(kinds, dict) else {}
        for row in file.rows("questions"):
            key, kind, number = row.need_id(), row.need("data_type"), str(row.get("question_type_id"))
            options = {letter: row.need(f"choice_{letter.lower()}") for letter in "ABCD"}
            image = f"SEED-Bench-image/{row.get('data_id')}" if kind != "video" else f"SEED-Bench-video-image/{key}.png"
            groups = {"kind": kind, "type": names.get(number, number)}
            items.append(Item(key, add_options(row.need("question"), options), image, row.need("answer"), groups))
    return items
