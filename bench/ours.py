"""This project's side of a comparison: the plain model, or the model that `fast.accelerate` has accelerated."""

import time
from collections.abc import Callable
from itertools import count

import torch

import train
from bench.models import Job, make_batch
from fast.accelerate import accelerate
from fast.compile import compile_decoding, compile_layers
from formats.weights import choose_dtype, load_model
from llava import generate
from training import sharding
from training.flags import read_flags
from training.ranks import Distributed


def make_step(side: str, job: Job) -> Callable[[], float]:
    """Return a function that does a step of train.py and returns its loss."""
    flags = ["--stage", "1" if job.way == "stage1" else "2", "--model", job.folder]
    flags += ["--dtype", job.dtype, "--device", job.device, "--lr", "1e-5"]
    if "lora" in job.way:
        flags += ["--lora", "llm", "--bits", "4" if job.way == "qlora" else "16"]
    args, ranks = read_flags("", flags), Distributed(job.device)
    ranks.print0 = lambda text: None
    model = load_model(job.folder, job.device, torch.float32, bits=args.bits)
    train.choose_trainable(model, args.train)
    train.add_adapters(args, model)
    sharding.cast_weights(model, args.shard, torch.float32, choose_dtype(args.dtype, ranks.device.type))
    model.train()
    if side == "fast":
        accelerate(model, job.only and set(job.only))
    if job.compiled:
        compile_layers(model)
    optimizer, batch, steps = train.make_optimizer(model, args, ranks), make_batch(model.config, job), count()

    def step() -> float:
        return train.train_step(args, ranks, model, optimizer, [batch], next(steps))["loss"]

    return step


def make_answerer(side: str, job: Job, prompts: list[list[int]], pixels: torch.Tensor | None) -> tuple:
    """Return the first 500 logits after each prompt, and a function that decodes a number of tokens greedily.

    The function returns the time of each token. The model is as sample.py loads it, except that no token ends an
    answer. All prompts have the same length.
    """
    model = load_model(job.folder, job.device, getattr(torch, job.dtype), bits=job.bits).eval()
    model.config.eos_token_ids = []
    if side == "fast":
        accelerate(model, job.only and set(job.only))
    if job.compiled:
        compile_decoding(model)

    @torch.inference_mode()
    def decode(tokens: int) -> list[float]:
        features = None if pixels is None else model.vision_features(pixels)
        # generate() waits for the device to hand the ids over
        return [time.perf_counter() for _ in generate(model, prompts, features, max_new_tokens=tokens)]

    with torch.inference_mode():
        features = None if pixels is None else model.vision_features(pixels)
        hidden = model.language_model.model(model.embed(torch.tensor(prompts, device=model.device), features))
        logits = model.language_model.lm_head(hidden[:, -1])[:, :500].float().flatten().tolist()
    return logits, decode
