"""LoRA and QLoRA, written out: train a small update of each matrix, and leave the matrix as it is.

    y = W x + (alpha / r) B A x        W (out, in) is frozen; A (r, in) and B (out, r) train

The rank r is small, so A and B have few parameters. A starts at random and B at zero, so training starts from the base
model (Hu et al. 2021, arXiv 2106.09685). With W in four bits (NF4, second half of this file) this is QLoRA (Dettmers et
al. 2023, arXiv 2305.14314). formats/ reads and writes the files. Leave out --bits 4 for LoRA:

    python train.py --stage 2 --model BASE --lora llm --bits 4 --out ADAPTER
    python sample.py --model BASE --adapter ADAPTER --bits 4 --image cat.jpg
    python -m formats merge BASE ADAPTER OUT --bits 4    add the update to the weights: an ordinary model again
    python -m formats quantize BASE OUT                  store the decoder's layers in four bits
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava import Llava

RANKS = {"llm": 16, "vision": 32}  # default ranks; the vision tower needs more than the decoder
DROPOUT = 0.05  # default, as in LLaVA-1.5
PREFIXES = {"llm": "language_model.model.layers.", "vision": "vision_tower.vision_model.encoder.layers."}


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained update: x (..., in) to (..., out).

    Args: base: an nn.Linear or NF4Linear; scale: alpha / r; dropout: on the input of A, in training.
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        device = base.weight.device
        self.base, self.rank, self.scale = base.requires_grad_(False), rank, scale
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        self.lora_dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # uniform within 1 / sqrt(in), as nn.Linear's own
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain frozen layer with the update added to its weight: in float32, then rounded to the weight's dtype."""
        weight = base_weight(self)
        update = self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scale
        return frozen_linear(weight.float().add_(update).to(weight.dtype), self.base.bias)


class DoRALinear(LoRALinear):
    """DoRA: LoRA turns the rows of W, and their lengths m (out,) train, too: m / |W + scale B A| * (W x + scale B A x).

    |...| is the norm of each row, a constant for gradients (Liu et al. 2024, arXiv 2402.09353, section 4.3).
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base, rank, scale, dropout)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """|W + scale B A| (out,): |W|^2 + 2 scale <W A^T, B> + scale^2 <B A A^T, B> in each row needs no sum."""
        weight, a, b = base_weight(self).float(), self.lora_A.weight.float(), self.lora_B.weight.float()
        mixed = 2 * self.scale * (weight @ a.T) + self.scale**2 * (b @ (a @ a.T))
        return (weight.square().sum(dim=1) + (mixed * b).sum(dim=1)).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        gain, y, dropped = self.lora_magnitude_vector / self.row_norms(), self.base(x), self.lora_dropout(x)
        turned = self.base(dropped) if self.training and self.lora_dropout.p else y
        turned = turned if self.base.bias is None else turned - self.base.bias
        update = self.lora_B(self.lora_A(dropped)) * self.scale
        return y + ((gain - 1) * turned + gain * update).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        whole, gain = super().merged(), self.lora_magnitude_vector / self.row_norms()
        whole.weight.data = (whole.weight.float() * gain[:, None]).to(whole.weight.dtype)
        return whole


def frozen_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A plain frozen linear layer with this weight (out, in)."""
    linear = nn.Linear(*weight.T.shape, bias=bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), bias
    return linear.requires_grad_(False)


def base_weight(layer: nn.Module) -> Tensor:
    """A copy of the frozen weight (out, in) of a LoRALinear, an NF4Linear or an nn.Linear, dequantized if needed."""
    base = layer.base if isinstance(layer, LoRALinear) else layer
    return base.dequantize() if isinstance(base, NF4Linear) else base.weight.detach().clone()


def lora_scale(rank: int, alpha: float, rank_stabilized: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) if rank-stabilized (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear of the model by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


# ---------------------------------------------------------------------------------------------------------------------
# adding LoRA to a model, and merging it


def find_linears(model: Llava, component: str) -> list[str]:
    """Paths of the linear layers of "llm" or "vision"; of the vision tower, only in blocks whose output is used."""
    prefix = PREFIXES[component]
    linear = nn.Linear | NF4Linear
    paths = [path for path, module in model.named_modules() if isinstance(module, linear) and path.startswith(prefix)]
    if component == "vision":
        used = len(model.vision_tower.vision_model.blocks(model.config.vision_feature_layer))
        paths = [path for path in paths if int(path.removeprefix(prefix).split(".")[0]) < used]
    return paths


def choose_layers(model: Llava, ranks: dict[str, int], names: list[str] | None) -> dict[str, int]:
    """The rank of each layer that gets an update, by its path; arguments and errors as in add_lora."""
    chosen = {path: rank for component, rank in ranks.items() for path in find_linears(model, component)}
    known = sorted({path.split(".")[-1] for path in chosen})
    if unknown := sorted(set(names or []) - set(known)):
        raise ValueError(f"no layer of {' or '.join(ranks)} is called {unknown[0]!r}; there are {', '.join(known)}")
    chosen = {path: rank for path, rank in chosen.items() if names is None or path.split(".")[-1] in names}
    for component in ranks:
        if not any(path.startswith(PREFIXES[component]) for path in chosen):
            raise ValueError(f"no layer of {component} is called {' or '.join(names)}")
    for path, rank in chosen.items():
        base = model.get_submodule(path)
        if not 1 <= rank <= min(base.in_features, base.out_features):
            raise ValueError(f"a rank of {rank} for {path}, which is {base.out_features} x {base.in_features}")
    return chosen


def add_lora(
    model: Llava, ranks: dict[str, int], alpha: float | None, dropout: float, names: list[str] | None = None,
    dora: bool = False,
) -> dict[str, tuple[int, float]]:  # fmt: skip
    """Replace the chosen linear layers by LoRALinears or DoRALinears; returns the rank and alpha of each by its path.

    Args: ranks: for "llm", "vision" or both; alpha: default twice the rank; names: last part of the layers' paths, such
    as ["q_proj", "v_proj"], default all.
    Raises ValueError, before the model is changed, on an unknown name or a rank that is too small or too large.
    """
    chosen = choose_layers(model, ranks, names)
    layers = {path: (rank, 2 * rank if alpha is None else alpha) for path, rank in chosen.items()}
    for path, (rank, layer_alpha) in layers.items():
        kind = DoRALinear if dora else LoRALinear
        layer = kind(model.get_submodule(path), rank, lora_scale(rank, layer_alpha), dropout)
        model.set_submodule(path, layer)
    return layers


def merge(model: nn.Module):
    """Replace each LoRALinear by its merged layer. Raises ValueError if there is none, or if all updates are zero."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("there is no LoRA to merge; perhaps it was merged before")
    if not any(layer.lora_A.weight.any() and layer.lora_B.weight.any() for layer in layers.values()):
        raise ValueError("the update is zero everywhere: it was never trained, or this is the wrong file")
    for path, layer in layers.items():
        model.set_submodule(path, layer.merged())


# ---------------------------------------------------------------------------------------------------------------------
# NF4: four bits for each weight
#
# A matrix is cut into blocks of 64 numbers. Each block is divided by its largest magnitude, its absmax, and every
# number is rounded to the nearest of 16 values: the quantiles of a normal distribution, zero among them. The index of
# the value is its code; two codes share a byte. The absmax are quantized to 8 bits in the same way, in blocks of 256
# ("double quantization"), so that a number takes 4 + 8 / 64 + 32 / (64 x 256) = 4.127 bits.
#
#     W (out, in) --> codes: 4 bits each, absmax: 8 bits for 64 codes, absmax of the absmax: 32 bits for 16,384 codes
#
# Codes, absmax and dequantized numbers are those of bitsandbytes 0.50 on a CPU, bit for bit. Exception: bitsandbytes
# on a CPU rounds double-quantized absmax through a table, see quantize_absmax.

BLOCK = 64  # numbers that share an absmax
NESTED_BLOCK = 256  # absmax that share an absmax of their own
CHUNK = 1 << 18  # numbers processed at a time: few enough for the CPU's cache, and no whole matrix is in float32
TINY = 1e-38  # divides a block of zeros, whose absmax is 0

# The value of each code: the quantiles of the paper's appendix E, in float32, as bitsandbytes has them.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def code_book(device: torch.device) -> Tensor:
    """The 16 values of NF4, (16,) float32."""
    return torch.tensor(NF4_VALUES, device=device)


@cache
def nested_code_book(device: torch.device) -> Tensor:
    """The 256 values that an absmax is rounded to, (256,) float32 (Dettmers 2015, arXiv 1511.04561).

    0 and 1, and for i = 0 to 6 and both signs 2^i values at equal distances between 10^(i - 7) and 10^(i - 6).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        centers = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*centers.tolist(), *(-centers).tolist()]
    return torch.tensor(sorted(values), device=device)


@cache
def byte_values(device: torch.device) -> Tensor:
    """The two values of each byte, (256,): two float32 viewed as one int64, so that one look-up gives both."""
    byte, values = torch.arange(256, device=device), code_book(device)
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1).view(torch.int64).flatten()


def boundaries(values: Tensor) -> Tensor:
    """The midpoints between neighboring values; bucketize rounds a number on a midpoint down."""
    return (values[:-1] + values[1:]) / 2


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes (ceil(N / 2), 1) uint8 and absmax (ceil(N / 64),) float32 of N numbers of any shape and float type.

    The first of two codes is the high half of its byte; if N is odd, the last byte ends in the code of zero.
    """
    flat = weight.detach().reshape(-1)
    packed, absmax = zip(*(quantize_chunk(chunk) for chunk in flat.split(CHUNK)))
    return torch.cat(packed)[: (len(flat) + 1) // 2, None], torch.cat(absmax)


def quantize_chunk(chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and absmax of whole blocks in a row, of which the last may be shorter; it is padded with zeros."""
    missing = -len(chunk) % BLOCK
    x = F.pad(chunk.float(), (0, missing)).view(-1, BLOCK)
    absmax = x.abs().amax(dim=1)
    scaled = x * (1 / absmax.clamp(min=TINY))[:, None]  # not x / absmax: bitsandbytes multiplies by the reciprocal
    if missing:  # but in a shorter block it divides, and stores TINY for a block of zeros
        absmax[-1:].clamp_(min=TINY)
        scaled[-1] = x[-1] / absmax[-1]
    codes = torch.bucketize(scaled, boundaries(code_book(chunk.device)), out_int32=True).view(-1, 2)
    return (codes[:, 0] << 4 | codes[:, 1]).to(torch.uint8), absmax


def dequantize(packed: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype=torch.float32, block=BLOCK) -> Tensor:
    """The numbers (shape) of packed codes and their absmax, multiplied in float32 and rounded to `dtype`."""
    count, packed = math.prod(shape), packed.flatten()
    if missing := -count % block:  # of the last block
        packed = F.pad(packed, (0, (count + missing) // 2 - len(packed)))
    numbers = torch.empty(count + missing, dtype=dtype, device=packed.device)
    chunk = CHUNK if packed.device.type == "cpu" else len(numbers)
    chunks = zip(packed.split(chunk // 2), absmax.split(chunk // block), numbers.split(chunk))
    for codes, scales, result in chunks:
        values = byte_values(packed.device).index_select(0, codes.int()).view(torch.float32).view(-1, block)
        result.copy_(values.mul_(scales[:, None]).flatten())
    return numbers[:count].view(shape)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: codes (N,) uint8, absmax of the absmax (ceil(N / 256),), and the mean, subtracted first.

    Rounds to the nearest value. bitsandbytes on a CPU rounds through a table of 65,536 entries, so about two codes in a
    thousand differ by one. Both dequantize stored codes to the same numbers.
    """
    offset = absmax.mean()
    x = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = x.abs().amax(dim=1)
    scaled = x / nested.clamp(min=TINY)[:, None]
    codes = torch.bucketize(scaled, boundaries(nested_code_book(absmax.device)), out_int32=True)
    return codes.flatten()[: len(absmax)].to(torch.uint8), nested, offset


def dequantize_absmax(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """The absmax (N,) float32 of double-quantized codes."""
    values = nested_code_book(codes.device).index_select(0, codes.int())
    return values * nested.repeat_interleave(NESTED_BLOCK)[: len(codes)] + offset


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in NF4: x (..., in) to (..., out), computed in x's dtype or autocast's.

    Args: parts: "weight", the packed codes, "absmax" and, if double-quantized, "nested_absmax" and "nested_offset";
    shape: (out, in); dtype: that of the weight before it was quantized.
    """

    def __init__(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, block: int = BLOCK):
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype, self.block = dtype, block
        for name, tensor in parts.items():  # as parameters: DDP would broadcast buffers in every step
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", None)

    @classmethod
    def from_weight(cls, weight: Tensor, double: bool = True) -> "NF4Linear":
        """Quantize a weight (out, in); with double quantization, also its absmax."""
        packed, absmax = quantize(weight)
        parts = {"weight": packed, "absmax": absmax}
        if double:
            parts |= zip(("absmax", "nested_absmax", "nested_offset"), quantize_absmax(absmax))
        return cls(parts, tuple(weight.shape), weight.dtype)

    @property
    def packed(self) -> Tensor:
        """The codes in the order of bitsandbytes' files (fast/ stores them in another order)."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in), rounded to the dtype that it had before, then to `dtype` if one is given."""
        absmax = self.absmax
        if hasattr(self, "nested_absmax"):
            absmax = dequantize_absmax(absmax, self.nested_absmax, self.nested_offset)
        first = self.dtype if dtype is None or self.dtype != torch.float32 else dtype  # float32 rounds nothing: skip it
        weight = dequantize(self.packed, absmax, (self.out_features, self.in_features), first, self.block)
        return weight if dtype is None else weight.to(dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """W x + bias, with W dequantized for this call only."""
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.dequantize(dtype), bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            # The gradient of x needs W: dequantize it again in backward instead of storing it in 16 or 32 bits.
            return checkpoint(self.multiply, x, use_reentrant=False)
        return self.multiply(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def count_weights(module: nn.Module) -> int:
    """Number of weights in a module, four-bit ones included; a tied matrix counts once."""
    quantized = [part for part in module.modules() if isinstance(part, NF4Linear)]
    packed = {id(p) for part in quantized for name, p in part.named_parameters() if name != "bias"}
    whole = sum(p.numel() for p in module.parameters() if id(p) not in packed)
    return whole + sum(part.in_features * part.out_features for part in quantized)
