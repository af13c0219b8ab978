"""Gated cross-attention: layers that read the patches of an image are added to the decoder, not tokens to its input.

    ... a cat . <image> a dog . <image> is it ...     one <image> token marks the place of each image
                |-------------| |----------- ...      a token sees the patches of the image before it; the first none

Each gated layer stands before a layer of the decoder and adds to the tokens that see an image

    x = x + tanh(attention_gate) * attention(norm(x), patches)
    x = x + tanh(mlp_gate) * mlp(norm(x))

Both gates start at 0, so a new model computes what the decoder alone computes. Flamingo (Alayrac et al. 2022, arXiv
2204.14198), with LLaMA's norms and MLP as in IDEFICS (transformers' models/idefics/modeling_idefics.py). Tokens before
the first image of a row skip these layers, so no pixel can reach them.

Shapes: B rows, T tokens, N images, P patches, S tokens that see it, H heads, D width of a head, R rows of a cache.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = 8  # gated layers in a deep decoder: one for every fourth of 32 layers, one for each of up to 8


class GatedLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        text, features = config.text_config, config.vision_config.hidden_size
        width, inner, self.head_dim = text.hidden_size, text.num_attention_heads * text.head_dim, text.head_dim
        self.attention_norm = nn.RMSNorm(width, eps=text.rms_norm_eps)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(features, inner, bias=False)
        self.v_proj = nn.Linear(features, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.mlp_norm = nn.RMSNorm(width, eps=text.rms_norm_eps)
        self.gate_proj = nn.Linear(width, text.intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, text.intermediate_size, bias=False)
        self.down_proj = nn.Linear(text.intermediate_size, width, bias=False)
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (N, H, S or P, D)

    def keys_and_values(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, P, D) of patches (N, P, C)."""
        return self.split_heads(self.k_proj(patches)), self.split_heads(self.v_proj(patches))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x (N, S, C) to (N, S, C): the tokens that see each image."""
        x = x.to(self.attention_gate.dtype)  # a frozen decoder may be in 16 bits, while this layer trains in 32
        q = self.split_heads(self.q_proj(self.attention_norm(x)))
        y = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
        x = x + self.attention_gate.tanh() * self.o_proj(y)
        y = self.mlp_norm(x)
        return x + self.mlp_gate.tanh() * self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


@dataclass
class RowImages:
    """Keys and values of the last image of each row that has one: the next tokens of a KV cache see them."""

    rows: Tensor  # (R,)
    used: int  # the cache has at least so many tokens: its image tokens are among them
    keys: list[Tensor] = field(default_factory=list)  # (R, H, P, D) for each gated layer
    values: list[Tensor] = field(default_factory=list)


@dataclass
class Plan:
    """The tokens of one pass of the decoder that see each image."""

    index: Tensor  # (N, S): numbers of tokens in the flattened batch; shorter rows are filled up
    real: Tensor  # (N, S): False where filled up
    patches: Tensor | None  # (N, P, C) of new images; None: keys and values are in `images`
    last: Tensor | None  # (N,): True for the last image of a row
    images: RowImages | None  # of the cache, if there is one


class GatedCrossAttention(nn.Module):
    """The gated layers, and the embedding of the token that marks an image. It is the projector of a Llava."""

    def __init__(self, config):
        super().__init__()
        self.config, count = config, config.text_config.num_hidden_layers
        self.every = max(1, count // LAYERS)  # a gated layer stands before layers every - 1, 2 every - 1, ...
        width = config.text_config.hidden_size
        self.marker = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))
        self.norm = nn.LayerNorm(config.vision_config.hidden_size)  # in place of the norm that ends a resampler
        self.layers = nn.ModuleList(GatedLayer(config) for _ in range(count // self.every))
        self.prompt = None  # patches, row and column of the images of the prompt that was embedded last
        self.plan = None  # of the decoder's current pass; kept for its backward pass, which may run layers again

    def join(self, decoder: nn.Module):
        """Put the gated layers into a built decoder."""
        decoder.embed_tokens.register_forward_pre_hook(self.forget)
        decoder.register_forward_pre_hook(self.start, with_kwargs=True)
        for i, layer in enumerate(decoder.layers[self.every - 1 :: self.every]):
            layer.register_forward_pre_hook(partial(self.read, i))

    def forget(self, *_):
        self.prompt = None

    def __getstate__(self) -> dict:
        """A copy of the model starts without images."""
        return self.__dict__ | {"prompt": None, "plan": None}

    def forward(self, features: Tensor, input_ids: Tensor, embeddings: Tensor) -> Tensor:
        """One token (N, 1, d) for each image; the features (N, P, C) are kept for the decoder's next pass."""
        row, column = (input_ids == self.config.image_token_index).nonzero(as_tuple=True)
        if len(row) == len(features):  # otherwise Llava.embed refuses the prompt
            self.prompt = self.norm(features), row, column
        return self.marker.expand(len(features), 1, -1)

    def start(self, decoder: nn.Module, arguments: tuple, named: dict):
        """Before the decoder reads tokens: plan which of them see which image."""
        (x, *rest), prompt, self.plan = arguments, self.prompt, None
        cache = named.get("cache", rest[1] if len(rest) > 1 else None)
        stored = getattr(cache, "images", None) if cache is not None and cache.used else None
        self.prompt = None
        if stored is not None and (prompt is not None or cache.used < stored.used):
            raise ValueError("gated cross-attention reads all images with the first tokens of a prompt")
        if prompt is not None:
            patches, row, column = prompt
            last = F.pad(row[1:] != row[:-1], (0, 1), value=True)
            images = None if cache is None else RowImages(row[last], cache.used + int(column.max()) + 1)
            self.plan = Plan(*spans(row, column, x.shape[1]), patches, last, images)
        elif stored is not None:
            spread = spans(stored.rows, torch.zeros_like(stored.rows), x.shape[1])
            self.plan = Plan(*spread, None, None, stored)
        if cache is not None:
            cache.images = self.plan and self.plan.images

    def read(self, i: int, layer: nn.Module, arguments: tuple) -> tuple | None:
        """The arguments of a layer of the decoder, its input changed by the gated layer i."""
        (x, *rest), plan, gated = arguments, self.plan, self.layers[i]
        if plan is None:
            return None
        if plan.patches is None:
            keys, values = plan.images.keys[i], plan.images.values[i]
        else:
            keys, values = gated.keys_and_values(plan.patches)
            if plan.images is not None:
                plan.images.keys.append(keys[plan.last])
                plan.images.values.append(values[plan.last])
        flat = x.flatten(0, 1)  # (B T, C)
        seeing = gated(flat[plan.index], keys, values)[plan.real]
        return flat.index_put((plan.index[plan.real],), seeing.to(x.dtype)).view_as(x), *rest


def spans(row: Tensor, column: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`index` and `real` of a Plan: the tokens from each image's own up to the next image of its row, or the row's end.

    Args: row, column (N,): where the images are, in order; length: T.
    """
    end = F.pad(torch.where(row[1:] == row[:-1], column[1:], length), (0, 1), value=length)
    count = end - column
    offset = torch.arange(int(count.max()), device=row.device)
    real = offset < count[:, None]
    return ((row * length + column)[:, None] + offset).where(real, 0), real


def pack_images(parts: list[tuple[object, list[int]]]) -> RowImages | None:
    """The images of a batch that joins some rows of KV caches. Args: parts: caches and their rows, in order."""
    rows, picked, start = [], [], 0
    for cache, kept in parts:
        images = getattr(cache, "images", None)
        if images is not None:
            found = [(kept.index(row), j) for j, row in enumerate(images.rows.tolist()) if row in kept]
            rows += [start + place for place, _ in found]
            picked += [(images, [j for _, j in found])]
        start += len(kept)
    if not rows:
        return None
    device = picked[0][0].rows.device

    def join(name: str) -> list[Tensor]:
        lists = [[stored[chosen] for stored in getattr(images, name)] for images, chosen in picked]
        return [torch.cat(layer) for layer in zip(*lists)]

    return RowImages(torch.tensor(rows, device=device), 0, join("keys"), join("values"))
