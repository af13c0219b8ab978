"""Read the published files of each benchmark into Items.

Every reader takes the files as they are published, questions and true answers in one file or in several, in any order.
Where LLaVA's authors published a question list of their own ({"question_id", "image", "text"}, one a line), that is
accepted too, alone or beside the official files for the true answers.
"""

import base64
import csv
import glob
import sys
from pathlib import Path
from typing import NoReturn

from evaluation.metrics import LETTERS
from evaluation.predictions import (
    Item,
    Row,
    bare_question,
    is_llava_list,
    list_under,
    load_json,
    read_llava_list,
    rows_by_id,
    rows_of,
    short,
    split_tabs,
)
from inputs.files import write_atomic
from inputs.images import resolve_inside
from inputs.records import DataError


def refuse(paths: list[Path], reason: str) -> NoReturn:
    raise DataError(f"{', '.join(map(str, paths))}: {reason}")


def load_files(paths: list[Path]) -> tuple[list[Item], list[tuple[Path, object]]]:
    """Items of LLaVA's lists among the files, and path and content of every other file."""
    listed, others = [], []
    for path in paths:
        content = load_json(path)
        if is_llava_list(content) and "label" not in content[0]:  # POPE's label files have texts too
            listed += read_llava_list(path, content)
        else:
            others.append((path, content))
    return listed, others


def data_rows(paths: list[Path]) -> list[Row]:
    """The rows of the lists under "data"."""
    return [row for path in paths for row in rows_of(path, list_under(load_json(path), "data"))]


def add_once(table: dict, key: int | str, value: object, row: Row):
    """table[key] = value. Raises DataError if the key is there already."""
    if key in table:
        raise DataError(f"{row.where}: comes twice")
    table[key] = value


def human_answers(row: Row) -> list[str] | None:
    """The answers of people, a list of strings or of objects with an "answer"; None if the row has none."""
    if "answers" not in row:
        return None
    answers = [a.get("answer") if isinstance(a, dict) else a for a in row.need("answers", list)]
    if not answers or not all(isinstance(a, str) for a in answers):
        raise DataError(f"{row.where}: answers are not a list of texts")
    return answers


def add_options(question: str, options: dict[str, str]) -> str:
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])


# ---------------------------------------------------------------------------------------------------------------------
# VQA


def read_vqav2(paths: list[Path]) -> list[Item]:
    """VQAv2's and OK-VQA's questions and annotations, or one of the two."""
    listed, others = load_files(paths)
    items, annotations = {item.id: item for item in listed}, {}
    for path, content in others:
        subset = str(content.get("data_subtype", "")) if isinstance(content, dict) else ""
        subset = subset.replace("test-dev", "test")  # test-dev is a part of the test set and shows its images
        for row in rows_of(path, list_under(content, "questions")):
            image = f"COCO_{subset}_{row.need('image_id', int):012d}.jpg"
            item = Item(row.need("question_id", int), row.need("question"), image)
            add_once(items, item.id, item, row)
        for row in rows_of(path, list_under(content, "annotations")):
            kinds = {"answer type": "answer_type", "question type": "question_type"}
            item = Item(row.need("question_id", int), "", truth=human_answers(row) or row.need("answers", list))
            item.groups = {kind: row.need(key) for kind, key in kinds.items() if key in row}
            add_once(annotations, item.id, item, row)
    if items and annotations and items.keys() != annotations.keys():
        key = min(items.keys() ^ annotations.keys(), key=str)
        refuse(paths, f"question {key} is not in both questions and annotations")
    for key, annotation in annotations.items():
        item = items.setdefault(key, annotation)
        item.truth, item.groups = annotation.truth, annotation.groups
    return list(items.values())


def read_gqa(paths: list[Path]) -> list[Item]:
    """GQA's questions by id, and its choices by id (which answers are valid and plausible)."""
    listed, others = load_files(paths)
    items, choices = {}, {}
    for path, content in others:
        for key, row in rows_by_id(path, content):
            if "valid" in row:
                choices[key] = {kind: {*texts(row.need(kind, list), row)} for kind in ("valid", "plausible")}
                continue
            add_once(items, key, Item(key, row.need("question"), row.need("imageId") + ".jpg"), row)
            if "answer" in row:
                items[key].truth = row | {"answer": row.need("answer")}
                texts(row.need("entailed", list) if "entailed" in row else [], row)
                for kind in row.keys() & {"types", "groups"}:
                    texts([name for name in row.need(kind, dict).values() if name is not None], row)
    for key, item in items.items():
        if item.truth and choices:
            item.truth |= choices.get(key, {})
    for item in listed if items else ():
        if str(item.id) not in items:
            refuse(paths, f"question {short(item.id)} is not among GQA's")
        item.truth = items[str(item.id)].truth
    return listed or list(items.values())


def texts(values: list, row: Row) -> list[str]:
    """The values. Raises DataError if one is not a text."""
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"{row.where}: {short(value)} stands where a text should")
    return values


def read_textvqa(paths: list[Path]) -> list[Item]:
    """TextVQA_0.5.1_val.json, perhaps with the file of Rosetta's OCR tokens, which are then put into the prompt as in
    LLaVA's list. In that list a question_id is the id of the image."""
    listed, others = load_files(paths)
    items, tokens = [], {}
    for path, content in others:
        for row in rows_of(path, list_under(content, "data")):
            image = row.need("image_id")
            if "question" not in row:
                tokens[image] = row.need("ocr_tokens", list)
                continue
            item = Item(row.get("question_id", f"{image}/{len(items)}"), row.need("question"), f"{image}.jpg")
            item.truth, item.keys = human_answers(row), (f"{image}\n{item.text.strip().lower()}",)
            items.append(item)
    for item in items if tokens else ():
        words = tokens.get(item.image.removesuffix(".jpg"), [])
        item.text += f"\nReference OCR token: {', '.join(map(str, words))}"
    official = {item.keys[0]: item for item in items}
    for number, item in enumerate(listed):
        key = f"{item.id}\n{bare_question(item.text)}"
        if items and key not in official:
            refuse(paths, f"question {item.id} ({bare_question(item.text)!r}) is not among the annotations")
        item.id, item.keys = f"{item.id}/{number}", (key,)
        if items:
            item.truth, item.keys = official[key].truth, (key, str(official[key].id))
    return listed or items


def read_vizwiz(paths: list[Path]) -> list[Item]:
    """VizWiz's list of {"image", "question", "answers"}. The id of a question is its image."""
    items, others = load_files(paths)
    for item in items:
        item.keys = (str(item.image),)
    for path, content in others:
        for row in rows_of(path, content):
            image, truth = row.need("image"), human_answers(row)
            groups = {"answer type": row.need("answer_type")} if truth and "answer_type" in row else {}
            items.append(Item(image, row.need("question"), image, truth, groups))
    return items


# ---------------------------------------------------------------------------------------------------------------------
# yes or no


def read_pope(paths: list[Path]) -> list[Item]:
    """POPE's label files, coco_pope_SPLIT.json. Ids are SPLIT/1, SPLIT/2 and so on; predictions may use the number
    alone if there is one file, or the ids of LLaVA's list if that is given too."""
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
    """MME's folders, one for each subtask, with a text file of two questions for each image; or the folder of its
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


# ---------------------------------------------------------------------------------------------------------------------
# options


def read_scienceqa(paths: list[Path]) -> list[Item]:
    """problems.json and pid_splits.json (its test split), in LLaVA's CQM form: context, question, options."""
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
        items.append(Item(key, text, image, LETTERS[answer], with_or_without(image)))
    return read_cqm(cqm_rows, {item.id: item for item in items}) if cqm_rows else items


def with_or_without(image: str | None) -> dict[str, str]:
    return {"questions": "with image" if image else "without image"}


def read_cqm(rows: list[Row], problems: dict[str, Item]) -> list[Item]:
    """LLaVA's llava_test_CQM-A.json, with the true answers of the problems if these are given."""
    items = []
    for row in rows:
        key, messages, image = str(row.need("id", int, str)), row.need("conversations", list), row.get("image")
        if problems and key not in problems:
            raise DataError(f"{row.where}: is not in problems.json")
        text = str(messages[0].get("value") if messages and isinstance(messages[0], dict) else "")
        truth = problems[key].truth if problems else None
        items.append(Item(key, text.replace("<image>", "").strip(), image, truth, with_or_without(image)))
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
                raise DataError(f"{path}: line {number}: needs {columns}")
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
    """SEED-Bench.json, with image paths as in LLaVA's instructions (of a video, its middle frame)."""
    items = []
    for path in paths:
        content = load_json(path)
        kinds = content.get("question_type") if isinstance(content, dict) else None
        names = {str(number): name for name, number in kinds.items()} if isinstance(kinds, dict) else {}
        for row in rows_of(path, list_under(content, "questions")):
            key, kind = row.need("question_id", int, str), row.need("data_type")
            number = str(row.get("question_type_id"))
            options = {letter: row.need(f"choice_{letter.lower()}") for letter in "ABCD"}
            image = f"SEED-Bench-image/{row.get('data_id')}" if kind != "video" else f"SEED-Bench-video-image/{key}.png"
            groups = {"kind": kind, "type": names.get(number, number)}
            items.append(Item(key, add_options(row.need("question"), options), image, row.need("answer"), groups))
    return items


# ---------------------------------------------------------------------------------------------------------------------
# free answers


def read_captions(paths: list[Path]) -> list[Item]:
    """One item for each captioned image, by its id: COCO's captions_*.json ("images", "annotations"), TextCaps's and
    NoCaps's in the same form, or TextCaps's own ("data"). If there are no captions (a test set), one for each image."""
    items = {}
    for path in paths:
        content = load_json(path)
        rows = rows_of(path, list_under(content, "images"))
        names = {row.need("id", int, str): row.get("file_name") for row in rows}
        for row in rows_of(path, list_under(content, "annotations") or list_under(content, "data")):
            key, text = row.need("image_id", int, str), row.need("caption" if "caption" in row else "caption_str")
            items.setdefault(key, Item(key, "", names.get(key) or f"{key}.jpg", [])).truth.append(text)
        if not items:
            items |= {key: Item(key, "", name) for key, name in names.items()}
    return list(items.values())


def read_docvqa(paths: list[Path]) -> list[Item]:
    """DocVQA's val_v1.0.json and the like: {"data": [{"questionId", "question", "image", "answers"}]}."""
    rows = data_rows(paths)
    return [Item(row.need_id(), row.need("question"), row.get("image"), human_answers(row)) for row in rows]


def read_chartqa(paths: list[Path]) -> list[Item]:
    """ChartQA's test_human.json and test_augmented.json. Rows have no ids; they become human/0, human/1 and so on."""
    items = []
    for path in paths:
        split = path.stem.removeprefix("test_").removeprefix("val_")
        for number, row in enumerate(rows_of(path, load_json(path))):
            truth, image, query = map(row.need, ("label", "imgname", "query"))
            items.append(Item(f"{split}/{number}", query, image, truth, {"split": split}))
    return items


def read_medical(paths: list[Path]) -> list[Item]:
    """VQA-RAD's and SLAKE's lists, or LLaVA-Med's form: {"id", "image", "conversations", "answer_type"}.

    Of SLAKE, the English questions count. VQA-RAD's one file also holds its training set: if any phrase_type begins
    with "test_", only such rows count.
    """
    items = []
    for path in paths:
        rows = list(rows_of(path, load_json(path)))
        is_test = [str(row.get("phrase_type")).startswith("test_") for row in rows]
        for row, test in zip(rows, is_test):
            if row.get("q_lang", "en") == "en" and (test or not any(is_test)):
                items.append(read_medical_row(row))
    return items


def read_medical_row(row: Row) -> Item:
    if messages := row.get("conversations"):
        key, image = row.need("id", int, str), row.get("image")
        if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages) or len(messages) < 2:
            raise DataError(f"{row.where}: conversations are not a question and an answer")
        question, answer = (Row(turn, row.where).need("value") for turn in messages[:2])
    else:
        key, image = row.need_id(), row.get("image_name") or row.get("img_name")
        question, answer = row.need("question"), str(row.need("answer", str, int, float))
    kind = row.need("answer_type").strip().lower()
    if kind not in ("open", "closed"):
        raise DataError(f"{row.where}: answer_type {kind!r} is neither OPEN nor CLOSED")
    return Item(key, question.replace("<image>", "").strip(), image, answer, {"kind": kind})


# ---------------------------------------------------------------------------------------------------------------------
# graded by a language model


def read_mmvet(paths: list[Path]) -> list[Item]:
    """mm-vet.json: {"v1_0": {"imagename", "question", "answer", "capability": [...]}}; LLaVA's list writes 0 for v1_0.
    The truth is the answer and the list of skills."""
    items, others = load_files(paths)
    for path, content in others:
        for key, row in rows_by_id(path, content):
            truth = (row.need("answer"), sorted(map(str, row.need("capability", list))))
            keys = (key.removeprefix("v1_"),)
            items.append(Item(key, row.need("question"), row.need("imagename"), truth, keys=keys))
    return items


def read_llavabench(paths: list[Path]) -> list[Item]:
    """questions.jsonl, context.jsonl (a caption of each image) and answers_gpt4.jsonl. The truth is a caption and
    GPT-4's answer."""
    items, captions, answers = [], {}, {}
    for path in paths:
        for row in rows_of(path, load_json(path)):
            if "caption" in row:
                text = row["caption"]
                captions[row.need("image")] = "\n".join(text) if isinstance(text, list) else str(text)
            elif "answer_id" in row:
                answers[str(row.need("question_id", int, str))] = row.need("text")
            else:
                item = Item(row.need("question_id", int, str), row.need("text"), row.need("image"))
                item.groups["category"] = row.need("category")
                items.append(item)
    for item in items:
        caption, answer = captions.get(item.image), answers.get(str(item.id))
        item.truth = (caption, answer) if caption is not None and answer is not None else None
    return items
