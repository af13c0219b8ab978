"""LoRA's dropout and NF4's dequantization, faster on a CPU."""

import torch
from torch import nn

from lora import NF4_VALUES, LoRALinear, NF4Linear, dequantize_absmax


class FastDropout(nn.Dropout):
    """nn.Dropout that draws 16 random bits for each number where torch draws a float, and stores one byte of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits are random
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return torch.where(kept, x, 0).mul_(1 / (1 - self.p))


class CompiledNF4Linear(NF4Linear):
    """An NF4Linear for torch.compile, which makes one loop of dequantization and matmul.

    The codes are stored in another order: byte i of a block holds the codes of numbers i and i + block / 2, so that
    the loop reads neighbors. The absmax are in float32: torch 2.13 compiles double-quantized ones to wrong numbers.
    """

    @property
    def packed(self) -> torch.Tensor:
        halves = self.weight.view(-1, self.block // 2)
        codes = torch.cat([halves >> 4, halves & 15], dim=1).view(-1, 2)
        return (codes[:, 0] << 4 | codes[:, 1])[:, None]

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            return super().dequantize(dtype)
        weight = self.loop_dequantize()
        return weight if dtype is None else weight.to(dtype)

    def loop_dequantize(self) -> torch.Tensor:
        """The weight (out, in), written as elementwise operations that compile to one loop."""
        codes = self.weight.view(-1, 1, self.block // 2).int()
        numbers = torch.cat([select_code(codes, 128), select_code(codes, 8)], dim=1)  # (blocks, 2, block / 2)
        return (numbers * self.absmax[:, None, None]).to(self.dtype).view(self.out_features, self.in_features)


def select_code(codes: torch.Tensor, bit: int, values: tuple[float, ...] = NF4_VALUES) -> torch.Tensor | float:
    """The values of the four bits from `bit` down, by a tree of comparisons, which compiles to vector instructions.

    A look-up in a table would compile to a loop that reads number by number.
    """
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    below, above = (select_code(codes, bit // 2, part) for part in (values[:half], values[half:]))
    return torch.where(codes & bit != 0, above, below)


def prepare_nf4(layer: NF4Linear):
    """Turn a layer into a CompiledNF4Linear, in place; a layer with a shorter last block is left out of compiling."""
    if layer.out_features * layer.in_features % layer.block:
        layer.forward = torch.compiler.disable(layer.forward)
        return
    if hasattr(layer, "nested_absmax"):
        absmax = dequantize_absmax(layer.absmax, layer.nested_absmax, layer.nested_offset)
        layer.absmax = nn.Parameter(absmax, requires_grad=False)
        del layer.nested_absmax, layer.nested_offset
    if not isinstance(layer, CompiledNF4Linear):
        codes = torch.stack([layer.weight >> 4, layer.weight & 15], dim=-1).view(-1, 2, layer.block // 2)
        layer.weight.data = (codes[:, 0] << 4 | codes[:, 1]).view(-1, 1)
        layer.__class__ = CompiledNF4Linear


def swap_dropout(layer: LoRALinear):
    """Give a LoRALinear the faster dropout."""
    layer.lora_dropout.__class__ = FastDropout
