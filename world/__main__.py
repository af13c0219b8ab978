"""Write the embedded world as a data set: images and LLaVA-format JSON, for this trainer or another.

python -m world write --out DIR --n N --seed S
"""

import argparse
import signal
import sys
from pathlib import Path

from inputs import cli
from world.drawing import SHIFTS
from world.language import TURNS
from world.writer import write_world


def main():
    """Write a world; the same flags write the same bytes."""
    parser = argparse.ArgumentParser(prog="python -m world", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("write", help="draw a world's images and write its text as LLaVA's JSON").add_argument
    add("--out", type=Path, required=True, help="folder to write to")
    add("--n", type=int, default=20_000, help="number of training images")
    add("--seed", type=cli.seed, default=0, help="seed of the scenes and their text")
    add("--size", type=int, default=72, help="side of an image in pixels; 224 or 336 for a pretrained CLIP")
    add("--questions", type=int, default=2_000, help="number of held-out questions, each about an image of its own")
    add("--turns", type=int, default=TURNS, help="questions per training dialogue; an image has several dialogues")
    add("--shift", choices=SHIFTS, default="none", help="change the look of the images, to fine-tune on")
    args = parser.parse_args()
    if min(args.n, args.size, args.turns) < 1 or args.questions < 0:
        parser.error("--n, --size and --turns must be at least 1, --questions at least 0")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # also ends the drawing processes
    write_world(args.out, args.n, args.seed, args.size, args.questions, args.turns, args.shift)
    print(f"{args.out}: captions.json, instruct.json, text.json, questions.jsonl, scenes.jsonl")


if __name__ == "__main__":
    cli.run(main, "world")
