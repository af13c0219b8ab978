"""Pictures of a run. matplotlib is an optional extra (`pip install -e .[plots]`); without it one line says so."""

import json
from pathlib import Path

import numpy as np

PANELS = {"loss": "loss per token", "val_loss": "loss on held-out data", "grad_norm": "gradient norm", "lr": "rate"}
PANELS |= {"tokens_per_s": "tokens per second", "memory_gb": "peak memory, GB"}


def pyplot():
    """matplotlib's, drawing into files only. Raises ValueError if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is missing (pip install matplotlib)") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def column(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have one; a step that was skipped has no loss."""
    rows = [row for row in rows if row.get(key) is not None]
    return np.array([row["step"] for row in rows]), np.array([row[key] for row in rows])


def draw(axis, steps: np.ndarray, values: np.ndarray, color: str, label: str | None = None):
    """Every step faintly, a running mean on top."""
    axis.plot(steps, values, color=color, linewidth=0.7, alpha=0.4)
    width = max(1, len(values) // 30)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axis.plot(steps[width - 1 :], smooth, color=color, linewidth=1.8, label=label)
    axis.spines[["top", "right"]].set_visible(False)


def loss_curve(path: Path, curves: dict[str, list[dict]]):
    """One panel per named log (lists of {"step", "loss"}). Without matplotlib, a line says that nothing is drawn."""
    try:
        figure, axes = pyplot().subplots(1, len(curves), figsize=(4.6 * len(curves), 3.2), squeeze=False)
    except ValueError as error:
        print(f"{path} not drawn: {error}")
        return
    for axis, (name, rows) in zip(axes[0], curves.items()):
        for key, color in (("loss", "#1f4e8c"), ("val_loss", "#c0392b")):
            steps, values = column(rows, key)
            if len(steps):
                draw(axis, steps, values, color)
        axis.set(title=name, xlabel="step", ylabel="loss per token", ylim=(0, None))
    save(figure, path)


def compare(folders: list[Path], path: Path) -> Path:
    """Lay the logs of several runs over each other, a panel per quantity. Raises ValueError if one has no log."""
    logs = {}
    for folder in folders:
        if not (folder / "log.jsonl").exists():
            raise ValueError(f"{folder}: no log.jsonl, so not a run")
        logs[folder.resolve().name] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    present = [key for key in PANELS if any(len(column(rows, key)[0]) for rows in logs.values())]
    figure, axes = pyplot().subplots(1, len(present), figsize=(4.6 * len(present), 3.4), squeeze=False)
    for axis, key in zip(axes[0], present):
        for i, (name, rows) in enumerate(logs.items()):
            steps, values = column(rows, key)
            if len(steps):
                draw(axis, steps, values, f"C{i}", name)
        axis.set(title=PANELS[key], xlabel="step")
    axes[0][0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
    return path


def save(figure, path: Path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def bars(path: Path, panels: dict[str, dict[str, float]], labels: dict[str, str]):
    """A panel per name, a bar per value, in per cent. Without matplotlib, a line says that nothing is drawn."""
    try:
        widths = [max(4, len(values)) for values in panels.values()]  # so that names have room
        form = {"squeeze": False, "width_ratios": widths}
        figure, axes = pyplot().subplots(1, len(panels), figsize=(0.62 * sum(widths), 3.4), **form)
    except ValueError as error:
        print(f"{path} not drawn: {error}")
        return
    for axis, (name, values) in zip(axes[0], panels.items()):
        shown = axis.bar(range(len(values)), values.values(), color="#1f4e8c")
        axis.bar_label(shown, fmt="%.0f", fontsize=8)
        axis.set_xticks(range(len(values)), values, rotation=40, ha="right", fontsize=8)
        axis.set(title=name, xlabel=labels[name], ylabel="right, %", ylim=(0, 105))
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)
