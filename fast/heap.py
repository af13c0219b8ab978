"""What a CPU's memory costs once it is freed: pages that are fetched again and again, or holes that nothing fits.

By itself glibc gives large blocks and the heap's end back to the system when they are freed, and fetches them again
page by page: in each step of training the gradients of a vocabulary, in each answer the activations of the prompt. And
it never gives back the holes that smaller blocks leave, though torch asks for aligned ones, which do not fit where one
of the same size was, and though what alignment leaves over keeps neighboring holes apart: in training they come to
half of what a step takes. So what is freed is kept, holes may grow together, and if they become too many they are given
back after all. Figures are in LOG.md.
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

import torch
from torch import nn

from llava import Decoder

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt(3)
TUNABLES, WITHOUT_LISTS = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
STATM = Path("/proc/self/statm")


def to_be_told() -> bool:
    """Whether the C library is the one that is meant here, and was not told what to map by the user."""
    return platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ


def started_directly() -> bool:
    """Whether Python was given this program itself, and not a debugger or profiler, which runs it and may be lost."""
    first = next((arg for arg in sys.orig_argv[1:] if arg == "-c" or not arg.startswith("-")), None)
    return first == sys.argv[0]


def start_anew():
    """Start this program once more, without glibc's lists of small blocks: it is told so in the environment only.

    Before a tensor is a small block, which its alignment left over. In a list it counts as used, and stands between
    two holes that otherwise would be one.
    """
    if os.environ.get(TUNABLES) == WITHOUT_LISTS:
        del os.environ[TUNABLES]  # programs that this one starts are as they are
    elif TUNABLES not in os.environ and started_directly() and not torch.cuda.is_available() and to_be_told():
        os.execve(sys.executable, sys.orig_argv, os.environ | {TUNABLES: WITHOUT_LISTS})


def keep_freed(device: torch.device) -> ctypes.CDLL | None:
    """Let the C library keep what is freed; returns it, or None where it is left alone, as to work on a GPU."""
    if device.type != "cpu" or not to_be_told():
        return None
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)  # no block is a mapping of its own
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)  # nor is the heap's end cut off
    return libc


def resident() -> int:
    """Bytes of memory that this process has, on Linux."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class GiveBack:
    """Gives all that is free back to the system when the process holds more than `limit` bytes.

    What it holds then is no hole. If that leaves no room for `holes`, something came after the limit was set, such as
    torch's compiler, and the limit moves up: else there would be a trim at every layer, and nothing gained.
    """

    def __init__(self, libc: ctypes.CDLL, limit: int, holes: int):
        self.libc, self.limit, self.holes = libc, limit, holes

    def __call__(self, x: torch.Tensor):
        """Look between two layers, and again when the gradient of x is known."""
        self.look()
        if x.requires_grad:
            x.register_hook(self.look)

    def look(self, gradient: torch.Tensor | None = None):
        if resident() > self.limit:
            self.libc.malloc_trim(0)
            self.limit = max(self.limit, resident() + self.holes)


def limit_holes(model: nn.Module, device: torch.device, step: int):
    """Keep what is freed, within limits, when the model is ready to train.

    Args: step: bytes that a step takes; as many may be lost to holes, and 150 MB in any case.
    """
    if libc := keep_freed(device):
        holes = max(step, 150_000_000)
        watch = GiveBack(libc, resident() + step + holes, holes)
        for decoder in (module for module in model.modules() if isinstance(module, Decoder)):
            decoder.watch = watch
