"""Where on the image each word of an answer comes from: one number for each word and image token.

    attention   weights of the positions that predict the word, on the image tokens; mean over heads and layers
    gradient    attention times its gradient, where positive; followed back from layer to layer
    occlusion   drop in the word's log-probability when a patch's feature is replaced by the mean feature

A fourth view, logit_lens, names the word that each image token is closest to, layer by layer. All of them read prompt
and answer together, in one pass without a KV cache. The model must be in eval mode, as load_model returns it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from data import PreparedImage
from inputs.tokenizer import Tokenizer
from llava import Llava, LlavaConfig
from variants.anyres import Size, pack_tiles, tile_grid
from variants.connectors import CONNECTORS

BATCH = 16  # variants of the features in one pass
NEWLINE = -1  # in place of a patch: an image token that shows none


@dataclass
class Word:
    text: str
    positions: list[int]  # of its tokens in Answer.ids; each is predicted by the position before it


@dataclass
class Answer:
    """A prompt about images and its answer. Shapes below: W words, I image tokens of all images in order."""

    ids: list[int]  # of prompt and answer
    words: list[Word]
    images: list[PreparedImage]

    def image_positions(self, config: LlavaConfig) -> list[int]:
        return [i for i, token in enumerate(self.ids) if token == config.image_token_index]


def find_words(prompt: list[int], ids: list[int], text: str, tokenizer: Tokenizer) -> list[Word]:
    """The words of an answer. Punctuation belongs to no word; tokens of the same word are kept together.

    Args: ids: of the answer; text: the part of their text to read, which starts at its first letter.
    """
    texts = [tokenizer.decode(ids[:i]) for i in range(len(ids) + 1)]
    spans = list(zip((len(text.rstrip("\ufffd")) for text in texts), map(len, texts[1:])))  # \ufffd: half a character
    indent = len(texts[-1]) - len(texts[-1].lstrip())
    words = []
    for found in re.finditer(r"\w+(?:['’-]\w+)*", text):
        begin, end = found.start() + indent, found.end() + indent
        tokens = [i for i, (first, last) in enumerate(spans) if first < end and last > begin]
        words.append(Word(found[0], [len(prompt) + i for i in tokens]))
    return words


def patch_numbers(size: Size, config: LlavaConfig) -> list[int]:
    """For each token of an image of this size: tile x patches of a tile + patch, or NEWLINE.

    Raises ValueError behind a connector, which does not make one token of each patch.
    """
    if config.projector_type in CONNECTORS:
        raise ValueError(f"maps need one token for each patch, which {config.projector_type} does not make")
    side, patches = config.vision_config.image_size, config.vision_config.num_patches
    if not config.image_grid_pinpoints:
        return list(range(patches))
    grid = tile_grid(size, config.image_grid_pinpoints, side)
    numbers = torch.arange((1 + math.prod(grid)) * patches).view(-1, patches, 1)
    return pack_tiles(numbers, size, grid, torch.tensor([NEWLINE])).flatten().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# attention and its gradient


class RecordAttention(TorchFunctionMode):
    """Context in which causal attention is computed as it is defined, softmax(q k^T / sqrt(D)) v.

    `weights` gets keep(w) of the tensor w (B, H, T, T) of each call. Every class of attention layer is seen, those of
    fast/ too.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor] = lambda w: w):
        super().__init__()
        self.weights, self.keep = [], keep

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs or {})
        q, k, v = args
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # grouped-query attention
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(later, -torch.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
        self.weights.append(self.keep(weights))
        return weights @ v


@torch.no_grad()
def image_features(model: Llava, answer: Answer) -> Tensor:
    """The vision tower's features (N, P, C) of all tiles of all images."""
    return model.vision_features(torch.cat([image.pixels for image in answer.images]).to(model.device))


def read(model: Llava, answer: Answer, keep=lambda w: w) -> tuple[list[Tensor], Tensor]:
    """keep(w) of each layer's attention weights w (1, H, T, T), and the states (T, C) that predict the next tokens.

    Raises ValueError for a model with virtual tokens, which attention sees and the maps have no place for.
    """
    if hasattr(model.language_model.model, "virtual"):
        raise ValueError("a prompt or prefix stands before the image: of the maps, only occlusion can be drawn")
    with torch.no_grad():
        ids = torch.tensor([answer.ids[:-1]], device=model.device)
        x = model.embed(ids, image_features(model, answer), [image.size for image in answer.images])
    with RecordAttention(keep) as record:
        states = model.language_model.model(x.requires_grad_(torch.is_grad_enabled()))
    return record.weights, states[0]


def rows_of(word: Word) -> list[int]:
    return [position - 1 for position in word.positions]


@torch.no_grad()
def layer_attention(model: Llava, answer: Answer) -> Tensor:
    """Attention (L, W, I) of each word's positions to the image tokens in each layer, mean over heads.

    The sum over I is the share of attention that goes to the images; the rest goes to text.
    """
    image = answer.image_positions(model.config)

    def keep(weights: Tensor) -> Tensor:  # of all layers, the whole would be H T / W times as large
        mean = weights[0].float().mean(0)  # (T, T)
        return torch.stack([mean[rows_of(w)].mean(0)[image] for w in answer.words])

    return torch.stack(read(model, answer, keep)[0]).cpu()


def attention_map(model: Llava, answer: Answer) -> Tensor:
    """Attention (W, I), mean over heads and layers."""
    return layer_attention(model, answer).mean(0)


def gradient_map(model: Llava, answer: Answer) -> Tensor:
    """Relevance (W, I) of the image tokens for each word's logits, by gradient times attention.

    With A a layer's attention and y the sum of the word's logits, each layer from the first to the last adds to the
    relevance R, which starts as the identity: R = R + mean over heads of relu(A * dy/dA) @ R. Source: Chefer et al.
    2021 (arXiv 2103.15679), equations 5 and 6, simplified from 2012.09838. The memory is that of all layers' (H, T, T).
    """
    with torch.enable_grad():
        weights, states = read(model, answer)
        logits, image, maps = model.language_model.lm_head(states), answer.image_positions(model.config), []
        for word in answer.words:
            rows = rows_of(word)
            y = logits[rows, [answer.ids[i] for i in word.positions]].float().sum()
            row = torch.zeros(len(logits), device=model.device)
            row[rows] = 1 / len(rows)  # a row of R is enough, so the layers are multiplied from the last to the first
            gradients = torch.autograd.grad(y, weights, retain_graph=True)
            for weight, gradient in zip(reversed(weights), reversed(gradients)):
                row = row + row @ (weight * gradient).detach().float().relu().mean(1)[0]
            maps.append(row[image].cpu())
    return torch.stack(maps)


# ---------------------------------------------------------------------------------------------------------------------
# occlusion


def remove_patches(features: Tensor, numbers: list[int]) -> Tensor:
    """A copy of features (N, P, C) in which these patches, counted over all tiles, have the mean of all features."""
    removed = features.clone()
    removed.view(-1, features.shape[-1])[numbers] = features.mean((0, 1))
    return removed


@torch.no_grad()
def log_probabilities(model: Llava, answer: Answer, variants: list[Tensor]) -> Tensor:
    """Log-probability (B, W) of each word, with B variants of the features (N, P, C) of all images."""
    ids = torch.tensor([answer.ids[:-1]], device=model.device).expand(len(variants), -1)
    x = model.embed(ids, torch.cat(variants), [image.size for image in answer.images] * len(variants))
    states, columns = model.language_model.model(x), []
    for word in answer.words:
        logits = model.language_model.lm_head(states[:, rows_of(word)]).float()  # (B, tokens of the word, V)
        tokens = torch.tensor([answer.ids[i] for i in word.positions], device=model.device)
        columns.append(logits.log_softmax(-1).gather(-1, tokens.expand(len(variants), -1)[..., None]).sum((1, 2)))
    return torch.stack(columns, dim=1).cpu()


def all_patches(answer: Answer, config: LlavaConfig) -> list[int]:
    """The patch of each image token (see patch_numbers), the tiles of all images counted together."""
    numbers, first = [], 0
    for image in answer.images:
        numbers += [n if n == NEWLINE else n + first for n in patch_numbers(image.size, config)]
        first += len(image.pixels) * config.vision_config.num_patches
    return numbers


def occlusion_map(model: Llava, answer: Answer) -> Tensor:
    """Drop (W, I) of each word's log-probability when a patch has the mean feature; negative where that helps the word.

    Occlusion is Zeiler & Fergus 2013 (arXiv 1311.2901), who cover pixels. Here a gray patch would be one more object.
    A newline token gets 0.
    """
    features, numbers = image_features(model, answer), all_patches(answer, model.config)
    shown = [i for i, number in enumerate(numbers) if number != NEWLINE]
    drops = torch.zeros(len(answer.words), len(numbers))
    whole = log_probabilities(model, answer, [features])
    for start in tqdm(range(0, len(shown), BATCH), "removing patches", unit="batch", leave=False, delay=1):
        some = shown[start : start + BATCH]
        removed = log_probabilities(model, answer, [remove_patches(features, [numbers[i]]) for i in some])
        drops[:, some] = (whole - removed).T
    return drops


MAPS: dict[str, Callable[[Llava, Answer], Tensor]]
MAPS = {"attention": attention_map, "gradient": gradient_map, "occlusion": occlusion_map}


# ---------------------------------------------------------------------------------------------------------------------
# the logit lens


@torch.no_grad()
def logit_lens(model: Llava, answer: Answer) -> tuple[Tensor, Tensor]:
    """The likeliest token at each image token and its probability, (L + 1, I) each: before the layers, and after each.

    A state is read as if it were the last: final norm, head, softmax (nostalgebraist 2020, "interpreting GPT: the logit
    lens"). A model never has to predict at an image token, so what it would say there shows what the token has become.
    """
    decoder, head = model.language_model.model, model.language_model.lm_head
    image, inputs = answer.image_positions(model.config), []
    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0, image]))
        for layer in decoder.layers
    ]
    try:
        _, states = read(model, answer)
    finally:
        for hook in hooks:
            hook.remove()
    best = [head(x).float().softmax(-1).max(-1) for x in (*map(decoder.norm, inputs), states[image])]
    return torch.stack([top.indices for top in best]).cpu(), torch.stack([top.values for top in best]).cpu()
