"""Tuning methods beside LoRA: the decoder's weights stay as they are, and a small part beside them trains.

    prompt       n trained embeddings before all others                   Lester et al. 2021 (arXiv 2104.08691)
    p-tuning     the same, made by an MLP                                 Liu et al. 2021 (2103.10385)
    prefix       n trained keys and values in every layer                 P-tuning v2, Liu et al. 2021 (2110.07602)
    prefix-mlp   the same, made by an MLP                                 Li & Liang 2021 (2101.00190)
    houlsby      a bottleneck after attention, and one after the MLP      Houlsby et al. 2019 (1902.00751)
    pfeiffer     a bottleneck after each layer                            Pfeiffer et al. 2020 (2005.00247)
    ia3          factors for keys, values and the MLP's inner numbers     Liu et al. 2022 (2205.05638)

The MLPs serve training only: their output is what is saved. Equal to peft 0.21 in numbers and files; the bottlenecks
follow adapter-hub's `adapters`. formats/tuning_files.py reads and writes the files. Shapes as in llava.py; n: virtual
tokens, w: width of a bottleneck or MLP.
"""

import re
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VIRTUAL = ("prompt", "p-tuning", "prefix", "prefix-mlp")  # methods that train virtual tokens
PLACES = {"houlsby": ("self_attn", "mlp"), "pfeiffer": ("",)}  # parts of a layer behind which a bottleneck stands
METHODS = (*VIRTUAL, *PLACES, "ia3")
WITH_WIDTH = ("p-tuning", "prefix-mlp", *PLACES)
LENGTH = 20  # default number of virtual tokens
REDUCTION = 16  # default width of a bottleneck: the decoder's divided by this
NONLINEARITY = {"houlsby": "swish", "pfeiffer": "relu"}
ACTIVATIONS = {"relu": F.relu, "swish": F.silu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}
IA3_LAYERS = {"k_proj": False, "v_proj": False, "down_proj": True}  # True: the factors are for the layer's input
DECODER = "language_model.model"
TRAINED = re.compile(r"\.(virtual|adapter)\.|\.ia3_l$")  # in the names of parameters that a method trains


# ---------------------------------------------------------------------------------------------------------------------
# virtual tokens
#
# They stand before the beginning of every row, image or not, and take places of the context. Answering with a KV cache,
# their keys and values fill `cache.front` slots before those of the tokens, padding included:
#
#     v v v . . a b c        v virtual token, . padding
#     v v v a b c d e
#
# A prompt and a prefix differ only in what trains: a prompt trains what the first layer reads, a prefix trains the keys
# and values of each layer, keys as they are after RoPE. Positions are the same: the first real token is at n.


class VirtualTokens(nn.Module):
    """n trained vectors. Args: start (n, d); encoder: an MLP that maps them to the vectors that are used."""

    def __init__(self, start: Tensor, encoder: nn.Module | None = None):
        super().__init__()
        self.embedding = nn.Parameter(start)
        self.encoder = nn.Identity() if encoder is None else encoder


class Prompt(VirtualTokens):
    """Embeddings (n, C) that are read before those of the tokens."""

    def forward(self, decoder: nn.Module, x: Tensor, cache, keep: Tensor | None):
        """The input of the decoder instead of x (B, T, C), its cache and `keep`; arguments as in Decoder.forward."""
        vectors = self.encoder(self.embedding).to(x.dtype)
        if cache is None:
            x = torch.cat([vectors.expand(len(x), -1, -1), x], dim=1)  # (B, n + T, C)
            keep = None if keep is None else F.pad(keep, (len(vectors), 0))
        elif not hasattr(cache, "front"):
            put_in_front(cache, *read_alone(decoder, vectors))
        return x, cache, keep


class Prefix(VirtualTokens):
    """Keys and values of every layer, (n, 2 L KV D): for each layer its keys, then its values."""

    def forward(self, decoder: nn.Module, x: Tensor, cache, keep: Tensor | None):
        """As Prompt.forward. Training has no cache, and gets one that holds nothing but the prefix."""
        if not hasattr(cache, "front"):
            heads = decoder.config.num_key_value_heads, decoder.config.head_dim
            parts = self.encoder(self.embedding).unflatten(1, (-1, *heads)).permute(1, 2, 0, 3)  # (2 L, KV, n, D)
            keys, values = parts[0::2, None], parts[1::2, None]
            if cache is None:
                stored = {"keys": [*map(Front, keys)], "values": [*map(Front, values)]}
                cache = SimpleNamespace(**stored, length=x.shape[1], used=0, front=parts.shape[2])
            else:
                put_in_front(cache, keys, values)
        return x, cache, keep


class Front:
    """Keys or values (1, KV, n, D) in place of a cache's tensor, while training.

    A cache is written in place; gradients cannot flow through that under every kind of --shard. This joins instead.
    """

    def __init__(self, front: Tensor):
        self.front = front

    def index_copy_(self, dim: int, slots: Tensor, new: Tensor) -> Tensor:
        """The front, then all keys or values of the batch (B, KV, T, D): (B, KV, n + T, D)."""
        return torch.cat([self.front.to(new).expand(len(new), -1, -1, -1), new], dim=dim)


def put_in_front(cache, keys, values):
    """Fill the front of a cache with the keys and values (1, KV, n, D) of each layer, the same for all rows."""
    cache.front = keys[0].shape[2]
    for stored, new in ((cache.keys, keys), (cache.values, values)):
        stored[:] = [torch.cat([part.to(s).expand(len(s), -1, -1, -1), s], dim=2) for part, s in zip(new, stored)]


def read_alone(decoder: nn.Module, vectors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values (1, KV, n, D) of each layer, of embeddings (n, C) at the positions from 0."""
    config, length = decoder.config, len(vectors)
    shape = 1, config.num_key_value_heads, length, config.head_dim
    keys, values = ([vectors.new_zeros(shape) for _ in range(config.num_hidden_layers)] for _ in "kv")
    cache = SimpleNamespace(keys=keys, values=values, length=length, used=0)  # the fields of a llava.KVCache
    decoder.run_layers(vectors[None], *decoder.place(vectors[None], None, cache), cache, None)
    return cache.keys, cache.values


def read_behind(
    decoder: nn.Module, tokens: VirtualTokens, x: Tensor, padding: Tensor | None = None, cache=None,
    keep: Tensor | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Decoder.forward of a decoder with virtual tokens; they are not among the states that it returns."""
    if cache is None and padding is None:
        padding = torch.zeros(len(x), dtype=torch.long, device=x.device)  # so that there is a mask, for a prefix
    slots, positions, mask = decoder.place(x, padding, cache, mask)
    given = x.shape[1]
    x, cache, keep = tokens(decoder, x, cache, keep)
    added = x.shape[1] - given
    if added:  # a prompt without a cache: its tokens are read with the others
        slots, mask = torch.arange(x.shape[1], device=x.device), None
        positions = slots.expand(len(x), -1)
    else:
        slots, positions = slots + cache.front, positions + cache.front
        mask = F.pad(mask, (cache.front, 0), value=True)
    states = decoder.run_layers(x, slots, positions, mask, cache, keep)
    return states if keep is not None else states[:, added:]


@torch.no_grad()
def new_tokens(model: nn.Module, method: str, length: int, width: int | None) -> VirtualTokens:
    """Virtual tokens at their start.

    Without an MLP it is a random text, since random numbers learn badly: embeddings of tokens that are drawn from the
    vocabulary, or the keys and values that the decoder computes for them. With an MLP it starts as peft does; but the
    last layer of prefix-mlp starts at zero, so that at first a prefix only takes away a part of the attention.
    """
    decoder = model.language_model.model
    table, config = decoder.embed_tokens.weight, decoder.config
    inner = config.num_key_value_heads * config.head_dim if method == "prefix-mlp" else table.shape[1]
    if method in ("prompt", "prefix"):
        weights = torch.ones(len(table))
        weights[model.config.image_token_index : model.config.image_token_index + 1] = 0  # never the placeholder
        start = table[torch.multinomial(weights, length, replacement=True)].clone()
        if method == "prompt":
            return Prompt(start)
        pairs = [part[0] for pair in zip(*read_alone(decoder, start)) for part in pair]  # 2 L x (KV, n, D)
        return Prefix(torch.stack(pairs).permute(2, 0, 1, 3).flatten(1))
    width, start = width or inner, torch.randn(length, inner)
    if method == "p-tuning":
        layers = nn.Linear(inner, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, inner)
        return Prompt(start, nn.Sequential(*layers))
    last = nn.Linear(width, 2 * config.num_hidden_layers * inner)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return Prefix(start, nn.Sequential(nn.Linear(inner, width), nn.Tanh(), last))


def add_tokens(model: nn.Module, tokens: VirtualTokens):
    """Give a decoder virtual tokens. They take places of its context, so its config tells fewer from now on.

    Raises ValueError if they leave no room for an image and a token, or if a connector cannot have them.
    """
    if isinstance(tokens, Prompt) and model.config.projector_type == "gated_cross_attention":
        raise ValueError("gated cross-attention counts the tokens before an image, which a prompt moves: use a prefix")
    text, count = model.config.text_config, len(tokens.embedding)
    needed = count + model.config.tokens_per_image + 1
    if needed > text.max_position_embeddings:
        context, image = text.max_position_embeddings, " with an image" * bool(model.config.tokens_per_image)
        raise ValueError(f"{count} virtual tokens{image} leave no room in the decoder's context of {context} tokens")
    text.max_position_embeddings -= count
    decoder = model.language_model.model
    decoder.virtual, decoder.forward = tokens, partial(read_behind, decoder, tokens)


# ---------------------------------------------------------------------------------------------------------------------
# bottlenecks


class Bottleneck(nn.Module):
    """What an adapter adds to x (..., C): up(activation(down(x))), with w numbers in between. It starts at zero."""

    def __init__(self, inner: int, width: int, activation: str):
        super().__init__()
        self.down, self.up = nn.Linear(inner, width), nn.Linear(width, inner)
        self.activation = ACTIVATIONS[activation]
        nn.init.normal_(self.down.weight, std=0.02)
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(x)))


def add_adapter(part: nn.Module, adapter: Bottleneck):
    """From now on, the output y of `part` is y + adapter(y)."""
    part.adapter = adapter
    part.register_forward_hook(lambda module, inputs, y: y + module.adapter(y).to(y.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# (IA)^3


class IA3Linear(nn.Module):
    """A frozen linear layer with trained factors, one for each number: W x * l, or W (l * x). They start at one."""

    def __init__(self, base: nn.Module, on_input: bool):
        super().__init__()
        self.base, self.on_input = base.requires_grad_(False), on_input
        size = base.in_features if on_input else base.out_features
        self.ia3_l = nn.Parameter(torch.ones(size, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        if self.on_input:
            return self.base((x * self.ia3_l).to(x.dtype))
        y = self.base(x)
        return (y * self.ia3_l).to(y.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# adding a method to a model


def add_tuning(model: nn.Module, method: str, length: int | None = None, width: int | None = None):
    """Add the part that a method trains to a Llava, at its start.

    Args: method: one of METHODS; length: virtual tokens; width: of a bottleneck or an MLP. Raises ValueError.
    """
    layers, inner = model.language_model.model.layers, model.config.text_config.hidden_size
    if method in VIRTUAL:
        add_tokens(model, new_tokens(model, method, length or LENGTH, width))
    for layer in layers:
        for place in PLACES.get(method, ()):
            adapter = Bottleneck(inner, width or max(1, inner // REDUCTION), NONLINEARITY[method])
            add_adapter(layer.get_submodule(place), adapter)
        for path, module in list(layer.named_modules()) if method == "ia3" else ():
            if (name := path.split(".")[-1]) in IA3_LAYERS:
                layer.set_submodule(path, IA3Linear(module, IA3_LAYERS[name]))


@dataclass
class Tuning:
    """What a file of a method holds, under our names."""

    kind: str  # "prompt", "prefix", "bottleneck" or "ia3"
    parts: dict[str, dict[str, Tensor]]  # path in the model: {"embedding"}, {"ia3_l"} or a Bottleneck's parameters
    activation: str = "relu"  # of bottlenecks


def wanted_shapes(model: nn.Module, tuning: Tuning, path: str) -> dict[str, tuple[int, ...]] | None:
    """The shapes that a part of a tuning must have to fit a model; None if the model has no such place."""
    text, found = model.config.text_config, {name: tensor.shape for name, tensor in tuning.parts[path].items()}
    inner, module = text.hidden_size, dict(model.named_modules()).get(path)
    if tuning.kind == "prompt":
        return {"embedding": (*found["embedding"][:1], inner)}
    if tuning.kind == "prefix":
        pairs = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        return {"embedding": (*found["embedding"][:1], pairs)}
    if tuning.kind == "bottleneck" and module is not None:
        (width,) = found["down.weight"][:1] or (1,)
        return {"down.weight": (width, inner), "down.bias": (width,), "up.weight": (inner, width), "up.bias": (inner,)}
    if tuning.kind == "ia3" and hasattr(module, "out_features"):
        on_input = found["ia3_l"][:1] == (1,)
        return {"ia3_l": (1, module.in_features) if on_input else (module.out_features, 1)}
    return None


def find_differences(model: nn.Module, tuning: Tuning) -> list[str]:
    """Why a tuning does not fit a model: one text for each part that has no place there or another shape."""
    differences = []
    for path, tensors in tuning.parts.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if (wanted := wanted_shapes(model, tuning, path)) != shapes:
            reason = "has no place in the model" if wanted is None else f"is {shapes}, should be {wanted}"
            differences.append(f"{path} {reason}")
    return differences


def attach_tuning(model: nn.Module, tuning: Tuning):
    """Add a tuning that find_differences finds nothing against, frozen. Raises ValueError as add_tokens does."""
    for path, tensors in tuning.parts.items():
        if tuning.kind in ("prompt", "prefix"):
            part = (Prompt if tuning.kind == "prompt" else Prefix)(tensors["embedding"])
            add_tokens(model, part)
        elif tuning.kind == "ia3":
            part = IA3Linear(model.get_submodule(path), on_input=tensors["ia3_l"].shape[0] == 1)
            part.ia3_l = nn.Parameter(tensors["ia3_l"].flatten())
            model.set_submodule(path, part)
        else:
            part = Bottleneck(*tensors["up.weight"].shape, tuning.activation)
            part.load_state_dict(tensors)
            add_adapter(model.get_submodule(path), part)
    for name, p in model.named_parameters():
        if TRAINED.search(name):
            p.requires_grad_(False)
            p.data = p.data.to(model.device, model.dtype)
