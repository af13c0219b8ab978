"""Layouts: what a tensor is called in the files that people have, and what it is called here."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from llava import PROJECTORS


@dataclass(frozen=True)
class Change:
    """How one tensor of a file becomes one or several of ours, and back."""

    split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    join: Callable[[tuple[torch.Tensor, ...]], torch.Tensor]


SAME = Change(lambda t: (t,), lambda parts: parts[0])
TRANSPOSED = Change(lambda t: (t.T,), lambda parts: parts[0].T)
THIRDS = Change(lambda t: t.chunk(3), torch.cat)  # q, k and v one below the other
THIRDS_TRANSPOSED = Change(lambda t: t.T.chunk(3), lambda parts: torch.cat(parts).T)

# Rows of: their name, ours, what is done. {n} is a number, {p} weight or bias, {rest} anything.
Layout = list[tuple[str, tuple[str, ...], Change]]
WILDCARDS = {"{n}": r"(?P<n>\d+)", "{p}": r"(?P<p>weight|bias)", "{rest}": r"(?P<rest>.+)"}


def rename(pairs: dict[str, str]) -> Layout:
    return [(theirs, (ours,), SAME) for theirs, ours in pairs.items()]


def llama(body: str, head: str) -> Layout:
    """LLaMA, Vicuna, Mistral, Qwen2, and a GPT-2 of ours: `body` and `head` are what stands before their names."""
    inner = ("embed_tokens.weight", "embed_positions.weight", "layers.{rest}", "norm.{p}")
    pairs = {body + name: f"language_model.model.{name}" for name in inner}
    return rename(pairs | {f"{head}lm_head.weight": "language_model.lm_head.weight"})


def tower(prefix: str, ours: str = "vision_tower.vision_model.") -> Layout:
    inner = ("embeddings.{rest}", "pre_layrnorm.{p}", "encoder.{rest}", "post_layernorm.{p}")
    return rename({prefix + name: ours + name for name in inner})


def projector(prefix: str) -> Layout:
    names = [f"linear_{i}.{{p}}" for i in range(1, max(PROJECTORS.values()) + 1)]
    return rename({prefix + name: "multi_modal_projector." + name for name in names})


def authors_projector(prefix: str) -> Layout:
    """The authors keep the layers in an nn.Sequential, GELUs between them; a single layer stands there without one."""
    names = {f"{2 * i}.{{p}}": f"linear_{i + 1}.{{p}}" for i in range(max(PROJECTORS.values()))}
    names = {"{p}": "linear_1.{p}"} | names
    return rename({prefix + theirs: "multi_modal_projector." + ours for theirs, ours in names.items()})


HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
ATTENTION = tuple(f"self_attn.{part}_proj.{{p}}" for part in "qkv")


def gpt2(prefix: str) -> Layout:
    """GPT-2 keeps its matrices as (in, out), and q, k and v in one."""
    body = "language_model.model."
    layer = body + "layers.{n}."
    qkv = tuple(layer + name for name in ATTENTION)
    weights = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
    outer = {"wte.weight": "embed_tokens.weight", "wpe.weight": "embed_positions.weight", "ln_f.{p}": "norm.{p}"}
    norms = {"ln_1.{p}": "input_layernorm.{p}", "ln_2.{p}": "post_attention_layernorm.{p}"}
    return [
        *rename({prefix + theirs: body + ours for theirs, ours in outer.items()}),
        *rename({f"{prefix}h.{{n}}.{theirs}": layer + ours for theirs, ours in norms.items()}),
        *rename({f"{prefix}h.{{n}}.{theirs}.bias": f"{layer}{ours}.bias" for theirs, ours in weights.items()}),
        *((f"{prefix}h.{{n}}.{a}.weight", (f"{layer}{b}.weight",), TRANSPOSED) for a, b in weights.items()),
        (f"{prefix}h.{{n}}.attn.c_attn.weight", tuple(n.replace("{p}", "weight") for n in qkv), THIRDS_TRANSPOSED),
        (f"{prefix}h.{{n}}.attn.c_attn.bias", tuple(n.replace("{p}", "bias") for n in qkv), THIRDS),
        *rename({"lm_head.weight": "language_model.lm_head.weight"}),
    ]


def openai_transformer(theirs: str, ours: str) -> Layout:
    block, layer = theirs + "transformer.resblocks.{n}.", ours + "encoder.layers.{n}."
    names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    qkv = tuple(layer + name for name in ATTENTION)
    return [
        *rename({f"{block}{a}.{{p}}": f"{layer}{b}.{{p}}" for a, b in names.items()}),
        (f"{block}attn.in_proj_{{p}}", qkv, THIRDS),
    ]


OPENAI_CLIP: Layout = [
    *rename({
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.{p}": "vision_model.pre_layrnorm.{p}",
        "visual.ln_post.{p}": "vision_model.post_layernorm.{p}",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.{p}": "text_model.final_layer_norm.{p}",
        "logit_scale": "logit_scale",
    }),
    *openai_transformer("visual.", "vision_model."),
    *openai_transformer("", "text_model."),
    ("visual.proj", ("visual_projection.weight",), TRANSPOSED),
    ("text_projection", ("text_projection.weight",), TRANSPOSED),
]  # fmt: skip

LLAVA_LAYOUTS: dict[str, Layout] = {
    "LLaMA family": llama("model.", ""),
    "GPT-2": gpt2(""),
    "GPT-2, as saved by transformers": gpt2("transformer."),
    "LLaVA, transformers 4 (llava-hf)": [
        *llama("language_model.model.", "language_model."),
        *projector("multi_modal_projector."),
        *tower("vision_tower.vision_model."),
        *rename({"image_newline": "image_newline"}),
    ],
    "LLaVA, transformers 5": [
        *llama("language_model.model.", "language_model."),
        *projector("multi_modal_projector."),
        *tower("vision_tower."),
        *rename({"image_newline": "image_newline"}),
    ],
    "LLaVA, transformers 4.52 in memory": [
        *llama("model.language_model.", ""),
        *projector("model.multi_modal_projector."),
        *tower("model.vision_tower.vision_model."),
        *rename({"model.image_newline": "image_newline"}),
    ],
    "LLaVA, transformers 5 in memory": [
        *llama("model.language_model.", ""),
        *projector("model.multi_modal_projector."),
        *tower("model.vision_tower."),
        *rename({"model.image_newline": "image_newline"}),
    ],
    "LLaVA, its authors'": [
        *llama("model.", ""),
        *authors_projector("model.mm_projector."),
        *rename({"model.image_newline": "image_newline"}),
        *tower("model.vision_tower.vision_tower.vision_model."),
    ],
}
REST_OF_CLIP = ("text_model.{rest}", "text_projection.weight", "visual_projection.weight", "logit_scale")
CLIP_LAYOUTS = {
    "CLIP": rename({name: name for name in ("vision_model.{rest}", *REST_OF_CLIP)}),
    "CLIP's vision tower, transformers 5": tower("", "vision_model."),
    "CLIP, OpenAI's names": OPENAI_CLIP,
}
EXTRAS = ("{rest}rotary_emb.inv_freq", "{rest}position_ids")  # computed, not learned
EXTRAS += ("input_resolution", "context_length", "vocab_size")  # of OpenAI's files
EXTRAS += (
    "h.{n}.attn.bias",
    "h.{n}.attn.masked_bias",
    "transformer.h.{n}.attn.bias",
    "transformer.h.{n}.attn.masked_bias",
)


@lru_cache
def pattern_of(template: str) -> re.Pattern:
    return re.compile("".join(WILDCARDS.get(part, re.escape(part)) for part in re.split(r"(\{\w+\})", template)))


def match(name: str, layout: Layout) -> tuple[tuple[str, ...], Change] | None:
    """Our names of the tensor `name` under this layout, and what is done to it; None if it has no place."""
    for theirs, ours, change in layout:
        if found := pattern_of(theirs).fullmatch(name):
            return tuple(name.format(**found.groupdict()) for name in ours), change
    return None


def is_extra(name: str, extras: tuple[str, ...]) -> bool:
    return any(pattern_of(extra).fullmatch(name) for extra in extras)


def choose_layout(names: list[str], layouts: dict[str, Layout]) -> str:
    """The layout that knows most of these names; the first of equals."""
    names = names[:: 1 + len(names) // 500]  # enough to tell, however many names a file may claim
    return max(layouts, key=lambda layout: sum(match(name, layouts[layout]) is not None for name in names))
