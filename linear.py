"""What the layers of both transformers are made of: products that are fast on a CPU, too, and what is not kept.

An answer is made a token at a time, so that every matrix is read from memory for a single row: what a CPU can do then
is bytes per second. In training it is the activations, kept for the gradients, that fill the memory, and most of them
are cheap to make again. Figures, of two cores without AVX-512, are in LOG.md.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SHORT = 256  # positions
FEW = 32  # rows
LARGE = 1 << 18  # numbers in a matrix; a smaller one stays in the cache
PIECES = 8
EMULATED = torch.backends.cpu.get_cpu_capability() == "AVX2"  # such a CPU has no arithmetic in 16 bits


@contextmanager
def not_emulated():
    """As if this CPU had arithmetic in 16 bits."""
    global EMULATED
    before, EMULATED = EMULATED, False
    try:
        yield
    finally:
        EMULATED = before


def need_compiler(device: torch.device):
    """Raise ValueError where torch.compile would look for a C++ compiler and find none."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("--compile needs a C++ compiler here: g++, or the one that CXX names")


def leave_out(model: nn.Module):
    """Before compiling: layers that say `compiles = False` are to run as they are."""
    for module in model.modules():
        if not getattr(module, "compiles", True):  # no decorator: it takes a second to import
            module.forward = torch.compiler.disable(module.forward)


def remade(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """function(*inputs), of which the inputs alone are kept for the gradients: the rest is made again on the way back.

    A product that ends it is not: checkpoint goes no further than what has to be made (Chen et al. 2016, 1604.06174).
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # which chooses by itself what to keep
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


class Linear(nn.Linear):
    """torch.nn.Linear, by `product`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self.bias)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., C) times the transpose of weight (N, C), plus bias (N,): what torch.nn.functional.linear gives."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    rows, dtype = x.numel() // x.shape[-1], arithmetic_of(x)
    if dtype.itemsize == 2 and EMULATED and rows > PIECES:
        return widened(x, weight, bias, dtype)
    if torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if rows == 1 and torch.compiler.is_compiling():  # becomes one loop over the matrix, of which no product is kept
        y = (weight.float() * x.float().flatten()).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
    elif rows == 1 and weight.numel() >= LARGE and dtype.itemsize == 2 and not EMULATED:
        y = torch.mv(weight.to(dtype), x.to(dtype).flatten()).view(*x.shape[:-1], -1)
    elif rows <= FEW and weight.numel() >= LARGE and len(weight) % PIECES == 0 and dtype == torch.float32:
        y = in_pieces(x, weight)
    else:
        return F.linear(x, weight, bias)
    return y if bias is None else y + bias


def arithmetic_of(x: torch.Tensor) -> torch.dtype:
    """The type that a product of x is computed in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def narrowed(x: torch.Tensor) -> torch.Tensor:
    """x as its products will have it: rounded once, and kept once, for all of them; autocast does it for each."""
    return x.to(arithmetic_of(x))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
    """torch's scaled_dot_product_attention of q (B, H, T, D), k and v (B, KV, S, D): (B, H, T, D).

    To train on short rows a CPU does it in float32, whatever they are in: in 16 bits the way back would take 3 times as
    long.
    """
    dtype = arithmetic_of(q)
    if q.device.type != "cpu" or dtype.itemsize > 2 or k.shape[-2] >= SHORT or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(dtype)


def widened(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """In float32, rounded to `dtype` at the end: 8 times as fast as emulating 16 bits, and 60 times on the way back."""
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)


def in_pieces(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As a batch of PIECES products, which all cores share; for one whole product of few rows only one core works."""
    pieces = weight.view(PIECES, -1, x.shape[-1]).transpose(1, 2)  # (PIECES, C, N / PIECES)
    y = torch.bmm(x.reshape(1, -1, x.shape[-1]).expand(PIECES, -1, -1), pieces)  # (PIECES, rows, N / PIECES)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)
