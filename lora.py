"""LoRA: train a small update of each matrix, and leave the matrix alone (Hu et al. 2021, arXiv 2106.09685).

    y = W x + alpha / r  B A x        W (out, in) stands still, A (r, in) and B (out, r) train

A starts at random and B at zero, so that training begins with exactly the model it was given. With W in four bits
(nf4.py) this is QLoRA. formats/adapters.py reads and writes the files.

    python train.py --stage 2 --model BASE --lora llm --bits 4 --out DIR
    python sample.py --model BASE --adapter DIR --image cat.jpg
    python -m formats merge BASE DIR OUT       the update added to the weights: a whole model again
    python -m formats quantize SRC DST         a model with its decoder's layers in four bits
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from llava import Llava
from nf4 import NF4Linear

RANKS = {"llm": 16, "vision": 32}  # features ask for more than words: what the source documents recommend
DROPOUT = 0.05  # as LLaVA-1.5's
PREFIXES = {"llm": "language_model.model.layers.", "vision": "vision_tower.vision_model.encoder.layers."}
Base = nn.Linear | NF4Linear


class LoRALinear(nn.Module):
    """A frozen linear layer and its update of rank r; in and out as the layer's.

    Args: scale: alpha / r; dropout: share of A's input that is left out in training.
    """

    def __init__(self, base: Base, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        device = base.weight.device
        self.base, self.scale, self.dropout = base.requires_grad_(False), scale, dropout
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # uniform within 1 / sqrt(in), as Linear's own
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = dropped_out(x, self.dropout) if self.training and self.dropout else x
        update = self.lora_B(self.lora_A(read))
        return self.base(x) + update * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """An ordinary layer with the update in its weight, added in float32; from NF4, in the type it had before."""
        weight = weight_of(self)
        update = self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scale
        return plain(weight.float().add_(update).to(weight.dtype), self.base.bias)


def dropped_out(x: torch.Tensor, share: float) -> torch.Tensor:
    """torch.nn.functional.dropout in training. On a CPU 16 bits decide of each number (so that `share` is one of 65,536
    steps), and one byte is kept of it for the gradient; torch draws a float, and keeps it."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, share)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # of all 64 bits
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= round(share * 2**16) - 2**15
    return torch.where(kept, x, 0).mul_(1 / (1 - share))


def plain(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An ordinary frozen layer of this weight (out, in)."""
    linear = nn.Linear(*weight.T.shape, bias=bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), bias
    return linear.requires_grad_(False)


def weight_of(layer: LoRALinear | Base) -> torch.Tensor:
    """The weight (out, in) of a layer without its update, a copy."""
    base = layer.base if isinstance(layer, LoRALinear) else layer
    return base.dequantize() if isinstance(base, NF4Linear) else base.weight.detach().clone()


def scale_of(rank: int, alpha: float, rank_stabilized: bool = False) -> float:
    """alpha / r; "rank-stabilized", alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


# ---------------------------------------------------------------------------------------------------------------------
# onto a model, and into its weights


def find_linears(model: Llava, component: str) -> list[str]:
    """Exact paths of the linear layers of "llm" or "vision"; of the tower, only in blocks whose output is used."""
    prefix = PREFIXES[component]
    paths = [path for path, module in model.named_modules() if isinstance(module, Base) and path.startswith(prefix)]
    if component == "vision":
        used = len(model.vision_tower.vision_model.blocks(model.config.vision_feature_layer))
        paths = [path for path in paths if int(path.removeprefix(prefix).split(".")[0]) < used]
    return paths


def add_lora(
    model: Llava, ranks: dict[str, int], alpha: float | None, dropout: float, names: list[str] | None = None
) -> dict[str, tuple[int, float]]:
    """Put a LoRALinear in the place of the chosen layers; returns each one's rank and alpha by its path.

    Args: ranks: for "llm", "vision" or both; alpha: None for twice the rank; names: what the layers are called, as
    ["q_proj", "v_proj"], None for all.
    Raises ValueError on a rank that makes no sense, and on a name that is no layer's; the model is unchanged then.
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
        model.set_submodule(path, LoRALinear(model.get_submodule(path), rank, scale_of(rank, alpha), dropout))
    return described


def merge(model: nn.Module):
    """Add every update to its weight, in place. Raises ValueError if there is none, or if all are zero."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("there is no LoRA to merge; perhaps it was merged before")
    if not any(layer.lora_A.weight.any() and layer.lora_B.weight.any() for layer in layers.values()):
        raise ValueError("the update is zero everywhere: it was never trained, or its file is not what was trained")
    for path, layer in layers.items():
        model.set_submodule(path, layer.merged())
