"""The tensors of a checkpoint: collected from all ranks, and restored onto any number of them.

A checkpoint holds the trainable weights and AdamW's states, each tensor whole. It needs no random state: the order of
the data and the seed of every step are functions of (seed, step, rank). `runs.py` writes and verifies the files.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from inputs.files import read_json
from training.ranks import Distributed
from training.sharding import STATES, is_sharded, local_optimizer, trainable_parameters


def checkpoint_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """Return {file: {name: tensor}} as this rank holds them; `gather_tensors` makes them whole."""
    trained, states = trainable_parameters(model), {}
    for name, p in trained.items():
        state = local_optimizer(optimizer).state.get(p) or meta_states(p)
        states |= {f"{name}.{key}": state[key].detach() for key in STATES}
    return {"trained.safetensors": trained, "optimizer.safetensors": states}


def meta_states(p: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return AdamW's states as meta tensors, shapes without memory: under zero1 another rank holds them."""
    with torch.device("meta"):
        return {"step": torch.empty(())} | {key: torch.empty(p.shape, dtype=p.dtype) for key in STATES[1:]}


def gather_tensors(files: dict[str, dict], optimizer, ranks: Distributed) -> Iterator[torch.Tensor]:
    """Yield the tensors of `checkpoint_tensors` in order, one at a time whole on rank 0. Every rank has to iterate."""
    is_zero1 = local_optimizer(optimizer) is not optimizer
    for name, tensors in files.items():
        for tensor in tensors.values():
            if is_sharded(tensor):
                tensor = tensor.full_tensor()
            elif is_zero1 and name.startswith("optimizer"):
                is_mine = not tensor.is_meta
                tensor = tensor.clone() if is_mine else torch.zeros_like(tensor, device=ranks.device)
                dist.reduce(tensor, dst=0)  # the owner's state, added to zeros
            yield tensor.detach()


def restore_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Copy a checkpoint into the model, and into the optimizer if given. Returns the checkpoint's step.
    Raises ValueError if the checkpoint holds other parameters than those that train now."""
    saved, trained = load_file(folder / "trained.safetensors"), trainable_parameters(model)
    if set(saved) != set(trained):
        names = ", ".join(sorted(set(saved) ^ set(trained))[:5])
        raise ValueError(f"{folder}: the run now trains other parameters than the checkpoint holds: {names}")
    for name, p in trained.items():
        if saved[name].shape != p.shape:
            raise ValueError(f"{folder}: {name} has shape {list(saved[name].shape)}, the model's has {list(p.shape)}")
        p.data.copy_(reshard_like(saved[name], p))
    if optimizer is not None:
        restore_optimizer(load_file(folder / "optimizer.safetensors"), trained, local_optimizer(optimizer))
    return read_json(folder / "state.json")["step"]


def restore_optimizer(saved: dict[str, torch.Tensor], trained: dict[str, nn.Parameter], optimizer):
    """Copy saved states into this rank's optimizer, for the parameters that it updates."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in trained.items():
        if id(p) in own:
            for key, state in optimizer.state[p].items():
                state.copy_(reshard_like(saved[f"{name}.{key}"], state))


def reshard_like(whole: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor on the target's device; if the target is sharded, this rank's shard of it."""
    whole = whole.to(target.device)
    if not is_sharded(target):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
