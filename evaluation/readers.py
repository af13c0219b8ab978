"""Read the published files of benchmarks with free answers into Items; choice_readers.py has the others.

A reader takes the files as published, in any order: questions and true answers may be in one file or in several. If
LLaVA's authors published a question list of their own ({"question_id", "image", "text"}, one a line), it is accepted
too, alone or beside the official files, which hold the true answers.
"""

from pathlib import Path
from typing import NoReturn

from evaluation.predictions import Item, JsonFile, Row, bare_question, load_files, note, short
from inputs.records import DataError


def refuse(paths: list[Path], reason: str) -> NoReturn:
    raise DataError(f"{', '.join(map(str, paths))}: {reason}")


def add_once(table: dict[int | str, Item], item: Item, row: Row):
    """Add an item to a table by id. Raises DataError if its id is there already."""
    if item.id in table:
        raise DataError(f"{row.where}: comes twice")
    table[item.id] = item


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
    for file in others:
        subset = str(file.get("data_subtype", ""))
        subset = subset.replace("test-dev", "test")  # test-dev is a part of the test set and shows its images
        for row in file.rows("questions"):
            image = f"COCO_{subset}_{row.need('image_id', int):012d}.jpg"
            add_once(items, Item(row.need("question_id", int), row.need("question"), image), row)
        for row in file.rows("annotations"):
            truth = human_answers(row) or row.need("answers", list)
            groups = {key.replace("_", " "): row.need(key) for key in ("answer_type", "question_type") if key in row}
            add_once(annotations, Item(row.need("question_id", int), "", truth=truth, groups=groups), row)
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
    for row in (row for file in others for row in file.rows()):
        if "valid" in row:
            choices[row.key] = {kind: need_texts(row, kind, list) for kind in ("valid", "plausible")}
            continue
        item = Item(row.key, row.need("question"), row.need("imageId") + ".jpg")
        add_once(items, item, row)
        if "answer" in row:
            item.truth = row | {"answer": row.need("answer")}
            for name in row.keys() & {"entailed", "types", "groups"}:
                need_texts(row, name, list if name == "entailed" else dict)
    truths = {item.id: item.truth for item in items.values() if item.truth}
    unbalanced = sum(not truth.get("isBalanced", True) for truth in truths.values())
    note(paths, unbalanced, "questions are not balanced: they count in the consistency of others only")
    for key, truth in truths.items():
        truth |= choices.get(key, {})
    return add_truths(paths, listed, list(items.values()))


def add_truths(paths: list[Path], listed: list[Item], items: list[Item]) -> list[Item]:
    """LLaVA's list with the truths of the official items, found by first key, or by id if they have no key; or either
    of the two alone. Raises DataError if a listed item is not among the official ones."""
    official, found = {(*item.keys, str(item.id))[0]: item for item in items}, set()
    for item in listed if items else ():
        match = official.get((*item.keys, str(item.id))[0])
        if match is None:
            refuse(paths, f"question {short(item.id)} is not among the official ones")
        item.truth, item.keys = match.truth, (*item.keys, str(match.id))
        found.add(id(match))
    note(paths, len(items) - len(found) if listed else 0, "official questions are not in LLaVA's list: left out")
    return listed or items


def need_texts(row: Row, key: str, kind: type) -> set[str]:
    """The texts in a list, or in the values of an object, where null is accepted too. Raises DataError on others."""
    found = row.need(key, kind)
    for value in found if kind is list else found.values():
        if not isinstance(value, str) and (kind is list or value is not None):
            raise DataError(f"{row.where}: {short(value)} stands where a text should")
    return set(found)


def read_textvqa(paths: list[Path]) -> list[Item]:
    """TextVQA_0.5.1_val.json. If the file of Rosetta's OCR tokens is given too, the prompts hold them as in LLaVA's
    list, where question_id is the id of the image."""
    listed, others = load_files(paths)
    items, tokens = [], {}
    for row in (row for file in others for row in file.rows("data")):
        image = row.need("image_id")
        if "question" not in row:
            tokens[image] = row.need("ocr_tokens", list)
            continue
        item = Item(row.get("question_id", f"{image}/{len(items)}"), row.need("question"), f"{image}.jpg")
        item.truth, item.keys = human_answers(row), (f"{image}\n{item.text.strip().lower()}",)
        items.append(item)
    images = [item.image.removesuffix(".jpg") for item in items] if tokens else []
    lacking = sum(image not in tokens for image in images)
    note(paths, lacking, "questions are about an image without OCR tokens: asked with an empty list of them")
    for item, image in zip(items, images):
        item.text += f"\nReference OCR token: {', '.join(map(str, tokens.get(image, [])))}"
    for number, item in enumerate(listed):
        item.id, item.keys = f"{item.id}/{number}", (f"{item.id}\n{bare_question(item.text)}",)
    return add_truths(paths, listed, items)


def read_vizwiz(paths: list[Path]) -> list[Item]:
    """VizWiz's list of {"image", "question", "answers"}. The id of a question is its image."""
    items, others = load_files(paths)
    for item in items:
        item.keys = (str(item.image),)
    for row in (row for file in others for row in file.rows()):
        image, truth = row.need("image"), human_answers(row)
        groups = {"answer type": row.need("answer_type")} if truth and "answer_type" in row else {}
        items.append(Item(image, row.need("question"), image, truth, groups))
    return items


def read_captions(paths: list[Path]) -> list[Item]:
    """One item for each captioned image; its id is the image's. COCO's captions_*.json ("images", "annotations"),
    TextCaps's and NoCaps's in the same form, or TextCaps's own ("data"). A test set without captions gives one item for
    each image."""
    items = {}
    for file in map(JsonFile, paths):
        names = {row.need("id", int, str): row.get("file_name") for row in file.rows("images")}
        for row in file.rows("annotations" if file.get("annotations") else "data"):
            key, text = row.need("image_id", int, str), row.need("caption" if "caption" in row else "caption_str")
            items.setdefault(key, Item(key, "", names.get(key) or f"{key}.jpg", [])).truth.append(text)
        if not items:
            items |= {key: Item(key, "", name) for key, name in names.items()}
        note([file.path], len(names.keys() - items.keys()), "images have no caption: left out")
    return list(items.values())


def read_docvqa(paths: list[Path]) -> list[Item]:
    """DocVQA's val_v1.0.json and the like: {"data": [{"questionId", "question", "image", "answers"}]}."""
    rows = (row for file in map(JsonFile, paths) for row in file.rows("data"))
    return [Item(row.need_id(), row.need("question"), row.get("image"), human_answers(row)) for row in rows]


def read_chartqa(paths: list[Path]) -> list[Item]:
    """ChartQA's test_human.json and test_augmented.json. Rows have no ids; they become human/0, human/1 and so on."""
    items = []
    for file in map(JsonFile, paths):
        split = file.path.stem.removeprefix("test_").removeprefix("val_")
        for number, row in enumerate(file.rows()):
            truth, image, query = map(row.need, ("label", "imgname", "query"))
            items.append(Item(f"{split}/{number}", query, image, truth, {"split": split}))
    return items


def read_medical(paths: list[Path]) -> list[Item]:
    """VQA-RAD's and SLAKE's lists, or LLaVA-Med's form: {"id", "image", "conversations", "answer_type"}.

    SLAKE's questions in other languages than English are left out. VQA-RAD's only file also holds its training set:
    if any phrase_type begins with "test_", only rows with such a type are read.
    """
    items = []
    for file in map(JsonFile, paths):
        rows = list(file.rows())
        test_rows = [row for row in rows if str(row.get("phrase_type")).startswith("test_")] or rows
        read = [row for row in test_rows if row.get("q_lang", "en") == "en"]
        note([file.path], len(rows) - len(read), "questions are not of the test set or not English: left out")
        for row in read:
            if turns := row.get("conversations"):
                if not isinstance(turns, list) or len(turns) != 2:
                    raise DataError(f"{row.where}: conversations are not one question and one answer")
                question, answer = (Row(turn, f"{row.where}: conversations").need("value") for turn in turns)
            else:
                question, answer = row.need("question"), str(row.need("answer", str, int, float))
            kind = row.need("answer_type").strip().lower()
            if kind not in ("open", "closed"):
                raise DataError(f"{row.where}: answer_type {kind!r} is neither OPEN nor CLOSED")
            image = row.get("image_name") or row.get("img_name") or row.get("image")
            text = question.replace("<image>", "").strip()
            items.append(Item(row.need_id(), text, image, answer, {"kind": kind}))
    return items


def read_mmvet(paths: list[Path]) -> list[Item]:
    """mm-vet.json: {"v1_0": {"imagename", "question", "answer", "capability": [...]}}; LLaVA's list writes 0 for v1_0.
    The truth is the answer and the list of skills."""
    items, others = load_files(paths)
    for row in (row for file in others for row in file.rows()):
        truth = (row.need("answer"), sorted(map(str, row.need("capability", list))))
        keys = (row.key.removeprefix("v1_"),)
        items.append(Item(row.key, row.need("question"), row.need("imagename"), truth, keys=keys))
    return items


def read_llavabench(paths: list[Path]) -> list[Item]:
    """questions.jsonl, context.jsonl (a caption of each image) and answers_gpt4.jsonl. The truth is a caption and
    GPT-4's answer."""
    (items, others), captions, answers = load_files(paths), {}, {}
    for row in (row for file in others for row in file.rows()):
        if "caption" in row:
            text = row["caption"]
            captions[row.need("image")] = "\n".join(text) if isinstance(text, list) else str(text)
        else:
            answers[str(row.need_id())] = row.need("text")
    for item in items:
        caption, answer = captions.get(item.image), answers.get(str(item.id))
        item.truth = (caption, answer) if caption is not None and answer is not None else None
    return items
