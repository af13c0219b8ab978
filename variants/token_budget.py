"""Fewer visual tokens per image: sample.py and eval.py --visual-tokens N[:method].

    random[:SEED]   N patches, drawn at random
    uniform         N patches, evenly spread over the image (default)
    cls             the N patches that the vision tower's class token attends to most
    pool            the tokens of all patches, averaged over a grid of m x m areas; N = m * m

All of them shorten the prompt itself. An image's tokens depend on this image only, not on the others of the batch.
Kept patches stay in their order. Every N that is all patches changes nothing.

Sources: cls as in FasterVLM (Zhang et al. 2024, arXiv 2412.01818) and VisionZip (Yang et al. 2024, 2412.04467), without
the latter's merging; pool as in M3 (Cai et al. 2024, 2405.17430), whose model was trained for it.
Shapes: N images, P patches, n of them kept, C width, H heads, D width of a head, S pixels a side.
"""

import argparse
import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

METHODS = ("random", "uniform", "cls", "pool")
NUMBERED = ("random",)  # methods that take a number of their own
PER_PATCH = ("linear", "mlp2x_gelu")  # projectors that give one token for each patch


@dataclass(frozen=True)
class Budget:
    tokens: int  # of an image
    method: str = "uniform"
    number: int = 0  # random: the seed

    def __str__(self) -> str:
        return f"{self.tokens}:{self.method}" + (f":{self.number}" if self.method in NUMBERED else "")


def read_budget(text: str) -> Budget:
    """The value of --visual-tokens, for argparse. Raises ArgumentTypeError."""
    tokens, method, number = (*text.split(":", 2), "", "")[:3]
    method = method or "uniform"
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"method {method!r:.50} is none of {', '.join(METHODS)}")
    if not tokens.isdecimal() or int(tokens) < 1:
        raise argparse.ArgumentTypeError(f"{tokens!r:.50} is not a number of tokens from 1")
    if number and not (method in NUMBERED and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r:.50}: only {' and '.join(NUMBERED)} take a number, as in 4:random:1")
    return Budget(int(tokens), method, int(number or 0))


def limit_visual_tokens(model: nn.Module, budget: Budget | None):
    """Make a built Llava use fewer tokens for each image; None leaves it as it is.

    The vision tower and the projector get hooks; the number of placeholders follows from config.visual_tokens.
    Raises ValueError if the model does not allow it.
    """
    if budget is None:
        return
    config, tokens = model.config, budget.tokens
    check_budget(budget, config)
    if tokens == config.vision_config.num_patches:
        return
    config.visual_tokens = tokens
    if budget.method == "pool":
        model.multi_modal_projector.register_forward_hook(lambda module, inputs, output: pool_tokens(output, tokens))
    elif budget.method == "cls":
        CLSAttention(model.vision_tower, config.vision_feature_layer, tokens)
    else:

        def select(tower, inputs, features):  # fmt: skip
            side = math.isqrt(features.shape[1])
            if budget.method == "uniform":
                return features[:, even_patches(side, tokens)]
            chosen = [random_patches(image, side * side, tokens, budget.number) for image in inputs[0]]
            return take_patches(features, torch.stack(chosen))

        model.vision_tower.register_forward_hook(select)


def check_budget(budget: Budget, config):
    """Raise ValueError if a model with this LlavaConfig cannot have this budget."""
    vision, tokens = config.vision_config, budget.tokens
    if vision is None:
        raise ValueError("--visual-tokens: this model is a decoder without a vision tower")
    if config.image_grid_pinpoints:
        raise ValueError("--visual-tokens: this model cuts images into tiles, whose tokens depend on the image's size")
    if config.projector_type not in PER_PATCH:
        reason = f"the projector {config.projector_type} does not map each patch to one token"
        raise ValueError(f"--visual-tokens: {reason}")
    if tokens > vision.num_patches:
        raise ValueError(f"--visual-tokens {budget}: an image has only {vision.num_patches} patches")
    if budget.method == "pool" and math.isqrt(tokens) ** 2 != tokens:
        lower, most = math.isqrt(tokens), math.isqrt(vision.num_patches)
        near = f"{lower**2} or {(lower + 1) ** 2}" if lower < most else lower**2
        raise ValueError(f"--visual-tokens {budget}: pool needs a square number of tokens, such as {near}")
    if budget.method == "cls" and config.vision_feature_layer in (0, -1 - vision.num_hidden_layers):
        raise ValueError("--visual-tokens: cls needs features of a block, and this model takes those before the first")


# ---------------------------------------------------------------------------------------------------------------------
# which patches are kept


def take_patches(features: Tensor, chosen: Tensor) -> Tensor:
    """Rows (N, n, C) of features (N, P, C). Args: chosen (N, n): which patches, in order."""
    return features.take_along_dim(chosen.to(features.device)[..., None], dim=1)


def even_patches(side: int, tokens: int) -> list[int]:
    """Patches of a grid of side x side, evenly spread: about sqrt(tokens) rows with equal numbers, give or take one.

    Six of 3 x 3: rows 0 and 2, all columns. Four: the corners. One: the center.
    """
    rows, chosen = round(math.sqrt(tokens)), []
    for row in range(rows):
        columns = tokens * (row + 1) // rows - tokens * row // rows
        y = (2 * row + 1) * side // (2 * rows)  # the patch in whose area the center of the row's share lies
        chosen += [y * side + (2 * column + 1) * side // (2 * columns) for column in range(columns)]
    return chosen


def random_patches(pixels: Tensor, patches: int, tokens: int, seed: int) -> Tensor:
    """`tokens` of `patches` numbers, in order, drawn with a seed that follows from the pixels (3, S, S) and `seed`.

    The pixels are rounded to bfloat16, so that a model draws the same patches in every dtype.
    """
    content = pixels.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes()
    digest = hashlib.sha256(seed.to_bytes(8, "big") + content).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(patches, generator=generator)[:tokens].sort().values


class CLSAttention:
    """Keeps the patches that the class token attends to most, mean over heads, in the block that gives the features."""

    def __init__(self, tower: nn.Module, layer: int, tokens: int):
        """Add the hooks. Args: layer: hidden state of the tower that is used, as in LlavaConfig."""
        self.tokens, self.weights = tokens, None
        attention = tower.vision_model.blocks(layer)[-1].self_attn
        attention.register_forward_pre_hook(self.read_attention)
        tower.register_forward_hook(self.select)

    def read_attention(self, attention: nn.Module, inputs: tuple):
        """Compute the class token's weights (N, P) from the input (N, 1 + P, C) of the block's attention."""
        self.weights = class_attention(attention, inputs[0])

    def select(self, tower: nn.Module, inputs: tuple, features: Tensor) -> Tensor:
        return take_patches(features, top_in_order(self.weights, self.tokens))


def class_attention(attention: nn.Module, x: Tensor) -> Tensor:
    """Attention (N, P) of the class token to the patches, mean over heads, float32. Args: x (N, 1 + P, C)."""
    q = attention.q_proj(x[:, :1]).unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # (N, H, 1, D)
    k = attention.k_proj(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # (N, H, 1 + P, D)
    scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.softmax(dim=-1).mean(dim=1)[:, 0, 1:]


def top_in_order(scores: Tensor, count: int) -> Tensor:
    """Positions (N, count) of the largest scores (N, P), in their order; of equal scores, the first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values


# ---------------------------------------------------------------------------------------------------------------------
# pooling


def pool_tokens(tokens: Tensor, count: int) -> Tensor:
    """Average projected tokens (N, P, C), a square grid, over m x m areas: (N, count, C) with count = m * m.

    Areas overlap by one row or column where m does not divide the side of the grid.
    """
    side, m = math.isqrt(tokens.shape[1]), math.isqrt(count)
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))  # (N, C, side, side)
    return F.adaptive_avg_pool2d(grid, m).flatten(2).transpose(1, 2)
