"""Nested pooling: one model for several numbers of visual tokens.

    python train.py --stage 2 --nested-pool              6 x 6 patches: scales of 36, 9 and 1 tokens
    python train.py --stage 2 --nested-pool 36 9 4       these scales
    python sample.py --visual-tokens 9:pool              what the model was trained for

M3 (Cai et al. 2024, arXiv 2405.17430) pools the projected tokens of an image to each scale in turn, and trains on the
mean of the losses: one forward pass for each scale. Here each step draws one scale, each with the same chance, as
TokenFLEX does (2504.03154). The gradient's expectation is M3's, and a step costs no more than a plain one. Pooling is
that of token_budget.py. Only training changes: validation and the checkpoint are those of the plain model.
"""

import math
import random

import torch
from torch import Tensor, nn

from variants.token_budget import Budget, check_budget, pool_tokens

IGNORE = -100  # as in llava.py, which imports this folder


def halvings(patches: int) -> list[int]:
    """Tokens of the grid of all patches, then of one with half as many a side, down to 1: M3's 576, 144, 36, 9, 1."""
    sides = [math.isqrt(patches)]
    while sides[-1] > 1:
        sides.append(sides[-1] // 2)
    return [side * side for side in sides]


class NestedPool:
    """Called with a batch of data.collate and the step: returns the batch with as many placeholders as that step uses.

    A hook on the projector pools its tokens to the same number. The scale of a step follows from the seed and the step
    only, so it is the same on all ranks and after --resume.
    """

    def __init__(self, model: nn.Module, scales: list[int], seed: int):
        """Args: model: a Llava; scales: numbers of tokens; empty: halvings(). Raises ValueError."""
        config = model.config
        self.patches, self.image_id, self.pad_id = 0, config.image_token_index, config.pad_token_id
        if config.vision_config is not None:
            self.patches = config.vision_config.num_patches
        self.scales, self.seed, self.tokens = scales or halvings(self.patches), seed, None
        for scale in self.scales:
            check_budget(Budget(scale, "pool"), config, "--nested-pool")
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"--nested-pool {' '.join(map(str, self.scales))}: a scale comes twice")
        model.multi_modal_projector.register_forward_hook(self.pool)

    def pool(self, projector: nn.Module, inputs: tuple, tokens: Tensor) -> Tensor:
        return pool_tokens(tokens, self.tokens) if projector.training and self.tokens else tokens

    def __call__(self, batch: dict, step: int) -> dict:
        self.tokens = random.Random(f"{self.seed} {step}").choice(self.scales)
        return batch | shorten(batch["input_ids"], batch["labels"], self)


def shorten(ids: Tensor, labels: Tensor, nested: NestedPool) -> dict[str, Tensor]:
    """Keep the first `nested.tokens` placeholders of each image; returns shorter "input_ids" and "labels" (B, T)."""
    image = ids == nested.image_id
    dropped = image & ((image.cumsum(dim=1) - 1) % nested.patches >= nested.tokens)  # an image has `patches` in a row
    order = dropped.int().argsort(dim=1, stable=True)  # the dropped ones become padding, at the right
    ids = ids.masked_fill(dropped, nested.pad_id).take_along_dim(order, dim=1)
    labels = labels.masked_fill(dropped, IGNORE).take_along_dim(order, dim=1)
    used = ((labels != IGNORE) | (ids == nested.image_id)).any(dim=0)  # of each column
    length = int(torch.nonzero(used).max()) + 1
    return {"input_ids": ids[:, :length], "labels": labels[:, :length]}
