"""Check before a run that this machine has enough memory for a training step, and cores that other programs leave free.

The estimate of the memory comes from a dry run: one step on a copy of the model whose tensors have shapes but no data
(torch's FakeTensorMode), in which every allocation is counted. So it follows whatever the model does: activation
recomputation, logits for supervised tokens only, a 4-bit matrix that is dequantized while it is used.
"""

import copy
import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import Records, collate
from inputs.images import BadImage
from inputs.records import DataError
from inputs.samples import Samples
from llava import Llava
from lora import NF4Linear
from training.ranks import Distributed
from training.sharding import trainable_parameters


def available_bytes(device: torch.device) -> int:
    """Free memory of a GPU; of a CPU, all memory of the machine, because the weights are loaded already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_machine(ranks: Distributed, model: nn.Module, shard: str, dtype: torch.dtype, batch: dict | None):
    """Print how much memory a rank needs, and a warning if its cores are busy. Args: those of `estimate`. Raises
    ValueError if weights, gradients and AdamW's states alone exceed the memory."""
    needed = estimate(model, shard, ranks.world_size, dtype, batch)
    available, fixed = available_bytes(ranks.device), needed.weights + needed.gradients + needed.states
    ranks.print0(f"{needed}; {available / 1e9:.3g} GB are available")
    if fixed > available:
        sizes = f"need {fixed / 1e9:.3g} GB per rank, but only {available / 1e9:.3g} GB are available"
        remedies = "--lora llm (with --bits 4), --shard fsdp on more ranks, --weights bfloat16"
        raise ValueError(f"weights, gradients and optimizer states {sizes}. Try: {remedies}")
    if ranks.is_main and (warning := busy_warning(ranks.device, torch.get_num_threads())):
        ranks.print0(warning)


def largest_batch(dataset: Samples, size: int, pad_id: int) -> dict | None:
    """Return a micro-batch of the longest samples; None if none of them can be loaded, which its step will report."""
    lengths = abs(dataset.lengths()) if isinstance(dataset, Records) else range(len(dataset))
    samples = []
    for index in np.argsort(lengths)[::-1][:size]:
        with suppress(DataError, BadImage):
            samples.append(dataset.sample(int(index)))
    return collate((samples * size)[:size], pad_id) if samples else None


@dataclass
class Estimate:
    """Bytes on one rank. step: the peak of gradients and activations together, at most their sum, because the backward
    pass frees activations while it allocates gradients. peak: the peak of everything."""

    weights: int
    gradients: int
    states: int
    activations: int
    step: int
    peak: int

    def __str__(self) -> str:
        sizes = [self.weights, self.gradients, self.states, self.activations, self.peak]
        form = "weights {:.3g} + gradients {:.3g} + optimizer states {:.3g} + activations {:.3g} GB, peak {:.3g} GB"
        return "estimated memory per rank: " + form.format(*(size / 1e9 for size in sizes))


def estimate(model: nn.Module, shard: str, world: int, dtype: torch.dtype, batch: dict | None) -> Estimate:
    """Estimate the memory of one training step on one rank.

    Args: shard: one of sharding.MODES. world: number of ranks. dtype: of the computation.
    batch: the largest micro-batch, as the model's forward takes it; with None, activations count as 0.
    """
    parts, state_parts = {"ddp": (1, 1), "zero1": (1, world), "fsdp": (world, world)}[shard]
    gradients = sum(p.nbytes for p in trainable_parameters(model).values())
    states = 2 * gradients // state_parts
    weights = sum(p.nbytes for p in model.parameters()) // parts + (unsharded_bytes(model, dtype) if parts > 1 else 0)
    activations = peak = 0
    if batch and (isinstance(model, Llava) or not dist.is_initialized()):  # CLIP's loss calls collectives
        activations, peak = dry_run(model, dtype, batch, free_gradients=world > 1, gathered=parts > 1)
    # With several ranks, DDP's buckets hold all gradients during the whole step; fsdp shards them as they come.
    step = max(peak, gradients) if world == 1 else peak + gradients // parts
    return Estimate(weights, gradients // parts, states, activations, step, weights + states + step)


def unsharded_bytes(model: Llava, dtype: torch.dtype) -> int:
    """Bytes that fsdp holds unsharded at one time: all but the decoder layers, one layer, and the next one."""
    layers = model.language_model.model.layers
    layer = sum(p.numel() for p in layers[0].parameters())
    return (sum(p.numel() for p in model.parameters()) + (2 - len(layers)) * layer) * dtype.itemsize


def dry_run(model: nn.Module, dtype: torch.dtype, batch: dict, free_gradients: bool, gathered: bool) -> tuple[int, int]:
    """Bytes that a step adds to the weights: after the forward pass, and at the peak.

    Args: free_gradients: drop each gradient once it is complete, because it is counted elsewhere.
    gathered: the weights are in `dtype` already, as fsdp gathers them, so autocast copies none.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    twin = fake_copy(model, fake, dtype if gathered else None)
    weights = sum(p.nbytes for p in twin.parameters())
    floats = {key: v for key, v in batch.items() if torch.is_tensor(v) and v.is_floating_point()}
    with fake:  # ids and labels keep their data, by which the model finds image tokens and supervised tokens
        batch = batch | {key: torch.empty_like(value) for key, value in floats.items()}
    if free_gradients:
        for p in trainable_parameters(twin).values():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with MemoryCounter([*twin.parameters(), *filter(torch.is_tensor, batch.values())]) as counter:
        # As a CPU would compute it; a GPU's kernels save the same activations.
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = twin(**batch)
        after_forward = counter.now
        loss.backward()
    return after_forward - weights, counter.peak - weights


def fake_copy(model: nn.Module, fake: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """Copy a model with fake parameters, in `dtype` if given. Tied parameters stay tied."""
    memo = {}
    with fake:
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=dtype or p.dtype), p.requires_grad)
    twin = copy.deepcopy(model, memo)  # deepcopy takes from the memo what it would copy
    for module in twin.modules():
        if isinstance(getattr(module, "items", None), frozenset):  # a layer of fast/: as if the CPU had bfloat16
            module.items -= {"widen"}
        if isinstance(module, NF4Linear):  # decoding block by block would make the dry run slow
            module.dequantize = partial(empty_weight, module)
    return twin


def empty_weight(layer: NF4Linear, dtype: torch.dtype) -> torch.Tensor:
    return layer.weight.new_empty((layer.out_features, layer.in_features), dtype=dtype)


class MemoryCounter(TorchDispatchMode):
    """Context manager that counts the bytes of all live tensors: `now` and `peak`. `known` are alive from the start."""

    def __init__(self, known):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0
        for tensor in known:
            self.count(tensor)

    def count(self, tensor: torch.Tensor):
        """Count a tensor's storage once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key: int, size: int):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index.Tensor:
            # A boolean mask selects an unknown number of rows of a fake tensor. Masks hold real data, so positions can
            # replace them.
            masked = (i.nonzero().unbind(1) if i is not None and i.dtype == torch.bool else [i] for i in args[1])
            args = (args[0], [*chain.from_iterable(masked)])
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result


# A parallel operation ends when its slowest thread does, and a training step has thousands of them. A thread that waits
# for a core holds up all others: two threads on two busy cores made stage 2 thirty times slower.
BUSY = 0.8  # below this share the cores are shared; on an idle machine it is 0.95 or more


def core_share(threads: int, seconds: float = 0.4) -> float:
    """Return the share of `threads` cores that torch's threads get: CPU time over wall time of parallel operations. A
    thread that waits for the others spins, so on an idle machine the share is close to 1."""
    x = torch.ones(threads, 100_000)  # above the size from which torch divides an operation among threads
    for _ in range(10):  # the first operations start the threads
        x.mul_(1.0)
    cpu, wall = time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < seconds:
        x.mul_(1.0)
    return (time.process_time() - cpu) / (time.perf_counter() - wall) / threads


def busy_warning(device: torch.device, threads: int, measure: Callable[[int], float] = core_share) -> str | None:
    """Return one line for the user if training on the CPU with several threads will wait for busy cores, else None."""
    if device.type != "cpu" or threads == 1 or (share := measure(threads)) >= BUSY:
        return None
    cores = f"{threads} threads get {share:.0%} of {threads} cores, and every step waits for the slowest"
    return f"the cores are busy: {cores}; OMP_NUM_THREADS=1 (one thread) may be many times faster"
