"""What a step costs and does: time, arithmetic, memory, how far each part moves; and where that is shown."""

import importlib.util
import resource
from pathlib import Path

import torch
from torch import nn

from llava import IGNORE, Llava
from nf4 import count_weights
from training.ranks import Distributed
from training.sharding import is_sharded, local_optimizer, local_shard

# Dense bfloat16 FLOP per second from NVIDIA's data sheets, by words of what torch calls the device.
PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """What the device could do at most, None if it is not in the table."""
    return peak_flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_by_name(name: str) -> float | None:
    """The same by name: the first entry of PEAKS all of whose words it has; an A1000 is no A100."""
    words = set(name.replace("-", " ").split())
    return next((peak for key, peak in PEAKS.items() if words.issuperset(key.split())), None)


def step_flops(model: nn.Module, tokens: int, length: float, tiles: int) -> float:
    """Arithmetic that a step asks for: PaLM's formula (Chowdhery et al. 2022, appendix B), per part of the model.

    A parameter of a matrix costs 2 per token that passes it: 2 forward, 2 more for the gradient of what came in, 2 for
    its own, if it trains; in a frozen tower only the first is needed. Attention adds 4 x length x width per layer and
    token forward, and twice that on the way back. What is recomputed does not count, nor what padding costs.

    Args: tokens in the batch; length: of a row on average; tiles: pictures, or their tiles, that the tower sees.
    """
    if not isinstance(model, Llava):
        return 6 * sum(p.numel() for p in model.parameters()) * tokens  # CLIP, roughly: its tokens are not words
    decoder, config = model.language_model, model.config.text_config
    looked_up = 0 if config.tie_word_embeddings else decoder.model.embed_tokens.weight.numel()  # else it is the head
    trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    trained -= looked_up if decoder.lm_head.weight.requires_grad else 0
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    flops = (4 * (count_weights(decoder) - looked_up) + 2 * trained + 3 * attention) * tokens
    if tiles:
        vision, tower = model.config.vision_config, model.vision_tower.vision_model
        blocks = tower.blocks(model.config.vision_feature_layer)  # those after it never run
        weights = sum(count_weights(part) for part in (tower.embeddings, blocks))
        trained = sum(p.numel() for part in (tower.embeddings, blocks) for p in part.parameters() if p.requires_grad)
        attention = 4 * len(blocks) * vision.hidden_size * (vision.num_patches + 1)
        per_patch = 4 * weights + 2 * trained + 3 * attention if trained else 2 * weights + attention
        flops += per_patch * tiles * (vision.num_patches + 1)
    return flops


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use at one time: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Norm of each component's gradient; their squares add up to the square of the whole's."""
    parts = {}
    for group in optimizer.param_groups:
        parts.setdefault(group["component"], []).extend(p.grad for p in group["params"] if p.grad is not None)
    norms = {name: nn.utils.get_total_norm(gradients) for name, gradients in parts.items() if gradients}
    return {name: float(norm.full_tensor() if is_sharded(norm) else norm) for name, norm in norms.items()}


def clip_gradients(optimizer: torch.optim.Optimizer, norm: float, most: float):
    """Scale all gradients so that their norm is at most `most`, as torch's clip_grad_norm_ does; 0 leaves them."""
    if most and norm > most:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, most / (norm + 1e-6))


def row_lengths(labels: torch.Tensor) -> torch.Tensor:
    """Tokens (B,) of each row of labels (B, T) without its padding: up to the last that is trained on, its end."""
    return labels.shape[1] - (labels != IGNORE).flip(1).int().argmax(1)


UPDATES_EVERY = 10  # steps between looks at how far the weights moved, which reads all of the optimizer's states
PIECE = 2**22  # of their numbers looked at at a time: a whole embedding's would be the most memory of a run


@torch.no_grad()
def update_norms(optimizer: torch.optim.Optimizer, ranks: Distributed, shard: str) -> dict[str, float]:
    """How far AdamW's last step moved each component, from its states: rate x m / (sqrt(v) + eps), bias corrected."""
    squares = {group["component"]: torch.zeros((), device=ranks.device) for group in optimizer.param_groups}
    for group in local_optimizer(optimizer).param_groups:
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            if state := local_optimizer(optimizer).state.get(p):
                step = float(state["step"])
                moments = (local_shard(state[name]).flatten().split(PIECE) for name in ("exp_avg", "exp_avg_sq"))
                for m, v in zip(*moments):
                    move = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
                    squares[group["component"]] += move.float().square().sum() * group["lr"] ** 2
    if shard != "ddp":  # each rank has seen its own share
        for square in squares.values():
            ranks.all_reduce(square)
    return {name: float(square.sqrt()) for name, square in squares.items()}


# ---------------------------------------------------------------------------------------------------------------------
# where it is shown

BOARDS = ("tensorboard", "wandb")


class Boards:
    """TensorBoard and Weights & Biases, beside log.jsonl, where they are asked for."""

    def __init__(self, names: list[str], folder: Path, values: dict):
        self.writers = []
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(folder / "tensorboard"))
            self.writers.append(lambda row: [board.add_scalar(key, row[key], row["step"]) for key in row])
        if "wandb" in names:
            import wandb

            name = folder.resolve().name
            # It reads its key from the environment or its own file: none passes through us, so none can be logged.
            wandb.init(project="llava-from-scratch", name=name, id=name, dir=str(folder), config=values, resume="allow")
            self.writers.append(lambda row: wandb.log(row, step=row["step"]))

    def write(self, row: dict):
        """Show the numbers of a row; those in groups, as {"grad_norms": {"language_model": 1.0}}, by path."""
        flat = {}
        for key, value in row.items():
            flat |= {f"{key}/{part}": v for part, v in value.items()} if isinstance(value, dict) else {key: value}
        for writer in self.writers:
            writer({key: value for key, value in flat.items() if isinstance(value, (int, float))})


def missing_boards(names: list[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]
