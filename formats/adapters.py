"""Adapters in files: what LoRA trained, apart from the model it was trained on.

One folder holds A, B and everything else that trained (the projector), as Hugging Face's peft writes and reads it:

    adapter_config.json          ranks, alphas, and the exact path of every adapted layer
    adapter_model.safetensors    base_model.model.PATH.lora_A.weight, ...lora_B.weight; other tensors whole
    config.json                  the whole model's, for its template and how it makes pictures square

It also reads the folders of LLaVA's authors, who keep the projector in a file of its own.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from formats.configs import config_to_json, read_config
from formats.layouts import LLAVA_LAYOUTS, Layout, choose_layout, llama, match
from formats.saving import merged_into, rename_back
from formats.tensors import LazyTensor, open_tensors
from formats.weights import (
    FLOATS,
    build,
    load_checkpoint,
    load_tokenizer,
    open_model,
)
from inputs.files import fingerprint, read_json, write_json
from inputs.tokenizer import Tokenizer
from llava import Llava, LlavaConfig
from lora import LoRALinear, NF4Linear, base_weight, lora_scale

PEFT = "base_model.model."  # stands in front of every name
CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
REST = "non_lora_trainables.bin"  # of LLaVA's authors
# What peft can do to the arithmetic of LoRA, and we cannot; and what else may train beside it.
UNKNOWN = ("use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora")
UNKNOWN += ("alora_invocation_tokens", "use_bdlora", "eva_config", "arrow_config", "monteclora_config")
STARTS = ("gaussian", "orthogonal")  # ways to begin that leave the base alone


# ---------------------------------------------------------------------------------------------------------------------
# writing


def save_adapter(
    trained: dict[str, torch.Tensor],
    folder: Path,
    config: LlavaConfig,
    layers: dict[str, tuple[int, float]],
    dropout: float,
    base: Path,
    sample: dict[str, list[float]],
):
    """Write what trained.

    Args: trained: tensors by our names, A, B and all others; config: of the whole model; layers: what add_lora
    returned; base: folder of the model below; sample: what sample_weights found there.
    Raises ValueError if peft has no name for some of the tensors.
    """
    layout = their_layout(config)
    theirs = rename_back(trained, layout)
    if len(theirs) != len(trained):
        raise ValueError(f"{len(trained) - len(theirs)} of the {len(trained)} trained tensors have no name in peft")
    modules = {their_path(path, layout): values for path, values in layers.items()}
    rank, alpha = next(iter(modules.values()))
    whole = {name.split(".")[0] for name in trained if ".lora_" not in name}
    values = {"peft_type": "LORA", "base_model_name_or_path": str(base), "task_type": None, "inference_mode": True}
    values |= {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": False, "bias": "none"}
    values |= {"target_modules": list(modules), "modules_to_save": sorted(whole) or None, "fan_in_fan_out": False}
    values["rank_pattern"] = {re.escape(path): r for path, (r, _) in modules.items() if r != rank}
    values["alpha_pattern"] = {re.escape(path): a for path, (_, a) in modules.items() if a != alpha}
    write_json(folder / CONFIG, values)
    write_json(folder / "config.json", config_to_json(config))
    metadata = {"base": json.dumps(sample)}  # of two entries, the order in the file would be by chance
    save_file({PEFT + name: tensor for name, tensor in theirs.items()}, folder / WEIGHTS[0], metadata=metadata)


def their_layout(config: LlavaConfig) -> Layout:
    """Names of transformers 5 in memory, which is where peft looks."""
    if config.vision_config is not None:
        return LLAVA_LAYOUTS["LLaVA, transformers 5 in memory"]
    return llama("model.", "")


def their_path(path: str, layout: Layout) -> str:
    (name,) = rename_back({f"{path}.weight": torch.empty(0)}, layout)
    return name.removesuffix(".weight")


# ---------------------------------------------------------------------------------------------------------------------
# which base it is for


def sample_weights(model: nn.Module, paths) -> dict[str, list[float]]:
    """64 numbers of each of 8 of these matrices, by which to know a base again: in fewer bits they are nearly the
    same, in another model they are not."""
    paths, found = list(paths), {}
    for path in paths[:: -(-len(paths) // 8)]:
        flat = base_weight(model.get_submodule(path)).flatten().float()
        found[path] = flat[:: -(-len(flat) // 64)].tolist()
    return found


def check_base(model: nn.Module, adapter: "Adapter"):
    """Raise ValueError if the numbers that the adapter's file noted of its base are not about those of this model."""
    for path, theirs in adapter.base.items():
        ours = (
            sample_weights(model, [path])[path] if isinstance(model.get_submodule(path), (nn.Linear, NF4Linear)) else []
        )
        if len(ours) == len(theirs):
            apart = float(torch.dist(torch.tensor(ours), torch.tensor(theirs)) / torch.tensor(theirs).norm())
            if apart < 0.3:  # NF4 puts weights 0.1 apart, bfloat16 0.002, other weights 1.4
                continue
        raise ValueError(f"{adapter.folder} was trained on another base: its {path} held other weights")


# ---------------------------------------------------------------------------------------------------------------------
# reading


@dataclass
class Adapter:
    """An adapter as its folder holds it, under our names."""

    folder: Path
    sha256: str  # of its file of weights
    lora: dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # of a layer: A (r, in), B (out, r), scale
    whole: dict[str, torch.Tensor]  # tensors in the place of the base's
    base: dict[str, list[float]]  # what sample_weights found in the base; empty in files that are not ours
    config: LlavaConfig | None  # of the whole model, where the folder has it
    has_template: bool  # whether that says how the template and the pictures are; or else `config` guesses


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def read_adapter(folder: Path) -> Adapter:
    """An adapter of ours, of peft's or of LLaVA's authors'. Raises ValueError naming what it cannot use."""
    values, path = read_peft_config(folder), weights_file(folder)
    pairs, whole = sort_tensors(open_tensors(path) | (open_tensors(folder / REST) if (folder / REST).exists() else {}))
    for name, lazy in [*whole.items(), *((name, half) for name, pair in pairs.items() for half in pair.values())]:
        if lazy.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {lazy.dtype}, should be {', '.join(list(FLOATS)[:4])}")
    names = [*(f"{name}.weight" for name in pairs), *whole]
    layout = LLAVA_LAYOUTS[choose_layout(names, LLAVA_LAYOUTS)]
    if strange := [name for name in names if not match(name, layout)]:
        raise ValueError(f"{path}: {len(strange)} tensors belong to no part of a LLaVA: {', '.join(strange[:3])}")
    if not pairs:
        raise ValueError(f"{path}: holds no LoRA")
    lora, rest = {}, {}
    for name, pair in pairs.items():
        lora |= read_layer(path, name, pair, values, layout)
    for name, lazy in whole.items():
        ours, change = match(name, layout)
        rest |= zip(ours, change.split(lazy.read()))
    for name, tensor in [*rest.items(), *((name, half) for name, layer in lora.items() for half in layer[:2])]:
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
    config = read_config(folder) if (folder / "config.json").exists() else None
    has_template = config is not None and "template" in read_json(folder / "config.json")
    return Adapter(folder, fingerprint(path)["sha256"], lora, rest, read_sample(path, lora), config, has_template)


def read_peft_config(folder: Path) -> dict:
    """adapter_config.json. Raises ValueError if there is none, or if it asks for something that we do not have."""
    if not is_adapter(folder):
        raise ValueError(f"{folder}: holds no {CONFIG}, so it is no adapter")
    values = read_json(folder / CONFIG)
    strange = [] if values.get("peft_type") == "LORA" else [f"peft_type {values.get('peft_type')!r}"]
    strange += [key for key in UNKNOWN if values.get(key)]
    strange += [f"bias {values['bias']!r}"] if values.get("bias", "none") != "none" else []
    start = values.get("init_lora_weights")  # of these, some change the base when they are loaded
    strange += [f"init_lora_weights {start!r}"] if isinstance(start, str) and start not in STARTS else []
    if strange:
        raise ValueError(f"{folder / CONFIG}: {strange[0]} is something else than LoRA as it is here")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = values.setdefault(key, {}) or {}
        try:
            values[key] = {re.compile(rf"(.*\.)?({pattern})$"): value for pattern, value in patterns.items()}
        except (re.error, AttributeError) as error:
            raise ValueError(f"{folder / CONFIG}: {key} cannot be read ({error})") from None
    return values


def weights_file(folder: Path) -> Path:
    """Where A and B are. Raises ValueError if they are nowhere."""
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"{folder}: holds neither {' nor '.join(WEIGHTS)}")
    return path


def sort_tensors(tensors: dict[str, LazyTensor]) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor]]:
    """A and B by the path of their layer, and all others by name, as the base calls them."""
    pairs, whole = {}, {}
    for name, lazy in tensors.items():
        name = re.sub(r"modules_to_save\.(default\.)?", "", name.removeprefix(PEFT))
        if found := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name):
            pairs.setdefault(found[1], {})[found[2]] = lazy
        else:
            whole[name] = lazy
    return pairs, whole


def read_layer(path: Path, name: str, pair: dict[str, LazyTensor], values: dict, layout: Layout) -> dict:
    """A, B and scale of a layer of theirs; where q, k and v are one matrix there, B is cut in three, and A shared."""
    rank, alpha = of_layer(values, "r", "rank_pattern", name), of_layer(values, "lora_alpha", "alpha_pattern", name)
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{path}: {name} lacks lora_{'A' if 'B' in pair else 'B'}")
    a, b = pair["A"].read().float(), pair["B"].read().float()
    if a.ndim != 2 or b.ndim != 2 or not 0 < len(a) == b.shape[1] == rank:
        raise ValueError(f"{path}: {name} holds {list(a.shape)} and {list(b.shape)}, its rank is {rank} in {CONFIG}")
    scale = lora_scale(rank, alpha, values.get("use_rslora") is True)
    ours, _ = match(f"{name}.weight", layout)  # how the base stores its matrix (fan_in_fan_out) is no matter here
    return {target.removesuffix(".weight"): (a, part, scale) for target, part in zip(ours, b.chunk(len(ours)))}


def of_layer(values: dict, key: str, exceptions: str, name: str) -> float:
    """Rank or alpha of a layer: peft's exceptions are regular expressions for the end of its path."""
    patterns = values[exceptions]
    value = next((patterns[pattern] for pattern in patterns if pattern.match(name)), values.get(key))
    if not isinstance(value, (int, float)) or not 0 < value < 2**31:
        raise ValueError(f"{CONFIG}: {key} of {name} is {value!r}")
    return value


def read_sample(path: Path, layers: Iterable[str]) -> dict[str, list[float]]:
    """What save_adapter noted of the base of these layers; nothing, if the file is not of ours."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("base", "{}")
    try:
        noted = {name: [float(n) for n in numbers] for name, numbers in json.loads(text).items()}
        return {name: numbers for name, numbers in noted.items() if name in layers}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: what it notes of its base cannot be read") from None


# ---------------------------------------------------------------------------------------------------------------------
# onto a base


@torch.no_grad()
def attach(model: Llava, adapter: Adapter):
    """Put an adapter onto its base. Raises ValueError, the model unchanged, if it was made for another."""
    refuse_other_base(model, adapter)
    dtype, parameters = model.dtype, dict(model.named_parameters())  # by the names they have before layers are wrapped
    for path, (a, b, scale) in adapter.lora.items():
        layer = LoRALinear(model.get_submodule(path), len(a), scale)
        layer.lora_A.weight.copy_(a)
        layer.lora_B.weight.copy_(b)
        for half in (layer.lora_A, layer.lora_B):
            half.to(dtype)
        model.set_submodule(path, layer)
    for name, tensor in adapter.whole.items():
        parameters[name].copy_(tensor)
    if adapter.has_template:  # stage 2 may have settled on another one, or way to make pictures square
        model.config.template, model.config.image_mode = adapter.config.template, adapter.config.image_mode
        model.config.eos_token_ids = sorted({*model.config.eos_token_ids, *adapter.config.eos_token_ids})


def refuse_other_base(model: Llava, adapter: Adapter):
    """Raise ValueError if a layer or tensor of the adapter is not there, has another shape, or held other numbers."""
    modules, wrong = dict(model.named_modules()), []
    for path, (a, b, _) in adapter.lora.items():
        base, wanted = modules.get(path), (len(b), a.shape[1])
        if not isinstance(base, (nn.Linear, NF4Linear)) or path.endswith("lm_head"):
            wrong.append(f"{path} is not there" if base is None else f"{path} cannot have LoRA here")
        elif (base.out_features, base.in_features) != wanted:
            wrong.append(f"{path} is {base.out_features} x {base.in_features}, not {wanted[0]} x {wanted[1]}")
    parameters = dict(model.named_parameters())
    for name, tensor in adapter.whole.items():
        if name not in parameters:
            wrong.append(f"{name} is not there")
        elif parameters[name].shape != tensor.shape:
            wrong.append(f"{name} is {list(parameters[name].shape)}, not {list(tensor.shape)}")
    if wrong:
        raise ValueError(f"{adapter.folder} is for another base: {len(wrong)} parts differ: {'; '.join(wrong[:3])}")
    check_base(model, adapter)


def load_with_adapter(
    folder: Path,
    adapter: Path | None,
    device: str,
    dtype: torch.dtype | None,
    bits: int = 16,
    vision: Path | None = None,
) -> tuple[Llava, Tokenizer]:
    """A model and its tokenizer, for answering, with an adapter on it if there is one.

    Args: folder: the base, or an adapter, whose base is then where its file says; bits: 4 keeps the layers of the
    decoder in NF4; vision: CLIP's folder, for an adapter of LLaVA's authors, whose base is a decoder alone.
    """
    if adapter is None and not is_adapter(folder):
        return load_checkpoint(folder, device, dtype, bits, copy=False)
    if adapter is None:
        adapter, folder = folder, base_of_adapter(folder)
    return build_with_adapter(folder, read_adapter(adapter), device, dtype, bits, vision)


def build_with_adapter(
    folder: Path, found: Adapter, device: str, dtype: torch.dtype | None, bits: int, vision: Path | None
) -> tuple[Llava, Tokenizer]:
    """A base and its tokenizer, with an adapter that was read on it; for the arguments see load_with_adapter."""
    if is_adapter(folder):
        raise ValueError(f"{folder} is an adapter: --model is the base below {found.folder}")
    if found.sha256 in merged_into(folder):
        raise ValueError(f"{folder} has {found.folder} in its weights already")
    config, tensors = open_model(folder)
    if config.vision_config is None and found.config is not None and found.config.vision_config is not None:
        found.config.text_config, found.config.image_token_index = config.text_config, config.image_token_index
        config = found.config
        rest = open_tensors(found.folder / REST) if (found.folder / REST).exists() else {}
        tensors = tensors | {name.removeprefix(PEFT): lazy for name, lazy in rest.items()}
    tokenizer = load_tokenizer(folder, config)
    model = build(config, tensors, folder, device, dtype, vision, bits=bits, copy=False)
    attach(model, found)
    return model, tokenizer


def base_of_adapter(folder: Path) -> Path:
    """The base of an adapter, where its file says. Raises ValueError if it is not there."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or len(base) > 4000 or "\0" in base or not (Path(base) / "config.json").exists():
        raise ValueError(f"{folder}: an adapter, and its base {base!r} is no folder here: name it with --model")
    return Path(base)
