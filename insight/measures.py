"""Measures of a model and a batch, and `LiveCheck`, with which train.py --diagnose N takes them while it trains.

A function find_... returns a sentence for each fault, with the likely cause. docs/diagnosis.md explains the sentences.
"""

import math
import sys
from argparse import Namespace
from collections import defaultdict
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from insight.rebuild import layer_of, part_of, should_train
from llava import IGNORE
from training.ranks import Distributed, autocast

DEAD_SHARE = 0.2  # of a layer's units, above which it is reported
DEAD_RELUS = 0.75  # the same behind a ReLU, of which many may be off: in a healthy resampler 29 to 39 %
SPREAD = 1e5  # largest ratio of gradient norms among the layers of one part
UNITS = ("down_proj", "fc2", "linear_2")  # these layers read the outputs of an activation function
BLIND = "images: the loss is the same with those of other samples. Likely cause: no image reaches the decoder"


def count_labels(batch: dict) -> int:
    return max(1, int((batch["labels"][:, 1:] != IGNORE).sum()))


@contextmanager
def watch(model: nn.Module, names: tuple[str, ...], kinds: tuple, record):
    """Context that calls record(path, x) with every input of the layers called `names` and every output of `kinds`."""
    handles = []
    for path, module in model.named_modules():
        if path.endswith(names):
            handles.append(module.register_forward_pre_hook(lambda _, args, path=path: record(path, args[0].detach())))
        elif isinstance(module, kinds):
            handles.append(module.register_forward_hook(lambda _, args, y, path=path: record(path, y.detach())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradient_norms(model: nn.Module, batch: dict) -> dict[str, dict[str, float]]:
    """Return the gradient norm of each layer that trains, by part, for the loss per token. No .grad is touched."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss, gradients = model(**batch) / count_labels(batch), [None] * len(named)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    norms = defaultdict(lambda: defaultdict(float))
    for name, gradient in zip(named, gradients):
        norm = 0.0 if gradient is None else float(gradient.float().norm())
        norms[part_of(name)][layer_of(name)] = math.hypot(norms[part_of(name)][layer_of(name)], norm)
    return norms


def find_gradients(norms: dict[str, dict[str, float]], has_images: bool) -> list[str]:
    """Args: norms: of gradient_norms; has_images: False excuses the parts that only images reach."""
    found = []
    for part, layers in norms.items():
        zero = [layer for layer, norm in layers.items() if norm == 0]
        blocks = [norm for layer, norm in layers.items() if " layer " in layer]
        if not all(map(math.isfinite, layers.values())):
            found.append(f"{part}: its gradient is not finite. Likely cause: an overflow or a division by zero")
        elif zero and (has_images or part == "decoder"):
            names = "it" if len(zero) == len(layers) else ", ".join(zero)
            found.append(f"{part}: no gradient reaches {names}. Likely cause: an output that is detached or not used")
        elif blocks and max(blocks) > SPREAD * min(blocks):
            text = f"the gradient norms of its layers are between {min(blocks):.1e} and {max(blocks):.1e}"
            found.append(f"{part}: {text}. Likely cause: they vanish or explode; look at the initialization")
    return found


@torch.no_grad()
def find_dead(model: nn.Module, batch: dict) -> list[str]:
    """Units behind an activation function that are zero for every token of a batch.

    A layer without a negative number is taken to be behind a ReLU: GELU and SiLU have some.
    """
    largest, limits, found = {}, {}, []

    def record(path: str, x: torch.Tensor):
        largest[path] = x.abs().flatten(0, -2).amax(0).float()
        limits[path] = DEAD_SHARE if (x < 0).any() else DEAD_RELUS

    with watch(model, UNITS, (), record):
        model(**batch)
    for path, values in largest.items():
        dead = float((values <= 1e-6 * values.max()).float().mean())
        if dead > limits[path]:
            found.append(f"{dead:.0%} of {len(values):,} in {layer_of(path)}")
    cause = "an activation function that stays off, after a large negative bias or too high a rate"
    return [f"dead units: {', '.join(found)} are zero for every token. Likely cause: {cause}"] if found else []


def find_frozen(args: Namespace, model: nn.Module) -> list[str]:
    """Parts that should train, by the flags, and are frozen."""
    frozen = defaultdict(list)
    for name, p in model.named_parameters():
        if should_train(args, model, name):
            frozen[part_of(name)].append(not p.requires_grad)
    parts = [part for part, values in frozen.items() if all(values)]
    return [
        f"{part}: frozen, though the flags say that it trains. Likely cause: requires_grad is False" for part in parts
    ]


def find_labels(batch: dict) -> list[str]:
    """Faults of the labels that show without the records."""
    ids, labels = batch["input_ids"], batch["labels"]
    trained = labels != IGNORE
    if not trained.any():
        return ["labels: no token trains. Likely cause: the mask covers the answers, or they are cut off"]
    if (labels == ids)[trained].all():
        return []
    near = [("before", torch.roll(ids, 1, 1)), ("after", torch.roll(ids, -1, 1))]
    side = [f", but those one place {side}" for side, moved in near if (labels == moved)[trained].float().mean() > 0.9]
    text = f"labels: they are not the tokens at their places{''.join(side)}"
    return [f"{text}. Likely cause: the data shift them, and the model shifts them again"]


@torch.no_grad()
def image_gain(model: nn.Module, batch: dict, tiles: int = 1, images: int = 1) -> float | None:
    """Return by how much the loss per token grows if each sample has the next one's image; None if those are alike.
    Args: tiles, images: of the first sample; all have as many."""
    kinds = [key for key in ("pixel_values", "vision_features") if batch[key] is not None]
    moved = {key: torch.roll(batch[key], -tiles, 0) for key in kinds}
    moved["image_sizes"], losses = batch["image_sizes"][images:] + batch["image_sizes"][:images], []
    for own in (batch, batch | moved):
        torch.manual_seed(0)  # the same dropout
        losses.append(float(model(**own)))  # on all ranks: CLIP's loss compares their images
    if all(torch.equal(moved[key], batch[key]) for key in kinds):
        return None
    return (losses[1] - losses[0]) / count_labels(batch)


class LiveCheck:
    """Checks the live model on the first micro-batch of a step and prints a line for each new fault. Weights, gradients
    and random states stay as they are. Every rank calls it; rank 0 prints."""

    def __init__(self, args: Namespace, ranks: Distributed, model: nn.Module):
        self.args, self.ranks, self.model, self.said = args, ranks, model, set()

    def __call__(self, micro_batches: list[dict], step: int):
        device = self.ranks.device
        batch = {key: v.to(device) if torch.is_tensor(v) else v for key, v in micro_batches[0].items()}
        batch.pop("tasks", None)  # only the objective reads them
        eager = torch.compiler.set_stance("force_eager")  # compiled layers do not call hooks
        with eager, torch.random.fork_rng([device] * (device.type == "cuda")), autocast(device, self.args.dtype):
            sentences = self.find(batch)
        for sentence in sentences:
            if (kind := sentence.split(". ")[0].split(" are ")[0]) not in self.said:
                self.said.add(kind)
                if self.ranks.is_main:
                    tqdm.write(f"step {step}: {sentence}", file=sys.stderr)  # above the progress bar

    def find(self, batch: dict) -> list[str]:
        model, has_images = self.model, any(batch[key] is not None for key in ("pixel_values", "vision_features"))
        found = find_labels(batch) + find_frozen(self.args, model) + find_dead(model, batch)
        found += find_gradients(gradient_norms(model, batch), has_images)
        if has_images and not batch["image_sizes"]:  # tiles of different images may differ in number
            gain = image_gain(model, batch)
            found += [BLIND] if gain is not None and abs(gain) < 1e-6 else []
        return found + self.find_repeated(batch)

    def find_repeated(self, batch: dict) -> list[str]:
        """Ranks that read the same samples. All ranks exchange their ids."""
        if not dist.is_initialized():
            return []
        everyone = [None] * self.ranks.world_size
        dist.all_gather_object(everyone, batch["input_ids"].tolist())
        pairs = [(a, b) for b, ids in enumerate(everyone) for a in range(b) if everyone[a] == ids and len(ids) > 1]
        return [f"ranks {a} and {b}: they read the same samples. Likely cause: both have one rank" for a, b in pairs]
