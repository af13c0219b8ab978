"""The log of a run: one row per step, with what the step cost, and what follows from the rows so far."""

from collections.abc import Iterator

import torch
from torch import nn
from tqdm import tqdm

from training import meters
from training.ranks import Distributed
from training.runs import Run

MAX_SKIPS = 3  # steps in a row that may be skipped; more mean that the weights are broken, not a batch


class Progress:
    """Writes each step's row to log.jsonl and the progress bar, counts skipped steps, follows the validation loss.

    Args: skipped: steps skipped in a row before this one; val_losses: so far. Both are as Saver.resume returns them.
    """

    def __init__(self, args, ranks: Distributed, run: Run, skipped: int, val_losses: list[float]):
        self.args, self.ranks, self.run = args, ranks, run
        self.skipped, self.val_losses = skipped, val_losses
        self.boards = meters.Boards(args.board if ranks.is_main else [], run.folder, run.values)

    def steps(self, start: int) -> Iterator[int]:
        """The steps from `start` on, with a progress bar."""
        steps, silent = range(start, self.args.steps), not self.ranks.is_main
        self.bar = tqdm(steps, self.run.folder.name, self.args.steps, initial=start, disable=silent, unit="step")
        return iter(self.bar)

    def log(self, row: dict):
        """Write a row. Raises ValueError after more than MAX_SKIPS skipped steps in a row."""
        self.skipped = self.skipped + 1 if "skipped" in row else 0
        self.val_losses += [row["val_loss"]] if "val_loss" in row else []
        if self.ranks.is_main:
            self.run.write_row(row)
            self.boards.write(row)
            self.bar.set_postfix({key: row[key] for key in ("loss", "tokens_per_s", "data_wait")}, refresh=False)
        if self.skipped > MAX_SKIPS:
            more = f"{self.skipped} steps in a row; {self.run.last_checkpoint_hint()}"
            raise ValueError(f"step {row['step']}: {row['skipped']}, {more}")

    def is_best(self, row: dict) -> bool:
        """Whether this step's model has the smallest validation loss so far, and --patience asks to keep it."""
        return bool(self.args.patience) and "val_loss" in row and row["val_loss"] == min(self.val_losses)

    def out_of_patience(self) -> bool:
        """Whether none of the last --patience validation losses is below all before them."""
        patience, losses = self.args.patience, self.val_losses
        return bool(patience) and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def step_costs(ranks: Distributed, model: nn.Module, micro_batches: list[dict], waited: float, seconds: float) -> dict:
    """Throughput and memory of a step of so many seconds, `waited` of them for data.

    tokens_per_s and samples_per_s count all ranks; mfu is the share of this rank's GPU's peak FLOP/s.
    """
    lengths = torch.cat([meters.row_lengths(batch["labels"]) for batch in micro_batches])
    tokens, samples = ranks.all_reduce_sum(lengths.sum(), len(lengths))
    costs = {"tokens_per_s": round(tokens / seconds), "samples_per_s": round(samples / seconds, 2)}
    costs |= {"data_wait": round(waited / seconds, 3)}
    costs |= {"memory_gb": round(meters.peak_memory(ranks.device) / 1e9, 3)}
    if peak := meters.peak_flops(ranks.device):
        tiles = sum(len(batch["pixel_values"]) for batch in micro_batches if batch["pixel_values"] is not None)
        flops = meters.step_flops(model, int(lengths.sum()), float(lengths.float().mean()), tiles)
        costs["mfu"] = round(flops / seconds / peak, 4)
    return costs
