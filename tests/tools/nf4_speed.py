"""Time NF4 against bitsandbytes on the same cores, in turns (A B A B): medians and their spread.

A ratio above 1 means that this project is faster.

python tests/tools/nf4_speed.py --threads 2
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import bitsandbytes.functional as theirs
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora import NF4Linear

ROWS = 256


def paired(ours, other, rounds: int) -> tuple[float, float, float, float]:
    """Median seconds of both, the median ratio of a round, and half of its interquartile range."""
    pairs = []
    for _ in range(rounds + 1):
        times = []
        for call in (ours, other):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        pairs.append(times)
    a, b = zip(*pairs[1:])  # the first warms up
    ratios = [y / x for x, y in zip(a, b)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return statistics.median(a), statistics.median(b), ratio, (high - low) / 2


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| | type | ours, ms | bitsandbytes, ms | ratio |\n|---|---|---:|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = torch.randn(4096, 4096).to(dtype), torch.randn(ROWS, 4096).to(dtype)
        codes, state = theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        layer = NF4Linear.from_weight(weight)
        calls = {
            "quantize 4096 x 4096, doubly": (
                lambda w=weight: NF4Linear.from_weight(w),
                lambda w=weight: theirs.quantize_4bit(w, quant_type="nf4", compress_statistics=True),
            ),
            "dequantize": (
                lambda layer=layer: layer.dequantize(),
                lambda c=codes, s=state: theirs.dequantize_4bit(c, s),
            ),
            f"dequantize and multiply by {ROWS} rows": (
                lambda layer=layer, x=x: layer(x),
                lambda c=codes, s=state, x=x: F.linear(x, theirs.dequantize_4bit(c, s)),
            ),
        }
        for operation, (ours, other) in calls.items():
            a, b, ratio, spread = paired(ours, other, args.rounds)
            kind = str(dtype).removeprefix("torch.")
            print(f"| {operation} | {kind} | {1e3 * a:.1f} | {1e3 * b:.1f} | {ratio:.2f} +- {spread:.2f} |", flush=True)


if __name__ == "__main__":
    main()
