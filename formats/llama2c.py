"""Checkpoints of llama2.c, version 0: seven int32, then float32 matrices; each kind of matrix for all layers at once.

Source: export.py and run.c of karpathy/llama2.c.
"""

import math
from pathlib import Path

import numpy as np
import torch

from formats.tensors import LazyTensor
from llava import LlavaConfig, TextConfig


def find_llama2c(folder: Path) -> Path | None:
    """Find llama2.c's checkpoint: the only .bin file in a folder without config.json, or `folder` itself."""
    if folder.is_file():
        with folder.open("rb") as file:  # the first number is the width, which is below 2^16
            return folder if folder.suffix == ".bin" and file.read(4)[2:] == b"\0\0" else None
    others = ("config.json", "adapter_config.json", "*.safetensors", "*.gguf")
    if any(any(folder.glob(name)) for name in others):
        return None
    found = [path for path in sorted(folder.glob("*.bin")) if not path.name.startswith("tok")]
    return found[0] if len(found) == 1 else None


def read_llama2c(path: Path) -> tuple[LlavaConfig, dict[str, LazyTensor]]:
    """Config and tensors by the names of the LLaMA family. Raises ValueError if the header does not fit the size."""
    header = np.fromfile(path, dtype="<i4", count=7)
    if len(header) < 7:
        raise ValueError(f"{path}: too short for llama2.c's header")
    width, hidden, layers, heads, kv_heads, vocab, context = map(int, header)
    if min(width, hidden, layers, heads, kv_heads, context) < 1 or vocab == 0 or width % heads or heads % kv_heads:
        raise ValueError(f"{path}: not llama2.c's header: {header.tolist()}")
    tied, vocab = vocab > 0, abs(vocab)  # a negative number means that the head is stored
    head_size = width // heads
    shapes = {  # in the order of the file; {} stands for the number of the layer
        "model.embed_tokens.weight": (vocab, width),
        "model.layers.{}.input_layernorm.weight": (layers, width),
        "model.layers.{}.self_attn.q_proj.weight": (layers, width, width),
        "model.layers.{}.self_attn.k_proj.weight": (layers, head_size * kv_heads, width),
        "model.layers.{}.self_attn.v_proj.weight": (layers, head_size * kv_heads, width),
        "model.layers.{}.self_attn.o_proj.weight": (layers, width, width),
        "model.layers.{}.post_attention_layernorm.weight": (layers, width),
        "model.layers.{}.mlp.gate_proj.weight": (layers, hidden, width),
        "model.layers.{}.mlp.down_proj.weight": (layers, width, hidden),
        "model.layers.{}.mlp.up_proj.weight": (layers, hidden, width),
        "model.norm.weight": (width,),
        "rope": (2, context, head_size // 2),  # tables of cos and sin, which we compute
    } | ({} if tied else {"lm_head.weight": (vocab, width)})
    expected = 28 + 4 * sum(map(math.prod, shapes.values()))
    if path.stat().st_size != expected:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, but its header asks for {expected}")
    numbers, at, tensors = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=28)), 0, {}
    for name, shape in shapes.items():
        matrix = numbers[at : at + math.prod(shape)].view(shape)
        at += matrix.numel()
        if "q_proj" in name or "k_proj" in name:  # llama2.c's RoPE rotates the pairs (2i, 2i + 1), ours (i, i + D/2)
            pairs = matrix.unflatten(1, (-1, head_size // 2, 2))  # (L, H, D/2, 2, C)
            matrix = pairs.transpose(2, 3).reshape(shape)
        for i, tensor in enumerate(matrix if "{}" in name else [matrix]):
            tensors[name.format(i)] = LazyTensor(tuple(tensor.shape), "float32", lambda tensor=tensor: tensor)
    del tensors["rope"]
    text = TextConfig(vocab, width, hidden, layers, heads, kv_heads, max_position_embeddings=context)
    text.rms_norm_eps, text.tie_word_embeddings = 1e-5, tied
    return LlavaConfig(text, image_token_index=vocab, template="raw", eos_token_ids=[1, 2]), tensors
