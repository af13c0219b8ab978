"""What a CPU's memory costs once it is freed: pages that are fetched again and again, or holes that nothing fits.

By itself glibc gives large blocks and the heap's end back to the system when they are freed, and fetches them again
page by page: in each step of training the gradients of a vocabulary, in each answer the activations of the prompt. And
it never gives back the holes that smaller blocks leave, though torch asks for aligned ones, which do not fit where one
of the same size was: in training they come to a third of what a step takes. Figures are in LOG.md.
"""

import ctypes
import os
import platform
from pathlib import Path

import torch
from torch import nn

from llava import Decoder

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt(3)
STATM = Path("/proc/self/statm")


def keep_freed(device: torch.device) -> ctypes.CDLL | None:
    """Let the C library keep what is freed; returns it, or None where it is left alone: to work on a GPU, if it is not
    glibc, and if it was told what to map (MALLOC_MMAP_THRESHOLD_)."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return None
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)  # no block is a mapping of its own
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)  # nor is the heap's end cut off
    return libc


def resident() -> int:
    """Bytes of memory that this process has, on Linux."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class GiveBack:
    """Gives all that is free back to the system when the process holds more than `limit` bytes."""

    def __init__(self, libc: ctypes.CDLL, limit: int):
        self.libc, self.limit = libc, limit

    def __call__(self, x: torch.Tensor):
        """Look between two layers, and again when the gradient of x is known."""
        self.look()
        if x.requires_grad:
            x.register_hook(self.look)

    def look(self, gradient: torch.Tensor | None = None):
        if resident() > self.limit:
            self.libc.malloc_trim(0)


def limit_holes(model: nn.Module, device: torch.device, step: int):
    """Keep what is freed, within limits, when the model is ready to train.

    Args: step: bytes that a step takes, of which a quarter may be lost to holes, and 250 MB in any case.
    """
    if libc := keep_freed(device):
        watch = GiveBack(libc, resident() + step + max(step // 4, 250_000_000))
        for decoder in (module for module in model.modules() if isinstance(module, Decoder)):
            decoder.watch = watch
