"""What a training step will hold in memory, before it starts: weights, gradients, states, activations.

The first three are counted. Activations are measured on one layer of this very model: what autograd keeps of two short
inputs tells what a layer keeps whatever the length, and what every further token adds.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from llava import LOSS_CHUNK, Llava, rotary_angles
from nf4 import NF4Linear
from sharding import trained_parameters


@dataclass
class Estimate:
    """Bytes on one rank."""

    weights: int
    gradients: int
    states: int
    activations: int

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.states

    def __str__(self) -> str:
        parts = [f"{name} {value / 1e9:.3g}" for name, value in vars(self).items()]
        return f"memory of a rank, about, in GB: {' + '.join(parts)} = {(self.fixed + self.activations) / 1e9:.3g}"


def estimate(
    model: nn.Module, shard: str, world: int, dtype: torch.dtype, rows: int, length: int, recompute: bool
) -> Estimate:
    """Args: world: ranks; dtype: of the arithmetic; rows, length: of the largest micro-batch a rank will see."""
    slices, shares = {"ddp": (1, 1), "zero1": (1, world), "fsdp": (world, world)}[shard]
    gradients = sum(p.nbytes for p in trained_parameters(model).values())
    weights = sum(p.nbytes for p in model.parameters())
    kept = activations(model, dtype, rows, length, recompute) if isinstance(model, Llava) else 0
    return Estimate(weights // slices, gradients // slices, 2 * gradients // shares, kept)


def activations(model: Llava, dtype: torch.dtype, rows: int, length: int, recompute: bool) -> int:
    """Bytes kept for the backward pass: of the decoder's layers and head, and of a tower that trains."""
    decoder, text = model.language_model.model, model.config.text_config
    tokens, layers = rows * length, text.num_hidden_layers
    constant, each = kept_by(decoder.layers[0], text.hidden_size, dtype, lambda x: (angles_of(x, text), None, None))
    hidden = text.hidden_size * 4
    logits = min(tokens, LOSS_CHUNK) * text.vocab_size * 8  # in float32, and their gradient
    if recompute:  # what goes into every layer; then the logits, and when they are gone, one layer at a time
        total = tokens * layers * hidden + max(logits, tokens * each + constant)
    else:
        total = layers * (constant + tokens * each) + logits
    total += tokens * hidden * 4  # the embeddings, the last norm, and what the head is given
    total += unpacked(model, dtype)
    if vision := model.config.vision_config:
        tower = model.vision_tower.vision_model
        trains = sum(any(p.requires_grad for p in layer.parameters()) for layer in tower.encoder.layers)
        if trains:
            constant, each = kept_by(tower.encoder.layers[0], vision.hidden_size, dtype, lambda x: (False,))
            patches = rows * (vision.num_patches + 1)
            if recompute:
                total += patches * (trains * vision.hidden_size * 4 + each) + constant
            else:
                total += trains * (constant + patches * each)
    return int(total)


def unpacked(model: Llava, dtype: torch.dtype) -> int:
    """Bytes of the largest matrix in NF4 while it is whole."""
    sizes = [m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear)]
    return max(sizes, default=0) * dtype.itemsize


def angles_of(x: torch.Tensor, config) -> tuple | None:
    if config.gpt2:
        return None
    return rotary_angles(torch.arange(x.shape[1], device=x.device)[None], config)


def kept_by(layer: nn.Module, width: int, dtype: torch.dtype, others: Callable) -> tuple[int, float]:
    """Bytes that a layer keeps of any input, and of each token. Args: others: of x (1, T, C), the further arguments."""
    device = next(layer.parameters()).device
    kept = []
    for length in (16, 32):
        x = torch.ones(1, length, width, device=device).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            kept.append(saved_bytes(layer, x, *others(x)))
    each = (kept[1] - kept[0]) / 16
    return max(0, round(kept[0] - 16 * each)), each


def saved_bytes(module: nn.Module, *inputs) -> int:
    """What autograd saves in a forward pass, its parameters and buffers not counted; each storage once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is given out twice
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*inputs)
    return sum(size for size, _ in saved.values())


def free_bytes(device: torch.device) -> int:
    """What is free of the GPU's memory, or all there is of the machine's, part of which our weights have already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def refuse(found: Estimate, free: int):
    """Raise ValueError with what helps, if weights, gradients and states alone are more than there is."""
    if found.fixed > free:
        helps = "--lora llm (with --bits 4), --shard fsdp on more ranks, --offload-states, --weights bfloat16"
        raise ValueError(f"{found}, but there are {free / 1e9:.3g}. What helps: {helps}")
