"""Time our image preprocessing against transformers' PIL backend, alternating (A B A B): medians and their spread.

python tests/tools/preprocess_speed.py

Measured is CPU time on one thread. Modes: "square" cuts out the center like CLIPImageProcessor, "pad" pads like
LlavaImageProcessor. From "file" includes decoding, which both do with Pillow; from "image" starts with decoded pixels.
The images are drawn here with the spectrum of photographs. Both sides must give the same bits.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from data import image_pixels
from inputs.images import open_image

IMAGES = ("640x480.jpg", "480x640.jpg", "1920x1080.jpg", "4000x3000.jpg", "336x336.png", "72x72.png")


def photograph(width: int, height: int) -> Image.Image:
    """A sum of noise at nine scales, which has the spectrum of a photograph."""
    rng, pixels = np.random.default_rng([width, height]), np.zeros((height, width, 3), np.float32)
    for octave in range(9):
        small = (max(height >> octave, 2), max(width >> octave, 2), 3)
        noise = Image.fromarray(rng.integers(0, 256, small, dtype=np.uint8))
        pixels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((128 + (pixels - pixels.mean()) * (50 / pixels.std())).clip(0, 255).astype(np.uint8))


def paired(ours, theirs, rounds: int) -> tuple[float, float, float, float]:
    """Median CPU seconds of both, the median ratio of a round, and half of its interquartile range."""
    pairs = []
    for _ in range(rounds + 1):
        times = []
        for call in (ours, theirs):
            begin = time.process_time()
            call()
            times.append(time.process_time() - begin)
        pairs.append(times)
    a, b = zip(*pairs[1:])  # the first warms up
    low, ratio, high = statistics.quantiles([y / x for x, y in zip(a, b)], n=4)
    return statistics.median(a), statistics.median(b), ratio, (high - low) / 2


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| image | mode | size | from | ours, ms | transformers, ms | ratio |\n|---|---|---:|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name in IMAGES:
            path = Path(folder, name)
            photograph(*map(int, path.stem.split("x"))).save(path, quality=90)
            for mode, size in product(("square", "pad"), (224, 336)):
                compare(path, mode, size, args.rounds)


def compare(path: Path, mode: str, size: int, rounds: int):
    """Print two lines of the table. Raises AssertionError if a bit differs."""
    settings = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    processor = LlavaImageProcessorPil(do_pad=True, **settings) if mode == "pad" else CLIPImageProcessorPil(**settings)

    def theirs(image: Image.Image) -> torch.Tensor:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    def ours(image: Image.Image) -> torch.Tensor:
        return image_pixels(image, size, mode)

    image = open_image(path)
    assert torch.equal(ours(image), theirs(Image.open(path).convert("RGB")))
    calls = {
        "file": (lambda: ours(open_image(path)), lambda: theirs(Image.open(path).convert("RGB"))),
        "image": (lambda: ours(image), lambda: theirs(image)),
    }
    for what, pair in calls.items():
        a, b, ratio, spread = paired(*pair, rounds)
        row = (
            f"| {path.name} | {mode} | {size} | {what} | {1e3 * a:.2f} | {1e3 * b:.2f} | {ratio:.2f} +- {spread:.2f} |"
        )
        print(row, flush=True)


if __name__ == "__main__":
    main()
