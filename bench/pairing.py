"""Time several sides in turn, check that they compute the same numbers, and format the rows of the table.

A machine's speed drifts: its clock changes, other programs start. In turn (A B C A B C), all sides drift together and
the ratio within a round stays the same. So a ratio is the median over the rounds, with the smallest and the largest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import torch

SIDES = ("plain", "fast", "theirs")  # the plain model, the accelerated model, the reference libraries
RATIOS = (("plain", "theirs"), ("fast", "plain"), ("fast", "theirs"))  # columns of the table


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
    seconds = {side: [] for side in calls}
    for _ in range(rounds):
        for side, call in calls.items():
            seconds[side].append(call())
    return seconds


@dataclass
class Row:
    """A line of the table: the value of each side in the row's unit, and the ratios of two sides in every round.

    A ratio a/b above 1 means that a takes less time or memory than b.
    """

    name: str
    unit: str
    values: dict[str, float]
    ratios: dict[str, list[float]]


def make_row(name: str, unit: str, costs: dict[str, list[float]], amount: float = 1.0) -> Row:
    """Return a row from each side's costs by round.

    Args: costs: seconds, or bytes if the unit is "MB"; amount: units of work in one call, for "tokens/s" and the like.
    """
    convert = {"ms": lambda cost: 1e3 * cost, "MB": lambda cost: cost / 1e6}.get(unit, lambda cost: amount / cost)
    pairs = [(a, b) for a, b in RATIOS if a in costs and b in costs]
    ratios = {f"{a}/{b}": [cost_b / cost_a for cost_a, cost_b in zip(costs[a], costs[b])] for a, b in pairs}
    return Row(name, unit, {side: convert(median(column)) for side, column in costs.items()}, ratios)


def format_row(row: Row) -> str:
    """Return the row as a line of a Markdown table, with a dash for each side that is missing."""
    numbers = [format_number(row.values[side]) if side in row.values else "-" for side in SIDES]
    names = [f"{a}/{b}" for a, b in RATIOS]
    ratios = [format_ratio(row.ratios[name]) if name in row.ratios else "-" for name in names]
    return "| " + " | ".join([f"{row.name}, {row.unit}", *numbers, *ratios]) + " |"


def format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_ratio(ratios: list[float]) -> str:
    """Return the median and, of several rounds, the smallest and largest."""
    return f"{median(ratios):.2f}" + (f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else "")
