"""A weight in NF4 as bitsandbytes writes it to a file: packed codes, and the tensors that belong to them."""

import json
import math

import torch

from lora import NESTED_BLOCK, NF4Linear, code_book, nested_code_book

STATE = ".quant_state.bitsandbytes__"  # + "nf4": JSON, as bytes
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def to_files(name: str, linear: NF4Linear) -> dict[str, torch.Tensor]:
    """The tensors of a file for the weight called `name`."""
    double = hasattr(linear, "nested_absmax")
    state = {"quant_type": "nf4", "blocksize": linear.block, "dtype": str(linear.dtype).removeprefix("torch.")}
    state |= {"shape": [linear.out_features, linear.in_features]}
    tensors = {"": linear.packed, ".absmax": linear.absmax, ".quant_map": code_book(linear.weight.device)}
    if double:
        offset = float(linear.nested_offset)
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {".nested_absmax": linear.nested_absmax}
        tensors |= {".nested_quant_map": nested_code_book(linear.weight.device)}
    tensors[f"{STATE}nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {name + key: tensor.detach().clone() for key, tensor in tensors.items()}  # files share no tensors


def read_state(name: str, kind: str, tensor: torch.Tensor) -> dict:
    """What is said of the weight `name` beside its numbers. Raises ValueError naming what we do not have."""
    try:
        state = json.loads(bytes(tensor.tolist()))
        shape, dtype, block = state["shape"], DTYPES[state["dtype"]], state["blocksize"]
        sound = len(shape) == 2 and all(isinstance(n, int) and 0 < n < 2**31 for n in [*shape, block])
        sound = sound and block in (32, 64, 128, 256, 512, 1024, 2048, 4096)
        sound = sound and math.isfinite(float(state.get("nested_offset", 0)))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{name}: its quantization state cannot be read")
    if kind != "nf4" or state.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
        raise ValueError(f"{name} is quantized as {kind}, in blocks of {block}; only nf4 is read")
    return state | {"dtype": dtype}


def from_files(name: str, state: dict, tensors: dict[str, torch.Tensor]) -> NF4Linear:
    """The layer behind a file's tensors, by their names after `name`. Raises ValueError naming what is not right."""
    block, nested = state["blocksize"], "nested_offset" in state
    count = math.prod(state["shape"])
    blocks = -(-count // block)
    wanted = {"": ((count + 1) // 2, 1), ".absmax": (blocks,), ".quant_map": (16,)}
    if nested:
        wanted |= {".nested_absmax": (-(-blocks // NESTED_BLOCK),), ".nested_quant_map": (256,)}
    for key, shape in wanted.items():
        if key not in tensors:
            raise ValueError(f"{name}{key} missing")
        if tensors[key].shape != shape:
            raise ValueError(f"{name}{key} is {tuple(tensors[key].shape)}, should be {shape}")
    maps = {".quant_map": code_book, ".nested_quant_map": nested_code_book}
    for key, book in maps.items():
        if key in wanted and not torch.equal(tensors[key].float(), book(tensors[key].device)):
            raise ValueError(f"{name}{key} holds other values than NF4 has")
    codes = {"": torch.uint8, ".absmax": torch.uint8 if nested else torch.float32, ".nested_absmax": torch.float32}
    for key, dtype in codes.items():
        if key in wanted and tensors[key].dtype != dtype:
            raise ValueError(f"{name}{key} is {tensors[key].dtype}, should be {dtype}")
    parts = {"weight": tensors[""], "absmax": tensors[".absmax"]}
    if nested:
        parts["nested_absmax"] = tensors[".nested_absmax"]
        parts["nested_offset"] = torch.tensor(float(state["nested_offset"]), device=tensors[""].device)
    for key, tensor in parts.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name}: its {key} holds numbers that are not finite")
    return NF4Linear(parts, tuple(state["shape"]), state["dtype"], block)
