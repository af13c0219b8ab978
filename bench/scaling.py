"""What a step of stage 2 costs as things grow: measured on this machine, beside what the formulas say.

    python -m bench.scaling --out assets/scaling.png   time and memory against pictures, text, batch, ranks; minutes
    python -m bench.scaling --wire                     eight GPUs and a 7B, on paper: bytes on the wire, arithmetic

Time's line is meters.step_flops over the arithmetic per second that the middle of all points got; memory's points are
what torch's tensors held at most in a real step, its line is memory.estimate, which runs none.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from clip import CLIPVisionConfig
from llava import IGNORE, Llava, LlavaConfig, TextConfig
from training import memory, meters, plots, sharding
from training.ranks import Distributed

# ---------------------------------------------------------------------------------------------------------------------
# one point

TEXT = TextConfig(vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6)
TOWER = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6}
POINT = {"side": 112, "pictures": 1, "text": 64, "rows": 4}  # pixels; of a row: pictures, tokens beside them; rows
SWEEPS = {  # what grows, what its axis says, and through which values
    "side": ("picture, pixels a side", (56, 112, 224, 448)),
    "pictures": ("pictures in a row", (1, 2, 4, 8)),
    "text": ("tokens of text in a row", (32, 128, 512)),
    "rows": ("rows in the batch", (1, 4, 16)),
}


def new_step(side: int, pictures: int, text: int, rows: int) -> tuple[Llava, dict]:
    """A small LLaVA whose projector and decoder train, and a batch for it; half of the text is supervised."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=side, patch_size=14, **TOWER)
    config = LlavaConfig(TEXT, vision, image_token_index=TEXT.vocab_size - 1)
    config.text_config.max_position_embeddings = 1 << 16
    model = Llava(config).train()
    model.vision_tower.requires_grad_(False)
    ids = torch.randint(0, TEXT.vocab_size - 1, (rows, pictures * vision.num_patches + text))
    ids[:, : pictures * vision.num_patches] = config.image_token_index
    labels = ids.clone()
    labels[:, : -(text // 2)] = IGNORE
    return model, {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(rows * pictures, 3, side, side)}


def flops_of(model: Llava, batch: dict) -> float:
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    return meters.step_flops(model, ids.numel(), ids.shape[1], len(pixels))


def measure(point: dict, shard: str, ranks: Distributed, seconds: float) -> dict:
    """{"seconds", "bytes", "flops", "estimate"} of a step: the middle of those that fit into so many seconds."""
    model, batch = new_step(**point)
    found = {"flops": flops_of(model, batch)}
    found["estimate"] = memory.estimate(model, shard, ranks.world_size, torch.float32, batch).peak
    sharding.shard_model(model, shard, ranks, torch.float32)
    optimizer = sharding.make_adamw([{"params": [p for p in model.parameters() if p.requires_grad]}], shard, lr=1e-4)
    network, times, begin = sharding.wrap_model(model, shard), [], time.perf_counter()

    def step() -> float:
        start = time.perf_counter()
        (network(**batch) / batch["labels"].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    step()  # AdamW makes its states
    while len(times) < 3 or ranks.all_reduce_max(time.perf_counter() - begin < seconds):
        times.append(step())
    states = [v for state in optimizer.state.values() for v in state.values()]
    with memory.MemoryCounter([*model.parameters(), *states, *batch.values()]) as counted:
        step()
    return found | {"seconds": statistics.median(times), "bytes": counted.peak}


def on_ranks(count: int, seconds: float) -> dict:
    """`measure` on processes of torchrun, each with a core and the same work: more ranks, more batch."""
    script = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", __file__]
    command = [sys.executable, *script, "--rank-of", "ddp", "--seconds", str(seconds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# the figure

BLUE, RED = "#1f4e8c", "#c0392b"
TIMES, SIZES = (0.1, 0.2, 0.5, 1, 2, 5), (50, 100, 200, 400)  # on the axes


def draw(found: dict[str, dict[int, dict]], path: Path):
    """A column per thing that grows: above, seconds a step; below, megabytes. Points measured, lines computed."""
    rates = [p["flops"] / p["seconds"] for name in SWEEPS for p in found[name].values()]
    rate = statistics.median(rates)
    names = {name: label for name, (label, _) in SWEEPS.items()} | {"ranks": "ranks (DDP, gloo), 4 rows each"}
    figure = plots.new_figure(3.1 * len(names), 5.4)
    axes = figure.subplots(2, len(names), sharex="col", sharey="row")
    for column, (name, label) in zip(axes.T, names.items()):
        points = found[name]
        values = list(points)
        lines = [[p["flops"] / rate for p in points.values()], [p["estimate"] / 1e6 for p in points.values()]]
        marks = [[p["seconds"] for p in points.values()], [p["bytes"] / 1e6 for p in points.values()]]
        for axis, line, mark, color in zip(column, lines, marks, (BLUE, RED)):
            axis.plot(values, line, color=color, linewidth=1.5, alpha=0.6)
            axis.plot(values, mark, "o", color=color, markersize=5)
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(values, values)
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.2)
        column[1].set_xlabel(label)
    for axis, label, ticks in zip(axes[:, 0], ("seconds a step", "memory of a rank, MB"), (TIMES, SIZES)):
        axis.set_ylabel(label)
        axis.set_yticks(ticks, ticks)
    axes[0][0].set_title(f"line: FLOP / {rate / 1e9:.0f} GFLOP/s", fontsize=9, loc="left")
    axes[1][0].set_title("line: memory.estimate", fontsize=9, loc="left")
    figure.savefig(path, dpi=110)


def sweep(seconds: float) -> dict[str, dict[int, dict]]:
    """Every point of every sweep: {name: {value: what `measure` returns}}."""
    found, alone = {}, Distributed("cpu")
    for name, (_, values) in SWEEPS.items():
        found[name] = {}
        for value in values:
            found[name][value] = p = measure(POINT | {name: value}, "ddp", alone, seconds)
            print(f"{name} {value}: {p['seconds']:.3f} s, {p['bytes'] / 1e6:.0f} MB", file=sys.stderr, flush=True)
    found["ranks"] = {1: found["rows"][POINT["rows"]], 2: on_ranks(2, seconds)}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# on paper


def wire_bytes(model: Llava, shard: str, world: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that each rank sends in a step, by what is sent, as sharding.py has it; rings send (N - 1) / N of a tensor.

    ddp: gradients, in the type of their weights, are summed (reduced, then gathered: twice).
    zero1: the same, then every rank broadcasts the weights it has updated; sent once by each in all, as in a ring.
    fsdp: slices are gathered in the arithmetic's type for the forward pass and, but for what is no decoder layer, again
    for the way back, those that stand still too; gradients are reduced in float32.
    """
    trained = sharding.trainable_parameters(model).values()
    gradients, part = sum(p.nbytes for p in trained), (world - 1) / world
    if shard == "fsdp":
        layers = sum(p.numel() for p in model.language_model.model.layers.parameters())
        whole = sum(p.numel() for p in model.parameters())
        found = {"gather, forward": whole * dtype.itemsize, "gather, backward": layers * dtype.itemsize}
        found["reduce"] = 4 * sum(p.numel() for p in trained)
    else:
        found = {"reduce and gather": 2 * gradients} | ({"broadcast": gradients} if shard == "zero1" else {})
    return {name: int(size * part) for name, size in found.items()}


# Bytes per second: of a GPU to its neighbor; of a machine to the next, which a ring of all GPUs leaves once.
LINKS = {"NVLink, 450 GB/s": 450e9, "4 x 200 Gb/s, 100 GB/s": 100e9, "100 Gb/s, 12.5 GB/s": 12.5e9}
WORLD, ROWS, LENGTH, SUPERVISED, MFU = 8, 16, 776, 100, 0.5


def wire():
    """Print what eight H100s need for stage 2 of LLaVA-1.5-7B at a batch of 128."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = LlavaConfig(TextConfig(vocab_size=32064), CLIPVisionConfig(image_size=336, patch_size=14, **vision))
    with torch.device("meta"):
        model = Llava(config).train()
    model.vision_tower.requires_grad_(False)
    model.language_model.model.recompute = True
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    ids[:, :576] = config.image_token_index
    labels = ids.clone()
    labels[:, :-SUPERVISED] = IGNORE
    batch = {"input_ids": ids, "labels": labels, "pixel_values": torch.zeros(ROWS, 3, 336, 336)}
    flops = flops_of(model, batch)
    seconds = flops / meters.PEAKS["H100"] / MFU
    print(f"{ROWS} x {LENGTH} tokens a GPU: {flops / 1e15:.2f} PFLOP, {seconds:.2f} s at {MFU:.0%} of 989 TFLOP/s\n")
    print("| | each rank sends, GB | in all |", " | ".join(LINKS), "| a rank holds, GB |")
    print("|---|---|---:|" + "---:|" * len(LINKS) + "---:|")
    for shard in sharding.MODES:
        sharding.cast_weights(model, shard, torch.float32, torch.bfloat16)
        sent = wire_bytes(model, shard, WORLD, torch.bfloat16)
        parts, whole = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in sent.items()), sum(sent.values())
        times = " | ".join(f"{whole / speed:.2f} s, {whole / speed / seconds:.0%}" for speed in LINKS.values())
        held = memory.estimate(model, shard, WORLD, torch.bfloat16, batch)
        print(f"| {shard} | {parts} | {whole / 1e9:.1f} | {times} | {held.peak / 1e9:.0f} |", flush=True)


def main():
    """Measure and draw, or print the table; called by torchrun, measure one point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("assets/scaling.png"))
    add("--seconds", type=float, default=4.0, help="of measuring for each point")
    add("--wire", action="store_true", help="print what eight GPUs send each other")
    add("--rank-of", choices=sharding.MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a rank, a core
    if args.wire:
        wire()
    elif args.rank_of:
        ranks = Distributed("cpu")
        found = measure(POINT, args.rank_of, ranks, args.seconds)
        if ranks.is_main:
            print(json.dumps(found))
        dist.destroy_process_group()
    else:
        draw(sweep(args.seconds), args.out)


if __name__ == "__main__":
    main()
