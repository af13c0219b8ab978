"""What a training step will hold in memory, before it starts: weights, gradients, states, activations.

Nothing is guessed: the step is run once on a twin of the model whose tensors have shapes but no numbers (torch's
FakeTensorMode), which takes no memory and hardly any time, and what would have been allocated is counted as it goes.
So whatever the model does is in it: what is recomputed, logits in chunks, a matrix of four bits while it is whole.
"""

import copy
import os
import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast import linear
from llava import Llava
from nf4 import NF4Linear
from training.sharding import trainable_parameters


@dataclass
class Estimate:
    """Bytes on one rank. step: the most that gradients and activations take at one time: as the gradients come, on the
    way back, activations go; so it is less than both, unless gradients have a place of their own (see `estimate`)."""

    weights: int
    gradients: int
    states: int
    activations: int
    step: int

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.states

    @property
    def peak(self) -> int:
        return self.weights + self.states + self.step

    def __str__(self) -> str:
        parts = [
            f"{name} {getattr(self, name) / 1e9:.3g}" for name in ("weights", "gradients", "states", "activations")
        ]
        return f"memory of a rank, about, in GB: {' + '.join(parts)}, at one time at most {self.peak / 1e9:.3g}"


def estimate(model: nn.Module, shard: str, world: int, dtype: torch.dtype, batch: dict | None) -> Estimate:
    """Args: world: ranks; dtype: of the arithmetic; batch: the largest micro-batch, as `model` takes it, or None.

    Gradients of several ranks have their place in DDP's buckets all along, or, under fsdp, are cut up as they come.
    """
    slices, shares = {"ddp": (1, 1), "zero1": (1, world), "fsdp": (world, world)}[shard]
    gradients = sum(p.nbytes for p in trainable_parameters(model).values())
    weights = sum(p.nbytes for p in model.parameters()) // slices
    weights += unsharded_bytes(model, dtype) if slices > 1 else 0
    activations = most = 0
    if batch and (isinstance(model, Llava) or not dist.is_initialized()):  # CLIP's loss asks other ranks for theirs
        activations, most = dry_run(model, dtype, batch, drop=world > 1, gathered=slices > 1)
    step = max(most, gradients) if world == 1 else most + gradients // slices
    return Estimate(weights, gradients // slices, 2 * gradients // shares, activations, step)


def unsharded_bytes(model: Llava, dtype: torch.dtype) -> int:
    """Bytes of what is whole at one time: all that is no decoder layer, a layer, and the next on its way."""
    layers = model.language_model.model.layers
    layer = sum(p.numel() for p in layers[0].parameters())
    return (sum(p.numel() for p in model.parameters()) + (2 - len(layers)) * layer) * dtype.itemsize


def dry_run(model: nn.Module, dtype: torch.dtype, batch: dict, drop: bool, gathered: bool) -> tuple[int, int]:
    """Bytes that a step adds to the weights: at the end of the forward pass, and at most.

    It is run as on a CPU that has arithmetic in 16 bits; a GPU's kernels keep the same.

    Args: drop: whether gradients go as soon as they are whole;
    gathered: whether weights are put together in `dtype`, so that autocast has nothing to copy.
    """
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    twin = fake_copy(model, shapes, dtype if gathered else None)
    with shapes:
        batch = {key: torch.empty_like(v) if floating(v) else v for key, v in batch.items()}
    if drop:
        for p in twin.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with MemoryCounter(twin.parameters()) as counted, linear.not_emulated():
        weights = counted.now
        for tensor in filter(torch.is_tensor, batch.values()):
            counted.count(tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = twin(**batch)
        kept = counted.now
        loss.backward()
    return kept - weights, counted.peak - weights


def floating(value) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def fake_copy(model: nn.Module, shapes: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """The same modules on parameters without numbers, of this type if one is named; those that were one are one."""
    with shapes:
        twins = {
            id(p): nn.Parameter(torch.empty(p.shape, dtype=dtype or p.dtype), requires_grad=p.requires_grad)
            for p in model.parameters()
        }
    twin = copy.deepcopy(model, twins)  # what it is told of already is not copied
    for module in twin.modules():
        if isinstance(module, NF4Linear):  # piece by piece, as a CPU does it, would take long
            module.dequantize = lambda dtype=None, of=module: of.weight.new_empty(
                (of.out_features, of.in_features), dtype=dtype or of.dtype
            )
    return twin


class MemoryCounter(TorchDispatchMode):
    """While it is entered, counts the bytes of all tensors that are alive, `known` among them: `now` and `peak`."""

    def __init__(self, known):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0
        for tensor in known:
            self.count(tensor)

    def count(self, tensor: torch.Tensor):
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
        if function is torch.ops.aten.index.Tensor:  # without numbers, how many a mask chooses must be known before
            args = (args[0], mask_positions(args[1]))
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result


def mask_positions(indices: list) -> list:
    """The same indices with every mask as the numbers of its places."""
    lists = (i.nonzero().unbind(1) if i is not None and i.dtype == torch.bool else [i] for i in indices)
    return [index for part in lists for index in part]


def free_bytes(device: torch.device) -> int:
    """What is free of the GPU's memory, or all there is of the machine's, part of which our weights have already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(found: Estimate, free: int):
    """Raise ValueError with what helps, if weights, gradients and states alone are more than there is."""
    if found.fixed > free:
        helps = "--lora llm (with --bits 4), --shard fsdp on more ranks, --offload-states, --weights bfloat16"
        raise ValueError(f"{found}, but there are {free / 1e9:.3g}. What helps: {helps}")
