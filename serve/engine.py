"""Continuous batching: one thread owns the model and answers many requests at once.

Each step chooses the next token of every request and reads these tokens in one pass. Between two steps finished and
cancelled requests leave, and one that waits may join. All rows of the batch end in the same column of one KVCache:

    column   0 1 2 3 4 5
    row 0    a b c d e f
    row 1    . . . a b c     padding at the left, masked as in llava.generate
    row 2    . . . . a b

A row that joins or leaves moves the columns of the others, which changes no number in them: keys are stored rotated to
their positions, which are counted from a row's first real token. So each request gets the ids it would get alone.
"""

import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from data import PreparedImage
from inputs.tokenizer import Tokenizer
from llava import KVCache, Llava, sample_token
from variants.cross_attention import pack_images

ROOM = 64  # free columns of a packed cache: it is copied each time they are used up


@dataclass(eq=False)
class Job:
    """A prompt with its images, how it is answered, and its state while it is."""

    prompt: list[int]
    images: list[PreparedImage]
    max_tokens: int  # at most as many as the context has room for
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()  # texts that end the answer and are no part of it
    # Called on the engine's thread with each new piece of the answer and "", the last time with the reason: "stop",
    # "length", "cancelled" or "error".
    send: Callable[[str, str], None] = lambda piece, reason: None
    cancelled: bool = False  # set by Engine.cancel
    ids: list[int] = field(default_factory=list)  # of the answer so far, the end token included
    text: str = ""  # what was sent
    read: int = 0  # number of tokens in the cache
    logits: Tensor | None = None  # (1, V), of the next token
    generator: torch.Generator | None = None


class Engine:
    """Answers jobs in a thread of its own, at most `rows` at a time; further ones wait in order."""

    def __init__(self, model: Llava, tokenizer: Tokenizer, rows: int):
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.waiting: deque[Job] = deque()
        self.calls: deque[tuple[Callable, Future]] = deque()
        self.active: list[Job] = []  # row by row
        self.cache: KVCache | None = None  # of the active jobs; None without any
        self.changed, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, job: Job):
        """Let a job wait for its turn."""
        with self.changed:
            self.waiting.append(job)
            self.changed.notify()

    def cancel(self, job: Job):
        """End a job before its next token. Without effect if it has ended."""
        job.cancelled = True

    def call(self, function: Callable):
        """Return function(), called between two steps: hooks of the model may keep state during a pass."""
        future = Future()
        with self.changed:
            if self.closed:
                raise RuntimeError("the engine is closed")
            self.calls.append((function, future))
            self.changed.notify()
        return future.result()

    def close(self):
        """End the thread after the step that it is in."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()
        for _, future in self.calls:
            future.cancel()

    @torch.inference_mode()
    def run(self):
        """The thread: one step after another while there are jobs."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.waiting or self.active or self.calls)
            if self.closed:
                return
            while self.calls:
                function, future = self.calls.popleft()
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            try:
                self.admit()
                self.step()
            except Exception:  # too little memory, say: the batch is lost, the server goes on
                traceback.print_exc()
                jobs, self.active, self.cache = self.active, [], None
                for job in jobs:
                    job.send("the model failed; see the server's log", "error")

    def admit(self):
        """Read the prompt of the job that waits longest, if a row is free; one a step, so that others go on."""
        with self.changed:  # another thread adds to the queue
            cancelled = [job for job in self.waiting if job.cancelled]
            for job in cancelled:
                self.waiting.remove(job)
        for job in cancelled:
            job.send("", "cancelled")
        if not self.waiting or len(self.active) == self.rows:
            return
        job = self.waiting.popleft()
        try:
            cache = self.read_prompt(job)
        except Exception:
            traceback.print_exc()
            job.send("the prompt could not be read; see the server's log", "error")
            return
        self.active.append(job)
        self.pack(range(len(self.active) - 1), cache)

    def read_prompt(self, job: Job) -> KVCache:
        """The cache of a prompt that is read alone, as llava.generate does it; sets the logits of the first token."""
        model, config, features = self.model, self.model.config, None
        if job.images:
            features = model.vision_features(torch.cat([image.pixels for image in job.images]).to(model.device))
        decoder = model.language_model.model
        cache = KVCache(config.text_config, 1, len(job.prompt), like=decoder.embed_tokens.weight)
        prompt = torch.tensor([job.prompt], device=model.device)
        hidden = decoder(model.embed(prompt, features, [image.size for image in job.images]), None, cache)
        job.logits, job.read, job.images = model.language_model.lm_head(hidden[:, -1]), len(job.prompt), []
        job.generator = torch.Generator(model.device).manual_seed(job.seed)
        return cache

    def step(self):
        """Choose the next token of every row, let those leave that end with it, and read the tokens of the others."""
        kept = [row for row, job in enumerate(self.active) if self.try_choose(job)]
        if len(kept) < len(self.active):
            self.active = [self.active[row] for row in kept]
            self.pack(kept)
        if not kept:
            return
        decoder, head, cache = self.model.language_model.model, self.model.language_model.lm_head, self.cache
        cache.grow(cache.used + ROOM if cache.used == cache.length else cache.length)
        ids = torch.tensor([[job.ids[-1]] for job in self.active], device=self.model.device)
        padding = torch.tensor([cache.used - job.read for job in self.active], device=self.model.device)
        hidden = decoder(decoder.embed_tokens(ids), padding, cache)  # (B, 1, C)
        for job, logits in zip(self.active, head(hidden[:, -1])):
            job.logits, job.read = logits[None], job.read + 1

    def try_choose(self, job: Job) -> bool:
        """As `choose`; an error ends this job alone."""
        try:
            return self.choose(job)
        except Exception:
            traceback.print_exc()
            job.send("the model failed; see the server's log", "error")
            return False

    def choose(self, job: Job) -> bool:
        """Choose a job's next token and send the text that is new. Returns False if the job ends."""
        if job.cancelled:
            job.send("", "cancelled")
            return False
        config = self.model.config
        if config.image_token_index < job.logits.shape[-1]:
            job.logits[:, config.image_token_index] = -torch.inf  # a placeholder is never an answer
        token = int(sample_token(job.logits, job.temperature, job.top_k, job.top_p, job.generator))
        job.ids.append(token)
        text = self.tokenizer.decode(job.ids).lstrip()
        found = [text.index(stop) for stop in job.stops if stop in text]
        ends = found or token in config.eos_token_ids
        reason = "stop" if ends else "length" if len(job.ids) == job.max_tokens else ""
        starts = (stop[:n] for stop in job.stops for n in range(1, len(stop)))
        if not reason and text.endswith(("\ufffd", *starts)):
            return True  # a part of a character, or perhaps of a text that ends the answer: wait for the rest
        text = text[: min(found, default=None)]
        piece, job.text = text[len(job.text) :], text
        if piece or reason:
            job.send(piece, reason)
        return not reason

    def pack(self, kept: list[int] | range, joining: KVCache | None = None):
        """Keep some rows of the cache and add the one of a prompt, in as few columns as the longest row needs."""
        parts = [(self.cache, list(kept), self.cache.used)] if kept else []
        parts += [(joining, [0], joining.used)] if joining else []
        used = max((job.read for job in self.active), default=0)
        packed = parts[0][0] if parts else None
        for i in range(self.model.config.text_config.num_hidden_layers if parts else 0):
            front = getattr(packed, "front", 0)  # see variants/tuning.py
            packed.keys[i] = torch.cat([align(cache.keys[i], rows, end, used, front) for cache, rows, end in parts])
            packed.values[i] = torch.cat([align(cache.values[i], rows, end, used, front) for cache, rows, end in parts])
        if packed and hasattr(packed, "image_rows"):  # see variants/image_lora.py
            packed.image_rows = torch.cat([cache.image_rows[rows] for cache, rows, _ in parts])
        if packed:
            packed.images = pack_images([(cache, rows) for cache, rows, _ in parts])
            packed.used, packed.length = used, used + ROOM
        self.cache = packed


def align(stored: Tensor, rows: list[int], end: int, used: int, front: int) -> Tensor:
    """Rows of stored keys or values (B, KV, L, D), moved from column `end` to `used`: (b, KV, front + used + ROOM, D).

    Args: front: slots of virtual tokens, which stay where they are and are no columns.
    """
    columns = stored[rows, :, front + max(0, end - used) : front + end]
    aligned = F.pad(columns, (0, 0, used - columns.shape[2], ROOM))
    return torch.cat([stored[rows, :, :front], aligned], dim=2) if front else aligned
