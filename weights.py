"""Checkpoints that people have: loaded strictly, and saved so that their tools load them.

    python weights.py inspect DIR        what a folder holds, without loading it
    python weights.py convert SRC DST    any of these as a folder of ours (which is also transformers')

It reads CLIP (Hugging Face's and OpenAI's names), LLaMA and its relatives, GPT-2, llama2.c, LLaVA as transformers 4 and
5 write it, and as its authors do. Every tensor of a file is used exactly once or is a known extra, every parameter is
filled, every shape fits and every number is finite; or nothing is loaded, and one line says what differs.
"""

import argparse
import json
import math
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from clip import CLIPConfig, CLIPModel
from configs import config_to_json, read_config, write_processor
from files import publish, read_json, refuse_duplicates, write_json
from layouts import (
    CLIP_LAYOUTS,
    EXTRAS,
    LLAVA_LAYOUTS,
    REST_OF_CLIP,
    Layout,
    choose_layout,
    gpt2,
    is_extra,
    llama,
    match,
    pattern_of,
)
from llava import Llava, LlavaConfig, TextConfig
from templates import TEMPLATES, end_ids
from tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000  # of a file that is written; larger ones are unwieldy to copy
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}  # in safetensors
FLOATS |= {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}  # in torch
PICKLES = (".bin", ".pt", ".pth")
HEADER_BYTES = 10_000_000  # of a file that is read: room for some hundred thousand tensors


# ---------------------------------------------------------------------------------------------------------------------
# tensors in files


@dataclass
class Lazy:
    """A tensor that is still in its file. read() makes it, on the CPU, perhaps as a view of the mapped file."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]


def open_tensors(path: Path) -> dict[str, Lazy]:
    """Every tensor of a folder or file by name, none read yet. Raises ValueError, in one line, if something is off."""
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


def read_safetensors(path: Path) -> dict[str, Lazy]:
    """The library checks offsets and sizes; it lets pass a key given twice and a space in front, and we do not."""

    def reader(name: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            with safe_open(path, "pt") as file:  # opened each time, or all that was read stays in memory
                return file.get_tensor(name)

        return read

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(HEADER_BYTES, path.stat().st_size):
                raise ValueError(f"its header is {length} bytes long")
            text = file.read(length)
        if not text.startswith(b"{"):
            raise ValueError("its header does not begin with {")
        header = json.loads(text, object_pairs_hook=refuse_duplicates)
        header.pop("__metadata__", None)
        with safe_open(path, "pt"):
            return {name: Lazy(tuple(e["shape"]), e["dtype"], reader(name)) for name, e in header.items()}
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def read_pickle(path: Path) -> dict[str, Lazy]:
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
        name: Lazy(tuple(value.shape), str(value.dtype).removeprefix("torch."), lambda value=value: value)
        for name, value in state.items()
    }


def read_shards(index: Path, reader: Callable[[Path], dict[str, Lazy]]) -> dict[str, Lazy]:
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
# filling a model


def fill(
    model: nn.Module, tensors: dict[str, Lazy], layouts: dict[str, Layout], source: Path | str, extras=(), skip="", **to
):
    """Give every parameter of `model` its tensor from the file; all names and shapes are checked before any is read.

    Args: model: may be on the meta device. extras: names, in our spelling, that need no place. skip: a part of
    the model, if any, that is filled from elsewhere. to: device, dtype.
    Raises ValueError with the first differences, and their likely cause.
    """
    wanted = {name: p for name, p in model.named_parameters() if not (skip and name.startswith(skip))}
    layout = layouts[choose_layout(list(tensors), layouts)]
    sources, wrong = {}, []
    for name, lazy in tensors.items():
        found = match(name, layout)
        if is_extra(name, EXTRAS) or (found and all(is_extra(ours, extras) for ours in found[0])):
            continue
        if not found or not all(ours in wanted for ours in found[0]):
            wrong.append(f"{name} not expected")
            continue
        if lazy.dtype not in FLOATS:
            wrong.append(f"{name} is {lazy.dtype}, should be {', '.join(list(FLOATS)[:4])}")
        for ours, part in zip(found[0], found[1].split(torch.empty(lazy.shape, device="meta"))):
            if ours in sources:
                wrong.append(f"{name} given twice")
            elif part.shape != wanted[ours].shape:
                wrong.append(f"{name} is {tuple(part.shape)}, should be {tuple(wanted[ours].shape)}")
        sources |= dict.fromkeys(found[0], name)
    wrong = [f"{name} missing" for name in wanted if name not in sources] + wrong
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} tensors differ: {'; '.join(wrong[:5])}{likely_cause(wrong)}")
    for name in dict.fromkeys(sources.values()):
        ours, change = match(name, layout)
        for target, part in zip(ours, change.split(tensors[name].read())):
            part = part.to(copy=True, memory_format=torch.contiguous_format, **to)
            if not torch.isfinite(part).all():  # here, for what fits into the file's dtype may not fit into this one
                raise ValueError(f"{source}: {name} holds numbers that are not finite in {to['dtype']}")
            place(model, target, part)


class WithoutNumbers(TorchFunctionMode):
    """Modules built within get no random numbers: they are filled anyway, and for tensors that are not there torch
    draws them in Python, which takes two seconds to import."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def place(model: nn.Module, name: str, tensor: torch.Tensor):
    """Put a tensor where the parameter `name` is."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def likely_cause(wrong: list[str]) -> str:
    """What usually lies behind such differences; "" if nothing comes to mind."""
    missing = [line.split()[0] for line in wrong if line.endswith(" missing")]
    parts = {name.split(".")[0] for name in missing}
    if missing == [HEAD]:
        return ". If head and embedding are one tensor, its config.json lacks tie_word_embeddings"
    if parts == {"vision_tower"}:
        return ". It has no vision tower: name CLIP's folder with --vision"
    if EMBEDDING in missing and parts <= {"vision_tower", "language_model"} and len(missing) == len(wrong):
        return ". It has no decoder: name the decoder's folder with --llm" + ", CLIP's with --vision" * (len(parts) - 1)
    if len(wrong) > 5 and not missing:
        return ". The config.json belongs to a smaller model, or to a part of this one"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# whole models


HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def load_model(
    folder: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    vision: Path | None = None,
    llm: Path | None = None,
) -> Llava:
    """A LLaVA, or a decoder alone, from any of the layouts; dtype None keeps the file's.

    Args: vision: CLIP's folder, for a LLaVA whose files leave it out (liuhaotian/llava-v1.5-7b); llm: the decoder's,
    for one that is a projector only (the release of its stage 1). The model is built without memory and filled tensor
    by tensor, so the peak is the weights and the largest tensor. Raises ValueError, in one line, naming the file and
    the first differing tensors.
    """
    config, tensors = open_model(Path(folder))
    return build(config, tensors, Path(folder), device, dtype, vision, llm)


def load_both(folder: str | Path, device: str, dtype: torch.dtype) -> tuple[Llava, Tokenizer]:
    """A model and its tokenizer, which is read first: if it is missing, nobody waits for the weights to hear of it."""
    config, tensors = open_model(Path(folder))
    tokenizer = load_tokenizer(folder, config)
    return build(config, tensors, Path(folder), device, dtype), tokenizer


def build(
    config: LlavaConfig,
    tensors: dict[str, Lazy],
    folder: Path,
    device: str,
    dtype: torch.dtype | None,
    vision: Path | None = None,
    llm: Path | None = None,
) -> Llava:
    """The model of what open_model found; for the arguments see load_model."""
    if vision is not None and config.vision_config is None:
        raise ValueError(f"{folder}: a decoder alone; --vision and --llm of train.py make a LLaVA of it")
    if llm is not None:
        tensors = join_decoder(tensors, folder, llm)
    dtype = dtype or usual_dtype(tensors)
    with torch.device("meta"), WithoutNumbers():
        model = Llava(config)
    tied = config.text_config.tie_word_embeddings
    extras = (HEAD,) if tied else ()
    if vision is not None:
        load_tower(model, vision, device, dtype)
    skip = "" if vision is None else "vision_tower."
    source = folder if llm is None else f"{folder} with {llm}"
    fill(model, tensors, LLAVA_LAYOUTS, source, extras, skip, device=device, dtype=dtype)
    if tied:
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
        check_head(tensors, source)
    return model.eval()


def placed(tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """The tensors of a file that have a place in a LLaVA, under our names; q, k and v in one under that of q."""
    layout = LLAVA_LAYOUTS[choose_layout(list(tensors), LLAVA_LAYOUTS)]
    return {found[0][0]: lazy for name, lazy in tensors.items() if (found := match(name, layout))}


def join_decoder(tensors: dict[str, Lazy], folder: Path, llm: Path) -> dict[str, Lazy]:
    """The tensors of a projector, and those of its decoder. Raises ValueError if there is a decoder already."""
    if any(name.startswith("language_model.") for name in placed(tensors)):
        raise ValueError(f"{folder}: has a decoder; --llm is for what has none")
    return open_tensors(llm) | tensors


def usual_dtype(tensors: dict[str, Lazy]) -> torch.dtype:
    """What most of the parameters are in; of tables that a file holds besides, the dtype says nothing."""
    sizes = Counter()
    for lazy in placed(tensors).values():
        sizes[FLOATS.get(lazy.dtype, torch.float32)] += math.prod(lazy.shape)  # others are refused by fill
    return max(sizes, key=sizes.get, default=torch.float32)


DTYPES = ("auto", "float32", "bfloat16", "float16")


def choose_dtype(name: str, device: str) -> torch.dtype:
    """What to answer in: the named dtype, or of "auto" bfloat16 on a GPU that has it and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


def open_model(folder: Path) -> tuple[LlavaConfig, dict[str, Lazy]]:
    """A model's description and its tensors, none of them read yet."""
    if llama2c := find_llama2c(folder):
        return read_llama2c(llama2c)
    return read_config(folder), open_tensors(folder)


def check_head(tensors: dict[str, Lazy], source: Path | str):
    """A file may hold the head of a tied model once more, but not another one. Raises ValueError."""
    found = placed(tensors)
    if HEAD in found and not torch.equal(found[HEAD].read(), found[EMBEDDING].read()):
        raise ValueError(f"{source}: config.json ties head and embedding, but the file holds two different ones")


def load_tower(model: Llava, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Fill the vision tower of `model` from a CLIP, whole or only its vision part, under HF's or OpenAI's names."""
    fill(model.vision_tower, open_tensors(folder), CLIP_LAYOUTS, folder, REST_OF_CLIP, device=device, dtype=dtype)


def load_clip(folder: str | Path) -> CLIPModel:
    """A whole CLIP, text tower included, for comparing pictures with texts."""
    folder = Path(folder)
    with torch.device("meta"), WithoutNumbers():
        model = CLIPModel(CLIPConfig.from_dict(read_json(folder / "config.json")))
    fill(model, open_tensors(folder), CLIP_LAYOUTS, folder, device="cpu", dtype=torch.float32)
    return model.eval()


def load_tokenizer(folder: str | Path, config: LlavaConfig) -> Tokenizer:
    """The folder's tokenizer, and what each of it and the config has to know of the other.

    The picture's token gets the id that the config gives it, and is <image> from now on, whatever it was called; and
    what ends an answer in the config's template ends it. Raises ValueError where they contradict each other.
    """
    tokenizer = Tokenizer.load(folder)
    index, names = config.image_token_index, {i: name for name, i in tokenizer.specials.items()}
    if config.vision_config is not None:
        if index <= tokenizer.codec.highest_id and index not in names:
            raise ValueError(f"{folder}: image_token_index of config.json, {index}, is an ordinary token")
        name = names.get(index, "<image>")
        if name in [tokenizer.roles.get(role) for role in ("bos", "eos", "pad")]:
            raise ValueError(f"{folder}: image_token_index of config.json, {index}, is the token {name}")
        if tokenizer.specials.get("<image>", index) != index:
            raise ValueError(f"{folder}: <image> is {tokenizer.specials['<image>']}, but config.json says {index}")
        tokenizer.specials.pop(name, None)
        tokenizer.specials["<image>"], tokenizer.roles["image"] = index, "<image>"
    roles = [tokenizer.roles.get(role) for role in ("image", "pad")]  # may be added, or are never looked up
    used = [i for name, i in tokenizer.specials.items() if name not in roles]
    if max(tokenizer.codec.highest_id, *used) >= config.text_config.vocab_size:
        rows = config.text_config.vocab_size
        raise ValueError(f"{folder}: its tokenizer has ids up to {tokenizer.vocab_size - 1}, its embedding {rows} rows")
    config.eos_token_ids = sorted({*config.eos_token_ids, *end_ids(config.template, tokenizer)})
    return tokenizer


@torch.no_grad()
def grow_vocabulary(model: Llava, size: int):
    """Make room for `size` ids, in steps of 64; new rows are the mean of the old, so they are never the likeliest."""
    text = model.config.text_config
    if size <= text.vocab_size:
        return
    new = -(-size // 64) * 64 - text.vocab_size
    embedding, head = model.language_model.model.embed_tokens, model.language_model.lm_head
    for module in (embedding, head):
        rows = module.weight.float().mean(0, keepdim=True).expand(new, -1).to(module.weight.dtype)
        module.weight = nn.Parameter(torch.cat([module.weight, rows]))
    if text.tie_word_embeddings:
        head.weight = embedding.weight
    text.vocab_size += new
    embedding.num_embeddings = head.out_features = text.vocab_size


# ---------------------------------------------------------------------------------------------------------------------
# writing


def save_model(model: Llava, folder: str | Path, weights: dict[str, torch.Tensor] | None = None):
    """Write config.json and model.safetensors (in shards, if large) as transformers' own classes load them.

    A LLaVA of the LLaMA family with the mlp2x_gelu projector is a LlavaForConditionalGeneration, a decoder alone a
    LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or GPT2LMHeadModel.

    Args: weights: what its parameters are, by name, where the model itself holds them narrowed or in slices.
    """
    folder, config = Path(folder), model.config
    weights = model.state_dict() if weights is None else weights
    state = {key: value.detach().contiguous() for key, value in weights.items()}
    if config.text_config.tie_word_embeddings:
        state.pop(HEAD, None)  # the same tensor as the embedding; stored once
    if config.vision_config is None:
        state = rename_back(state, gpt2("transformer.") if config.text_config.gpt2 else llama("model.", ""))
    write_shards(state, folder)
    write_json(folder / "config.json", config_to_json(config))
    ends = {"eos_token_id": config.eos_token_ids, "pad_token_id": config.pad_token_id}
    write_json(folder / "generation_config.json", ends)
    if config.vision_config is not None:
        write_processor(config, folder)


def rename_back(state: dict[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """The same tensors under the names of a layout, parts joined."""
    renamed = {}
    for theirs, ours, change in layout:
        pattern = pattern_of(ours[0])
        for found in filter(None, map(pattern.fullmatch, state)):
            parts = tuple(state[name.format(**found.groupdict())] for name in ours)
            renamed[theirs.format(**found.groupdict())] = change.join(parts).contiguous()
    return renamed


def write_shards(state: dict[str, torch.Tensor], folder: Path):
    """model.safetensors; or model-00001-of-00003.safetensors and so on, with an index."""
    shards, size = [{}], 0
    for name, tensor in state.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


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


def read_llama2c(path: Path) -> tuple[LlavaConfig, dict[str, Lazy]]:
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
            tensors[full] = Lazy(tuple(tensor.shape), "F32", lambda tensor=tensor: tensor)
    del tensors["model.RoPE"]
    text = TextConfig(vocab, width, hidden, layers, heads, kv_heads, max_position_embeddings=context)
    text.rms_norm_eps, text.tie_word_embeddings = 1e-5, tied
    return LlavaConfig(text, image_token_index=vocab, template="raw", eos_token_ids=[1, 2]), tensors


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def inspect(folder: Path):
    """Print what a folder holds: layout, geometry, parameters, dtype, template, memory per precision."""
    tensors = open_model(folder)[1] if find_llama2c(folder) else open_tensors(folder)
    layouts = LLAVA_LAYOUTS | CLIP_LAYOUTS
    name = choose_layout(list(tensors), layouts)
    placed = sum(match(key, layouts[name]) is not None or is_extra(key, EXTRAS) for key in tensors)
    count = sum(math.prod(lazy.shape) for lazy in tensors.values())
    dtypes = Counter(lazy.dtype for lazy in tensors.values())
    rows = {"layout": name, "tensors": f"{len(tensors)}, of which {placed} are known to this layout"}
    rows |= {"parameters": f"{count:,}", "dtype": ", ".join(f"{dtype} ({n})" for dtype, n in dtypes.most_common())}
    sizes = {"float32": 4, "bfloat16": 2, "8-bit": 1, "4-bit": 0.5}
    rows["memory"] = ", ".join(f"{size * count / 1e9:.2f} GB as {dtype}" for dtype, size in sizes.items())
    if name in LLAVA_LAYOUTS and ((folder / "config.json").exists() or find_llama2c(folder)):
        config, _ = open_model(folder)
        text, vision = config.text_config, config.vision_config
        rows["decoder"] = (
            f"{text.model_type}, width {text.hidden_size}, {text.num_hidden_layers} layers, {text.num_attention_heads} "
            f"heads ({text.num_key_value_heads} of keys and values), vocabulary {text.vocab_size:,}, "
            f"context {text.max_position_embeddings:,}"
        )
        if vision is not None:
            rows["vision tower"] = (
                f"width {vision.hidden_size}, {vision.num_hidden_layers} layers, pictures of {vision.image_size} "
                f"pixels in {vision.num_patches} patches; projector {config.projector_type}"
            )
        rows["template"] = config.template
    for key, value in rows.items():
        print(f"{key:<14}{value}")


def convert(source: Path, target: Path, vision: Path | None, llm: Path | None, template: str | None):
    """Any model as a folder of ours, in its own dtype."""
    if target.exists():
        raise ValueError(f"{target}: exists already")
    config, tensors = open_model(source)
    config.template = template or config.template
    tokenizer = load_tokenizer(llm or source, config)
    model = build(config, tensors, source, "cpu", None, vision, llm)
    if config.vision_config is not None:
        grow_vocabulary(model, tokenizer.vocab_size)

    def write(folder: Path):
        save_model(model, folder)
        tokenizer.save(folder)

    publish(target, write)


def main():
    """Inspect or convert; what a user can mend ends in one line and status 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="print what a folder or file holds, without loading it")
    look.add_argument("folder", type=Path)
    change = commands.add_parser("convert", help="write a folder of ours, which transformers loads too")
    change.add_argument("source", type=Path)
    change.add_argument("target", type=Path)
    change.add_argument("--vision", type=Path, help="CLIP's folder, for a LLaVA whose files leave it out")
    change.add_argument("--llm", type=Path, help="the decoder's folder, for one that is only a projector")
    change.add_argument("--template", choices=TEMPLATES, help="the conversation template, if the folder's is not right")
    args = parser.parse_args()
    try:
        if args.command == "inspect":
            inspect(args.folder)
        else:
            convert(args.source, args.target, args.vision, args.llm, args.template)
    except (ValueError, OSError) as error:
        sys.exit(f"weights.py: {error}")


if __name__ == "__main__":
    main()
