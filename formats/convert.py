"""Convert, quantize and merge: each function reads a folder and writes another one."""

from pathlib import Path

import torch

from formats.adapters import Adapter, build_with_adapter, read_adapter
from formats.saving import merged_adapters, publish_model
from formats.weights import build_model, grow_vocabulary, load_checkpoint, load_tokenizer, open_model
from llava import Llava
from lora import NF4Linear, frozen_linear, lora_layers, merge


def check_target(target: Path):
    if target.exists():
        raise ValueError(f"{target}: exists already")


def convert_folder(source: Path, target: Path, vision: Path | None, llm: Path | None, template: str | None):
    """Write any supported checkpoint in the layout of transformers, in its own dtype. Arguments as in build_model."""
    check_target(target)
    config, tensors = open_model(source)
    config.template = template or config.template
    tokenizer = load_tokenizer(llm or source, config)
    model = build_model(config, tensors, source, "cpu", None, vision, llm)
    if config.vision_config is not None:
        grow_vocabulary(model, tokenizer.vocab_size)
    publish_model(model, tokenizer, target, merged_adapters(source))


def quantize_folder(source: Path, target: Path):
    """Write a model with the matrices of its decoder's layers in NF4, in the format of bitsandbytes."""
    check_target(target)
    _, tensors = open_model(source)
    if any(lazy.dtype == "NF4" for lazy in tensors.values()):
        raise ValueError(f"{source}: is in four bits already")
    model, tokenizer = load_checkpoint(source, "cpu", None, bits=4)
    publish_model(model, tokenizer, target, merged_adapters(source))
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    size = sum(p.nbytes for layer in layers for p in layer.parameters())
    count = sum(layer.in_features * layer.out_features for layer in layers)
    print(f"{target}: {count:,} weights of {len(layers)} layers in {8 * size / count:.3f} bits each")


def merge_folder(base: Path, adapter: Path, out: Path, bits: int = 16, vision: Path | None = None):
    """Write `base` with the adapter's update in its weights, never in four bits. Arguments as in load_with_adapter.

    Raises ValueError and writes nothing if the logits of the result differ from those of base and adapter.
    """
    check_target(out)
    found = read_adapter(adapter)
    model, tokenizer = build_with_adapter(base, found, "cpu", None, bits, vision)
    quantized = any(isinstance(module, NF4Linear) for module in model.modules())
    difference, largest = merge_checked(model, found)
    if model.config.vision_config is not None:
        grow_vocabulary(model, tokenizer.vocab_size)  # a decoder alone has no room for <image>
    publish_model(model, tokenizer, out, [*merged_adapters(base), found.sha256])
    print(f"{out}: logits of up to {largest:.3g} differ by at most {difference:.1e} from those of base and adapter")
    if quantized:
        print(
            f"the base was in four bits, this is in {str(model.dtype).removeprefix('torch.')}; "
            f"`python -m formats quantize {out} DIR` rounds weights and update to four bits again"
        )


def merge_checked(model: Llava, adapter: Adapter) -> tuple[float, float]:
    """Merge in place. Returns the largest difference between logits before and after, and the largest logit.

    Raises ValueError if there is nothing to merge, or if the difference is more than rounding.
    """
    before = probe_logits(model)
    # Merge A and B as they were trained, not rounded to the model's dtype.
    for path, layer in lora_layers(model).items():
        layer.lora_A.weight.data, layer.lora_B.weight.data = adapter.lora[path][:2]
    merge(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            model.set_submodule(path, frozen_linear(module.dequantize(), module.bias))
    after = probe_logits(model)
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    if not difference <= {torch.float32: 1e-4}.get(model.dtype, 0.05) * largest:
        raise ValueError(f"merged, logits of up to {largest:.3g} differ by {difference:.2g}: not the same model")
    return difference, largest


@torch.no_grad()
def probe_logits(model: Llava) -> torch.Tensor:
    """Logits (1, T, V) float32 of a fixed input: 24 tokens, after 8 features of a noise image for a LLaVA."""
    generator, text = torch.Generator().manual_seed(0), model.config.text_config
    ids = torch.randint(0, min(text.vocab_size, model.config.image_token_index), (1, 24), generator=generator)
    x = model.language_model.model.embed_tokens(ids)
    if (vision := model.config.vision_config) is not None:
        noise = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
        x = torch.cat([model.multi_modal_projector(model.vision_features(noise)[:, :8]), x], dim=1)
    return model.language_model.lm_head(model.language_model.model(x)).float()
