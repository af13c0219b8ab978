"""Many files as one: how much of each is seen, and in which order; all of it a pure function of its arguments.

    --data a.json b.json:2                     one epoch is every record of a once and of b twice, in random order
    --mixing equal, --mixing 2                 shares instead of epochs: as large as each other, or ~ records^(1/2)
    --shares 80/20                             shares as named
    --shares 80/20:20/80:4                     80/20, 60/40, 40/60 and 20/80, each for a quarter of the run

The batch of a step is the same set of records on any number of ranks and with any --accumulate, and a run that is
resumed asks for the steps that are left: nothing is replayed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from inputs.records import Fault, RecordFile

# ---------------------------------------------------------------------------------------------------------------------
# what is mixed


@dataclass
class Source:
    """One file of a mixture. images: the folder its paths start from. weight: times each record is seen in an epoch.

    faults: number of a record -> why it is left out; what the file's index found, and later what its pictures lack.
    """

    file: RecordFile
    images: Path
    weight: float = 1.0
    faults: dict[int, Fault] = field(default_factory=dict)

    def __post_init__(self):
        self.faults = self.file.faults | self.faults

    def usable(self) -> np.ndarray:
        """Numbers of the records that are used, (N,)."""
        return np.setdiff1d(np.arange(len(self.file), dtype=np.int32), list(self.faults))


def open_sources(texts: list[str], folders: list[str] | None) -> list[Source]:
    """`PATH` or `PATH:WEIGHT` each, and a folder of pictures for all or for each; by default the one a file is in.

    Raises ValueError, in one line, before anything is read that would take long.
    """
    named = [split_weight(text) for text in texts]
    folders = [Path(folder) for folder in folders or []]
    if len(folders) not in (0, 1, len(named)):
        raise ValueError(f"--images names {len(folders)} folders for {len(named)} files: give one, or one for each")
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--images {folder}: no such folder")
    folders = folders * len(named) if len(folders) == 1 else folders or [path.parent for path, _ in named]
    return [Source(RecordFile(path), folder, weight) for (path, weight), folder in zip(named, folders)]


def split_weight(text: str) -> tuple[Path, float]:
    """ "a.json:2" is a path and its weight; a file whose own name has a colon is found first. Raises ValueError."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    value = as_number(weight)
    if not 0 < value < math.inf:
        raise ValueError(f"--data {text}: no such file, and {weight!r} is no weight, which is a number above 0")
    return Path(path), value


def as_number(text: str) -> float:
    """NaN where a text is no number, so that a comparison refuses it."""
    try:
        return float(text)
    except ValueError:
        return math.nan


# ---------------------------------------------------------------------------------------------------------------------
# in which order; `take(first, last)` gives the samples at these positions of the run

Order = Callable[[int, int], np.ndarray]


def check_mixing(weights: list[float], mixing: str, shares: str, group: int):
    """Raise ValueError if these do not go together; arguments as of order_of."""
    if group > 1 and (shares or mixing != "proportional"):
        raise ValueError("CLIP learns from neighbors in a file: it takes --mixing proportional, and no --shares")
    if shares and (mixing != "proportional" or set(weights) != {1.0}):
        raise ValueError("--shares says how much of each file: leave the weights and --mixing out")
    if shares and (named := read_shares(shares).shape[1]) != len(weights):
        raise ValueError(f"--shares {shares} is for {named} files, --data names {len(weights)}")


def order_of(
    sizes: list[int], weights: list[float], seed: int, total: int, mixing: str, shares: str, group: int
) -> Order:
    """The order of a run of `total` samples from sources of these sizes, which are numbered one after another.

    Args: mixing, shares: as on the command line. group: neighbors that stay together. Raises ValueError.
    """
    check_mixing(weights, mixing, shares, group)
    if not shares and mixing == "proportional":
        return epochs(sizes, weights, seed, group)
    if shares:
        path = read_shares(shares)
    else:
        path = np.array([[w * n ** (1 / read_mixing(mixing)) for w, n in zip(weights, sizes)]])
    return evenly(sizes, path / path.sum(1, keepdims=True), seed, total)


def read_mixing(text: str) -> float:
    """The temperature T of shares that go with records^(1/T): 1 for "proportional", infinite for "equal"."""
    value = {"proportional": 1.0, "equal": math.inf}.get(text) or as_number(text)
    if not value > 0:
        raise ValueError(f"--mixing {text}: proportional, equal, or a temperature above 0")
    return value


def read_shares(text: str) -> np.ndarray:
    """ "80/20" as (1, 2), "80/20:20/80:4" as (4, 2): the shares of the files in each equal stretch of the run."""
    first, *rest = text.split(":")
    ends = [[as_number(share) for share in part.split("/")] for part in (first, *rest[:1])]
    steps = as_number(rest[1]) if len(rest) == 2 else 1
    alike = len({len(part) for part in ends}) == 1 and (not rest or (len(rest) == 2 and steps >= 2 and steps % 1 == 0))
    if not alike or not all(0 <= share < math.inf for part in ends for share in part) or not all(map(sum, ends)):
        raise ValueError(f"--shares {text}: write 80/20, or 80/20:20/80:4 to go from the one to the other in 4 steps")
    ends = [np.array(part) / sum(part) for part in ends]
    return np.linspace(ends[0], ends[-1], int(steps))


def draws(seed: int, source: int, size: int, numbers: np.ndarray) -> np.ndarray:
    """Which sample a source gives at its n-th draw: none comes again before all have been."""
    found, rounds = np.empty(len(numbers), np.int64), numbers // size
    for i in np.unique(rounds):
        permutation = np.random.default_rng([seed, source, int(i), 2]).permutation(size)
        found[rounds == i] = permutation[numbers[rounds == i] % size]
    return found


def counts_of(sizes: list[int], weights: list[float]) -> list[int]:
    """Samples that each source gives to an epoch."""
    return [max(1, round(weight * size)) for size, weight in zip(sizes, weights)]


def epochs(sizes: list[int], weights: list[float], seed: int, group: int = 1) -> Order:
    """Epoch after epoch, each a new permutation of every sample as often as its source's weight says.

    Of a weight of 2.5, each sample comes twice and half of them once more, the other half in the next epoch.
    `group` neighbors stay together.
    """
    offsets = np.cumsum([0, *sizes])
    counts = counts_of(sizes, weights)
    length = sum(counts)

    @lru_cache(2)  # a batch may span two epochs
    def epoch_order(epoch: int) -> np.ndarray:
        parts = []
        for source, (size, count) in enumerate(zip(sizes, counts)):
            whole, rest = divmod(count, size)
            more = draws(seed, source, size, np.arange(epoch * rest, (epoch + 1) * rest))
            parts += [offsets[source] + part for part in (np.tile(np.arange(size), whole), more)]
        groups = np.random.default_rng([seed, epoch]).permutation(-(-length // group))
        order = (groups[:, None] * group + np.arange(group)).ravel()
        return np.concatenate(parts)[order[order < length]]

    def take(first: int, last: int) -> np.ndarray:
        parts = [
            epoch_order(epoch)[max(0, first - epoch * length) : last - epoch * length]
            for epoch in range(first // length, -(-last // length))
        ]
        return np.concatenate(parts)

    return take


def evenly(sizes: list[int], path: np.ndarray, seed: int, total: int) -> Order:
    """Sources in given shares, whatever their size. Args: path: (K, S), the shares in each K-th of `total` samples.

    A source's n-th draw falls somewhere in the stretch of the run in which its shares add up from n to n + 1, so that
    every batch has about its part of each source; sorted by where they fall, the draws of all are the order.
    """
    offsets, stretches = np.cumsum([0, *sizes]), np.linspace(0, total, len(path) + 1)
    owed = np.concatenate([np.zeros((1, len(sizes))), np.cumsum(path * (total / len(path)), axis=0)])  # (K + 1, S)
    falls, sources, numbers = [], [], []
    for source in range(len(sizes)):
        count = math.ceil(owed[-1, source])
        within = np.random.default_rng([seed, source, 3]).random(count)
        falls.append(np.interp(np.arange(count) + within, owed[:, source], stretches))
        sources.append(np.full(count, source, np.int16))
        numbers.append(np.arange(count, dtype=np.int32))
    order = np.argsort(np.concatenate(falls), kind="stable")[:total]
    sources, numbers = np.concatenate(sources)[order], np.concatenate(numbers)[order]

    def take(first: int, last: int) -> np.ndarray:
        found = np.empty(last - first, np.int64)
        for source, size in enumerate(sizes):
            here = sources[first:last] == source
            found[here] = offsets[source] + draws(seed, source, size, numbers[first:last][here])
        return found

    return take


# ---------------------------------------------------------------------------------------------------------------------
# batches

GROUPED_STEPS = 16  # steps whose records are sorted together


def batches(
    take: Order, batch_size: int, seed: int, start: int, stop: int, rank: int, world: int, group: int = 1, lengths=None
) -> Iterator[list[int]]:
    """This rank's samples for every step from `start` to `stop`, the end of the run.

    `batch_size` counts all ranks; `group` keeps that many neighbors on one rank. With `lengths`, one per sample and
    negative without a picture, a batch holds samples of like length, and at most one batch in GROUPED_STEPS holds
    both with pictures and without: as with LLaVA's group_by_modality_length, but in every stretch of the run by itself.
    """

    @lru_cache(1)
    def grouped(block: int) -> np.ndarray:
        """The batches of one block of steps, sorted within, shuffled among themselves."""
        first, last = block * GROUPED_STEPS, min((block + 1) * GROUPED_STEPS, stop)
        found = take(first * batch_size, last * batch_size)
        found = found[np.argsort(lengths[found], kind="stable")].reshape(-1, batch_size)
        return found[np.random.default_rng([seed, block, 1]).permutation(len(found))]

    for step in range(start, stop):
        if lengths is None:
            whole = take(step * batch_size, (step + 1) * batch_size)
        else:
            whole = grouped(step // GROUPED_STEPS)[step % GROUPED_STEPS]
        mine = whole[rank::world] if group == 1 else np.split(whole, world)[rank]
        yield mine.tolist()
