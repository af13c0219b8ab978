"""The measured models, on random weights, and their inputs. All sides read the same folder and the same inputs."""

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
from inputs.tokenizer import SPECIALS, Tokenizer, find_roles, train_bpe
from inputs.vocabularies import SPLIT
from llava import IGNORE, Llava, LlavaConfig, TextConfig
from training.towers import new_clip, new_decoder
from world.language import TURNS
from world.writer import make_records

WAYS = ("stage1", "stage2", "lora", "qlora")  # what trains


@dataclass(frozen=True)
class Job:
    """What a side does; sent to its process.

    Args: kind: a key of contenders.KINDS, or "cold_start"; folder: of the model; dtype: "float32" or "bfloat16"; way:
    of WAYS; rows, length, supervised: see Shape; batch: rows decoded together; bits: 4 for NF4 while decoding;
    compiled: this project as with --compile; only: names of the items to accelerate, None for all.
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
    """A model and its training batch: rows of `length` tokens, image included; the last `supervised` are trained on."""

    make: Callable[[], tuple[LlavaConfig, Tokenizer]]
    rows: int
    length: int
    supervised: int


def speedrun_model() -> tuple[LlavaConfig, Tokenizer]:
    """The model that `bash speedrun.sh` trains: towers of size "small", 9 patches per image, the world's vocabulary."""
    tokenizer = train_bpe([text for texts in world_dialogues(0, 500) for text in texts], merges=600)
    config = new_decoder("small", tokenizer, "llava_hf").config
    config.vision_config = new_clip("small", 24, tokenizer.vocab_size).config.vision_config
    return config, tokenizer


def model_of_222m() -> tuple[LlavaConfig, Tokenizer]:
    """222 million parameters: CLIP-B/16-224 and a decoder of 30 layers of width 576, as SmolLM2-135M."""
    text = TextConfig(49152, 576, 1536, 30, 9, 3, rms_norm_eps=1e-5, tie_word_embeddings=True)
    return with_full_vocabulary(text, CLIPVisionConfig(patch_size=16))


def with_full_vocabulary(text: TextConfig, vision: CLIPVisionConfig) -> tuple[LlavaConfig, Tokenizer]:
    """A config and a tokenizer with as many tokens as the embedding has rows: loading it is part of a cold start."""
    pairs = (bytes(two) for two in product(range(256), repeat=2))
    tokens = [*(bytes([b]) for b in range(256)), *islice(pairs, text.vocab_size - 256 - len(SPECIALS))]
    ranks = {token: i for i, token in enumerate(tokens)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    tokenizer = Tokenizer(ByteLevel(ranks, SPLIT), specials, find_roles(specials, {}))
    ids = {"eos_token_ids": [tokenizer.eos_id], "pad_token_id": tokenizer.pad_id}
    return LlavaConfig(text, vision, image_token_index=tokenizer.image_id, **ids), tokenizer


SHAPES = {
    "speedrun": Shape(speedrun_model, rows=64, length=116, supervised=16),
    "222m": Shape(model_of_222m, rows=4, length=260, supervised=40),
}


def model_folder(name: str, root: Path) -> Path:
    """The folder of a shape's random weights; written if it is missing or holds another config."""
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
    """A training batch: an image at the start of each row, then ids of single bytes, which every vocabulary has."""
    generator, side = torch.Generator().manual_seed(0), config.vision_config.image_size
    input_ids = torch.randint(0, 256, (job.rows, job.length), generator=generator)
    input_ids[:, 1 : 1 + config.vision_config.num_patches] = config.image_token_index
    labels = input_ids.masked_fill(torch.arange(job.length) < job.length - job.supervised, IGNORE)
    pixel_values = torch.randn(job.rows, 3, side, side, generator=generator)
    return {"input_ids": input_ids, "labels": labels, "pixel_values": pixel_values}


def make_question(config: LlavaConfig, job: Job) -> tuple[list[int], torch.Tensor]:
    """A prompt with an image, and the image's pixels (1, 3, S, S): the first training row without its answer."""
    batch = make_batch(config, job)
    prompt = batch["input_ids"][0, : job.length - job.supervised].tolist()
    return prompt, batch["pixel_values"][:1].to(job.device, getattr(torch, job.dtype))


def image_files(folder: Path, count: int) -> list[Path]:
    """JPEGs of 640 x 480, the usual size in COCO: smooth random color with a photo's noise. Written once."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        if not path.exists():
            smooth = (Image.effect_noise((16, 12), 100).resize((640, 480), Image.Resampling.BICUBIC) for _ in "RGB")
            bands = [Image.blend(band, Image.effect_noise((640, 480), 30), 0.2) for band in smooth]
            Image.merge("RGB", bands).save(path, quality=90)
    return paths


def world_dialogues(seed: int, scenes: int) -> list[list[str]]:
    """The texts of each dialogue about the first scenes of the embedded world."""
    records = (record for i in range(scenes) for record in make_records(seed, i, TURNS)[1])
    return [[turn["value"] for turn in record["conversations"]] for record in records]
