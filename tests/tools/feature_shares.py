"""Say what a vision tower's features of the embedded world show: a linear probe, and shares of the variance.

    python tests/tools/feature_shares.py out/speedrun/stage0/clip out/speedrun/world

Measured on the patches that hold a shape, in the first 4,000 training images. Probe: ridge regression to one fact, on
four fifths; right answers on the rest. Share: variance between the classes of a fact, of all variance, before and after
the half whitening of training/towers.py.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clip import CLIPVisionModel
from data import image_pixels
from formats.configs import read_vision_config
from formats.weights import load_tower
from inputs.images import open_image
from training.towers import half_whitening

FACTS = ("shape", "color", "size", "cell")


@torch.no_grad()
def shape_features(tower: Path, world: Path, count: int = 4000) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features (N, C) of the patches that hold a shape, and the class (N,) of each fact."""
    model = nn.Module()
    model.vision_tower = CLIPVisionModel(config := read_vision_config(tower))
    load_tower(model, tower)
    scenes = [json.loads(line) for line in (world / "scenes.jsonl").open()][:count]
    features, facts = [], []
    for scene in scenes:
        pixels = image_pixels(open_image(world / scene["image"]), config.image_size, "pad")
        patches = model.vision_tower(pixels[None])[0]  # (P, C); a patch is a cell
        for obj in scene["things"]:
            if obj["shape"] != "sign":
                features.append(patches[obj["cell"]])
                facts.append([obj[fact] for fact in FACTS])
    classes = {}
    for fact, values in zip(FACTS, zip(*facts)):
        names = sorted(set(values))
        classes[fact] = torch.tensor([names.index(value) for value in values])
    return torch.stack(features).double(), classes


def probe(features: torch.Tensor, target: torch.Tensor) -> float:
    """Percent of the last fifth that ridge regression on the rest gets right."""
    x = torch.cat([(features - features.mean(0)) / features.std(0), torch.ones(len(features), 1).double()], dim=1)
    train = len(x) * 4 // 5
    wanted, ridge = nn.functional.one_hot(target).double(), 10 * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(x[:train].T @ x[:train] + ridge, x[:train].T @ wanted[:train])
    return 100 * ((x[train:] @ weight).argmax(1) == target[train:]).double().mean().item()


def share(features: torch.Tensor, target: torch.Tensor) -> float:
    """Percent of the variance that lies between the classes."""
    means = torch.stack([features[target == value].mean(0) for value in range(int(target.max()) + 1)])
    return 100 * (means[target].var(0).sum() / features.var(0).sum()).item()


def main():
    features, classes = shape_features(Path(sys.argv[1]), Path(sys.argv[2]))
    variance, directions = torch.linalg.eigh(torch.cov(features.T))
    whitened = (features - features.mean(0)) @ directions * half_whitening(variance)
    print(f"{'fact':<8}{'probe':>8}{'share':>8}{'share, whitened':>18}")
    for fact, target in classes.items():
        figures = probe(features, target), share(features, target), share(whitened, target)
        print(f"{fact:<8}{figures[0]:>8.1f}{figures[1]:>8.1f}{figures[2]:>18.1f}")


if __name__ == "__main__":
    main()
