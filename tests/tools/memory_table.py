"""Print a table of the memory that fine-tuning LLaVA-1.5 needs, by the estimate that train.py prints.

    python tests/tools/memory_table.py       needs no weights and hardly any memory

tests/tools/memory_accuracy.py compares the same estimate with what torch allocates.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from clip import CLIPVisionConfig
from llava import Llava, LlavaConfig, TextConfig
from lora import BLOCK, NESTED_BLOCK, NF4Linear, add_lora
from training import machine
from training.sharding import cast_weights

LENGTH = 2048
SHAPES = {"7B": {}, "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}}
SHAPES["13B"] |= {"num_attention_heads": 40}
KINDS = {  # what trains, rank, bits, type of what trains
    "all of it, AdamW on float32": ("projector,llm", 0, 16, torch.float32),
    "all of it, `--weights bfloat16`": ("projector,llm", 0, 16, torch.bfloat16),
    "LoRA, rank 16": ("projector", 16, 16, torch.float32),
    "QLoRA, rank 16": ("projector", 16, 4, torch.float32),
}


def empty_nf4(linear: torch.nn.Linear) -> NF4Linear:
    """Return an NF4 layer of the same shape, without data."""
    count = linear.weight.numel()
    blocks = count // BLOCK
    parts = {"weight": torch.empty(count // 2, 1, dtype=torch.uint8), "absmax": torch.empty(blocks, dtype=torch.uint8)}
    parts |= {"nested_absmax": torch.empty(-(-blocks // NESTED_BLOCK)), "nested_offset": torch.empty(())}
    return NF4Linear(parts, tuple(linear.weight.shape), torch.bfloat16)


def make_model(size: str, trains: str, rank: int, bits: int, trained: torch.dtype) -> Llava:
    """Return the model without data."""
    text = TextConfig(vocab_size=32064, **SHAPES[size])
    with torch.device("meta"):
        model = Llava(LlavaConfig(text, CLIPVisionConfig(image_size=336, patch_size=14), image_token_index=32000))
        train.choose_trainable(model, trains.split(","))
        if bits == 4:
            for path, module in list(model.language_model.model.layers.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    model.language_model.model.layers.set_submodule(path, empty_nf4(module))
        if rank:
            add_lora(model, {"llm": rank}, None, 0.05)
    cast_weights(model, "ddp", trained, torch.bfloat16)
    model.language_model.model.recompute = True
    return model.train()


def main():
    """Print the table."""
    ids = torch.arange(LENGTH)[None].where(
        torch.arange(LENGTH) >= 577, 32000
    )  # an image first; every other token is supervised
    ids[0, 0] = 1
    batch = {"input_ids": ids, "labels": ids.where(ids != 32000, -100), "pixel_values": torch.zeros(1, 3, 336, 336)}
    print("| | | weights | gradients | states | activations | peak, GB |\n|---|---|---:|---:|---:|---:|---:|")
    for size in SHAPES:
        for kind, shape in KINDS.items():
            found = machine.estimate(make_model(size, *shape), "ddp", 1, torch.bfloat16, batch)
            parts = [found.weights, found.gradients, found.states, found.activations, found.peak]
            print(f"| {size} | {kind} | " + " | ".join(f"{value / 1e9:.1f}" for value in parts) + " |", flush=True)


if __name__ == "__main__":
    main()
