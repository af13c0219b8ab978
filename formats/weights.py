"""Checkpoints that people have: loaded strictly, and saved so that their tools load them.

    python -m formats inspect DIR        what a folder holds, without loading it
    python -m formats convert SRC DST    any of these as a folder of ours (which is also transformers')

It reads CLIP (Hugging Face's and OpenAI's names), LLaMA and its relatives, GPT-2, llama2.c, LLaVA as transformers 4 and
5 write it, and as its authors do. Every tensor of a file is used exactly once or is a known extra, every parameter is
filled, every shape fits and every number is finite; or nothing is loaded, and one line says what differs.
"""

import math
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from clip import CLIPModel
from formats.configs import clip_config_from_dict, read_config
from formats.layouts import (
    CLIP_LAYOUTS,
    EMBEDDING,
    EXTRAS,
    HEAD,
    LLAVA_LAYOUTS,
    REST_OF_CLIP,
    SAME,
    Layout,
    choose_layout,
    is_extra,
    match,
)
from formats.tensors import NUMBERS, LazyTensor, find_llama2c, open_tensors, read_llama2c
from inputs.files import read_json
from inputs.templates import end_ids
from inputs.tokenizer import Tokenizer
from llava import Llava, LlavaConfig
from lora import NF4Linear

FLOATS = {name: NUMBERS[name] for name in ("F32", "F16", "BF16", "F64")}  # in safetensors
FLOATS |= {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}  # in torch


# ---------------------------------------------------------------------------------------------------------------------
# filling a model


def load_tensors(
    model: nn.Module,
    tensors: dict[str, LazyTensor],
    layouts: dict[str, Layout],
    source: Path | str,
    extras=(),
    skip: str = "",
    bits: int = 16,
    copy: bool = True,
    **to,
):
    """Give every parameter of `model` its tensor from the file; all names and shapes are checked before any is read.

    Args: model: may be on the meta device. extras: names, in our spelling, that need no place. skip: a part of
    the model, if any, that is filled from elsewhere. bits: 4 puts the decoder's layers into NF4. copy: see
    load_checkpoint. to: device, dtype.
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
        if lazy.dtype not in FLOATS and (lazy.dtype != "NF4" or found[1] is not SAME):
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
        tensor = tensors[name].read()
        if isinstance(tensor, NF4Linear):
            set_parameter(
                model, ours[0], tensor.to(to["device"]) if in_layers(ours[0]) else tensor.dequantize().to(**to)
            )
            continue
        for target, part in zip(ours, change.split(tensor)):
            small = bits == 4 and in_layers(target)  # quantized as it comes, so that no more than one is ever whole
            part = part.to(to["device"]) if small else part.to(copy=copy, **to).contiguous()
            # Here, for what fits into the file's dtype may not fit into this one. The extremes tell, for a NaN is both,
            # and are found in a twentieth of the time of isfinite(part).
            if part.numel() and not torch.stack(torch.aminmax(part)).isfinite().all():
                raise ValueError(f"{source}: {name} holds numbers that are not finite in {to['dtype']}")
            set_parameter(model, target, NF4Linear.of(part) if small else part)


def in_layers(name: str) -> bool:
    """Whether this is a matrix of the decoder's layers: those are in NF4, or can be, and nothing else."""
    return name.startswith("language_model.model.layers.") and name.endswith("_proj.weight")


class skip_init(TorchFunctionMode):
    """Context in which new modules are not initialized, like torch.nn.utils.skip_init but for a whole model: every
    parameter is read from a file anyway, and initializing tensors on the meta device takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def set_parameter(model: nn.Module, name: str, value: torch.Tensor | NF4Linear):
    """Put a tensor where the parameter `name` is, or a layer where the one is whose weight that is."""
    owner, _, leaf = name.rpartition(".")
    if isinstance(value, NF4Linear):
        value.bias = model.get_submodule(owner).bias
        model.set_submodule(owner, value)
    else:
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


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


def load_model(
    folder: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    vision: Path | None = None,
    llm: Path | None = None,
    bits: int = 16,
) -> Llava:
    """A LLaVA, or a decoder alone, from any of the layouts; dtype None keeps the file's.

    Args: vision: CLIP's folder, for a LLaVA whose files leave it out (liuhaotian/llava-v1.5-7b); llm: the decoder's,
    for one that is a projector only (the release of its stage 1); bits: 4 keeps the matrices of the decoder's layers in
    NF4. The model is built without memory and filled tensor by tensor, so the peak is the weights and the largest
    tensor. Raises ValueError, in one line, naming the file and the first differing tensors.
    """
    config, tensors = open_model(Path(folder))
    return build(config, tensors, Path(folder), device, dtype, vision, llm, bits)


def load_checkpoint(
    folder: str | Path, device: str, dtype: torch.dtype | None, bits: int = 16, copy: bool = True
) -> tuple[Llava, Tokenizer]:
    """A model and its tokenizer, which is read first: if it is missing, nobody waits for the weights to hear of it.

    Args: copy: False leaves on a CPU what has its type already in the mapped file, which is to stay as it is for as
    long; read when it is first used, that takes no time at all.
    """
    config, tensors = open_model(Path(folder))
    tokenizer = load_tokenizer(folder, config)
    return build(config, tensors, Path(folder), device, dtype, bits=bits, copy=copy), tokenizer


def build(
    config: LlavaConfig,
    tensors: dict[str, LazyTensor],
    folder: Path,
    device: str,
    dtype: torch.dtype | None,
    vision: Path | None = None,
    llm: Path | None = None,
    bits: int = 16,
    copy: bool = True,
) -> Llava:
    """The model of what open_model found; for the arguments see load_model and load_checkpoint."""
    if vision is not None and config.vision_config is None:
        raise ValueError(f"{folder}: a decoder alone; --vision and --llm of train.py make a LLaVA of it")
    if llm is not None:
        tensors = join_decoder(tensors, folder, llm)
    dtype = dtype or usual_dtype(tensors)
    with torch.device("meta"), skip_init():
        model = Llava(config)
    tied = config.text_config.tie_word_embeddings
    extras = (HEAD,) if tied else ()
    if vision is not None:
        load_tower(model, vision, device, dtype)
    skip = "" if vision is None else "vision_tower."
    source = folder if llm is None else f"{folder} with {llm}"
    load_tensors(model, tensors, LLAVA_LAYOUTS, source, extras, skip, bits, copy, device=device, dtype=dtype)
    if tied:
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
        check_head(tensors, source)
    return model.eval()


def by_our_name(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of a file that have a place in a LLaVA, under our names; q, k and v in one under that of q."""
    layout = LLAVA_LAYOUTS[choose_layout(list(tensors), LLAVA_LAYOUTS)]
    return {found[0][0]: lazy for name, lazy in tensors.items() if (found := match(name, layout))}


def join_decoder(tensors: dict[str, LazyTensor], folder: Path, llm: Path) -> dict[str, LazyTensor]:
    """The tensors of a projector, and those of its decoder. Raises ValueError if there is a decoder already."""
    if any(name.startswith("language_model.") for name in by_our_name(tensors)):
        raise ValueError(f"{folder}: has a decoder; --llm is for what has none")
    return open_tensors(llm) | tensors


def usual_dtype(tensors: dict[str, LazyTensor]) -> torch.dtype:
    """What most of the parameters are in; of tables that a file holds besides, the dtype says nothing."""
    sizes = Counter()
    for lazy in by_our_name(tensors).values():
        if lazy.dtype != "NF4":
            sizes[FLOATS.get(lazy.dtype, torch.float32)] += math.prod(lazy.shape)  # others are refused by fill
    return max(sizes, key=sizes.get, default=torch.float32)


DTYPES = ("auto", "float32", "bfloat16", "float16")


def choose_dtype(name: str, device: str) -> torch.dtype:
    """What to answer in: the named dtype, or of "auto" bfloat16 on a GPU that has it and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


def open_model(folder: Path) -> tuple[LlavaConfig, dict[str, LazyTensor]]:
    """A model's description and its tensors, none of them read yet."""
    if llama2c := find_llama2c(folder):
        return read_llama2c(llama2c)
    return read_config(folder), open_tensors(folder)


def check_head(tensors: dict[str, LazyTensor], source: Path | str):
    """A file may hold the head of a tied model once more, but not another one. Raises ValueError."""
    found = by_our_name(tensors)
    if any(found[name].dtype == "NF4" for name in (HEAD, EMBEDDING) if name in found):
        raise ValueError(f"{source}: its head or embedding is in four bits, and the two are one")
    if HEAD in found and not torch.equal(found[HEAD].read(), found[EMBEDDING].read()):
        raise ValueError(f"{source}: config.json ties head and embedding, but the file holds two different ones")


def load_tower(model: Llava, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Fill the vision tower of `model` from a CLIP, whole or only its vision part, under HF's or OpenAI's names."""
    load_tensors(
        model.vision_tower, open_tensors(folder), CLIP_LAYOUTS, folder, REST_OF_CLIP, device=device, dtype=dtype
    )


def load_clip(folder: str | Path) -> CLIPModel:
    """A whole CLIP, text tower included, for comparing pictures with texts."""
    folder = Path(folder)
    with torch.device("meta"), skip_init():
        model = CLIPModel(clip_config_from_dict(read_json(folder / "config.json")))
    load_tensors(model, open_tensors(folder), CLIP_LAYOUTS, folder, device="cpu", dtype=torch.float32)
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
