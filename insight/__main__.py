"""Find what is wrong with a training run, in sentences: python -m insight RUN."""

import sys
from pathlib import Path

from inputs import cli
from insight.diagnose import diagnose
from training.ranks import choose_device


def main():
    """Print each fault of a run, or one line if there is none; the exit status is 1 if there is a fault."""
    parser = cli.make_parser(__doc__, "python -m insight")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a training run")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    args = parser.parse_args()
    found, summary = diagnose(args.run, choose_device(args.device))
    print("\n".join([*found, summary]))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    cli.run(main, "insight")
