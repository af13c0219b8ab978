"""LLaVA, written out: a decoder that reads the features of an image like the embeddings of words.

    image ----CLIP----> 576 features --projector--> 576 tokens --+
                                                                 +--> decoder --> answer
    question --embedding--------------------------> tokens ------+

One decoder serves the LLaMA family (LLaMA, Vicuna, Mistral, Qwen2) and GPT-2; TextConfig's fields switch between them.
Parameter names are those of Hugging Face's LLaMA and LLaVA files. Shapes at the end of a line: B rows, T tokens, L
slots of the cache, C width, H query heads, KV key heads, D width of a head, N images or chosen tokens, P patches of an
image, S pixels a side, V vocabulary.

Sources: Liu et al. 2023 (LLaVA, arXiv 2304.08485 and 2310.03744), Touvron et al. 2023 (LLaMA, 2302.13971), Su et al.
2021 (RoPE, 2104.09864), Ainslie et al. 2023 (GQA, 2305.13245), Radford et al. 2019 (GPT-2).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip import CLIPVisionConfig, CLIPVisionModel
from variants.anyres import Size, pack_tiles, tile_grid
from variants.connectors import CONNECTORS, ONE_TOKEN, READ_PROMPT, add_whitening, check_tokens
from variants.relevance import add_relevance

IGNORE = -100  # label of a token that is not trained on; F.cross_entropy's ignore_index
LOSS_CHUNK = 4096  # the loss computes the logits of at most this many tokens at a time
PROJECTORS = {"linear": 1, "mlp2x_gelu": 2}  # number of linear layers; LLaVA-1.0 has the first, 1.5 the second


@dataclass
class TextConfig:
    """Shape of the decoder. Names, and defaults for files that omit a field, are those of transformers' LlamaConfig."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # default: as many as query heads; fewer is grouped-query attention
    head_dim: int | None = None  # default: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # stretches RoPE for long contexts, see rope_frequencies
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
    """Everything a checkpoint says about itself: the schema of transformers' LlavaConfig plus a few keys of ours."""

    text_config: TextConfig
    vision_config: CLIPVisionConfig | None = None  # None: a decoder alone, without a vision tower
    image_token_index: int = 32000  # id of the placeholder, one for each image token; its embedding is not used
    vision_feature_layer: int = -2  # the tower's hidden state that is used: the output of the block before the last
    projector_type: str = "mlp2x_gelu"  # one of PROJECTORS, or of CONNECTORS, which change the number of tokens
    whitening: bool = False  # a linear layer before a connector, which --whiten starts
    relevance_bounds: list[float] | None = None  # least and most share of the patches that a question keeps
    visual_tokens: int | None = None  # of an image, if not one for each patch: CONNECTORS, variants/token_budget.py
    template: str = "vicuna_v1"  # the conversation template the decoder was trained with
    image_mode: str = "pad"  # how an image is made square: "pad", "square" (center crop) or "anyres" (tiles)
    image_grid_pinpoints: list[list[int]] | None = None  # canvas sizes (height, width) that anyres cuts into tiles
    lora_images_only: bool = False  # an adapter's updates apply to rows with an image only: variants/image_lora.py
    eos_token_ids: list[int] = field(default_factory=lambda: [2])
    answer_start_ids: list[int] = field(default_factory=list)  # the template's text before an answer, for qformer_text
    pad_token_id: int = 0

    @property
    def tokens_per_image(self) -> int:
        """Tokens, and placeholders, of an image or tile; 0 without a vision tower."""
        if self.vision_config is None:
            return 0
        return 1 if self.projector_type in ONE_TOKEN else self.visual_tokens or self.vision_config.num_patches


# ---------------------------------------------------------------------------------------------------------------------
# the parts of a decoder layer


class RMSNorm(nn.Module):
    """x / rms(x) * weight, normalized in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normalized = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return self.weight * normalized.to(x.dtype)


def make_norm(config: TextConfig) -> nn.Module:
    norm = nn.LayerNorm if config.gpt2 else RMSNorm
    return norm(config.hidden_size, eps=config.rms_norm_eps)


def rope_frequencies(config: TextConfig, device: torch.device) -> Tensor:
    """Radians per position by which pair i of a head is rotated, (D / 2,) float32: theta^(-2i / D).

    RoPE rotates pairs of numbers in queries and keys by angles in proportion to the token's position, so that the
    product of a query and a key depends on the distance between the two tokens, not on where they stand.
    For longer contexts than the trained ones, rope_type "linear" (Vicuna-16k) divides all frequencies by a factor.
    "llama3" divides the low ones, leaves the high ones, and blends in between (LLaMA-3.1's model card and code).
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = config.rope_theta**-exponent
    if (scaling := config.rope_scaling) is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)  # within the trained context
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided, 1: left as it is
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies


def rope_angles(positions: Tensor, config: TextConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, (B, 1, T, D) float32 each. Args: positions (B, T)."""
    angles = positions[:, None, :, None].float() * rope_frequencies(config, positions.device)  # (B, 1, T, D / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, T, D) in pairs of numbers i and i + D/2, as in Hugging Face's files (Meta's pair neighbors)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)  # x, rotated by 90 degrees
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class KVCache:
    """Keys and values of all tokens read so far, padding included: `used` of `length` slots are filled."""

    def __init__(self, config: TextConfig, batch: int, length: int, like: Tensor):
        """An empty cache in the dtype and on the device of `like`."""
        shape, layers = (batch, config.num_key_value_heads, length, config.head_dim), range(config.num_hidden_layers)
        self.keys = [like.new_zeros(shape) for _ in layers]  # (B, KV, L, D) for each layer; written in place
        self.values = [like.new_zeros(shape) for _ in layers]
        self.length, self.used = length, 0

    def grow(self, length: int):
        """Make room for `length` slots, keeping what is stored."""
        if length > self.length:
            more = (0, 0, 0, length - self.length)  # nothing along D, new slots along L
            self.keys = [F.pad(keys, more) for keys in self.keys]
            self.values = [F.pad(values, more) for values in self.values]
            self.length = length


class Attention(nn.Module):
    """Multi-head self-attention; with fewer key heads than query heads, groups of query heads share a key head."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads < config.num_attention_heads
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, rope, mask, cache, slots) -> Tensor:
        """x (B, T, C) to (B, T, C), for T tokens that follow those in the cache.

        Args: rope: (cos, sin) of apply_rope, or None; mask (B, 1, T, L), or None for causal attention, which needs no
        mask in memory; cache: this layer's keys and values (B, KV, L, D), or None; slots (T,): those of x in it.
        """
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or KV, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = (stored.index_copy_(2, slots, new) for stored, new in zip(cache, (k, v)))  # (B, KV, L, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class SwiGLU(nn.Module):
    """LLaMA's MLP: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GeluMLP(nn.Module):
    """GPT-2's MLP; its activation, gelu_new, is the tanh approximation of GELU."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class DecoderLayer(nn.Module):
    """Attention, then an MLP; each reads the normalized x and adds its result to x."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = GeluMLP(config) if config.gpt2 else SwiGLU(config)

    def forward(self, x: Tensor, rope, mask, cache, slots, keep=None) -> Tensor:
        """x (B, T, C) to (B, T, C), or to (N, C) if keep (B, T) marks N tokens; other arguments as in Attention."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, slots)
        if keep is not None:
            x = x[keep]
        return x + self.mlp(self.post_attention_layernorm(x))


# ---------------------------------------------------------------------------------------------------------------------
# the decoder


def attention_mask(padding: Tensor, slots: Tensor, length: int) -> Tensor:
    """The mask of a left-padded batch, (B, 1, T, length): True where a token may attend to a slot of the cache.

    A row of two padding tokens and three real ones, read into an empty cache of seven slots:

        # . . . . . .      a padding token attends to itself only: an empty softmax would be NaN
        . # . . . . .
        . . # . . . .      a real token attends to the real tokens up to itself
        . . # # . . .
        . . # # # . .

    Args: padding (B,): number of padding tokens at the left of each row; slots (T,): those of the tokens being read.
    """
    keys, queries = torch.arange(length, device=slots.device), slots[:, None]  # (length,), (T, 1)
    real = keys >= padding[:, None, None]  # (B, 1, length)
    return ((keys <= queries) & real | (keys == queries))[:, None]


class Decoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.gpt2:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.recompute = False  # in training, store each layer's input only and run the layer again in backward

    def forward(
        self, x: Tensor, padding: Tensor | None = None, cache: KVCache | None = None, keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Normalized states (B, T, C) of T token embeddings x (B, T, C), which follow the tokens in the cache.

        Args: padding (B,): padding tokens at the left of each row, when answering in batches. Training pads at the
        right, where causality hides the padding and no mask is needed. keep (B, T): True for the N tokens whose states
        (N, C) are returned; the last layer's MLP runs for no others. mask (B, 1, T, T): replaces causal attention.
        """
        return self.run_layers(x, *self.place(x, padding, cache, mask), cache, keep)

    def place(self, x: Tensor, padding: Tensor | None, cache: KVCache | None, mask: Tensor | None = None):
        """Slots (T,) in the cache and positions (B, T) of new tokens, and their mask or None; arguments of forward."""
        batch, new = x.shape[:2]
        start, limit = (0, self.config.max_position_embeddings) if cache is None else (cache.used, cache.length)
        if start + new > limit:
            raise ValueError(f"{start + new} tokens do not fit: the context holds {limit}")
        slots = torch.arange(start, start + new, device=x.device)
        positions = slots.expand(batch, new)
        if padding is not None or cache is not None:
            padding = slots.new_zeros(batch) if padding is None else padding
            mask = attention_mask(padding, slots, new if cache is None else limit)
            positions = (slots - padding[:, None]).clamp(min=0)  # 0 is the first real token of a row
        return slots, positions, mask

    def run_layers(self, x: Tensor, slots: Tensor, positions: Tensor, mask, cache, keep) -> Tensor:
        """The states that forward returns; slots, positions and mask are those of `place`."""
        rope = None
        if self.config.gpt2:
            x = x + self.embed_positions(positions)
        else:
            rope = rope_angles(positions, self.config)
        recompute = self.recompute and self.training
        for i, layer in enumerate(self.layers):
            stored = None if cache is None else (cache.keys[i], cache.values[i])
            last = i == len(self.layers) - 1  # the layers before it need the keys and values of all tokens
            arguments = (x, rope, mask, stored, slots, keep if last else None)
            x = checkpoint(layer, *arguments, use_reentrant=False) if recompute else layer(*arguments)
        if cache is not None:
            cache.used += len(slots)
        return self.norm(x)


class CausalLM(nn.Module):
    """The decoder and its head, which maps a state to the logits of the next token."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:  # one matrix serves as embedding and head (Press & Wolf 2016, arXiv 1608.05859)
            self.lm_head.weight = self.model.embed_tokens.weight
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module):
        """Normal, with std width^-1/2. The last matrix of each residual branch is smaller in deeper models.

        GPT-2's constant 0.02 suits its width: at a width of 128, attention would stay uniform for hundreds of steps.
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, DecoderLayer):  # apply() visits children first, so this overwrites what they drew
            branches = 2 * self.model.config.num_hidden_layers
            for last in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(last.weight, std=(last.in_features * branches) ** -0.5)


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA


class Projector(nn.Module):
    """Maps each feature to a token of the decoder's width: one linear layer, or two with a GELU between them."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        if config.projector_type not in PROJECTORS:
            choices = ", ".join([*PROJECTORS, *CONNECTORS])
            raise ValueError(f"projector_type {config.projector_type!r} is none of {choices}")
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.linear_2 = nn.Linear(width, width) if PROJECTORS[config.projector_type] == 2 else None

    def forward(self, features: Tensor) -> Tensor:
        x = self.linear_1(features)
        return x if self.linear_2 is None else self.linear_2(F.gelu(x))


class Llava(nn.Module):
    """Vision tower, projector and decoder; without a vision_config, a decoder alone behind the same interface."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.language_model = CausalLM(config.text_config)
        if config.vision_config is not None:
            self.vision_tower = CLIPVisionModel(config.vision_config)
            check_tokens(config.projector_type, config.visual_tokens, config.vision_config.num_patches)
            self.multi_modal_projector = CONNECTORS.get(config.projector_type, Projector)(config)
            if config.whitening:
                add_whitening(self.multi_modal_projector, config)
            if config.projector_type == "gated_cross_attention":  # adds layers to the decoder, not tokens to its input
                self.multi_modal_projector.join(self.language_model.model)
        if config.image_grid_pinpoints:  # LLaVA-1.6: a learned token at the end of each row of an image's features
            width = config.text_config.hidden_size
            self.image_newline = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))
        if config.relevance_bounds:  # the question decides which patches the decoder reads
            add_relevance(self)

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.lm_head.weight.dtype

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """Features (N, P, C) of N images or tiles (N, 3, S, S)."""
        dtype = next(self.vision_tower.parameters()).dtype
        return self.vision_tower(pixel_values.to(dtype), self.config.vision_feature_layer)

    def image_tokens(self, vision_features: Tensor, image_sizes: list[Size] | None, *prompt: Tensor) -> Tensor:
        """Project features (N, P, C); returns the tokens (T, C) of all images in order.

        Args: image_sizes as in embed; prompt: its ids (B, T) and their embeddings, which some connectors read.
        """
        config = self.config
        read = prompt if config.projector_type in READ_PROMPT else ()
        tokens = self.multi_modal_projector(vision_features, *read)
        if not config.image_grid_pinpoints:
            return tokens.flatten(0, 1)
        grids = [tile_grid(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in image_sizes]
        images = zip(tokens.split([1 + rows * columns for rows, columns in grids]), image_sizes, grids)
        return torch.cat([pack_tiles(tiles, size, grid, self.image_newline) for tiles, size, grid in images])

    def embed(
        self, input_ids: Tensor, vision_features: Tensor | None = None, image_sizes: list[Size] | None = None
    ) -> Tensor:
        """Token embeddings (B, T, C), in which the projected features replace the placeholders in order.

        Args: input_ids (B, T); vision_features (N, P, C) of all images of the batch, row by row, or None; image_sizes
        (height, width) of each image, needed only if images are cut into tiles.
        Raises ValueError if placeholders and image tokens differ in number.
        """
        placeholders = input_ids == self.config.image_token_index
        x = self.language_model.model.embed_tokens(input_ids.masked_fill(placeholders, 0))  # 0: any valid id
        tokens = ()
        if vision_features is not None:
            tokens = self.image_tokens(vision_features.to(x.dtype), image_sizes, input_ids, x)
        count = len(tokens)
        if int(placeholders.sum()) != count:
            raise ValueError(f"{int(placeholders.sum())} image tokens for {count} visual features")
        if count:
            return x.masked_scatter(placeholders[..., None], tokens.to(x.dtype))  # autocast may have cast the tokens
        if self.training and self.config.vision_config is not None:
            # DDP waits for a gradient of every trained parameter, also after a batch without any image.
            unused = [p for name, p in self.named_parameters() if not name.startswith("language_model.")]
            x = x + 0 * sum(p.flatten()[0] for p in unused if p.requires_grad)
        return x

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        vision_features: Tensor | None = None,
        image_sizes: list[Size] | None = None,
    ) -> Tensor:
        """Summed cross-entropy (a float32 scalar) over the supervised tokens of a right-padded batch.

        The caller divides it by the number of supervised tokens of all micro-batches and ranks.

        Args: input_ids, labels (B, T), with labels IGNORE where nothing is trained; images as pixel_values
        (N, 3, S, S), or as vision_features (N, P, C) if they were computed before; image_sizes as in embed.
        """
        batch = (input_ids, labels, pixel_values, vision_features, image_sizes)
        return summed_cross_entropy(self.language_model.lm_head, *self.supervised_states(*batch))

    def supervised_states(
        self, input_ids: Tensor, labels: Tensor, pixel_values=None, vision_features=None, image_sizes=None
    ) -> tuple[Tensor, Tensor]:
        """The states (N, C) that predict a supervised token, row by row, and the ids (N,) of these tokens."""
        if pixel_values is not None:
            vision_features = self.vision_features(pixel_values)
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # the state of token t predicts token t + 1
        supervised = target != IGNORE
        x = self.embed(input_ids, vision_features, image_sizes)
        hidden = self.language_model.model(x, keep=supervised)  # (N, C): the other tokens need no logits
        return hidden, target[supervised]


def summed_cross_entropy(head: nn.Module, hidden: Tensor, target: Tensor) -> Tensor:
    """Sum over N tokens of -log p(target), in float32: hidden (N, C), target (N,) ids. Zero, with gradients, if N is 0.

    LLaMA-3's logits of 4,096 tokens take 2 GB in float32. So more than LOSS_CHUNK tokens are split into chunks, whose
    logits are computed again in backward: the logits of only one chunk are in memory at a time.
    """

    def chunk_loss(hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), target, reduction="sum")

    if len(target) <= LOSS_CHUNK:
        return chunk_loss(hidden, target)
    chunks = zip(hidden.split(LOSS_CHUNK), target.split(LOSS_CHUNK))
    return sum(checkpoint(chunk_loss, h, t, use_reentrant=False) for h, t in chunks)


# ---------------------------------------------------------------------------------------------------------------------
# answering


def sample_token(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Next ids (B,) from logits (B, V): temperature, then top-k, then top-p, then a draw; temperature 0 is greedy.

    top_k keeps the k likeliest tokens (0: all). top_p keeps the fewest likeliest tokens whose probabilities add up to
    at least top_p (1: all; Holtzman et al. 2019, arXiv 1904.09751).
    """
    if temperature < 1e-6:  # it would make the largest logits infinite
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, ids = probabilities.sort(dim=-1, descending=True)
        likelier = ordered.cumsum(dim=-1) - ordered  # (B, V), total probability of all likelier tokens
        likelier[:, 0] = -1  # the likeliest token always stays
        probabilities = torch.zeros_like(ordered).scatter(1, ids, ordered.masked_fill(likelier >= top_p, 0))
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]  # divides by the sum of what is left


@torch.inference_mode()
def generate(
    model: Llava,
    prompts: list[list[int]],
    vision_features: Tensor | None = None,
    image_sizes: list[Size] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
) -> Iterator[list[int | None]]:
    """Answer a batch of prompts: each step yields the next id of every row, or None for a row that has ended.

    The end token itself is yielded, so that a caller can tell an ended answer from one cut at max_new_tokens. A row
    gets the same ids as it would without the others, if the longest prompt leaves room for max_new_tokens.

    Args: prompts: ids, with a placeholder for each image token; vision_features (N, P, C) of their images in order;
    image_sizes as in Llava.embed; cache: of an earlier call, for a single prompt that starts with the `cache.used`
    tokens in it: they are not read again, and vision_features are those of the images after them.
    Raises ValueError if a prompt leaves no room for an answer in the context.
    """
    config, decoder, head = model.config, model.language_model.model, model.language_model.lm_head
    longest, limit = max(map(len, prompts)), config.text_config.max_position_embeddings
    if longest >= limit:
        raise ValueError(f"the prompt is {longest} tokens long, image included; the context holds {limit}")
    steps = min(max_new_tokens, limit - longest)
    if cache is None:
        cache = KVCache(config.text_config, len(prompts), 0, like=decoder.embed_tokens.weight)
    cache.grow(longest + steps)

    # Prefill: read the prompts in one pass. Rows are padded at the left, so that every row ends in the last column.
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=model.device)
    rows = [[config.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    unread = torch.tensor([row[cache.used :] for row in rows], device=model.device)
    hidden = decoder(model.embed(unread, vision_features, image_sizes), padding, cache)  # (B, T, C)

    # Decode: choose the next token of each row, then read it to get the state from which the one after it is chosen.
    running = [True] * len(prompts)
    for step in range(steps):
        logits = head(hidden[:, -1])  # (B, V), for the token after the last column
        if config.image_token_index < logits.shape[-1]:
            logits[:, config.image_token_index] = -torch.inf  # a placeholder is never an answer
        ids = sample_token(logits, temperature, top_k, top_p, generator)
        chosen = ids.tolist()
        yield [i if alive else None for i, alive in zip(chosen, running)]
        running = [alive and i not in config.eos_token_ids for i, alive in zip(chosen, running)]
        if step + 1 == steps or not any(running):
            return
        hidden = decoder(decoder.embed_tokens(ids)[:, None], padding, cache)  # (B, 1, C)
