"""The measured models, with random weights, and their inputs; every side reads the same ones."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from shutil import rmtree

import torch
from PIL import Image

from clip import CLIPVisionConfig
from formats.configs import config_to_json
from formats.saving import save_model
from inputs.bpe import ByteLevel
from inputs.files import publish_folder, read_json
from inputs.tokenizer import SPECIALS, Tokenizer, find_roles
from inputs.vocabularies import SPLIT
from llava import IGNORE, Llava, LlavaConfig, TextConfig
from world.speedrun import new_model

WAYS = ("stage1", "stage2", "lora", "qlora")  # what trains


@dataclass(frozen=True)
class Job:
    """The work of one row of the table.

    Args: kind: a key of contenders.KINDS, or "cold_start"; folder: of the model; dtype: "float32" or "bfloat16"; way:
    one of WAYS; rows, length, supervised: see Shape; batch: rows decoded together; bits: 4 for NF4 while decoding;
    compiled: compile this project's model, as --compile does; only: items of fast/ to use, None for all.
    """

    kind: str
    folder: str
    device: str = "cpu"
    dtype: str = "float32"
    way: str = ""
    rows: int = 0
    length: int = 0
    supervised: int = 0
    batch: int = 1
    bits: int = 16
    compiled: bool = False
    only: list[str] | None = None


@dataclass(frozen=True)
class Shape:
    """A model and its training batch: `rows` of `length` tokens, image included; the last `supervised` have labels."""

    make: Callable[[], tuple[LlavaConfig, Tokenizer]]
    rows: int
    length: int
    supervised: int


def model_of_222m() -> tuple[LlavaConfig, Tokenizer]:
    """Return a model of 222 million parameters: CLIP-B/16-224 and a decoder with the shape of SmolLM2-135M."""
    text = TextConfig(49152, 576, 1536, 30, 9, 3, rms_norm_eps=1e-5, tie_word_embeddings=True)
    return with_full_vocabulary(text, CLIPVisionConfig(patch_size=16))


def with_full_vocabulary(text: TextConfig, vision: CLIPVisionConfig) -> tuple[LlavaConfig, Tokenizer]:
    """Return a config and a tokenizer that fills its vocabulary, because a cold start includes loading it."""
    pairs = (bytes(two) for two in product(range(256), repeat=2))
    tokens = [*(bytes([b]) for b in range(256)), *islice(pairs, text.vocab_size - 256 - len(SPECIALS))]
    ranks = {token: i for i, token in enumerate(tokens)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
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
    expected = json.loads(json.dumps(config_to_json(config)))
    if folder.exists() and read_json(folder / "config.json") == expected:
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
    input_ids = torch.randint(0, 256, (job.rows, job.length), generator=generator)
    input_ids[:, 1 : 1 + config.vision_config.num_patches] = config.image_token_index
    labels = input_ids.masked_fill(torch.arange(job.length) < job.length - job.supervised, IGNORE)
    pixel_values = torch.randn(job.rows, 3, side, side, generator=generator)
    return {"input_ids": input_ids, "labels": labels, "pixel_values": pixel_values}


def make_question(config: LlavaConfig, job: Job) -> tuple[list[int], torch.Tensor]:
    """Return the first training row without its answer: the prompt's ids and the pixels (1, 3, S, S)."""
    batch = make_batch(config, job)
    prompt = batch["input_ids"][0, : job.length - job.supervised].tolist()
    return prompt, batch["pixel_values"][:1].to(job.device, getattr(torch, job.dtype))


def image_files(folder: Path, count: int) -> list[Path]:
    """Return paths of JPEGs of 640 x 480 pixels, as in COCO: smooth random color with noise. Written once."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        if not path.exists():
            smooth = (Image.effect_noise((16, 12), 100).resize((640, 480), Image.Resampling.BICUBIC) for _ in "RGB")
            bands = [Image.blend(band, Image.effect_noise((640, 480), 30), 0.2) for band in smooth]
            Image.merge("RGB", bands).save(path, quality=90)
    return paths
