"""Two ways to do one thing, timed in turn, and what the machine would allow at most.

Machines drift: a clock rises, a neighbor wakes up. Timed A B A B, both sides drift together, and the ratio of each
pair hardly moves; so the ratio is a median over pairs, and its spread is that of the pairs.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch.nn.functional import linear as product

from training import meters

LESS = ("s", "ms", "MB")  # units of which less is better; of all others more


@dataclass
class Contender:
    """One side of a pair. check(): numbers that must agree with the other side's, and the warm-up; None: nothing to
    compare. seconds(): does the work once and returns how long what counts of it took."""

    check: Callable[[], torch.Tensor | float] | None
    seconds: Callable[[], float]


@dataclass
class Timing:
    """Median seconds of both sides, and the ratio theirs / ours of every round."""

    ours: float
    theirs: float | None
    ratios: list[float]


@dataclass
class Row:
    """A line of the table. ratio: above 1 ours is better, whatever the unit; spread: its smallest and largest.

    Args: limit: what the machine would allow, in the row's unit; goal: of the ratio; share: goal of ours / limit.
    """

    name: str
    unit: str
    ours: float
    theirs: float | None
    ratio: float | None
    spread: tuple[float, float] | None = None
    goal: float | None = None
    limit: float | None = None
    share: float | None = None

    def __post_init__(self):
        self.name = f"{self.name}, {self.unit}"

    @property
    def of_limit(self) -> float | None:
        """How much of what is possible ours reaches: 1 is all."""
        if self.limit is None:
            return None
        return self.limit / self.ours if self.unit in LESS else self.ours / self.limit

    @property
    def met(self) -> bool | None:
        """Whether the goals are reached; None: there are none, or nothing to compare with."""
        wanted = [(self.ratio, self.goal), (self.of_limit, self.share)]
        found = [value >= goal for value, goal in wanted if value is not None and goal is not None]
        return all(found) if found else None

    def as_json(self) -> dict:
        return asdict(self)


def timed(call: Callable, device: torch.device) -> float:
    """Seconds that a call takes, until the device is done with what it asked for."""
    settle(device)
    begin = time.perf_counter()
    call()
    settle(device)
    return time.perf_counter() - begin


def settle(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def agree(ours: torch.Tensor | float, theirs: torch.Tensor | float, tolerance: float):
    """Raises ValueError if the two sides do not compute the same: then their times say nothing."""
    a, b = torch.as_tensor(ours).detach().double().cpu(), torch.as_tensor(theirs).detach().double().cpu()
    apart, size = float((a - b).abs().max()), float(b.abs().max())
    if not apart <= tolerance * size:
        raise ValueError(
            f"not the same numbers: up to {size:.4g}, and {apart:.2g} apart, {tolerance * size:.2g} allowed"
        )


def pair(ours: Contender, theirs: Contender | None, rounds: int, tolerance: float) -> Timing:
    """One warm-up of each, whose numbers must agree; then A B A B."""
    sides = [ours] if theirs is None else [ours, theirs]
    checked = [side.check() for side in sides if side.check]
    if len(checked) == 2:
        agree(*checked, tolerance)
    seconds = [[side.seconds() for side in sides] for _ in range(rounds)]
    medians = [statistics.median(column) for column in zip(*seconds)]
    ratios = [b / a for a, b in seconds] if theirs else []
    return Timing(medians[0], medians[1] if theirs else None, ratios)


def rate_row(name: str, unit: str, amount: float, timing: Timing, **goals) -> Row:
    """So much of a unit per call, as a rate."""
    theirs = amount / timing.theirs if timing.theirs else None
    return Row(name, unit, amount / timing.ours, theirs, *ratio_of(timing), **goals)


def time_row(name: str, timing: Timing, **goals) -> Row:
    """Milliseconds per call."""
    theirs = 1e3 * timing.theirs if timing.theirs else None
    return Row(name, "ms", 1e3 * timing.ours, theirs, *ratio_of(timing), **goals)


def size_row(name: str, ours: float, theirs: float | None, limit: float | None = None, **goals) -> Row:
    """Bytes, shown in MB; one measurement each, so there is no spread."""
    megabytes = [value / 1e6 if value is not None else None for value in (ours, theirs, limit)]
    return Row(name, "MB", *megabytes[:2], theirs / ours if theirs else None, limit=megabytes[2], **goals)


def ratio_of(timing: Timing) -> tuple[float | None, tuple[float, float] | None]:
    """Median over the pairs, and from where to where they go."""
    if not timing.ratios:
        return None, None
    return statistics.median(timing.ratios), (min(timing.ratios), max(timing.ratios))


# ---------------------------------------------------------------------------------------------------------------------
# what the machine allows


class Limits:
    """Two measured rates of this device, and what follows from them. Both are bests: of a limit, noise only takes."""

    def __init__(self, device: torch.device):
        self.device, self.rates = device, {}

    def flops(self, dtype: torch.dtype) -> float:
        """FLOP/s: of a GPU from meters.PEAKS, if it is in there; else that of a product of 2048 x 2048 matrices.

        A CPU that has no instructions for bfloat16 can still widen it, so its rate is never below float32's.
        """
        if dtype not in self.rates:
            peak = meters.peak_flops(self.device) if dtype == torch.bfloat16 else None
            self.rates[dtype] = peak or max(map(self.matmul_rate, {dtype, torch.float32}))
        return self.rates[dtype]

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """2 n^3 over the best of three; a CPU without instructions for bfloat16 would take a minute at n = 2048."""
        for n in (256, 2048):
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            multiply = partial(torch.no_grad()(product), a, b)
            multiply()
            rate = 2 * n**3 / min(timed(multiply, self.device) for _ in range(3))
            if rate < 5e9:
                break
        return rate

    @cached_property
    def bandwidth(self) -> float:
        """Bytes/s: the better of a matrix by a vector and a sum, over 1.8 GB, of which no cache holds much."""
        rows = 49152 * 16
        w, v = torch.randn(rows, 576, device=self.device), torch.randn(576, device=self.device)
        best = min(timed(call, self.device) for call in (lambda: w @ v, w.sum) for _ in range(10))
        return w.nbytes / best


def processor() -> str:
    """What the CPU calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
