"""Read and write config.json in every dialect: transformers 4 and 5, LLaVA's authors, CLIP.

Sources of fields and defaults: transformers' config classes, the published files of llava-hf and of LLaVA's authors.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

from clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from formats.chat_templates import guess_template
from formats.gguf import config_values
from formats.processors import IMAGE_PROCESSORS, read_image_mode
from inputs.files import read_json, read_optional_json
from inputs.gguf_files import find_gguf
from inputs.templates import TEMPLATES
from llava import PROJECTORS, LlavaConfig, TextConfig
from variants.connectors import CONNECTORS, check_tokens
from variants.relevance import check_relevance


def read_config(folder: Path, vision: Path | None = None) -> LlavaConfig:
    """Read the config of a checkpoint of ours, of transformers or of LLaVA's authors. Raises ValueError.

    Args: vision: CLIP's folder, which gives the shape of a tower that config.json only names, by an unknown name.
    """
    with open_config(folder) as values:
        for part in (values, values.get("text_config", {})):
            quantization = part.get("quantization_config") or part.get("compression_config") or {}
            method = quantization.get("quant_method", "bitsandbytes")  # its kinds are told apart by their tensors
            require(method == "bitsandbytes", f"the weights are quantized with {method!r:.99}; {ONLY_NF4}")
            if part.get("pad_token_id") == -1:  # LLaMA-1 writes -1 for "none"
                del part["pad_token_id"]
        if "mm_vision_tower" in values:
            config = read_authors_config(values, folder, vision)
        elif "vision_config" in values or "text_config" in values:
            config = read_llava_config(values, folder)
        else:
            text = read_text_config(values)
            defaults = {"template": guess_template(folder, "raw"), "image_token_index": text.vocab_size}
            config = LlavaConfig(text, **defaults | known_fields(LlavaConfig, values))
        if "eos_token_ids" not in values:
            config.eos_token_ids = read_eos_ids(folder, values, config.text_config.model_type)
        check_config(config)
    return config


@contextmanager
def open_config(folder: Path) -> Iterator[dict]:
    """The content of config.json, or what a GGUF file says instead; in this context, every error is a ValueError that
    names the file."""
    gguf = find_gguf(folder)
    source = gguf or folder / "config.json"
    if not gguf and not source.is_file():
        raise ValueError(f"{source}: no such file; a model's folder has it, weights and a tokenizer")
    values = None if gguf else read_json(source)
    try:
        yield config_values(gguf) if gguf else values
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{source}: not the configuration of a model ({error!r})") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {str(error).removeprefix('config.json: ') if gguf else error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# checks: a model is built only from values that cannot fill the memory

ONLY_NF4 = "of quantized weights, only bitsandbytes' NF4 is read: take the checkpoint in 16 bits"
LIMITS = {  # type, smallest and largest value of fields
    (int, 1, 1000): ["num_hidden_layers"],  # every layer is a Python object
    (int, 1, 1 << 14): ["num_attention_heads", "num_key_value_heads", "head_dim", "image_size", "patch_size"],
    (int, 1, 1 << 24): ["vocab_size", "hidden_size", "intermediate_size", "projection_dim", "max_position_embeddings"],
    (int, 1, 1 << 23): ["visual_tokens"],
    (int, 0, 1 << 24): ["image_token_index", "pad_token_id"],
    (int, -1001, 1000): ["vision_feature_layer"],
    (float, 0, 1): ["rms_norm_eps", "layer_norm_eps"],
    (float, 1, 1e15): ["rope_theta"],
    (bool, False, True): ["tie_word_embeddings", "attention_bias", "lora_images_only", "whitening"],
}


def require(condition: bool, message: str):
    if not condition:
        raise ValueError(f"config.json: {message}")


def require_choice(field: str, value: object, choices: Iterable[str]):
    require(value in tuple(choices), f"{field} {value!r:.99} is none of {', '.join(choices)}")


def known_fields(cls: type, values: dict) -> dict:
    """The entries of a config.json that are not null and are fields of the dataclass `cls`. Checks their LIMITS."""
    names = {f.name for f in fields(cls)}
    result = {key: value for key, value in values.items() if key in names and value is not None}
    for (kind, least, most), limited in LIMITS.items():
        for key in result.keys() & limited:
            value = result[key]
            fits = (type(value) is kind or (kind is float and type(value) is int)) and least <= value <= most
            require(fits, f"{key} is {value!r:.99}, not {kind.__name__} from {least} to {most}")
    return result


def check_supported(values: dict, supported: dict):
    """Raise ValueError if a value differs from the only supported one; a missing key and null are fine."""
    for key, only in supported.items():
        require(values.get(key) in (None, only), f"{key} is {values.get(key)!r:.99}, and only {only!r} is supported")


# ---------------------------------------------------------------------------------------------------------------------
# the decoder

DEFAULTS = {  # transformers' defaults of missing fields, where they differ from those of our TextConfig
    "llama": {"eos_token_id": 2},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
    | {"sliding_window": 4096, "eos_token_id": 2},
    "qwen2": {"vocab_size": 151_936, "intermediate_size": 22016, "max_position_embeddings": 32768}
    | {"sliding_window": 4096},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    | {"eos_token_id": 50256},
}
SUPPORTED = {  # keys that change the arithmetic of a model, and the only value of each that this code implements
    "llama": {"hidden_act": "silu", "mlp_bias": False},
    "mistral": {"hidden_act": "silu"},
    "qwen2": {"hidden_act": "silu"},
    "gpt2": {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    | {"add_cross_attention": False, "tie_word_embeddings": True},
    "llava": {"vision_feature_select_strategy": "default"}  # "default" drops the class token
    | {"projector_hidden_act": "gelu", "multimodal_projector_bias": True},
    "authors": {"mm_use_im_start_end": False, "mm_vision_select_feature": "patch"},
}
GPT2_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
GPT2_NAMES |= {"n_positions": "max_position_embeddings", "n_inner": "intermediate_size"}
GPT2_NAMES |= {"layer_norm_epsilon": "rms_norm_eps"}
ROPE_KEYS = {"default": (), "linear": ("factor",)}  # RoPE type -> the numbers that it needs
ROPE_KEYS["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_text_config(values: dict) -> TextConfig:
    """Read the decoder's part of a config.json. Raises ValueError if it needs something that is not supported."""
    kind = values.get("model_type", "llama")
    require_choice("decoder", kind, DEFAULTS)
    # sliding_window: null means that there is no window; a missing key means the default window.
    given = {key: value for key, value in values.items() if value is not None or key == "sliding_window"}
    values = DEFAULTS[kind] | given
    check_supported(values, SUPPORTED[kind])
    if kind == "gpt2":
        values = {"rms_norm_eps": 1e-5} | {GPT2_NAMES.get(key, key): value for key, value in values.items()}
        values.setdefault("intermediate_size", 4 * values["hidden_size"])
        values |= {"attention_bias": True, "tie_word_embeddings": True}
    else:
        values |= read_rope(values)
        values |= {} if kind == "llama" else {"attention_bias": False}  # only LLaMA's class reads this key
    windowed = kind == "mistral" or (kind == "qwen2" and values.get("use_sliding_window"))
    if windowed and values["sliding_window"] is not None:
        # Sliding-window attention equals full attention up to the window's length, so the context ends there.
        context = values.get("max_position_embeddings", TextConfig.max_position_embeddings)
        values["max_position_embeddings"] = min(context, values["sliding_window"])
    return TextConfig(**known_fields(TextConfig, values | {"qkv_bias": kind == "qwen2", "model_type": kind}))


def read_rope(values: dict) -> dict:
    """Read rope_theta and rope_scaling, which transformers 4 and 5 write in different places."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require_choice("RoPE scaling", kind, ROPE_KEYS)  # with another one, long texts would get wrong answers
    for key in ROPE_KEYS[kind]:
        is_valid = type(rope.get(key)) in (int, float) and 0 < rope[key] < 1e15
        require(is_valid, f"{key} of the RoPE scaling {kind!r} is {rope.get(key)!r:.99}")
    in_order = kind != "llama3" or rope["low_freq_factor"] < rope["high_freq_factor"]
    require(in_order, "low_freq_factor of the RoPE scaling is not below high_freq_factor")
    theta = rope.get("rope_theta", values.get("rope_theta", TextConfig.rope_theta))  # in transformers 5's order
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope | {"rope_type": kind}}


def read_eos_ids(folder: Path, values: dict, kind: str) -> list[int]:
    """Read the ids that end an answer; generation_config.json takes precedence over config.json."""
    generation = folder / "generation_config.json"
    files = (read_optional_json(generation), values, values.get("text_config", {}))
    ids = next((v["eos_token_id"] for v in (*files, DEFAULTS[kind]) if v.get("eos_token_id") is not None), [])
    return ids if isinstance(ids, list) else [ids]


# ---------------------------------------------------------------------------------------------------------------------
# CLIP and LLaVA

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L |= {"patch_size": 14, "image_size": 336, "projection_dim": 768}
TOWERS = {"clip-vit-large-patch14-336": CLIP_L, "clip-vit-large-patch14": CLIP_L | {"image_size": 224}}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # of LLaVA-1.6, (height, width)
WITH_CONNECTOR = "llava_with_connector"  # our model_type, so that transformers refuses what it cannot compute
# model_type of LLaVA's authors -> the decoder's, and the template of such models
FAMILIES = {"llava": ("llama", "vicuna_v1"), "llava_llama": ("llama", "vicuna_v1")}
FAMILIES |= {"llava_mistral": ("mistral", "mistral_instruct"), "llava_qwen": ("qwen2", "qwen_1_5")}


def clip_config_from_dict(values: dict) -> CLIPConfig:
    """The CLIPConfig of the values in a config.json. Raises ValueError on a value out of range."""
    values = known_fields(CLIPConfig, values)
    values["vision_config"] = CLIPVisionConfig(**known_fields(CLIPVisionConfig, values.get("vision_config", {})))
    check_supported(values.get("text_config", {}), {"hidden_act": "quick_gelu"})
    values["text_config"] = CLIPTextConfig(**known_fields(CLIPTextConfig, values.get("text_config", {})))
    return CLIPConfig(**values)


def read_vision_config(folder: Path) -> CLIPVisionConfig:
    """Read the vision tower's config from the folder of a CLIP or of a vision tower. Raises ValueError."""
    with open_config(folder) as values:
        values = values.get("vision_config", values if values.get("model_type") == "clip_vision_model" else {})
        config = CLIPVisionConfig(**known_fields(CLIPVisionConfig, values))
        read_image_mode(folder, config.image_size)  # refuses other preprocessing than CLIP's
        return config


def read_llava_config(values: dict, folder: Path) -> LlavaConfig:
    """Read a config.json of transformers' LlavaConfig or LlavaNextConfig, or ours, which adds keys to theirs.

    Missing fields come from the files beside it: the template from the chat template, the image mode from the
    preprocessor's file. Without a vision_config the tower is CLIP-L/14-336, as in transformers.
    """
    require("text_config" in values, "a vision_config without a text_config")
    kind = values.get("model_type", "llava")
    require_choice("model_type", kind, ("llava", "llava_next", WITH_CONNECTOR))
    check_supported(values, SUPPORTED["llava"])
    image_ids = {values[key] for key in ("image_token_index", "image_token_id") if values.get(key) is not None}
    require(len(image_ids) < 2, "image_token_index and image_token_id differ")
    tower = CLIP_L if values.get("vision_config") is None else values["vision_config"]
    vision = CLIPVisionConfig(**known_fields(CLIPVisionConfig, tower))
    tied = {"tie_word_embeddings": True} if values.get("tie_word_embeddings") else {}  # either place may say it
    text = values["text_config"] | tied
    defaults = {"template": guess_template(folder, "llava_hf"), "pad_token_id": text.get("pad_token_id")}
    defaults["image_token_index"] = values.get("image_token_id")
    defaults["image_mode"] = read_image_mode(folder, vision.image_size)
    described = "image_mode" in values or any(folder.glob("*processor_config.json"))
    if kind == "llava" and not described:
        print(f"{folder}: no preprocessor_config.json: images are cut to squares, as llava-hf does", file=sys.stderr)
    if kind == "llava_next":
        defaults |= {"image_mode": "anyres", "image_grid_pinpoints": PINPOINTS}
    given = known_fields(LlavaConfig, defaults) | known_fields(LlavaConfig, values)
    return LlavaConfig(**given | {"text_config": read_text_config(text), "vision_config": vision})


def read_authors_config(values: dict, folder: Path, vision: Path | None) -> LlavaConfig:
    """Read a config.json of the LLaVA authors' code: a decoder's config in which mm_* keys describe the vision part."""
    path = str(values["mm_vision_tower"]).rstrip("/")  # a name, or a path on the machine that trained the model
    if vision is not None and path.split("/")[-1] not in TOWERS:
        tower = read_vision_config(vision)
    else:
        name = re.sub(r".*models--[^/]+--([^/]+)/snapshots/[^/]+$", r"\1", path).split("/")[-1]  # in the hub's cache
        known = f"none of {', '.join(TOWERS)}: give its folder to `python -m formats convert` with --vision"
        require(name in TOWERS, f"the shape of the vision tower {path!r:.199} is not known, it is {known}")
        tower = CLIPVisionConfig(**TOWERS[name])
    check_supported(values, SUPPORTED["authors"])
    kind = values.get("model_type", "llava")
    require_choice("model_type", kind, FAMILIES)
    family, template = FAMILIES[kind]
    text = read_text_config(values | {"model_type": family})
    mode = values.get("image_aspect_ratio") or "square"
    require_choice("image_aspect_ratio", mode, IMAGE_PROCESSORS)
    canvases = None
    if mode == "anyres":
        unpads = "unpad" in values.get("mm_patch_merge_type", "flat")
        require(unpads, "anyres is supported with mm_patch_merge_type spatial_unpad only")
        # Lists of (width, height), in some files as text.
        sizes = json.loads(str(values["image_grid_pinpoints"]).replace("(", "[").replace(")", "]"))
        canvases = [[height, width] for width, height in sizes]
    given = {
        "image_token_index": text.vocab_size,  # their code has no image token; ours never reads its embedding
        "vision_feature_layer": values.get("mm_vision_select_layer"),
        "projector_type": values.get("mm_projector_type", "linear"),
        "template": guess_template(folder, template),
        "image_mode": mode,
        "image_grid_pinpoints": canvases,
    }
    return LlavaConfig(text, tower, **known_fields(LlavaConfig, given))


def check_config(config: LlavaConfig):
    """Raise ValueError on the first field that is invalid or does not fit the others."""
    text, vision = config.text_config, config.vision_config
    if not str(config.template).startswith("unknown ("):  # from guess_template
        require_choice("template", config.template, TEMPLATES)
    for name in ("eos_token_ids", "answer_start_ids"):
        ids = getattr(config, name)
        is_list = type(ids) is list and all(type(i) is int and i >= 0 for i in ids)
        require(is_list, f"{name} {ids!r:.99} is not a list of ids")
    require(config.pad_token_id < text.vocab_size, f"pad_token_id {config.pad_token_id} is beyond the vocabulary")
    if vision is None:
        return
    layer, layers, side = config.vision_feature_layer, vision.num_hidden_layers, vision.image_size
    index, mode, canvases = config.image_token_index, config.image_mode, config.image_grid_pinpoints
    require(-layers - 1 <= layer <= layers, f"vision_feature_layer is {layer}, but the tower has {layers} layers")
    # An index equal to vocab_size is a token that is yet to be added.
    require(index <= text.vocab_size, f"image_token_index {index} is beyond the vocabulary")
    require_choice("projector_type", config.projector_type, [*PROJECTORS, *CONNECTORS])
    try:
        check_tokens(config.projector_type, config.visual_tokens, vision.num_patches)
        if config.relevance_bounds is not None:
            check_relevance(config)
    except ValueError as error:
        require(False, str(error))
    whitens = f"whitening is a layer before a connector, and {config.projector_type} is none"
    require(not config.whitening or config.projector_type in CONNECTORS, whitens)
    require_choice("image_mode", mode, IMAGE_PROCESSORS)
    tiled = canvases is not None
    require(not tiled or config.projector_type in PROJECTORS, f"{config.projector_type} does not go with anyres")
    require(tiled == (mode == "anyres"), f"image_mode is {mode}, but image_grid_pinpoints is {canvases!r:.99}")
    require(len(canvases or []) <= 100, "image_grid_pinpoints has more than 100 sizes")
    for canvas in canvases or []:
        is_tiled = len(canvas) == 2 and all(isinstance(n, int) and n >= 1 and n % side == 0 for n in canvas)
        require(is_tiled, f"image_grid_pinpoints {canvas} is not made of tiles of {side} pixels")
        require(math.prod(canvas) <= 64 * side**2, f"image_grid_pinpoints {canvas} has more than 64 tiles")


# ---------------------------------------------------------------------------------------------------------------------
# writing

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
ARCHITECTURES["gpt2"] = "GPT2LMHeadModel"


def config_to_json(config: LlavaConfig) -> dict:
    """The content of config.json: the keys that transformers needs, and our own."""
    values = asdict(config)
    text = values["text_config"] | {"eos_token_id": config.eos_token_ids, "pad_token_id": config.pad_token_id}
    if config.text_config.model_type == "mistral":
        text["sliding_window"] = None  # max_position_embeddings is within the window; a missing key would mean 4096
    if config.text_config.gpt2:
        text |= {theirs: text[ours] for theirs, ours in GPT2_NAMES.items() if ours in text}
    if config.vision_config is None:
        ours = {key: values[key] for key in ("template", "image_token_index", "eos_token_ids", "pad_token_id")}
        return {"architectures": [ARCHITECTURES[config.text_config.model_type]]} | text | ours
    tiled = config.image_grid_pinpoints is not None
    ours = config.projector_type in CONNECTORS or config.relevance_bounds
    kind = "llava_next" if tiled else WITH_CONNECTOR if ours else "llava"
    for name in ("lora_images_only", "whitening", "relevance_bounds"):
        if not values[name]:
            del values[name]
    if config.projector_type in PROJECTORS:
        del values["visual_tokens"]  # a budget of this run only, see variants/token_budget.py
    if config.projector_type != "qformer_text":
        del values["answer_start_ids"]
    return values | {
        "architectures": [f"Llava{'Next' if tiled else ''}ForConditionalGeneration"],
        "model_type": kind,
        "text_config": text,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "image_seq_length": replace(config, visual_tokens=values.get("visual_tokens")).tokens_per_image,
        "tie_word_embeddings": config.text_config.tie_word_embeddings,
    }
