"""The processes of a training run: which rank this is, its device, and the collectives that the loop needs."""

import gc
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

from formats.weights import choose_dtype


class Distributed:
    """This process among those that torchrun started; without torchrun it is rank 0 of 1.

    Args: device: as for `choose_device`. timeout: seconds after which a rank that does not answer counts as dead.
    """

    def __init__(self, device: str | None, timeout: float = 1800):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # how often torchrun restarted us
        device = choose_device(device)
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.store = self.join(timedelta(seconds=timeout)) if "RANK" in os.environ else None
        self.mesh = None  # under fsdp, the DeviceMesh of all ranks

    def join(self, timeout: timedelta) -> dist.Store:
        """Initialize the process group; returns torchrun's key-value store."""
        # Imported before there is a group: their functions' default arguments would keep it for good, see leave().
        import torch.distributed.fsdp
        import torch.distributed.optim  # noqa: F401

        is_master = self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, self.world_size, is_master, timeout)
        # After a restart the store still holds the dead ranks' addresses, on which joining may hang: hence a prefix.
        prefixed = dist.PrefixStore(f"run{self.attempt}", store)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=prefixed, timeout=timeout, rank=self.rank, world_size=self.world_size)
        return store

    def leave(self):
        """Leave the process group and end its threads: at the interpreter's exit a running thread aborts the process.

        Gloo's threads end when nothing refers to the group any more. Torch's caches keep an fsdp run's mesh for good,
        and the mesh keeps the group; the model, which does so too, is in reference cycles.
        """
        if dist.is_initialized():
            getattr(self.mesh, "_pg_registry", {}).clear()
            gc.collect()
            dist.destroy_process_group()

    def print0(self, text: str):
        """Print to stderr, on rank 0 only."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def all_reduce(self, tensor: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
        """Replace a tensor by its sum over all ranks, in place; returns it."""
        if dist.is_initialized():
            dist.all_reduce(tensor, operation)
        return tensor

    def all_reduce_sum(self, *values: int) -> list[int]:
        """Return the sum over all ranks of each integer."""
        return self.all_reduce(torch.tensor(values, dtype=torch.int64, device=self.device)).tolist()

    def all_reduce_max(self, value: int) -> int:
        """Return the largest value of any rank."""
        return int(self.all_reduce(torch.tensor(value, dtype=torch.int64, device=self.device), dist.ReduceOp.MAX))

    def broadcast(self, value):
        """Return rank 0's value on every rank."""
        box = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, action: Callable, *args):
        """Return `action(*args)`, called on rank 0 only, on every rank. If it fails, rank 0 raises, the others exit."""
        result = error = None
        if self.is_main:
            try:
                result = action(*args)
            except (ValueError, OSError) as failure:
                error = failure
        if self.broadcast(error is not None):
            raise error or SystemExit(1)
        return self.broadcast(result)

    def shared_run_name(self, name: str) -> str:
        """Return the name that rank 0 proposed in the first attempt: it survives torchrun's restarts."""
        if self.store and self.is_main:
            name = self.store.compare_set("llava-run-name", "", name).decode()
        return self.broadcast(name)

    def replicas_match(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Return whether every rank holds the same bits, by comparing an integer hash of them."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for p in parameters:
            bits = p.detach().reshape(-1).view({4: torch.int32, 2: torch.int16}[p.element_size()])
            total = 31 * total + bits.sum(dtype=torch.int64)  # overflow wraps around, which a hash may do
        largest, negated_smallest = self.all_reduce(torch.stack([total, -total]), dist.ReduceOp.MAX)
        return bool(largest == -negated_smallest)


def choose_device(name: str | None) -> str:
    """Return the named device; for None, a GPU if there is one. Raises ValueError if the device does not exist."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name != "cpu" and name not in gpus and not (name == "cuda" and gpus):
        raise ValueError(f"--device {name}: this machine has {', '.join(['cpu', *gpus])}")
    return name


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Return a context for --dtype: bfloat16 on float32 weights, or no change. Never float16: it underflows."""
    return torch.autocast(device.type, torch.bfloat16, enabled=choose_dtype(dtype, device.type) == torch.bfloat16)
