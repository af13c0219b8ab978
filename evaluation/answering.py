"""Answering a list of questions: in batches, on every rank, so that a kill loses no answer and changes none.

Which questions share a batch depends on the whole list alone, never on what is answered already: an answer comes out
bit for bit the same whatever stopped the run before, and on however many ranks it goes on.

    OUT              all answers in the order of the questions, once they are all there
    OUT.part-0, ...  those of each rank until then, a line each, a batch at a time
    MANIFEST         everything the answers depend on; with another one, OUT is not gone on with
"""

import fcntl
import glob
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy
import PIL
import torch
from tqdm import tqdm

from data import load_image, prompt_ids
from inputs.files import fingerprint, read_complete_lines, read_json, write_atomic, write_json
from inputs.images import BadImage, check_file, resolve_inside
from inputs.records import DataError
from inputs.templates import TEMPLATES, stop_text
from inputs.tokenizer import Tokenizer
from llava import Llava, generate
from training.meters import peak_memory
from training.ranks import Distributed

# ---------------------------------------------------------------------------------------------------------------------
# one batch


@dataclass
class Cost:
    """What answering took, over the batches of this process: under torchrun those of its rank, and of a run that goes
    on where it was stopped those that were left. Seconds count from when the pictures are read."""

    questions: int = 0
    visual_tokens: int = 0
    prompt_tokens: int = 0  # placeholders of pictures included
    new_tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)  # seconds to the first token of each batch

    def columns(self, device: str) -> dict[str, float]:
        """Means per question, seconds per batch, tokens per second of all rows together, memory at its peak in GB."""
        if not self.questions:
            return {}
        return {
            "questions": self.questions,
            "visual tokens": self.visual_tokens / self.questions,
            "prompt tokens": self.prompt_tokens / self.questions,
            "new tokens": self.new_tokens / self.questions,
            "seconds to first token": sum(self.first) / len(self.first),
            "tokens/s": self.new_tokens / self.seconds,
            "peak GB": peak_memory(torch.device(device)) / 1e9,
        }


def answer_batch(
    model: Llava, tokenizer: Tokenizer, questions: list[dict], images: Path, max_new_tokens: int, cost: Cost
) -> list[str]:
    """Greedy answers to a batch of questions, each the same as if it had been asked alone, as long as the longest
    prompt of the batch leaves room for max_new_tokens in the model's context: what is left for it is left for all.

    A question with "blank" is shown the mean color; what can still be answered, the language alone gave away.
    """
    config, pictures, prompts = model.config, [], []
    for question in questions:
        shown = [load(images, question, config)] if question.get("image") else []
        tokens = [picture.tokens for picture in shown]
        prompts.append(prompt_ids([question["text"]], [], len(shown), tokenizer, config.template, tokens))
        if len(prompts[-1]) >= (limit := config.text_config.max_position_embeddings):
            what = f"{len(prompts[-1]):,} tokens long, picture included; the context holds {limit:,}"
            raise DataError(f"question {question['question_id']}: its prompt is {what}")
        pictures += shown
        cost.visual_tokens += sum(tokens)
        cost.prompt_tokens += len(prompts[-1])
    begin = time.perf_counter()
    features, sizes = None, [picture.size for picture in pictures]
    if pictures:
        pixels = torch.cat([picture.pixels for picture in pictures])
        with torch.inference_mode():
            features = model.vision_features(pixels.to(model.device))
    ids = [[] for _ in questions]
    for step in generate(model, prompts, features, sizes, max_new_tokens=max_new_tokens):
        if not ids[0]:
            cost.first.append(time.perf_counter() - begin)
        for row, token in zip(ids, step):
            if token is not None:
                row.append(token)
    cost.seconds += time.perf_counter() - begin
    cost.questions += len(questions)
    cost.new_tokens += sum(map(len, ids))
    texts, end = [tokenizer.decode(row).lstrip() for row in ids], stop_text(config.template)
    return [(text.split(end)[0] if end else text).strip() for text in texts]


def load(images: Path, question: dict, config):
    """A question's picture, ready for the tower. Raises DataError naming the question."""
    if config.vision_config is None:
        raise DataError(f"question {question['question_id']} has a picture, but the model has no vision tower")
    try:
        picture = load_image(images, question["image"], config)
    except BadImage as error:
        raise DataError(f"question {question['question_id']}: {error}") from None
    if question.get("blank"):
        picture.pixels = torch.zeros_like(picture.pixels)
    return picture


def hash_images(questions: list[dict], images: Path) -> str:
    """Raise DataError if a picture is not there: now, not after hours. Returns a hash of their names and sizes in bytes
    (the content of 80,000 would take minutes)."""
    wrong, sizes = [], {}
    for question in questions:
        try:
            if question.get("image"):
                path = resolve_inside(images, question["image"])
                check_file(path)
                sizes[question["image"]] = path.stat().st_size
        except BadImage as error:
            wrong.append(f"question {question['question_id']}: {error}")
    if wrong:
        raise DataError(wrong[0] + (f" (and {len(wrong) - 1:,} more pictures cannot be read)" if wrong[1:] else ""))
    return sha256(json.dumps(sorted(sizes.items())).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# all of them


def batches_of(questions: list[dict], size: int) -> list[list[dict]]:
    """Questions of like length together, those with pictures apart, the longest first: if memory is short, it shows."""
    order = sorted(questions, key=lambda question: (not question.get("image"), -len(question["text"])))
    return [order[i : i + size] for i in range(0, len(order), size)]


ROW = ("question_id", "prompt", "text", "answer_id", "model_id", "metadata")  # LLaVA's


def answered(out: Path) -> dict[int | str, dict]:
    """The answers a stopped run left, by question. Raises DataError if its files hold anything else."""
    rows = {}
    for path in (out, *parts(out)):
        try:
            found = [json.loads(line) for line in read_complete_lines(path).split(b"\n") if line]
            complete = all(row.keys() >= set(ROW) for row in found)
        except (ValueError, AttributeError):
            complete = False
        if not complete:
            raise DataError(f"{path} holds something else than answers: remove it, or name another --out")
        rows |= {row["question_id"]: row for row in found}
    return rows


def parts(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.part-*"))


def answer_all(
    questions: list[dict],
    out: Path,
    batch_size: int,
    name: str,
    ask: Callable[[list[dict]], list[str]],
    describe: Callable[[dict, str], dict],
    ranks: Distributed | None = None,
) -> list[dict]:
    """Answer what is not answered yet; returns all rows in the order of the questions (on rank 0; elsewhere none).

    Args: name: of the model, for the rows; ask: answers of a batch; describe: a row's metadata, from its question and
    answer.
    """
    rank, world = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    done, asked = answered(out), {question["question_id"]: question["text"] for question in questions}
    if any(asked.get(key) != row["prompt"] or row["model_id"] != name for key, row in done.items()):
        raise DataError(f"{out} holds answers to other questions, or another model's: remove it, or name another --out")
    mine = batches_of(questions, batch_size)[rank::world]
    with open_part(out, rank) as file, tqdm(total=sum(map(len, mine)), unit="answer", disable=rank > 0) as bar:
        for batch in mine:
            if any(question["question_id"] not in done for question in batch):
                rows = [row_of(q, text, name, describe(q, text)) for q, text in zip(batch, ask(batch), strict=True)]
                rows = [row for row in rows if row["question_id"] not in done]
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
                file.flush()
            bar.update(len(batch))
        if ranks:
            ranks.all_reduce_sum(1)  # all are done
        rows = publish(questions, out) if rank == 0 else []
    if ranks:
        ranks.all_reduce_sum(1)  # and rank 0 has read what they wrote
    return rows


def row_of(question: dict, text: str, name: str, metadata: dict) -> dict:
    key = question["question_id"]
    return dict(zip(ROW, (key, question["text"], text, f"{name}-{key}", name, metadata)))


def open_part(out: Path, rank: int):
    """This rank's part, cut back to whole lines, at its end. Raises DataError if another process writes to it."""
    path = out.with_name(f"{out.name}.part-{rank}")
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf would let go as soon as the file is read beside it
    except OSError:
        raise DataError(f"{out}: another process is answering into it") from None
    file.truncate(len(read_complete_lines(path)))
    return file


def publish(questions: list[dict], out: Path) -> list[dict]:
    """Put all answers into one file, in the order of the questions, in one step; then the parts can go."""
    rows = answered(out)
    rows = [rows[question["question_id"]] for question in questions]
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    for path in parts(out):
        path.unlink()
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# what it all depends on

MODEL_FILES = ("config.json", "adapter_config.json", "*.safetensors", "*.bin", "*.model", "tokenizer*.json", "vocab*")


def model_files(folder: Path) -> list[Path]:
    return sorted({path for name in MODEL_FILES for path in folder.glob(name)})


def hashes(paths: list[Path]) -> list[str]:
    """SHA-256 and name of every file, of a folder those of its text files."""
    files = [file for path in paths for file in (sorted(path.rglob("*.txt")) if path.is_dir() else [path])]
    return [f"{fingerprint(file)['sha256']} {file.name}" for file in files]


CODE = (
    "clip llava lora data fast/accelerate fast/attention fast/linear fast/quantized variants/anyres inputs/images "
    "inputs/templates inputs/tokenizer inputs/bpe formats/weights formats/tensors formats/layouts formats/configs "
    "formats/adapters evaluation/answering"
)


def code_hash(folder: Path = Path(__file__).parents[1]) -> str:
    """SHA-256 of the modules that answers come through; what becomes of them, or trains models, is none."""
    return sha256(b"".join((folder / f"{name}.py").read_bytes() for name in CODE.split())).hexdigest()


def manifest_of(folders: list[Path], files: list[Path], model: Llava, settings: dict) -> dict:
    """Everything the answers depend on, and nothing else: no times, no paths, so that two runs write the same.

    Args: folders: of the model, and of what is laid over it; files: the questions; settings: what was chosen.
    """
    template = model.config.template
    device = model.device
    return settings | {
        "model": [{"name": folder.name, "files": hashes(model_files(folder))} for folder in folders],
        "questions": hashes(files),
        "template": template,
        "template_sha256": sha256(repr(TEMPLATES[template]).encode()).hexdigest(),
        "image_mode": "anyres" if model.config.image_grid_pinpoints else model.config.image_mode,
        "decoding": "greedy",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "pillow": PIL.__version__,
            "code_sha256": code_hash(),
        },
    }


def keep_manifest(path: Path, out: Path, folders: list[Path], files: list[Path], model: Llava, settings: dict):
    """Write the manifest beside the answers. Raises DataError if there are some that were made in another way."""
    values = manifest_of(folders, files, model, settings)
    started = out.exists() or bool(parts(out))
    if started and path.exists():
        old = read_json(path)
        was, now = ({**kept, **(kept.get("versions") or {}), "versions": None} for kept in (old, values))
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key):
                raise DataError(f"{out} was begun with another {key} (see {path}): remove both, or name another --out")
    elif started:
        raise DataError(f"{out}: no {path.name} says how these answers were made: remove it, or name another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, values)


def show_cost(cost: Cost, path: Path, device: str):
    """Print what answering took and keep it in a file of its own: it is another each time."""
    if columns := cost.columns(device):
        write_json(path, columns)
        shown = (
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3g}" for name, value in columns.items()
        )
        print("  ".join(shown), file=sys.stderr)
