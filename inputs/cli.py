"""Shared by all scripts: the style of their flags, and errors that the user can fix as one line, not a traceback."""

import argparse
import math
import signal
import sys
from collections.abc import Callable


def make_parser(description: str, name: str | None = None) -> argparse.ArgumentParser:
    """A parser without flags. It prints the description as it is written and takes no abbreviated flags."""
    style = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(name, description=description, formatter_class=style, allow_abbrev=False)


def as_number(text: str) -> float:
    """The number, or NaN for any other text, which fails every comparison."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def seed(text: str) -> int:
    """The type of a flag that seeds draws: a whole number of at most 20 bits, since steps and ranks take the others."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**20 - 1:,}")
    return int(text)


def above_zero(text: str) -> float:
    """The type of a flag that takes a finite number above 0."""
    if not 0 < as_number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def refuse_repeats(parser: argparse.ArgumentParser, seeds: list[int]):
    """End the program with one line if a seed comes twice: its run would count twice, and the error look smaller."""
    if len(set(seeds)) < len(seeds):
        parser.error("--seeds: one comes twice")


def run(main: Callable[[], None], name: str):
    """Call `main()`. Args: name: starts the error line, as in "train.py".

    ValueError (BadImage is one) and OSError print one line on stderr and exit with status 1; Ctrl-C prints one line and
    exits with status 130. Any other exception is a bug in this project and keeps its traceback.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        sys.exit(f"{name}: {' '.join(text.splitlines())}")
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
