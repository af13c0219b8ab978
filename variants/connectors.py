"""Connectors: other ways than LLaVA's projector to turn the features of an image into tokens of the decoder.

    features (B, N, C) of N patches --connector--> M tokens (B, M, d)        LLaVA's own projector has M = N

    expand           several tokens of each patch, by LLaVA-1.5's MLP with a wider second layer (Frozen, ClipCap)
    avg_pool         mean of neighboring patches, then LLaVA-1.5's MLP
    pixel_shuffle    neighboring patches side by side in one long vector, then one matrix (Idefics3)
    resampler        M learned latents read the patches in layers of cross-attention (Flamingo, as in IDEFICS)
    qformer          M learned queries in a small BERT, half of whose layers read the patches (BLIP-2)
    qformer_text     the same, and the queries also read the question (InstructBLIP)
    c_abstractor     convolutions, a mean of neighbors, convolutions again, then an MLP (Honeybee)
    gated_cross_attention   one token only: layers added to the decoder read the patches; variants/cross_attention.py

`--projector NAME --visual-tokens M` starts one in stage 1, and config.json keeps both as projector_type and
visual_tokens. Patches are in reading order, n = sqrt(N) a side; so are tokens where they form a square of m = sqrt(M) a
side. Inner widths and heads are those of the vision tower, but the MLP of expand and avg_pool has the decoder's width;
depths are those of the papers, in the constants below. docs/connectors.md has shapes, sizes and all names of weights.

Sources: Tsimpoukelli et al. 2021 (Frozen, arXiv 2106.13884), Mokady et al. 2021 (ClipCap, 2111.09734), Alayrac et al.
2022 (Flamingo, 2204.14198), Laurençon et al. 2023 (IDEFICS, 2306.16527) and 2024 (Idefics3, 2408.12637), Li et al. 2023
(BLIP-2, 2301.12597), Dai et al. 2023 (InstructBLIP, 2305.06500), Cha et al. 2023 (Honeybee, 2312.06742).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from variants.cross_attention import GatedCrossAttention

RESAMPLER_LAYERS, QFORMER_LAYERS, REGNET_BLOCKS = 6, 12, 3
INSTRUCTION = 512  # tokens of the question that qformer_text reads at most: the positions of BERT
QUERY_STD = 0.02  # std of new queries. Equal ones would get equal gradients and stay equal: M tokens, one vector


def check_tokens(kind: str, tokens: int | None, patches: int):
    """Raise ValueError if the connector `kind` cannot turn so many patches into so many tokens."""
    if kind not in CONNECTORS:
        if tokens is not None:
            raise ValueError(f"visual_tokens is {tokens}, but {kind} makes one token of each patch")
        return
    if kind in ONE_TOKEN:
        if tokens is not None:
            raise ValueError(f"visual_tokens is {tokens}, but {kind} makes one token of each image")
        return
    if kind == "expand":
        if not tokens or tokens % patches or tokens <= patches:
            raise ValueError(f"expand needs visual_tokens of 2, 3, ... times the number of patches, {patches}")
        return
    if tokens is None or not 1 <= tokens <= patches:
        raise ValueError(f"{kind} needs visual_tokens from 1 to the number of patches, {patches}; it is {tokens}")
    rows, side = math.isqrt(patches), math.isqrt(tokens)
    if kind in ON_A_GRID and side**2 != tokens:
        raise ValueError(f"{kind} makes a square of tokens, and visual_tokens {tokens} is no square number")
    if kind == "pixel_shuffle" and rows % side:
        raise ValueError(f"pixel_shuffle cannot cut {rows} x {rows} patches into {side} x {side} equal blocks")


class Connector(nn.Module):
    """Base of the connectors below: features (B, N, C) to tokens (B, M, d), each image on its own.

    Args: config: a LlavaConfig that check_tokens accepts.
    """

    def __init__(self, config):
        super().__init__()
        vision = config.vision_config
        self.rows = math.isqrt(vision.num_patches)  # n: patches a side
        self.side = math.isqrt(config.visual_tokens)  # m: tokens a side, where they form a square

    def pool(self, x: Tensor) -> Tensor:
        """Mean over the patches of each cell of an m x m grid: (B, n, n, C) to (B, m, m, C).

        If m does not divide n, neighboring cells share patches, as in F.adaptive_avg_pool2d.
        """
        return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.side).permute(0, 2, 3, 1)


def add_whitening(connector: nn.Module, config):
    """Put a linear layer, `whitening`, before a connector; train.py --whiten gives it its first weights."""
    width = config.vision_config.hidden_size
    connector.whitening = nn.Linear(width, width)
    connector.register_forward_pre_hook(lambda connector, inputs: (connector.whitening(inputs[0]), *inputs[1:]))


class AveragePool(Connector):
    def __init__(self, config):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        x = self.pool(features.unflatten(1, (self.rows, self.rows))).flatten(1, 2)  # (B, M, C)
        return self.linear_2(F.gelu(self.linear_1(x)))


class Expand(Connector):
    """k = M / N tokens of each patch, side by side: (B, N, C) to (B, k N, d). A pretrained decoder seems to read "large
    red star" more easily from several tokens, as in text, than from one: docs/real-decoder.md."""

    def __init__(self, config):
        super().__init__(config)
        self.width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, self.width)
        self.linear_2 = nn.Linear(self.width, config.visual_tokens // config.vision_config.num_patches * self.width)

    def forward(self, features: Tensor) -> Tensor:
        x = self.linear_2(F.gelu(self.linear_1(features)))  # (B, N, k d)
        return x.unflatten(-1, (-1, self.width)).flatten(1, 2)


class PixelShuffle(Connector):
    """Blocks of s x s patches become one vector each, of s^2 C numbers: its patches row by row. No bias."""

    def __init__(self, config):
        super().__init__(config)
        self.block = self.rows // self.side  # s
        self.projection = nn.Linear(
            self.block**2 * config.vision_config.hidden_size, config.text_config.hidden_size, bias=False
        )

    def forward(self, features: Tensor) -> Tensor:
        x = features.unflatten(1, (self.side, self.block, self.side, self.block)).transpose(2, 3)  # (B, m, m, s, s, C)
        return self.projection(x.flatten(3).flatten(1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# learned queries


class QueryAttention(nn.Module):
    """Multi-head attention of queries x (B, M, C) to a context (B, T, C); mask (B, 1, 1, T): True where it is read."""

    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, M, C) to (B, M, C). Args: mask (B, 1, 1, T): False for tokens of the context that are not read."""
        q, k, v = (
            projection(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, M or T, D)
            for projection, source in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class ResamplerLayer(nn.Module):
    """Latents read patches and latents, then an MLP; normalized before, added after. No biases; ReLU as in IDEFICS."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.context_norm = nn.LayerNorm(width)
        self.latents_norm = nn.LayerNorm(width)
        self.attention = QueryAttention(width, heads, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        queries = self.latents_norm(latents)
        context = torch.cat([self.context_norm(features), queries], dim=1)  # (B, N + M, C)
        latents = latents + self.attention(queries, context)
        return latents + self.down_proj(F.relu(self.up_proj(self.mlp_norm(latents))))


class Resampler(Connector):
    def __init__(self, config):
        super().__init__(config)
        width, heads = config.vision_config.hidden_size, config.vision_config.num_attention_heads
        self.latents = nn.Parameter(nn.init.normal_(torch.empty(config.visual_tokens, width), std=QUERY_STD))
        self.layers = nn.ModuleList(ResamplerLayer(width, heads) for _ in range(RESAMPLER_LAYERS))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        x = self.latents.expand(len(features), -1, -1)  # (B, M, C)
        for layer in self.layers:
            x = layer(x, features)
        return self.projection(self.norm(x))


class QFormerLayer(nn.Module):
    """BERT's layer, normalized after each addition, with cross-attention to the patches in every second layer."""

    def __init__(self, width: int, heads: int, reads_patches: bool):
        super().__init__()
        self.self_attention = QueryAttention(width, heads, bias=True)
        self.self_norm = nn.LayerNorm(width, eps=1e-12)
        self.cross_attention = QueryAttention(width, heads, bias=True) if reads_patches else None
        self.cross_norm = nn.LayerNorm(width, eps=1e-12) if reads_patches else None
        self.up_proj = nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        return self.read_patches(self.self_norm(x + self.self_attention(x, x)), features)

    def read_patches(self, x: Tensor, features: Tensor) -> Tensor:
        """The part of the layer after self-attention."""
        if self.cross_attention is not None:
            x = self.cross_norm(x + self.cross_attention(x, features))
        return self.mlp_norm(x + self.down_proj(F.gelu(self.up_proj(x))))


class QFormer(Connector):
    """BLIP-2's Q-Former without its text input, its pretraining losses and its dropout."""

    def __init__(self, config):
        super().__init__(config)
        width, heads = config.vision_config.hidden_size, config.vision_config.num_attention_heads
        self.queries = nn.Parameter(nn.init.normal_(torch.empty(config.visual_tokens, width), std=QUERY_STD))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(QFormerLayer(width, heads, i % 2 == 0) for i in range(QFORMER_LAYERS))
        self.projection = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        x = self.norm(self.queries).expand(len(features), -1, -1)  # (B, M, C)
        for layer in self.layers:
            x = layer(x, features)
        return self.projection(x)


class TextMLP(nn.Module):
    """The MLP of the question's tokens in a layer of the Q-Former; queries have another."""

    def __init__(self, width: int):
        super().__init__()
        self.up_proj = nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down_proj(F.gelu(self.up_proj(x))))


class TextQFormer(QFormer):
    """A Q-Former whose queries and the question's tokens attend to each other: InstructBLIP's.

    The question comes in the decoder's embeddings, through a linear layer, where InstructBLIP has BERT's. Only queries
    read the patches, and only they are returned, so the last layer has no MLP for the question.
    """

    def __init__(self, config):
        super().__init__(config)
        self.config, width = config, config.vision_config.hidden_size
        self.text_projection = nn.Linear(config.text_config.hidden_size, width)
        self.text_positions = nn.Parameter(nn.init.normal_(torch.empty(INSTRUCTION, width), std=0.02))
        self.text_mlps = nn.ModuleList(TextMLP(width) for _ in range(QFORMER_LAYERS - 1))

    def forward(self, features: Tensor, input_ids: Tensor, embeddings: Tensor) -> Tensor:
        """features (N, P, C) of the images of prompts input_ids (B, T) with embeddings (B, T, d): tokens (N, M, d)."""
        questions = find_questions(input_ids, self.config)
        if len(questions) != len(features):  # Llava.embed will refuse the prompts
            return super().forward(features)
        text = pad_sequence([embeddings[row, columns] for row, columns in questions], batch_first=True)  # (N, S, d)
        lengths = torch.tensor([len(columns) for _, columns in questions], device=text.device)
        real = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
        return self.projection(self.compute(features, self.text_projection(text), real))

    def compute(self, features: Tensor, text: Tensor, real: Tensor) -> Tensor:
        """States (N, M, C) of the queries. Args: text (N, S, C); real (N, S): False for padding."""
        x = self.norm(self.queries).expand(len(features), -1, -1)  # (N, M, C)
        text = self.norm(text + self.text_positions[: text.shape[1]])
        mask = F.pad(real, (x.shape[1], 0), value=True)[:, None, None]  # (N, 1, 1, M + S)
        for i, layer in enumerate(self.layers):
            both = torch.cat([x, text], dim=1)
            both = layer.self_norm(both + layer.self_attention(both, both, mask))
            x, text = both.split([x.shape[1], text.shape[1]], dim=1)
            x = layer.read_patches(x, features)
            if i < len(self.text_mlps):
                text = self.text_mlps[i](text)
        return x


def find_questions(input_ids: Tensor, config) -> list[tuple[int, list[int]]]:
    """Row and columns of the question of each image in prompts (B, T), in order."""
    found = []
    for row, ids in enumerate(input_ids.tolist()):
        images = [column for column, i in enumerate(ids) if i == config.image_token_index]
        found += [(row, question_columns(ids, first, config)) for first in images[:: config.visual_tokens]]
    return found


def question_columns(ids: list[int], image: int, config) -> list[int]:
    """Columns of the question of the image at column `image`: the last INSTRUCTION text tokens before its answer.

    The answer begins after the first answer_start_ids behind the image. So the question is the same with or without an
    answer, and in training and sampling. Without them, or with the end of an answer before them, there is no question:
    an answer's own tokens never get here.
    """
    start, skipped = config.answer_start_ids, (config.image_token_index, config.pad_token_id)
    for end in range(image, len(ids) if start else image):
        if ids[end : end + len(start)] == start:
            return [column for column in range(end) if ids[column] not in skipped][-INSTRUCTION:]
        if ids[end] in config.eos_token_ids:
            break
    return []


# ---------------------------------------------------------------------------------------------------------------------
# convolutions


class RegNetBlock(nn.Module):
    """RegNet's bottleneck block on a grid (B, n, n, C): convolutions of 1 x 1, 3 x 3 in each channel, and 1 x 1.

    A convolution of 1 x 1 is a linear layer. After the second, each channel is scaled by a number in 0..1 that follows
    from the channels' means over the grid ("squeeze and excitation"). Radosavovic et al. 2020 (arXiv 2003.13678), with
    LayerNorm and SiLU as in Honeybee.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Linear(width, width, bias=False)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.squeeze = nn.Linear(width, round(width / 4))
        self.excite = nn.Linear(round(width / 4), width)
        self.conv3 = nn.Linear(width, width, bias=False)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        y = self.conv2(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, n, n, C) again
        y = F.silu(self.norm2(y))
        scale = self.excite(F.silu(self.squeeze(y.mean((1, 2), keepdim=True)))).sigmoid()  # (B, 1, 1, C)
        return F.silu(x + self.norm3(self.conv3(y * scale)))


class CAbstractor(Connector):
    def __init__(self, config):
        super().__init__(config)
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.positions = nn.Parameter(nn.init.normal_(torch.empty(self.rows**2, width), std=0.02))
        self.before = nn.Sequential(*(RegNetBlock(width) for _ in range(REGNET_BLOCKS)))
        self.after = nn.Sequential(*(RegNetBlock(width) for _ in range(REGNET_BLOCKS)))
        self.readout_1 = nn.Linear(width, out)
        self.readout_2 = nn.Linear(out, out)

    def forward(self, features: Tensor) -> Tensor:
        x = (features + self.positions).unflatten(1, (self.rows, self.rows))  # (B, n, n, C)
        x = self.after(self.pool(self.before(x))).flatten(1, 2)  # (B, M, C)
        return self.readout_2(F.silu(self.readout_1(x)))


CONNECTORS = {
    "expand": Expand,
    "avg_pool": AveragePool,
    "pixel_shuffle": PixelShuffle,
    "resampler": Resampler,
    "qformer": QFormer,
    "qformer_text": TextQFormer,
    "c_abstractor": CAbstractor,
    "gated_cross_attention": GatedCrossAttention,
}
ON_A_GRID = ("avg_pool", "pixel_shuffle", "c_abstractor")  # their tokens form a square
ONE_TOKEN = ("gated_cross_attention",)  # one token for each image, whose features go another way
READ_PROMPT = ("qformer_text", "gated_cross_attention")  # they are called with ids and embeddings of the prompt, too
