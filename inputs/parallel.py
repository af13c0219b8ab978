"""Call a function for many indices, in worker processes if there are enough of them."""

import os
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

MIN_PARALLEL = 20_000  # with fewer calls, starting worker processes (about a second) would not pay


def call_all(function: Callable, indices: list[int]) -> list:
    return [function(index) for index in indices]


def parallel_map(function: Callable, count: int, title: str) -> list:
    """Return [function(0), ..., function(count - 1)]. A progress bar called `title` appears after a second."""
    workers = min(os.cpu_count(), 32) if count >= MIN_PARALLEL else 0
    # Its workers call the function, as their collate_fn. Without a generator of its own the loader would advance
    # torch's global one, which dropout draws from.
    options = {"num_workers": workers, "collate_fn": partial(call_all, function), "generator": torch.Generator()}
    loader = DataLoader(range(count), batch_size=256, **options)
    results = []
    with tqdm(total=count, desc=title, unit="record", unit_scale=True, delay=1) as bar:
        for part in loader:
            results += part
            bar.update(len(part))
    return results
