"""Train stage 2 on features that are made from the scenes, to see what the decoder learns when vision is perfect.

    python tests/tools/perfect_features.py out/speedrun --empty 1.0
    python tests/tools/perfect_features.py out/speedrun --empty 0.25

A patch's feature is the sum of random vectors: one for its cell and, if an object is there, one for each of its facts.
--empty scales the vector of the cell in patches without an object. The questions are those for colors, shapes and
positions only, one each. Printed every 250 steps: percent of held-out answers whose tokens are all predicted rightly.
"""

import argparse
import math
import random
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch.nn.functional import pad
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import render_dialogue
from fast.accelerate import accelerate
from formats.weights import load_checkpoint
from inputs.records import Turn
from llava import IGNORE
from world.language import FAMILIES
from world.scenes import make_scene

ASKED, SCENES, BATCH, TOTAL = ("color", "position", "shape"), 15_000, 16, 10_800  # TOTAL: steps of the cosine
PEAK, WARMUP = 1e-3, 0.03


def make_features(scene, vectors, empty: float) -> torch.Tensor:
    """The features (9, C) of a scene."""
    occupied = {obj.cell for obj in scene.objects}
    rows = [vectors["cell", cell] * (1.0 if cell in occupied else empty) for cell in range(9)]
    for obj in scene.objects:
        for fact in ("shape", "color", "size", "text"):
            rows[obj.cell] = rows[obj.cell] + vectors[fact, getattr(obj, fact)]
    return torch.stack(rows)


def make_samples(model, tokenizer, vectors, empty: float, seed: int, count: int, held_out: bool) -> list[tuple]:
    """(family, ids, labels, features) of one question of each family about each scene."""
    samples = []
    for index in range(count):
        scene, rng = make_scene(seed, index, held_out)
        features = make_features(scene, vectors, empty)
        for family in ASKED:
            if pair := FAMILIES[family](scene, rng):
                turn = Turn(*pair)
                turn.images = 1
                ids, labels = render_dialogue([turn], tokenizer, model.config.template, [9])
                samples.append((family, ids, labels, features))
    return samples


def collate(samples: list[tuple], pad_id: int) -> tuple[torch.Tensor, ...]:
    longest = max(len(ids) for _, ids, _, _ in samples)
    ids = torch.tensor([ids + [pad_id] * (longest - len(ids)) for _, ids, _, _ in samples])
    labels = torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, _, labels, _ in samples])
    return ids, labels, torch.stack([features for *_, features in samples])


@torch.no_grad()
def right_answers(model, samples: list[tuple], pad_id: int) -> float:
    """Percent of samples whose supervised tokens are all the likeliest ones, given those before."""
    ids, labels, features = collate(samples, pad_id)
    guess = model.language_model.lm_head(model.language_model.model(model.embed(ids, features))).argmax(-1)
    target = pad(labels[:, 1:], (0, 1), value=IGNORE)
    return 100 * ((guess == target) | (target == IGNORE)).all(1).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speedrun", type=Path, help="folder of a finished speedrun; its stage 1 gives model and words")
    parser.add_argument("--empty", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, tokenizer = load_checkpoint(args.speedrun / "stage1", "cpu", torch.float32)
    accelerate(model)
    width = model.config.vision_config.hidden_size
    vectors = defaultdict(lambda: torch.randn(width))
    samples = make_samples(model, tokenizer, vectors, args.empty, args.seed, SCENES, False)
    asked = defaultdict(list)
    for sample in make_samples(model, tokenizer, vectors, args.empty, args.seed, 150, True):
        asked[sample[0]].append(sample)
    mean = torch.cat([features for *_, features in samples[:1000]]).mean(0)
    with torch.no_grad():  # a new projector for these features
        for layer in (model.multi_modal_projector.linear_1, model.multi_modal_projector.linear_2):
            layer.weight.normal_(std=layer.in_features**-0.5)
            layer.bias.zero_()
        model.multi_modal_projector.linear_1.bias -= model.multi_modal_projector.linear_1.weight @ mean
    trained = [*model.multi_modal_projector.parameters(), *model.language_model.parameters()]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0)
    rng, rise = random.Random(args.seed), math.ceil(WARMUP * TOTAL)
    for step in range(args.steps):
        scale = (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / (TOTAL - rise)))
        optimizer.param_groups[0]["lr"] = PEAK * scale
        model.train()
        ids, labels, features = collate(rng.sample(samples, BATCH), tokenizer.pad_id)
        (model(ids, labels, vision_features=features) / (labels[:, 1:] != IGNORE).sum()).backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            model.eval()
            right = {family: right_answers(model, rows, tokenizer.pad_id) for family, rows in asked.items()}
            print(step + 1, "  ".join(f"{family} {value:.0f} %" for family, value in right.items()), flush=True)


if __name__ == "__main__":
    main()
