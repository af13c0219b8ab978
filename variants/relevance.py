"""Relevance: the question decides which patches of an image the decoder reads, and how many.

    features (N, P, C) of P patches --+
                                      +--> Scorer --> a number for each patch; above 0: kept
    question, as embeddings ----------+

A patch is kept with probability sigmoid(score). Training minimizes the answer's loss + price x (mean number of kept
patches), so a patch stays if it makes the answer e^price times as likely, or more. `relevance_bounds` in config.json
holds the least and the most share of the patches that are kept.

In training, dropped patches are hidden from all others by a mask. In answering, they leave the prompt before the first
layer, and with it the KV cache: each row drops its own. Tokens keep their positions, so both give the same numbers.
`train.py --relevance ESTIMATOR --token-price P` adds a scorer to a model and trains it (variants/estimators.py), alone
or with --lora. docs/relevance.md has figures. Shapes: B rows, T tokens, N images, P patches, C width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.connectors import QueryAttention
from variants.estimators import ESTIMATORS, Bounds, choose, expected_count
from variants.token_budget import PER_PATCH, Dropping

SHARES = (64 / 576, 400 / 576)  # least and most share of the patches that a new scorer keeps
LAYERS = 2
OFFSET = 1.0  # score of every patch before training: most are kept
TINY = 1e-8  # weight of a dropped patch while a gradient is needed: at exactly 0, log has none
IGNORE = -100  # as in llava.py


def check_relevance(config):
    """Raise ValueError if the question cannot choose the patches of a model with this LlavaConfig."""
    bounds, vision = config.relevance_bounds, config.vision_config
    if vision is None:
        raise ValueError("relevance: this model is a decoder without a vision tower")
    if config.image_grid_pinpoints:
        raise ValueError("relevance: this model cuts images into tiles, whose tokens depend on the image's size")
    if config.projector_type not in PER_PATCH:
        raise ValueError(f"relevance: the projector {config.projector_type} does not map each patch to one token")
    numbers = isinstance(bounds, (list, tuple)) and [type(share) for share in bounds] in ([float] * 2, [int] * 2)
    if not numbers or not 0 < bounds[0] <= bounds[1] <= 1:
        raise ValueError(f"relevance_bounds is {bounds!r:.99}, not two shares with 0 < least <= most <= 1")


def add_relevance(model: nn.Module):
    """Give a Llava whose config has relevance_bounds a new scorer, and let it choose. Raises ValueError."""
    check_relevance(model.config)
    model.relevance = Scorer(model.config)
    model.allocator = Allocator(model)


def train_relevance(model: nn.Module, estimator: str, price: float):
    """Let a Llava learn the choice; it gets a new scorer if it has none. Raises ValueError."""
    if model.config.relevance_bounds is None:
        model.config.relevance_bounds = list(SHARES)
        add_relevance(model)
    model.allocator.estimator, model.allocator.price = ESTIMATORS[estimator], price


# ---------------------------------------------------------------------------------------------------------------------
# the scorer


class ScorerLayer(nn.Module):
    """Patches read the question and each other, then an MLP; normalized before, added after."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = QueryAttention(width, heads, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        queries = self.norm(x)
        x = x + self.attention(queries, torch.cat([text, queries], dim=1), mask)
        return x + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x))))


class Scorer(nn.Module):
    """Scores (N, P) of the patches of N images, from their features (N, P, C) and the questions about them."""

    def __init__(self, config):
        super().__init__()
        vision, width = config.vision_config, config.vision_config.hidden_size
        self.features_norm = nn.LayerNorm(width)
        self.positions = nn.Parameter(nn.init.normal_(torch.empty(vision.num_patches, width)))
        self.text_norm = nn.LayerNorm(config.text_config.hidden_size)
        self.text_projection = nn.Linear(config.text_config.hidden_size, width)
        self.layers = nn.ModuleList(ScorerLayer(width, vision.num_attention_heads) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, OFFSET)

    def forward(self, features: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Args: text (N, T, d): token embeddings; mask (N, T): True for those of the question."""
        x, text = self.features_norm(features) + self.positions, self.text_projection(self.text_norm(text))
        mask = F.pad(mask, (0, x.shape[1]), value=True)[:, None, None]  # all patches are read, too
        for layer in self.layers:
            x = layer(x, text, mask)
        return self.score(self.norm(x))[..., 0].float()


# ---------------------------------------------------------------------------------------------------------------------
# the choice


class Allocator(Dropping):
    """Lets the scorer of a Llava choose: drops patches while it answers, hides them while it trains."""

    name = "a model whose question chooses patches"

    def __init__(self, model: nn.Module):
        super().__init__(model, layer=0)
        patches = model.config.vision_config.num_patches
        self.bounds: Bounds = tuple(max(1, round(share * patches)) for share in model.config.relevance_bounds)
        self.model, self.estimator, self.price = model, None, 0.0  # train_relevance sets the last two
        model.forward = self.loss

    # answering

    def find_counts(self, x: Tensor) -> Tensor:
        """Choose for each row and image alone, so that no bit of a choice depends on the other rows of the batch."""
        model, choices, image = self.model, [], 0
        self.kept = torch.zeros_like(self.marked)
        for row, count in enumerate((self.marked.sum(1) // self.patches).tolist()):
            if not count:
                continue
            features = self.features[image : image + count].to(x.dtype)
            question = x[row, self.real[row] & ~self.marked[row]].expand(count, -1, -1)
            mask = torch.ones(question.shape[:2], dtype=torch.bool, device=x.device)
            chosen = choose(model.relevance(features, question, mask), self.bounds)  # (count, P)
            self.kept[row, self.marked[row]] = chosen.flatten()
            choices.append(chosen)
            image += count
        if choices:
            model.kept_patches = torch.cat(choices)  # (N, P), for --show-tokens
            model.visual_token_share = float(model.kept_patches.float().mean())
        return self.kept.sum(1)

    def find_kept(self) -> Tensor:
        return self.kept

    def start(self, decoder: nn.Module, arguments: tuple):
        if hasattr(decoder, "virtual"):
            raise ValueError(f"{self.name} cannot have virtual tokens, as those of --tune prompt")
        if len(arguments) < 5:  # the fifth is the mask, with which `loss` hides patches
            super().start(decoder, arguments)

    def shorten(self, layer: nn.Module, arguments: tuple) -> tuple:
        return arguments if arguments[3] is None else super().shorten(layer, arguments)  # None: no cache, as in `loss`

    # training

    def loss(
        self, input_ids: Tensor, labels: Tensor, pixel_values: Tensor | None = None,
        vision_features: Tensor | None = None, image_sizes=None,
    ) -> Tensor:  # fmt: skip
        """Llava.forward with hidden patches: the summed cross-entropy + price x kept patches (a float32 scalar)."""
        model = self.model
        if pixel_values is not None:
            vision_features = model.vision_features(pixel_values)
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        supervised, images = target != IGNORE, input_ids == self.image_id
        x = model.embed(input_ids, vision_features, image_sizes)

        def loss_of(gates: Tensor) -> Tensor:
            """The loss of each row, (B,), with gates (N, P) from 0, hidden, to 1."""
            mask = hide(gates, images).to(x.dtype)  # beside queries in float64, a float32 mask gives wrong numbers
            hidden = model.language_model.model(x, None, None, supervised, mask)
            losses = F.cross_entropy(model.language_model.lm_head(hidden).float(), target[supervised], reduction="none")
            return losses.new_zeros(len(x)).index_add(0, supervised.nonzero()[:, 0], losses)

        if vision_features is None:
            return loss_of(x.new_zeros(0)).sum()
        rows = images.nonzero()[:: self.patches, 0]  # (N,) the row of each image
        question = ~images & ((labels != IGNORE).cumsum(1) == 0)  # what stands before the answer
        scores = model.relevance(vision_features.to(x.dtype), x[rows].detach(), question[rows])
        if self.estimator is None or not model.training:
            kept = choose(scores, self.bounds)
            return loss_of(kept.float()).sum() + self.price * kept.sum()
        losses = self.estimator(scores, self.bounds, loss_of, rows)
        return losses.sum() + self.price * expected_count(scores, self.bounds).sum()


def hide(gates: Tensor, images: Tensor) -> Tensor:
    """The mask (B, 1, T, T) that is added to attention scores: causal, and each image token counts `gate` times.

    Each token sees at least itself. Args: gates (N, P) from 0 to 1, of the image tokens `images` (B, T) in order.
    """
    tiny, length = TINY if gates.requires_grad else 0.0, images.shape[1]
    weights = torch.ones(images.shape, dtype=gates.dtype, device=gates.device).masked_scatter(images, gates.flatten())
    below = torch.ones(length, length, dtype=torch.bool, device=gates.device).tril(-1)
    scores = (tiny + (1 - tiny) * weights).log()[:, None, None]  # (B, 1, 1, T)
    itself = torch.full((length, length), -torch.inf, device=gates.device).fill_diagonal_(0)
    return torch.where(below, scores, itself)
