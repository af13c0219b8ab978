"""The measured models, with random weights, and their inputs; every side reads the same ones."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from shutil import rmtree

import torch
from PIL import Image

from clip import CLIPVisionConfig
from formats.configs import read_config
from formats.saving import save_model
from inputs.bpe import ByteLevel
from inputs.files import publish_folder
from inputs.tokenizer import SPECIALS, Tokenizer, find_roles
from inputs.vocabularies import SPLIT
from llava import IGNORE, Llava, LlavaConfig, TextConfig
from world.speedrun import new_model

WAYS = ("stage1", "stage2", "lora", "qlora")  # what trains


@dataclass(frozen=True)
class Shape:
    """A model and its training batch: `rows` of `length` tokens, image included; the last `supervised` have labels."""

    make: Callable[[], tuple[LlavaConfig, Tokenizer]]
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


def model_of_222m() -> tuple[LlavaConfig, Tokenizer]:
    """Return a model of 222 million parameters: CLIP-B/16-224 and a decoder with the shape of SmolLM2-135M."""
    text = TextConfig(49152, 576, 1536, 30, 9, 3, rms_norm_eps=1e-5, tie_word_embeddings=True)
    return with_full_vocabulary(text, CLIPVisionConfig(patch_size=16))


def with_full_vocabulary(text: TextConfig, vision: CLIPVisionConfig) -> tuple[LlavaConfig, Tokenizer]:
    """Return a config and a tokenizer that fills its vocabulary, because a cold start includes loading it."""
    tokens = (bytes(values) for length in (1, 2) for values in product(range(256), repeat=length))
    ranks = {token: i for i, token in zip(range(text.vocab_size - len(SPECIALS)), tokens)}
    specials = {name: i for i, name in enumerate(SPECIALS, len(ranks))}
    tokenizer = Tokenizer(ByteLevel(ranks, SPLIT), specials, find_roles(specials, {}))
    ids = {"eos_token_ids": [tokenizer.eos_id], "pad_token_id": tokenizer.pad_id}
    return LlavaConfig(text, vision, image_token_index=tokenizer.image_id, **ids), tokenizer


SHAPES = {
    "speedrun": Shape(new_model, rows=64, length=116, supervised=16),
    "222m": Shape(model_of_222m, rows=4, length=260, supervised=40),
}


def model_folder(name: str, root: Path) -> Path:
    """Return the folder of a shape's random weights; write it if it is missing or has another config."""
    folder = (root / name).resolve()
    config, tokenizer = SHAPES[name].make()
    if folder.exists() and read_config(folder) == config:
        return folder
    rmtree(folder, ignore_errors=True)

    def write(target: Path):
        torch.manual_seed(0)
        save_model(Llava(config), target)
        tokenizer.save(target)

    publish_folder(folder, write)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# inputs


def make_batch(config: LlavaConfig, job: Job) -> dict[str, torch.Tensor]:
    """Return a training batch: in each row an image, then ids of single bytes, which every vocabulary has."""
    generator, side = torch.Generator().manual_seed(0), config.vision_config.image_size
    input_ids = torch.randint(0, 256, (job.shape.rows, job.shape.length), generator=generator)
    input_ids[:, 1 : 1 + config.vision_config.num_patches] = config.image_token_index
    labels = input_ids.clone()
    labels[:, : -job.shape.supervised] = IGNORE
    pixel_values = torch.randn(job.shape.rows, 3, side, side, generator=generator)
    return {"input_ids": input_ids, "labels": labels, "pixel_values": pixel_values}


def image_files(folder: Path) -> list[Path]:
    """Return paths of 16 JPEGs of 640 x 480 pixels, as in COCO: smooth random color with noise. Written once."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.jpg" for i in range(16)]
    for path in paths:
        if not path.exists():
            smooth = (Image.effect_noise((16, 12), 100).resize((640, 480), Image.Resampling.BICUBIC) for _ in "RGB")
            bands = [Image.blend(band, Image.effect_noise((640, 480), 30), 0.2) for band in smooth]
            Image.merge("RGB", bands).save(path, quality=90)
    return paths
