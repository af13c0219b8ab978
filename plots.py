"""Pictures of a run. matplotlib is an optional extra (`pip install -e .[plots]`); without it one line says so."""

from pathlib import Path

import numpy as np


def loss_curve(path: Path, curves: dict[str, list[dict]]):
    """Draw one panel per named log (lists of {"step", "loss"}): every step faintly, a running mean on top."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path} not drawn: matplotlib is missing (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.6 * len(curves), 3.2), squeeze=False)
    for axis, (name, rows) in zip(axes[0], curves.items()):
        rows = [row for row in rows if row["loss"] is not None]  # a step that was skipped has none
        steps, losses = np.array([row["step"] for row in rows]), np.array([row["loss"] for row in rows])
        axis.plot(steps, losses, color="#9db8d9", linewidth=0.7)
        if len(losses) > 1:
            width = max(1, len(losses) // 30)
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            axis.plot(steps[width - 1 :], smooth, color="#1f4e8c", linewidth=1.8)
        axis.set(title=name, xlabel="step", ylabel="loss per token", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
