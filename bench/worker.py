"""Run each side in a process of its own, which waits while another side is timed.

In one process the sides would share torch's allocator, and each would slow the others down.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bench.contenders import make_contender
from bench.models import Job, image_files

REPOSITORY = Path(__file__).resolve().parents[1]


class Worker:
    """A contender in another process, with its numbers and amount. bytes: its peak memory so far.

    Raises ValueError with the error's first line if the process fails.
    """

    def __init__(self, side: str, job: Job):
        self.side, context = side, multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=serve, args=(other_end, side, job))
        self.process.start()
        other_end.close()
        self.numbers, self.amount = self.receive()

    def receive(self) -> tuple:
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
        """Do the work once; return its duration."""
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
        modules = ["bench.theirs", "transformers.models.llava.modeling_llava"] if side == "theirs" else ["bench.ours"]
        for name in ("torch._dynamo", *modules):  # before memory is counted; optimizers import torch._dynamo
            importlib.import_module(name)
        before, gpu = process_memory("VmRSS"), job.device.startswith("cuda")
        contender = make_contender(side, job)
        pipe.send((contender.numbers, contender.amount))
        while pipe.recv():
            seconds = contender.seconds()
            peak = torch.cuda.max_memory_allocated(job.device) if gpu else process_memory("VmHWM") - before
            pipe.send((seconds, peak))
    except EOFError:
        return
    except Exception as error:  # other people's libraries raise anything
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


def process_memory(field: str) -> int:
    """Return this process's memory in bytes as the kernel counts it: VmRSS is the current one, VmHWM the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


# ---------------------------------------------------------------------------------------------------------------------
# a cold start

# Runs a program and prints its peak memory. The bench cannot run it directly: a child's counter begins at the size of
# its parent, and the bench is large.
LAUNCHER = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(status)
"""
THEIR_ANSWER = """
import sys, torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, path, device, dtype = sys.argv[1:]
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
processor = AutoProcessor.from_pretrained(folder)
text = "USER: <image>\\nWhat is this? ASSISTANT:"
inputs = processor(images=Image.open(path), text=text, return_tensors="pt").to(device, getattr(torch, dtype))
ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(processor.decode(ids[0, -1:]).encode())
"""


class ColdStart:
    """A new process each time: import, load, read an image, answer with one token. bytes: its peak memory.

    The answers are not compared, because ours and theirs put the question into different words.
    """

    numbers, amount = [0.0], 1.0

    def __init__(self, side: str, job: Job):
        (image,) = image_files(Path(job.folder).parent / "images", 1)
        program = ["sample.py", "--model", job.folder, "--image", str(image), "--prompt", "What is this?"]
        program += ["--max-new-tokens", "1", "--device", job.device, "--dtype", job.dtype]
        program += ["--no-fast"] if side == "plain" else []
        if side == "theirs":
            program = ["-c", THEIR_ANSWER, job.folder, str(image), job.device, job.dtype]
        self.side, self.command = side, [sys.executable, "-c", LAUNCHER, sys.executable, *program]
        self.seconds()  # warms the disk's cache

    def seconds(self) -> float:
        """Run the process once; return its duration."""
        begin = time.perf_counter()
        done = subprocess.run(self.command, cwd=REPOSITORY, capture_output=True, text=True)
        elapsed = time.perf_counter() - begin
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ValueError(f"{self.side}: {reason} (status {done.returncode})")
        self.bytes = int(done.stdout)
        return elapsed

    def close(self):
        """Do nothing: no process is left."""
