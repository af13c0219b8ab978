"""config.json in every dialect: transformers 4 and 5, LLaVA's authors, CLIP; and the files written for transformers.

A checkpoint says everything about itself: shapes, template, how pictures are made square, which ids end an answer.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np

from clip import MEAN, STD, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from formats.schema import known, refuse_unbuilt
from inputs.files import read_json, write_json
from inputs.templates import TEMPLATES
from llava import PROJECTORS, LlavaConfig, TextConfig

# What transformers' config classes fill in when a config.json leaves a field out.
DEFAULTS = {
    "llama": {},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
    "qwen2": {"vocab_size": 151_936, "intermediate_size": 22016, "max_position_embeddings": 32768},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
}
DEFAULTS["mistral"]["sliding_window"] = DEFAULTS["qwen2"]["sliding_window"] = 4096
BUILT = {  # keys that change what a model computes, and the one value of each that is built
    "llama": {"hidden_act": "silu", "mlp_bias": False},
    "mistral": {"hidden_act": "silu"},
    "qwen2": {"hidden_act": "silu"},
    "gpt2": {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    | {"add_cross_attention": False, "tie_word_embeddings": True},
    "llava": {"vision_feature_select_strategy": "default"}  # the class token dropped
    | {"projector_hidden_act": "gelu", "multimodal_projector_bias": True},
    "authors'": {"mm_use_im_start_end": False, "mm_vision_select_feature": "patch"},
}
GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
}


def read_text_config(values: dict) -> TextConfig:
    """The decoder part of a config.json, of transformers 4 or 5. Raises ValueError on what is not built."""
    kind = values.get("model_type", "llama")
    if kind not in DEFAULTS:
        raise ValueError(f"config.json: decoder {kind!r} is none of {', '.join(DEFAULTS)}")
    given = {key: value for key, value in values.items() if value is not None or key == "sliding_window"}
    values = DEFAULTS[kind] | given  # a window of null is none, one that is left out is the default
    refuse_unbuilt(values, BUILT[kind])
    if kind == "gpt2":
        values = {"rms_norm_eps": 1e-5} | {GPT2_NAMES.get(key, key): value for key, value in values.items()}
        values.setdefault("intermediate_size", 4 * values["hidden_size"])
        values |= {"attention_bias": True, "tie_word_embeddings": True}
    else:
        values |= rope_of(values) | ({} if kind == "llama" else {"attention_bias": False})  # only LLaMA reads the key
    windowed = kind == "mistral" or (kind == "qwen2" and values.get("use_sliding_window"))
    if windowed and values["sliding_window"] is not None:
        # Within its window such a model is exactly this one; beyond it is never asked.
        context = values.get("max_position_embeddings", TextConfig.max_position_embeddings)
        values["max_position_embeddings"] = min(context, values["sliding_window"])
    return TextConfig(**known(TextConfig, values | {"qkv_bias": kind == "qwen2", "model_type": kind}))


ROPE_KEYS = {"default": (), "linear": ("factor",)}  # the kinds of RoPE that are built, and what each needs
ROPE_KEYS["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_of(values: dict) -> dict:
    """rope_theta and rope_scaling, wherever this version of transformers wrote them."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KEYS:
        raise ValueError(f"config.json: RoPE scaling {kind!r} is not built; long texts would be answered wrongly")
    for key in ROPE_KEYS[kind]:
        if type(rope.get(key)) not in (int, float) or not 0 < rope[key] < 1e15:
            raise ValueError(f"config.json: {key} of the RoPE scaling {kind!r} is {rope.get(key)!r:.99}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError("config.json: low_freq_factor of the RoPE scaling is not below high_freq_factor")
    theta = rope.get("rope_theta", values.get("rope_theta", TextConfig.rope_theta))  # this order is transformers 5's
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope | {"rope_type": kind}}


def read_config(folder: Path) -> LlavaConfig:
    """A folder's whole description: ours, transformers' or the LLaVA authors'. Raises ValueError, in one line."""
    values = read_json(folder / "config.json")
    if values.get("pad_token_id") == -1:  # how LLaMA-1 says that it has none
        del values["pad_token_id"]
    try:
        if "mm_vision_tower" in values:
            config = read_original_config(values, folder)
        elif "vision_config" in values or "text_config" in values:
            config = read_llava_config(values, folder)
        else:
            text = read_text_config(values)
            guesses = {"template": template_of(folder, "raw"), "image_token_index": text.vocab_size}
            config = LlavaConfig(text, **guesses | known(LlavaConfig, values))
        if "eos_token_ids" not in values:
            config.eos_token_ids = end_tokens(folder, values)
        check(config)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{folder / 'config.json'}: not a model's description ({error!r})") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return config


def check(config: LlavaConfig):
    """What the fields of a description must be to each other. Raises ValueError on the first that is not."""
    text, vision, ends = config.text_config, config.vision_config, config.eos_token_ids
    wrong = {
        f"template {config.template!r:.99} is none of ours": config.template not in tuple(TEMPLATES),
        f"eos_token_ids are {ends!r:.99}": type(ends) is not list or any(type(i) is not int or i < 0 for i in ends),
        f"pad_token_id {config.pad_token_id} is beyond the vocabulary": config.pad_token_id >= text.vocab_size,
    }
    if vision is not None:
        layers, tiled = vision.num_hidden_layers, config.image_grid_pinpoints is not None
        wrong |= {
            f"vision_feature_layer {config.vision_feature_layer} of a tower of {layers} layers": not (
                -layers - 1 <= config.vision_feature_layer <= layers
            ),
            f"image_token_index {config.image_token_index} is beyond the vocabulary": (
                config.image_token_index > text.vocab_size  # itself: the token is yet to be added
            ),
            f"projector_type is {config.projector_type!r:.99}": config.projector_type not in PROJECTORS,
            f"image_mode is {config.image_mode!r:.99}": config.image_mode not in tuple(IMAGE_PROCESSORS),
            f"image_mode is {config.image_mode!r:.99}, its canvases {config.image_grid_pinpoints!r:.99}": (
                tiled != (config.image_mode == "anyres")
            ),
        }
    for complaint, is_so in wrong.items():
        if is_so:
            raise ValueError(f"config.json: {complaint}")
    if vision is not None:
        check_pinpoints(config)


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
    refuse_unbuilt(values, BUILT["llava"])
    if len({values[key] for key in ("image_token_index", "image_token_id") if values.get(key) is not None}) > 1:
        raise ValueError("config.json: image_token_index and image_token_id differ")
    tower = CLIP_L if values.get("vision_config") is None else values["vision_config"]
    vision = CLIPVisionConfig(**known(CLIPVisionConfig, tower))
    tied = {"tie_word_embeddings": True} if values.get("tie_word_embeddings") else {}  # said once, in either place
    text = read_text_config(values["text_config"] | tied)
    guesses = {"template": template_of(folder, "llava_hf"), "image_token_index": values.get("image_token_id")}
    guesses["image_mode"] = image_mode_of(folder, vision.image_size)
    if kind == "llava_next":
        guesses |= {"image_mode": "anyres", "image_grid_pinpoints": PINPOINTS}
    if values["text_config"].get("pad_token_id") != -1:
        guesses["pad_token_id"] = values["text_config"].get("pad_token_id")
    told = known(LlavaConfig, guesses) | known(LlavaConfig, values)  # a key of null says nothing
    return LlavaConfig(**told | {"text_config": text, "vision_config": vision})


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


def preprocessing(side: int) -> dict:
    """What becomes of a picture, in the words of transformers' image processors."""
    return {
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


def image_mode_of(folder: Path, side: int) -> str:
    """How the folder's own preprocessing makes a picture square: llava-hf cuts out the center unless told to pad.

    transformers 5 keeps it in processor_config.json, 4 in a file of its own. Raises ValueError if it is not CLIP's.
    """
    nested, own = folder / "processor_config.json", folder / "preprocessor_config.json"
    values = (read_json(nested) if nested.exists() else {}).get("image_processor")
    values = values or (read_json(own) if own.exists() else {})
    for key, want in preprocessing(side).items():
        got = values.get(key)
        if isinstance(want, dict) and type(got) is int:
            got = dict.fromkeys(want, got)
        numbers = not isinstance(want, dict) and got is not None and np.shape(got) == np.shape(want)
        if got not in (None, want) and not (numbers and np.allclose(got, want, rtol=0, atol=1e-6)):
            raise ValueError(f"pictures are preprocessed with {key} {got!r:.99}, and only {want} is built")
    return "pad" if values.get("do_pad") else "square"


CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L |= {"patch_size": 14, "image_size": 336, "projection_dim": 768}
TOWERS = {"clip-vit-large-patch14-336": CLIP_L, "clip-vit-large-patch14": CLIP_L | {"image_size": 224}}


FAMILIES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}


def read_original_config(values: dict, folder: Path) -> LlavaConfig:
    """A config.json of the LLaVA authors' code: a LLaMA config with the picture's part in mm_* keys."""
    name = str(values["mm_vision_tower"]).rstrip("/").split("/")[-1]
    if name not in TOWERS:
        raise ValueError(
            f"config.json: the shape of the vision tower {name!r} is not known, only of {', '.join(TOWERS)}"
        )
    refuse_unbuilt(values, BUILT["authors'"])
    kind = values.get("model_type", "llava")
    if kind not in FAMILIES:
        raise ValueError(f"config.json: model_type {kind!r} is none of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
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
    told = {
        "image_token_index": text.vocab_size,  # the authors' code has none; ours never reads its embedding
        "vision_feature_layer": values.get("mm_vision_select_layer"),
        "projector_type": values.get("mm_projector_type", "linear"),
        "template": template_of(folder, {"mistral": "mistral_instruct", "qwen2": "qwen_1_5"}.get(family, "vicuna_v1")),
        "image_mode": ratio or "square",
        "image_grid_pinpoints": pinpoints,
    }
    return LlavaConfig(text, CLIPVisionConfig(**TOWERS[name]), **known(LlavaConfig, told))


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
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def clip_config_from_dict(values: dict) -> CLIPConfig:
    """A CLIP's whole configuration from its config.json; missing fields get the defaults of transformers."""
    values = known(CLIPConfig, values)
    values["vision_config"] = CLIPVisionConfig(**known(CLIPVisionConfig, values.get("vision_config", {})))
    values["text_config"] = CLIPTextConfig(**known(CLIPTextConfig, values.get("text_config", {})))
    return CLIPConfig(**values)


# ---------------------------------------------------------------------------------------------------------------------
# writing


ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
ARCHITECTURES["gpt2"] = "GPT2LMHeadModel"


def config_to_json(config: LlavaConfig) -> dict:
    """A config.json: what transformers needs to load the folder, then our own keys."""
    values = asdict(config)
    text = values["text_config"] | {"eos_token_id": config.eos_token_ids, "pad_token_id": config.pad_token_id}
    if config.text_config.model_type == "mistral":
        text["sliding_window"] = None  # the context ends where the window does; left out, it would mean 4096
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
    image = {"image_processor_type": IMAGE_PROCESSORS[config.image_mode], "do_convert_rgb": True}
    image |= {"do_pad": config.image_mode == "pad"} | preprocessing(config.vision_config.image_size)
    processor = "LlavaProcessor"
    if config.image_grid_pinpoints:
        processor, image["image_grid_pinpoints"] = "LlavaNextProcessor", config.image_grid_pinpoints
    words = {"processor_class": processor, "image_token": "<image>", "patch_size": config.vision_config.patch_size}
    words |= {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    write_json(folder / "preprocessor_config.json", image | {"processor_class": processor})
    write_json(folder / "processor_config.json", words)
