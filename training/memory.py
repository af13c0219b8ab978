"""Estimate the memory of a training step before it runs: weights, gradients, optimizer states, activations.

The step runs once on a copy of the model whose tensors have shapes but no data (torch's FakeTensorMode), and every
allocation is counted. So the estimate follows whatever the model does: activation recomputation, logits for supervised
tokens only, a 4-bit matrix that is dequantized while it is used.
"""

import copy
import os
import weakref
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava import Llava
from lora import NF4Linear
from training.sharding import trainable_parameters


@dataclass
class Estimate:
    """Bytes on one rank. step: the peak of gradients and activations together, which is less than their sum if the
    backward pass frees activations while it allocates gradients."""

    weights: int
    gradients: int
    states: int
    activations: int
    step: int

    @property
    def peak(self) -> int:
        return self.weights + self.states + self.step

    def __str__(self) -> str:
        sizes = [self.weights, self.gradients, self.states, self.activations, self.peak]
        form = "weights {:.3g} + gradients {:.3g} + optimizer states {:.3g} + activations {:.3g} GB, peak {:.3g} GB"
        return "estimated memory per rank: " + form.format(*(size / 1e9 for size in sizes))


def estimate(model: nn.Module, shard: str, world: int, dtype: torch.dtype, batch: dict | None) -> Estimate:
    """Estimate the memory of one training step on one rank.

    With several ranks, DDP's buckets hold all gradients during the whole step; fsdp shards them as they come.

    Args: shard: one of sharding.MODES. world: number of ranks. dtype: of the computation.
    batch: the largest micro-batch, as the model's forward takes it; with None, activations count as 0.
    """
    parts, state_parts = {"ddp": (1, 1), "zero1": (1, world), "fsdp": (world, world)}[shard]
    gradients = sum(p.nbytes for p in trainable_parameters(model).values())
    weights = sum(p.nbytes for p in model.parameters()) // parts + (unsharded_bytes(model, dtype) if parts > 1 else 0)
    activations = peak = 0
    if batch and (isinstance(model, Llava) or not dist.is_initialized()):  # CLIP's loss calls collectives
        activations, peak = dry_run(model, dtype, batch, free_gradients=world > 1, gathered=parts > 1)
    step = max(peak, gradients) if world == 1 else peak + gradients // parts
    return Estimate(weights, gradients // parts, 2 * gradients // state_parts, activations, step)


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
    with fake:
        floats = {key for key, v in batch.items() if torch.is_tensor(v) and v.is_floating_point()}
        batch = {key: torch.empty_like(v) if key in floats else v for key, v in batch.items()}
    if free_gradients:
        for p in twin.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with MemoryCounter(twin.parameters()) as counter:
        weights = counter.now
        for tensor in filter(torch.is_tensor, batch.values()):
            counter.count(tensor)
        # As a CPU would compute it; a GPU's kernels save the same activations.
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = twin(**batch)
        after_forward = counter.now
        loss.backward()
    return after_forward - weights, counter.peak - weights


def fake_copy(model: nn.Module, fake: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """Copy a model with fake parameters, in `dtype` if given. Tied parameters stay tied."""
    with fake:
        parameters = {
            id(p): nn.Parameter(torch.empty(p.shape, dtype=dtype or p.dtype), requires_grad=p.requires_grad)
            for p in model.parameters()
        }
    twin = copy.deepcopy(model, parameters)  # deepcopy takes from this memo what it would copy
    for module in twin.modules():
        if isinstance(getattr(module, "items", None), frozenset):  # a layer of fast/: as if the CPU had bfloat16
            module.items -= {"widen"}
        if isinstance(module, NF4Linear):  # decoding block by block would make the dry run slow
            module.dequantize = lambda dtype=None, of=module: of.weight.new_empty(
                (of.out_features, of.in_features), dtype=dtype or of.dtype
            )
    return twin


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
            # A mask selects an unknown number of rows of a fake tensor. Masks hold real data, so look it up.
            args = (args[0], mask_positions(args[1]))
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result


def mask_positions(indices: list) -> list:
    """Replace each boolean mask among the indices by the positions where it is true."""
    parts = (i.nonzero().unbind(1) if i is not None and i.dtype == torch.bool else [i] for i in indices)
    return [*chain.from_iterable(parts)]


def available_bytes(device: torch.device) -> int:
    """Free memory of a GPU; of a CPU, all memory of the machine, because the weights are loaded already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(needed: Estimate, available: int):
    """Raise ValueError if weights, gradients and optimizer states alone exceed the memory."""
    fixed = needed.weights + needed.gradients + needed.states
    if fixed > available:
        sizes = f"need {fixed / 1e9:.3g} GB per rank, but only {available / 1e9:.3g} GB are available"
        remedies = "--lora llm (with --bits 4), --shard fsdp on more ranks, --weights bfloat16"
        raise ValueError(f"weights, gradients and optimizer states {sizes}. Try: {remedies}")
