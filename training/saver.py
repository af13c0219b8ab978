"""What a run saves and when: checkpoints to resume from, the best model so far, and at the end the finished model."""

import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from training import plots, sharding
from training.checkpoint import checkpoint_tensors, gather_tensors, restore_checkpoint
from training.ranks import Distributed
from training.runs import Run


class Saver:
    """Saves and restores `model` and `optimizer`; all ranks call every method together, rank 0 writes the files."""

    def __init__(self, args, ranks: Distributed, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.args, self.ranks, self.run, self.model, self.optimizer = args, ranks, run, model, optimizer

    def resume(self) -> tuple[int, int, list[float]]:
        """Lock the run's folder and restore its newest checkpoint.

        Returns the step it was made after (0: there is none), the steps skipped in a row before, and all validation
        losses so far.
        """
        self.ranks.on_main(self.run.open)
        checkpoint = self.ranks.on_main(self.run.newest_valid_checkpoint)
        step = restore_checkpoint(checkpoint, self.model, self.optimizer) if checkpoint else 0
        return step, *self.ranks.on_main(self.run.start, step)

    def save(self, step: int, kind: str = "checkpoint"):
        """Write a "checkpoint" or the "best" model so far. Raises ValueError like check_weights, and on a full disk."""
        self.check_weights(step)
        files = checkpoint_tensors(self.model, self.optimizer)
        tensors = gather_tensors(files, self.optimizer, self.ranks)
        if not self.ranks.is_main:
            deque(tensors, maxlen=0)  # every rank takes part in gathering each tensor
        keep = 1 if kind == "best" else self.args.keep
        self.ranks.on_main(self.run.save_checkpoint, step, files, tensors, keep, kind)

    def check_weights(self, step: int):
        """Raises ValueError, on all ranks, if a trained weight is not finite or differs between the ranks."""
        shards = [sharding.local_shard(p) for p in sharding.trainable_parameters(self.model).values()]
        if self.ranks.all_reduce_max(not all(bool(p.isfinite().all()) for p in shards)):
            raise ValueError(f"step {step}: weights are not finite; {self.run.last_checkpoint_hint()}")
        if self.args.shard != "fsdp" and not self.ranks.replicas_match(shards):
            raise ValueError(f"step {step}: the ranks' weights differ; {self.run.last_checkpoint_hint()}")

    def finish(self, save: Callable[[dict, Path], None]):
        """Publish the finished model, with --patience the best one; `save(weights, folder)` writes it."""
        if best := self.ranks.on_main(self.run.checkpoints, "best"):
            restore_checkpoint(best[-1], self.model)
            self.ranks.print0(f"{best[-1].name} had the smallest validation loss: it becomes the finished model")
        self.check_weights(self.args.steps)
        weights = sharding.gather_weights(self.model, self.ranks)
        self.ranks.on_main(publish, self.run, partial(save, weights))


def publish(run: Run, save: Callable[[Path], None]):
    """Draw the loss curve and publish the finished model; print the loss over the last 5 % of the steps."""
    rows = run.rows()
    losses = [row["loss"] for row in rows[-max(1, len(rows) // 20) :] if row["loss"] is not None]
    loss, skipped = sum(losses) / max(1, len(losses)), sum("skipped" in row for row in rows)
    plots.loss_curve(run.folder / "loss.png", {run.folder.name: rows})
    run.finish(save, {"loss": round(loss, 4), "skipped": skipped})
    more = f"; {skipped} steps were skipped, see log.jsonl" if skipped else ""
    print(f"{run.folder}: loss {loss:.3f} over the last {len(losses)} steps{more}", file=sys.stderr, flush=True)
