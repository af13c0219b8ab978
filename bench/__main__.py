"""One command, one table: the plain model, the accelerated model and the reference libraries, timed in turn.

    python -m bench                              every row for this device; --list names them
    python -m bench --only 222m/train            rows by the start of their names, or by a pattern: '*/decode/*/1'
    python -m bench --items                      the gain of each item of fast/ alone
    python -m bench --json bench/cpu.json        also write the machine and the rows as JSON

All sides read the same random weights, and a row fails unless they compute the same numbers. Each side runs in a
process of its own. They take turns, so that a drift of the machine's speed hits all of them: a ratio is that of the two
columns, the medians of the rounds, with the smallest and the largest ratio of a round. A row that fails prints one
line, and the exit status is then 1.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import date
from fnmatch import fnmatch
from itertools import combinations, product
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from bench.contenders import KINDS, Worker
from bench.models import SHAPES, WAYS, Job, model_folder
from fast.accelerate import ITEMS
from inputs import cli
from inputs.files import OUTPUT_ROOT, write_json
from training.ranks import choose_device

SIDES = ("plain", "fast", "theirs")  # the plain model, the accelerated model, the reference libraries
RATIOS = (("plain", "theirs"), ("fast", "plain"), ("fast", "theirs"))
HEADER = "| | plain | fast | theirs | plain / theirs | fast / plain | fast / theirs |\n|---|" + "---:|" * 6


def make_jobs(device: str) -> dict[str, Job]:
    """Return all rows by name: training and answering of each shape. Job.folder: the shape."""
    usual, jobs = "bfloat16" if device.startswith("cuda") else "float32", {}  # as sample.py chooses
    for name, shape in SHAPES.items():
        job = Job("", name, shape, device, usual)
        for way, dtype, compiled in product(WAYS, ("float32", "bfloat16"), (False, True)):
            if not (compiled and "lora" in way):
                step = replace(job, kind="train", way=way, dtype=dtype, compiled=compiled)
                jobs[f"{name}/train/{way}/{dtype}" + "/compiled" * compiled] = step
        for kind, (rows, compiled) in product(("float32", "bfloat16", "nf4"), ((1, False), (8, False), (1, True))):
            if kind == "nf4" and name == "speedrun":
                continue  # bitsandbytes 0.50.2 gives wrong numbers where a row's length is no multiple of 64
            dtype, bits = (usual, 4) if kind == "nf4" else (kind, 16)
            step = replace(job, kind="decode", dtype=dtype, bits=bits, batch=rows, compiled=compiled)
            jobs[f"{name}/decode/{kind}/{rows}" + "/compiled" * compiled] = step
        jobs[f"{name}/first-token"] = replace(job, kind="first_token")
    return jobs


def select_jobs(jobs: dict[str, Job], patterns: list[str]) -> dict[str, Job]:
    """Return the rows whose names begin with a pattern or match it. Raises ValueError if a pattern matches none."""
    chosen = set()
    for pattern in patterns:
        matching = {name for name in jobs if name.startswith(pattern) or fnmatch(name, pattern)}
        if not matching:
            raise ValueError(f"--only {pattern}: no row has this name; --list names them")
        chosen |= matching
    return {name: job for name, job in jobs.items() if name in chosen or not patterns}


def item_jobs(jobs: dict[str, Job], items: list[str]) -> dict[str, Job]:
    """Return the rows of training, then of decoding, each with all items of fast/ and with each of `items` alone."""
    training = [name for name, job in jobs.items() if job.kind == "train" and not job.compiled]
    decoding = [name for name, job in jobs.items() if job.kind == "decode" and job.batch == 1]
    variants = {"all": None} | {item: [item] for item in items}
    return {f"{name}, {v}": replace(jobs[name], only=variants[v]) for name, v in product(training + decoding, variants)}


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def tolerance_of(job: Job) -> float:
    """Return the relative difference that rounding in the job's dtype may cause."""
    return max({"float32": 1e-3, "bfloat16": 5e-2}[job.dtype], 2e-2 if job.bits == 4 or job.way == "qlora" else 0)


def check_equal(numbers: dict[str, list[float]], tolerance: float):
    """Raise ValueError if two sides' numbers differ by more than `tolerance` times the largest of them."""
    for (a, x), (b, y) in combinations(numbers.items(), 2):
        x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
        if len(x) != len(y):
            raise ValueError(f"{a} returns {len(x)} numbers, {b} {len(y)}")
        difference, allowed = float((x - y).abs().max()), tolerance * float(y.abs().max())
        if not difference <= allowed:  # also if one is not a number
            raise ValueError(f"{a} and {b} compute numbers that differ by {difference:.2g}; allowed is {allowed:.2g}")


def take_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each side's call returns in each round; in a round, each side runs once."""
    turns = [{side: call() for side, call in calls.items()} for _ in range(rounds)]
    return {side: [turn[side] for turn in turns] for side in calls}


def measure(name: str, job: Job, sides: list[str], rounds: int) -> Iterator[dict]:
    """Yield a row of speed and, for training that is not compiled, one of memory.

    If "theirs" fails, a line says so and the rows leave it out. Raises ValueError if another side fails, or if the
    sides compute different numbers.
    """
    with ExitStack() as stack:
        running = {}
        for side in sides:
            try:
                running[side] = stack.enter_context(closing(Worker(side, job)))
            except ValueError as error:
                if side != "theirs":
                    raise
                tqdm.write(f"bench: {name}: {error}"[:300], sys.stderr)
        check_equal({side: worker.numbers for side, worker in running.items()}, tolerance_of(job))
        seconds = take_turns({side: worker.seconds for side, worker in running.items()}, rounds)
        yield make_row(name, KINDS[job.kind][1], seconds)
        if job.kind == "train" and not job.compiled:  # the compiler takes memory of its own
            yield make_row(name, "MB", {side: [worker.bytes] for side, worker in running.items()})


def make_row(name: str, unit: str, costs: dict[str, list[float]]) -> dict:
    """Return a line of the table: "values" of each side in the unit, "ratios" of two sides in every round.

    A ratio a/b above 1 means that a takes less time or memory than b. Args: costs: of each side by round, in seconds
    for one unit of work, or in bytes if the unit is "MB".
    """
    convert = {"ms": lambda cost: 1e3 * cost, "MB": lambda cost: cost / 1e6}.get(unit, lambda cost: 1 / cost)
    values, ratios = {side: convert(median(column)) for side, column in costs.items()}, {}
    for a, b in RATIOS:
        if a in costs and b in costs:
            ratios[f"{a}/{b}"] = [cost_b / cost_a for cost_a, cost_b in zip(costs[a], costs[b])]
    return {"name": name, "unit": unit, "values": values, "ratios": ratios}


def format_row(name: str, unit: str, values: dict[str, float], ratios: dict[str, list[float]]) -> str:
    """Return the row as a line of a Markdown table, with a dash for each side that is missing."""
    cells = [format_number(values[side]) if side in values else "-" for side in SIDES]
    power = -1 if unit in ("ms", "MB") else 1  # less of them is better
    for a, b in RATIOS:
        rounds = ratios.get(f"{a}/{b}")
        cells.append(format_ratio((values[a] / values[b]) ** power, rounds) if rounds else "-")
    return f"| {name}, {unit} | {' | '.join(cells)} |"


def format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_ratio(ratio: float, rounds: list[float]) -> str:
    """Return the ratio and, of several rounds, their smallest and largest."""
    return f"{ratio:.2f}" + (f" ({min(rounds):.2f} to {max(rounds):.2f})" if len(rounds) > 1 else "")


def describe_machine(device: torch.device) -> dict:
    """Return the date, the machine and the versions that the numbers hold for."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    model_names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model_names[0].strip() if model_names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        **{p: importlib.metadata.version(p) if importlib.util.find_spec(p) else None for p in packages},
    }


# ---------------------------------------------------------------------------------------------------------------------
# the command


def read_flags() -> argparse.Namespace:
    """Return the flags; an unknown flag or value ends the program with status 2."""
    parser = cli.make_parser(__doc__, "python -m bench")
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="PATTERN", help="measure rows whose names begin with this, or match")
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="sides to measure; fewer save time and memory")
    add("--items", nargs="*", choices=ITEMS, help="measure the items of fast/ one by one, all or these")
    add("--rounds", type=int, default=5, help="rounds per row, after one warm-up of each side")
    add("--device", help="cpu, cuda or cuda:N; default: cuda if there is a GPU")
    add("--work", type=Path, default=OUTPUT_ROOT / "bench", help="folder to keep the random models in")
    add("--json", type=Path, metavar="FILE", help="also write the machine and the rows to this file")
    add("--list", action="store_true", help="only print the names of the rows")
    args = parser.parse_args()
    args.items = list(ITEMS) if args.items == [] else args.items
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def main():
    """Measure and print row by row; if a row failed, the exit status is 1."""
    args = read_flags()
    device = choose_device(args.device)
    jobs = select_jobs(make_jobs(device), args.only)
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
                bar.write(format_row(**row), sys.stdout)
        except ValueError as error:
            failed += 1
            bar.write(f"bench: {name}: {error}"[:300], sys.stderr)
        if args.json:  # after each row, so that an interruption loses only one
            write_json(args.json, {"machine": describe_machine(torch.device(device)), "rows": rows})
    if failed:
        raise ValueError(f"{failed} of {len(jobs)} rows failed")


if __name__ == "__main__":  # each side's process imports this file, too
    cli.run(main, "bench")
