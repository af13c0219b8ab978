"""Divide parameters, gradients and optimizer states among the ranks.

    ddp      every rank holds everything; gradients are averaged (the default)
    zero1    each rank keeps the optimizer states of its share of the parameters (ZeRO, Rajbhandari et al. 2019,
             arXiv:1910.02054, stage 1)
    fsdp     each rank keeps a shard of everything; a layer is gathered only while it is used (torch's FSDP2)

AdamW in float32 needs 16 bytes per parameter (weight 4, gradient 4, states 8). Per rank that is 16 under ddp,
8 + 8 / N under zero1 and 16 / N under fsdp.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora import NF4Linear
from training.ranks import Distributed

MODES = ("ddp", "zero1", "fsdp")
STATES = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of one parameter


def cast_weights(model: nn.Module, mode: str, trained: torch.dtype, frozen: torch.dtype):
    """Cast trainable and frozen weights in place, under fsdp all to `trained`: FSDP2 wants one dtype per layer."""
    for module in model.modules():
        if not isinstance(module, NF4Linear):  # its codes are integers and its scales need float32
            for p in module.parameters(recurse=False):
                p.data = p.data.to(trained if p.requires_grad or mode == "fsdp" else frozen)


def shard_model(model: nn.Module, mode: str, ranks: Distributed, dtype: torch.dtype) -> nn.Module:
    """Move a model to the device; return the module to call in training, which averages gradients over the ranks.

    Under fsdp, each decoder layer is sharded and gathered by itself, the rest at once. Shards stay float32; they are
    gathered, and computed with, in `dtype`.
    """
    if not dist.is_initialized():
        return model.to(ranks.device)
    if mode != "fsdp":  # gradients that are views into DDP's buckets are held once, not twice
        return DistributedDataParallel(model.to(ranks.device), gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh  # imported here: 2 seconds that most runs do not need
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    ranks.mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for part in [*model.language_model.model.layers, model]:
        fully_shard(part, mesh=ranks.mesh, mp_policy=policy)
    return model


def make_adamw(groups: list[dict], mode: str, **options) -> torch.optim.Optimizer:
    """Return AdamW, its states sharded under zero1. A group's own learning rate and decay override `options`."""
    if dist.is_initialized() and mode == "zero1":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, fused=True, **options)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    own = local_optimizer(optimizer)
    for p in (p for group in own.param_groups for p in group["params"]):
        # Create the states now rather than in the first step: a resume copies a checkpoint into them.
        step = torch.zeros((), device=p.device)  # where the fused kernel expects it
        own.state[p] = {"step": step} | {key: torch.zeros_like(p) for key in STATES[1:]}
    return optimizer


def gradient_sync(network: nn.Module, last: bool) -> AbstractContextManager:
    """Return a context in which the ranks exchange gradients only if this is the last micro-batch of a step."""
    if hasattr(network, "set_requires_gradient_sync"):  # FSDP2's
        network.set_requires_gradient_sync(last)
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # FSDP2's DTensor


def unshard(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, gathered if it is sharded; then every rank has to call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer of this rank's share of the parameters; without zero1 that is the optimizer itself."""
    return getattr(optimizer, "optim", optimizer)


def gather_weights(model: nn.Module, ranks: Distributed) -> dict[str, torch.Tensor]:
    """Return the trainable weights, unsharded and on the CPU, on rank 0; {} on the others. A collective."""
    whole = ((name, unshard(p)) for name, p in trainable_parameters(model).items())
    return {name: tensor.detach().cpu() for name, tensor in whole if ranks.is_main}
