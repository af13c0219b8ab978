"""Whether this machine can do the run: enough memory, and cores that other programs leave free.

Every parallel operation ends when its slowest thread does, and a training step has thousands of them. A thread that
waits for a core holds up all others: two threads on two busy cores made stage 2 thirty times slower.
"""

import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import nn

from data import Records, collate
from inputs.images import BadImage
from inputs.records import DataError
from inputs.samples import Samples
from training import memory
from training.ranks import Distributed

BUSY = 0.8  # below this share the cores are shared; on an idle machine it is 0.95 or more


def core_share(threads: int, seconds: float = 0.4) -> float:
    """Share of `threads` cores that torch's threads get: CPU time over wall time, of small parallel operations.

    A thread that waits for the others spins, so on an idle machine the share is close to 1. torch.set_num_threads is
    not called, so that a run computes the same with and without this measurement.
    """
    x = torch.ones(threads, 100_000)  # above the size from which torch divides an operation among threads
    for _ in range(10):  # the first operations start the threads
        x.mul_(1.0)
    cpu, wall = time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < seconds:
        x.mul_(1.0)
    return (time.process_time() - cpu) / (time.perf_counter() - wall) / threads


def busy_warning(device: torch.device, threads: int, measure: Callable[[int], float] = core_share) -> str | None:
    """One line for the user if training on the CPU with several threads will wait for busy cores, else None."""
    if device.type != "cpu" or threads == 1:
        return None
    share = measure(threads)
    if share >= BUSY:
        return None
    cores = f"{threads} threads get {share:.0%} of {threads} cores, and every step waits for the slowest"
    return f"the cores are busy: {cores}; OMP_NUM_THREADS=1 (one thread) may be many times faster"


def check_machine(ranks: Distributed, model: nn.Module, shard: str, dtype: torch.dtype, batch: dict | None):
    """Print what a rank will hold in memory, and whether its cores are busy.

    Args: shard: --shard; dtype: the compute dtype; batch: the largest micro-batch. ValueError if the memory is not
    enough for weights, gradients and AdamW's states alone.
    """
    needed = memory.estimate(model, shard, ranks.world_size, dtype, batch)
    available = memory.available_bytes(ranks.device)
    ranks.print0(f"{needed}; {available / 1e9:.3g} GB are available")
    memory.check_fits(needed, available)
    if ranks.is_main and (warning := busy_warning(ranks.device, torch.get_num_threads())):
        ranks.print0(warning)


def largest_batch(dataset: Samples, size: int, pad_id: int) -> dict | None:
    """A micro-batch of the longest samples; None if none of them can be loaded, which its own step will report."""
    lengths = abs(dataset.lengths()) if isinstance(dataset, Records) else range(len(dataset))
    samples = []
    for index in np.argsort(lengths)[::-1][:size]:
        with suppress(DataError, BadImage):
            samples.append(dataset.sample(int(index)))
    return collate((samples * size)[:size], pad_id) if samples else None
