"""Answer a list of questions in batches, on every rank, so that a kill loses no finished batch and changes no answer.

The batches depend on the whole list of questions only, not on the answers that exist already. So all answers are equal
bit for bit, wherever a run was stopped and on however many ranks it is resumed.

    OUT              all answers in the order of the questions, written once all exist
    OUT.part-RANK    until then, the answers of one rank, one JSON object a line, appended batch by batch
"""

import fcntl
import glob
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from data import PreparedImage, load_image, render_dialogue
from inputs.files import read_complete_lines, write_atomic, write_json
from inputs.images import BadImage
from inputs.records import DataError, Turn, marked_turn
from inputs.templates import stop_text
from inputs.tokenizer import Tokenizer
from llava import Llava, LlavaConfig, generate
from training.meters import peak_memory
from training.ranks import Distributed


class Cost(Counter):
    """Sums over the batches that this process answered: of counts, and of seconds without those to load images."""

    def save(self, path: Path, device: str):
        """Write and print means per question, seconds per batch, tokens per second of a batch, and peak memory."""
        if not self["batches"]:
            return
        tokens = ("visual tokens", "prompt tokens", "new tokens")  # prompt tokens include the image placeholders
        values = {"questions": self["questions"]} | {name: self[name] / self["questions"] for name in tokens}
        values["seconds to first token"] = self["seconds to first token"] / self["batches"]
        values["tokens/s"] = self["new tokens"] / self["seconds"]
        values["peak GB"] = peak_memory(torch.device(device)) / 1e9
        write_json(path, values)
        texts = (f"{name} {v:,}" if isinstance(v, int) else f"{name} {v:.3g}" for name, v in values.items())
        print("  ".join(texts), file=sys.stderr)


def load_question_image(images: Path, question: dict, config: LlavaConfig) -> PreparedImage:
    """The image of a question, all zero (the mean color) if the question says "blank". Raises DataError."""
    if config.vision_config is None:
        raise DataError(f"question {question['question_id']} has an image, but the model has no vision tower")
    try:
        image = load_image(images, question["image"], config)
    except BadImage as error:
        raise DataError(f"question {question['question_id']}: {error}") from None
    if question.get("blank"):
        image.pixels = torch.zeros_like(image.pixels)
    return image


def answer_batch(
    model: Llava, tokenizer: Tokenizer, questions: list[dict], images: Path, max_new_tokens: int, cost: Cost
) -> list[str]:
    """Greedy answers to a batch of questions, by the renderer and the image pipeline of training.

    Each answer is equal to the answer without the batch, if the longest prompt leaves max_new_tokens of the context;
    otherwise all answers may have only as many tokens as the longest prompt leaves.
    """
    config, prepared, prompts = model.config, [], []
    for question in questions:
        own = [load_question_image(images, question, config)] if question.get("image") else []
        tokens = [image.tokens for image in own]
        turn = marked_turn(question["text"], None) if own else Turn(question["text"], None)
        turn.images = len(own)
        prompts.append(render_dialogue([turn], tokenizer, config.template, tokens)[0])
        if len(prompts[-1]) >= (limit := config.text_config.max_position_embeddings):
            reason = f"{len(prompts[-1]):,} tokens long, image included; the context holds {limit:,}"
            raise DataError(f"question {question['question_id']}: its prompt is {reason}")
        prepared += own
    start, features = time.perf_counter(), None
    if prepared:
        with torch.inference_mode():
            features = model.vision_features(torch.cat([image.pixels for image in prepared]).to(model.device))
    sizes, ids, first = [image.size for image in prepared], [[] for _ in questions], None
    for step in generate(model, prompts, features, sizes, max_new_tokens=max_new_tokens):
        first = first or time.perf_counter()
        for row, token in zip(ids, step):
            if token is not None:
                row.append(token)
    end = time.perf_counter()
    cost.update({"batches": 1, "questions": len(questions), "visual tokens": sum(image.tokens for image in prepared)})
    cost.update({"prompt tokens": sum(map(len, prompts)), "new tokens": sum(map(len, ids))})
    cost.update({"seconds": end - start, "seconds to first token": (first or end) - start})
    texts, stop = [tokenizer.decode(row).lstrip() for row in ids], stop_text(config.template)
    ended = [bool({*row} & {*config.eos_token_ids} or (stop and stop in text)) for row, text in zip(ids, texts)]
    cost["cut answers"] += ended.count(False)
    return [(text.split(stop)[0] if stop else text).strip() for text in texts]


ROW_KEYS = ("question_id", "prompt", "text", "answer_id", "model_id", "metadata")  # of LLaVA's answer files


def answer_all(
    questions: list[dict],
    out: Path,
    batch_size: int,
    model_name: str,
    ask: Callable[[list[dict]], list[str]],
    describe: Callable[[dict, str], dict],
    ranks: Distributed,
) -> list[dict]:
    """Answer the questions that have no answer in `out` yet. Returns all rows in the order of the questions on rank 0,
    and an empty list on the others.

    Args: ask: the answers to a batch; describe: the metadata of a row, from question and answer.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    done, texts = read_answers(out), {question["question_id"]: question["text"] for question in questions}
    if any(texts.get(key) != row["prompt"] or row["model_id"] != model_name for key, row in done.items()):
        raise DataError(f"{out} holds answers to other questions or of another model: remove it, or name another --out")
    # Questions of similar length share a batch; the longest come first, so that too little memory shows at once.
    order = sorted(questions, key=lambda question: (not question.get("image"), -len(question["text"])))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][ranks.rank :: ranks.world_size]
    count, is_main = sum(map(len, batches)), ranks.rank == 0
    with open_part(out, ranks.rank) as file, tqdm(total=count, unit="answer", disable=not is_main) as bar:
        for batch in batches:
            if any(question["question_id"] not in done for question in batch):
                for question, text in zip(batch, ask(batch), strict=True):
                    if (key := question["question_id"]) not in done:
                        row = {"question_id": key, "prompt": question["text"], "text": text}
                        row |= {"answer_id": f"{model_name}-{key}", "model_id": model_name}
                        file.write(to_line(row | {"metadata": describe(question, text)}))
                file.flush()
            bar.update(len(batch))
        ranks.all_reduce_sum(1)  # wait until every rank has answered its batches
        rows = []
        if is_main:  # write all answers in one step, then delete the parts
            done = read_answers(out)
            rows = [done[key] for key in texts]
            write_atomic(out, b"".join(map(to_line, rows)))
            for path in part_files(out):
                path.unlink()
        ranks.all_reduce_sum(1)  # keep the parts open, and so locked, until rank 0 has merged them
    return rows


def sibling_file(out: Path, name: str) -> Path:
    """The path of a run's file `name`: beside answers.jsonl under this name, beside ANSWERS.jsonl as ANSWERS-name. A
    model's folder has files of these names itself, so answers.jsonl in it also gives answers-name."""
    is_run = out.name == "answers.jsonl" and not (out.parent / "config.json").exists()
    return out.with_name(name if is_run else f"{out.stem}-{name}")


def to_line(row: dict) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def part_files(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.part-*"))


def read_answers(out: Path) -> dict[int | str, dict]:
    """The rows that exist so far, by question. Raises DataError if a file holds anything but answers."""
    rows = {}
    for path in (out, *part_files(out)):
        try:
            for line in filter(None, read_complete_lines(path).split(b"\n")):
                row = json.loads(line)
                rows[row["question_id"]] = {key: row[key] for key in ROW_KEYS}
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} is not a file of answers: remove it, or name another --out") from None
    return rows


def open_part(out: Path, rank: int):
    """The part of this rank, opened for appending after its last complete line. Raises DataError if another process
    has it open."""
    path = out.with_name(f"{out.name}.part-{rank}")
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lockf lock would end when read_answers closes the file
    except OSError:
        raise DataError(f"{out}: another process is answering into it") from None
    file.truncate(len(read_complete_lines(path)))
    return file
