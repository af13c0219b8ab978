"""Whole folders in, whole folders out: convert a checkpoint, merge an adapter, quantize."""

from pathlib import Path

import torch

from formats.adapters import Adapter, build_with_adapter, read_adapter
from formats.saving import merged_into, publish_model
from formats.weights import build, grow_vocabulary, load_checkpoint, load_tokenizer, open_model
from llava import Llava
from lora import NF4Linear, frozen_linear, lora_layers, merge


def convert_folder(source: Path, target: Path, vision: Path | None, llm: Path | None, template: str | None):
    """Any model as a folder of ours, in its own dtype."""
    if target.exists():
        raise ValueError(f"{target}: exists already")
    config, tensors = open_model(source)
    config.template = template or config.template
    tokenizer = load_tokenizer(llm or source, config)
    model = build(config, tensors, source, "cpu", None, vision, llm)
    if config.vision_config is not None:
        grow_vocabulary(model, tokenizer.vocab_size)

    publish_model(model, tokenizer, target, merged_into(source))


@torch.no_grad()
def logits(model: Llava) -> torch.Tensor:
    """What a model says to 8 features of a noise picture and 24 tokens, (1, T, V) float32: to compare two with."""
    generator, text = torch.Generator().manual_seed(0), model.config.text_config
    ids = torch.randint(0, min(text.vocab_size, model.config.image_token_index), (1, 24), generator=generator)
    x = model.language_model.model.embed_tokens(ids)
    if (vision := model.config.vision_config) is not None:
        noise = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
        x = torch.cat([model.multi_modal_projector(model.vision_features(noise)[:, :8]), x], dim=1)
    return model.language_model.lm_head(model.language_model.model(x)).float()


def merge_folder(base: Path, adapter: Path, out: Path, bits: int = 16, vision: Path | None = None):
    """Write `base` with the adapter in its weights; never in four bits, though the base may be, or is made so here.

    Raises ValueError, nothing written, if that would not be the same model. For the arguments see load_with_adapter.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already")
    found = read_adapter(adapter)
    model, tokenizer = build_with_adapter(base, found, "cpu", None, bits, vision)
    apart, largest, narrow = merge_checked(model, found)
    if model.config.vision_config is not None:
        grow_vocabulary(model, tokenizer.vocab_size)  # a decoder alone has no room for <image>
    publish_model(model, tokenizer, out, [*merged_into(base), found.sha256])
    print(f"{out}: logits of up to {largest:.3g} differ by at most {apart:.1e} from those of base and adapter")
    if narrow:
        print(
            f"the base was in four bits, this is in {str(model.dtype).removeprefix('torch.')}; "
            f"`python -m formats quantize {out} DIR` rounds it, update and all, to four bits again"
        )


def merge_checked(model: Llava, adapter: Adapter) -> tuple[float, float, bool]:
    """Merge in place; returns how far the logits moved, their largest, and whether the base was in NF4.

    Raises ValueError if there was nothing to merge, or if the logits moved by more than rounding explains.
    """
    unmerged, narrow = logits(model), any(isinstance(module, NF4Linear) for module in model.modules())
    for path, layer in lora_layers(model).items():  # as they were trained, and not in the type of the model
        layer.lora_A.weight.data, layer.lora_B.weight.data = adapter.lora[path][:2]
    merge(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            model.set_submodule(path, frozen_linear(module.dequantize(), module.bias))
    merged = logits(model)
    apart, largest = float((merged - unmerged).abs().max()), float(unmerged.abs().max())
    if not apart <= {torch.float32: 1e-4}.get(model.dtype, 0.05) * largest:
        raise ValueError(f"merged, logits of up to {largest:.3g} differ by {apart:.2g}: this is not the same model")
    return apart, largest, narrow


def quantize_folder(source: Path, target: Path):
    """Write a model with its decoder's layers in NF4, as bitsandbytes would."""
    if target.exists():
        raise ValueError(f"{target}: exists already")
    _, tensors = open_model(source)
    if any(lazy.dtype == "NF4" for lazy in tensors.values()):
        raise ValueError(f"{source}: is in four bits already")
    model, tokenizer = load_checkpoint(source, "cpu", None, bits=4)

    publish_model(model, tokenizer, target, merged_into(source))
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    size = sum(p.nbytes for layer in layers for p in layer.parameters())
    count = sum(layer.in_features * layer.out_features for layer in layers)
    print(f"{target}: {count:,} weights of {len(layers)} layers in {8 * size / count:.3f} bits each")
