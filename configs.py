"""config.json in every dialect: transformers 4 and 5, LLaVA's authors, CLIP; and the files written for transformers.

A checkpoint says everything about itself: shapes, template, how pictures are made square, which ids end an answer.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

from clip import MEAN, STD, CLIPVisionConfig, known
from files import read_json, write_json
from llava import LlavaConfig, TextConfig

# What transformers' config classes fill in when a config.json leaves a field out.
DEFAULTS = {
    "llama": {},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
    "qwen2": {"vocab_size": 151_936, "intermediate_size": 22016, "max_position_embeddings": 32768},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
}
GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}


def read_text_config(values: dict) -> TextConfig:
    """The decoder part of a config.json, of transformers 4 or 5. Raises ValueError on what is not built."""
    kind = values.get("model_type", "llama")
    if kind not in DEFAULTS:
        raise ValueError(f"config.json: decoder {kind!r} is none of {', '.join(DEFAULTS)}")
    values = DEFAULTS[kind] | {key: value for key, value in values.items() if value is not None}
    if kind == "gpt2":
        values = {"rms_norm_eps": 1e-5} | {GPT2_NAMES.get(key, key): value for key, value in values.items()}
        values.setdefault("intermediate_size", 4 * values["hidden_size"])
        values |= {"attention_bias": True, "tie_word_embeddings": True}
    expected = "gelu_new" if kind == "gpt2" else "silu"
    if values.get("hidden_act", expected) != expected:
        raise ValueError(f"config.json: the activation is {values['hidden_act']}, not {expected}")
    if kind != "gpt2":
        values |= rope_of(values)
    if values.get("sliding_window") and values.get("use_sliding_window", kind == "mistral"):
        # Within its window such a model is exactly this one; beyond it is never asked.
        context = values.get("max_position_embeddings", TextConfig.max_position_embeddings)
        values["max_position_embeddings"] = min(context, values["sliding_window"])
    return TextConfig(**known(TextConfig, values | {"qkv_bias": kind == "qwen2", "model_type": kind}))


def rope_of(values: dict) -> dict:
    """rope_theta and rope_scaling, wherever this version of transformers wrote them."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"config.json: RoPE scaling {kind!r} is not built; long texts would be answered wrongly")
    theta = values.get("rope_theta") or rope.get("rope_theta") or TextConfig.rope_theta
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope | {"rope_type": kind}}


def read_config(folder: Path) -> LlavaConfig:
    """A folder's whole description: ours, transformers' or the LLaVA authors'. Raises ValueError, in one line."""
    values = read_json(folder / "config.json")
    try:
        if "mm_vision_tower" in values:
            config = read_original_config(values)
        elif "vision_config" in values or "text_config" in values:
            config = read_llava_config(values, folder)
        else:
            text = read_text_config(values)
            guesses = {"template": template_of(folder, "raw"), "image_token_index": text.vocab_size}
            config = LlavaConfig(text, **guesses | known(LlavaConfig, values))
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{folder / 'config.json'}: not a model's description ({error!r})") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if "eos_token_ids" not in values:
        config.eos_token_ids = end_tokens(folder, values)
    return config


def read_llava_config(values: dict, folder: Path) -> LlavaConfig:
    """A config.json of transformers' LlavaConfig or LlavaNextConfig, or of ours, which only adds keys to them.

    What it leaves open is read from the files beside it: the template from the chat template, the image mode from the
    preprocessor's. Raises ValueError on what is not built. Source: facts of the llava-hf repositories, and defaults of
    transformers' LlavaConfig (a CLIP-L/14-336 where there is no vision_config).
    """
    if "text_config" not in values:
        raise ValueError("config.json: a vision_config without a text_config")
    kind = values.get("model_type", "llava")
    if kind not in ("llava", "llava_next"):
        raise ValueError(f"config.json: model_type {kind!r} is neither llava nor llava_next")
    if values.get("vision_feature_select_strategy", "default") != "default":
        raise ValueError("config.json: vision_feature_select_strategy must be 'default' (class token dropped)")
    if not isinstance(values.get("vision_feature_layer", -2), int):
        raise ValueError("config.json: features of several layers are not built")
    if values.get("projector_hidden_act", "gelu") != "gelu":
        raise ValueError(f"config.json: the projector's activation is {values['projector_hidden_act']}, not gelu")
    vision = CLIPVisionConfig(**known(CLIPVisionConfig, values.get("vision_config") or CLIP_L))
    text = read_text_config(values["text_config"])
    guesses = {"template": template_of(folder, "llava_hf"), "image_token_index": values.get("image_token_id")}
    guesses["image_mode"] = "anyres" if kind == "llava_next" else image_mode_of(folder)
    if kind == "llava_next":
        guesses["image_grid_pinpoints"] = PINPOINTS
    if "pad_token_id" not in values:
        guesses["pad_token_id"] = values["text_config"].get("pad_token_id")
    config = LlavaConfig(**known(LlavaConfig, guesses | values) | {"text_config": text, "vision_config": vision})
    check_pinpoints(config)
    return config


PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # of LLaVA-1.6, (height, width)


def check_pinpoints(config: LlavaConfig):
    """Canvases must be made of whole tiles, or no tile has a place. Raises ValueError."""
    side = config.vision_config.image_size
    for canvas in config.image_grid_pinpoints or []:
        if len(canvas) != 2 or any(not isinstance(n, int) or n < 1 or n % side for n in canvas):
            raise ValueError(f"config.json: image_grid_pinpoints {canvas} is not made of tiles of {side} pixels")


MARKS = {  # what only one template writes; the first that is found decides
    "<|start_header_id|>": "llava_llama_3",
    "<<SYS>>": "llava_llama_2",
    "[INST]": "mistral_instruct",
    "curious user": "vicuna_v1",
    "curious human": "llava_v1",
    "ASSISTANT:": "llava_hf",
}


def template_of(folder: Path, fallback: str) -> str:
    """Our name of the chat template in a folder, told by its marks; `fallback` if it has none that we know."""
    text = ""
    for name in ("tokenizer_config.json", "chat_template.json", "chat_template.jinja"):
        if (folder / name).exists():
            content = (folder / name).read_text(encoding="utf-8", errors="replace")
            text += content if name.endswith("jinja") else str(read_json(folder / name).get("chat_template") or "")
    if "<|im_start|>" in text:  # two dialects: with a line break after every message, or without
        return "qwen_1_5" if re.search(r"<\|im_end\|>['\" +]*(\\n|\n)", text) else "chatml"
    return next((template for mark, template in MARKS.items() if mark in text), fallback)


def image_mode_of(folder: Path) -> str:
    """How the folder's own preprocessing makes a picture square: llava-hf cuts out the centre unless told to pad."""
    path = folder / "preprocessor_config.json"
    return "pad" if path.exists() and read_json(path).get("do_pad") else "square"


CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L |= {"patch_size": 14, "image_size": 336, "projection_dim": 768}
TOWERS = {"clip-vit-large-patch14-336": CLIP_L, "clip-vit-large-patch14": CLIP_L | {"image_size": 224}}


def read_original_config(values: dict) -> LlavaConfig:
    """A config.json of the LLaVA authors' code: a LLaMA config with the picture's part in mm_* keys."""
    name = str(values["mm_vision_tower"]).rstrip("/").split("/")[-1]
    if name not in TOWERS:
        raise ValueError(
            f"config.json: the shape of the vision tower {name!r} is not known, only of {', '.join(TOWERS)}"
        )
    if values.get("mm_use_im_start_end"):
        raise ValueError("config.json: mm_use_im_start_end is not built")
    if values.get("mm_vision_select_feature", "patch") != "patch":
        raise ValueError("config.json: mm_vision_select_feature must be 'patch' (class token dropped)")
    family = {"llava_mistral": "mistral", "llava_qwen": "qwen2"}.get(values.get("model_type"), "llama")
    text = read_text_config(values | {"model_type": family})
    ratio, pinpoints = values.get("image_aspect_ratio"), None
    if ratio == "anyres":
        if "unpad" not in values.get("mm_patch_merge_type", "flat"):
            raise ValueError("config.json: anyres is built with mm_patch_merge_type spatial_unpad only")
        pinpoints = values["image_grid_pinpoints"]
        if isinstance(pinpoints, str):
            pinpoints = json.loads(pinpoints.replace("(", "[").replace(")", "]"))
        pinpoints = [[height, width] for width, height in pinpoints]  # theirs are (width, height)
    elif ratio not in (None, "square", "pad"):
        raise ValueError(f"config.json: image_aspect_ratio {ratio!r} is not built")
    config = LlavaConfig(
        text,
        CLIPVisionConfig(**TOWERS[name]),
        image_token_index=text.vocab_size,  # the authors' code has none; ours never reads its embedding
        vision_feature_layer=values.get("mm_vision_select_layer", -2),
        projector_type=values.get("mm_projector_type", "linear"),
        template="mistral_instruct" if family == "mistral" else "vicuna_v1",
        image_mode=ratio or "square",
        image_grid_pinpoints=pinpoints,
        pad_token_id=0,
    )
    check_pinpoints(config)
    return config


def end_tokens(folder: Path, values: dict) -> list[int]:
    """The ids that end an answer: generation_config.json's word counts before config.json's."""
    generation = folder / "generation_config.json"
    for source in (read_json(generation) if generation.exists() else {}, values, values.get("text_config", {})):
        if (ids := source.get("eos_token_id")) is not None:
            return ids if isinstance(ids, list) else [ids]
    return [2]


def read_vision_config(folder: Path) -> CLIPVisionConfig:
    """The vision part of a CLIP's config.json; a config of the vision tower alone is that part."""
    values = read_json(folder / "config.json")
    values = values.get("vision_config", values if values.get("model_type") == "clip_vision_model" else {})
    try:
        return CLIPVisionConfig(**known(CLIPVisionConfig, values))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'}: not a CLIP's description ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# writing


ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
ARCHITECTURES["gpt2"] = "GPT2LMHeadModel"


def config_to_json(config: LlavaConfig) -> dict:
    """A config.json: what transformers needs to load the folder, then our own keys."""
    values = asdict(config)
    text = values["text_config"] | {"eos_token_id": config.eos_token_ids, "pad_token_id": config.pad_token_id}
    if config.text_config.gpt2:
        text |= {theirs: text[ours] for theirs, ours in GPT2_NAMES.items() if ours in text}
    if config.vision_config is None:
        ours = {key: values[key] for key in ("template", "image_token_index", "eos_token_ids", "pad_token_id")}
        return {"architectures": [ARCHITECTURES[config.text_config.model_type]]} | text | ours
    tiled = config.image_grid_pinpoints is not None
    return values | {
        "architectures": [f"Llava{'Next' if tiled else ''}ForConditionalGeneration"],
        "model_type": "llava_next" if tiled else "llava",
        "text_config": text,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "image_seq_length": config.vision_config.num_patches,
        "tie_word_embeddings": config.text_config.tie_word_embeddings,
    }


IMAGE_PROCESSORS = {"square": "CLIPImageProcessor", "pad": "LlavaImageProcessor", "anyres": "LlavaNextImageProcessor"}


def write_processor(config: LlavaConfig, folder: Path):
    """What transformers' AutoProcessor wants to know: our preprocessing and the placeholders, in its words."""
    side = config.vision_config.image_size
    image = {
        "image_processor_type": IMAGE_PROCESSORS[config.image_mode],
        "do_convert_rgb": True,
        "do_pad": config.image_mode == "pad",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(f"{value:.8f}") for value in MEAN],
        "image_std": [float(f"{value:.8f}") for value in STD],
    }
    processor = "LlavaProcessor"
    if config.image_grid_pinpoints:
        processor, image["image_grid_pinpoints"] = "LlavaNextProcessor", config.image_grid_pinpoints
    words = {"processor_class": processor, "image_token": "<image>", "patch_size": config.vision_config.patch_size}
    words |= {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    write_json(folder / "preprocessor_config.json", image | {"processor_class": processor})
    write_json(folder / "processor_config.json", words)
