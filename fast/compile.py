"""torch.compile, applied to one layer that stands for all: seconds to compile, not minutes."""

import torch
from torch import nn

from clip import CLIPEncoderLayer
from fast.quantized import prepare_nf4
from llava import DecoderLayer, Llava
from lora import NF4Linear
from variants.cross_attention import GatedCrossAttention


def require_compiler(device: torch.device):
    """Try torch.compile on a tiny function. On a CPU it needs a C++ compiler (CXX, or g++) and Python's headers.

    Raises ValueError with a one-line reason if it does not work.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except RuntimeError as error:  # the message holds the compiler's whole command line
        lines = str(error).splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0])
        raise ValueError(f"--compile does not work here: {reason}") from None


def prepare(model: nn.Module):
    for module in model.modules():
        if isinstance(module, NF4Linear):
            prepare_nf4(module)


def compile_layers(model: nn.Module):
    """Compile the layers of both transformers for training. Raises ValueError without a working compiler, and for gated
    cross-attention, whose hooks on the layers choose tokens by the data."""
    if isinstance(getattr(model, "multi_modal_projector", None), GatedCrossAttention):
        raise ValueError("--compile does not go with gated cross-attention in training")
    require_compiler(next(model.parameters()).device)
    prepare(model)
    for module in model.modules():
        if isinstance(module, (DecoderLayer, CLIPEncoderLayer)):
            module.compile()


def compile_decoding(model: Llava):
    """Compile a decoder layer for one token of an answer. Raises ValueError without a working compiler.

    The prompt, of a different length each time, is still read by the plain layer.
    """
    require_compiler(model.device)
    prepare(model)
    one_token = torch.compile(DecoderLayer.forward)

    class CompiledLayer(DecoderLayer):
        def forward(self, x, *arguments):
            if x.shape[1] == 1 and not torch.is_grad_enabled():
                return one_token(self, x, *arguments)
            return super().forward(x, *arguments)

    for layer in model.language_model.model.layers:
        layer.__class__ = CompiledLayer
    model.language_model.lm_head.compile()
