"""Swap the classes of a built model for faster ones, in place.

    accelerate(model)                  all items
    accelerate(model, {"attention"})   one item, to measure what it gains (python -m bench --items)

An item stays here if, alone, it makes a headline row of the benchmark at least 1.15 times as fast; docs/performance.md
has the figures, and says which are still to be measured. All of them are for CPUs: a GPU runs the plain model.
"""

from torch import nn

from clip import CLIPAttention
from fast.attention import FastAttention, FastCLIPAttention
from fast.linear import FastLinear, lacks_16_bit
from fast.quantized import swap_dropout
from llava import Attention
from lora import LoRALinear

ITEMS = {
    "one_row": "with --compile: the matmul of one row as a sum, fused with what surrounds it",
    "widen": "matmuls in 16 bits computed in float32, on a CPU that emulates 16 bits",
    "attention": "training in bfloat16: attention of short rows computed in float32",
    "dropout": "LoRA: dropout from 16 random bits a number",
}


def accelerate(model: nn.Module, only: set[str] | None = None) -> list[str]:
    """Change the classes of a model's layers in place; parameters, state dict and numbers stay the same.

    Args: only: names of ITEMS, default all. Returns the names in use. Raises ValueError on an unknown name.
    """
    names = set(ITEMS) if only is None else set(only)
    if unknown := names - set(ITEMS):
        raise ValueError(f"fast/ has no item {sorted(unknown)[0]!r}, only {', '.join(ITEMS)}")
    if not lacks_16_bit():
        names.discard("widen")
    swaps = {nn.Linear: FastLinear} if names & {"one_row", "widen"} else {}
    swaps |= {Attention: FastAttention, CLIPAttention: FastCLIPAttention} if "attention" in names else {}
    for module in model.modules():
        module.__class__ = swaps.get(type(module), type(module))
        if isinstance(module, FastLinear):
            module.items = frozenset(names)
        if isinstance(module, LoRALinear) and "dropout" in names:
            swap_dropout(module)
    return sorted(names)
