"""Call a function for many numbers, in worker processes if there are enough of them."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

MIN_PARALLEL = 20_000  # with fewer calls, starting worker processes (about a second) would not pay
BATCH = 256  # calls that a worker process makes before it sends their results


def call_all(function: Callable, numbers: list[int]) -> list:
    return [function(number) for number in numbers]


def parallel_map(function: Callable, numbers: Sequence[int], title: str) -> list:
    """The list of function(number) for each number. A progress bar called `title` appears after a second."""
    workers = min(os.cpu_count(), 32) if len(numbers) >= MIN_PARALLEL else 0
    # Its workers call the function, as their collate_fn. Without a generator of its own the loader would advance
    # torch's global one, which dropout draws from.
    options = {"num_workers": workers, "collate_fn": partial(call_all, function), "generator": torch.Generator()}
    loader = DataLoader(numbers, batch_size=BATCH, **options)
    return list(chain.from_iterable(tqdm(loader, desc=title, unit="record", unit_scale=BATCH, delay=1)))
