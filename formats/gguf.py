"""Models in GGUF, llama.cpp's format: one file with config, tokenizer, and weights, which may be quantized.

Quantized weights are dequantized by the package `gguf` of llama.cpp's authors, tensor by tensor; weights in float32,
float16 and bfloat16 need no package. The tokenizer is read in inputs/gguf_vocabularies.py.

Sources: docs/gguf.md of ggml-org/ggml; convert_hf_to_gguf.py of ggml-org/llama.cpp.
"""

import math
import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inputs.gguf_files import GGUF, StoredTensor, read_gguf
from llava import TextConfig, rope_frequencies

ARCHITECTURES = ("llama", "qwen2")
# transformers' names -> keys behind the name of the architecture. Those of OPTIONAL may be missing.
NAMES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}
OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta")
# Keys that change the arithmetic of a model, and the only value of each that this code implements.
SUPPORTED = {"expert_count": 0, "attention.causal": True, "attention.sliding_window": None}
TENSORS = {  # names of a GGUF -> transformers'
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # what LLaMA-3.1 and later divide RoPE's frequencies by
# The scaling of LLaMA-3.1 and 3.3 (factor 8) and 3.2 (32). A GGUF holds what follows from it, not these numbers.
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192}
PLAIN = {0: "float32", 1: "float16", 28: "float64", 30: "bfloat16"}  # ggml's formats that are torch's dtypes
CHUNK = 1 << 22  # numbers that are dequantized at a time

# ---------------------------------------------------------------------------------------------------------------------
# config


def config_values(path: Path) -> dict:
    """The metadata of a GGUF file as a config.json says it. The values are not checked. Raises ValueError."""
    gguf = read_gguf(path)
    kind, metadata = gguf.metadata.get("general.architecture"), gguf.metadata
    if kind not in ARCHITECTURES:
        raise ValueError(f"the architecture is {kind!r:.99}, none of {', '.join(ARCHITECTURES)}")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"one of {metadata['split.count']} parts: join them, `llama-gguf-split --merge` does it")
    given = {key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    for ours, key in NAMES.items():
        if key not in given and ours not in OPTIONAL:
            raise ValueError(f"its metadata has no {kind}.{key}")
    values = {ours: given[key] for ours, key in NAMES.items() if key in given}
    head = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    supported = SUPPORTED | {"rope.dimension_count": head, "attention.value_length": head}
    for key, only in supported.items():
        if given.get(key) not in (None, only):
            raise ValueError(f"{kind}.{key} is {given[key]!r:.99}, and only {only!r} is supported")
    if "token_embd.weight" not in gguf.tensors:
        raise ValueError("it has no tensor token_embd.weight")
    values |= {"vocab_size": gguf.tensors["token_embd.weight"].shape[0], "model_type": kind}
    values |= {"tie_word_embeddings": "output.weight" not in gguf.tensors}
    values |= {"attention_bias": "blk.0.attn_output.bias" in gguf.tensors}
    values |= {"rope_scaling": read_scaling(path, gguf, given, values | {"head_dim": head})}
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    values |= {"eos_token_id": list(dict.fromkeys(i for i in ends if i is not None))}
    return values | {"pad_token_id": metadata.get("tokenizer.ggml.padding_token_id")}


def read_scaling(path: Path, gguf: GGUF, given: dict[str, Any], values: dict[str, Any]) -> dict | None:
    """The scaling of RoPE as config.json has it, None without one. Raises ValueError on factors that are not LLaMA-3's.

    Args: given: metadata without the name of the architecture; values: the other fields of config.json.
    """
    kind = given.get("rope.scaling.type", "linear" if "rope.scale_linear" in given else "none")
    if kind != "none":
        if ROPE_FACTORS in gguf.tensors:
            raise ValueError(f"RoPE is scaled twice: {kind} and by {ROPE_FACTORS}")
        return {"rope_type": kind, "factor": given.get("rope.scaling.factor", given.get("rope.scale_linear"))}
    if ROPE_FACTORS not in gguf.tensors:
        return None
    factors = describe(path, gguf.tensors[ROPE_FACTORS], ROPE_FACTORS)[2]().float()
    if factors.shape == (values["head_dim"] // 2,):
        given = {"head_dim": values["head_dim"], "rope_theta": values.get("rope_theta", TextConfig.rope_theta)}
        scaling = LLAMA_3 | {"factor": float(factors.max())}
        plain, scaled = (rope_frequencies(TextConfig(**given, rope_scaling=s), factors.device) for s in (None, scaling))
        if torch.allclose(plain / factors, scaled, rtol=1e-4, atol=0):
            return scaling
    raise ValueError(f"{ROPE_FACTORS} scales RoPE in another way than LLaMA-3, which is not supported")


# ---------------------------------------------------------------------------------------------------------------------
# weights


def read_tensors(path: Path) -> dict[str, tuple]:
    """The tensors of a GGUF file by transformers' names, each as the fields of a LazyTensor. Raises ValueError.

    llama.cpp rotates neighboring rows of queries and keys in files of the architecture llama, so its converter permutes
    the rows of each head; read() undoes it. Unknown names are kept.
    """
    gguf, found = read_gguf(path), {}
    is_llama = gguf.metadata.get("general.architecture") == "llama"
    heads = {"attn_q": gguf.metadata.get("llama.attention.head_count")}
    heads["attn_k"] = gguf.metadata.get("llama.attention.head_count_kv", heads["attn_q"])
    for name, stored in gguf.tensors.items():
        if name == ROPE_FACTORS:
            continue
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        ours = TENSORS.get(name, name)
        if layer and layer[2] in LAYER:
            ours = f"model.layers.{layer[1]}.{LAYER[layer[2]]}.{layer[3]}"
        shape, dtype, read, format_name = describe(path, stored, name)
        if is_llama and layer and layer[2] in heads:
            count = heads[layer[2]]
            if type(count) is not int or count < 1 or shape[0] % (2 * count):
                raise ValueError(f"{name} is {shape}, which are not the rows of {count!r:.99} heads")
            read = partial(read_unpermuted, read, count)
        if ours in found:
            raise ValueError(f"two tensors are {ours}")
        found[ours] = shape, dtype, read, format_name
    return found


def read_unpermuted(read: Callable[[], torch.Tensor], heads: int) -> torch.Tensor:
    """Rows of queries or keys in transformers' order, from (D / 2) pairs of neighbors in each head."""
    tensor = read()
    pairs = tensor.unflatten(0, (heads, -1, 2))  # (H, D / 2, 2, C)
    return pairs.transpose(1, 2).reshape(tensor.shape)


def describe(path: Path, stored: StoredTensor, name: str) -> tuple:
    """Shape, dtype, a function that reads it, and the name of its format. Raises ValueError if the file ends within."""
    columns = stored.shape[-1]
    if stored.kind in PLAIN:
        dtype = format_name = PLAIN[stored.kind]
        block, block_bytes = 1, getattr(torch, dtype).itemsize
    else:
        dtype, (format_name, block, block_bytes) = "float32", find_format(stored.kind)
    if columns % block:
        raise ValueError(f"{name} has rows of {columns} numbers, but {format_name} has blocks of {block}")
    size = math.prod(stored.shape) // block * block_bytes
    if stored.offset + size > path.stat().st_size:
        raise ValueError(f"the file is cut short: it ends within {name}")
    read = partial(read_plain, path, stored, size, getattr(torch, dtype))
    if stored.kind not in PLAIN:
        read = partial(dequantize, path, stored, size, columns // block * block_bytes)
    return stored.shape, dtype, read, format_name


@lru_cache
def find_format(kind: int) -> tuple[str, int, int]:
    """Name, numbers and bytes of a block of ggml's format `kind`. Raises ValueError if it cannot be dequantized."""
    try:
        import gguf
    except ImportError:
        raise ValueError("its tensors are quantized, and the package gguf dequantizes: pip install gguf") from None
    if kind not in [member.value for member in gguf.GGMLQuantizationType]:
        raise ValueError(f"a tensor is in the format number {kind}, which the package gguf does not know")
    member = gguf.GGMLQuantizationType(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[member]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), member)
    except NotImplementedError:
        raise ValueError(f"a tensor is in {member.name}, which the package gguf does not dequantize") from None
    return member.name, block, block_bytes


def read_plain(path: Path, stored: StoredTensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """A copy-on-write view of the mapped file."""
    content = np.memmap(path, np.uint8, "c", offset=stored.offset, shape=(size,))
    return torch.from_numpy(content).view(dtype).view(stored.shape)


def dequantize(path: Path, stored: StoredTensor, size: int, row_bytes: int) -> torch.Tensor:
    """The tensor in float32. Some rows at a time, as the package needs twice the memory of what it returns."""
    import gguf

    rows = np.asarray(np.memmap(path, np.uint8, "r", offset=stored.offset, shape=(size,))).reshape(-1, row_bytes)
    result = np.empty((len(rows), stored.shape[-1]), np.float32)
    step = max(1, CHUNK // stored.shape[-1])
    with np.errstate(all="ignore"):  # numbers that are not finite are found when the model is filled
        for i in range(0, len(rows), step):
            result[i : i + step] = gguf.quants.dequantize(rows[i : i + step], gguf.GGMLQuantizationType(stored.kind))
    return torch.from_numpy(result).view(stored.shape)
