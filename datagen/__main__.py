"""Make instruction data for train.py from images with captions and boxes.

    python -m datagen make scenes.jsonl --images WORLD --out DIR              templates: no model, no network
    python -m datagen make photos.json --images PHOTOS --out DIR --llm MODEL_FOLDER
    python -m datagen make captions.json instances.json --images COCO --out DIR \\
        --endpoint https://host/v1 --llm NAME --price 0.15 0.60               asks before it spends anything
    python -m datagen convert questions.json annotations.json --from vqav2 --out vqav2.json     docs/convert.md

The key of an endpoint is read from the environment (DATAGEN_KEY, or the name after --key-env). See docs/datagen.md.
"""

import argparse
import json
import re
import signal
from pathlib import Path

from datagen.asking import KINDS, PROMPTS
from datagen.convert import add_convert
from datagen.filters import FILTERS, NAMES
from datagen.make import make
from datagen.nouns import LIST
from inputs import cli


def read_words(text: str) -> tuple[str, tuple[int, int]]:
    """ "detail=40-300" as ("detail", (40, 300))."""
    found = re.fullmatch(rf"({'|'.join(KINDS)})=(\d+)-(\d+)", text)
    if not found or int(found[2]) > int(found[3]):
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=LEAST-MOST, such as detail=40-300")
    return found[1], (int(found[2]), int(found[3]))


def read_body(text: str) -> dict:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return values


def add_make(commands):
    """Add the command `make` with its flags."""
    style = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("make", help="captions and boxes become LLaVA's JSON", formatter_class=style)
    parser.set_defaults(run=make, check=check_make)
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="captions, boxes or scenes: see datagen/items.py")
    add("--images", type=Path, required=True, help="folder that image paths start from")
    add("--out", type=Path, required=True, help="folder to write to; the same command goes on after a stop")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS[:3], help=f"default: {' '.join(KINDS[:3])}")
    add("--n", type=int, help="the first N images only")
    add("--pixels", action="store_true", help="boxes of a list are in pixels")
    add("--skip-bad", action="store_true", help="leave out bad entries and missing images; default: stop")
    add = parser.add_argument_group("teacher (default: templates)").add_argument
    add("--llm", metavar="NAME", help="model at --endpoint; without it, folder or GGUF file of a model")
    add("--endpoint", metavar="URL", help="OpenAI-compatible address, up to /v1")
    add("--key-env", default="DATAGEN_KEY", metavar="NAME", help="environment variable with the key")
    add("--prompts", type=Path, default=PROMPTS, help="folder of prompts; default: datagen/prompts")
    add("--no-system", action="store_true", help="the system prompt goes before the first question, for an endpoint")
    add("--temperature", type=float, default=0.0, help="of an endpoint; default: 0")
    body = """more fields of a request; null leaves one out: '{"max_tokens": null, "max_completion_tokens": 800}'"""
    add("--body", type=read_body, default={}, metavar="JSON", help=body)
    add("--max-tokens", type=int, default=800, help="longest answer")
    add("--batch-size", type=int, default=8, help="requests at a time of a local model")
    add = parser.add_argument_group("calls").add_argument
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="price of a million tokens, read and written")
    add("--tokenizer", type=Path, help="folder of a model, to count tokens exactly; default: a token has 4 characters")
    add("--yes", action="store_true", help="go on without asking, for scripts")
    add("--workers", type=int, default=8, help="calls at a time")
    add("--per-minute", type=float, default=0.0, help="most calls a minute; default: no limit of ours")
    add("--timeout", type=float, default=120.0, help="seconds of one call")
    add("--tries", type=int, default=8, help="of one request")
    add("--batch-file", type=Path, help="write the requests for a batch instead of calling")
    add("--batch-results", type=Path, nargs="+", help="read the results of such a batch")
    add("--offline", action="store_true", help="ask nothing: use the answers that are there")
    add = parser.add_argument_group("filters").add_argument
    add("--filters", nargs="*", choices=NAMES, default=[*FILTERS], help="default: all but balance")
    add("--nouns", type=Path, default=LIST, help="names of objects for the filter noun")
    add("--words", type=read_words, nargs="+", default=[], metavar="KIND=LEAST-MOST", help="words of an answer")


def check_make(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """End with status 2 if flags do not go together."""
    calls = [name for name in ("endpoint", "batch_file", "batch_results", "offline", "price") if getattr(args, name)]
    if calls and not args.llm:
        parser.error(f"--{calls[0].replace('_', '-')} needs --llm NAME")
    if args.no_system and not (args.endpoint or args.batch_file or args.batch_results):
        parser.error("--no-system goes with --endpoint; a local model's template decides by itself")
    if args.batch_file and (args.endpoint or args.offline or args.batch_results):
        parser.error("--batch-file calls nothing: no --endpoint, no --offline, no --batch-results")
    numbers = (args.workers, args.tries, args.max_tokens, args.batch_size, args.n or 1)
    if min(numbers) < 1 or args.timeout <= 0 or args.per_minute < 0 or args.temperature < 0:
        parser.error("--workers, --tries, --max-tokens, --batch-size, --n must be at least 1, --timeout above 0")
    if args.price and min(args.price) < 0:
        parser.error("--price must not be negative")
    args.words, args.kinds = dict(args.words), [kind for kind in KINDS if kind in args.kinds]


def main():
    """Run one command."""
    parser = cli.make_parser(__doc__, "python -m datagen")
    commands = parser.add_subparsers(required=True)
    add_make(commands)
    add_convert(commands)
    args = parser.parse_args()
    args.check(parser, args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: answers on the way are waited for
    args.run(args)


if __name__ == "__main__":
    cli.run(main, "datagen")
