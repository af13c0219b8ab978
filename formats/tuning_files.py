"""Files of the tuning methods of variants/tuning.py: peft's, and adapter-hub's for bottlenecks.

    prompt, p-tuning     adapter_model.safetensors    prompt_embeddings (n, C)
    prefix, prefix-mlp                                prompt_embeddings (n, 2 L KV D)
    ia3                                               base_model.model.PATH.ia3_l (out, 1) or, for an input, (1, in)
    houlsby, pfeiffer    adapter.safetensors          LAYER.attention_adapters.adapters.NAME.adapter_down.0.weight, ...

An MLP is not stored, only what it makes. A projector that trained is in the file, too, whole. adapters.py reads the
tensors of a file and finds the layout of their names; this file knows what they mean.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from formats.configs import config_to_json
from formats.layouts import LLAVA_LAYOUTS, Layout, llama, match, to_layout
from inputs.files import write_json
from llava import LlavaConfig, TextConfig
from variants.tuning import ACTIVATIONS, DECODER, IA3_LAYERS, NONLINEARITY, PLACES, TRAINED, VIRTUAL, Tuning

PEFT_TYPES = {"prompt": "PROMPT_TUNING", "p-tuning": "P_TUNING", "prefix": "PREFIX_TUNING"}
PEFT_TYPES |= {"prefix-mlp": "PREFIX_TUNING", "ia3": "IA3"}
KINDS = {"PROMPT_TUNING": "prompt", "P_TUNING": "prompt", "PREFIX_TUNING": "prefix", "IA3": "ia3"}
EMBEDDINGS, TOKENS = "prompt_embeddings", f"{DECODER}.virtual"  # their name in the file, and the path in our model
HUB_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HUB_PART = r"(.+\.)(attention|output)_adapters\.adapters\.[^.]+\.adapter_(down\.0|up)\.(weight|bias)"
HUB_PLACES = {"self_attn.": "attention", "mlp.": "output", "": "output"}  # our place in a layer: adapter-hub's
# The options of adapter-hub that change the arithmetic, as houlsby and pfeiffer have them.
HUB_FIXED = {"original_ln_after": True, "residual_before_ln": True, "ln_before": False, "ln_after": False}
HUB_FIXED |= {"is_parallel": False, "use_gating": False, "phm_layer": False, "scaling": 1.0, "inv_adapter": None}

# ---------------------------------------------------------------------------------------------------------------------
# writing


def save_tuning(
    trained: dict[str, Tensor], folder: Path, config: LlavaConfig, method: str, tokens: nn.Module | None, base: Path,
    sample: dict[str, list[float]],
):  # fmt: skip
    """Write what a method trained.

    Args: trained: all trained tensors by our names; config: of the whole model; method: of variants.tuning.METHODS;
    tokens: the model's VirtualTokens, if the method has some; base: folder of the base model; sample: of its weights,
    from adapters.sample_weights.
    """
    layout = LLAVA_LAYOUTS["LLaVA, transformers 5 in memory"] if config.vision_config else llama("model.", "")
    own = {name: p for name, p in trained.items() if TRAINED.search(name)}
    rest = {name: p for name, p in trained.items() if name not in own}
    text, prefix, weights = config.text_config, "base_model.model.", "adapter_model.safetensors"
    if method in VIRTUAL:
        tensors = {EMBEDDINGS: make_embeddings(own, tokens)}
        text = replace(text, max_position_embeddings=text.max_position_embeddings + len(tensors[EMBEDDINGS]))
        values = virtual_values(method, own, tensors[EMBEDDINGS], text)
        prefix = "base_model."  # peft does not wrap the base of such a method, and loads its tensors by their own names
    elif method in PLACES:
        tensors, prefix, weights = to_layout({hub_name(name): p for name, p in own.items()}, layout), "", HUB_WEIGHTS[0]
        values = hub_values(method, own, config)
    else:
        tensors, values = ia3_files(own, layout)
        values["modules_to_save"] = sorted({name.split(".")[0] for name in rest}) or None
        tensors = {prefix + name: p for name, p in tensors.items()}
    tensors |= {prefix + name: p for name, p in to_layout(rest, layout).items()}
    write_json(folder / "adapter_config.json", values | {"base_model_name_or_path": str(base), "inference_mode": True})
    write_json(folder / "config.json", config_to_json(replace(config, text_config=text)))
    save_file(tensors, folder / weights, metadata={"base": json.dumps(sample)})


def make_embeddings(own: dict[str, Tensor], tokens: nn.Module) -> Tensor:
    """The vectors (n, d) of virtual tokens with these parameters: an MLP's output."""
    state = {name.removeprefix(f"{TOKENS}.encoder."): p for name, p in own.items()}
    start = state.pop(f"{TOKENS}.embedding")
    return torch.func.functional_call(tokens.encoder, state, start).detach().contiguous()


def virtual_values(method: str, own: dict[str, Tensor], embeddings: Tensor, text: TextConfig) -> dict:
    """adapter_config.json of a method with virtual tokens."""
    values = {"peft_type": PEFT_TYPES[method], "task_type": "CAUSAL_LM", "num_virtual_tokens": len(embeddings)}
    values |= {"num_transformer_submodules": 1, "num_layers": text.num_hidden_layers}
    heads, width = text.num_attention_heads, text.hidden_size
    if method.startswith("prefix"):
        heads, width = text.num_key_value_heads, text.num_key_value_heads * text.head_dim
        values |= {"prefix_projection": method == "prefix-mlp"}
    values |= {"token_dim": width, "num_attention_heads": heads}
    if method == "p-tuning":
        values |= {"encoder_reparameterization_type": "MLP", "encoder_num_layers": 2, "encoder_dropout": 0.0}
    if method == "prompt":
        return values | {"prompt_tuning_init": "RANDOM"}
    return values | {"encoder_hidden_size": len(own.get(f"{TOKENS}.encoder.0.weight", range(width)))}


def ia3_files(own: dict[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], dict]:
    """The factors by peft's names without their prefix, and the content of adapter_config.json."""
    tensors, inputs = {}, []
    for name, factors in own.items():
        path = name.removesuffix(".ia3_l")
        module = next(iter(to_layout({f"{path}.weight": torch.empty(0)}, layout))).removesuffix(".weight")
        on_input = IA3_LAYERS[path.split(".")[-1]]
        tensors[f"{module}.ia3_l"] = factors[None] if on_input else factors[:, None]
        inputs += [module] * on_input
    values = {"peft_type": "IA3", "task_type": None, "fan_in_fan_out": False, "init_ia3_weights": True}
    return tensors, values | {
        "target_modules": [name.removesuffix(".ia3_l") for name in tensors],
        "feedforward_modules": inputs,
    }


def hub_name(name: str) -> str:
    """adapter-hub's name of one of our bottleneck's tensors, below our path of the layer."""
    layer, place, matrix, kind = re.fullmatch(r"(.+\.\d+\.)(.*)adapter\.(down|up)\.(\w+)", name).groups()
    return f"{layer}{HUB_PLACES[place]}_adapters.adapters.tuning.adapter_{matrix}{'.0' * (matrix == 'down')}.{kind}"


def hub_values(method: str, own: dict[str, Tensor], config: LlavaConfig) -> dict:
    """adapter_config.json in the format of `adapters`, with its options for this method."""
    inner, width = config.text_config.hidden_size, next(len(p) for name, p in own.items() if name.endswith("down.bias"))
    options = HUB_FIXED | {"mh_adapter": method == "houlsby", "output_adapter": True, "dropout": 0.0, "leave_out": []}
    options |= {"original_ln_before": method == "pfeiffer", "non_linearity": NONLINEARITY[method]}
    options |= {"reduction_factor": inner / width, "init_weights": "bert", "adapter_residual_before_ln": False}
    kind = "llava" if config.vision_config else config.text_config.model_type
    values = {"config": options, "hidden_size": inner, "model_type": kind, "name": "tuning"}
    return values | {"version": "adapters.1.2.0"}


# ---------------------------------------------------------------------------------------------------------------------
# reading


def find_kind(values: dict) -> str:
    """The kind of a tuning whose adapter_config.json has these values, as in variants.tuning.Tuning; "" for others."""
    is_hub = "peft_type" not in values and isinstance(values.get("config"), dict)
    return "bottleneck" if is_hub else KINDS.get(str(values.get("peft_type")), "")


def check_values(path: Path, values: dict):
    """Raise ValueError if the options of adapter_config.json ask for something that is not computed here."""
    options, wrong = values.get("config"), []
    if find_kind(values) == "bottleneck":
        wrong = [f"{key} {options[key]!r:.99}" for key, known in HUB_FIXED.items() if options.get(key, known) != known]
        if options.get("architecture") is not None:
            wrong.append(f"architecture {options['architecture']!r:.99}")
        if options.get("non_linearity") not in ACTIVATIONS:
            wrong.append(f"non_linearity {options.get('non_linearity')!r:.99}")
    elif values.get("num_transformer_submodules") not in (None, 1):
        wrong.append(f"num_transformer_submodules {values['num_transformer_submodules']!r:.99}")
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is not supported")


def take_parts(path: Path, values: dict, whole: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Move a tuning's tensors out of `whole`: by their path in the file, then by our name of the parameter.

    Args: path: of the file; values: of adapter_config.json; whole: tensors by name. Raises ValueError.
    """
    kind, parts = find_kind(values), {}
    pfeiffer = kind == "bottleneck" and values["config"].get("original_ln_before") is True
    for name in list(whole) if kind else ():
        if name == EMBEDDINGS and kind in ("prompt", "prefix"):
            place, leaf = "", "embedding"
        elif name.endswith(".ia3_l") and kind == "ia3":
            place, leaf = name.removesuffix(".ia3_l"), "ia3_l"
        elif kind == "bottleneck" and (found := re.fullmatch(HUB_PART, name)):
            layer, side, matrix, end = found.groups()
            inner = {"attention": "self_attn", "output": "" if pfeiffer else "mlp"}[side]
            if pfeiffer and side == "attention":
                raise ValueError(f"{path}: {name}: with original_ln_before, only adapters after the MLP are supported")
            place, leaf = f"{layer}{inner}".rstrip("."), f"{matrix.removesuffix('.0')}.{end}"
        else:
            continue
        if leaf in parts.setdefault(place, {}):
            raise ValueError(f"{path}: {name} given twice")
        parts[place][leaf] = whole.pop(name)
    check_parts(path, values, kind, parts)
    return parts


def check_parts(path: Path, values: dict, kind: str, parts: dict[str, dict[str, Tensor]]):
    """Raise ValueError if a tuning lacks tensors, or has some of a wrong shape."""
    if kind and not parts:
        raise ValueError(f"{path}: holds no tensors of {values.get('peft_type', 'a bottleneck')}")
    for place, tensors in parts.items():
        if kind == "bottleneck" and len(tensors) < 4:
            raise ValueError(f"{path}: of the adapter of {place} there is only {', '.join(tensors)}")
        if kind == "ia3" and (tensors["ia3_l"].ndim != 2 or 1 not in tensors["ia3_l"].shape):
            raise ValueError(f"{path}: {place}.ia3_l is {list(tensors['ia3_l'].shape)}, should be one row or column")
        count = values.get("num_virtual_tokens")
        if kind in ("prompt", "prefix") and (tensors["embedding"].ndim != 2 or len(tensors["embedding"]) != count):
            shape = list(tensors["embedding"].shape)
            raise ValueError(f"{path}: {EMBEDDINGS} is {shape}, and adapter_config.json has {count!r:.99} tokens")


def name_parts(values: dict, parts: dict[str, dict[str, Tensor]], layout: Layout) -> Tuning | None:
    """The tuning, under our paths; None if there are no parts. A fused q, k and v is divided into three."""
    if not parts:
        return None
    kind, named = find_kind(values), {}
    if kind in ("prompt", "prefix"):
        return Tuning(kind, {TOKENS: parts[""]})
    for place, tensors in parts.items():
        ours, _ = match(f"{place}.weight", layout)
        for i, target in enumerate(target.removesuffix(".weight") for target in ours):
            named[target] = {
                leaf: p if len(p) == 1 or kind == "bottleneck" else p.chunk(len(ours))[i] for leaf, p in tensors.items()
            }
    return Tuning(kind, named, values["config"]["non_linearity"] if kind == "bottleneck" else "relu")
