"""The processes torchrun started, the device each has, and what they agree on."""

import os
import sys
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist


class Ranks:
    """This process among those torchrun started; alone, rank 0 of 1."""

    def __init__(self, device: str | None):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(f"cuda:{local}" if device == "cuda" else device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ:
            # After a restart, torch's shared store still holds the dead ranks' addresses, and joining may hang; a
            # prefix of our own per attempt keeps the attempts apart.
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            store = dist.TCPStore(host, port, self.world, self.rank == 0 and not elastic, timedelta(minutes=10))
            store = dist.PrefixStore(f"run{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def say(self, text: str):
        if self.first:
            print(text, file=sys.stderr, flush=True)

    def total(self, value: int) -> int:
        """Sum over the ranks."""
        if not dist.is_initialized():
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor)
        return int(tensor)

    def agree(self, value):
        """Rank 0's value, on every rank."""
        box = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        return box[0]


def autocast(device: torch.device, dtype: str):
    """bfloat16 arithmetic on float32 weights where the device has it; never float16, whose range loses gradients."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
