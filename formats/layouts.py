"""Layouts: tables from the names of tensors in published files to our names."""

import re
from functools import lru_cache

import torch

# A layout maps names in files to our names. In both, {n} stands for a number, {p} for weight or bias, {rest} for
# anything. Two marks of our names: {qkv}, if the file joins q, k and v, in this order, in one tensor of three times the
# height; and a final .T, if the file has the matrix transposed.
Layout = dict[str, str]
WILDCARDS = {"{n}": r"(?P<n>\d+)", "{p}": r"(?P<p>weight|bias)", "{rest}": r"(?P<rest>.+)"}
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def add_prefixes(theirs: str, ours: str, layout: Layout) -> Layout:
    """The layout of a part of a model inside a whole model: every name has a prefix."""
    return {theirs + name: ours + renamed for name, renamed in layout.items()}


def same_names(*names: str) -> Layout:
    return dict(zip(names, names))


DECODER = same_names("embed_tokens.weight", "embed_positions.weight", "layers.{rest}", "norm.{p}")
GPT2 = {
    "wte.weight": "embed_tokens.weight",
    "wpe.weight": "embed_positions.weight",
    "h.{n}.ln_1.{p}": "layers.{n}.input_layernorm.{p}",
    "h.{n}.attn.c_attn.{p}": "layers.{n}.self_attn.{qkv}_proj.{p}.T",
    "h.{n}.attn.c_proj.{p}": "layers.{n}.self_attn.o_proj.{p}.T",
    "h.{n}.ln_2.{p}": "layers.{n}.post_attention_layernorm.{p}",
    "h.{n}.mlp.c_fc.{p}": "layers.{n}.mlp.up_proj.{p}.T",
    "h.{n}.mlp.c_proj.{p}": "layers.{n}.mlp.down_proj.{p}.T",
    "ln_f.{p}": "norm.{p}",
}
TOWER = same_names("embeddings.{rest}", "pre_layrnorm.{p}", "encoder.{rest}", "post_layernorm.{p}")
OPENAI_BLOCK = {
    "ln_1.{p}": "layer_norm1.{p}",
    "attn.in_proj_{p}": "self_attn.{qkv}_proj.{p}",
    "attn.out_proj.{p}": "self_attn.out_proj.{p}",
    "ln_2.{p}": "layer_norm2.{p}",
    "mlp.c_fc.{p}": "mlp.fc1.{p}",
    "mlp.c_proj.{p}": "mlp.fc2.{p}",
}
# The authors' projector is one nn.Linear, or an nn.Sequential in which a GELU stands between two of them.
AUTHORS_PROJECTOR = {"{p}": "linear_1.{p}", "0.{p}": "linear_1.{p}", "2.{p}": "linear_2.{p}"}


def llama(body: str, head: str) -> Layout:
    """LLaMA, Vicuna, Mistral, Qwen2, and a GPT-2 inside a LLaVA of ours. Args: prefixes of decoder and lm_head."""
    return add_prefixes(body, "language_model.model.", DECODER) | {f"{head}lm_head.weight": HEAD}


def gpt2(prefix: str) -> Layout:
    """GPT-2, which stores its matrices as (in, out)."""
    return add_prefixes(prefix, "language_model.model.", GPT2) | {"lm_head.weight": HEAD}


def llava(body: str, head: str, prefix: str, tower: str) -> Layout:
    """A LLaVA of transformers. Args: the prefixes of decoder, lm_head, projector and image_newline, vision tower."""
    others = add_prefixes(prefix, "", same_names("multi_modal_projector.{rest}", "image_newline", "relevance.{rest}"))
    return llama(body, head) | others | add_prefixes(tower, "vision_tower.vision_model.", TOWER)


IN_FILES, IN_MEMORY = ("language_model.model.", "language_model.", ""), ("model.language_model.", "", "model.")
LLAVA_LAYOUTS: dict[str, Layout] = {
    "LLaMA family": llama("model.", ""),
    "GPT-2": gpt2(""),
    "GPT-2, as saved by transformers": gpt2("transformer."),
    "LLaVA, transformers 4 (llava-hf)": llava(*IN_FILES, "vision_tower.vision_model."),
    "LLaVA, transformers 5": llava(*IN_FILES, "vision_tower."),
    "LLaVA, transformers 4.52 in memory": llava(*IN_MEMORY, "model.vision_tower.vision_model."),
    "LLaVA, transformers 5 in memory": llava(*IN_MEMORY, "model.vision_tower."),
    "LLaVA, its authors'": {
        **llama("model.", ""),
        **add_prefixes("model.mm_projector.", "multi_modal_projector.", AUTHORS_PROJECTOR),
        **add_prefixes("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model.", TOWER),
        "model.image_newline": "image_newline",
    },
}
CLIP_LAYOUTS: dict[str, Layout] = {
    "CLIP": {
        **same_names("vision_model.{rest}", "text_model.{rest}"),
        **same_names("visual_projection.weight", "text_projection.weight", "logit_scale"),
    },
    "CLIP's vision tower, transformers 5": add_prefixes("", "vision_model.", TOWER),
    "CLIP, OpenAI's names": {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.{p}": "vision_model.pre_layrnorm.{p}",
        **add_prefixes("visual.transformer.resblocks.{n}.", "vision_model.encoder.layers.{n}.", OPENAI_BLOCK),
        "visual.ln_post.{p}": "vision_model.post_layernorm.{p}",
        "visual.proj": "visual_projection.weight.T",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        **add_prefixes("transformer.resblocks.{n}.", "text_model.encoder.layers.{n}.", OPENAI_BLOCK),
        "ln_final.{p}": "text_model.final_layer_norm.{p}",
        "text_projection": "text_projection.weight.T",
        "logit_scale": "logit_scale",
    },
}
# Regular expressions of tensors that a file may hold and that are not read: computed tables, which no model needs, with
# three numbers in OpenAI's files (their names); and what CLIP has besides its vision tower (our names).
COMPUTED = r".*rotary_emb\.inv_freq|.*position_ids|(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
COMPUTED += "|input_resolution|context_length|vocab_size"
CLIP_WITHOUT_VISION = r"text_model\..*|(text|visual)_projection\.weight|logit_scale"


@lru_cache
def pattern_of(template: str) -> re.Pattern:
    """The regular expression of a name with wildcards."""
    return re.compile("".join(WILDCARDS.get(part, re.escape(part)) for part in re.split(r"(\{\w+\})", template)))


def parse_marks(ours: str) -> tuple[list[str], bool]:
    """One name for each part that the file joins, with the other wildcards left in; and whether it is transposed."""
    name = ours.removesuffix(".T")
    return [name.replace("{qkv}", part) for part in ("qkv" if "{qkv}" in name else "q")], name != ours


def match(name: str, layout: Layout) -> tuple[list[str], bool] | None:
    """Our names of a file's tensor `name`, and whether it is transposed; None if the layout does not have it."""
    for theirs, ours in layout.items():
        if found := pattern_of(theirs).fullmatch(name):
            targets, transposed = parse_marks(ours)
            return [target.format(**found.groupdict()) for target in targets], transposed
    return None


def choose_layout(names: list[str], layouts: dict[str, Layout]) -> str:
    """The layout that has most of these names; the first one on a tie."""
    names = names[:: 1 + len(names) // 500]  # a sample is enough, and a file may claim any number of names
    return max(layouts, key=lambda layout: sum(match(name, layouts[layout]) is not None for name in names))


def split(tensor: torch.Tensor, count: int, transposed: bool) -> tuple[torch.Tensor, ...]:
    """Our `count` tensors of one in a file, whose shape may be anything."""
    tensor = tensor.T if transposed and tensor.ndim == 2 else tensor
    return tensor.chunk(count) if count > 1 and tensor.ndim else (tensor,)


def to_layout(state: dict[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """Rename tensors from our names to those of a layout; q, k and v are joined if the layout joins them. Raises
    ValueError if the layout has no name for a tensor."""
    renamed, left = {}, set(state)
    for theirs, ours in layout.items():
        targets, transposed = parse_marks(ours)
        for found in filter(None, map(pattern_of(targets[0]).fullmatch, state)):
            names = [target.format(**found.groupdict()) for target in targets]
            parts, left = [state[name] for name in names], left - {*names}
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
            renamed[theirs.format(**found.groupdict())] = (tensor.t() if transposed else tensor).contiguous()
    if left:
        raise ValueError(f"{len(left)} of {len(state)} tensors have no name in this layout: {sorted(left)[0]}")
    return renamed
