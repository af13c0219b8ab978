"""The timed work of each kind of row, with the models of ours.py or theirs.py, and the process that a side does it in.

A kind of work is a function that warms up and returns (numbers, measure): results to compare with those of the other
sides, and a function that does the work once and returns its cost: the seconds for one unit of work (a sample, a token)
and the peak memory in bytes, where it is counted.
"""

import importlib
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch

from bench.models import Job, make_batch
from formats.configs import read_config

Contender = tuple[list[float], Callable[[], tuple[float, int]]]


def time_call(call: Callable, device: str = "cpu") -> float:
    """Return the seconds that a call takes until the device has finished."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda device: None
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def training(library, side: str, job: Job) -> Contender:
    """A training step: forward, backward, clipping, AdamW. The losses of the first step are compared."""
    importlib.import_module("torch._dynamo")  # optimizers import it, and imports do not count as memory
    before = process_memory("VmRSS")
    step = library.make_step(side, job)

    def measure() -> tuple[float, int]:
        seconds = time_call(step, job.device) / job.shape.rows
        if job.device.startswith("cuda"):
            return seconds, torch.cuda.max_memory_allocated(job.device)
        return seconds, process_memory("VmHWM") - before

    return [step()], measure


def process_memory(field: str) -> int:
    """Return this process's memory in bytes as the kernel counts it: VmRSS is the current one, VmHWM the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def first_token(library, side: str, job: Job) -> Contender:
    """From pixels and ids to the first token of an answer."""
    batch = make_batch(read_config(Path(job.folder)), job)
    prompt = batch["input_ids"][0, : -job.shape.supervised].tolist()  # a training row without its answer
    pixels = batch["pixel_values"][:1].to(job.device, getattr(torch, job.dtype))
    logits, decode = library.make_answerer(side, job, [prompt], pixels)
    decode(1)
    return logits, lambda: (time_call(partial(decode, 1), job.device), 0)


def decoding(library, side: str, job: Job) -> Contender:
    """The median step of decoding, which gives one token for each row."""
    prompts = torch.randint(0, 256, (job.batch, 16), generator=torch.Generator().manual_seed(0)).tolist()
    logits, decode = library.make_answerer(side, job, prompts, None)

    def measure() -> tuple[float, int]:
        times = decode(32 if job.batch == 1 else 12)
        return median(after - before for before, after in pairwise(times)) / job.batch, 0

    measure()  # with job.compiled, this compiles
    return logits, measure


KINDS = {  # work and unit of each kind of row
    "train": (training, "samples/s"),
    "first_token": (first_token, "ms"),
    "decode": (decoding, "tokens/s"),
}


def make_contender(side: str, job: Job) -> Contender:
    work, _ = KINDS[job.kind]
    return work(importlib.import_module("bench.theirs" if side == "theirs" else "bench.ours"), side, job)


# ---------------------------------------------------------------------------------------------------------------------
# processes


class Worker:
    """A contender in a process of its own: in one process, the sides would share torch's allocator and slow each other.

    numbers: to compare with those of the other sides; bytes: its peak memory so far. Raises ValueError with the error's
    first line if the process fails.
    """

    def __init__(self, side: str, job: Job):
        self.side, context = side, multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=serve, args=(other_end, side, job))
        self.process.start()
        other_end.close()
        self.numbers = self.receive()

    def receive(self) -> list[float] | tuple[float, int]:
        """Return the next message of the process; a string is an error."""
        try:
            message = self.pipe.recv()
        except EOFError:
            message = "the process was killed"
        if isinstance(message, str):
            self.close()
            raise ValueError(f"{self.side}: {message}")
        return message

    def seconds(self) -> float:
        """Do the work once; return its duration for one unit of work."""
        self.pipe.send("run")
        seconds, self.bytes = self.receive()
        return seconds

    def close(self):
        self.pipe.close()
        self.process.join()


def serve(pipe: Connection, side: str, job: Job):
    """Make the contender, in the worker's process, and run it once for every message until the pipe is closed."""
    os.dup2(2, 1)  # standard output is for the table only
    try:
        numbers, measure = make_contender(side, job)
        pipe.send(numbers)
        while pipe.recv():
            pipe.send(measure())
    except EOFError:
        return
    except Exception as error:  # other people's libraries raise anything
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])
