"""LoRA and QLoRA, written out: train a small update of each matrix, and leave the matrix alone.

    y = W x + alpha / r  B A x        W (out, in) is frozen; A (r, in) and B (out, r) train

A starts at random and B at zero, so training begins with exactly the model it was given (Hu et al. 2021, arXiv
2106.09685). With W in four bits (NF4, second half of this file) this is QLoRA (Dettmers et al. 2023, arXiv 2305.14314).
Files are read and written by formats/.

    python train.py --stage 2 --model BASE --lora llm --bits 4 --out ADAPTER
    python sample.py --model BASE --adapter ADAPTER --image cat.jpg
    python -m formats merge BASE ADAPTER OUT      add the update to the weights: an ordinary model again
    python -m formats quantize BASE OUT           store the decoder's layers in four bits
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llava import Llava

RANKS = {"llm": 16, "vision": 32}  # default ranks; the vision tower needs more than the decoder
DROPOUT = 0.05  # LLaVA-1.5's
PREFIXES = {"llm": "language_model.model.layers.", "vision": "vision_tower.vision_model.encoder.layers."}


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained update of rank r. Maps x as the layer does.

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """An ordinary frozen layer with the update added to its weight in float32, in the weight's original dtype."""
        weight = base_weight(self)
        update = self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scale
        return frozen_linear(weight.float().add_(update).to(weight.dtype), self.base.bias)


def frozen_linear(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An ordinary linear layer with this weight (out, in), frozen."""
    linear = nn.Linear(*weight.T.shape, bias=bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), bias
    return linear.requires_grad_(False)


def base_weight(layer: nn.Module) -> torch.Tensor:
    """A copy of the weight (out, in) of a LoRALinear's base, an NF4Linear or an nn.Linear, dequantized if need be."""
    base = layer.base if isinstance(layer, LoRALinear) else layer
    return base.dequantize() if isinstance(base, NF4Linear) else base.weight.detach().clone()


def lora_scale(rank: int, alpha: float, rank_stabilized: bool = False) -> float:
    """alpha / r; rank-stabilized, alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""
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


def add_lora(
    model: Llava, ranks: dict[str, int], alpha: float | None, dropout: float, names: list[str] | None = None
) -> dict[str, tuple[int, float]]:
    """Replace the chosen linear layers by LoRALinears; returns the rank and alpha of each by its path.

    Args: ranks: for "llm", "vision" or both; alpha: default twice the rank; names: last part of the layers' paths, such
    as ["q_proj", "v_proj"], default all.
    Raises ValueError on a rank that is too small or large and on an unknown name, before the model is changed.
    """
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
    described = {path: (rank, 2 * rank if alpha is None else alpha) for path, rank in chosen.items()}
    for path, (rank, alpha) in described.items():
        model.set_submodule(path, LoRALinear(model.get_submodule(path), rank, lora_scale(rank, alpha), dropout))
    return described


def merge(model: nn.Module):
    """Add every update to its weight, in place. Raises ValueError if there is none, or if all are zero."""
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
# number is rounded to the nearest of 16 values: the quantiles of a normal distribution, zero among them. Two codes
# share a byte. The absmax are quantized to 8 bits in the same way, in blocks of 256 ("double quantization"), so that a
# number takes 4 + 8 / 64 + 32 / (64 x 256) = 4.127 bits.
#
#     W (out, in) --> codes: 4 bits each, absmax: 8 bits for 64 codes, absmax of the absmax: 32 bits for 16,384 codes
#
# Codes, absmax and dequantized numbers are those of bitsandbytes 0.50 on a CPU, bit for bit. Exception: bitsandbytes
# on a CPU rounds double-quantized absmax through a table, see quantize_absmax.

BLOCK, NESTED_BLOCK = 64, 256  # numbers that share an absmax; absmax that share one
CHUNK = 1 << 18  # numbers processed at a time: they stay in the CPU's cache, and no matrix is whole in float32
TINY = 1e-38  # used as the absmax of a block of zeros

# The quantiles of the paper's appendix E, in float32, as bitsandbytes has them.
CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def code_book(device: torch.device) -> torch.Tensor:
    """The 16 values of NF4, (16,) float32."""
    return torch.tensor(CODES, device=device)


@cache
def nested_code_book(device: torch.device) -> torch.Tensor:
    """The 256 values an absmax is rounded to, (256,) float32 (Dettmers 2015, arXiv 1511.04561).

    A sign, one of seven powers of ten, and 2^i steps within the i-th, so that small values are as precise as large
    ones; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        centers = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*centers.tolist(), *(-centers).tolist()]
    return torch.tensor(sorted(values), device=device)


@cache
def pairs_of_codes(device: torch.device) -> torch.Tensor:
    """The two float32 values of each byte, viewed as one int64, (256,): index_select copies int64 fastest."""
    byte, codes = torch.arange(256, device=device), code_book(device)
    return torch.stack([codes[byte >> 4], codes[byte & 15]], dim=1).view(torch.int64).flatten()


def boundaries(values: torch.Tensor) -> torch.Tensor:
    """The midpoints between neighboring values; a number on a midpoint is rounded down."""
    return (values[:-1] + values[1:]) / 2


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes (ceil(N / 2), 1) uint8 and absmax (ceil(N / 64),) float32 of N numbers of any shape and float type.

    The first of two codes is the high half of its byte; an odd count is padded with the code of zero.
    """
    flat = weight.detach().reshape(-1)
    packed, absmax = zip(*(quantize_chunk(chunk) for chunk in flat.split(CHUNK)))
    return torch.cat(packed)[: (len(flat) + 1) // 2, None], torch.cat(absmax)


def quantize_chunk(chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and absmax of a flat chunk that starts at a block's start; its last block is padded with zeros."""
    ragged = len(chunk) % BLOCK
    x = F.pad(chunk.float(), (0, -len(chunk) % BLOCK)).view(-1, BLOCK)
    absmax = x.abs().amax(dim=1)
    scaled = x * (1 / absmax.clamp(min=TINY))[:, None]  # times the reciprocal, which rounds as bitsandbytes does
    if ragged:  # bitsandbytes divides in a last, shorter block, and stores TINY for a block of zeros
        absmax[-1:].clamp_(min=TINY)
        scaled[-1] = x[-1] / absmax[-1]
    codes = torch.bucketize(scaled, boundaries(code_book(chunk.device)), out_int32=True).view(-1, 2)
    return (codes[:, 0] << 4 | codes[:, 1]).to(torch.uint8), absmax


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...], dtype=torch.float32, block: int = BLOCK
) -> torch.Tensor:
    """The numbers (shape) of packed codes and their absmax, multiplied in float32 and rounded to `dtype`."""
    count, codes = math.prod(shape), packed.flatten()
    numbers = torch.empty(count, dtype=dtype, device=packed.device)
    chunk = CHUNK if packed.device.type == "cpu" else count + block
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
    """Double quantization: codes (N,) uint8, absmax of the absmax (ceil(N / 256),), and the mean subtracted before.

    Rounds to the nearest value, as bitsandbytes does on a GPU. On a CPU it rounds through a table of 65,536 entries,
    which gives one or two codes in a thousand the neighboring value. Stored codes are read alike everywhere.
    """
    offset = absmax.mean()
    x = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = x.abs().amax(dim=1)
    scaled = x / nested.clamp(min=TINY)[:, None]
    codes = torch.bucketize(scaled, boundaries(nested_code_book(absmax.device)), out_int32=True)
    return codes.flatten()[: len(absmax)].to(torch.uint8), nested, offset


def dequantize_absmax(codes: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The absmax (N,) float32 of double-quantized codes."""
    values = nested_code_book(codes.device).index_select(0, codes.int())
    return values * nested.repeat_interleave(NESTED_BLOCK)[: len(codes)] + offset


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in NF4. Maps x as nn.Linear does, in x's dtype or autocast's.

    Args: parts: tensors under bitsandbytes' names, of which "weight" holds the packed codes; shape: (out, in); dtype:
    of the weight before it was quantized.
    """

    def __init__(self, parts: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype, block: int = BLOCK):
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype, self.block = dtype, block
        for name, tensor in parts.items():  # as parameters: DDP would broadcast buffers in every step
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", None)

    @classmethod
    def of(cls, weight: torch.Tensor, double: bool = True) -> "NF4Linear":
        """Quantize a weight (out, in). Args: double: also quantize the absmax."""
        packed, absmax = quantize(weight)
        parts = {"weight": packed, "absmax": absmax}
        if double:
            parts |= zip(("absmax", "nested_absmax", "nested_offset"), quantize_absmax(absmax))
        return cls(parts, tuple(weight.shape), weight.dtype)

    @property
    def packed(self) -> torch.Tensor:
        """The codes in the order of bitsandbytes' files (fast/ stores them in another order)."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight (out, in), rounded to the dtype it had before and then, if one is given, to another."""
        absmax, shape = self.absmax, (self.out_features, self.in_features)
        if hasattr(self, "nested_absmax"):
            absmax = dequantize_absmax(absmax, self.nested_absmax, self.nested_offset)
        if self.dtype == torch.float32 and dtype is not None:
            return dequantize(self.packed, absmax, shape, dtype, self.block)
        weight = dequantize(self.packed, absmax, shape, self.dtype, self.block)
        return weight if dtype is None else weight.to(dtype)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.dequantize(dtype), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            # The gradient of x needs the weight. It is dequantized again in backward, not stored in 16 or 32 bits.
            return checkpoint(self.multiply, x, use_reentrant=False)
        return self.multiply(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def count_weights(module: nn.Module) -> int:
    """Numbers in a module's parameters, however many bits each takes; a tied matrix counts once."""
    quantized = [part for part in module.modules() if isinstance(part, NF4Linear)]
    packed = {id(p) for part in quantized for name, p in part.named_parameters() if name != "bias"}
    whole = sum(p.numel() for p in module.parameters() if id(p) not in packed)
    return whole + sum(part.in_features * part.out_features for part in quantized)
