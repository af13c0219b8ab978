"""One command, one table: the plain model, the accelerated model and the reference libraries, timed in turn.

    python -m bench                              every row for this device; --list names them
    python -m bench --only 222m/train data       rows whose names begin so, or match, such as '*/decode/*/1'
    python -m bench --items                      the gain of each item of fast/ alone, on the headline rows
    python -m bench --json bench/cpu.json        write machine and rows as JSON, too

All sides read the same random weights, and a row fails unless they compute the same numbers. Each side runs in a
process of its own; they take turns. A ratio is the median over the rounds, with its spread; above 1 the first named
side takes less time or memory. A row that fails says why in one line, and the exit status is 1 at the end.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from datetime import date
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from bench.models import SHAPES, WAYS, Job, model_folder
from bench.pairing import SIDES, Row, check_equal, format_row, make_row, processor_name, take_turns
from bench.worker import ColdStart, Worker
from fast.accelerate import ITEMS
from inputs.files import OUTPUT_ROOT, write_json
from training.ranks import choose_device

HEADER = "| | plain | fast | theirs | plain / theirs | fast / plain | fast / theirs |\n|---|" + "---:|" * 6
UNITS = {"train": "samples/s", "decode": "tokens/s", "first_token": "ms", "cold_start": "ms"}
UNITS |= {"images": "images/s", "tokenize": "MB/s"}


def make_jobs(device: str) -> dict[str, Job]:
    """All rows by name: of each shape training, answering and a cold start; then the data. Job.folder names a shape."""
    usual, jobs = "bfloat16" if device.startswith("cuda") else "float32", {}  # as sample.py chooses
    for name, shape in SHAPES.items():
        job = Job("", name, device, usual, rows=shape.rows, length=shape.length, supervised=shape.supervised)
        for way, dtype in product(WAYS, ("float32", "bfloat16")):
            step = replace(job, kind="train", way=way, dtype=dtype)
            jobs[f"{name}/train/{way}/{dtype}"] = step
            if "lora" not in way:
                jobs[f"{name}/train/{way}/{dtype}/compiled"] = replace(step, compiled=True)
        for kind, (rows, compiled) in product(("float32", "bfloat16", "nf4"), ((1, False), (8, False), (1, True))):
            if kind == "nf4" and name == "speedrun":
                continue  # bitsandbytes 0.50.2 gives wrong numbers where a row's length is no multiple of 64
            dtype, bits = (usual, 4) if kind == "nf4" else (kind, 16)
            step = replace(job, kind="decode", dtype=dtype, bits=bits, batch=rows, compiled=compiled)
            jobs[f"{name}/decode/{kind}/{rows}" + "/compiled" * compiled] = step
        jobs[f"{name}/first-token"] = replace(job, kind="first_token")
        jobs[f"{name}/cold-start"] = replace(job, kind="cold_start")
    return jobs | {"data/images": Job("images", "222m"), "data/tokenizing": Job("tokenize", "speedrun")}


def select_jobs(jobs: dict[str, Job], patterns: list[str]) -> dict[str, Job]:
    """The rows whose names begin with a pattern or match it; all without patterns. ValueError if one matches none."""
    found = {p: [name for name in jobs if name.startswith(p) or fnmatch(name, p)] for p in patterns}
    if unmatched := [pattern for pattern in patterns if not found[pattern]]:
        raise ValueError(f"--only {unmatched[0]}: no row has this name; --list names them")
    chosen = {name for names in found.values() for name in names}
    return {name: job for name, job in jobs.items() if name in chosen or not patterns}


def item_jobs(jobs: dict[str, Job], items: list[str]) -> dict[str, Job]:
    """The rows of training and of decoding one row, accelerated by all items of fast/ and by each of these alone."""
    training = [name for name, job in jobs.items() if job.kind == "train" and not job.compiled]
    decoding = [name for name, job in jobs.items() if job.kind == "decode" and job.batch == 1]
    variants = {"all": None} | {item: [item] for item in items}
    return {f"{name}, {v}": replace(jobs[name], only=variants[v]) for name, v in product(training + decoding, variants)}


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def tolerance_of(job: Job) -> float:
    """The difference that `check_equal` allows: rounding in the job's type; none for data."""
    if job.kind in ("images", "tokenize"):
        return 0.0
    return max({"float32": 1e-3, "bfloat16": 5e-2}[job.dtype], 2e-2 if job.bits == 4 or job.way == "qlora" else 0)


def measure(name: str, job: Job, sides: list[str], rounds: int) -> Iterator[Row]:
    """A row of speed and, of training and a cold start, one of memory; without theirs if that does not run here.

    Raises ValueError if plain or fast fails, or if the sides compute different numbers.
    """
    make_side = ColdStart if job.kind == "cold_start" else Worker
    with ExitStack() as stack:
        running = {}
        for side in sides:
            if side == "fast" and job.kind in ("images", "tokenize"):
                continue  # nothing in fast/ is about data
            try:
                running[side] = stack.enter_context(closing(make_side(side, job)))
            except ValueError as error:
                if side != "theirs":
                    raise
                tqdm.write(f"bench: {name}: {error}"[:300], sys.stderr)
        check_equal({side: it.numbers for side, it in running.items()}, tolerance_of(job))
        seconds = take_turns({side: it.seconds for side, it in running.items()}, rounds)
        yield make_row(name, UNITS[job.kind], seconds, next(iter(running.values())).amount)
        if job.kind in ("train", "cold_start") and not job.compiled:  # the compiler takes memory of its own
            yield make_row(name, "MB", {side: [it.bytes] for side, it in running.items()})


def describe_machine(device: torch.device) -> dict:
    """The machine and the versions that the numbers hold for."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    versions = {p: importlib.metadata.version(p) if importlib.util.find_spec(p) else None for p in packages}
    found = {"cpu": processor_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found |= {"capability": torch.backends.cpu.get_cpu_capability(), "date": date.today().isoformat()}
    return found | {"gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None} | versions


# ---------------------------------------------------------------------------------------------------------------------
# the command


def read_flags() -> argparse.Namespace:
    """The command line; an unknown flag or value ends the program with status 2."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("python -m bench", description=__doc__, **form)
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="PATTERN", help="rows whose names begin so, or match")
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="leave out a side to save time and memory")
    add("--items", nargs="*", choices=ITEMS, help="measure items of fast/ (all, or those named) each on its own")
    add("--rounds", type=int, default=5, help="rounds per row, after one warm-up of each side")
    add("--device", help="cpu, cuda or cuda:N; default: cuda if there is a GPU")
    add("--work", type=Path, default=OUTPUT_ROOT / "bench", help="folder of the random models, kept for the next time")
    add("--json", type=Path, metavar="FILE", help="write machine and rows to this file, too")
    add("--list", action="store_true", help="print the names of the rows and end")
    args = parser.parse_args()
    args.items = list(ITEMS) if args.items == [] else args.items
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def main():
    """Measure and print row by row; exit status 1 if one failed."""
    args = read_flags()
    try:
        device = choose_device(args.device)
        jobs = select_jobs(make_jobs(device), args.only)
    except ValueError as error:
        sys.exit(f"bench: {error}")
    if args.items:
        jobs, args.sides = item_jobs(jobs, args.items), ["plain", "fast"]
    if args.list:
        print(*jobs, sep="\n")
        return
    rows, failed = [], 0
    print(HEADER, flush=True)
    for name, job in (bar := tqdm(jobs.items(), "bench", unit="row")):
        bar.set_postfix_str(name)
        try:
            job = replace(job, folder=str(model_folder(job.folder, args.work)))
            for row in measure(name, job, args.sides, args.rounds):
                rows.append(row)
                bar.write(format_row(row), sys.stdout)
        except ValueError as error:
            failed += 1
            bar.write(f"bench: {name}: {error}"[:300], sys.stderr)
        if args.json:  # each time, so that an interruption loses one row only
            found = {"machine": describe_machine(torch.device(device)), "rows": [asdict(row) for row in rows]}
            write_json(args.json, found)
    if failed:
        sys.exit(f"bench: {failed} of {len(jobs)} rows failed")
