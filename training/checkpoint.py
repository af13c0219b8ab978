"""Save and restore a run: checkpoints to resume from, the best model so far, and at the end the finished model.

A checkpoint holds the trainable weights and AdamW's states, each tensor whole, so that any number of ranks can resume
from it (but for --loss-mean micro-batch). It needs no random state: the order of the data and the seed of every step
are functions of (seed, step, rank). `runs.py` writes and verifies the files.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from inputs.files import fingerprint, read_json, verify_manifest
from inputs.tokenizer import Tokenizer
from training import sharding
from training.objectives import LOG_VARIANCES
from training.ranks import Distributed
from training.runs import Run
from training.sharding import STATES, is_sharded, local_optimizer, trainable_parameters, unshard


class Saver:
    """Saves and restores `model` and `optimizer`; all ranks call every method together, rank 0 writes the files."""

    def __init__(self, args, ranks: Distributed, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.args, self.ranks, self.run, self.model, self.optimizer = args, ranks, run, model, optimizer

    def resume(self) -> tuple[int, int, list[float]]:
        """Lock the run's folder and restore its newest checkpoint. Returns its step (0 without one), the number of
        skipped steps just before, and all validation losses so far."""
        self.run.values |= {"ranks": self.ranks.world_size, "ran_on": self.ranks.device.type}
        if self.args.loss_mean == "micro-batch":
            self.run.check_unchanged("ranks", self.ranks.world_size, "a number of ranks of")
        self.ranks.on_main(self.run.open)
        checkpoint = self.ranks.on_main(self.run.newest_valid_checkpoint)
        step = restore_checkpoint(checkpoint, self.model, self.optimizer) if checkpoint else 0
        return step, *self.ranks.on_main(self.run.start, step)

    def save(self, step: int, kind: str = "checkpoint"):
        """Write a "checkpoint" or the "best" model so far. Raises ValueError like check_weights, and on a full disk."""
        self.check_weights(step)
        files = checkpoint_tensors(self.model, self.optimizer)
        tensors = gather_tensors(files, self.optimizer, self.ranks)
        if not self.ranks.is_main:
            deque(tensors, maxlen=0)  # every rank takes part in gathering each tensor
        keep = 1 if kind == "best" else self.args.keep
        self.ranks.on_main(self.run.save_checkpoint, step, files, tensors, keep, kind)

    def check_weights(self, step: int):
        """Raise ValueError, on all ranks, if a trained weight is not finite or differs between the ranks."""
        trained = trainable_parameters(self.model).values()
        shards = [p.to_local() if is_sharded(p) else p for p in trained]  # what this rank holds
        if self.ranks.all_reduce_max(not all(bool(p.isfinite().all()) for p in shards)):
            raise ValueError(f"step {step}: weights are not finite; {self.run.last_checkpoint_hint()}")
        if self.args.shard != "fsdp" and not self.ranks.replicas_match(shards):
            raise ValueError(f"step {step}: the ranks' weights differ; {self.run.last_checkpoint_hint()}")

    def finish(self, save: Callable[[dict, Path], None], tokenizer: Tokenizer):
        """Publish the finished model, with --patience the best one; `save(trained_weights, folder)` writes it."""
        if best := self.ranks.on_main(self.run.checkpoints, "best"):
            self.ranks.on_main(verify_manifest, best[-1])
            restore_checkpoint(best[-1], self.model)
            self.ranks.print0(f"{best[-1].name} had the smallest validation loss: it becomes the finished model")
        self.check_weights(self.args.steps)
        weights = sharding.gather_weights(self.model, self.ranks)

        def write(folder: Path):
            save(weights, folder)
            tokenizer.save(folder)

        self.ranks.on_main(self.run.finish, write)


def checkpoint_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """Return {file: {name: tensor}} as this rank holds them; `gather_tensors` makes them whole. Under zero1, states
    that another rank holds are meta tensors, which have shapes and no data."""
    trained, states = trainable_parameters(model), {}
    for name, p in trained.items():
        state = local_optimizer(optimizer).state.get(p)
        if not state:
            state = {"step": torch.empty((), device="meta")} | dict.fromkeys(STATES[1:], p.detach().to("meta"))
        states |= {f"{name}.{key}": state[key].detach() for key in STATES}
    return {"trained.safetensors": trained, "optimizer.safetensors": states}


def gather_tensors(files: dict[str, dict], optimizer, ranks: Distributed) -> Iterator[torch.Tensor]:
    """Yield the tensors of `checkpoint_tensors` in order, one at a time whole on rank 0. Every rank has to iterate."""
    is_zero1 = local_optimizer(optimizer) is not optimizer
    for name, tensors in files.items():
        for tensor in map(unshard, tensors.values()):
            if is_zero1 and name.startswith("optimizer"):
                tensor = torch.zeros_like(tensor, device=ranks.device) if tensor.is_meta else tensor.clone()
                dist.reduce(tensor, dst=0)  # the owner's state, added to zeros
            yield tensor.detach()


def restore_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Copy a checkpoint into the model, and into the optimizer if given. Returns the checkpoint's step.
    Raises ValueError if the checkpoint holds other parameters than those that train now."""
    saved, trained = load_file(folder / "trained.safetensors"), trainable_parameters(model)
    if LOG_VARIANCES not in trained:  # they belong to the run that learned them
        saved.pop(LOG_VARIANCES, None)
    if names := ", ".join(sorted(set(saved) ^ set(trained))[:5]):
        raise ValueError(f"{folder}: the run now trains other parameters than the checkpoint holds: {names}")
    for name, p in trained.items():
        if saved[name].shape != p.shape:
            raise ValueError(f"{folder}: {name} has shape {list(saved[name].shape)}, the model's has {list(p.shape)}")
        p.data.copy_(reshard_like(saved[name], p))
    if optimizer is not None:
        saved, optimizer = load_file(folder / "optimizer.safetensors"), local_optimizer(optimizer)
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}  # under zero1: this rank's share
        for name, p in trained.items():
            for key, state in optimizer.state[p].items() if id(p) in own else ():
                state.copy_(reshard_like(saved[f"{name}.{key}"], state))
    return read_json(folder / "state.json")["step"]


def check_base(model: nn.Module, run: Run, every: bool):
    """Note a checksum of the weights that checkpoints do not hold: of 64 numbers of each frozen parameter and of its
    four-bit codes. Raises ValueError if a resumed run began with others.

    Args: every: also those that train, since what they were at the start is needed later.
    """
    digest, tensors = hashlib.sha256(), [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        # Means, such as the offset of scales in four bits, may depend on the number of threads.
        if tensor.dtype == torch.uint8 or (isinstance(tensor, nn.Parameter) and (every or not tensor.requires_grad)):
            sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)][:64]
            digest.update(name.encode() + sample.to(torch.float32).numpy().tobytes())
    run.values["base_sha256"] = digest.hexdigest()
    run.check_unchanged(
        "base_sha256", run.values["base_sha256"], "other frozen weights; a sample of them has the sha256"
    )


def restore_start(folder: Path, model: nn.Module, run: Run) -> str:
    """--init-from: copy the checkpoint of another run into the model; returns a line to print. Raises ValueError if the
    folder is no checkpoint or, on resume, no longer the one that the run began with."""
    if not (folder / "trained.safetensors").exists():
        raise ValueError(f"--init-from {folder}: no checkpoint of a run, as OUT/latest is one")
    verify_manifest(folder)
    run.values["init_sha256"] = fingerprint(folder / "trained.safetensors")["sha256"]
    run.check_unchanged("init_sha256", run.values["init_sha256"], "--init-from weights whose sha256 is")
    return f"weights of step {restore_checkpoint(folder, model)} of {folder}"


def reshard_like(whole: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor or, if the target is sharded, this rank's shard of it."""
    if not is_sharded(target):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
