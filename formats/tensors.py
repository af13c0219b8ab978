"""Open the tensors of safetensors files, PyTorch's pickles and GGUF files without reading them yet.

A pickle is read through torch.load(weights_only=True) only. A weight in NF4 is several tensors in a file and one
LazyTensor here.
"""

import json
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from formats import gguf, nf4_files
from inputs.files import read_json, reject_duplicate_keys
from inputs.gguf_files import find_gguf
from lora import NF4Linear

PICKLES, INDEX = (".bin", ".pt", ".pth"), ".index.json"
HEADER_BYTES = 10_000_000  # the longest header that is read: enough for some hundred thousand tensors
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}  # safetensors' names and torch's
FLOATS = tuple(DTYPES.values())
DTYPES |= {"U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool"}
# What others put into the names of a model's tensors: torch.compile, FSDP and activation checkpointing in any place,
# DDP and peft before all names.
WRAPPERS = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
OUTER_WRAPPERS = r"(?:module\.|base_model\.model\.)*"


@dataclass
class LazyTensor:
    """A tensor that is still in its file. read() returns it on the CPU; it may be a view of the mapped file."""

    shape: tuple[int, ...]
    dtype: str  # torch's name, NF4, or safetensors' name of another one
    read: Callable[[], torch.Tensor]
    stored: str = ""  # the format in a GGUF file, which read() undoes


def open_tensors(path: Path, usual: str = "") -> dict[str, LazyTensor]:
    """Every tensor of a folder or file by name, none read yet; read() of a weight in NF4 returns an NF4Linear.

    Args: usual: prefix that is taken off the names without a message.
    Raises ValueError, in one line, if a file is missing or malformed.
    """
    tensors = unwrap_names(open_files(path), path, usual)
    for key in [name for name in tensors if nf4_files.STATE in name]:
        name, _, kind = key.rpartition(nf4_files.STATE)
        state = nf4_files.read_state(f"{path}: {name}", kind, tensors.pop(key).read())
        parts = {suffix: tensors.pop(name + suffix) for suffix in nf4_files.SUFFIXES if name + suffix in tensors}
        tensors[name] = LazyTensor(tuple(state["shape"]), "NF4", partial(read_nf4, f"{path}: {name}", state, parts))
    return tensors


def unwrap_names(tensors: dict[str, LazyTensor], path: Path, usual: str) -> dict[str, LazyTensor]:
    """Take the prefixes of wrappers off the names, and say so on stderr. Arguments and errors as in open_tensors."""
    inner = {prefix for name in tensors for prefix in re.findall(WRAPPERS, name)}
    names = [re.sub(WRAPPERS, "", name) for name in tensors]
    outer = min((re.match(OUTER_WRAPPERS, name)[0] for name in names), key=len, default="")
    if removed := " and ".join(sorted(inner | {outer} - {"", usual})):
        print(f"{path}: {removed} is taken off the names of its tensors", file=sys.stderr)
    unwrapped = dict(zip((name.removeprefix(outer) for name in names), tensors.values()))
    if len(unwrapped) < len(tensors):
        raise ValueError(f"{path}: two tensors have one name without {removed}")
    return unwrapped


def read_nf4(name: str, state: dict, parts: dict[str, LazyTensor]) -> NF4Linear:
    return nf4_files.from_files(name, state, {suffix: part.read() for suffix, part in parts.items()})


def open_files(path: Path) -> dict[str, LazyTensor]:
    """The tensors as the files have them: a weight in NF4 is still in its parts."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if found := find_gguf(path):
        return read_gguf_tensors(found)
    if path.is_file():
        if path.suffix not in (".safetensors", *PICKLES):
            raise ValueError(f"{path}: neither .safetensors nor {', '.join(PICKLES)}")
        return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    names = [name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX)]
    found = [path / name for name in [*names, "mm_projector.bin"] if (path / name).exists()]
    if not found:
        raise ValueError(f"{path}: holds neither model.safetensors nor pytorch_model.bin, nor an index of one")
    if others := ", ".join(other.name for other in found[1:]):
        print(f"{path}: {found[0].name} is read, not {others}", file=sys.stderr)
    reader = read_pickle if ".bin" in found[0].name else read_safetensors
    return read_shards(found[0], reader) if found[0].name.endswith(INDEX) else reader(found[0])


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file. Raises ValueError.

    The library checks offsets and sizes, but accepts duplicate keys and a header without a brace at its start.
    """
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
            return {name: map_tensor(path, 8 + length, entry) for name, entry in header.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def map_tensor(path: Path, start: int, entry: dict) -> LazyTensor:
    """A tensor of a safetensors file; read() returns a copy-on-write view of the mapped file. Raises ValueError.

    Only the tensor's own part is mapped, and unmapped with it; the library would map the whole file for each tensor.
    Args: start: offset of the data in the file; entry: the tensor's entry in the header.
    """
    (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES.get(entry["dtype"], entry["dtype"])

    def read() -> torch.Tensor:
        if dtype not in DTYPES.values():
            raise ValueError(f"{path}: holds {dtype} numbers, should be {', '.join(DTYPES.values())}")
        content = np.memmap(path, np.uint8, "c", offset=start + begin, shape=(end - begin,))
        return torch.from_numpy(content).view(getattr(torch, dtype)).view(shape)

    return LazyTensor(tuple(shape), dtype, read)


def read_pickle(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a .bin file. Read with weights_only=True: a full unpickle would run code from the file."""
    print(f"{path}: a pickle, read with weights_only=True; the same weights as safetensors are safer", file=sys.stderr)
    try:
        can_map = zipfile.is_zipfile(path)  # files from before torch 1.6 cannot be mapped and are read whole
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except Exception as error:  # a malformed pickle can raise anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a file of tensors that torch.load(weights_only=True) takes ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds something other than tensors by name")
    if bad := [name for name, value in state.items() if type(name) is not str or not is_plain(value)]:
        raise ValueError(f"{path}: {bad[0]!r:.99} is no plain tensor with all its numbers in the file")
    return {
        name: LazyTensor(tuple(value.shape), str(value.dtype).removeprefix("torch."), lambda value=value: value)
        for name, value in state.items()
    }


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense and stored in full: an expanded one would fill the memory when it is copied."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def read_gguf_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a GGUF file. Raises ValueError."""
    try:
        return {name: LazyTensor(*fields) for name, fields in gguf.read_tensors(path).items()}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_shards(index: Path, reader: Callable[[Path], dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """All tensors of the files in an index. Raises ValueError if one is not in the file that the index gives for it."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index}: no weight_map from tensors to files")
    found = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: {name!r} leads out of the folder")
        if not (index.parent / name).exists():
            raise ValueError(f"{index.parent / name}: missing, but {index.name} names it")
        tensors = reader(index.parent / name)
        if differing := sorted(tensors.keys() ^ {tensor for tensor, file in files.items() if file == name}):
            some = ", ".join(differing[:5])
            raise ValueError(f"{index}: {len(differing)} tensors of {name} are not where it says: {some}")
        found |= tensors
    return found
