"""Inspect, convert, merge, quantize and average checkpoints.

python -m formats inspect DIR                  print what a folder or file holds, without loading it
python -m formats convert SRC DST              write any supported checkpoint in the layout of transformers
python -m formats merge BASE ADAPTER OUT       add a LoRA update to the weights: a whole model again
python -m formats quantize SRC DST             put the decoder's layers into four bits (NF4)
python -m formats average A B OUT --share 0.5  average the weights of a model before and after a training
"""

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from formats.adapters import load_with_adapter, read_adapter
from formats.layouts import CLIP_LAYOUTS, COMPUTED, LLAVA_LAYOUTS, choose_layout, match
from formats.llama2c import find_llama2c
from formats.saving import publish_model
from formats.tensors import open_tensors
from formats.weights import build_model, grow_vocabulary, load_checkpoint, load_tokenizer, open_model
from inputs import cli
from inputs.gguf_files import find_gguf
from inputs.templates import TEMPLATES
from llava import Llava
from lora import NF4Linear, frozen_linear, lora_layers, merge
from variants.connectors import READ_PROMPT

BYTES = {"float32": 4, "bfloat16": 2, "8-bit": 1, "4-bit": 0.5}


def inspect(folder: Path):
    """Print a checkpoint's layout, parameters, dtypes and memory; of a LLaVA or decoder also shapes and template."""

    def show(key: str, value: str):
        print(f"{key:<14}{value}")

    llama2c = find_llama2c(folder)
    tensors = open_model(folder)[1] if llama2c else open_tensors(folder)
    layouts = LLAVA_LAYOUTS | CLIP_LAYOUTS
    name = choose_layout(list(tensors), layouts)
    known = sum(1 for key in tensors if match(key, layouts[name]) or re.fullmatch(COMPUTED, key))
    count = sum(math.prod(lazy.shape) for lazy in tensors.values())
    dtypes = Counter(lazy.stored or lazy.dtype for lazy in tensors.values())
    show("layout", f"{name}, in GGUF" if (gguf := find_gguf(folder)) else name)
    show("tensors", f"{len(tensors)}, of which {known} are known to this layout")
    show("parameters", f"{count:,}")
    show("dtype", ", ".join(f"{dtype} ({n})" for dtype, n in dtypes.most_common()))
    show("memory", ", ".join(f"{size * count / 1e9:.2f} GB as {dtype}" for dtype, size in BYTES.items()))
    if name in LLAVA_LAYOUTS and (llama2c or gguf or (folder / "config.json").exists()):
        config = open_model(folder)[0]
        text, vision = config.text_config, config.vision_config
        heads = f"{text.num_attention_heads} heads ({text.num_key_value_heads} of keys and values)"
        shape = f"{text.model_type}, width {text.hidden_size}, {text.num_hidden_layers} layers, {heads}"
        show("decoder", f"{shape}, vocabulary {text.vocab_size:,}, context {text.max_position_embeddings:,}")
        if vision is not None:
            images = f"images of {vision.image_size} pixels in {vision.num_patches} patches"
            shape = f"width {vision.hidden_size}, {vision.num_hidden_layers} layers, {images}"
            show("vision tower", f"{shape}; projector {config.projector_type}: {config.tokens_per_image} tokens")
        show("chat template", config.template)


def convert_folder(source: Path, target: Path, vision: Path | None, llm: Path | None, template: str | None):
    """Write any supported checkpoint in the layout of transformers, in its own dtype. Arguments as in build_model."""
    config, tensors = open_model(source, vision)
    config.template = template or config.template
    tokenizer = load_tokenizer(llm or source, config)
    model = build_model(config, tensors, source, "cpu", None, vision, llm)
    if config.vision_config is not None:
        grow_vocabulary(model, tokenizer.vocab_size)
    publish_model(model, tokenizer, target, source)


def quantize_folder(source: Path, target: Path):
    """Write a model with the matrices of its decoder's layers in NF4, in the format of bitsandbytes."""
    _, tensors = open_model(source)
    if any(lazy.dtype == "NF4" for lazy in tensors.values()):
        raise ValueError(f"{source}: is in four bits already")
    model, tokenizer = load_checkpoint(source, "cpu", None, bits=4)
    publish_model(model, tokenizer, target, source)
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    size = sum(p.nbytes for layer in layers for p in layer.parameters())
    count = sum(layer.in_features * layer.out_features for layer in layers)
    print(f"{target}: {count:,} weights of {len(layers)} layers in {8 * size / count:.3f} bits each")


def merge_folder(base: Path, adapter: Path, out: Path, bits: int = 16, vision: Path | None = None):
    """Write `base` with the adapter's update in its weights, never in four bits. Arguments as in load_with_adapter.

    Raises ValueError and writes nothing if the logits of the result differ from those of base and adapter by more than
    rounding, or if there is nothing to merge.
    """
    model, tokenizer = load_with_adapter(base, adapter, "cpu", None, bits, vision)
    before, found, dtype = probe_logits(model), read_adapter(adapter, vision), str(model.dtype).removeprefix("torch.")
    if found.tuning:
        raise ValueError(f"{adapter}: only LoRA can be merged; a {found.tuning.kind} stays beside its base: --adapter")
    for path, layer in lora_layers(model).items():  # A and B as they were trained, not rounded to the model's dtype
        layer.lora_A.weight.data, layer.lora_B.weight.data, _, lengths = found.lora[path]
        if lengths is not None:
            layer.lora_magnitude_vector.data = lengths
    was_quantized = any(isinstance(module, NF4Linear) for module in model.modules())
    merge(model)
    if model.config.lora_images_only:
        model.config.lora_images_only = False
        print("the update now applies to text without an image, too")
    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            model.set_submodule(path, frozen_linear(module.dequantize(), module.bias))
    difference, largest = float((probe_logits(model) - before).abs().max()), float(before.abs().max())
    if not difference <= (1e-4 if dtype == "float32" else 0.05) * largest:
        raise ValueError(f"merged, logits of up to {largest:.3g} differ by {difference:.2g}: not the same model")
    if model.config.vision_config is not None:
        grow_vocabulary(model, tokenizer.vocab_size)  # a decoder alone has no room for <image>
    publish_model(model, tokenizer, out, base, found.sha256)
    print(f"{out}: logits of up to {largest:.3g} differ by at most {difference:.1e} from those of base and adapter")
    if was_quantized:
        print(f"the base was in four bits, this is in {dtype}; ", end="")
        print(f"`python -m formats quantize {out} DIR` rounds weights and update to four bits again")


def average_folders(a: Path, b: Path, out: Path, share: float):
    """Write the model whose weights are (1 - share) times those of `a` plus share times those of `b`.

    `b` was trained from `a`: this keeps more of what `a` can do (WiSE-FT, Wortsman et al. 2021, arXiv 2109.01903).
    Raises ValueError if their tokenizers, configs or parameters differ in name or shape, or hold four bits.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"--share {share:g}: the share of B must be between 0 and 1")
    (one, other), (two, tokenizer) = (load_checkpoint(folder, "cpu", None) for folder in (a, b))
    meanings = [(t.specials, t.word_ids, t.codec.spelled) for t in (other, tokenizer)]  # of the ids, in any file format
    if meanings[0] != meanings[1]:
        raise ValueError(f"{a} and {b} have different tokenizers: B was not trained from A")
    for part in ("text_config", "vision_config", "projector_type"):
        if getattr(one.config, part) != getattr(two.config, part):
            raise ValueError(f"{a} and {b} differ in {part}: B was not trained from A")
    if any(isinstance(module, NF4Linear) for model in (one, two) for module in model.modules()):
        raise ValueError(f"{a}, {b}: weights in four bits cannot be averaged")
    first, second = (dict(model.named_parameters()) for model in (one, two))
    differ = [name for name in first.keys() | second.keys() if get_shape(first, name) != get_shape(second, name)]
    if differ:
        raise ValueError(f"{a} and {b} differ in the shape of {len(differ)} parameters: {sorted(differ)[0]}, ...")
    for name, p in second.items():
        p.data.copy_(torch.lerp(first[name].detach().float(), p.detach().float(), share))
    publish_model(two, tokenizer, out, b)
    print(f"{out}: {1 - share:g} of {a} and {share:g} of {b}")


def get_shape(parameters: dict[str, torch.nn.Parameter], name: str) -> tuple[int, ...] | None:
    return tuple(parameters[name].shape) if name in parameters else None


@torch.no_grad()
def probe_logits(model: Llava) -> torch.Tensor:
    """Logits (1, T, V) float32 of a fixed input: 24 tokens, after 8 tokens of a noise image for a LLaVA, or all tokens
    of a connector that reads the prompt."""
    generator, text = torch.Generator().manual_seed(0), model.config.text_config
    ids = torch.randint(0, min(text.vocab_size, model.config.image_token_index), (1, 24), generator=generator)
    x = model.language_model.model.embed_tokens(ids)
    if (vision := model.config.vision_config) is not None:
        noise = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
        features, config = model.vision_features(noise), model.config
        if config.projector_type in READ_PROMPT:
            marks = torch.full((1, config.tokens_per_image), config.image_token_index)
            x = model.embed(torch.cat([marks, ids], dim=1), features)
        else:
            x = torch.cat([model.multi_modal_projector(features)[:, :8], x], dim=1)
    return model.language_model.lm_head(model.language_model.model(x)).float()


def main():
    """Run the command; an unknown command or flag exits with status 2."""
    name, style = "python -m formats", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=name, description=__doc__, formatter_class=style, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)

    def add_command(name: str, run: Callable, *paths: str) -> Callable:
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        for path in paths:
            command.add_argument(path, type=Path)
        return command.add_argument

    add_command("inspect", inspect, "folder")
    add_command("quantize", quantize_folder, "source", "target")
    add = add_command("convert", convert_folder, "source", "target")
    add("--vision", type=Path, help="CLIP's folder, for a LLaVA whose files have no vision tower")
    add("--llm", type=Path, help="the decoder's folder, for files that hold only a projector")
    add("--template", choices=TEMPLATES, help="the conversation template, if the guess is wrong")
    add = add_command("merge", merge_folder, "base", "adapter", "out")
    add("--vision", type=Path, help="CLIP's folder, for an adapter whose base is a decoder alone")
    bits = "4: quantize the base first and merge into the result, as QLoRA trained it"
    add("--bits", type=int, choices=(4, 16), default=16, help=bits)
    add = add_command("average", average_folders, "a", "b", "out")
    add("--share", type=float, default=0.5, help="share of the second model (default: 0.5)")
    args = vars(parser.parse_args())
    for name in {"target", "out"} & args.keys():
        if args[name].exists():
            raise ValueError(f"{args[name]}: exists already")
    args.pop("run")(**args)


if __name__ == "__main__":
    cli.run(main, "formats")
