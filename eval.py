"""Answer a file of questions with a model and score the answers by family.

    python eval.py --questions out/world/questions.jsonl --images out/world
    python eval.py --model DIR --questions Q.jsonl --images DIR --out answers.jsonl

A question is {"question_id", "image" (optional), "text", "answer" (optional), "category" (optional)}, one a line;
every answer is written in LLaVA's format as soon as it is there, so a run that was stopped goes on where it was.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

import runs
from adapters import load_adapted
from data import DataError, load_picture
from images import BadImage
from llava import Llava, generate
from ranks import choose_device
from shapes import COLOURS, SHAPES
from templates import prompt_ids, stop_text
from tokenizer import Tokenizer
from weights import DTYPES, choose_dtype

# ---------------------------------------------------------------------------------------------------------------------
# questions and answers


def read_lines(path: Path) -> list[dict]:
    """A jsonl file. Raises DataError naming file, line and reason."""
    rows, seen = [], set()
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")  # not at U+2028, as splitlines does
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("question_id"), (int, str)):
            raise DataError(f"{path}: line {number}: needs a question_id, a number or a string")
        kinds = {"text": str, "image": (str, type(None)), "answer": str, "category": str}
        for key, kind in kinds.items():
            if not isinstance(row.get(key, None if key == "text" else ""), kind):
                raise DataError(f"{path}: line {number}: {key} is not text")
        if row["question_id"] in seen:
            raise DataError(f"{path}: line {number}: question_id {row['question_id']!r} comes twice")
        seen.add(row["question_id"])
        rows.append(row)
    return rows


def answered(path: Path) -> list[dict]:
    """The answers a stopped run left; a last line cut short is dropped from the file, to be answered again."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        complete = all(row.keys() >= {"question_id", "prompt", "text", "model_id", "metadata"} for row in rows)
    except (ValueError, AttributeError):
        complete = False
    if not complete:
        raise DataError(f"{path} holds something else than answers: remove it, or name another --out")
    path.write_bytes(whole)
    return rows


def answer_batch(
    model: Llava, tokenizer: Tokenizer, questions: list[dict], images: Path, blank: bool, max_new_tokens: int
) -> list[str]:
    """Greedy answers to a batch of questions, each the same as if it had been asked alone.

    blank: replace every picture by the mean colour; what can still be answered, the language alone gave away.
    """
    config, pictures, prompts = model.config, [], []
    for question in questions:
        shown = []
        if question.get("image"):
            if config.vision_config is None:
                raise DataError(f"question {question['question_id']} has a picture, but the model has no vision tower")
            try:
                shown = [load_picture(images, question["image"], config)]
            except BadImage as error:
                raise DataError(f"question {question['question_id']}: {error}") from None
        tokens = [picture.tokens for picture in shown]
        prompts.append(prompt_ids([question["text"]], [], len(shown), tokenizer, config.template, tokens))
        pictures += shown
    features, sizes = None, [picture.size for picture in pictures]
    if pictures:
        pixels = torch.cat([picture.pixels for picture in pictures]) * (not blank)
        with torch.inference_mode():
            features = model.vision_features(pixels.to(model.device))
    ids = [[] for _ in questions]
    for step in generate(model, prompts, features, sizes, max_new_tokens=max_new_tokens):
        for row, token in zip(ids, step):
            if token is not None:
                row.append(token)
    texts, end = [tokenizer.decode(row).lstrip() for row in ids], stop_text(config.template)
    return [(text.split(end)[0] if end else text).strip() for text in texts]


# ---------------------------------------------------------------------------------------------------------------------
# scores


def normalised(text: str) -> str:
    return re.sub(r"[^\w ]", "", text.lower()).strip()


def score(category: str, answer: str, truth: str) -> float:
    """1 or 0 for an exact match, case and punctuation aside; of a description, the F1 of the things it names."""
    return things_f1(answer, truth) if category == "description" else float(normalised(answer) == normalised(truth))


def things_f1(answer: str, truth: str) -> float:
    """F1 over the named things. A shape is right if size, colour, kind and place are; a sign if text and place are."""
    named, wanted = mentions(answer), mentions(truth)
    right = sum(min(named.count(thing), wanted.count(thing)) for thing in set(wanted))
    return 2 * right / (len(named) + len(wanted)) if right else 0.0


def mentions(text: str) -> list[str]:
    """Every thing a description of the embedded world names, with what is said about it up to the next one."""
    thing = rf"(?:\w+ (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})|sign that says \w+)"
    return re.findall(rf"{thing} (?:in|at|on) the (?:top left|top right|bottom left|bottom right|\w+)", text.lower())


def table(rows: list[dict]) -> dict[str, float]:
    """Accuracy in per cent by category, and overall (the mean over questions)."""
    scores = defaultdict(list)
    for row in rows:
        scores[row["metadata"]["category"]].append(row["metadata"]["score"])
    result = {name: 100 * sum(values) / len(values) for name, values in sorted(scores.items())}
    everything = [value for values in scores.values() for value in values]
    return {"overall": 100 * sum(everything) / len(everything)} | result


# ---------------------------------------------------------------------------------------------------------------------


def evaluate(
    model, tokenizer, questions, images, out: Path, batch_size: int, max_new_tokens: int, blank: bool, name: str
):
    """Answer what is not answered yet, longest questions together; returns all rows in the order of the questions."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {row["question_id"]: row for row in answered(out)}
    asked = {question["question_id"]: question["text"] for question in questions}
    if any(asked.get(key) != row["prompt"] or row["model_id"] != name for key, row in done.items()):
        raise DataError(f"{out} holds answers to other questions, or another model's: remove it, or name another --out")
    open_ones = sorted((q for q in questions if q["question_id"] not in done), key=lambda q: len(q["text"]))
    with out.open("a", encoding="utf-8") as file, tqdm(total=len(questions), initial=len(done), unit="answer") as bar:
        for i in range(0, len(open_ones), batch_size):
            batch = open_ones[i : i + batch_size]
            answers = answer_batch(model, tokenizer, batch, images, blank, max_new_tokens)
            for question, answer in zip(batch, answers):
                metadata = {"category": question.get("category", "all")}
                if "answer" in question:
                    metadata["score"] = score(metadata["category"], answer, question["answer"])
                row = {"question_id": question["question_id"], "prompt": question["text"], "text": answer}
                done[question["question_id"]] = row | {"answer_id": f"{name}-{question['question_id']}"}
                done[question["question_id"]] |= {"model_id": name, "metadata": metadata}
                file.write(json.dumps(done[question["question_id"]], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))
    return [done[question["question_id"]] for question in questions]


def read_flags() -> argparse.Namespace:
    """The command line; an unknown flag or value ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", type=Path, help="folder of a model; default: the newest finished run below out/")
    add("--adapter", type=Path, help="folder of what LoRA trained, to put onto --model")
    add("--bits", type=int, choices=(4, 16), default=16, help="4: the decoder's layers in NF4, a quarter of the memory")
    add("--questions", type=Path, required=True, help="jsonl of questions")
    add("--images", type=Path, help="folder of the pictures; default: the one --questions is in")
    add("--out", type=Path, help="jsonl of answers; default: answers.jsonl in the model's folder")
    add("--batch-size", type=int, default=64, help="questions answered at one time")
    add("--max-new-tokens", type=int, default=128, help="longest answer (LLaVA: 128)")
    add("--limit", type=int, help="only the first questions of the file")
    add("--blank", action="store_true", help="show mean-coloured pictures: what the language alone gives away")
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    return parser.parse_args()


def main():
    """Answer what is not answered yet, then score; bad input ends in one line and status 1, the answers kept."""
    args = read_flags()
    try:
        folder = args.model or runs.newest_run(1, 2)
        out = args.out or (args.adapter or folder) / ("answers-blank.jsonl" if args.blank else "answers.jsonl")
        questions = read_lines(args.questions)[: args.limit]
        device = choose_device(args.device)
        model, tokenizer = load_adapted(folder, args.adapter, device, choose_dtype(args.dtype, device), args.bits)
        folder = args.adapter or folder
        images, name = args.images or args.questions.parent, folder.name + ("-blank" if args.blank else "")
        rows = evaluate(
            model, tokenizer, questions, images, out, args.batch_size, args.max_new_tokens, args.blank, name
        )
        rows = [row for row in rows if "score" in row["metadata"]]
        for category, accuracy in (table(rows) if rows else {}).items():
            print(f"{category:<14}{accuracy:6.1f} %")
        print(f"{len(rows)} scored answers in {out}")
    except (ValueError, BadImage) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
