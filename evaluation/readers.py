"""Read the published files of benchmarks with free answers into Items; choice_readers.py has the others.

A reader takes the files as published, in any order: questions and true answers may be in one file or in several. If
LLaVA's authors published a question list of their own ({"question_id", "image", "text"}, one a line), it is accepted
too, alone or beside the official files, which hold the true answers.
"""

from pathlib import Path
from typing import NoReturn

from evaluation.predictions import Item, Row, bare_question, get_list, load_files, load_json, rows_by_id, rows_of, short
from inputs.records import DataError


def refuse(paths: list[Path], reason: str) -> NoReturn:
    raise DataError(f"{', '.join(map(str, paths))}: {reason}")


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


def read_vqav2(paths: list[Path]) -> list[Item]:
    """VQAv2's and OK-VQA's questions and annotations, or one of the two."""
    listed, others = load_files(paths)
    items, annotations = {item.id: item for item in listed}, {}
    for path, content in others:
        subset = str(content.get("data_subtype", "")) if isinstance(content, dict) else ""
        subset = subset.replace("test-dev", "test")  # test-dev is a part of the test set and shows its images
        for row in rows_of(path, get_list(content, "questions")):
            image = f"COCO_{subset}_{row.need('image_id', int):012d}.jpg"
            item = Item(row.need("question_id", int), row.need("question"), image)
            add_once(items, item.id, item, row)
        for row in rows_of(path, get_list(content, "annotations")):
            item = Item(row.need("question_id", int), "", truth=human_answers(row) or row.need("answers", list))
            kinds = [key for key in ("answer_type", "question_type") if key in row]
            item.groups = {key.replace("_", " "): row.need(key) for key in kinds}
            add_once(annotations, item.id, item, row)
    if items and annotations and (lone := items.keys() ^ annotations.keys()):
        refuse(paths, f"question {min(lone, key=str)} is not in both questions and annotations")
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
    for key in items.keys() & choices.keys():
        if items[key].truth:
            items[key].truth |= choices[key]
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
    """TextVQA_0.5.1_val.json. If the file of Rosetta's OCR tokens is given too, the prompts hold them as in LLaVA's
    list, where question_id is the id of the image."""
    listed, others = load_files(paths)
    items, tokens = [], {}
    for path, content in others:
        for row in rows_of(path, get_list(content, "data")):
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
    for row in (row for path, content in others for row in rows_of(path, content)):
        image, truth = row.need("image"), human_answers(row)
        groups = {"answer type": row.need("answer_type")} if truth and "answer_type" in row else {}
        items.append(Item(image, row.need("question"), image, truth, groups))
    return items


def read_captions(paths: list[Path]) -> list[Item]:
    """One item for each captioned image; its id is the image's. COCO's captions_*.json ("images", "annotations"),
    TextCaps's and NoCaps's in the same form, or TextCaps's own ("data"). A test set without captions gives one item for
    each image."""
    items = {}
    for path in paths:
        content = load_json(path)
        rows = rows_of(path, get_list(content, "images"))
        names = {row.need("id", int, str): row.get("file_name") for row in rows}
        for row in rows_of(path, get_list(content, "annotations") or get_list(content, "data")):
            key, text = row.need("image_id", int, str), row.need("caption" if "caption" in row else "caption_str")
            items.setdefault(key, Item(key, "", names.get(key) or f"{key}.jpg", [])).truth.append(text)
        if not items:
            items |= {key: Item(key, "", name) for key, name in names.items()}
    return list(items.values())


def read_docvqa(paths: list[Path]) -> list[Item]:
    """DocVQA's val_v1.0.json and the like: {"data": [{"questionId", "question", "image", "answers"}]}."""
    rows = (row for path in paths for row in rows_of(path, get_list(load_json(path), "data")))
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

    SLAKE's questions in other languages than English are left out. VQA-RAD's only file also holds its training set:
    if any phrase_type begins with "test_", only rows with such a type are read.
    """
    items = []
    for path in paths:
        rows = list(rows_of(path, load_json(path)))
        test_rows = [row for row in rows if str(row.get("phrase_type")).startswith("test_")]
        items += [read_medical_row(row) for row in test_rows or rows if row.get("q_lang", "en") == "en"]
    return items


def read_medical_row(row: Row) -> Item:
    """A question of VQA-RAD, PathVQA or SLAKE, or of LLaVA-Med's files of them. Raises DataError."""
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


def read_mmvet(paths: list[Path]) -> list[Item]:
    """mm-vet.json: {"v1_0": {"imagename", "question", "answer", "capability": [...]}}; LLaVA's list writes 0 for v1_0.
    The truth is the answer and the list of skills."""
    items, others = load_files(paths)
    for path, content in others:
        for key, row in rows_by_id(path, content):
            truth = (row.need("answer"), sorted(map(str, row.need("capability", list))))
            item = Item(key, row.need("question"), row.need("imagename"), truth, keys=(key.removeprefix("v1_"),))
            items.append(item)
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
