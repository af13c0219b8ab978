"""The timed work: one function for each kind, which ours.py and theirs.py supply with their models."""

import hashlib
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from bench.models import Job, image_files, make_question
from formats.configs import read_config
from world.language import TURNS
from world.writer import make_records


@dataclass
class Contender:
    """The work of one side, warmed up.

    Args: seconds: does the work once and returns its duration; numbers: results to compare with the other sides;
    amount: units of work in one call (samples, tokens, images, MB).
    """

    seconds: Callable[[], float]
    numbers: list[float]
    amount: float


def make_contender(side: str, job: Job) -> Contender:
    """Load the job's model and inputs, and warm up."""
    return KINDS[job.kind](importlib.import_module("bench.theirs" if side == "theirs" else "bench.ours"), side, job)


def time_call(call: Callable, device: str) -> float:
    """Return the seconds that a call takes until the device has finished."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda device: None
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def training(library, side: str, job: Job) -> Contender:
    """A training step: forward, backward, clipping, AdamW. The losses of the first step are compared."""
    step = library.make_step(side, job)
    return Contender(lambda: time_call(step, job.device), [step()], job.rows)


def first_token(library, side: str, job: Job) -> Contender:
    """From pixels and ids to the first token of an answer."""
    answerer = library.Answerer(side, job)
    prompt, pixels = make_question(read_config(Path(job.folder)), job)
    answer = partial(answerer.decode, [prompt], pixels, 1)
    answer()
    return Contender(lambda: time_call(answer, job.device), answerer.logits([prompt], pixels), 1)


def decoding(library, side: str, job: Job) -> Contender:
    """The median step of decoding, which gives one token for each row."""
    answerer = library.Answerer(side, job)
    prompts = torch.randint(0, 256, (job.batch, 16), generator=torch.Generator().manual_seed(0)).tolist()

    def seconds() -> float:
        times = answerer.decode(prompts, None, 32 if job.batch == 1 else 12)
        return median(after - before for before, after in pairwise(times))

    seconds()  # warms up; with job.compiled, this compiles
    return Contender(seconds, answerer.logits(prompts, None), job.batch)


def images(library, side: str, job: Job) -> Contender:
    """From image files to the tower's input, on one core."""
    paths, load = image_files(Path(job.folder).parent / "images", 16), library.make_image_loader(Path(job.folder))
    return data_contender(lambda: torch.stack([load(path) for path in paths]), len(paths))


def tokenizing(library, side: str, job: Job) -> Contender:
    """From texts to ids, one by one as a dataset encodes them, on one core."""
    records = [record for i in range(1000) for record in make_records(1, i, TURNS)[1]]
    texts = {" ".join(turn["value"] for turn in record["conversations"][1:]) for record in records}  # no text twice,
    texts = sorted(texts)  # because our tokenizer remembers words
    encode = library.make_encoder(Path(job.folder))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return data_contender(lambda: torch.tensor([i for text in texts for i in encode(text)]), megabytes)


def data_contender(call: Callable[[], torch.Tensor], amount: float) -> Contender:
    """Work on one core with results that must be equal bit for bit: a number made of their hash is compared."""
    torch.set_num_threads(1)
    digest = hashlib.sha256(call().contiguous().numpy().tobytes()).digest()
    return Contender(lambda: time_call(call, "cpu"), [float(int.from_bytes(digest[:6]))], amount)


KINDS = {"train": training, "first_token": first_token, "decode": decoding, "images": images, "tokenize": tokenizing}
