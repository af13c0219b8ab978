"""Bad records: find and report them before a run, replace bad samples during it.

`python data.py check` calls report_faults; train.py calls refuse_bad, and with --skip-bad image_faults and Skips.
"""

import json
import re
from collections import defaultdict
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from inputs.images import BadImage, check_file, open_image, resolve_inside
from inputs.mixture import Source
from inputs.parallel import parallel_map
from inputs.records import DataError, Fault, image_paths
from inputs.samples import Samples


def image_faults(source: Source, decode: bool = False) -> dict[int, Fault]:
    """Faults by record number: an image is missing, or with `decode` cannot be decoded."""
    image_fault.cache_clear()
    numbers = source.usable()
    numbers = numbers[source.file.image_counts[numbers] > 0].tolist()
    reasons = parallel_map(partial(record_fault, source, decode), numbers, f"images of {source.file.path.name}")
    return {i: Fault(source.file.where(i), reason) for i, reason in zip(numbers, reasons) if reason}


def record_fault(source: Source, decode: bool, number: int) -> str:
    """The reason why an image of a record cannot be used; "" if all can."""
    reasons = (image_fault(source.images, name, decode) for name in image_paths(source.file[number]))
    return next(filter(None, reasons), "")


@cache  # an image that many records share is checked once in each process
def image_fault(folder: Path, name: str, decode: bool) -> str:
    """The reason why an image cannot be used; "" if it can."""
    try:
        path = resolve_inside(folder, name)
        open_image(path) if decode else check_file(path)
    except BadImage as error:
        return str(error)
    return ""


def refuse_bad(sources: list[Source], percent: float):
    """Raise DataError if more than `percent` of the records are bad, or all records of one file."""
    faults = [fault for source in sources for fault in source.faults.values()]
    total = sum(len(source.file) for source in sources)
    if len(faults) > percent / 100 * total:
        more = f" ({len(faults):,} of {total:,} records are bad, over the {percent:g} % of --skip-bad)"
        raise DataError(f"{faults[0].record}: {faults[0].reason}{more if percent else ''}")
    for source in sources:
        if len(source.faults) == len(source.file):
            raise DataError(f"{source.file.path}: no record can be used")


def report_faults(sources: list[Source], decode: bool) -> int:
    """Print the bad records of each source by kind, with three examples of each kind. Returns their number."""
    for source in sources:
        source.faults |= image_faults(source, decode)
        counts = source.file.image_counts
        print(f"{source.file.path}: {len(counts):,} records, {int((counts > 0).sum()):,} with images", end="")
        print(f" ({source.file.distinct_images:,} different), weight {source.weight:g}; {len(source.faults):,} bad")
        if source.file.unread:
            print(f"  keys that are not read: {source.file.unread}")
        kinds = defaultdict(list)
        for fault in source.faults.values():
            kinds[kind_of(fault.reason)].append(fault)
        for kind, faults in sorted(kinds.items(), key=lambda item: -len(item[1])):
            print(f"  {len(faults):>9,}  {kind}")
            for fault in faults[:3]:
                print(f"             {fault.record}: {fault.reason}".encode(errors="backslashreplace").decode())
    return sum(len(source.faults) for source in sources)


def kind_of(reason: str) -> str:
    """Replace the numbers, names and paths in a reason, so that faults of one kind are counted together."""
    reason = re.sub(r"^/.*?: ", "image: ", reason)
    return re.sub(r"""'(\\.|[^'])*'|"(\\.|[^"])*"|\d+|/\S+""", "…", reason)


def print_lengths(lengths: np.ndarray, bars: int = 16):
    """Print a histogram. Args: lengths: tokens of each sample, negative if it has no image."""
    sizes, width = np.abs(lengths), 64
    while width * bars <= sizes.max():
        width *= 2
    counts = np.bincount(sizes // width)
    print(f"tokens: {sizes.sum():,} in all, {sizes.mean():.0f} a sample, {sizes.max():,} at most")
    for i, count in enumerate(counts):
        print(f"  {i * width:>7,} - {(i + 1) * width - 1:>7,}  {count:>9,}  {'#' * -(-40 * count // counts.max())}")


def count_cut(dataset: Samples) -> tuple[dict[str, int], str]:
    """Count what `dataset.max_length` cuts off: numbers for run.json, and one line; "" if nothing is cut."""
    numbers = dataset.long_samples()
    whole, kept = np.array(parallel_map(dataset.answer_tokens, numbers, "long samples"), int).reshape(-1, 2).T
    cut, empty = np.flatnonzero(whole > kept), np.flatnonzero((kept == 0) & (whole > 0))
    counts = {"max_length": dataset.max_length, "samples": len(dataset), "cut": len(cut)}
    counts |= {"tokens_lost": int((whole - kept).sum()), "unanswered": len(empty)}
    if not len(cut):
        return counts, ""
    text = f"{len(cut):,} of {len(dataset):,} samples are longer than {dataset.max_length:,} tokens and lose "
    text += f"{counts['tokens_lost']:,} trained tokens; {dataset.remedy} (first: {dataset.where(numbers[cut[0]])})"
    if len(empty):
        text += f"; {len(empty):,} have no room for an answer (first: {dataset.where(numbers[empty[0]])})"
    return counts, text


class Skips:
    """Replaces bad samples, up to a limit; the state is shared by the loader processes of a rank.

    Args: percent: of the drawn samples that may be bad. count: number of samples. path: JSON Lines file to which each
    bad record is written once.
    """

    DRAWN, BAD = 1, 2

    def __init__(self, percent: float, count: int, path: Path):
        self.percent, self.path = percent, path
        self.state = torch.zeros(count, dtype=torch.uint8).share_memory_()

    def load(self, dataset, index: int) -> dict:
        """Sample `index`, or the next good one if it is bad: the same one in every process and after a resume.

        Raises DataError if too many samples are bad; the limit counts at least 1,000 drawn samples.
        """
        for number in chain([index], range(index + 1, len(dataset)), range(index)):
            known = self.state[number] & self.BAD
            self.state[number] |= self.DRAWN
            try:
                return dataset.sample(number)
            except (DataError, BadImage) as error:
                fault = Fault(dataset.where(number), str(error))
            self.state[number] |= self.BAD
            if not known:
                log_skipped(self.path, [fault])
            drawn, bad = int((self.state > 0).sum()), int((self.state & self.BAD > 0).sum())
            if bad > self.percent / 100 * max(drawn, min(1000, len(self.state))):
                more = f"bad sample {bad} of {drawn} drawn, over the {self.percent:g} % of --skip-bad"
                raise DataError(f"{fault.record}: {fault.reason} ({more}; {self.path} names all)")
        raise DataError("no sample is good")


def log_skipped(path: Path, faults: list[Fault]):
    """Append one JSON line for each fault that is not in the file yet; before a resume some may be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = set(path.read_text().splitlines()) if path.exists() else set()
    lines = [json.dumps(fault._asdict()) for fault in faults]
    with path.open("a") as file:
        file.write("".join(line + "\n" for line in lines if line not in known))
