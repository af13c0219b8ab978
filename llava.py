"""LLaVA, written out: a decoder that reads a picture's features as if they were words.

    picture --CLIP--> 576 features --projector--> 576 tokens --+
                                                               +--> decoder --> answer
    question --embedding--------------------------> tokens ----+

One decoder serves the LLaMA family (LLaMA, Vicuna, Mistral, Qwen2) and GPT-2; the differences are switches of
TextConfig. Parameter names are those of Hugging Face's LLaMA and LLaVA files.

Sources: Liu et al. 2023 (arXiv 2304.08485, 2310.03744), Touvron et al. 2023 (2302.13971), Su et al. 2021 (RoPE,
2104.09864), Ainslie et al. 2023 (GQA, 2305.13245), Radford et al. 2019 (GPT-2).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from clip import CLIPVisionConfig, CLIPVisionModel
from fast.linear import Linear, attend, attend_alone, lean, need_compiler, normed, prepare, projected
from fast.step import Step, as_graph, unguarded
from fast.tied import TiedEmbedding, TiedHead
from inputs.templates import IGNORE
from variants.anyres import Size, pack_tiles, tile_grid

LOSS_CHUNK = 4096  # supervised tokens whose logits exist at one time


@dataclass
class TextConfig:
    """Shape of the decoder. Names and defaults are those of transformers' LlamaConfig, for files that omit a field."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # fewer than the query heads: grouped-query attention
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # LLaMA-3.1's stretched frequencies, or "linear": see inverse_frequencies
    tie_word_embeddings: bool = False
    model_type: str = "llama"  # "gpt2" switches to LayerNorm, learned positions, gelu_new and biases everywhere
    attention_bias: bool = False  # on q, k, v and o
    qkv_bias: bool = False  # on q, k and v only, as in Qwen2

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads or (self.head_dim % 2 and not self.gpt2):
            raise ValueError("num_key_value_heads does not divide num_attention_heads, or head_dim is odd")

    @property
    def gpt2(self) -> bool:
        return self.model_type == "gpt2"


@dataclass
class LlavaConfig:
    """A checkpoint's whole description, in the schema of transformers' LlavaConfig plus a few keys of ours."""

    text_config: TextConfig
    vision_config: CLIPVisionConfig | None = None  # None: a decoder alone, that sees nothing
    image_token_index: int = 32000  # written once per visual feature; its embedding is never read
    vision_feature_layer: int = -2
    projector_type: str = "mlp2x_gelu"  # or "linear", as in LLaVA-1.0
    template: str = "vicuna_v1"  # the conversation template the decoder was trained with
    image_mode: str = "pad"  # or "square", or "anyres": how a picture is made square
    image_grid_pinpoints: list[list[int]] | None = None  # canvases (height, width) that anyres cuts into tiles
    eos_token_ids: list[int] = field(default_factory=lambda: [2])
    pad_token_id: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# the decoder's parts


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight, the division in float32 whatever x is (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    return weight * F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype)


class KeepingInput(torch.autograd.Function):
    """rms_norm that keeps nothing but x for the gradients: with n = x / rms(x), d the gradient of n, and the mean over
    a token's numbers, that of x is (d - n mean(n d)) / rms(x)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight = (tensor.float() for tensor in ctx.saved_tensors)
        scale = (x.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()  # 1 / rms(x)
        n, d = x * scale, gradient * weight
        of_x = (d - n * (n * d).mean(-1, keepdim=True)) * scale
        of_weight = (gradient * n).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None  # in float32: autograd rounds them to what x and weight are


class RMSNorm(nn.Module):
    """LLaMA's norm: of each token alone, and without a mean or a bias."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = KeepingInput.apply if torch.is_grad_enabled() else rms_norm
        return norm(x, self.weight, self.eps)


def make_norm(config: TextConfig) -> nn.Module:
    norm = nn.LayerNorm if config.gpt2 else RMSNorm
    return norm(config.hidden_size, eps=config.rms_norm_eps)


def inverse_frequencies(config: TextConfig, device: torch.device) -> torch.Tensor:
    """Radians per position of each rotated pair, (D / 2,) float32: theta^(-2i / D), stretched for long contexts.

    "linear" (Vicuna-16k) divides all of them. "llama3" divides those whose wave is longer than the context it was
    pretrained with, leaves the short ones, and blends in between (LLaMA-3.1's model card and code).
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = config.rope_theta**-exponent
    if (scaling := config.rope_scaling) is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)  # in the original context
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies


def rotary_angles(positions: torch.Tensor, config: TextConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rotate` multiplies with, twice (B, 1, T, D) float32: cos, and sin with its first half negative.

    Args: positions (B, T).
    """
    angles = positions[:, None, :, None].float() * inverse_frequencies(config, positions.device)  # (B, 1, T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D/2) of x (B, H, T, D): Hugging Face's half-split layout, not Meta's interleaved one."""
    across = x.roll(x.shape[-1] // 2, dims=-1).mul_(sin.to(x.dtype))
    return (x * cos.to(x.dtype)).add_(across)


class KVCache:
    """Keys and values of everything read so far, with room for `length` positions.

    `used` is the only source of a token's position, for the mask and for RoPE alike. layers: keys and values, each
    (B, KV, length, D), of every layer.
    """

    def __init__(self, config: TextConfig, batch: int, length: int, like: torch.Tensor):
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_hidden_layers)]
        self.length, self.used = length, 0
        self.ids = []  # of a single row: what has been read, for the next turn of its conversation

    def grow(self, length: int):
        """Make room for more positions."""
        if length > self.length:
            self.layers = [tuple(F.pad(x, (0, 0, 0, length - self.length)) for x in layer) for layer in self.layers]
            self.length = length

    def rewind(self, ids: list[int], picture: int):
        """Keep what a prompt has in common with what was read, if that has all its pictures; `picture`: their token."""
        same = [a == b for a, b in zip(self.ids, ids[:-1])]  # its last token is read in any case
        self.used = same.index(False) if False in same else len(same)
        if picture in ids[self.used :]:
            self.used = 0
        self.ids = ids[: self.used]


class Attention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads < config.num_attention_heads
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: torch.Tensor, angles, mask: torch.Tensor | None, cached: tuple | None) -> torch.Tensor:
        """Args: cached: None, or keys and values (B, KV, length, D) of this layer, and the places (T,) of x there."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or KV, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cached is not None:
            keys, values, places = cached
            keys.index_copy_(2, places, k)
            values.index_copy_(2, places, v)
            if mask is not None:  # else these tokens are the first, and look at nothing but themselves
                k, v = keys, values
        if x.shape[1] == 1:  # heads that share keys, as tokens of one head: read once for all of them
            q = q.reshape(*k.shape[:2], -1, self.head_dim)  # (B, KV, H / KV, D)
            y = attend_alone(q, k, v, mask)
            return self.o_proj(y.reshape(len(x), 1, -1))
        # Without a mask the kernel may take its fast path.
        y = attend(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return projected(self.down_proj, lambda gate, up: F.silu(gate) * up, self.gate_proj(x), self.up_proj(x))


class GeluMLP(nn.Module):
    """GPT-2's MLP; its gelu_new is the tanh approximation."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return projected(self.down_proj, lambda up: F.gelu(up, approximate="tanh"), self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = GeluMLP(config) if config.gpt2 else SwiGLU(config)

    def forward(self, x: torch.Tensor, angles, mask, cached, keep=None) -> torch.Tensor:
        x = x + self.self_attn(normed(self.input_layernorm, x), angles, mask, cached)
        if keep is not None:  # others have only been here for their keys and values
            x = x[keep]  # (N, C)
        return x + self.mlp(normed(self.post_attention_layernorm, x))


def attention_mask(padding: torch.Tensor, places: torch.Tensor, length: int) -> torch.Tensor:
    """Who may look at whom in a left-padded batch: (B, 1, T, length), True where allowed.

    Row of two paddings and three tokens, read at once into a cache of seven positions:

        # . . . . . .      a padding looks at itself only, so that its softmax is not empty
        . # . . . . .
        . . # . . . .      a token looks at the tokens up to itself
        . . # # . . .
        . . # # # . .

    Args: padding (B,) counts the paddings at the left of each row; places (T,) are those of the new tokens.
    """
    keys, queries = torch.arange(length, device=places.device), places[:, None]
    real = keys >= padding[:, None, None]  # (B, 1, length)
    return ((keys <= queries) & real | (keys == queries))[:, None]


class Decoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        embedding = TiedEmbedding if config.tie_word_embeddings else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        if config.gpt2:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.recompute = False  # in training: keep only what goes into a layer, and run it again for the gradients
        self.watch = None  # in training: is told what comes out of each layer, see heap.GiveBack
        self.norm = make_norm(config)
        self.compiled = None  # a layer's forward for one token of an answer, see compile_decoding
        self.record = None  # what to make of a token's step once it is warm, see step.py

    def forward(
        self,
        embeddings: torch.Tensor,
        padding: torch.Tensor | None = None,
        cache: KVCache | None = None,
        keep=None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, C) of T new token embeddings (B, T, C), after what the cache holds.

        Args: padding (B,): paddings at the left of each row, for generating in batches; None: none. In training rows
        are padded at the right, where causality already hides the padding, and no mask is needed. keep: an index of
        (B, T), such as a mask, of the N tokens whose states (N, C) are asked for: the last MLP reads no others.
        places (T,): those of the new tokens in the cache, if they are in a tensor already.
        """
        batch, new = embeddings.shape[:2]
        start = cache.used if cache is not None else 0
        if start + new > (limit := cache.length if cache is not None else self.config.max_position_embeddings):
            raise ValueError(f"{start + new} tokens do not fit: the context holds {limit}")
        if places is None:
            places = torch.arange(start, start + new, device=embeddings.device)
        positions, mask = places.expand(batch, new), None
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)
        if padding is not None or start > 0:
            none = places.new_zeros(1) if padding is None else padding
            mask = attention_mask(none, places, limit if cache is not None else new)
        x, angles = embeddings, None
        if self.config.gpt2:
            x = x + self.embed_positions(positions)
        else:
            angles = rotary_angles(positions, self.config)
        kept = [None] * len(self.layers) if cache is None else [(*layer, places) for layer in cache.layers]
        for layer, memory in zip(self.layers, kept):
            asked = keep if layer is self.layers[-1] else None
            if self.recompute and self.training:
                x = checkpoint(layer, x, angles, mask, memory, asked, use_reentrant=False)
            elif self.compiled and cache is not None and new == 1:
                x = self.compiled(layer, x, angles, mask, memory, asked)
            else:
                x = layer(x, angles, mask, memory, asked)
            if self.watch and self.training:
                self.watch(x)
        if cache is not None:
            cache.used += new
        return self.norm(x)


class CausalLM(nn.Module):
    """The decoder and its head, named as in LlamaForCausalLM's files."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.model = Decoder(config)
        if config.tie_word_embeddings:
            self.lm_head = TiedHead(self.model.embed_tokens)
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self.initialize)

    def initialize(self, module: nn.Module):
        """Normal(width^-1/2), what writes into the residual stream shrunk by its depth. GPT-2's 0.02 is meant for its
        width: at 128 it leaves attention uniform for hundreds of steps (loss after 200 steps 0.80 against 0.55)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, DecoderLayer):  # apply() visits children first, so this has the last word
            for branch in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(
                    branch.weight, std=(branch.in_features * 2 * self.model.config.num_hidden_layers) ** -0.5
                )


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA


PROJECTORS = {"linear": 1, "mlp2x_gelu": 2}  # projector_type: number of linear layers, a GELU between each two


class Projector(nn.Module):
    """Maps visual features (..., vision width) to token embeddings (..., decoder width): linear layers with GELUs."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        if config.projector_type not in PROJECTORS:
            raise ValueError(f"projector_type {config.projector_type!r} is none of {', '.join(PROJECTORS)}")
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        for i in range(1, PROJECTORS[config.projector_type]):
            self.add_module(f"linear_{i + 1}", nn.Linear(width, width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        first, *others = self.children()
        x = first(features)
        for linear in others:
            x = linear(F.gelu(x))
        return x


class Llava(nn.Module):
    """Vision tower, projector and decoder; without a vision_config, a decoder alone behind the same interface."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.language_model = CausalLM(config.text_config)
        if config.vision_config is not None:
            self.vision_tower = CLIPVisionModel(config.vision_config)
            self.multi_modal_projector = Projector(config)
        if config.image_grid_pinpoints:  # LLaVA-1.6: what stands at the end of a row of tiles
            width = config.text_config.hidden_size
            self.image_newline = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.lm_head.weight.dtype

    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the tower sees in N pictures (N, 3, S, S): (N, P, C) of the layer the config names, usually -2."""
        dtype = next(self.vision_tower.parameters()).dtype
        return self.vision_tower(pixel_values.to(dtype), self.config.vision_feature_layer)

    def picture_tokens(self, vision_features: torch.Tensor, image_sizes: list[Size] | None) -> torch.Tensor:
        """Features (N, P, C) as the tokens (T, C) of all pictures in order; image_sizes only where there are tiles."""
        tokens, config = self.multi_modal_projector(vision_features), self.config
        if not config.image_grid_pinpoints:
            return tokens.flatten(0, 1)
        grids = [tile_grid(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in image_sizes]
        tiles = tokens.split([1 + rows * columns for rows, columns in grids])
        return torch.cat([pack_tiles(*picture, self.image_newline) for picture in zip(tiles, image_sizes, grids)])

    def embed(
        self,
        input_ids: torch.Tensor,
        vision_features: torch.Tensor | None = None,
        image_sizes: list[Size] | None = None,
    ) -> torch.Tensor:
        """Token embeddings (B, T, C), the projected features in the place of the image tokens, in order.

        Args: input_ids (B, T); vision_features (N, P, C) of the batch's N pictures, row by row, or None; image_sizes
        (height, width) of the pictures, if they come in tiles, of which N then is the number.
        Raises ValueError if the placeholders are not as many as the tokens: the wrong text would get the picture.
        """
        places = input_ids == self.config.image_token_index
        embed_tokens = self.language_model.model.embed_tokens
        x = embed_tokens(input_ids.masked_fill(places, 0))
        tokens = None if vision_features is None else self.picture_tokens(vision_features.to(x.dtype), image_sizes)
        count = 0 if tokens is None else len(tokens)
        if int(places.sum()) != count:
            raise ValueError(f"{int(places.sum())} image tokens for {count} visual features")
        if count:
            return x.masked_scatter(places[..., None], tokens.to(x.dtype))  # autocast may have narrowed them
        if self.training and self.config.vision_config is not None:
            # A batch of text only must still touch all that pictures train: other ranks wait for its gradients.
            seen = [p for name, p in self.named_parameters() if not name.startswith("language_model.")]
            x = x + 0 * sum(p.flatten()[0] for p in seen if p.requires_grad)
        return x

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_sizes: list[Size] | None = None,
    ) -> torch.Tensor:
        """Summed cross-entropy (a float32 scalar) over the supervised tokens of a right-padded batch.

        Args: input_ids, labels (B, T), labels IGNORE where nothing is learned; pictures as pixel_values (N, 3, S, S) or
        as vision_features (N, P, C) computed before, image_sizes as in embed. The caller divides by the number of
        supervised tokens, which only it knows over all micro-batches and ranks. Equation 3 of the LLaVA paper, before
        the mean.
        """
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # the state at t predicts the token at t + 1
        supervised = target != IGNORE
        with lean():
            if pixel_values is not None:
                vision_features = self.vision_features(pixel_values)
            hidden = self.language_model.model(self.embed(input_ids, vision_features, image_sizes), keep=supervised)
            return summed_cross_entropy(self.language_model.lm_head, hidden, target[supervised])


class CrossEntropy(torch.autograd.Function):
    """torch's cross_entropy of logits (N, V) in float32, summed. But the gradient, the softmax less one at the target,
    takes the place of the softmax's logarithms, where torch makes two more of that size. RuntimeError if it is asked
    for twice."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logarithms = logits.float().log_softmax(dim=-1)
        ctx.save_for_backward(logarithms, target)
        return F.nll_loss(logarithms, target, reduction="sum")

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        logarithms, target = ctx.saved_tensors
        if logarithms._version:
            raise RuntimeError("the gradient of this loss was made before, in the place of what it is made of")
        of_logits = logarithms.exp_().mul_(gradient)
        of_logits[torch.arange(len(target), device=target.device), target] -= gradient
        return of_logits, None


def summed_cross_entropy(head: nn.Linear, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum over N tokens of -log p(target): hidden (N, C), target (N,) of ids. Zero, with gradients, if N is zero.

    LLaMA-3's logits of 4,096 tokens take 2 GB in float32; past LOSS_CHUNK they are made chunk by chunk, and again in
    the backward pass, so that no more than one chunk is ever held.
    """

    def part(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return CrossEntropy.apply(head(hidden), target)

    if len(target) <= LOSS_CHUNK:
        return part(hidden, target)
    chunks = zip(hidden.split(LOSS_CHUNK), target.split(LOSS_CHUNK))
    return sum(checkpoint(part, h, t, use_reentrant=False) for h, t in chunks)


# ---------------------------------------------------------------------------------------------------------------------
# answering


def choose(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Next ids (B,) from logits (B, V): temperature, then top-k, then top-p, then a draw; temperature 0 is greedy.

    top_k 0 and top_p 1 keep everything. top_p keeps the smallest set whose probability reaches it (Holtzman 2019).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probabilities, ids = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # the mass of likelier tokens
    before[:, 0] = -1  # the likeliest always stays
    probabilities[before >= top_p] = 0
    return ids.gather(1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


@torch.inference_mode()
def generate(
    model: Llava,
    prompts: list[list[int]],
    vision_features: torch.Tensor | None = None,
    image_sizes: list[Size] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
):
    """Answer a batch of prompts; yields, step by step, one list with each row's next id, None once a row has ended.

    The end token itself is yielded, so that a caller can tell "eos" from "length". Rows are padded at the left, each
    stops at its own end token, and every row gets the ids it would get alone.

    Args: prompts: ids with the image placeholders expanded; vision_features (N, P, C) of their pictures, in order;
    image_sizes as in Llava.embed. cache: of a conversation about the same pictures; then there is one prompt, and
    what the cache holds of it is not read again.
    Raises ValueError if a prompt leaves no room for an answer in the context.
    """
    config, longest = model.config, max(map(len, prompts))
    room = config.text_config.max_position_embeddings - longest
    if room < 1:
        limit = config.text_config.max_position_embeddings
        raise ValueError(f"the prompt is {longest} tokens long, picture included; the context holds {limit}")
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=model.device)
    rows = [[config.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    steps = min(max_new_tokens, room)
    if cache is None:
        cache = KVCache(config.text_config, len(prompts), 0, like=model.language_model.model.embed_tokens.weight)
    cache.grow(longest + steps)
    cache.rewind(prompts[0], config.image_token_index)
    if cache.used:
        vision_features = image_sizes = None  # have been read
    new = [row[cache.used :] for row in rows]
    x = model.embed(torch.tensor(new, device=model.device), vision_features, image_sizes)
    padding = padding if padding.any() else None
    running, step = [True] * len(prompts), Step(model.language_model, padding, cache)
    logits = step.read(x)
    for left in reversed(range(steps)):
        cache.ids += new[0]
        logits[:, config.image_token_index :][:, :1] = -torch.inf  # a placeholder is not a word
        ids = choose(logits, temperature, top_k, top_p, generator)
        new = [[i] for i in ids.tolist()]
        yield [i if alive else None for (i,), alive in zip(new, running)]
        running = [alive and i not in config.eos_token_ids for (i,), alive in zip(new, running)]
        if not left or not any(running):
            return
        logits = step(ids)


def compile_decoding(model: Llava):
    """Let torch.compile write what a layer does for one token of an answer; one layer stands for all, so it takes
    seconds. A GPU runs all of them as one graph then. Raises ValueError without a compiler."""
    need_compiler(model.device)
    prepare(model)
    decoder = model.language_model.model
    decoder.compiled = torch.compile(DecoderLayer.forward)
    decoder.record = as_graph if model.device.type == "cuda" else unguarded
    model.language_model.lm_head.compile()
