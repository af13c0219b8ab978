"""LLaVA, written out: a decoder that reads the features of an image as if they were words.

    image ----CLIP----> 576 features --projector--> 576 tokens --+
                                                                 +--> decoder --> answer
    question --embedding--------------------------> tokens ------+

One decoder serves the LLaMA family (LLaMA, Vicuna, Mistral, Qwen2) and GPT-2; TextConfig's fields switch between them.
Parameter names are those of Hugging Face's LLaMA and LLaVA files. Shapes at the end of a line: B rows, T tokens, C
width, H query heads, KV key heads, D width of a head, P patches of an image, V vocabulary.

Sources: Liu et al. 2023 (LLaVA, arXiv 2304.08485 and 2310.03744), Touvron et al. 2023 (LLaMA, 2302.13971), Su et al.
2021 (RoPE, 2104.09864), Ainslie et al. 2023 (GQA, 2305.13245), Radford et al. 2019 (GPT-2).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from clip import CLIPVisionConfig, CLIPVisionModel
from variants.anyres import Size, pack_tiles, tile_grid

IGNORE = -100  # label of a token that is not trained on; F.cross_entropy's ignore_index
LOSS_CHUNK = 4096  # the logits of at most this many tokens exist at one time
PROJECTORS = {"linear": 1, "mlp2x_gelu": 2}  # LLaVA-1.0's and 1.5's: how many linear layers


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
    image_token_index: int = 32000  # the placeholder id, one for each visual feature; its embedding is never read
    vision_feature_layer: int = -2
    projector_type: str = "mlp2x_gelu"  # one of PROJECTORS
    template: str = "vicuna_v1"  # the conversation template the decoder was trained with
    image_mode: str = "pad"  # how an image is made square: "pad", "square" (center crop) or "anyres" (tiles)
    image_grid_pinpoints: list[list[int]] | None = None  # canvas sizes (height, width) that anyres cuts into tiles
    eos_token_ids: list[int] = field(default_factory=lambda: [2])
    pad_token_id: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# the parts of a decoder layer


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 whatever x is (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalized = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return self.weight * normalized.to(x.dtype)


def make_norm(config: TextConfig) -> nn.Module:
    norm = nn.LayerNorm if config.gpt2 else RMSNorm
    return norm(config.hidden_size, eps=config.rms_norm_eps)


def rope_frequencies(config: TextConfig, device: torch.device) -> torch.Tensor:
    """Radians per position of each rotated pair, (D / 2,) float32: theta^(-2i / D), stretched for long contexts.

    rope_type "linear" (Vicuna-16k) divides all frequencies by a factor. "llama3" divides those whose wavelength is
    longer than the original context, leaves the short ones, and blends in between (LLaMA-3.1's model card and code).
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


def rope_angles(positions: torch.Tensor, config: TextConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every rotation angle, (B, 1, T, D) float32 each. Args: positions (B, T)."""
    angles = positions[:, None, :, None].float() * rope_frequencies(config, positions.device)  # (B, 1, T, D / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + D/2) of x (B, H, T, D): Hugging Face's half-split layout, not Meta's interleaved one."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)  # x, turned by 90 degrees
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class LayerCache:
    """Keys and values of one layer, in buffers of fixed length (B, KV, length, D)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values = keys, values

    def update(self, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, KV, T, D) at positions (T,); returns the whole buffers."""
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        return self.keys, self.values


class KVCache:
    """Keys and values of everything read so far. `used` counts the tokens read; the next one gets that position."""

    def __init__(self, config: TextConfig, batch: int, length: int, like: torch.Tensor):
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.layers = [LayerCache(like.new_zeros(shape), like.new_zeros(shape)) for _ in layers]
        self.length, self.used = length, 0

    def grow(self, length: int):
        """Make room for `length` positions, keeping what is stored."""
        if length > self.length:
            more = (0, 0, 0, length - self.length)
            self.layers = [LayerCache(F.pad(layer.keys, more), F.pad(layer.values, more)) for layer in self.layers]
            self.length = length


class Attention(nn.Module):
    """Multi-head attention; with fewer key heads than query heads, groups of query heads share one key head."""

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

    def forward(self, x: torch.Tensor, rope, mask: torch.Tensor | None, cache: LayerCache | None, positions):
        """x (B, T, C) to (B, T, C). Args: rope: (cos, sin) or None; mask (B, 1, T, S); positions (T,) in the cache.

        Without a mask, attention is causal: the kernel takes its fast path, and no mask is stored.
        """
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or KV, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.update(positions, k, v)  # (B, KV, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class SwiGLU(nn.Module):
    """LLaMA's MLP: down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GeluMLP(nn.Module):
    """GPT-2's MLP; its activation gelu_new is the tanh approximation."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = GeluMLP(config) if config.gpt2 else SwiGLU(config)

    def forward(self, x: torch.Tensor, rope, mask, cache, positions, keep=None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, positions)
        if keep is not None:
            x = x[keep]  # (N, C)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---------------------------------------------------------------------------------------------------------------------
# the decoder


def attention_mask(padding: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
    """The mask of a left-padded batch, (B, 1, T, length): True where a query may attend to a key.

    A row of two padding tokens and three real ones, read at once into a cache of seven positions:

        # . . . . . .      a padding token attends to itself only: an empty softmax would be NaN
        . # . . . . .
        . . # . . . .      a real token attends to the real tokens up to itself
        . . # # . . .
        . . # # # . .

    Args: padding (B,) counts the padding tokens at the left of each row; positions (T,) are those of the queries.
    """
    keys, queries = torch.arange(length, device=positions.device), positions[:, None]
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
        self,
        embeddings: torch.Tensor,
        padding: torch.Tensor | None = None,
        cache: KVCache | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, C) of T new token embeddings (B, T, C), which follow the tokens in the cache.

        Args: padding (B,): padding tokens at the left of each row, when answering in batches. Training pads at the
        right, where causality hides the padding and no mask is needed. keep (B, T): a mask of the N tokens whose
        states (N, C) are returned; the last layer's MLP runs for no others.
        """
        batch, new = embeddings.shape[:2]
        start, limit = (cache.used, cache.length) if cache else (0, self.config.max_position_embeddings)
        if start + new > limit:
            raise ValueError(f"{start + new} tokens do not fit: the context holds {limit}")
        positions, mask, x, rope = torch.arange(start, start + new, device=embeddings.device), None, embeddings, None
        if padding is not None or cache is not None:
            padding = positions.new_zeros(batch) if padding is None else padding
            mask = attention_mask(padding, positions, cache.length if cache else new)
        # A row's first real token has position 0, however much padding stands before it.
        row_positions = positions.expand(batch, new) if mask is None else (positions - padding[:, None]).clamp(min=0)
        if self.config.gpt2:
            x = x + self.embed_positions(row_positions)
        else:
            rope = rope_angles(row_positions, self.config)
        for i, layer in enumerate(self.layers):
            kept = keep if i == len(self.layers) - 1 else None  # the others are needed for their keys and values
            arguments = (x, rope, mask, cache.layers[i] if cache else None, positions, kept)
            if self.recompute and self.training:
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        if cache:
            cache.used += new
        return self.norm(x)


class CausalLM(nn.Module):
    """The decoder and its head, named as in LlamaForCausalLM's files."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:  # one matrix serves as embedding and head (Press & Wolf 2016, arXiv 1608.05859)
            self.lm_head.weight = self.model.embed_tokens.weight
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module):
        """Draw from Normal(0, width^-1/2); matrices that write into the residual stream shrink with the depth.

        GPT-2's 0.02 is meant for its width: at a width of 128 it leaves attention uniform for hundreds of steps (loss
        after 200 steps: 0.80 against 0.55).
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, DecoderLayer):  # apply() visits children first, so this overwrites what they drew
            depth = 2 * self.model.config.num_hidden_layers
            for branch in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(branch.weight, std=(branch.in_features * depth) ** -0.5)


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA


class Projector(nn.Module):
    """Maps a visual feature to the decoder's width: one linear layer, or two with a GELU between them."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        if config.projector_type not in PROJECTORS:
            raise ValueError(f"projector_type {config.projector_type!r} is none of {', '.join(PROJECTORS)}")
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.linear_2 = nn.Linear(width, width) if PROJECTORS[config.projector_type] == 2 else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
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
            self.multi_modal_projector = Projector(config)
        if config.image_grid_pinpoints:  # LLaVA-1.6: a learned token at the end of each row of tiles
            width = config.text_config.hidden_size
            self.image_newline = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.lm_head.weight.dtype

    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features (N, P, C) of N images or tiles (N, 3, S, S), from the layer the config names, usually -2."""
        dtype = next(self.vision_tower.parameters()).dtype
        return self.vision_tower(pixel_values.to(dtype), self.config.vision_feature_layer)

    def image_tokens(self, vision_features: torch.Tensor, image_sizes: list[Size] | None) -> torch.Tensor:
        """Project features (N, P, C) to the tokens (T, C) of all images in order; image_sizes: only with tiles."""
        tokens, config = self.multi_modal_projector(vision_features), self.config
        if not config.image_grid_pinpoints:
            return tokens.flatten(0, 1)
        grids = [tile_grid(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in image_sizes]
        tiles = tokens.split([1 + rows * columns for rows, columns in grids])
        return torch.cat([pack_tiles(*image, self.image_newline) for image in zip(tiles, image_sizes, grids)])

    def embed(
        self,
        input_ids: torch.Tensor,
        vision_features: torch.Tensor | None = None,
        image_sizes: list[Size] | None = None,
    ) -> torch.Tensor:
        """Token embeddings (B, T, C), with the projected features scattered to the placeholders in order.

        Args: input_ids (B, T); vision_features (N, P, C) of all images of the batch, row by row, or None; image_sizes
        (height, width) of each image, if the N features are those of tiles.
        Raises ValueError if placeholders and visual tokens differ in number: text would get the wrong image.
        """
        placeholders = input_ids == self.config.image_token_index
        x = self.language_model.model.embed_tokens(input_ids.masked_fill(placeholders, 0))
        tokens = None if vision_features is None else self.image_tokens(vision_features.to(x.dtype), image_sizes)
        count = 0 if tokens is None else len(tokens)
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
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_sizes: list[Size] | None = None,
    ) -> torch.Tensor:
        """Summed cross-entropy (a float32 scalar) over the supervised tokens of a right-padded batch.

        Args: input_ids, labels (B, T), with labels IGNORE where nothing is trained; images as pixel_values
        (N, 3, S, S), or as vision_features (N, P, C) if they were computed before; image_sizes as in embed. The caller
        divides by the number of supervised tokens of all micro-batches and ranks. LLaVA's equation 3, before the mean.
        """
        if pixel_values is not None:
            vision_features = self.vision_features(pixel_values)
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # the state at t predicts the token at t + 1
        supervised = target != IGNORE
        x = self.embed(input_ids, vision_features, image_sizes)
        hidden = self.language_model.model(x, keep=supervised)  # (N, C): the other tokens need no logits
        return summed_cross_entropy(self.language_model.lm_head, hidden, target[supervised])


def summed_cross_entropy(head: nn.Module, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum over N tokens of -log p(target), in float32: hidden (N, C), target (N,) ids. Zero, with gradients, if N is 0.

    LLaMA-3's logits of 4,096 tokens take 2 GB in float32. So more tokens than LOSS_CHUNK are taken chunk by chunk, and
    each chunk's logits are computed again in backward: no more than one chunk of logits is ever held.
    """

    def chunk_loss(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), target, reduction="sum")

    if len(target) <= LOSS_CHUNK:
        return chunk_loss(hidden, target)
    chunks = zip(hidden.split(LOSS_CHUNK), target.split(LOSS_CHUNK))
    return sum(checkpoint(chunk_loss, h, t, use_reentrant=False) for h, t in chunks)


# ---------------------------------------------------------------------------------------------------------------------
# answering


def sample_token(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Next ids (B,) from logits (B, V): temperature, then top-k, then top-p, then a draw; temperature 0 is greedy.

    top_k 0 and top_p 1 keep every token. top_p keeps the smallest set of likeliest tokens whose probabilities add up
    to at least top_p (Holtzman et al. 2019, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probabilities, ids = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the likelier tokens add up to
    before[:, 0] = -1  # the likeliest token always stays
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
    """Answer a batch of prompts: yields after each step a list of every row's next id, None for rows that have ended.

    The end token itself is yielded, so that a caller can tell an ended answer from one cut at max_new_tokens. Each row
    gets the ids it would get alone.

    Args: prompts: ids, one placeholder for each visual token; vision_features (N, P, C) of their images in order;
    image_sizes as in Llava.embed. cache: for one prompt whose first `cache.used` tokens it holds already: they are not
    read again, and vision_features are those of the images in the rest.
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
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[config.pad_token_id] * count + prompt for count, prompt in zip(padding, prompts)]
    padding = torch.tensor(padding, device=model.device)
    unread = torch.tensor([row[cache.used :] for row in rows], device=model.device)
    hidden = decoder(model.embed(unread, vision_features, image_sizes), padding, cache)  # (B, T, C)

    # Decode: choose a token for each row, read it, and so on. The cache holds the keys and values of all before it.
    running = [True] * len(prompts)
    for step in range(steps):
        logits = head(hidden[:, -1])  # (B, V)
        if config.image_token_index < logits.shape[-1]:
            logits[:, config.image_token_index] = -torch.inf  # the placeholder is not a word
        ids = sample_token(logits, temperature, top_k, top_p, generator)
        chosen = ids.tolist()
        yield [i if alive else None for i, alive in zip(chosen, running)]
        running = [alive and i not in config.eos_token_ids for i, alive in zip(chosen, running)]
        if step + 1 == steps or not any(running):
            return
        hidden = decoder(decoder.embed_tokens(ids)[:, None], padding, cache)  # (B, 1, C)
