"""Weights in NF4, in the file format of bitsandbytes: the weight NAME becomes four to six tensors.

NAME                                    the packed codes, (ceil(N / 2), 1) uint8, or the same bytes in another dtype
NAME.absmax                             one number for each block: uint8 if doubly quantized, else float32
NAME.quant_map                          the 16 values of the codes
NAME.nested_absmax, .nested_quant_map   of the double quantization
NAME.quant_state.bitsandbytes__nf4      shape, dtype and block size: JSON, as bytes
"""

import json
import math

import torch

from lora import NESTED_BLOCK, NF4Linear, code_book, nested_code_book

STATE = ".quant_state.bitsandbytes__"  # followed by the kind of quantization
SUFFIXES = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def to_files(name: str, linear: NF4Linear) -> dict[str, torch.Tensor]:
    """The tensors of a file for the weight called `name`."""
    state = {"quant_type": "nf4", "blocksize": linear.block, "dtype": str(linear.dtype).removeprefix("torch.")}
    state |= {"shape": [linear.out_features, linear.in_features]}
    tensors = {"": linear.packed, ".absmax": linear.absmax, ".quant_map": code_book(linear.weight.device)}
    if hasattr(linear, "nested_absmax"):
        offset = float(linear.nested_offset)
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {".nested_absmax": linear.nested_absmax}
        tensors |= {".nested_quant_map": nested_code_book(linear.weight.device)}
    tensors[f"{STATE}nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {name + key: tensor.detach().clone() for key, tensor in tensors.items()}  # safetensors refuses shared memory


def read_state(name: str, kind: str, tensor: torch.Tensor) -> dict:
    """Parse the quantization state of the weight `name`. Raises ValueError if it is malformed or not NF4."""
    try:
        state = json.loads(bytes(tensor.tolist()))
        shape, dtype, block = state["shape"], DTYPES[state["dtype"]], state["blocksize"]
        is_valid = len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in [*shape, block])
        is_valid = is_valid and block in BLOCKS and math.isfinite(float(state.get("nested_offset", 0)))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        is_valid = False
    if not is_valid:
        raise ValueError(f"{name}: its quantization state cannot be read")
    if kind != "nf4" or state.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
        raise ValueError(f"{name} is quantized as {kind}, in blocks of {block}; only nf4 is supported")
    return state | {"dtype": dtype}


def from_files(name: str, state: dict, tensors: dict[str, torch.Tensor]) -> NF4Linear:
    """The layer of a weight. Args: tensors: by SUFFIXES. Raises ValueError that names a wrong tensor."""
    block, nested = state["blocksize"], "nested_offset" in state
    if "" in tensors:  # FSDP needs the dtype of the other weights: bnb_4bit_quant_storage, which rounds nothing
        tensors = tensors | {"": tensors[""].reshape(-1).view(torch.uint8)[:, None]}
    count = math.prod(state["shape"])
    blocks = -(-count // block)
    wanted = {  # suffix: shape and dtype
        "": (((count + 1) // 2, 1), torch.uint8),
        ".absmax": ((blocks,), torch.uint8 if nested else torch.float32),
        ".quant_map": ((16,), torch.float32),
    }
    if nested:
        wanted |= {".nested_absmax": ((-(-blocks // NESTED_BLOCK),), torch.float32)}
        wanted |= {".nested_quant_map": ((256,), torch.float32)}
    books = {".quant_map": code_book, ".nested_quant_map": nested_code_book}
    for key, (shape, dtype) in wanted.items():
        if key not in tensors:
            raise ValueError(f"{name}{key} missing")
        tensor = tensors[key]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name}{key} is {tensor.dtype} {tuple(tensor.shape)}, should be {dtype} {shape}")
        if dtype == torch.float32 and not tensor.isfinite().all():
            raise ValueError(f"{name}{key} holds numbers that are not finite")
        if key in books and not torch.equal(tensor, books[key](tensor.device)):
            raise ValueError(f"{name}{key} differs from the values of NF4")
    parts = {"weight": tensors[""], "absmax": tensors[".absmax"]}
    if nested:
        parts["nested_absmax"] = tensors[".nested_absmax"]
        parts["nested_offset"] = torch.tensor(float(state["nested_offset"]), device=tensors[""].device)
    return NF4Linear(parts, tuple(state["shape"]), state["dtype"], block)
