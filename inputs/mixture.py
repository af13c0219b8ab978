"""Mixtures of several files: how often each record is seen, in which order, and which records make a batch.

    --data a.json b.json:2       an epoch holds each record of a once and each of b twice, in random order
    --mixing equal               every file has the same share of each batch, whatever its size
    --mixing 2                   shares proportional to records^(1/2)
    --shares 80/20               these shares
    --shares 80/20:20/80:4       80/20, then 60/40, 40/60 and 20/80, each for a quarter of the run

Everything is a pure function of its arguments (seed, step, rank, ...), so a resumed run continues at any step without
replaying the steps before. A step trains on the same records with any number of ranks and any --accumulate.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from inputs.cli import as_number
from inputs.images import LinkedFolder
from inputs.index import RecordFile
from inputs.records import Fault


@dataclass
class Source:
    """One file of a mixture. Attribute `faults`: of the records that are left out, by number."""

    file: RecordFile
    images: Path  # folder that its image paths start from
    weight: float = 1.0  # uses of a record in an epoch

    def __post_init__(self):
        self.faults: dict[int, Fault] = dict(self.file.faults)  # later also those of bad images

    def usable(self) -> np.ndarray:
        """Numbers of the records without a fault, (N,)."""
        return np.setdiff1d(np.arange(len(self.file), dtype=np.int32), list(self.faults))


def open_sources(texts: list[str], folders: list[str] | None, follow_links: bool = False) -> list[Source]:
    """Open the files of --data, each PATH or PATH:WEIGHT.

    Args: folders: one image folder for all files, or one for each; default: the folder of each file; follow_links: also
    where they lead out of it. Raises ValueError, about names and folders before a file is read.
    """
    named = [split_weight(text) for text in texts]
    folders = [Path(folder) for folder in folders or []]
    if len(folders) not in (0, 1, len(named)):
        raise ValueError(f"--images names {len(folders)} folders for {len(named)} files: give one, or one for each")
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--images {folder}: no such folder")
    folders = folders * len(named) if len(folders) == 1 else folders or [path.parent for path, _ in named]
    kind = LinkedFolder if follow_links else Path
    return [Source(RecordFile(path), kind(folder), weight) for (path, weight), folder in zip(named, folders)]


def split_weight(text: str) -> tuple[Path, float]:
    """ "a.json:2" -> ("a.json", 2.0). A file whose name contains the colon takes precedence. Raises ValueError."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    value = as_number(weight)
    if not 0 < value < math.inf:
        raise ValueError(f"--data {text}: no such file, and {weight!r} is no weight, which is a number above 0")
    return Path(path), value


# ---------------------------------------------------------------------------------------------------------------------
# order of samples

Order = Callable[[int, int], np.ndarray]  # take(first, last): the samples at these positions of the run


def check_mixing(weights: list[float], mixing: str, shares: str, group: int):
    """Raise ValueError if the arguments, those of make_order, contradict each other."""
    if group > 1 and (shares or mixing != "proportional"):
        raise ValueError("CLIP learns from neighbors in a file: it takes --mixing proportional, and no --shares")
    if shares and (mixing != "proportional" or set(weights) != {1.0}):
        raise ValueError("--shares says how much of each file: leave the weights and --mixing out")
    if shares and (named := read_shares(shares).shape[1]) != len(weights):
        raise ValueError(f"--shares {shares} is for {named} files, --data names {len(weights)}")


def make_order(
    sizes: list[int], weights: list[float], seed: int, total: int, mixing: str, shares: str, group: int
) -> Order:
    """The order of a run of `total` samples. Raises ValueError.

    Args: sizes: samples of each source, which are numbered consecutively; mixing, shares: as on the command line;
    group: number of neighbors that stay together.
    """
    check_mixing(weights, mixing, shares, group)
    if shares:
        path = read_shares(shares)
    elif mixing == "proportional":
        return epochs(sizes, weights, seed, group)
    else:
        path = np.array([[w * (n / max(sizes)) ** (1 / read_mixing(mixing)) for w, n in zip(weights, sizes)]])
    return interleave(sizes, path / path.sum(1, keepdims=True), seed, total)


def read_mixing(text: str) -> float:
    """The temperature T in: share ~ records^(1/T). "proportional" is 1, "equal" infinite. Raises ValueError."""
    value = {"proportional": 1.0, "equal": math.inf}.get(text) or as_number(text)
    if not value > 0:
        raise ValueError(f"--mixing {text}: proportional, equal, or a temperature above 0")
    return value


def read_shares(text: str) -> np.ndarray:
    """Shares of the files in each part of the run, (parts, files): (1, 2) for "80/20", (4, 2) for "80/20:20/80:4"."""
    first, *rest = text.split(":")
    ends = [[as_number(share) for share in part.split("/")] for part in (first, *rest[:1])]
    steps = as_number(rest[1]) if len(rest) == 2 else 1
    alike = len({len(part) for part in ends}) == 1 and (not rest or (len(rest) == 2 and steps >= 2 and steps % 1 == 0))
    if not alike or not all(0 <= share < math.inf for part in ends for share in part) or not all(map(sum, ends)):
        raise ValueError(f"--shares {text}: write 80/20, or 80/20:20/80:4 to go from one to the other in 4 steps")
    ends = [np.array(part) / sum(part) for part in ends]
    return np.linspace(ends[0], ends[-1], int(steps))


def counts_of(sizes: list[int], weights: list[float]) -> list[int]:
    """Samples of each source in an epoch."""
    return [max(1, round(weight * size)) for size, weight in zip(sizes, weights)]


def join_rounds(order_of: Callable[[int], np.ndarray], length: int, first: int, last: int) -> np.ndarray:
    """Positions `first` to `last` of order_of(0), order_of(1), ..., each of `length` samples, one after the other."""
    rounds = range(first // length, -(-last // length))
    parts = [order_of(i)[max(0, first - i * length) : last - i * length] for i in rounds]
    return np.concatenate([np.empty(0, np.int64), *parts])


def draw(seed: int, source: int, size: int, first: int, last: int) -> np.ndarray:
    """Draws `first` to `last` of a source. No sample is repeated before all have been drawn."""
    return join_rounds(lambda i: np.random.default_rng([seed, source, i, 2]).permutation(size), size, first, last)


def epochs(sizes: list[int], weights: list[float], seed: int, group: int = 1) -> Order:
    """The order in which each epoch is a new permutation of all samples, repeated by the weight of their source.

    With weight 2.5, an epoch has each sample twice, and half of them once more; the next epoch has the other half.
    `group` neighbors stay together.
    """
    offsets, counts = np.cumsum([0, *sizes]), counts_of(sizes, weights)
    length = sum(counts)

    @lru_cache(2)  # a batch may span two epochs
    def epoch_order(epoch: int) -> np.ndarray:
        parts = []
        for source, (size, count) in enumerate(zip(sizes, counts)):
            whole, rest = divmod(count, size)
            more = draw(seed, source, size, epoch * rest, (epoch + 1) * rest)
            parts += [offsets[source] + part for part in (np.tile(np.arange(size), whole), more)]
        groups = np.random.default_rng([seed, epoch]).permutation(-(-length // group))
        order = (groups[:, None] * group + np.arange(group)).ravel()
        return np.concatenate(parts)[order[order < length]]

    return partial(join_rounds, epoch_order, length)


def interleave(sizes: list[int], path: np.ndarray, seed: int, total: int) -> Order:
    """The order that mixes the sources in given shares, independent of their sizes.

    Args: path: (K, S), the shares of the S sources in each K-th of `total` samples.

    The share of a source, summed over the positions of the run, grows from n to n + 1 over some interval; the n-th draw
    of the source gets a random position in that interval. So every batch has about its share of each source. The draws
    of all sources, sorted by position, are the order.
    """
    offsets, borders = np.cumsum([0, *sizes]), np.linspace(0, total, len(path) + 1)
    drawn = np.concatenate([np.zeros((1, len(sizes))), np.cumsum(path * (total / len(path)), axis=0)])  # (K + 1, S)
    positions, samples = [], []
    for source, size in enumerate(sizes):
        count = math.ceil(drawn[-1, source])
        within = np.random.default_rng([seed, source, 3]).random(count)
        positions.append(np.interp(np.arange(count) + within, drawn[:, source], borders))
        samples.append(offsets[source] + draw(seed, source, size, 0, count))
    order = np.concatenate(samples)[np.argsort(np.concatenate(positions), kind="stable")[:total]]
    return lambda first, last: order[first:last]


# ---------------------------------------------------------------------------------------------------------------------
# batches

GROUPED_STEPS = 16  # steps whose records are sorted by length together


def batches(
    take: Order, batch_size: int, seed: int, start: int, stop: int, rank: int, world: int, group: int = 1, lengths=None
) -> Iterator[list[int]]:
    """Yields this rank's samples for every step from `start` to `stop`, the end of the run.

    Args: batch_size: samples of all ranks together. group: number of neighbors that stay on one rank. lengths: tokens
    of each sample, negative if it has no image; a batch then holds samples of similar length, and at most one batch in
    GROUPED_STEPS mixes samples with and without images. (LLaVA's group_by_modality_length sorts a whole epoch; blocks
    of GROUPED_STEPS steps depend on the step only.)
    """
    for block in range(start // GROUPED_STEPS, -(-stop // GROUPED_STEPS)):
        first, last = block * GROUPED_STEPS, min((block + 1) * GROUPED_STEPS, stop)
        found = take(first * batch_size, last * batch_size)
        if lengths is not None:  # sort by length, cut into batches, shuffle the batches
            found = found[np.argsort(lengths[found], kind="stable")].reshape(-1, batch_size)
            found = np.random.default_rng([seed, block, 1]).permutation(found)
        for step in found.reshape(-1, batch_size)[max(0, start - first) :]:
            mine = step[rank::world] if group == 1 else np.split(step, world)[rank]
            yield mine.tolist()
