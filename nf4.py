"""NF4: weights in four bits, as QLoRA keeps the decoder it does not train (Dettmers et al. 2023, arXiv 2305.14314).

A matrix is cut into blocks of 64 numbers. A block is divided by its largest magnitude, its absmax, and every number
becomes the nearest of 16 values: those that cut a normal distribution into equally likely parts, zero among them. Two
codes share a byte. The absmax are put into 8 bits in the same way ("double quantization"), in blocks of 256, so that a
number takes 4 + 8 / 64 + 32 / (64 x 256) = 4.127 bits in all.

    W (out, in) --> codes: 4 bits each, absmax: 8 bits per 64 codes, absmax of the absmax: 32 bits per 16,384 codes

Codes, absmax and what comes back are those of bitsandbytes 0.50 on a CPU, bit for bit; names in files are its too.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fast.linear import FrozenProduct, arithmetic_of, narrowed, product

BLOCK, NESTED_BLOCK = 64, 256  # numbers that share an absmax; absmax that share one themselves
CHUNK = 1 << 18  # numbers worked on at a time: they stay in the cache, and no matrix is ever whole in float32
TINY = 1e-38  # stands for the absmax of a block of zeros

# The quantiles of appendix E of the paper, in float32, as bitsandbytes has them.
CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def code_book(device: torch.device) -> torch.Tensor:
    """The 16 values, (16,) float32."""
    return torch.tensor(CODES, device=device)


@cache
def nested_code_book(device: torch.device) -> torch.Tensor:
    """The 256 values of the absmax, (256,) float32: a sign, one of seven powers of ten, and 2^i steps within the i-th
    (Dettmers 2015, arXiv 1511.04561), so that small ones are kept as precisely as large ones; and 0, and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), device=device)


@cache
def pairs_of_codes(device: torch.device) -> torch.Tensor:
    """What each byte stands for, its two float32 seen as one int64, (256,): one look-up per byte, not two, and of a
    type that index_select copies fast (with rows of two floats it takes more than twice as long, see LOG.md)."""
    byte, codes = torch.arange(256, device=device), code_book(device)
    return torch.stack([codes[byte >> 4], codes[byte & 15]], dim=1).view(torch.int64).flatten()


def middles(values: torch.Tensor) -> torch.Tensor:
    """Where rounding goes from one value to the next; what lies on the border takes the lower one."""
    return (values[:-1] + values[1:]) / 2


# ---------------------------------------------------------------------------------------------------------------------
# there and back


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes (ceil(N / 2), 1) uint8 and absmax (ceil(N / 64),) float32 of N numbers of any shape and float type.

    The first of two codes is the high half of its byte; an odd count is filled up with the code of zero.
    """
    flat = weight.detach().reshape(-1)
    packed, absmax = zip(*(quantize_part(part) for part in flat.split(CHUNK)))
    return torch.cat(packed)[: (len(flat) + 1) // 2, None], torch.cat(absmax)


def quantize_part(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a part that begins where a block begins, flat; the last block is filled up with zeros."""
    ragged = len(part) % BLOCK
    x = F.pad(part.float(), (0, -len(part) % BLOCK)).view(-1, BLOCK)
    absmax = x.abs().amax(dim=1)
    scaled = x * (1 / absmax.clamp(min=TINY))[:, None]  # the reciprocal, for it rounds as bitsandbytes does
    if ragged:  # in a last, shorter block it divides, and keeps TINY for a zero
        absmax[-1:].clamp_(min=TINY)
        scaled[-1] = x[-1] / absmax[-1]
    codes = torch.bucketize(scaled, middles(code_book(part.device)), out_int32=True).view(-1, 2)
    return (codes[:, 0] << 4 | codes[:, 1]).to(torch.uint8), absmax


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...], dtype=torch.float32, block: int = BLOCK
) -> torch.Tensor:
    """The numbers (shape) behind packed codes and their absmax, multiplied in float32 and rounded to `dtype`."""
    count, codes = math.prod(shape), packed.flatten()
    numbers = torch.empty(count, dtype=dtype, device=packed.device)
    chunk = CHUNK if packed.device.type == "cpu" else count + block  # a GPU has no cache to mind
    for begin in range(0, count, chunk):
        end = min(begin + chunk, count)
        y = pairs_of_codes(packed.device).index_select(0, codes[begin // 2 : (end + 1) // 2].int())
        y = y.view(torch.float32)[: end - begin]
        if ragged := len(y) % block:
            y = F.pad(y, (0, block - ragged))
        y.view(-1, block).mul_(absmax[begin // block : -(-end // block), None])
        numbers[begin:end] = y[: end - begin]
    return numbers.view(shape)


def quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization: codes (N,) uint8, absmax of the absmax (ceil(N / 256),), and the mean taken off before.

    Rounds to the nearest value, as bitsandbytes does on a GPU. On a CPU it rounds through a table of 65,536 entries,
    which puts one or two codes in a thousand on the neighbor; what a stored code stands for is the same everywhere.
    """
    offset = absmax.mean()
    x = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = x.abs().amax(dim=1)
    scaled = x / nested.clamp(min=TINY)[:, None]
    codes = torch.bucketize(scaled, middles(nested_code_book(absmax.device)), out_int32=True)
    return codes.flatten()[: len(absmax)].to(torch.uint8), nested, offset


def dequantize_absmax(codes: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The absmax (N,) float32 behind their codes."""
    values = nested_code_book(codes.device).index_select(0, codes.int())
    return values * nested.repeat_interleave(NESTED_BLOCK)[: len(codes)] + offset


# ---------------------------------------------------------------------------------------------------------------------
# to be compiled


def in_halves(packed: torch.Tensor, block: int) -> torch.Tensor:
    """The codes of each block in another order: the i-th byte holds those of the numbers i and i + block / 2, where it
    held 2 i and 2 i + 1, so that a loop over its high halves, or low ones, goes through neighbors."""
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1, 2, block // 2)
    return (codes[:, 0] << 4 | codes[:, 1]).view(-1, 1)


def in_pairs(halves: torch.Tensor, block: int) -> torch.Tensor:
    """The other way round."""
    halves = halves.view(-1, block // 2)
    codes = torch.cat([halves >> 4, halves & 15], dim=1).view(-1, 2)
    return (codes[:, 0] << 4 | codes[:, 1])[:, None]


def looked_up(codes: torch.Tensor, bit: int, values: tuple[float, ...] = CODES) -> torch.Tensor | float:
    """What the four bits from `bit` down stand for, by a tree of choices, which a compiled loop has in its registers;
    of a table it would make a loop that reads number by number."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    below, above = (looked_up(codes, bit // 2, part) for part in (values[:half], values[half:]))
    return torch.where(codes & bit != 0, above, below)


def of_halves(halves: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, block: int):
    """`dequantize` of codes that are `in_halves`, as one loop, which becomes that of the product they are for."""
    codes = halves.view(-1, 1, block // 2).int()
    numbers = torch.cat([looked_up(codes, 128), looked_up(codes, 8)], dim=1)  # (blocks, 2, block / 2)
    return (numbers * absmax[:, None, None]).to(dtype).view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# a layer


class NF4Linear(nn.Module):
    """A linear layer whose weight stands still in NF4; in and out as torch.nn.Linear, in x's type or autocast's.

    Args: parts: the tensors under bitsandbytes' names, "weight" the packed codes; shape: (out, in); dtype: what the
    weight was before, and is made into again.
    """

    def __init__(self, parts: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype, block: int = BLOCK):
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype, self.block, self.halved = dtype, block, False
        for name, tensor in parts.items():  # parameters, which move with the model; not buffers, which DDP sends around
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", None)

    @classmethod
    def of(cls, weight: torch.Tensor, double: bool = True) -> "NF4Linear":
        """Quantize a weight (out, in)."""
        packed, absmax = quantize(weight)
        parts = {"weight": packed, "absmax": absmax}
        if double:
            parts |= zip(("absmax", "nested_absmax", "nested_offset"), quantize_absmax(absmax))
        return cls(parts, tuple(weight.shape), weight.dtype)

    @property
    def packed(self) -> torch.Tensor:
        """The codes in bitsandbytes' order."""
        return in_pairs(self.weight, self.block) if self.halved else self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight (out, in) in the type it had, and then, if one is named, in another."""
        absmax, kept, shape = self.absmax, self.dtype, (self.out_features, self.in_features)
        if kept == torch.float32 and dtype is not None:
            kept = dtype  # which rounds once, as going through float32 would
        if hasattr(self, "nested_absmax"):
            absmax = dequantize_absmax(absmax, self.nested_absmax, self.nested_offset)
        if self.halved and torch.compiler.is_compiling():
            weight = of_halves(self.weight, absmax, shape, kept, self.block)
        else:
            weight = dequantize(self.packed, absmax, shape, kept, self.block)
        return weight if dtype is None else weight.to(dtype)

    def before_compiling(self):
        """Put the codes in the order for it, and undo the double quantization: 0.37 bits more for each number, but of
        an absmax whose own is looked up torch 2.13's compiler makes wrong numbers."""
        if self.out_features * self.in_features % self.block:  # no decorator: it takes a second to import
            self.forward = torch.compiler.disable(self.forward)
            return
        if hasattr(self, "nested_absmax"):
            absmax = dequantize_absmax(self.absmax, self.nested_absmax, self.nested_offset)
            self.absmax = nn.Parameter(absmax, requires_grad=False)
            del self.nested_absmax, self.nested_offset
        if not self.halved:
            self.weight.data = in_halves(self.weight, self.block)
            self.halved = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            y = self.product(x)
        elif torch.compiler.is_compiling():  # which would keep the weight, if it were not told not to
            y = checkpoint(self.product, x, use_reentrant=False)
        else:
            y = FrozenProduct.apply(narrowed(x), None, self.dequantize)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return product(narrowed(x), self.dequantize(arithmetic_of(x)))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def count_weights(module: nn.Module) -> int:
    """Numbers in the matrices and vectors of a module, however many bits each has."""
    quantized = [part for part in module.modules() if isinstance(part, NF4Linear)]
    packed = {id(p) for part in quantized for name, p in part.named_parameters() if name != "bias"}
    whole = sum(p.numel() for p in module.parameters() if id(p) not in packed)  # a tied one once
    return whole + sum(part.in_features * part.out_features for part in quantized)
