"""Measure a training step (FLOPs, MFU, memory, gradient norms) and log it: log.jsonl, progress bar, dashboards."""

import importlib.util
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from llava import IGNORE, Llava
from lora import count_weights
from training.ranks import Distributed
from training.runs import Run
from training.sharding import trainable_parameters, unshard

BOARDS = ("tensorboard", "wandb")
IDLE_STEPS = 20  # steps without a gradient for the projector, after which a run says so
MAX_SKIPS = 3  # steps in a row that may be skipped; more mean that the weights are broken, not a batch

# Peak dense bfloat16 FLOP per second from NVIDIA's data sheets, by words of the name that torch reports.
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}
PEAKS |= {"L4": 121e12, "A10G": 70e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(device: str) -> float | None:
    """Return a device's peak FLOP per second: the first entry of PEAKS whose words are all in its name, else None."""
    words = set(device.replace("-", " ").split())  # whole words: an A1000 is not an A100
    return next((peak for key, peak in PEAKS.items() if words.issuperset(key.split())), None)


def step_flops(model: nn.Module, tokens: int, length: float, tiles: int) -> float:
    """Return the FLOPs of one training step by PaLM's formula (Chowdhery et al. 2022, appendix B), part by part.

    A matrix parameter costs 2 FLOPs per token forward, 2 for the gradient of its input and 2 for its own gradient. A
    frozen decoder needs the first two, because gradients pass through it to the projector; a frozen tower only the
    first. Attention adds 4 x length x width per layer and token forward, and twice that backward. Recomputation and
    padding do not count: this is the numerator of MFU, the arithmetic that the step asks for.

    Args: tokens: in the batch, without padding. length: mean tokens of a row. tiles: images that the vision tower sees;
    an image cut into tiles counts once per tile.
    """
    if not isinstance(model, Llava):  # CLIP, as an approximation: its two towers see different tokens
        return 6 * sum(p.numel() for p in model.parameters()) * tokens
    decoder, config = model.language_model, model.config.text_config
    # An embedding is looked up, not multiplied; a tied one is multiplied as the head.
    embedding = 0 if config.tie_word_embeddings else decoder.model.embed_tokens.weight.numel()
    trained = sum(p.numel() for p in trainable_parameters(decoder).values())
    trained -= embedding if decoder.lm_head.weight.requires_grad else 0
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    flops = tokens * (4 * (count_weights(decoder) - embedding) + 2 * trained + 3 * attention)
    if tiles:
        # The tower's blocks up to the feature layer; later blocks never run.
        tower, config = model.vision_tower.vision_model, model.config.vision_config
        blocks = tower.blocks(model.config.vision_feature_layer)
        used = nn.ModuleList([tower.embeddings, blocks])
        weights, trained = count_weights(used), sum(p.numel() for p in trainable_parameters(used).values())
        patches = config.num_patches + 1  # and the class token
        attention = 4 * len(blocks) * config.hidden_size * patches
        flops += tiles * patches * (4 * weights + 2 * trained + 3 * attention if trained else 2 * weights + attention)
    return flops


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes in use so far: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the gradient norm of each component. Their squares add up to the squared norm of the whole gradient."""
    components = {}
    for group in optimizer.param_groups:
        components.setdefault(group["component"], []).extend(p.grad for p in group["params"] if p.grad is not None)
    norms = {name: nn.utils.get_total_norm(gradients) for name, gradients in components.items() if gradients}
    return {name: float(unshard(norm)) for name, norm in norms.items()}


def clip_gradients(optimizer: torch.optim.Optimizer, norm: float, max_norm: float):
    """Scale gradients of this total norm down to `max_norm`, as torch's clip_grad_norm_ does; 0 turns it off."""
    if max_norm and norm > max_norm:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))


def row_lengths(labels: torch.Tensor) -> torch.Tensor:
    """Return the tokens (B,) of each row of labels (B, T) without padding: up to its last supervised token."""
    return labels.shape[1] - (labels != IGNORE).flip(1).int().argmax(1)


def step_costs(ranks: Distributed, model: nn.Module, micro_batches: list[dict], waited: float, seconds: float) -> dict:
    """Return throughput and memory of a step that took `seconds`, `waited` of them for data.

    tokens_per_s and samples_per_s count all ranks; mfu is the share of this rank's GPU's peak FLOP/s.
    """
    lengths = torch.cat([row_lengths(batch["labels"]) for batch in micro_batches])
    tokens, samples = ranks.all_reduce_sum(lengths.sum(), len(lengths))
    costs = {"tokens_per_s": round(tokens / seconds), "samples_per_s": round(samples / seconds, 2)}
    costs |= {"data_wait": round(waited / seconds, 3), "memory_gb": round(peak_memory(ranks.device) / 1e9, 3)}
    if ranks.device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name(ranks.device))):
        tiles = sum(len(batch["pixel_values"]) for batch in micro_batches if batch["pixel_values"] is not None)
        flops = step_flops(model, int(lengths.sum()), float(lengths.float().mean()), tiles)
        costs["mfu"] = round(flops / seconds / peak, 4)
    return costs


class Progress:
    """Writes each step's row to log.jsonl and the progress bar, counts skipped steps, follows the validation loss.

    Args: skipped: number of steps skipped just before. val_losses: all so far. Saver.resume returns both.
    """

    def __init__(self, args, ranks: Distributed, run: Run, skipped: int, val_losses: list[float]):
        self.args, self.ranks, self.run = args, ranks, run
        self.skipped, self.val_losses = skipped, val_losses
        self.idle = 0  # steps so far, if no gradient has reached the projector in any of them; None: it learns
        self.boards = open_boards(args.board if ranks.is_main else [], run.folder, run.values)

    def steps(self, start: int) -> Iterator[int]:
        """The steps from `start` on, with a progress bar that counts those that log() has written."""
        steps, name, silent = self.args.steps, self.run.folder.name, not self.ranks.is_main
        with tqdm(desc=name, total=steps, initial=start, disable=silent, unit="step") as self.bar:
            yield from range(start, steps)

    def log(self, row: dict):
        """Write a row. Raises ValueError after more than MAX_SKIPS skipped steps in a row."""
        self.skipped = self.skipped + 1 if "skipped" in row else 0
        self.val_losses += [row["val_loss"]] if "val_loss" in row else []
        if self.ranks.is_main:
            self.run.write_row(row)
            norms = {f"grad_norms/{component}": norm for component, norm in row.get("grad_norms", {}).items()}
            numbers = {key: value for key, value in (row | norms).items() if isinstance(value, (int, float))}
            for write in self.boards:
                write(numbers, row["step"])
            self.bar.set_postfix({key: row[key] for key in ("loss", "tokens_per_s", "data_wait")}, refresh=False)
            self.bar.update()
        self.watch_projector(row)
        if self.skipped > MAX_SKIPS:
            more = f"{self.skipped} steps in a row; {self.run.last_checkpoint_hint()}"
            raise ValueError(f"step {row['step']}: {row['skipped']}, {more}")

    def watch_projector(self, row: dict):
        """Say once, after IDLE_STEPS or at the end of a shorter run, that the projector's gradient was always zero."""
        if self.idle is None or "skipped" in row:
            return
        learns = row["grad_norms"].get("multi_modal_projector", 0) > 0
        self.idle = None if learns or "projector" not in self.args.train else self.idle + 1
        if self.idle and (self.idle == IDLE_STEPS or row["step"] == self.args.steps):
            text = "the projector learns nothing: its gradient was exactly 0 in"
            self.ranks.print0(f"{text} {self.idle} steps; check the records' images with `python data.py check`")
            self.idle = None

    def is_best(self, row: dict) -> bool:
        """Whether this step's model has the smallest validation loss so far, and --patience asks to keep it."""
        return bool(self.args.patience) and "val_loss" in row and row["val_loss"] == min(self.val_losses)

    def out_of_patience(self) -> bool:
        """Whether none of the last --patience validation losses is below all before them."""
        patience, losses = self.args.patience, self.val_losses
        return bool(patience) and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def missing_boards(names: list[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def open_boards(names: list[str], folder: Path, values: dict) -> list[Callable[[dict, int], None]]:
    """Return a function for each named dashboard; called with a step's numbers and the step, it sends them there.
    wandb finds its API key by itself; it never passes here."""
    boards = []
    if "tensorboard" in names:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
        boards.append(lambda numbers, step: [writer.add_scalar(key, numbers[key], step) for key in numbers])
    if "wandb" in names:
        wandb, name = importlib.import_module("wandb"), folder.resolve().name
        options = {"name": name, "id": name, "dir": str(folder), "config": values, "resume": "allow"}
        wandb.init(project="llava-from-scratch", **options)
        boards.append(wandb.log)
    return boards
