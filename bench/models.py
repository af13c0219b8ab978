"""The measured models, with random weights, and their inputs; every side reads the same ones."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import torch

from clip import CLIPVisionConfig
from formats.configs import read_config
from formats.saving import save_model
from inputs.files import publish_folder
from llava import IGNORE, Llava, LlavaConfig, TextConfig
from world.speedrun import new_model

WAYS = ("stage1", "stage2", "lora", "qlora")  # what trains


@dataclass(frozen=True)
class Shape:
    """A model and its training batch: `rows` of `length` tokens, image included; the last `supervised` have labels."""

    make: Callable[[], LlavaConfig]
    rows: int
    length: int
    supervised: int


@dataclass(frozen=True)
class Job:
    """The work of one row of the table."""

    kind: str  # a key of contenders.KINDS
    folder: str  # of the model
    shape: Shape | None = None
    device: str = "cpu"
    dtype: str = "float32"
    way: str = ""  # of training, one of WAYS
    batch: int = 1  # rows decoded together
    bits: int = 16  # 4 for NF4 while decoding
    compiled: bool = False  # compile this project's model, as --compile does
    only: list[str] | None = None  # items of fast/ to use; None: all


def model_of_speedrun() -> LlavaConfig:
    """Return a model of the speedrun's shape."""
    return new_model()[0]


def model_of_222m() -> LlavaConfig:
    """Return a model of 222 million parameters: CLIP-B/16-224 and a decoder with the shape of SmolLM2-135M."""
    text = TextConfig(49152, 576, 1536, 30, 9, 3, rms_norm_eps=1e-5, tie_word_embeddings=True)
    vision = CLIPVisionConfig(patch_size=16)
    return LlavaConfig(text, vision, image_token_index=49151, eos_token_ids=[0], pad_token_id=0)


SHAPES = {
    "speedrun": Shape(model_of_speedrun, rows=64, length=116, supervised=16),
    "222m": Shape(model_of_222m, rows=4, length=260, supervised=40),
}


def model_folder(name: str, root: Path) -> Path:
    """Return the folder of a shape's random weights; write it if it is missing or has another config."""
    folder, config = (root / name).resolve(), SHAPES[name].make()
    if folder.exists() and read_config(folder) == config:
        return folder
    rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    publish_folder(folder, lambda target: save_model(Llava(config), target))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# inputs


def make_batch(config: LlavaConfig, job: Job) -> dict[str, torch.Tensor]:
    """Return a training batch: in each row an image, then ids that every vocabulary has."""
    generator, side = torch.Generator().manual_seed(0), config.vision_config.image_size
    input_ids = torch.randint(0, 256, (job.shape.rows, job.shape.length), generator=generator)
    input_ids[:, 1 : 1 + config.vision_config.num_patches] = config.image_token_index
    labels = input_ids.clone()
    labels[:, : -job.shape.supervised] = IGNORE
    pixel_values = torch.randn(job.shape.rows, 3, side, side, generator=generator)
    return {"input_ids": input_ids, "labels": labels, "pixel_values": pixel_values}
