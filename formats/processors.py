"""Read, check and write transformers' processor files, which describe the preprocessing of images."""

from pathlib import Path

import numpy as np

from clip import MEAN, STD
from inputs.files import read_optional_json, write_json
from llava import LlavaConfig

IMAGE_PROCESSORS = {"square": "CLIPImageProcessor", "pad": "LlavaImageProcessor", "anyres": "LlavaNextImageProcessor"}


def clip_preprocessing(side: int) -> dict:
    """CLIP's preprocessing to `side` pixels, the only one that is supported, in transformers' keys."""
    return {
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(f"{value:.8f}") for value in MEAN],
        "image_std": [float(f"{value:.8f}") for value in STD],
    }


def read_image_mode(folder: Path, side: int) -> str:
    """Read the image mode, "pad" or "square" (llava-hf's default). Raises ValueError if the rest is not CLIP's.

    transformers 5 keeps the preprocessing in processor_config.json, transformers 4 in preprocessor_config.json.
    """
    nested, separate = folder / "processor_config.json", folder / "preprocessor_config.json"
    values = read_optional_json(nested).get("image_processor")
    values = values or read_optional_json(separate)
    for key, want in clip_preprocessing(side).items():
        got = values.get(key)
        if isinstance(want, dict) and type(got) is int:  # older files give one number for both sides
            got = dict.fromkeys(want, got)
        numbers = not isinstance(want, dict) and got is not None and np.shape(got) == np.shape(want)
        if got not in (None, want) and not (numbers and np.allclose(got, want, rtol=0, atol=1e-6)):
            raise ValueError(f"images are preprocessed with {key} {got!r:.99}, and only {want} is supported")
    return "pad" if values.get("do_pad") else "square"


def write_processor(config: LlavaConfig, folder: Path):
    """Write the files for transformers' AutoProcessor, which gives the same pixels and placeholders."""
    image = {"image_processor_type": IMAGE_PROCESSORS[config.image_mode], "do_convert_rgb": True}
    image |= {"do_pad": config.image_mode == "pad"} | clip_preprocessing(config.vision_config.image_size)
    processor = "LlavaProcessor"
    if config.image_grid_pinpoints:
        processor, image["image_grid_pinpoints"] = "LlavaNextProcessor", config.image_grid_pinpoints
    values = {"processor_class": processor, "image_token": "<image>", "patch_size": config.vision_config.patch_size}
    values |= {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    write_json(folder / "preprocessor_config.json", image | {"processor_class": processor})
    write_json(folder / "processor_config.json", values)
