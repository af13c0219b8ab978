"""The processes torchrun started, the device each has, and what they agree on."""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist


class Distributed:
    """This process among those torchrun started; alone, rank 0 of 1.

    Args: device: "cpu", "cuda", "cuda:N", or None for what there is. timeout: seconds until a rank that does not
    answer counts as dead.
    """

    def __init__(self, device: str | None, timeout: float = 1800):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = choose_device(device)
        self.device = torch.device(f"cuda:{local}" if device == "cuda" else device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.store = None
        if "RANK" in os.environ:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            limit = timedelta(seconds=timeout)
            self.store = dist.TCPStore(host, port, self.world_size, self.rank == 0 and not elastic, limit)
            # After a restart, torch's shared store still holds the dead ranks' addresses, and joining may hang; a
            # prefix of our own per attempt keeps the attempts apart.
            store = dist.PrefixStore(f"run{self.attempt}", self.store)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, timeout=limit, rank=self.rank, world_size=self.world_size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print0(self, text: str):
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def all_reduce_sum(self, *values: int, operation=dist.ReduceOp.SUM) -> list[int]:
        """Each value's sum over the ranks."""
        if not dist.is_initialized():
            return [int(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def all_reduce_max(self, value: int) -> int:
        return self.all_reduce_sum(value, operation=dist.ReduceOp.MAX)[0]

    def all_reduce(self, tensor: torch.Tensor):
        """Put the sum over the ranks in the place of a tensor."""
        if dist.is_initialized():
            dist.all_reduce(tensor)

    def broadcast(self, value):
        """Rank 0's value, on every rank."""
        box = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, action: Callable, *args):
        """What `action(*args)` returns on rank 0, on every rank. If it fails there, rank 0 says why and all end."""
        result = error = None
        if self.is_main:
            try:
                result = action(*args)
            except (ValueError, OSError) as failed:
                error = failed
        if self.broadcast(error is not None):
            raise error or SystemExit(1)
        return self.broadcast(result)

    def shared_run_name(self, name: str) -> str:
        """The name that the first attempt of this torchrun came with, however often it was restarted since."""
        if self.store is None:
            return name
        if self.is_main:
            name = self.store.compare_set("llava-run-name", "", name).decode()
        return self.broadcast(name)

    def replicas_match(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether every rank holds the same bits."""
        if not dist.is_initialized():
            return True
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for p in parameters:
            bits = p.detach().reshape(-1).view({4: torch.int32, 2: torch.int16}[p.element_size()])
            total = 31 * total + bits.sum(dtype=torch.int64)  # wraps around, which is as good
        ends = torch.stack([total, -total])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        return bool(ends[0] == -ends[1])


def choose_device(name: str | None) -> str:
    """What to run on: the named device, or a GPU where there is one. Raises ValueError on one that is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name != "cpu" and name not in gpus and not (name == "cuda" and gpus):
        raise ValueError(f"--device {name}: here are {', '.join(['cpu', *gpus])}")
    return name


def compute_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """What --dtype means here: bfloat16 where the device has it; never float16, whose range loses gradients."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, dtype)


def autocast(device: torch.device, dtype: str):
    """Arithmetic in bfloat16 on weights in float32, or all of it in float32."""
    used = compute_dtype(device, dtype)
    return nullcontext() if used == torch.float32 else torch.autocast(device.type, used)
