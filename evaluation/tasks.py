"""The benchmarks: how each one's published files are read, what its questions end with, who scores it.

A task's `read` takes the files as they are published, questions and truth in one or in several, also LLaVA's own lists
of questions ({"question_id", "image", "text"}, a line each), and makes Items of them. What the model reads is an item's
text with the task's suffix, which is LLaVA-1.5's, unless the text ends with it already.
"""

import base64
import csv
import glob
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evaluation import grader, scores
from evaluation.metrics import LETTERS
from evaluation.predictions import (
    IDS,
    Item,
    by_id,
    entries,
    is_llava,
    listed,
    llava_items,
    load,
    question_of,
    shown,
    tabbed,
    want,
)
from inputs.files import write_atomic
from inputs.images import resolve_inside
from inputs.records import SURROGATE, DataError

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'.\n" + SHORT


@dataclass(frozen=True)
class Task:
    """One benchmark. score: (items, answers, None where one is missing) to figures by name."""

    read: Callable[[list[Path]], list[Item]]
    score: Callable[[list[Item], list[str | None]], dict[str, float]]
    suffix: str = SHORT
    max_new_tokens: int = 128


def prompt_of(item: Item, suffix: str) -> str:
    return item.text if not suffix or item.text.rstrip().endswith(suffix) else f"{item.text}\n{suffix}".lstrip("\n")


def identity(row: dict, where: str) -> int | str:
    """A row's id, under whichever of the usual names."""
    return want(row, next((name for name in IDS if name in row), "question_id"), (int, str), where)


def put(table: dict, key: int | str, value: object, where: str):
    """Add to a table. Raises DataError if the key is there."""
    if key in table:
        raise DataError(f"{where}: comes twice")
    table[key] = value


def refuse(paths: list[Path], what: str):
    raise DataError(f"{', '.join(map(str, paths))}: {what}")


# ---------------------------------------------------------------------------------------------------------------------
# VQA


def people(row: dict, where: str) -> list[str]:
    """What the people answered: strings, or objects with an "answer"."""
    answers = [a.get("answer") if isinstance(a, dict) else a for a in want(row, "answers", list, where)]
    if not answers or not all(isinstance(a, str) for a in answers):
        raise DataError(f"{where}: answers are not a list of texts")
    return answers


def read_vqav2(paths: list[Path]) -> list[Item]:
    """VQAv2's and OK-VQA's questions and annotations, in either order, or one of them; or LLaVA's list."""
    items, truths = {}, {}
    for path in paths:
        content = load(path)
        if is_llava(content):
            items |= {item.id: item for item in llava_items(path, content)}
        subset = str(content.get("data_subtype", "")) if isinstance(content, dict) else ""
        subset = subset.replace("test-dev", "test")  # a part of the test set, whose pictures it shows
        for where, row in entries(path, listed(content, "questions")):
            key, image = want(row, "question_id", int, where), want(row, "image_id", int, where)
            item = Item(key, want(row, "question", str, where), f"COCO_{subset}_{image:012d}.jpg")
            put(items, key, item, where)
        for where, row in entries(path, listed(content, "annotations")):
            kinds = {"answer type": "answer_type", "question type": "question_type"}
            groups = {kind: want(row, key, str, where) for kind, key in kinds.items() if key in row}
            put(truths, want(row, "question_id", int, where), (people(row, where), groups), where)
    if items and truths and items.keys() != truths.keys():
        refuse(paths, f"question {min(items.keys() ^ truths.keys(), key=str)} is not in both questions and annotations")
    for key, (truth, groups) in truths.items():
        item = items.setdefault(key, Item(key, ""))
        item.truth, item.groups = truth, groups
    return list(items.values())


def read_gqa(paths: list[Path]) -> list[Item]:
    """GQA's questions by id, and its choices by id (what is valid and plausible); or LLaVA's list, with or without the
    former for the truth."""
    items, choices, asked = {}, {}, []
    for path in paths:
        content = load(path)
        if is_llava(content):
            asked += llava_items(path, content)
            continue
        for key, where, row in by_id(path, content):
            if "valid" in row:
                choices[key] = {kind: {*texts(want(row, kind, list, where), where)} for kind in ("valid", "plausible")}
                continue
            item = Item(key, want(row, "question", str, where), want(row, "imageId", str, where) + ".jpg")
            put(items, key, item, where)
            if "answer" in row:
                items[key].truth = row | {"answer": want(row, "answer", str, where)}
                texts(want(row, "entailed", list, where) if "entailed" in row else [], where)
                for kind in row.keys() & {"types", "groups"}:
                    texts([name for name in want(row, kind, dict, where).values() if name is not None], where)
    for key, item in items.items():
        if item.truth and choices:
            item.truth |= choices.get(key, {})
    for item in asked if items else ():
        if str(item.id) not in items:
            refuse(paths, f"question {shown(item.id)} is not among GQA's")
        item.truth = items[str(item.id)].truth
    return asked or list(items.values())


def texts(values: list, where: str) -> list[str]:
    """A list that must be of texts. Raises DataError."""
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise DataError(f"{where}: {shown(wrong[0])} stands where a text should")
    return values


def read_textvqa(paths: list[Path]) -> list[Item]:
    """TextVQA_0.5.1_val.json; beside it perhaps the Rosetta OCR tokens, which then stand in the prompt as in LLaVA's
    list; or that list, whose question_id is the picture's, with or without the former for the truth."""
    asked, items, tokens = [], [], {}
    for path in paths:
        content = load(path)
        asked += llava_items(path, content) if is_llava(content) else []
        for where, row in entries(path, listed(content, "data")):
            image = want(row, "image_id", str, where)
            if "question" not in row:
                tokens[image] = want(row, "ocr_tokens", list, where)
                continue
            question = want(row, "question", str, where)
            item = Item(row.get("question_id", f"{image}/{len(items)}"), question, f"{image}.jpg")
            item.truth = people(row, where) if "answers" in row else None
            item.keys = (f"{image}\n{question.strip().lower()}",)
            items.append(item)
    for item in items:
        if tokens:
            words = tokens.get(item.image.removesuffix(".jpg"), [])
            item.text += f"\nReference OCR token: {', '.join(map(str, words))}"
    if not asked:
        return items
    for number, item in enumerate(asked):
        image = item.id
        item.keys = (f"{image}\n{question_of(item.text)}",)
        item.id = f"{image}/{number}"
    truths = {item.keys[0]: item for item in items}
    for item in asked if items else ():
        if item.keys[0] not in truths:
            refuse(paths, f"question {item.id} ({question_of(item.text)!r}) is not among the annotations")
        item.truth, item.keys = truths[item.keys[0]].truth, (*item.keys, str(truths[item.keys[0]].id))
    return asked


def read_vizwiz(paths: list[Path]) -> list[Item]:
    """VizWiz's list of {"image", "question", "answers"}; a question is known by its picture. Or LLaVA's list."""
    items = []
    for path in paths:
        content = load(path)
        if is_llava(content):
            items += llava_items(path, content)
            for item in items:
                item.keys = (str(item.image),)
            continue
        for where, row in entries(path, content):
            image = want(row, "image", str, where)
            item = Item(image, want(row, "question", str, where), image)
            if "answers" in row:
                item.truth = people(row, where)
                item.groups = {"answer type": want(row, "answer_type", str, where)} if "answer_type" in row else {}
            items.append(item)
    return items


# ---------------------------------------------------------------------------------------------------------------------
# yes or no


def read_pope(paths: list[Path]) -> list[Item]:
    """POPE's label files, coco_pope_SPLIT.json, whose questions are then SPLIT/1, SPLIT/2 and so on, and may be called
    by the number alone if there is one file; LLaVA's list of questions may stand beside them, for its numbers."""
    asked, items = [], []
    for path in paths:
        content, split = load(path), path.stem.removeprefix("coco_pope_")
        if is_llava(content) and "label" not in content[0]:
            asked += llava_items(path, content)
            continue
        for where, row in entries(path, content):
            number, label = want(row, "question_id", int, where), want(row, "label", str, where)
            if label not in ("yes", "no"):
                raise DataError(f"{where}: label {label!r} is neither yes nor no")
            text, image = want(row, "text", str, where), want(row, "image", str, where)
            keys = (str(number),) if len(paths) == 1 else ()
            items.append(Item(f"{split}/{number}", text, image, label, {"split": split}, keys))
    known = {(item.groups["split"], item.image, question_of(item.text)): item for item in items}
    for question in asked if items else ():
        item = known.get((question.groups.get("category"), question.image, question_of(question.text)))
        if item is None:
            refuse(paths, f"question {question.id} is in no label file")
        item.keys = (str(question.id),)
    return items or asked


def read_mme(paths: list[Path]) -> list[Item]:
    """MME's folders, one for each subtask, with a text file of two questions for each picture; or its folder of
    SUBTASK.txt with the lines "picture, question, answer", as its scoring tool comes with."""
    items = []
    for root in paths:
        for folder in sorted(path for path in root.glob("*") if path.is_dir()):
            inner = folder / "questions_answers_YN"
            for path in sorted((inner if inner.exists() else folder).glob("*.txt")):
                stem = glob.escape(path.stem)
                found = [*folder.glob(f"{stem}.[jp][pn]*g"), *folder.glob(f"images/{stem}.[jp][pn]*g")]
                picture = str(found[0].relative_to(root)) if found else f"{folder.name}/{path.stem}.png"
                items += mme_items(folder.name, path, [[picture, *row] for row in tabbed(path, 2)])
        for path in sorted(root.glob("*.txt")):
            items += mme_items(path.stem, path, tabbed(path, 3))
        if not items:
            raise DataError(f"{root}: neither MME's folders nor its SUBTASK.txt")
    return items


def mme_items(subtask: str, path: Path, rows: list[list[str]]) -> list[Item]:
    items = []
    for number, (picture, question, answer) in enumerate(rows, 1):
        name, truth = Path(picture).name, answer.split("\t")[0].strip().lower()  # results have a fourth column
        if truth not in ("yes", "no"):
            raise DataError(f"{path}: line {number}: answer {answer!r} is neither yes nor no")
        image = picture if "/" in picture else f"{subtask}/{picture}"
        groups, keys = {"subtask": subtask, "picture": name}, (f"{subtask}/{name}\n{question_of(question)}",)
        text = question.replace("Please answer yes or no.", "").strip()
        items.append(Item(f"{subtask}/{name}/{number}", text, image, truth, groups, keys))
    return items


# ---------------------------------------------------------------------------------------------------------------------
# options


def with_options(question: str, options: dict[str, str]) -> str:
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])


def read_scienceqa(paths: list[Path]) -> list[Item]:
    """problems.json and pid_splits.json (its test split), in LLaVA's CQM form: context, question, options."""
    problems, split, asked = {}, None, []
    for path in paths:
        content = load(path)
        if isinstance(content, list):
            asked += entries(path, content)
        elif isinstance(content, dict) and "test" in content:
            split = [str(key) for key in want(content, "test", list, str(path))]
        elif isinstance(content, dict):
            problems |= {key: (where, row) for key, where, row in by_id(path, content)}
    items = []
    for key in split if split is not None else problems:
        if key not in problems:
            refuse(paths, f"question {key} is in pid_splits.json but not in problems.json")
        where, row = problems[key]
        choices, answer = want(row, "choices", list, where), want(row, "answer", int, where)
        if not 0 <= answer < len(choices) <= len(LETTERS):
            raise DataError(f"{where}: answer {answer} is none of {len(choices)} choices")
        options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
        text = f"Context: {row.get('hint') or 'N/A'}\nQuestion: {want(row, 'question', str, where)}\nOptions: {options}"
        image = f"{key}/{row['image']}" if row.get("image") else None
        groups = {"picture": "image" if image else "no image"}
        items.append(Item(key, text, image, LETTERS[answer], groups))
    return cqm_items(asked, items) if asked else items


def cqm_items(asked: list[tuple[str, dict]], known: list[Item]) -> list[Item]:
    """LLaVA's llava_test_CQM-A.json, with the truth of the problems, if they are there too."""
    truths, items = {item.id: item for item in known}, []
    for where, row in asked:
        key, talk = str(want(row, "id", (int, str), where)), want(row, "conversations", list, where)
        if known and key not in truths:
            raise DataError(f"{where}: is not in problems.json")
        text = str(talk[0].get("value") if talk and isinstance(talk[0], dict) else "").replace("<image>", "").strip()
        item = Item(key, text, row.get("image"), groups={"picture": "image" if row.get("image") else "no image"})
        item.truth = truths[key].truth if known else None
        items.append(item)
    return items


def read_mmbench(paths: list[Path]) -> list[Item]:
    """MMBench's table (tab-separated; pictures in base64). Index 1,000,000 n + i is question i with rotated options."""
    csv.field_size_limit(sys.maxsize)
    items = []
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t"))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: {error}") from None
        pictures = {row.get("index"): row.get("image") or "" for row in rows}
        for number, row in enumerate(rows, 2):
            where = f"{path}: line {number}"
            if None in row.values() or None in row or not str(row.get("index")).isdecimal() or "question" not in row:
                raise DataError(f"{where}: needs a numeric index, a question, options A, B, ... and as many columns")
            options = {letter: row[letter] for letter in LETTERS if row.get(letter, "").lower() not in ("", "nan")}
            hint = row.get("hint", "")
            question = row["question"] if hint.lower() in ("", "nan", "none") else f"{hint}\n{row['question']}"
            item = Item(int(row["index"]), with_options(question, options), f"{row['index']}.jpg")
            item.data = pictures.get(row.get("image"), row.get("image") or "")  # some tables name the row that has it
            answer = row.get("answer") or ""
            item.truth = (answer, options) if answer.lower() not in ("", "nan") else None
            item.options = options
            item.groups = {kind: row[kind] for kind in ("l2-category", "category") if row.get(kind)}
            items.append(item)
    return items


def unpack_images(items: list[Item], folder: Path):
    """Write the pictures that came in base64 into a folder, as files of the items' names, each in one step, unless it
    is there already. Raises DataError."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        if item.data:
            path = resolve_inside(folder, item.image)
            try:
                content = base64.b64decode(item.data, validate=True)
            except ValueError as error:
                raise DataError(f"question {item.id}: its picture is not base64 ({error})") from None
            if not path.exists() or path.read_bytes() != content:
                write_atomic(path, content)
        item.data = ""


def read_seed(paths: list[Path]) -> list[Item]:
    """SEED-Bench.json; pictures as LLaVA lays them out, of a video the frame in its middle."""
    items = []
    for path in paths:
        content = load(path)
        kinds = content.get("question_type") if isinstance(content, dict) else None
        names = {str(number): name for name, number in kinds.items()} if isinstance(kinds, dict) else {}
        for where, row in entries(path, listed(content, "questions")):
            key, kind = want(row, "question_id", (int, str), where), want(row, "data_type", str, where)
            options = {letter: want(row, f"choice_{letter.lower()}", str, where) for letter in "ABCD"}
            image = f"SEED-Bench-image/{row.get('data_id')}"
            if kind == "video":
                image = f"SEED-Bench-video-image/{key}.png"
            number = str(row.get("question_type_id"))
            groups = {"kind": kind, "type": names.get(number, number)}
            text = with_options(want(row, "question", str, where), options)
            items.append(Item(key, text, image, want(row, "answer", str, where), groups))
    return items


# ---------------------------------------------------------------------------------------------------------------------
# free answers


def read_captions(paths: list[Path]) -> list[Item]:
    """COCO's captions_*.json ("images", "annotations"), TextCaps's and NoCaps's in the same form, or TextCaps's own
    ("data"): one item for each picture that has captions, by its id."""
    items = {}
    for path in paths:
        content = load(path)
        pictures = entries(path, listed(content, "images"))
        names = {want(row, "id", (int, str), where): row.get("file_name") for where, row in pictures}
        for where, row in entries(path, listed(content, "annotations") or listed(content, "data")):
            key = want(row, "image_id", (int, str), where)
            text = want(row, "caption" if "caption" in row else "caption_str", str, where)
            item = items.setdefault(key, Item(key, "", names.get(key) or f"{key}.jpg", []))
            item.truth.append(text)
        if not items:  # of a test set, pictures alone
            items |= {key: Item(key, "", name) for key, name in names.items()}
    return list(items.values())


def read_docvqa(paths: list[Path]) -> list[Item]:
    """DocVQA's val_v1.0.json and its like: {"data": [{"questionId", "question", "image", "answers"}]}."""
    items = []
    for path in paths:
        for where, row in entries(path, listed(load(path), "data")):
            item = Item(identity(row, where), want(row, "question", str, where), row.get("image"))
            item.truth = people(row, where) if "answers" in row else None
            items.append(item)
    return items


def read_chartqa(paths: list[Path]) -> list[Item]:
    """ChartQA's test_human.json and test_augmented.json. Its rows have no ids: they are human/0, human/1 and so on."""
    items = []
    for path in paths:
        split = path.stem.removeprefix("test_").removeprefix("val_")
        for number, (where, row) in enumerate(entries(path, load(path))):
            truth, image = want(row, "label", str, where), want(row, "imgname", str, where)
            query = want(row, "query", str, where)
            items.append(Item(f"{split}/{number}", query, image, truth, {"split": split}))
    return items


def read_medical(paths: list[Path]) -> list[Item]:
    """VQA-RAD's and SLAKE's lists (of SLAKE the English part, as LLaVA-Med), or any set in LLaVA-Med's form:
    {"id", "image", "conversations", "answer_type"}. Of VQA-RAD's one file, which is for training too, the benchmark is
    the rows whose phrase_type begins with "test_": where there are such, the others are left out."""
    items = []
    for path in paths:
        rows = list(entries(path, load(path)))
        tests = any(str(row.get("phrase_type")).startswith("test_") for _, row in rows)
        for where, row in rows:
            if row.get("q_lang", "en") != "en" or (tests and not str(row.get("phrase_type")).startswith("test_")):
                continue
            if talk := row.get("conversations"):
                key, image = want(row, "id", (int, str), where), row.get("image")
                if not isinstance(talk, list) or not all(isinstance(turn, dict) for turn in talk) or len(talk) < 2:
                    raise DataError(f"{where}: conversations are not a question and an answer")
                question, answer = (want(turn, "value", str, where) for turn in talk[:2])
            else:
                key = identity(row, where)
                image = row.get("image_name") or row.get("img_name")
                question, answer = want(row, "question", str, where), str(want(row, "answer", (str, int, float), where))
            kind = want(row, "answer_type", str, where).strip().upper()
            if kind not in ("OPEN", "CLOSED"):
                raise DataError(f"{where}: answer_type {kind!r} is neither OPEN nor CLOSED")
            question = question.replace("<image>", "").strip()
            items.append(Item(key, question, image, answer, {"kind": kind.lower()}))
    return items


TASKS = {
    "vqav2": Task(read_vqav2, scores.vqa),
    "okvqa": Task(read_vqav2, scores.vqa),
    "gqa": Task(read_gqa, scores.gqa),
    "textvqa": Task(read_textvqa, scores.textvqa),
    "vizwiz": Task(read_vizwiz, scores.vizwiz, UNSURE),
    "pope": Task(read_pope, scores.pope),
    "scienceqa": Task(read_scienceqa, scores.scienceqa, LETTER, 1024),
    "mme": Task(read_mme, scores.mme),
    "mmbench": Task(read_mmbench, scores.mmbench, LETTER, 1024),
    "seed": Task(read_seed, scores.seed, LETTER),
    "mmvet": Task(grader.read_mmvet, grader.need_grades, "", 1024),
    "llavabench": Task(grader.read_llavabench, grader.need_grades, "", 1024),
    "coco": Task(read_captions, scores.captions, CAPTION),
    "textcaps": Task(read_captions, scores.captions, CAPTION),
    "docvqa": Task(read_docvqa, scores.docvqa),
    "chartqa": Task(read_chartqa, scores.chartqa, "Answer the question with a single word."),
    "vqa-rad": Task(read_medical, scores.medical, ""),
    "pathvqa": Task(read_medical, scores.medical, ""),
    "slake": Task(read_medical, scores.medical, ""),
}


def read_items(task: str, paths: list[Path]) -> list[Item]:
    """The questions of a task. Raises DataError if there are none, two with one id, or one whose question or picture is
    not text."""
    items, seen = TASKS[task].read(paths), set()
    if not items:
        refuse(paths, f"no questions of {task}")
    for item in items:
        if str(item.id) in seen:
            refuse(paths, f"question {shown(item.id)} comes twice")
        if not isinstance(item.image, (str, type(None))):
            refuse(paths, f"question {shown(item.id)}: its picture is {shown(item.image)}, not a name")
        if SURROGATE.search(item.text):
            refuse(paths, f"question {shown(item.id)} holds half a surrogate pair, which is not text")
        seen.add(str(item.id))
    return items
