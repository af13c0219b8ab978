"""One command, one table: ours beside what a user would take instead, in one run, timed in turn.

    python -m bench                                    every row for this device; --list names them
    python -m bench --only 222m/train data             rows whose names begin so, or match, as '*/decode/*/1'
    python -m bench --json bench.json                  the same as JSON

Theirs is transformers (with peft and bitsandbytes), on the same random weights from the same folder, and every row
first makes sure that both sides compute the same. Ratios are medians over pairs, A B A B, with their spread; above 1
ours is better, for speed and for memory alike. The last column is how much of what this machine allows ours reaches:
how that is counted stands in bench_rows.py. A row that fails says why in one line, and the status is 1 at the end.
"""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

import torch
from tqdm import tqdm

from bench.contenders import SHAPES, installed
from bench.pairing import Limits, Row, processor
from bench.rows import Bench, Case, cases
from inputs.files import write_json
from training import runs
from training.ranks import choose_device

HEADER = "| | ours | theirs | ratio | goal | of the limit |\n|---|---:|---:|---:|---:|---:|"


def read_flags() -> argparse.Namespace:
    """The command line; an unknown flag or value ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="PATTERN", help="rows whose names begin so, or match")
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models to measure; 7b needs a GPU")
    add("--rounds", type=int, default=5, help="pairs per row, after one warm-up of each side")
    add("--slow", action="store_true", help="also what takes minutes a step: bfloat16 on a CPU without AVX-512")
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    add(
        "--work",
        type=Path,
        default=runs.OUTPUT_ROOT / "bench",
        help="folder of the random models, kept for the next time",
    )
    add("--json", type=Path, metavar="FILE", help="write machine and rows here, too")
    add("--list", action="store_true", help="name the rows, and no more")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def chosen(found: list[Case], patterns: list[str]) -> list[Case]:
    """Those whose names begin as a pattern, or match it; all without patterns. Raises ValueError on one of nothing."""

    def matches(case: Case, pattern: str) -> bool:
        return case.name.startswith(pattern) or fnmatch(case.name, pattern)

    for pattern in patterns:
        if not any(matches(case, pattern) for case in found):
            raise ValueError(f"--only {pattern}: no row is called so; --list names them")
    return [case for case in found if not patterns or any(matches(case, pattern) for pattern in patterns)]


def machine(device: torch.device) -> dict:
    """What the numbers hold for."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    versions = {name: importlib.metadata.version(name) if installed(name) else None for name in packages}
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        **versions,
        "date": date.today().isoformat(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# the table


def number(value: float | None) -> str:
    """Three digits that count, or a dash."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def line(row: Row) -> str:
    """A row as GitHub's markdown."""
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    if row.spread:
        ratio += f" ({row.spread[0]:.2f} to {row.spread[1]:.2f})"
    goals = [f"{row.goal:.2f}"] if row.goal else []
    goals += [f"{row.share:.0%} of the limit" if row.share < 1 else "the limit"] if row.share else []
    verdict = {True: " (met)", False: " (missed)", None: ""}[row.met]
    limit = "-" if row.limit is None else f"{row.of_limit:.0%} of {number(row.limit)}"
    cells = [row.name, number(row.ours), number(row.theirs), ratio, (", ".join(goals) or "-") + verdict, limit]
    return "| " + " | ".join(cells) + " |"


def measure(bench: Bench, case: Case) -> Iterator[Row]:
    """The rows of a case. Raises ValueError, of one line, for whatever went wrong in it."""
    bench.limits = Limits(bench.device)  # anew, since the machine drifts
    try:
        yield from case.run(bench, case.name)
    except Exception as error:  # other people's libraries raise what they like, and the next row can still run
        reason = str(error).strip().splitlines() or ["no reason given"]
        raise ValueError(f"{case.name}: {type(error).__name__}: {reason[0][:200]}") from error
    finally:
        torch.compiler.reset()  # it compiles a function for so many shapes and no more, and counts those of other cases
        if bench.gpu:
            torch.cuda.empty_cache()


def main():
    """Measure and print row by row; status 1 if one failed."""
    args = read_flags()
    try:
        device = torch.device(choose_device(args.device))
        found = chosen(cases(device, args.shapes, args.slow), args.only)
    except ValueError as error:
        sys.exit(f"bench: {error}")
    if args.list:
        for case in found:
            print(case.name + (f"   (left out: {case.left_out})" if case.left_out else ""))
        return
    theirs = installed("transformers")
    if not theirs:
        print("bench: nothing to compare with: `pip install -e .[reference]`", file=sys.stderr)
    bench, rows, failed = Bench(device, args.work, args.rounds, theirs), [], 0
    for why in dict.fromkeys(case.left_out for case in found if case.left_out):
        names = ", ".join(case.name for case in found if case.left_out == why)
        print(f"bench: left out, {why}: {names}", file=sys.stderr)
    print(HEADER, flush=True)
    bar = tqdm([case for case in found if not case.left_out], "bench", unit="case")
    for case in bar:
        bar.set_postfix_str(case.name)
        try:
            for row in measure(bench, case):
                rows.append(row)
                bar.write(line(row), sys.stdout)
        except ValueError as error:
            failed += 1
            bar.write(f"bench: {error}", sys.stderr)
        for note in bench.notes:
            bar.write(f"bench: {case.name}: {note}", sys.stderr)
        bench.notes.clear()
        if args.json:  # after every case: what took an hour is not lost with the next one
            write_json(args.json, {"machine": machine(device), "rows": [row.as_json() for row in rows]})
    if failed:
        sys.exit(f"bench: {failed} failed")
