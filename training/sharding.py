"""What every rank holds of parameters, gradients and optimizer states: all of it, or a share.

    ddp      everything on every rank; gradients are averaged (the default)
    zero1    each rank keeps the optimizer's states of its share of the parameters (Rajbhandari et al. 2019, 1910.02054)
    fsdp     each rank keeps a slice of everything, and a block is whole only while it is used (FSDP2)

Bytes per parameter and rank, of 16 in float32 with AdamW (weights 4, gradients 4, states 8): 16, 8 + 8 / N, 16 / N.
A checkpoint is the same whichever it was: whole tensors, so that any number of ranks goes on from it.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nf4 import NF4Linear
from training.ranks import Distributed

MODES = ("ddp", "zero1", "fsdp")
STATES = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


def cast_weights(model: nn.Module, mode: str, trained: torch.dtype, frozen: torch.dtype):
    """Give what trains one type and what stands still the other; in slices, where one block has one type, all one."""
    for module in model.modules():
        if not isinstance(module, NF4Linear):  # narrower already, and what is wide there has to be
            for p in module.parameters(recurse=False):
                p.data = p.data.to(trained if p.requires_grad or mode == "fsdp" else frozen)


def shard_model(model: nn.Module, mode: str, ranks: Distributed, dtype: torch.dtype):
    """Move a model to the device, under fsdp in slices: decoder layers are gathered one by one, the rest for a step.

    Args: dtype: of the arithmetic. Slices travel in it and are kept in float32, as autocast does with whole weights.
    """
    if mode != "fsdp" or not dist.is_initialized():
        model.to(ranks.device)
        return
    from torch.distributed.device_mesh import init_device_mesh  # here and below: 2 seconds that few runs need
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for part in [*model.language_model.model.layers, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)


def wrap_model(model: nn.Module, mode: str) -> nn.Module:
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
    optimizer = local_optimizer(optimizer)
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = torch.zeros((), device=p.device)  # the fused kernel reads it where the parameter is
            optimizer.state[p] = {"step": step} | {key: torch.zeros_like(p) for key in STATES[1:]}
            if isinstance(optimizer, OffloadedAdamW):
                optimizer.move(p, torch.device("cpu"))


@contextmanager
def gradient_sync(network: nn.Module, last: bool):
    """Gradients cross the wire once per step, with the last micro-batch."""
    if isinstance(network, DistributedDataParallel):
        with nullcontext() if last else network.no_sync():
            yield
    else:
        if hasattr(network, "set_requires_gradient_sync"):
            network.set_requires_gradient_sync(last)
        yield


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this rank holds a slice only (torch's DTensor)."""
    return hasattr(tensor, "full_tensor")


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What updates this rank's parameters; under zero1 a part of the whole."""
    return getattr(optimizer, "optim", optimizer)


def gather_weights(model: nn.Module, ranks: Distributed) -> dict[str, torch.Tensor]:
    """What trained, whole and on the CPU of rank 0; nothing on the others."""
    whole = {}
    for name, p in trainable_parameters(model).items():
        tensor = p.full_tensor() if is_sharded(p) else p
        if ranks.is_main:
            whole[name] = tensor.detach().cpu()
    return whole
