"""Tensors in the files that people have, none read before it is asked for.

safetensors, in one file or in shards; torch's pickles, through torch.load(weights_only=True) and in no other way; and
llama2.c's plain numbers. A weight in NF4 is several tensors in a file, and one here.
"""

import json
import math
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from formats import nf4_files
from inputs.files import read_json, reject_duplicate_keys
from llava import LlavaConfig, TextConfig
from lora import NF4Linear

PICKLES = (".bin", ".pt", ".pth")
HEADER_BYTES = 10_000_000  # of a file that is read: room for some hundred thousand tensors


@dataclass
class LazyTensor:
    """A tensor that is still in its file. read() makes it, on the CPU, perhaps as a view of the mapped file."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of a folder or file by name, none read yet; a weight in NF4 is one, read as an NF4Linear.

    Raises ValueError, in one line, if something is off.
    """
    return gather_quantized(open_files(path), path)


def gather_quantized(tensors: dict[str, LazyTensor], source: Path) -> dict[str, LazyTensor]:
    """The same, with all that a file holds of a weight in NF4 under that weight's name."""
    for key in [name for name in tensors if nf4_files.STATE in name]:
        name, _, kind = key.rpartition(nf4_files.STATE)
        state = nf4_files.read_state(f"{source}: {name}", kind, tensors.pop(key).read())
        parts = {end: tensors.pop(name + end) for end in ("", *nf4_files.BESIDE) if name + end in tensors}

        def read(name=name, state=state, parts=parts) -> NF4Linear:
            return nf4_files.from_files(f"{source}: {name}", state, {end: part.read() for end, part in parts.items()})

        tensors[name] = LazyTensor(tuple(state["shape"]), "NF4", read)
    return tensors


def open_files(path: Path) -> dict[str, LazyTensor]:
    """The tensors as the files have them, a weight in NF4 still in pieces; for the rest see open_tensors."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix not in (".safetensors", *PICKLES):
            raise ValueError(f"{path}: neither .safetensors nor {', '.join(PICKLES)}")
        return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    for stem, reader in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickle)):
        if (path / stem).exists():
            return reader(path / stem)
        if (path / f"{stem}.index.json").exists():
            return read_shards(path / f"{stem}.index.json", reader)
    if (path / "mm_projector.bin").exists():
        return read_pickle(path / "mm_projector.bin")
    raise ValueError(f"{path}: holds neither model.safetensors nor pytorch_model.bin, nor an index of one")


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The library checks offsets and sizes; it lets pass a key given twice and a space in front, and we do not."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(HEADER_BYTES, path.stat().st_size):
                raise ValueError(f"its header is {length} bytes long")
            text = file.read(length)
        if not text.startswith(b"{"):
            raise ValueError("its header does not begin with {")
        header = json.loads(text, object_pairs_hook=reject_duplicate_keys)
        header.pop("__metadata__", None)
        with safe_open(path, "pt"):
            return {
                name: LazyTensor(tuple(e["shape"]), e["dtype"], partial(mapped, path, 8 + length, e))
                for name, e in header.items()
            }
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


NUMBERS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NUMBERS |= {"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
NUMBERS |= {"BOOL": torch.bool}


def mapped(path: Path, start: int, entry: dict) -> torch.Tensor:
    """A tensor of a safetensors file as a view of the file in memory; what is written to it, the file does not get.

    Its own piece of the file, which goes with the tensor; the library maps and parses all of the file for each.
    Args: start: of the numbers, in bytes; entry: of the header. Raises ValueError on a type of number that is not ours.
    """
    (begin, end), dtype = entry["data_offsets"], NUMBERS.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"{path}: holds {entry['dtype']} numbers, should be {', '.join(NUMBERS)}")
    if begin == end:
        return torch.empty(entry["shape"], dtype=dtype)
    content = np.memmap(path, np.uint8, "c", offset=start + begin, shape=(end - begin,))
    return torch.from_numpy(content).view(dtype).view(entry["shape"])


def read_pickle(path: Path) -> dict[str, LazyTensor]:
    """A .bin file, through torch.load(weights_only=True) and in no other way: a plain unpickle runs foreign code."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise ValueError(f"{path}: reading a pickle needs torch 2.10, whose weights_only is mended; this is older")
    print(f"{path}: a pickle, read with weights_only=True; the same weights as safetensors are safer", file=sys.stderr)
    try:
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are none, and are read whole
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a bad pickle may raise anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a file of tensors that torch.load(weights_only=True) takes ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds something else than tensors by name")
    return {
        name: LazyTensor(tuple(value.shape), str(value.dtype).removeprefix("torch."), lambda value=value: value)
        for name, value in state.items()
    }


def read_shards(index: Path, reader: Callable[[Path], dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """All tensors that an index distributes over files beside it, each in the one file that the index names."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{index}: no weight_map from tensors to files")
    found = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: {name!r} leads out of the folder")
        if not (index.parent / name).exists():
            raise ValueError(f"{index.parent / name}: missing, but {index.name} names it")
        tensors = reader(index.parent / name)
        if differing := sorted(tensors.keys() ^ {tensor for tensor, file in where.items() if file == name}):
            some = ", ".join(differing[:5])
            raise ValueError(f"{index}: {len(differing)} tensors of {name} are not where it says: {some}")
        found |= tensors
    return found


# ---------------------------------------------------------------------------------------------------------------------
# llama2.c


def find_llama2c(folder: Path) -> Path | None:
    """The model of a folder that holds nothing but llama2.c's .bin files; or such a file, whose width is below 2^16."""
    if folder.is_file():
        with folder.open("rb") as file:
            return folder if folder.suffix == ".bin" and file.read(4)[2:] == b"\0\0" else None
    if (folder / "config.json").exists() or not folder.exists():
        return None
    found = [path for path in sorted(folder.glob("*.bin")) if not path.name.startswith("tok")]
    return found[0] if len(found) == 1 else None


def read_llama2c(path: Path) -> tuple[LlavaConfig, dict[str, LazyTensor]]:
    """llama2.c's version 0: seven int32, then float32 matrices, kind by kind. Raises ValueError if the size is wrong.

    Its RoPE turns the pairs (2i, 2i + 1) and ours (i, i + D/2), so the rows of q and k are put in another order.
    """
    data = np.fromfile(path, dtype="<i4", count=7)
    if len(data) < 7:
        raise ValueError(f"{path}: too short for llama2.c's header")
    width, hidden, layers, heads, kv_heads, vocab, context = map(int, data)
    if min(width, hidden, layers, heads, kv_heads, context) < 1 or vocab == 0 or width % heads or heads % kv_heads:
        raise ValueError(f"{path}: not llama2.c's header: {data.tolist()}")
    tied, vocab, kv_width = vocab > 0, abs(vocab), width // heads * kv_heads
    layer = "layers.{}."
    shapes = {
        "embed_tokens.weight": (vocab, width),
        layer + "input_layernorm.weight": (layers, width),
        layer + "self_attn.q_proj.weight": (layers, width, width),
        layer + "self_attn.k_proj.weight": (layers, kv_width, width),
        layer + "self_attn.v_proj.weight": (layers, kv_width, width),
        layer + "self_attn.o_proj.weight": (layers, width, width),
        layer + "post_attention_layernorm.weight": (layers, width),
        layer + "mlp.gate_proj.weight": (layers, hidden, width),
        layer + "mlp.down_proj.weight": (layers, width, hidden),
        layer + "mlp.up_proj.weight": (layers, hidden, width),
        "norm.weight": (width,),
        "RoPE": (2, context, width // heads // 2),  # tables of cos and sin, which we compute
    } | ({} if tied else {"lm_head.weight": (vocab, width)})
    expected = 28 + 4 * sum(math.prod(shape) for shape in shapes.values())
    if path.stat().st_size != expected:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, but its header asks for {expected}")
    numbers, at, tensors = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=28)), 0, {}
    for name, shape in shapes.items():
        whole = numbers[at : at + math.prod(shape)].view(shape)
        at += whole.numel()
        if "q_proj" in name or "k_proj" in name:
            pairs = whole.unflatten(1, (-1, width // heads // 2, 2))  # (L, H, D / 2, 2, C)
            whole = pairs.transpose(2, 3).reshape(shape)
        for i, tensor in enumerate(whole if name.startswith(layer) else [whole]):
            full = name.format(i) if name == "lm_head.weight" else f"model.{name.format(i)}"
            tensors[full] = LazyTensor(tuple(tensor.shape), "F32", lambda tensor=tensor: tensor)
    del tensors["model.RoPE"]
    text = TextConfig(vocab, width, hidden, layers, heads, kv_heads, max_position_embeddings=context)
    text.rms_norm_eps, text.tie_word_embeddings = 1e-5, tied
    return LlavaConfig(text, image_token_index=vocab, template="raw", eos_token_ids=[1, 2]), tensors
