"""What every rank holds of parameters, gradients and optimizer states: all of it, or a share.

    ddp      everything on every rank; gradients are averaged (the default)
    zero1    each rank keeps the optimizer's states of its share of the parameters (Rajbhandari et al. 2019, 1910.02054)
    fsdp     each rank keeps a slice of everything, and a block is whole only while it is used (FSDP2)

Bytes per parameter and rank, of 16 in float32 with AdamW (weights 4, gradients 4, states 8): 16, 8 + 8 / N, 16 / N.
A checkpoint is the same whichever it was: whole tensors, so that any number of ranks goes on from it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from inputs.files import read_json
from nf4 import NF4Linear
from training.ranks import Ranks

MODES = ("ddp", "zero1", "fsdp")
STATES = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


def narrow(model: nn.Module, mode: str, trained: torch.dtype, frozen: torch.dtype):
    """Give what trains one type and what stands still the other; in slices, where one block has one type, all one."""
    for module in model.modules():
        if not isinstance(module, NF4Linear):  # narrower already, and what is wide there has to be
            for p in module.parameters(recurse=False):
                p.data = p.data.to(trained if p.requires_grad or mode == "fsdp" else frozen)


def place(model: nn.Module, mode: str, ranks: Ranks, dtype: torch.dtype):
    """Move a model to the device, under fsdp in slices: decoder layers are gathered one by one, the rest for a step.

    Args: dtype: of the arithmetic. Slices travel in it and are kept in float32, as autocast does with whole weights.
    """
    if mode != "fsdp" or not dist.is_initialized():
        model.to(ranks.device)
        return
    from torch.distributed.device_mesh import init_device_mesh  # here and below: 2 seconds that few runs need
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for part in [*model.language_model.model.layers, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)


def make_network(model: nn.Module, mode: str) -> nn.Module:
    """What is called in training, and averages gradients over the ranks. Alone, or under fsdp, the model itself."""
    if not dist.is_initialized() or mode == "fsdp":
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)  # or gradients would be held twice


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose states wait in the CPU's memory, and visit the GPU one parameter at a time: QLoRA's paged optimizer
    (Dettmers et al. 2023, section 3) without paging. What it computes is the same."""

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        for group in groups:
            for p in group["params"]:
                self.move(p, p.device)
                self.param_groups = [group | {"params": [p]}]
                super().step()
                self.move(p, torch.device("cpu"))
        self.param_groups = groups

    def move(self, p: nn.Parameter, device: torch.device):
        self.state[p] = {key: value.to(device) for key, value in self.state[p].items()}


def make_adamw(groups: list[dict], mode: str, offload: bool = False, **options) -> torch.optim.Optimizer:
    """Groups' own rates and decays go before the options. Fused: one kernel for all parameters of a group."""
    adamw = OffloadedAdamW if offload else torch.optim.AdamW
    if not dist.is_initialized() or mode != "zero1":
        optimizer = adamw(groups, fused=True, **options)
    else:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(groups, adamw, fused=True, **options)
    make_states(optimizer)
    return optimizer


def make_states(optimizer: torch.optim.Optimizer):
    """Zeros, here and not in the first step: on a CPU they would lie scattered where its activations had been, and
    later ones would not fit between them (LOG.md)."""
    optimizer = local(optimizer)
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = torch.zeros((), device=p.device)  # the fused kernel reads it where the parameter is
            optimizer.state[p] = {"step": step} | {key: torch.zeros_like(p) for key in STATES[1:]}
            if isinstance(optimizer, OffloadedAdamW):
                optimizer.move(p, torch.device("cpu"))


@contextmanager
def synced(network: nn.Module, last: bool):
    """Gradients cross the wire once per step, with the last micro-batch."""
    if isinstance(network, DistributedDataParallel):
        with nullcontext() if last else network.no_sync():
            yield
    else:
        if hasattr(network, "set_requires_gradient_sync"):
            network.set_requires_gradient_sync(last)
        yield


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def sliced(tensor: torch.Tensor) -> bool:
    """Whether this rank holds a slice only (torch's DTensor)."""
    return hasattr(tensor, "full_tensor")


def own_slice(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if sliced(tensor) else tensor


def local(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What updates this rank's parameters; under zero1 a part of the whole."""
    return getattr(optimizer, "optim", optimizer)


# ---------------------------------------------------------------------------------------------------------------------
# there and back


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, dict]:
    """Tensors per file of a checkpoint: everything that trains, and what the optimizer keeps of each.

    Sharded ones are made whole by `gathered`. No random state is among them: the order of the data and the seed of
    every step follow from (seed, step, rank).
    """
    trained, states = trained_parameters(model), {}
    for name, p in trained.items():
        kept = local(optimizer).state.get(p) or elsewhere(p)
        states |= {f"{name}.{key}": kept[key].detach() for key in STATES}
    return {"trained.safetensors": trained, "optimizer.safetensors": states}


def elsewhere(p: nn.Parameter) -> dict[str, torch.Tensor]:
    """Shapes and types, and no memory, of the states that another rank keeps."""
    with torch.device("meta"):
        return {"step": torch.empty(())} | {key: torch.empty(p.shape, dtype=p.dtype) for key in STATES[1:]}


def gathered(state: dict[str, dict], optimizer: torch.optim.Optimizer, ranks: Ranks) -> Iterator[torch.Tensor]:
    """The tensors of `training_state` in order, whole on rank 0, one at a time; all ranks go through them together."""
    for name, tensors in state.items():
        for tensor in tensors.values():
            if sliced(tensor):
                tensor = tensor.full_tensor()
            elif local(optimizer) is not optimizer and name.startswith("optimizer"):
                tensor = (
                    torch.zeros_like(tensor, device=ranks.device)
                    if tensor.is_meta
                    else tensor.to(ranks.device, copy=True)
                )
                dist.reduce(tensor, dst=0)  # of zeros, but for the owner's
            yield tensor.detach()


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Put a checkpoint into the model, and into the optimizer if there is one; returns the step it was made after.

    Raises ValueError if other parameters train now than then.
    """
    whole, trained = load_file(folder / "trained.safetensors"), trained_parameters(model)
    if set(whole) != set(trained):
        differ = sorted(set(whole) ^ set(trained))[:5]
        raise ValueError(f"{folder}: other parameters train now than then: {', '.join(differ)}")
    for name, p in trained.items():
        if whole[name].shape != p.shape:
            raise ValueError(f"{folder}: {name} is {list(whole[name].shape)} there, {list(p.shape)} here")
        p.data.copy_(like(whole[name], p))
    if optimizer is not None:
        restore_states(load_file(folder / "optimizer.safetensors"), trained, optimizer)
    return read_json(folder / "state.json")["step"]


def restore_states(whole: dict[str, torch.Tensor], trained: dict[str, nn.Parameter], optimizer):
    """Each rank takes the states of the parameters it updates."""
    own = {id(p) for group in local(optimizer).param_groups for p in group["params"]}
    for name, p in trained.items():
        if id(p) in own:
            for key, kept in local(optimizer).state[p].items():
                kept.copy_(like(whole[f"{name}.{key}"], kept))


def like(whole: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A whole tensor where a rank's own is, or the slice of it that the rank has."""
    whole = whole.to(own.device)
    if not sliced(own):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)


def whole_weights(model: nn.Module, ranks: Ranks) -> dict[str, torch.Tensor]:
    """What trained, whole and on the CPU of rank 0; nothing on the others."""
    whole = {}
    for name, p in trained_parameters(model).items():
        tensor = p.full_tensor() if sliced(p) else p
        if ranks.first:
            whole[name] = tensor.detach().cpu()
    return whole
