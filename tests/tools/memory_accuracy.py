"""Compare the memory estimate that train.py prints with what torch allocates in a real step, at the bench's shapes.

    python tests/tools/memory_accuracy.py              print a table; needs 5 GB of memory and minutes on two cores

Both count weights, gradients, AdamW's states, activations and the batch. "allocated" comes from torch's profiler.
"""

import argparse
import sys
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from clip import CLIPVisionConfig
from llava import IGNORE, Llava, LlavaConfig, TextConfig
from lora import NF4Linear, add_lora
from training import machine
from training.sharding import cast_weights

# Decoder, tower, and the batch: rows, tokens per row, supervised tokens at the end of each row.
SPEEDRUN = {"vocab_size": 900, "hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 4}
SPEEDRUN |= {"num_attention_heads": 4, "tie_word_embeddings": True}
SPEEDRUN_TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
SMOL = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOL |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
SHAPES = {
    "speedrun": (SPEEDRUN, SPEEDRUN_TOWER | {"image_size": 72, "patch_size": 8}, (64, 116, 16)),
    "222m": (SMOL, {"image_size": 224, "patch_size": 16}, (4, 260, 40)),
}
KINDS = {  # what trains, rank, bits
    "stage 1": ("projector", 0, 16),
    "stage 2": ("projector,llm", 0, 16),
    "all": ("vision,projector,llm", 0, 16),
    "LoRA": ("projector", 16, 16),
    "QLoRA": ("projector", 16, 4),
}


def make_model(text: dict, vision: dict, kind: str, dtype: torch.dtype, recompute: bool) -> Llava:
    """Return a new model, ready to train."""
    trains, rank, bits = KINDS[kind]
    text = TextConfig(**text)
    model = Llava(LlavaConfig(text, CLIPVisionConfig(**vision), image_token_index=text.vocab_size - 1))
    train.choose_trainable(model, trains.split(","))
    layers = model.language_model.model.layers
    if bits == 4:
        for path, module in list(layers.named_modules()):
            if isinstance(module, torch.nn.Linear):
                layers.set_submodule(path, NF4Linear.from_weight(module.weight))
    if rank:
        add_lora(model, {"llm": rank}, None, 0.05)
    cast_weights(model, "ddp", torch.float32, dtype)
    model.language_model.model.recompute = recompute
    model.vision_tower.vision_model.recompute = recompute and "vision" in trains
    return model.train()


def make_batch(model: Llava, rows: int, length: int, supervised: int) -> dict:
    """Return a batch with one image per row, as train.py passes it to the model."""
    vision, image = model.config.vision_config, model.config.image_token_index
    ids = torch.randint(0, image, (rows, length))
    ids[:, 1 : 1 + vision.num_patches] = image
    labels = torch.full_like(ids, IGNORE)
    labels[:, -supervised:] = ids[:, -supervised:]
    pixels = torch.randn(rows, 3, vision.image_size, vision.image_size)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def allocated_bytes(model: Llava, batch: dict, dtype: torch.dtype) -> int:
    """Return the peak bytes that torch's allocator hands out in a training step, measured on the second step: then
    AdamW's states exist from the start."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(2):
        states = [value for state in optimizer.state.values() for value in state.values()]
        before = [*model.parameters(), *states, *filter(torch.is_tensor, batch.values())]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return sum(tensor.nbytes for tensor in before) + max(accumulate(changes))


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    print("| shape | trains | recomputed | estimated, MB | allocated, MB | ratio |\n|---|---|---|---:|---:|---:|")
    for shape in args.shapes:
        text, vision, rows = SHAPES[shape]
        for kind in args.kinds:
            for recompute in (False, True):
                model = make_model(text, vision, kind, torch.float32, recompute)
                batch = make_batch(model, *rows)
                ours = machine.estimate(model, "ddp", 1, torch.float32, batch).peak
                theirs = allocated_bytes(model, batch, torch.float32)
                row = f"| {shape} | {kind} | {'yes' if recompute else 'no'} | {ours / 1e6:.1f} | {theirs / 1e6:.1f} "
                print(f"{row}| {ours / theirs:.3f} |", flush=True)


if __name__ == "__main__":
    main()
