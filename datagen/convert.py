"""`python -m datagen convert`: published data sets become LLaVA's JSON for train.py.

    python -m datagen convert v2_OpenEnded_mscoco_train2014_questions.json v2_mscoco_train2014_annotations.json \\
        --from vqav2 --images COCO --out vqav2.json --merge
    python -m datagen convert mllm_demo.json --from messages --out demo.json

published.py has a line for each data set. Records that cannot be used are counted by reason and left out, so that
`python data.py check` finds nothing to say about the result.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from datagen.dialogues import dialogues_of
from datagen.published import FORMATS, Format, find_format, read_rows
from evaluation.predictions import Row
from inputs.check import kind_of
from inputs.files import write_atomic
from inputs.images import BadImage, check_file, resolve_inside
from inputs.records import MARKER, check_record, image_paths

NO_SPLIT = "of another split"


# ---------------------------------------------------------------------------------------------------------------------
# a row becomes a record


class Drop(ValueError):
    """The reason why a row is left out."""


def find_image(form: Format, row: Row, folder: Path | None) -> str | None:
    """Path of a row's image in `folder`; without a folder the first that the format names. None: the row has none."""
    fields, paths = {key: value for key, value in row.items() if isinstance(value, (str, int)) and value != ""}, []
    for template in form.images:
        with suppress(KeyError, ValueError):  # no such key, or no number where one should be
            paths.append(template.format_map(fields))
    if not paths:
        return None
    found = paths[:1] if folder is None else [path for path in paths if exists(folder, path)]
    if not found:
        raise Drop(f"image not found in --images ({paths[0]})")
    return found[0]


def exists(folder: Path, name: str) -> bool:
    try:
        check_file(resolve_inside(folder, name))
    except BadImage:
        return False
    return True


def make_record(form: Format, row: Row, args: argparse.Namespace) -> tuple[str | None, str, str]:
    """Image, question and answer of a row. Raises Drop."""
    if not row:
        raise Drop("not an object")
    if row.get("split") and row["split"] not in (args.split, "trainval"):
        raise Drop(NO_SPLIT)
    if row.get("q_lang", "en") != "en" and not args.all_languages:
        raise Drop("not English")
    question, answer = row.get(form.question), form.answer(row)
    if not isinstance(question, str) or not question.strip():
        raise Drop("without a question")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise Drop("without an answer")
    image = find_image(form, row, args.images)
    if image is None and not form.text_too:
        raise Drop("without an image")
    return image, question.strip(), str(answer).strip()


def make_dialogues(form: Format, row: Row, args: argparse.Namespace, notes: Counter) -> Iterator[dict]:
    """The records of a row that holds dialogues. Raises Drop."""
    if not row:
        raise Drop("not an object")
    for record in dialogues_of(row, notes):
        if form.images and (image := find_image(form, row, args.images)):
            record["image"] = image
        elif args.images and (lost := [path for path in image_paths(record) if not exists(args.images, path)]):
            raise Drop(f"image not found in --images ({lost[0]})")
        put_markers(record, notes)
        yield record


def put_markers(record: dict, notes: Counter):
    """Write the markers of a record's images before its first question if it has none."""
    count, turns = len(image_paths(record)), record["conversations"]
    if count and not any(MARKER in turn["value"] for turn in turns if turn["from"] == "human"):
        first = next((turn for turn in turns if turn["from"] == "human"), None)
        if first:
            first["value"] = f"{MARKER}\n" * count + first["value"]
            notes["without a place for their images: put before the first question"] += 1


class Result(NamedTuple):
    """Records; how many rows were left out, and the first of them, by reason; what was guessed."""

    records: list[dict]
    dropped: Counter
    first: dict[str, str]
    notes: Counter


def convert_rows(name: str, rows: list[Row], args: argparse.Namespace) -> Result:
    """Records of all rows that can be used."""
    form, result, by_image = FORMATS[name], Result([], Counter(), {}, Counter()), {}
    suffix = form.suffix if args.suffix is None else args.suffix
    for number, row in enumerate(rows):
        try:
            if form.dialogue:
                found = list(make_dialogues(form, row, args, result.notes))
            else:
                image, question, answer = make_record(form, row, args)
                if args.merge and image in by_image:
                    merge(by_image[image], question, answer)
                    continue
                found = [question_record(image, question, answer, suffix)]
                if image is not None:
                    by_image[image] = found[0]
            for i, record in enumerate(found):
                check_record(record)
                key = row.get("id") or row.get("question_id") or row.get("questionId") or row.get("qid") or row.key
                tail = f"-{i}" if len(found) > 1 else ""
                result.records.append({"id": f"{name}-{key or number}{tail}", **record})
        except ValueError as error:
            reason = str(error).split(" (")[0] if isinstance(error, Drop) else kind_of(str(error))
            result.dropped[reason] += 1
            result.first.setdefault(reason, f"{row.where}: {error}")
    return result


def question_record(image: str | None, question: str, answer: str, suffix: str) -> dict:
    """A dialogue of one question."""
    text = (f"{MARKER}\n" if image else "") + question + (f"\n{suffix}" if suffix else "")
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return ({"image": image} if image else {}) | {"conversations": turns}


def merge(record: dict, question: str, answer: str):
    """Add a question to the dialogue about its image. As in LLaVA-1.5's data, only the first one has the suffix."""
    added = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    check_record({"image": record["image"], "conversations": record["conversations"] + added})
    record["conversations"] += added


# ---------------------------------------------------------------------------------------------------------------------
# the command


def convert(args: argparse.Namespace):
    """`python -m datagen convert`. Raises ValueError with one line."""
    find_format(args.source)
    if args.images and not args.images.is_dir():
        raise ValueError(f"--images {args.images}: no such folder")
    if args.out.resolve() in [path.resolve() for path in args.files]:
        raise ValueError(f"--out {args.out}: would replace a file that is read")
    rows = read_rows(args.source, args.files)
    result = convert_rows(args.source, rows, args)
    for reason, count in result.dropped.most_common():
        text = f"{count:>9,}  left out: {reason} (first: {result.first[reason]})"
        print(text.encode(errors="backslashreplace").decode())
    for note, count in result.notes.items():
        print(f"{count:>9,}  {note}")
    if not result.records:
        raise ValueError(f"{args.files[0]}: nothing of it can be used, see above; {args.out} is not written")
    lines = (json.dumps(record) for record in result.records)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, ("[\n" + ",\n".join(lines) + "\n]\n").encode())
    pairs = sum(len(record["conversations"]) // 2 for record in result.records)
    images = len({path for record in result.records for path in image_paths(record)})
    print(f"{args.out}: {len(result.records):,} records with {pairs:,} answers about {images:,} images", end="")
    print("" if args.images else "; whether the images exist was not checked (--images)")


def add_convert(commands):
    """Add the command `convert` with its flags."""
    style = argparse.RawDescriptionHelpFormatter
    text = "formats: " + ", ".join(FORMATS)
    parser = commands.add_parser("convert", help="data sets become LLaVA's JSON", formatter_class=style, epilog=text)
    parser.set_defaults(run=convert, check=lambda parser, args: None)
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="the data set's JSON files, in any order")
    add("--from", dest="source", required=True, metavar="FORMAT", help="what they are, see below")
    add("--out", type=Path, required=True, help="file to write")
    add("--images", type=Path, help="folder that image paths start from; records whose image is not there are left out")
    add("--merge", action="store_true", help="questions about one image become one dialogue, as in LLaVA-1.5's data")
    add("--split", default="train", choices=("train", "val", "test"), help="of files that hold several; default: train")
    add("--suffix", help="text after each question; default: LLaVA-1.5's, see docs/convert.md")
    add("--all-languages", action="store_true", help="slake: also its Chinese questions")
