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
from inputs.records import DataError, Turn, image_paths, question_turn
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


def report_cut(cost: Cost, max_new_tokens: int, ranks: Distributed):
    """Print how many answers of all ranks were cut."""
    cut, given = ranks.all_reduce_sum(cost["cut answers"], cost["questions"])
    if cut and ranks.is_main:
        reason = f"were cut at --max-new-tokens {max_new_tokens} or at the context's end"
        print(f"{cut:,} of the {given:,} answers given now {reason}", file=sys.stderr)


def image_names(question: dict) -> list[str]:
    return image_paths(question) if question.get("image") else []


def load_question_images(images: Path, question: dict, config: LlavaConfig) -> list[PreparedImage]:
    """The images of a question, all zero (the mean color) if the question says "blank". Raises DataError."""
    if (names := image_names(question)) and config.vision_config is None:
        raise DataError(f"question {question['question_id']} has an image, but the model has no vision tower")
    try:
        prepared = [load_image(images, name, config) for name in names]
    except BadImage as error:
        raise DataError(f"question {question['question_id']}: {error}") from None
    for image in prepared if question.get("blank") else []:
        image.pixels = torch.zeros_like(image.pixels)
    return prepared


def prepare_question(
    question: dict, images: Path, tokenizer: Tokenizer, config: LlavaConfig
) -> tuple[list[int], list[PreparedImage]]:
    """Prompt and images of a question, by the renderer and the image pipeline of training. Raises DataError."""
    own = load_question_images(images, question, config)
    turn = question_turn(question["text"], len(own)) if own else Turn(question["text"], None)
    prompt, _ = render_dialogue([turn], tokenizer, config.template, [image.tokens for image in own])
    if len(prompt) >= (limit := config.text_config.max_position_embeddings):
        reason = f"{len(prompt):,} tokens long, image included; the context holds {limit:,}"
        raise DataError(f"question {question['question_id']}: its prompt is {reason}")
    return prompt, own


def answer_batch(
    model: Llava, tokenizer: Tokenizer, questions: list[dict], images: Path, max_new_tokens: int, cost: Cost
) -> list[str]:
    """Greedy answers to a batch of questions."""
    prepared = [prepare_question(question, images, tokenizer, model.config) for question in questions]
    return answer_prompts(model, tokenizer, prepared, max_new_tokens, cost)


def answer_prompts(
    model: Llava,
    tokenizer: Tokenizer,
    questions: list[tuple[list[int], list[PreparedImage]]],
    max_new_tokens: int,
    cost: Cost,
    **sampling,
) -> list[str]:
    """Answers to a batch of prompts with their images; greedy without `sampling`, arguments of `generate`.

    Each greedy answer is equal to the answer without the batch, if the longest prompt leaves max_new_tokens of the
    context; otherwise all answers may have only as many tokens as the longest prompt leaves.
    """
    config, prompts = model.config, [prompt for prompt, _ in questions]
    prepared = [image for _, own in questions for image in own]
    start, features = time.perf_counter(), None
    if prepared:
        with torch.inference_mode():
            features = model.vision_features(torch.cat([image.pixels for image in prepared]).to(model.device))
    sizes, ids, first = [image.size for image in prepared], [[] for _ in questions], None
    for step in generate(model, prompts, features, sizes, max_new_tokens=max_new_tokens, **sampling):
        first = first or time.perf_counter()
        for row, token in zip(ids, step):
            if token is not None:
                row.append(token)
    end = time.perf_counter()
    visual = sum(image.tokens for image in prepared) * getattr(model, "visual_token_share", 1)  # fastv: mean of layers
    cost.update({"batches": 1, "questions": len(questions), "visual tokens": visual})
    cost.update({"prompt tokens": sum(map(len, prompts)), "new tokens": sum(map(len, ids))})
    cost.update({"seconds": end - start, "seconds to first token": (first or end) - start})
    texts, stop = [tokenizer.decode(row).lstrip() for row in ids], stop_text(config.template)
    ended = [bool({*row} & {*config.eos_token_ids} or (stop and stop in text)) for row, text in zip(ids, texts)]
    cost["cut answers"] += ended.count(False)
    return [(text.split(stop)[0] if stop else text).strip() for text in texts]


ROW_KEYS = ("question_id", "prompt", "text", "answer_id", "model_id", "metadata")  # of LLaVA's answer files


def llava_row(model_name: str, describe: Callable[[dict, str], dict], question: dict, text: str) -> dict:
    """A row of LLaVA's answer files. Args: describe: its metadata, from question and answer."""
    key = question["question_id"]
    row = {"question_id": key, "prompt": question["text"], "text": text, "answer_id": f"{model_name}-{key}"}
    return row | {"model_id": model_name, "metadata": describe(question, text)}


def answer_all(
    questions: list[dict],
    out: Path,
    batch_size: int,
    model_name: str,
    ask: Callable[[list[dict]], list],
    make_row: Callable[[dict, str], dict],
    ranks: Distributed,
    keys: tuple[str, ...] = ROW_KEYS,
) -> list[dict]:
    """Answer the questions that have no answer in `out` yet. Returns all rows in the order of the questions on rank 0,
    and an empty list on the others.

    Args: ask: the answers to a batch; make_row: a row of `out` from a question and its answer; keys: that every row
    has, the first one with the question's id.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    done, texts = read_answers(out, keys), {question["question_id"]: question["text"] for question in questions}
    if any(
        texts.get(key) != row["prompt"] or row.get("model_id", model_name) != model_name for key, row in done.items()
    ):
        raise DataError(f"{out} holds answers to other questions or of another model: remove it, or name another --out")
    # Questions of similar length share a batch; the longest come first, so that too little memory shows at once.
    order = sorted(questions, key=lambda question: (-len(image_names(question)), -len(question["text"])))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][ranks.rank :: ranks.world_size]
    count, is_main = sum(map(len, batches)), ranks.rank == 0
    with open_part(out, ranks.rank) as file, tqdm(total=count, unit="answer", disable=not is_main) as bar:
        for batch in batches:
            if any(question["question_id"] not in done for question in batch):
                for question, text in zip(batch, ask(batch), strict=True):
                    if question["question_id"] not in done:
                        file.write(to_line(make_row(question, text)))
                file.flush()
            bar.update(len(batch))
        ranks.all_reduce_sum(1)  # wait until every rank has answered its batches
        rows = []
        if is_main:  # write all answers in one step, then delete the parts
            done = read_answers(out, keys)
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
    """A row in UTF-8. Half a surrogate pair, from a file name that is not UTF-8, becomes JSON's own escape."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def part_files(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.part-*"))


def read_answers(out: Path, keys: tuple[str, ...]) -> dict[int | str, dict]:
    """The rows that exist so far, by question. Raises DataError if a file holds anything but rows with these keys."""
    rows = {}
    for path in (out, *part_files(out)):
        try:
            for line in filter(None, read_complete_lines(path).split(b"\n")):
                row = json.loads(line)
                if not row.keys() >= set(keys):
                    raise ValueError("another kind of row")
                rows[row[keys[0]]] = row
        except (ValueError, AttributeError, TypeError):
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
