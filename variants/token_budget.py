"""Fewer visual tokens per image: sample.py and eval.py --visual-tokens N[:method].

    random[:SEED]   N patches, drawn at random
    uniform         N patches, evenly spread over the image (default)
    cls             the N patches that the vision tower's class token attends to most
    pool            the tokens of all patches, averaged over a grid of m x m areas; N = m * m
    fastv[:K]       all patches in the decoder's first K layers (default 2), then the N that the question looks at most

All but fastv shorten the prompt itself. An image's tokens depend on this image only, not on the others of the batch.
Kept patches stay in their order. Every N that is all patches changes nothing.

Sources: cls as in FasterVLM (Zhang et al. 2024, arXiv 2412.01818) and VisionZip (Yang et al. 2024, 2412.04467), without
the latter's merging; pool as in M3 (Cai et al. 2024, 2405.17430), whose model was trained for it; fastv: Chen et al.
2024 (2403.06764). Shapes: N images, P patches, n of them kept, C width, H heads, D width of a head, S pixels a side;
in the decoder B rows, T tokens, t of them kept, KV key heads, L slots of the cache.
"""

import argparse
import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

METHODS = ("random", "uniform", "cls", "pool", "fastv")
NUMBERED = {"random": 0, "fastv": 2}  # methods that take a number of their own, and its default
PER_PATCH = ("linear", "mlp2x_gelu")  # projectors that give one token for each patch


@dataclass(frozen=True)
class Budget:
    tokens: int  # of an image
    method: str = "uniform"
    number: int = 0  # random: the seed; fastv: the number of layers that read all patches

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
    return Budget(int(tokens), method, int(number or NUMBERED.get(method, 0)))


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
    if budget.method == "fastv":
        if hasattr(model.language_model.model, "virtual"):
            raise ValueError(
                "--visual-tokens: fastv drops tokens of the cache, and knows no prompt or prefix before them"
            )
        FastV(model, budget)
        return
    config.visual_tokens = tokens
    if budget.method == "pool":
        model.multi_modal_projector.register_forward_hook(lambda module, inputs, output: pool_tokens(output, tokens))
    elif budget.method == "cls":
        CLSAttention(model, tokens)
    else:

        def select(tower, inputs, features):  # fmt: skip
            side = math.isqrt(features.shape[1])
            if budget.method == "uniform":
                chosen = [torch.tensor(even_patches(side, tokens))] * len(features)
            else:
                chosen = [random_patches(image, side * side, tokens, budget.number) for image in inputs[0]]
            return keep_patches(model, features, torch.stack(chosen))

        model.vision_tower.register_forward_hook(select)


def check_budget(budget: Budget, config, flag: str = "--visual-tokens"):
    """Raise ValueError, naming the flag, if a model with this LlavaConfig cannot have this budget."""
    vision, tokens = config.vision_config, budget.tokens
    if vision is None:
        raise ValueError(f"{flag}: this model is a decoder without a vision tower")
    if config.relevance_bounds:
        raise ValueError(f"{flag}: this model's question chooses the patches, see docs/relevance.md")
    if config.image_grid_pinpoints:
        raise ValueError(f"{flag}: this model cuts images into tiles, whose tokens depend on the image's size")
    if config.projector_type == "gated_cross_attention":
        raise ValueError(f"{flag}: the attention of this decoder never sees image tokens, so it can drop none")
    if config.projector_type not in PER_PATCH:
        reason = f"the projector {config.projector_type} does not map each patch to one token"
        raise ValueError(f"{flag}: {reason}")
    if tokens > vision.num_patches:
        raise ValueError(f"{flag} {budget}: an image has only {vision.num_patches} patches")
    if budget.method == "pool" and math.isqrt(tokens) ** 2 != tokens:
        lower, most = math.isqrt(tokens), math.isqrt(vision.num_patches)
        near = f"{lower**2} or {(lower + 1) ** 2}" if lower < most else lower**2
        raise ValueError(f"{flag} {budget}: pool needs a square number of tokens, such as {near}")
    layers = config.text_config.num_hidden_layers
    if budget.method == "fastv" and not 0 < budget.number < layers:
        raise ValueError(f"{flag} {budget}: the decoder has {layers} layers, so K is from 1 to {layers - 1}")
    if budget.method == "cls" and config.vision_feature_layer in (0, -1 - vision.num_hidden_layers):
        raise ValueError(f"{flag}: cls needs features of a block, and this model takes those before the first")


# ---------------------------------------------------------------------------------------------------------------------
# which patches are kept


def take_patches(features: Tensor, chosen: Tensor) -> Tensor:
    """Rows (N, n, C) of features (N, P, C). Args: chosen (N, n): which patches, in order."""
    return features.take_along_dim(chosen.to(features.device)[..., None], dim=1)


def keep_patches(model: nn.Module, features: Tensor, chosen: Tensor) -> Tensor:
    """take_patches; model.kept_patches (N, P) says which were kept, until the next images."""
    model.kept_patches = torch.zeros(features.shape[:2], dtype=torch.bool).scatter(1, chosen.cpu(), True)
    return take_patches(features, chosen)


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

    def __init__(self, model: nn.Module, tokens: int):
        """Add the hooks to a Llava."""
        self.model, self.tokens, self.weights = model, tokens, None
        attention = model.vision_tower.vision_model.blocks(model.config.vision_feature_layer)[-1].self_attn
        attention.register_forward_pre_hook(self.read_attention)
        model.vision_tower.register_forward_hook(self.select)

    def read_attention(self, attention: nn.Module, inputs: tuple):
        """Compute the class token's weights (N, P) from the input (N, 1 + P, C) of the block's attention."""
        self.weights = class_attention(attention, inputs[0])

    def select(self, tower: nn.Module, inputs: tuple, features: Tensor) -> Tensor:
        return keep_patches(self.model, features, top_in_order(self.weights, self.tokens))


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


# ---------------------------------------------------------------------------------------------------------------------
# dropping image tokens inside the decoder


class Dropping:
    """Base of FastV and of variants/relevance.py: each row drops image tokens of its own before layer K of the decoder.

    Layers from K on, counted from 0, and their part of the KV cache have the other tokens only, at their original
    positions. Rows that lose different numbers of tokens are moved to the right, so that all end in the last column
    again. Two rows, of which the second has no image and the first keeps 2 image tokens:

        layers before K    w w i i i i w w          i image token, w word, . padding
                           . . . . w w w w
        later              w w i i w w              the longest row has 8 - 2 tokens left
                           . . w w w w

    It answers only, with a KV cache, which must begin with all images of the prompt. Subclasses define `find_counts`
    and `find_kept`.
    """

    name: str  # in errors

    def __init__(self, model: nn.Module, layer: int):
        """Add hooks to a Llava."""
        self.decoder, self.layer, self.patches = (
            model.language_model.model,
            layer,
            model.config.vision_config.num_patches,
        )
        self.image_id, self.embed, self.images, self.features = model.config.image_token_index, model.embed, None, None
        model.embed = self.embed_and_mark  # a bound method: a copy of the model gets a copy of this object
        self.decoder.register_forward_pre_hook(self.start)
        for decoder_layer in self.decoder.layers[layer:]:
            decoder_layer.register_forward_pre_hook(self.shorten)

    def embed_and_mark(self, input_ids: Tensor, vision_features: Tensor | None = None, image_sizes=None) -> Tensor:
        """Llava.embed, which also remembers where the image tokens are, and the features."""
        self.images, self.features = input_ids == self.image_id, vision_features  # (B, T), (N, P, C)
        return self.embed(input_ids, vision_features, image_sizes)

    def find_counts(self, x: Tensor) -> Tensor:
        """Image tokens (B,) that each row keeps of those that `marked` (B, T) shows. Args: x: token embeddings."""
        raise NotImplementedError

    def find_kept(self) -> Tensor:
        """The image tokens (B, T) that stay; called when layer K reads a prompt."""
        raise NotImplementedError

    def start(self, decoder: nn.Module, arguments: tuple):
        """Before the decoder reads tokens: count what is dropped, and give later layers a shorter cache and mask."""
        x, padding, cache = (*arguments, None, None)[:3]
        if cache is None:
            raise ValueError(f"{self.name} needs a KV cache")
        batch, new = x.shape[:2]
        images, self.images = self.images, None
        if cache.used == 0:
            padding = torch.zeros(batch, dtype=torch.long, device=x.device) if padding is None else padding
            self.marked = x.new_zeros(batch, new, dtype=torch.bool) if images is None else images
            self.real = torch.arange(new, device=x.device) >= padding[:, None]  # (B, T)
            lengths = self.real.sum(1) - self.marked.sum(1) + self.find_counts(x)  # (B,) of the rows in later layers
            cache.dropped = new - int(lengths.max())  # columns
            cache.padding = new - cache.dropped - lengths
            for stored in (cache.keys, cache.values):
                for i in range(self.layer, len(stored)):
                    shape = *stored[i].shape[:2], cache.length - cache.dropped, stored[i].shape[3]
                    stored[i] = stored[i].new_zeros(shape)
        elif images is not None and images.any():
            raise ValueError(f"{self.name} reads all images with the first tokens of a prompt")
        self.dropped, self.prefill = cache.dropped, cache.used == 0
        first = 0 if self.prefill else cache.used - cache.dropped
        self.slots = torch.arange(first, cache.used + new - cache.dropped, device=x.device)
        keys, queries = torch.arange(cache.length - cache.dropped, device=x.device), self.slots[:, None]
        real = keys >= cache.padding[:, None, None]
        self.mask = ((keys <= queries) & real | (keys == queries))[:, None]  # as llava.attention_mask

    def shorten(self, layer: nn.Module, arguments: tuple) -> tuple:
        """The arguments of a layer from K on: layer K drops tokens of a prompt, all use the shorter cache and mask."""
        x, rope, _, stored, _, *rest = arguments
        if layer is self.decoder.layers[self.layer] and self.prefill:
            # Columns (B, t) of the tokens that stay, in their order; in shorter rows, others stand in as padding.
            kept = self.real & (~self.marked | self.find_kept())
            index = kept.int().argsort(dim=1, stable=True)[:, self.dropped :]
            x = x.take_along_dim(index[..., None], dim=1)
            self.rope = rope and tuple(angles.take_along_dim(index[:, None, :, None], dim=2) for angles in rope)
        rope = self.rope if self.prefill else rope
        return x, rope, self.mask, stored, self.slots, *rest


class FastV(Dropping):
    """Keeps n tokens for each image of a row: those that the row's last token attends to most in layer K - 1, mean over
    heads."""

    name = "--visual-tokens: fastv"

    def __init__(self, model: nn.Module, budget: Budget):
        super().__init__(model, budget.number)
        self.kept = budget.tokens
        model.visual_token_share = self.mean_share()
        self.decoder.layers[self.layer - 1].register_forward_pre_hook(self.remember)

    def mean_share(self) -> float:
        """Share of the image tokens that a layer reads, mean over layers."""
        layers = len(self.decoder.layers)
        return (self.layer + (layers - self.layer) * self.kept / self.patches) / layers

    def remember(self, layer: nn.Module, arguments: tuple):
        """Keep the input of layer K - 1 until layer K has used it."""
        if self.prefill:
            self.before = arguments

    def find_counts(self, x: Tensor) -> Tensor:
        self.budgets = self.marked.sum(1) // self.patches * self.kept
        return self.budgets

    def find_kept(self) -> Tensor:
        scores, self.before = self.last_attention().masked_fill(~self.marked, -1), None
        return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < self.budgets[:, None]

    def last_attention(self) -> Tensor:
        """Attention (B, T) of the last token to all tokens in layer K - 1, mean over heads, float32."""
        x, rope, mask, (keys, _), *_ = self.before
        layer = self.decoder.layers[self.layer - 1]
        attention, new = layer.self_attn, x.shape[1]
        q = attention.q_proj(layer.input_layernorm(x[:, -1:])).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        if rope is not None:
            cos, sin = (angles[:, :, -1:] for angles in rope)
            first, second = q.float().chunk(2, dim=-1)
            q = q * cos + torch.cat([-second, first], dim=-1) * sin  # as llava.apply_rope
        k = keys[:, :, :new].repeat_interleave(q.shape[1] // keys.shape[1], dim=1)  # grouped-query attention
        scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(attention.head_dim)  # (B, H, 1, T)
        return scores.masked_fill(~mask[:, :, -1:, :new], -torch.inf).softmax(dim=-1).mean(dim=1)[:, 0]
