"""Inspect, convert, merge and quantize checkpoints.

python -m formats inspect DIR                  print what a folder or file holds, without loading it
python -m formats convert SRC DST              write any supported checkpoint in the layout of transformers
python -m formats merge BASE ADAPTER OUT       add a LoRA update to the weights: a whole model again
python -m formats quantize SRC DST             put the decoder's layers into four bits (NF4)
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from formats.convert import convert_folder, merge_folder, quantize_folder
from formats.layouts import CLIP_LAYOUTS, EXTRAS, LLAVA_LAYOUTS, choose_layout, is_extra, match
from formats.llama2c import find_llama2c
from formats.tensors import open_tensors
from formats.weights import open_model
from inputs import cli
from inputs.templates import TEMPLATES
from llava import LlavaConfig

BYTES = {"float32": 4, "bfloat16": 2, "8-bit": 1, "4-bit": 0.5}


def inspect(folder: Path):
    """Print a checkpoint's layout, number of parameters, dtypes and memory per precision.

    For a LLaVA or a decoder also print its shapes and its template.
    """
    llama2c = find_llama2c(folder)
    tensors = open_model(folder)[1] if llama2c else open_tensors(folder)
    layouts = LLAVA_LAYOUTS | CLIP_LAYOUTS
    name = choose_layout(list(tensors), layouts)
    known = sum(match(key, layouts[name]) is not None or is_extra(key, EXTRAS) for key in tensors)
    count = sum(math.prod(lazy.shape) for lazy in tensors.values())
    dtypes = Counter(lazy.dtype for lazy in tensors.values())
    rows = {"layout": name, "tensors": f"{len(tensors)}, of which {known} are known to this layout"}
    rows |= {"parameters": f"{count:,}", "dtype": ", ".join(f"{dtype} ({n})" for dtype, n in dtypes.most_common())}
    rows["memory"] = ", ".join(f"{size * count / 1e9:.2f} GB as {dtype}" for dtype, size in BYTES.items())
    if name in LLAVA_LAYOUTS and (llama2c or (folder / "config.json").exists()):
        rows |= describe_config(open_model(folder)[0])
    for key, value in rows.items():
        print(f"{key:<14}{value}")


def describe_config(config: LlavaConfig) -> dict[str, str]:
    """The shapes of each part of a model, and its template, as lines of text by title."""
    text, vision = config.text_config, config.vision_config
    rows = {
        "decoder": f"{text.model_type}, width {text.hidden_size}, {text.num_hidden_layers} layers, "
        f"{text.num_attention_heads} heads ({text.num_key_value_heads} of keys and values), "
        f"vocabulary {text.vocab_size:,}, context {text.max_position_embeddings:,}"
    }
    if vision is not None:
        rows["vision tower"] = (
            f"width {vision.hidden_size}, {vision.num_hidden_layers} layers, images of {vision.image_size} pixels in "
            f"{vision.num_patches} patches; projector {config.projector_type}"
        )
    return rows | {"template": config.template}


def parse_args() -> argparse.Namespace:
    """The command line; an unknown command or flag exits with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m formats", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, text: str, *paths: str) -> Callable:
        command = commands.add_parser(name, help=text)
        for path in paths:
            command.add_argument(path, type=Path)
        return command.add_argument

    add_command("inspect", "print what a folder or file holds, without loading it", "folder")
    add = add_command("convert", "write a checkpoint in the layout of transformers", "source", "target")
    add("--vision", type=Path, help="CLIP's folder, for a LLaVA whose files have no vision tower")
    add("--llm", type=Path, help="the decoder's folder, for files that hold only a projector")
    add("--template", choices=TEMPLATES, help="the conversation template, if the guess is wrong")
    add = add_command("merge", "write a whole model with the adapter's update in its weights", "base", "adapter", "out")
    add("--vision", type=Path, help="CLIP's folder, for an adapter whose base is a decoder alone")
    bits = "4: quantize the base first and merge into the result, as QLoRA trained it"
    add("--bits", type=int, choices=(4, 16), default=16, help=bits)
    add_command("quantize", "write a model with its decoder's layers in NF4", "source", "target")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.command == "inspect":
        inspect(args.folder)
    elif args.command == "convert":
        convert_folder(args.source, args.target, args.vision, args.llm, args.template)
    elif args.command == "merge":
        merge_folder(args.base, args.adapter, args.out, args.bits, args.vision)
    else:
        quantize_folder(args.source, args.target)


if __name__ == "__main__":
    cli.run(main, "formats")
