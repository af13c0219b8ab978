"""Call a function for many indices, in worker processes if there are enough of them."""

import os
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

MIN_PARALLEL = 20_000  # calls from which on worker processes are started, which takes about a second


class Calls(Dataset):
    """function(0), function(1), ... as a dataset, so that DataLoader distributes the calls."""

    def __init__(self, function: Callable, count: int):
        self.function, self.count = function, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return self.function(index)


def parallel_map(function: Callable, count: int, title: str) -> list:
    """[function(0), ..., function(count - 1)]; a progress bar called `title` appears after a second."""
    workers = min(os.cpu_count(), 32) if count >= MIN_PARALLEL else 0
    # Without a generator of its own the loader would advance torch's global one, which dropout draws from.
    generator = torch.Generator()
    loader = DataLoader(
        Calls(function, count), batch_size=256, num_workers=workers, collate_fn=list, generator=generator
    )
    results = []
    with tqdm(total=count, desc=title, unit="record", unit_scale=True, delay=1) as bar:
        for part in loader:
            results += part
            bar.update(len(part))
    return results
