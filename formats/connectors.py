"""Connectors of other models: from the names in transformers' files to those in variants/connectors.py, and back.

    qformer         Blip2ForConditionalGeneration          qformer_text    InstructBlipForConditionalGeneration
    resampler       IdeficsForVisionText2Text              pixel_shuffle   Idefics3ForConditionalGeneration

A connector fits into a LLaVA whose tower and decoder have the widths that it was trained with.
"""

import torch

from formats.layouts import Layout, add_prefixes, match, to_layout


def bert_attention(theirs: str, ours: str) -> Layout:
    """An attention of BERT and the norm after it. Args: theirs, ours: its name before the parts'."""
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    names = {f"attention.{name}.{{p}}": f"attention.{renamed}.{{p}}" for name, renamed in projections.items()}
    names |= {"output.dense.{p}": "attention.out_proj.{p}", "output.LayerNorm.{p}": "norm.{p}"}
    return add_prefixes(f"{theirs}.", f"{ours}_", names)


def bert_mlp(suffix: str, ours: str, norm: str) -> Layout:
    return {
        f"intermediate{suffix}.dense.{{p}}": f"{ours}up_proj.{{p}}",
        f"output{suffix}.dense.{{p}}": f"{ours}down_proj.{{p}}",
        f"output{suffix}.LayerNorm.{{p}}": f"{ours}{norm}.{{p}}",
    }


QFORMER_LAYER = bert_attention("attention", "self") | bert_attention("crossattention", "cross")
QFORMER_LAYER |= bert_mlp("_query", "", "mlp_norm")
QFORMER = {"query_tokens": "queries", "qformer.layernorm.{p}": "norm.{p}", "language_projection.{p}": "projection.{p}"}
QFORMER |= add_prefixes("qformer.encoder.layer.{n}.", "layers.{n}.", QFORMER_LAYER)
TEXT = {"qformer.embeddings.layernorm.{p}": "norm.{p}"}
TEXT["qformer.embeddings.position_embeddings.weight"] = "text_positions"
TEXT |= add_prefixes("qformer.encoder.layer.{n}.", "text_mlps.{n}.", bert_mlp("", "", "norm"))
RESAMPLER_LAYER = {
    "0.context_layer_norm.{p}": "context_norm.{p}",
    "0.latents_layer_norm.{p}": "latents_norm.{p}",
    "0.q_proj.{p}": "attention.q_proj.{p}",
    "0.k_proj.{p}": "attention.k_proj.{p}",
    "0.v_proj.{p}": "attention.v_proj.{p}",
    "0.output_proj.{p}": "attention.out_proj.{p}",
    "1.ln.{p}": "mlp_norm.{p}",
    "1.fc.{p}": "up_proj.{p}",
    "1.c_proj.{p}": "down_proj.{p}",
}
RESAMPLER = {"latents": "latents", "layer_norm.{p}": "norm.{p}"}
RESAMPLER |= add_prefixes("blocks.{n}.", "layers.{n}.", RESAMPLER_LAYER)
TABLES: dict[str, Layout] = {
    "qformer": QFORMER,
    "qformer_text": {name: ours for name, ours in QFORMER.items() if not ours.startswith("norm.")} | TEXT,
    "resampler": add_prefixes("model.perceiver_resampler.", "", RESAMPLER),
    "pixel_shuffle": {"model.connector.modality_projection.proj.weight": "projection.weight"},
}

OURS_ONLY = {"resampler": ("projection.weight", "projection.bias")}
OURS_ONLY["qformer_text"] = ("text_projection.weight", "text_projection.bias")


def read_connector(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a connector, by our names, from a model of transformers; its other parts are ignored.

    Two parts of InstructBLIP have no place in a qformer_text: BERT's embeddings, in whose place it has the decoder's,
    and the last layer's MLP for text, whose result nothing reads. IDEFICS has nothing for the resampler's `projection`.
    Raises ValueError if `tensors` has no such connector.
    """
    named = {found[0][0]: tensor for name, tensor in tensors.items() if (found := match(name, TABLES[kind]))}
    if not named:
        raise ValueError(f"no tensor is one of a {kind}: {next(iter(TABLES[kind]))} is missing, and all others")
    if "queries" in named:
        named["queries"] = named["queries"].flatten(0, -2)  # (1, M, C) in files
    depth = 1 + max((int(name.split(".")[1]) for name in named if name.startswith("layers.")), default=0)
    return {name: tensor for name, tensor in named.items() if not name.startswith(f"text_mlps.{depth - 1}.")}


def write_connector(kind: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of read_connector. What transformers has no name for is left out: `projection` of a resampler and
    `text_projection` of a qformer_text."""
    absent = OURS_ONLY.get(kind, ())
    renamed = to_layout({name: p for name, p in weights.items() if name not in absent}, TABLES[kind])
    return {name: tensor[None] if name == "query_tokens" else tensor for name, tensor in renamed.items()}
