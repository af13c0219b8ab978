"""Draw loss curves and bars of accuracy. Needs matplotlib, which is optional (`pip install -e .[plots]`).

python -m training.plots RUN [RUN ...] [--out FILE]     draw the logs of several runs over each other
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from inputs import cli
from inputs.files import OUTPUT_ROOT, read_complete_lines

# Columns of log.jsonl, each with the title of its panel.
PANELS = {"loss": "loss per token", "val_loss": "validation loss", "grad_norm": "gradient norm", "lr": "learning rate"}
PANELS |= {"tokens_per_s": "tokens per second", "memory_gb": "peak memory, GB"}
BLUE, RED = "#1f4e8c", "#c0392b"


def new_figure(width: float, height: float):
    """Return an empty matplotlib figure of this size in inches. Raises ValueError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is not installed (pip install matplotlib)") from None
    return Figure((width, height), layout="tight")


def draw_panels(path: Path, panels: dict, widths: list[float], height: float) -> Iterator[tuple]:
    """Yield (axis, name, content) for each of `panels`, for the caller to draw, then write the image. `widths` and
    `height` are in inches. Without matplotlib, print that the image is not drawn."""
    try:
        figure = new_figure(sum(widths), height)
    except ValueError as error:
        print(f"{path} not drawn: {error}")
        return
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for axis, (name, content) in zip(axes, panels.items()):
        axis.spines[["top", "right"]].set_visible(False)
        yield axis, name, content
    figure.savefig(path, dpi=110)


def column(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of the rows that have a value: a skipped step has no loss."""
    rows = [row for row in rows if row.get(key) is not None]
    return np.array([row["step"] for row in rows]), np.array([row[key] for row in rows])


def draw_curve(axis, rows: list[dict], key: str, color: str, label: str | None = None):
    """Draw every value faintly and a running mean on top; nothing if no row has a value."""
    steps, values = column(rows, key)
    if len(steps):
        axis.plot(steps, values, color=color, linewidth=0.7, alpha=0.4)
        width = max(1, len(values) // 30)
        mean = np.convolve(values, np.ones(width) / width, mode="valid")
        axis.plot(steps[width - 1 :], mean, color=color, linewidth=1.8, label=label)


def loss_curve(path: Path, curves: dict[str, list[dict]]):
    """Draw one panel per named log, a list of {"step", "loss"}."""
    for axis, name, rows in draw_panels(path, curves, [4.6] * len(curves), 3.2):
        draw_curve(axis, rows, "loss", BLUE)
        draw_curve(axis, rows, "val_loss", RED)
        axis.set(title=name, xlabel="step", ylabel="loss per token", ylim=(0, None))


def bars(path: Path, panels: dict[str, dict[str, float]], labels: dict[str, str]):
    """Draw one panel per name, one bar per value, in percent."""
    widths = [0.62 * max(4, len(values)) for values in panels.values()]
    for axis, name, values in draw_panels(path, panels, widths, 3.4):
        axis.bar_label(axis.bar(range(len(values)), values.values(), color=BLUE), fmt="%.0f", fontsize=8)
        axis.set_xticks(range(len(values)), values, rotation=40, ha="right", fontsize=8)
        axis.set(title=name, xlabel=labels[name], ylabel="correct, %", ylim=(0, 105))


def read_log(folder: Path) -> list[dict]:
    """Return the rows of a run's log. Raises ValueError if the folder has none."""
    if not (folder / "log.jsonl").exists():
        raise ValueError(f"{folder}: no log.jsonl, so this is not a run")
    return [json.loads(line) for line in read_complete_lines(folder / "log.jsonl").splitlines()]


def compare_runs(folders: list[Path], path: Path):
    """Draw the logs of several runs over each other, one panel per quantity. Raises ValueError if one has no log."""
    logs = {str(folder): read_log(folder) for folder in folders}
    keys = [key for key in PANELS if any(len(column(rows, key)[0]) for rows in logs.values())]
    if not keys:
        raise ValueError(f"{', '.join(logs)}: no step is logged yet")
    new_figure(1, 1)  # raises ValueError if matplotlib is missing
    path.parent.mkdir(parents=True, exist_ok=True)
    for axis, key, title in draw_panels(path, {key: PANELS[key] for key in keys}, [4.6] * len(keys), 3.4):
        for i, (name, rows) in enumerate(logs.items()):
            draw_curve(axis, rows, key, f"C{i}", name)
        axis.set(title=title, xlabel="step")
        if key == keys[0]:
            axis.legend(frameon=False)


def main():
    """Draw the runs that the command line names."""
    parser = argparse.ArgumentParser(description="Draw the logs of several runs over each other.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, default=OUTPUT_ROOT / "runs.png", help="image to write")
    args = parser.parse_args()
    compare_runs(args.runs, args.out)
    print(args.out)


if __name__ == "__main__":
    cli.run(main, "training.plots")
