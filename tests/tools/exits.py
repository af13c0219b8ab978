"""Start tiny runs of two ranks again and again, and count those that end with status 0.

    python tests/tools/exits.py                        20 runs under each mode of --shard, about ten minutes
    python tests/tools/exits.py --shard fsdp --n 5

`bash test.sh` does not run this; a test there makes sure that no thread of gloo outlives a run.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from training.sharding import MODES  # noqa: E402
from world.writer import write_world  # noqa: E402


def train(*argv, ranks: int = 1) -> subprocess.CompletedProcess:
    """Run train.py on so many ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, REPOSITORY / "train.py", *argv]
    return subprocess.run([*map(str, command)], capture_output=True, text=True)


def main():
    """Make a tiny LLaVA, continue from it in every mode, and print one row for each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--n", type=int, default=20, help="runs in each mode")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_world(root / "world", 64, 0, 72, 20, 2)
        common = ["--world", root / "world", "--steps", 2, "--batch-size", 8, "--device", "cpu"]
        train("--stage", 0, "--size", "tiny", *common, "--out", root / "towers").check_returncode()
        towers = ["--vision", root / "towers/clip", "--llm", root / "towers/decoder"]
        train("--stage", 1, *towers, *common, "--out", root / "first").check_returncode()
        failed = 0
        for mode in args.shard:
            flags = ["--stage", 2, "--model", root / "first", *common, "--shard", mode]
            runs = [train(*flags, "--out", root / f"{mode}-{i}", ranks=2) for i in tqdm(range(args.n), mode)]
            bad = [run for run in runs if run.returncode]
            print(f"{mode:<6}{args.n - len(bad):>4} of {args.n} runs end with 0")
            print("".join(run.stderr[-2000:] for run in bad[:1]), end="")
            failed += len(bad)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
