"""The tensors of a checkpoint: collected from all ranks, and restored on any number of them."""

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
    """Tensors per file of a checkpoint: everything that trains, and what the optimizer keeps of each.

    `gather_tensors` reads them out, whole. There is no random state: the order of the data and the seed of every step
    follow from (seed, step, rank).
    """
    trained, states = trainable_parameters(model), {}
    for name, p in trained.items():
        kept = local_optimizer(optimizer).state.get(p) or meta_states(p)
        states |= {f"{name}.{key}": kept[key].detach() for key in STATES}
    return {"trained.safetensors": trained, "optimizer.safetensors": states}


def meta_states(p: nn.Parameter) -> dict[str, torch.Tensor]:
    """Shapes and types, and no memory, of the states that another rank keeps."""
    with torch.device("meta"):
        return {"step": torch.empty(())} | {key: torch.empty(p.shape, dtype=p.dtype) for key in STATES[1:]}


def gather_tensors(
    state: dict[str, dict], optimizer: torch.optim.Optimizer, ranks: Distributed
) -> Iterator[torch.Tensor]:
    """Yield the tensors of `checkpoint_tensors` in order, unsharded on rank 0; a collective, so all ranks iterate."""
    for name, tensors in state.items():
        for tensor in tensors.values():
            if is_sharded(tensor):
                tensor = tensor.full_tensor()
            elif local_optimizer(optimizer) is not optimizer and name.startswith("optimizer"):
                tensor = (
                    torch.zeros_like(tensor, device=ranks.device)
                    if tensor.is_meta
                    else tensor.to(ranks.device, copy=True)
                )
                dist.reduce(tensor, dst=0)  # of zeros, but for the owner's
            yield tensor.detach()


def restore_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Put a checkpoint into the model, and into the optimizer if there is one; returns the step it was made after.

    Raises ValueError if other parameters train now than then.
    """
    whole, trained = load_file(folder / "trained.safetensors"), trainable_parameters(model)
    if set(whole) != set(trained):
        differ = sorted(set(whole) ^ set(trained))[:5]
        raise ValueError(f"{folder}: other parameters train now than then: {', '.join(differ)}")
    for name, p in trained.items():
        if whole[name].shape != p.shape:
            raise ValueError(f"{folder}: {name} is {list(whole[name].shape)} there, {list(p.shape)} here")
        p.data.copy_(reshard_like(whole[name], p))
    if optimizer is not None:
        restore_optimizer(load_file(folder / "optimizer.safetensors"), trained, optimizer)
    return read_json(folder / "state.json")["step"]


def restore_optimizer(whole: dict[str, torch.Tensor], trained: dict[str, nn.Parameter], optimizer):
    """Each rank takes the states of the parameters it updates."""
    own = {id(p) for group in local_optimizer(optimizer).param_groups for p in group["params"]}
    for name, p in trained.items():
        if id(p) in own:
            for key, kept in local_optimizer(optimizer).state[p].items():
                kept.copy_(reshard_like(whole[f"{name}.{key}"], kept))


def reshard_like(whole: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A whole tensor where a rank's own is, or the slice of it that the rank has."""
    whole = whole.to(own.device)
    if not is_sharded(own):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
