"""Layouts: tables from the names of tensors in published files to our names."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from llava import PROJECTORS


@dataclass(frozen=True)
class Transform:
    """Splits one tensor of a file into one or several of ours, and joins them again."""

    split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    join: Callable[[tuple[torch.Tensor, ...]], torch.Tensor]


IDENTITY = Transform(lambda t: (t,), lambda parts: parts[0])
TRANSPOSE = Transform(lambda t: (t.T,), lambda parts: parts[0].T)
SPLIT_QKV = Transform(lambda t: t.chunk(3), torch.cat)  # (3 C, C) or (3 C,): q, then k, then v
SPLIT_QKV_TRANSPOSED = Transform(lambda t: t.T.chunk(3), lambda parts: torch.cat(parts).T)  # (C, 3 C)

# A layout is a list of rows: name in the file, our names, transform. In names, {n} stands for a number, {p} for weight
# or bias, {rest} for anything:
#     ("h.{n}.ln_1.{p}", ("language_model.model.layers.{n}.input_layernorm.{p}",), IDENTITY)
Layout = list[tuple[str, tuple[str, ...], Transform]]
WILDCARDS = {"{n}": r"(?P<n>\d+)", "{p}": r"(?P<p>weight|bias)", "{rest}": r"(?P<rest>.+)"}
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def rename(names: dict[str, str]) -> Layout:
    """Rows for tensors that differ in name only. Args: names: name in the file -> ours."""
    return [(theirs, (ours,), IDENTITY) for theirs, ours in names.items()]


def llama(body: str, head: str) -> Layout:
    """LLaMA, Vicuna, Mistral, Qwen2, and a GPT-2 inside a LLaVA of ours. Args: prefixes of decoder and lm_head."""
    inner = ("embed_tokens.weight", "embed_positions.weight", "layers.{rest}", "norm.{p}")
    names = {body + name: f"language_model.model.{name}" for name in inner}
    return rename(names | {f"{head}lm_head.weight": HEAD})


def gpt2(prefix: str) -> Layout:
    """GPT-2, which stores its matrices as (in, out) and q, k and v as one matrix."""
    body, block = "language_model.model.", prefix + "h.{n}."
    layer = body + "layers.{n}."
    qkv = tuple(f"{layer}self_attn.{part}_proj." for part in "qkv")
    outer = {"wte.weight": "embed_tokens.weight", "wpe.weight": "embed_positions.weight", "ln_f.{p}": "norm.{p}"}
    norms = {"ln_1.{p}": "input_layernorm.{p}", "ln_2.{p}": "post_attention_layernorm.{p}"}
    linears = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
    return [
        *rename({prefix + theirs: body + ours for theirs, ours in outer.items()}),
        *rename({block + theirs: layer + ours for theirs, ours in norms.items()}),
        *rename({f"{block}{theirs}.bias": f"{layer}{ours}.bias" for theirs, ours in linears.items()}),
        *((f"{block}{theirs}.weight", (f"{layer}{ours}.weight",), TRANSPOSE) for theirs, ours in linears.items()),
        (f"{block}attn.c_attn.weight", tuple(name + "weight" for name in qkv), SPLIT_QKV_TRANSPOSED),
        (f"{block}attn.c_attn.bias", tuple(name + "bias" for name in qkv), SPLIT_QKV),
        *rename({"lm_head.weight": HEAD}),
    ]


def vision_tower(prefix: str, ours: str = "vision_tower.vision_model.") -> Layout:
    inner = ("embeddings.{rest}", "pre_layrnorm.{p}", "encoder.{rest}", "post_layernorm.{p}")
    return rename({prefix + name: ours + name for name in inner})


def projector(prefix: str) -> Layout:
    names = [f"linear_{i + 1}.{{p}}" for i in range(max(PROJECTORS.values()))]
    return rename({prefix + name: f"multi_modal_projector.{name}" for name in names})


def authors_projector(prefix: str) -> Layout:
    """The authors' projector: one nn.Linear, or an nn.Sequential in which every second module is a GELU."""
    names = {"{p}": "linear_1.{p}"}
    names |= {f"{2 * i}.{{p}}": f"linear_{i + 1}.{{p}}" for i in range(max(PROJECTORS.values()))}
    return rename({prefix + theirs: f"multi_modal_projector.{ours}" for theirs, ours in names.items()})


def openai_transformer(theirs: str, ours: str) -> Layout:
    block, layer = theirs + "transformer.resblocks.{n}.", ours + "encoder.layers.{n}."
    names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    qkv = tuple(f"{layer}self_attn.{part}_proj.{{p}}" for part in "qkv")
    return [
        *rename({f"{block}{a}.{{p}}": f"{layer}{b}.{{p}}" for a, b in names.items()}),
        (f"{block}attn.in_proj_{{p}}", qkv, SPLIT_QKV),
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
    ("visual.proj", ("visual_projection.weight",), TRANSPOSE),
    ("text_projection", ("text_projection.weight",), TRANSPOSE),
]  # fmt: skip


def llava(body: str, head: str, prefix: str, tower: str) -> Layout:
    """A LLaVA of transformers. Args: the prefixes of decoder, lm_head, projector and image_newline, vision tower."""
    return [
        *llama(body, head),
        *projector(f"{prefix}multi_modal_projector."),
        *vision_tower(tower),
        *rename({f"{prefix}image_newline": "image_newline"}),
    ]


IN_FILES, IN_MEMORY = ("language_model.model.", "language_model.", ""), ("model.language_model.", "", "model.")
LLAVA_LAYOUTS: dict[str, Layout] = {
    "LLaMA family": llama("model.", ""),
    "GPT-2": gpt2(""),
    "GPT-2, as saved by transformers": gpt2("transformer."),
    "LLaVA, transformers 4 (llava-hf)": llava(*IN_FILES, "vision_tower.vision_model."),
    "LLaVA, transformers 5": llava(*IN_FILES, "vision_tower."),
    "LLaVA, transformers 4.52 in memory": llava(*IN_MEMORY, "model.vision_tower.vision_model."),
    "LLaVA, transformers 5 in memory": llava(*IN_MEMORY, "model.vision_tower."),
    "LLaVA, its authors'": [
        *llama("model.", ""),
        *authors_projector("model.mm_projector."),
        *vision_tower("model.vision_tower.vision_tower.vision_model."),
        *rename({"model.image_newline": "image_newline"}),
    ],
}
CLIP_WITHOUT_VISION = ("text_model.{rest}", "text_projection.weight", "visual_projection.weight", "logit_scale")
CLIP_LAYOUTS = {
    "CLIP": rename({name: name for name in ("vision_model.{rest}", *CLIP_WITHOUT_VISION)}),
    "CLIP's vision tower, transformers 5": vision_tower("", "vision_model."),
    "CLIP, OpenAI's names": OPENAI_CLIP,
}
EXTRAS = (  # tensors in files that no model needs: computed tables, and three numbers in OpenAI's files
    *("{rest}rotary_emb.inv_freq", "{rest}position_ids", "h.{n}.attn.bias", "h.{n}.attn.masked_bias"),
    *("transformer.h.{n}.attn.bias", "transformer.h.{n}.attn.masked_bias"),
    *("input_resolution", "context_length", "vocab_size"),
)


@lru_cache
def pattern_of(template: str) -> re.Pattern:
    """The regular expression of a name with wildcards."""
    return re.compile("".join(WILDCARDS.get(part, re.escape(part)) for part in re.split(r"(\{\w+\})", template)))


def match(name: str, layout: Layout) -> tuple[tuple[str, ...], Transform] | None:
    """Our names of a file's tensor `name`, and its transform; None if the layout does not have it."""
    for theirs, ours, transform in layout:
        if found := pattern_of(theirs).fullmatch(name):
            return tuple(name.format(**found.groupdict()) for name in ours), transform
    return None


def is_extra(name: str, extras: tuple[str, ...]) -> bool:
    """True if `name` matches one of these names with wildcards."""
    return any(pattern_of(extra).fullmatch(name) for extra in extras)


def choose_layout(names: list[str], layouts: dict[str, Layout]) -> str:
    """The layout that has most of these names; the first one on a tie."""
    names = names[:: 1 + len(names) // 500]  # a sample is enough, and a file may claim any number of names
    return max(layouts, key=lambda layout: sum(match(name, layouts[layout]) is not None for name in names))


def to_layout(state: dict[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """Rename tensors from our names to those of a layout; q, k and v are joined if the layout joins them."""
    renamed = {}
    for theirs, ours, transform in layout:
        for found in filter(None, map(pattern_of(ours[0]).fullmatch, state)):
            parts = tuple(state[name.format(**found.groupdict())] for name in ours)
            renamed[theirs.format(**found.groupdict())] = transform.join(parts).contiguous()
    return renamed
