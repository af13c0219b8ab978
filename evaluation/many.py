"""Answer many questions in batches, for `sample.py --batch`, and go on after a kill.

    photos/           a folder: every image in it and in its subfolders is asked --prompt
    questions.jsonl   one JSON object a line: {"id", "image", "prompt"}
                      id: a number or text, each once (default: the number of the line, from 1)
                      image: a path, a list of paths, or absent
                      prompt: the question, or absent if all have --prompt; a marker <image> says where an image stands

The answers are one JSON object a line, in the order of the input: {"id", "image", "prompt", "text"}. The id of an image
in a folder is its path. With --skip-bad, a question that cannot be asked has "text": null and the reason in "error".
Answers are greedy, and a batch does not change them. They are written batch by batch to OUT.part-0; OUT appears when
all exist.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from evaluation.answering import Cost, answer_all, answer_prompts, prepare_question, report_cut
from evaluation.manifest import save_manifest
from evaluation.predictions import JsonFile, short
from inputs.images import LinkedFolder
from inputs.records import SURROGATE, DataError, check_text_only, image_paths, name_keys, question_turn
from inputs.templates import is_whole_prompt
from inputs.tokenizer import Tokenizer
from llava import Llava
from training.ranks import Distributed

# Files of other names in a folder are counted and left out. Some of these cannot be read, and are then named.
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
SUFFIXES |= {".avif", ".heic", ".heif", ".jxl", ".jp2", ".ico", ".tga", ".mpo"}
ROW_KEYS = ("id", "image", "prompt", "text")


def add_flags(parser: argparse.ArgumentParser):
    """Add the flags that go with --batch."""
    add = parser.add_argument_group("many images or questions").add_argument
    add("--batch", type=Path, help='a folder of images, or a jsonl of {"image", "prompt", "id"}; needs --out')
    add("--out", type=Path, help="jsonl of the answers; after a stop, the same command goes on")
    add("--images", type=Path, help="folder of the images of a jsonl; default: its own")
    add("--batch-size", type=int, default=16, help="questions in a batch; default: 16")
    add("--skip-bad", action="store_true", help="write an error for a bad image and go on; default: stop")
    add("--follow-links", action="store_true", help="read images also where links lead out of their folder")


def why_refused(args: argparse.Namespace) -> str:
    """Why the flags do not go together; "" if they do."""
    if not args.batch:
        alone = [("--out", args.out), ("--images", args.images), ("--skip-bad", args.skip_bad)]
        found = [name for name, value in alone if value]
        return f"{found[0]} goes with --batch" if found else ""
    if not args.out:
        return "--batch needs --out FILE for its answers"
    if args.image or args.json or args.look or args.show_tokens:
        return "--batch has its own images and answers: no --image, no --json, no --look, no --show-tokens"
    if args.temperature or args.top_k or args.top_p < 1:
        return "the answers of --batch are greedy: no --temperature, no --top-k, no --top-p"
    return "--batch-size must be above 0" if args.batch_size < 1 else ""


# ---------------------------------------------------------------------------------------------------------------------
# questions


def read_batch(path: Path, prompt: str | None, default: str) -> list[dict]:
    """The questions of a folder or a jsonl: {"question_id", "image", "text"}. Raises DataError with file and line.

    Args: prompt: --prompt, or None; default: the prompt of a folder without it.
    """
    if path.is_dir():
        text = default if prompt is None else prompt
        check_question(str(path), text, 1)
        questions = [{"question_id": name, "image": name, "text": text} for name in find_images(path)]
    else:
        questions = read_rows(path, prompt)
    if whole := sum(is_whole_prompt(question["text"]) for question in questions):
        print(f"{path}: {whole:,} prompts end like whole prompts: their roles are written twice", file=sys.stderr)
    return questions


def find_images(folder: Path) -> list[str]:
    """Paths of all images below a folder, sorted. Other files are counted on stderr. Raises DataError without any."""
    names, others = [], Counter()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            if not os.access(path, os.R_OK | os.X_OK):
                raise DataError(f"{path}: the folder cannot be read (permission denied)")
            continue
        if path.is_dir():
            others["links to folders"] += 1
        elif any(part.startswith(".") for part in name.parts):
            others["hidden files"] += 1
        elif path.suffix.lower() not in SUFFIXES:
            others[path.suffix or "no suffix"] += 1
        else:
            names.append(name.as_posix())
    if others:
        print(f"{folder}: left out, as no images: {name_keys(others.most_common())}", file=sys.stderr)
    if not names:
        raise DataError(f"{folder}: no images")
    return names


def read_rows(path: Path, prompt: str | None) -> list[dict]:
    """The questions of a jsonl. Raises DataError naming file, line and reason."""
    questions, unread = {}, Counter()
    for number, row in enumerate(JsonFile(path).rows(), 1):
        key = row.need("id", int, str) if "id" in row else number
        text = row.need("prompt") if prompt is None or "prompt" in row else prompt
        names = image_paths(row)
        if not all(isinstance(name, str) and name for name in names):
            raise DataError(f"{row.where}: image is {short(row['image'])}, not a path or a list of paths")
        check_question(row.where, text, len(names), row)
        if key in questions:
            raise DataError(f"{row.where}: the id {short(key)} comes twice")
        questions[key] = {"question_id": key, "image": row.get("image") or None, "text": text}
        unread.update(row.keys() - {*ROW_KEYS[:3]})
    if not questions:
        raise DataError(f"{path}: no questions")
    if unread:
        print(f"{path}: keys that are not read: {name_keys(unread.most_common())}", file=sys.stderr)
    return list(questions.values())


def check_question(where: str, text: str, images: int, row: dict | None = None):
    """Raise DataError if a question has the wrong number of image markers, or images that would not be read."""
    try:
        if SURROGATE.search(text):
            raise ValueError("the prompt holds half a surrogate pair, which is not text")
        question_turn(text, images)
        if row and not images:
            check_text_only(row, [text])
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# answers


def answer_batches(
    model: Llava, tokenizer: Tokenizer, folder: Path, args: argparse.Namespace, default: str, ranks: Distributed
):
    """Answer all questions of --batch into --out. Args: folder: of the model; default: see read_batch."""
    questions, is_folder = ranks.on_main(read_batch, args.batch, args.prompt, default), args.batch.is_dir()
    images = args.images or (args.batch if is_folder else args.batch.parent)
    images = LinkedFolder(images) if args.follow_links else images
    if any(question["image"] for question in questions) and model.config.vision_config is None:
        raise DataError("this model is a decoder without a vision tower: it answers questions without images only")
    settings = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens, "bits": args.bits}
    settings |= {"fast": not args.no_fast, "compile": args.compile, "default_prompt": args.prompt}
    settings |= {"visual_tokens": str(args.visual_tokens)} if args.visual_tokens else {}
    folders, files = [folder, args.adapter] if args.adapter else [folder], [] if is_folder else [args.batch]
    ranks.on_main(save_manifest, args.out, folders, files, questions, images, model, settings, args.skip_bad)
    cost = Cost()

    def prepare(question: dict):
        try:
            return prepare_question(question, images, tokenizer, model.config)
        except DataError as error:
            if not args.skip_bad:
                raise DataError(f"{error} (--skip-bad goes on without it)") from None
            return error

    def ask(batch: list[dict]) -> list[str | DataError]:
        prepared = [prepare(question) for question in batch]
        good = [question for question in prepared if not isinstance(question, DataError)]
        texts = iter(answer_prompts(model, tokenizer, good, args.max_new_tokens, cost) if good else [])
        return [question if isinstance(question, DataError) else next(texts) for question in prepared]

    rows = answer_all(questions, args.out, args.batch_size, "", ask, make_row, ranks, ROW_KEYS)
    report_cut(cost, args.max_new_tokens, ranks)
    if ranks.is_main:
        bad = [row for row in rows if "error" in row]
        print(f"{len(rows) - len(bad):,} answers in {args.out}", file=sys.stderr)
        if bad:
            print(f"{len(bad):,} of {len(rows):,} rows have an error (first: {bad[0]['error']})", file=sys.stderr)


def make_row(question: dict, answer: str | DataError) -> dict:
    row = {"id": question["question_id"], "image": question["image"], "prompt": question["text"]}
    return row | ({"text": None, "error": str(answer)} if isinstance(answer, DataError) else {"text": answer})
