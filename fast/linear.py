"""Linear layers whose matmuls are faster on a CPU: other kernels, same parameters, same numbers up to rounding."""

import torch
import torch.nn.functional as F
from torch import nn

LARGE = 1 << 18  # numbers in a matrix or its input; smaller ones stay in the CPU's cache, where the choice matters less
FEW = 32  # rows; with fewer, a matmul is limited by the time to read the matrix
PIECES = 8


class FastLinear(nn.Linear):
    """nn.Linear, with the kernels named in `items`, a set that accelerate() fills."""

    items: frozenset[str] = frozenset()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, dtype = x.numel() // x.shape[-1], compute_dtype(x)
        if x.device.type != "cpu" or self.weight.is_meta:
            return F.linear(x, self.weight, self.bias)
        if "widen" in self.items and dtype.itemsize == 2 and rows > PIECES and lacks_16_bit():
            return widened_linear(x, self.weight, self.bias, dtype)
        if torch.compiler.is_compiling():
            if rows == 1 and "one_row" in self.items and not torch.is_grad_enabled():
                return one_row_linear(x, self.weight, self.bias)
            return F.linear(x, self.weight, self.bias)
        float32 = x.dtype == self.weight.dtype == dtype == torch.float32
        large = self.weight.numel() >= LARGE or x.numel() >= LARGE
        if "onednn" in self.items and float32 and large and rows > 1:
            return OneDNNLinear.apply(x, self.weight, self.bias)
        if "pieces" in self.items and float32 and rows <= FEW and not torch.is_grad_enabled():
            return pieces_linear(x, self.weight, self.bias)
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


def pieces_linear(x, weight, bias) -> torch.Tensor:
    """The layer for a few rows, as a batch of PIECES matmuls, one for each core; a single one would use one core."""
    if weight.numel() < LARGE or len(weight) % PIECES or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    pieces = weight.view(PIECES, -1, x.shape[-1]).transpose(1, 2)  # (PIECES, C, N / PIECES)
    y = torch.bmm(x.reshape(1, -1, x.shape[-1]).expand(PIECES, -1, -1), pieces)  # (PIECES, rows, N / PIECES)
    y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def onednn_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., C) times the transpose of weight (N, C) by oneDNN, which torch ships and its compiler uses."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """x W^T + b by oneDNN in float32. The gradient of W stays torch's own matmul, which is as fast."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return onednn_matmul(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        rows = grad.flatten(0, -2)  # (rows, N)
        if ctx.needs_input_grad[0]:
            grad_x = onednn_matmul(grad.contiguous(), weight.T)
        if ctx.needs_input_grad[1]:
            grad_weight = rows.T @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias
