"""Load checkpoints of every supported layout, strictly.

CLIP (Hugging Face's and OpenAI's names), the LLaMA family, GPT-2, llama2.c, and LLaVA as transformers 4 and 5 and its
authors write it. Every tensor of a file is used exactly once or is a known extra, every parameter is filled, every
shape fits and every number is finite. Otherwise nothing is loaded, and one line says what differs.
"""

import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from clip import CLIPModel
from formats import layouts
from formats.configs import ONLY_NF4, clip_config_from_dict, open_config, read_config
from formats.layouts import CLIP_LAYOUTS, EMBEDDING, HEAD, LLAVA_LAYOUTS, Layout
from formats.llama2c import find_llama2c, read_llama2c
from formats.tensors import FLOATS, LazyTensor, open_tensors
from inputs.templates import TEMPLATES, answer_start_ids, end_ids
from inputs.tokenizer import Tokenizer
from llava import Llava, LlavaConfig
from lora import NF4Linear

# ---------------------------------------------------------------------------------------------------------------------
# tensors into a model


def load_tensors(
    model: nn.Module, tensors: dict[str, LazyTensor], candidates: dict[str, Layout], source: Path | str,
    unused: str = "", skip: str = "", bits: int = 16, copy: bool = True, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
):  # fmt: skip
    """Fill every parameter of `model`, which may be on the meta device, from a file's tensors.

    Args: source: names the file in errors; unused: regular expression of names of ours that the file may hold and the
    model need not have; skip: prefix of parameters that are filled from elsewhere; bits, copy: see build_model.
    Raises ValueError with the first differences and their likely cause. Names and shapes are checked before any read.
    """
    reject_quantized(tensors, source)
    wanted = {name: p.shape for name, p in model.named_parameters() if not (skip and name.startswith(skip))}
    layout = candidates[layouts.choose_layout(list(tensors), candidates)]
    for name, (ours, transposed) in assign_tensors(wanted, tensors, layout, source, unused).items():
        tensor = tensors[name].read()
        if isinstance(tensor, NF4Linear):
            keep = is_quantizable(ours[0])
            set_parameter(model, ours[0], tensor.to(device) if keep else tensor.dequantize().to(device, dtype))
            continue
        for target, part in zip(ours, layouts.split(tensor, len(ours), transposed)):
            quantize = bits == 4 and is_quantizable(target)  # one at a time: at most one matrix is whole in memory
            part = part.to(device) if quantize else part.to(device, dtype, copy=copy).contiguous()
            # After the cast, which may overflow. A NaN is both minimum and maximum, and aminmax takes a twentieth of
            # the time of isfinite.
            if part.numel() and not torch.stack(torch.aminmax(part)).isfinite().all():
                raise ValueError(f"{source}: {name} holds numbers that are not finite in {part.dtype}")
            set_parameter(model, target, NF4Linear.from_weight(part) if quantize else part)


# Regular expression of the name and dtype of a tensor that only a checkpoint of such a quantization has.
QUANTIZED = {r"\.qweight ": "GPTQ or AWQ", r"\.weight_packed ": "compressed-tensors"}
QUANTIZED |= {r"\.SCB | int8$": "int8", r" F8_| float8": "FP8"}


def reject_quantized(tensors: dict[str, LazyTensor], source: Path | str):
    """Raise ValueError that names the quantization if there are tensors of another one than NF4."""
    for mark, kind in QUANTIZED.items():
        if found := [name for name, lazy in tensors.items() if re.search(mark, f"{name} {lazy.dtype}")]:
            first = f"{found[0]} is {tensors[found[0]].dtype}"
            raise ValueError(f"{source}: a checkpoint in {kind}: {first}, one of {len(found)} such tensors; {ONLY_NF4}")


def assign_tensors(
    wanted: dict[str, torch.Size], tensors: dict[str, LazyTensor], layout: Layout, source: Path | str, unused: str
) -> dict[str, tuple[list[str], bool]]:
    """layouts.match of every tensor of a file that is used, by its name there. Raises ValueError, see load_tensors."""
    assigned, filled, wrong = {}, set(), []
    for name, lazy in tensors.items():
        ours, transposed = layouts.match(name, layout) or ([], False)
        if re.fullmatch(layouts.COMPUTED, name) or (ours and all(re.fullmatch(unused, target) for target in ours)):
            continue
        if not ours or not wanted.keys() >= set(ours):
            wrong.append(f"{name} not expected")
            continue
        assigned[name] = ours, transposed
        if lazy.dtype not in FLOATS and (lazy.dtype != "NF4" or transposed or len(ours) > 1):
            wrong.append(f"{name} is {lazy.dtype}, should be {', '.join(FLOATS)}")
        parts = layouts.split(torch.empty(lazy.shape, device="meta"), len(ours), transposed)
        for target, part in zip(ours, parts):
            if target in filled:
                wrong.append(f"{name} given twice")
            elif part.shape != wanted[target]:
                wrong.append(f"{name} is {tuple(part.shape)}, should be {tuple(wanted[target])}")
        filled |= set(ours)
    wrong = [f"{name} missing" for name in wanted if name not in filled] + wrong
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} tensors differ: {'; '.join(wrong[:5])}{likely_cause(wrong)}")
    return assigned


def likely_cause(wrong: list[str]) -> str:
    """A sentence on the usual cause of such differences; "" if none is known."""
    if any(".lora_A." in line for line in wrong):
        return ". It holds a LoRA beside its base: merge it with the program that wrote it"
    missing = [line.split()[0] for line in wrong if line.endswith(" missing")]
    parts = {name.split(".")[0] for name in missing}
    if missing == [HEAD]:
        return ". If head and embedding are one tensor, its config.json lacks tie_word_embeddings"
    if parts == {"vision_tower"}:
        return ". It has no vision tower: give CLIP's folder with --vision"
    if EMBEDDING in missing and parts <= {"vision_tower", "language_model"} and len(missing) == len(wrong):
        return ". It has no decoder: give the decoder's folder with --llm" + ", CLIP's with --vision" * (len(parts) - 1)
    if missing and all("multi_modal_projector." in line for line in wrong) and wrong[-1].endswith(" not expected"):
        return ". Its connector is not the one that config.json names"
    if len(wrong) > 5 and all(line.endswith((" not expected", ")")) for line in wrong):  # names and shapes only
        return ". The config.json belongs to a smaller model, or to a part of this one"
    return ""


def is_quantizable(name: str) -> bool:
    """True for the matrices of the decoder's layers, the only parameters that are ever in NF4."""
    return name.startswith("language_model.model.layers.") and name.endswith("_proj.weight")


def set_parameter(model: nn.Module, name: str, value: torch.Tensor | NF4Linear):
    """Replace the parameter `name`, or the whole layer around it by one in NF4."""
    owner, _, leaf = name.rpartition(".")
    if isinstance(value, NF4Linear):
        value.bias = model.get_submodule(owner).bias
        model.set_submodule(owner, value)
    else:
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


class skip_init(TorchFunctionMode):
    """Context in which new modules are not initialized: torch.nn.utils.skip_init for a whole model.

    Every parameter is read from a file anyway, and the first initialization on the meta device takes two seconds.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs or {})


# ---------------------------------------------------------------------------------------------------------------------
# whole models

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = torch.float32, **options) -> Llava:
    """Load a LLaVA, or a decoder alone, from any of the layouts. For dtype and options see build_model."""
    config, tensors = open_model(Path(folder), options.get("vision"))
    return build_model(config, tensors, Path(folder), device, dtype, **options)


def load_checkpoint(folder: Path, device: str, dtype: torch.dtype | None, **options) -> tuple[Llava, Tokenizer]:
    """Load a model and its tokenizer, the tokenizer first: if it is missing, no time is lost on the weights."""
    config, tensors = open_model(folder, options.get("vision"))
    tokenizer = load_tokenizer(folder, config)
    return build_model(config, tensors, folder, device, dtype, **options), tokenizer


def open_model(folder: Path, vision: Path | None = None) -> tuple[LlavaConfig, dict[str, LazyTensor]]:
    """The config of a checkpoint and its tensors, none of them read yet. Args: vision: see read_config."""
    if llama2c := find_llama2c(folder):
        return read_llama2c(llama2c)
    return read_config(folder, vision), open_tensors(folder)


def build_model(
    config: LlavaConfig, tensors: dict[str, LazyTensor], folder: Path, device: str, dtype: torch.dtype | None,
    vision: Path | None = None, llm: Path | None = None, bits: int = 16, copy: bool = True,
) -> Llava:  # fmt: skip
    """Build the model of a config and fill it with tensors, both from open_model. Raises ValueError, in one line.

    The peak of memory is the weights and the largest tensor.
    Args: dtype: None keeps the file's; vision: CLIP's folder, for a LLaVA whose files have no vision tower, as
    liuhaotian/llava-v1.5-7b; llm: the decoder's folder, for files that hold only a projector; bits: 4 keeps the
    matrices of the decoder's layers in NF4; copy: False leaves tensors that already have the right dtype in the
    memory-mapped file, which must not change while the model is used; loading on a CPU then takes almost no time.
    """
    if vision is not None and config.vision_config is None:
        raise ValueError(f"{folder}: a decoder alone; to build a LLaVA from it, use train.py --vision and --llm")
    if llm is not None:
        if any(name.startswith("language_model.") for name in by_our_name(tensors)):
            raise ValueError(f"{folder}: has a decoder; --llm is for files without one")
        tensors = open_tensors(llm) | tensors
    dtype = dtype or most_common_dtype(tensors, folder)
    if vision is not None and any(name.startswith("vision_tower.") for name in by_our_name(tensors)):
        print(f"{folder}: its own vision tower is used, not the weights of {vision}", file=sys.stderr)
        vision = None
    with torch.device("meta"), skip_init():
        model = Llava(config)
    if vision is not None:
        load_tower(model, vision, device, dtype)
    tied = config.text_config.tie_word_embeddings
    unused, skip = re.escape(HEAD) if tied else "", "" if vision is None else "vision_tower."
    source = folder if llm is None else f"{folder} with {llm}"
    load_tensors(model, tensors, LLAVA_LAYOUTS, source, unused, skip, bits, copy, device, dtype)
    if tied:
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
        check_tied_head(tensors, source)
    return model.eval()


def check_tied_head(tensors: dict[str, LazyTensor], source: Path | str):
    """Raise ValueError if a file holds the head of a tied model and it differs from the embedding."""
    found = by_our_name(tensors)
    if any(found[name].dtype == "NF4" for name in (HEAD, EMBEDDING) if name in found):
        raise ValueError(f"{source}: head and embedding are tied, which four bits cannot be")
    if HEAD in found and not torch.equal(found[HEAD].read(), found[EMBEDDING].read()):
        raise ValueError(f"{source}: config.json ties head and embedding, but the file holds two different ones")


def load_tower(model: Llava, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Fill the vision tower of `model` from the folder of a CLIP, of a vision tower, or of another LLaVA."""
    tower, tensors = model.vision_tower, open_tensors(folder)
    if any("multi_modal_projector." in name for name in tensors):
        prefix = "vision_tower."
        tensors = {n.removeprefix(prefix): t for n, t in by_our_name(tensors).items() if n.startswith(prefix)}
    load_tensors(tower, tensors, CLIP_LAYOUTS, folder, layouts.CLIP_WITHOUT_VISION, device=device, dtype=dtype)


def load_clip(folder: str | Path) -> CLIPModel:
    """Load a CLIP with both towers, to compare images with texts."""
    folder = Path(folder)
    with open_config(folder) as values:
        config = clip_config_from_dict(values)
    with torch.device("meta"), skip_init():
        model = CLIPModel(config)
    load_tensors(model, open_tensors(folder), CLIP_LAYOUTS, folder)
    return model.eval()


def by_our_name(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors that a LLaVA has, by our names; one matrix of q, k and v has the name of q."""
    layout = LLAVA_LAYOUTS[layouts.choose_layout(list(tensors), LLAVA_LAYOUTS)]
    return {found[0][0]: lazy for name, lazy in tensors.items() if (found := layouts.match(name, layout))}


def most_common_dtype(tensors: dict[str, LazyTensor], source: Path) -> torch.dtype:
    """The dtype of most of the parameters. Says on stderr how many others it rounds."""
    sizes = Counter()
    for lazy in by_our_name(tensors).values():
        if lazy.dtype in FLOATS:
            sizes[getattr(torch, lazy.dtype)] += math.prod(lazy.shape)
    common = max(sizes, key=sizes.get, default=torch.float32)
    for dtype in sizes:
        if torch.promote_types(dtype, common) != common:
            rounded = f"{sizes[dtype]:,} of {sizes.total():,} numbers are rounded from {dtype} to {common}"
            print(f"{source}: {rounded}, the dtype of most", file=sys.stderr)
    return common


def choose_dtype(name: str, device: str) -> torch.dtype:
    """The dtype called `name`; "auto" is bfloat16 on a GPU that supports it, float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


# ---------------------------------------------------------------------------------------------------------------------
# vocabularies


def load_tokenizer(folder: str | Path, config: LlavaConfig) -> Tokenizer:
    """Load the tokenizer of a folder and reconcile it with the model's config.

    The token with the config's image_token_index is called <image>, whatever the file calls it, and the end tokens of
    the config's template are added to config.eos_token_ids. Raises ValueError if tokenizer and config contradict.
    """
    tokenizer = Tokenizer.load(folder)
    if config.vision_config is not None:
        if config.image_token_index == config.text_config.vocab_size and not tokenizer.legacy:
            # The placeholder has no row, so LLaVA's authors wrote the files. Their code encodes the text after an image
            # on its own, with a space in front; tokenizer.json can only say so of all text after an added token.
            print(f"{folder}: text after an image gets a space in front, as in LLaVA's code: legacy", file=sys.stderr)
            codec = replace(tokenizer.codec, scheme="prepend")
            tokenizer = replace(tokenizer, codec=codec, legacy=True)
        name_image_token(tokenizer, config.image_token_index, folder)
    unused = [tokenizer.roles.get(role) for role in ("image", "pad")]  # their embeddings are never read
    used = [i for name, i in tokenizer.specials.items() if name not in unused] + list(tokenizer.word_ids)
    rows = config.text_config.vocab_size
    if max(tokenizer.codec.highest_id, *used) >= rows:
        raise ValueError(f"{folder}: its tokenizer has ids up to {tokenizer.vocab_size - 1}, its embedding {rows} rows")
    if config.template in TEMPLATES:
        choose_template(config, tokenizer)
    return tokenizer


def choose_template(config: LlavaConfig, tokenizer: Tokenizer, name: str | None = None):
    """Use the template `name`, by default the model's own, and its end tokens. Raises ValueError if that is unknown."""
    config.template = name or config.template
    config.answer_start_ids = answer_start_ids(config.template, tokenizer)
    config.eos_token_ids = sorted({*config.eos_token_ids, *end_ids(config.template, tokenizer)})


def name_image_token(tokenizer: Tokenizer, index: int, folder: str | Path):
    """Call the token with id `index` <image>. Raises ValueError if that token has another meaning."""
    ids = tokenizer.specials | {name: token.id for name, token in tokenizer.words.items()}
    name = {i: name for name, i in ids.items()}.get(index)
    if name is None and index <= tokenizer.codec.highest_id:
        raise ValueError(f"{folder}: image_token_index of config.json, {index}, is an ordinary token")
    if name is not None and name in [tokenizer.roles.get(role) for role in ("bos", "eos", "pad")]:
        raise ValueError(f"{folder}: image_token_index of config.json, {index}, is the token {name}")
    if tokenizer.specials.get("<image>", index) != index:
        raise ValueError(f"{folder}: <image> is {tokenizer.specials['<image>']}, but config.json says {index}")
    if name != "<image>":
        tokenizer.specials.pop(name, None)
        tokenizer.added.pop(name, None)
    tokenizer.specials["<image>"], tokenizer.roles["image"] = index, "<image>"
    tokenizer.__post_init__()


@torch.no_grad()
def grow_vocabulary(model: Llava, size: int, step: int = 64):
    """Add embedding rows until there are `size`, rounded up to a multiple of `step`. New rows are the mean of the old.

    A mean row is never the likeliest token, so the model does not generate the new ids.
    """
    text = model.config.text_config
    if size <= text.vocab_size:
        return
    new = -(-size // step) * step - text.vocab_size
    embedding, head = model.language_model.model.embed_tokens, model.language_model.lm_head
    for module in (embedding, head):
        rows = module.weight.float().mean(0, keepdim=True).expand(new, -1).to(module.weight.dtype)
        module.weight = nn.Parameter(torch.cat([module.weight, rows]))
    if text.tie_word_embeddings:
        head.weight = embedding.weight
    text.vocab_size += new
    embedding.num_embeddings = head.out_features = text.vocab_size
