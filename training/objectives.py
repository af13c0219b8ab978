"""Terms beside the plain loss: weights of tasks, and remedies against forgetting.

    train.py --task-weights vqa=2,captions=0.5         weights by hand; other tasks have weight 1
    train.py --task-weights uncertainty                learned weights (Kendall et al. 2017, arXiv 1705.07115)
    train.py --ewc 1000                                keep weights that the model before needs: training/fisher.py
    train.py --distill 0.5:2                           keep the answers of the model before
    train.py --data new.json old.json --shares 95/5    replay: inputs/mixture.py
    python -m formats average BEFORE AFTER OUT         average the weights: formats/

The model before is the one that the run starts from. A record's task is its key "task", else the name of its file. All
these terms are per supervised token, like the loss, so they do not depend on how a batch is divided.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import collate
from formats.tensors import open_tensors
from inputs.cli import as_number
from inputs.files import fingerprint
from inputs.mixture import Source
from inputs.samples import Samples
from llava import IGNORE, LOSS_CHUNK, Llava, summed_cross_entropy
from training.ranks import Distributed
from training.runs import Run
from training.sharding import trainable_parameters

FISHER = "fisher.safetensors"  # beside the model before
LOG_VARIANCES = "task_log_variances"  # the learned weights of tasks: a parameter of the model while it trains
LOG_VARIANCE_RATE = 0.01  # their peak learning rate: about so far AdamW moves them in a step


# ---------------------------------------------------------------------------------------------------------------------
# the flags' values


def read_distill(text: str) -> tuple[float, float]:
    """ "0.5:4" -> (0.5, 4.0): alpha and temperature, which is 2 if it is left out. Raises ValueError."""
    alpha, _, temperature = text.partition(":")
    values = as_number(alpha), as_number(temperature or "2")
    if not (0 < values[0] < 1 and 0 < values[1] < math.inf):  # with 1, no label would count
        raise ValueError(f"--distill {text}: write ALPHA or ALPHA:TEMPERATURE, alpha above 0 and below 1")
    return values


def read_task_weights(text: str) -> dict[str, float]:
    """ "vqa=2,captions=0.5" -> {"vqa": 2.0, "captions": 0.5}; {} for "uncertainty". Raises ValueError."""
    pairs = [part.rpartition("=") for part in text.split(",")] if text != "uncertainty" else []
    weights = {name: as_number(value) for name, _, value in pairs}
    if len(weights) < len(pairs) or not all(name and 0 <= value < math.inf for name, value in weights.items()):
        raise ValueError(f"--task-weights {text}: write uncertainty, or NAME=WEIGHT,NAME=WEIGHT")
    return weights


def task_names(sources: list[Source]) -> list[str]:
    """The different tasks of all usable records, sorted. Raises ValueError if two files give one name."""
    names, files = set(), {}
    for source in sources:
        path, part = source.file.path, source.usable()

        def find(source=source, part=part) -> np.ndarray:
            return np.unique([str(source.file[i].get("task", source.file.path.stem)) for i in part])

        found = source.file.cached("tasks", [sorted(source.faults), path.stem], find).tolist()
        if path.stem in found and files.setdefault(path.stem, path) != path:
            raise ValueError(f"--task-weights: {files[path.stem]} and {path} are both task {path.stem!r}: rename one")
        names.update(found)
    return sorted(names)


def collate_with_tasks(samples: list[dict], pad_id: int) -> dict:
    """The batch of data.collate, and "tasks": the task of each row."""
    return collate(samples, pad_id) | {"tasks": [str(sample["task"]) for sample in samples]}


# ---------------------------------------------------------------------------------------------------------------------
# the terms


def uncertainty_loss(loss: Tensor, count: int | Tensor, log_variance: Tensor) -> Tensor:
    """e^-s / 2 times the summed loss of `count` tokens, plus s / 2 for each; smallest at s = log(loss / count).

    Kendall et al. 2017, equation 7, with s = log sigma^2; their form for classification has e^-s and the same s / 2.
    """
    return 0.5 * torch.exp(-log_variance) * loss + 0.5 * log_variance * count


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over N tokens: logits (N, V) to a scalar.

    T^2 keeps the gradient's size as T grows (Hinton et al. 2015, arXiv 1503.02531, section 2.1).
    """
    ours, theirs = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True)


class Objective(nn.Module):
    """A model whose forward(**batch) is the summed loss of a batch with the terms that the flags ask for.

    Args: model: as the run starts, before a checkpoint is restored. Raises ValueError, before any work, if there is no
    Fisher information for --ewc, or no record of a task that --task-weights names.
    """

    def __init__(self, args, ranks: Distributed, run: Run, model: Llava, dataset: Samples):
        super().__init__()
        if model.config.relevance_bounds:
            raise ValueError("--ewc, --distill and --task-weights do not know a model whose question chooses patches")
        self.model, self.teacher, self.fisher, self.before, self.tasks = model, None, {}, {}, {}
        names = ["distillation"] if args.distill else []
        if args.ewc:
            self.add_ewc(args, ranks, run)
            names.append("ewc")
        if args.distill:
            if args.model is None and not args.init_from:
                raise ValueError("--distill: a new LLaVA knows nothing yet; it is for training that continues")
            self.alpha, self.temperature = read_distill(args.distill)
            self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        if args.task_weights:
            self.add_tasks(args, ranks, dataset)
        kept = [*(self.teacher.parameters() if self.teacher else ()), *self.fisher.values(), *self.before.values()]
        if kept:
            ranks.print0(f"what is kept of the model before takes {sum(t.nbytes for t in kept) / 1e9:.3g} GB more")
        self.names = [*names, *self.tasks]
        self.totals = torch.zeros(len(self.names), 2, dtype=torch.float64, device=ranks.device)  # sum, tokens

    def add_ewc(self, args, ranks: Distributed, run: Run):
        """Read the Fisher information beside the model before, and keep its weights."""
        if args.model is None:
            raise ValueError(f"--ewc {args.ewc:g}: a new LLaVA knows nothing yet; it is for training that continues")
        path = args.model / FISHER
        if not path.exists():
            make = f"python -m training.fisher --model {args.model} --data OLD.json"
            raise ValueError(f"--ewc {args.ewc:g}: {path} does not exist; make it with `{make}`")
        run.values["fisher"] = fingerprint(path)["sha256"]
        run.check_unchanged("fisher", run.values["fisher"], f"a {FISHER} whose sha256 is")
        saved, trained = open_tensors(path), trainable_parameters(self.model)
        wrong = [name for name, p in trained.items() if name not in saved or saved[name].shape != tuple(p.shape)]
        if wrong:
            raise ValueError(f"{path}: {len(wrong)} trained tensors are missing or of another shape: {wrong[0]}, ...")
        self.strength = args.ewc
        self.fisher = {name: saved[name].read().to(ranks.device, torch.float32) for name in trained}
        self.before = {name: p.detach().to(ranks.device, copy=True) for name, p in trained.items()}

    def add_tasks(self, args, ranks: Distributed, dataset: Samples):
        """Find the tasks of the records and give each its weight, or a parameter."""
        weights, names = read_task_weights(args.task_weights), ranks.on_main(task_names, dataset.sources)
        if unknown := sorted(set(weights) - set(names)):
            raise ValueError(f"--task-weights: no record has the task {unknown[0]!r}, only {', '.join(names[:20])}")
        self.tasks, self.learned = {name: weights.get(name, 1.0) for name in names}, not weights
        if not any(self.tasks.values()):
            raise ValueError(f"--task-weights {args.task_weights}: every task has weight 0, so nothing would train")
        if self.learned:
            setattr(self.model, LOG_VARIANCES, nn.Parameter(torch.zeros(len(names))))
        text = ", ".join(f"{name} {'learned' if self.learned else f'{w:g}'}" for name, w in self.tasks.items())
        ranks.print0(f"weights of tasks: {text}")

    def forward(self, tasks: list[str] | None = None, **batch) -> Tensor:
        """The summed objective (a float32 scalar) of a batch as Llava.forward takes it. Args: tasks: of each row."""
        head = self.model.language_model.lm_head
        hidden, target = self.model.supervised_states(**batch)
        if self.tasks:
            loss = self.weighted_loss(tasks, batch["labels"], hidden, target)
        else:
            loss = summed_cross_entropy(head, hidden, target)
        if self.teacher:
            with torch.no_grad():
                theirs, _ = self.teacher.supervised_states(**batch)
            apart = self.distillation(hidden, theirs)
            self.note("distillation", apart, len(target))
            loss = (1 - self.alpha) * loss + self.alpha * apart
        if self.fisher:
            penalty = len(target) * self.penalty()  # the loop divides by the tokens of the step
            self.note("ewc", penalty, len(target))
            loss = loss + penalty
        return loss

    def weighted_loss(self, tasks: list[str], labels: Tensor, hidden: Tensor, target: Tensor) -> Tensor:
        """The losses of the tasks times their weights. Args: hidden, target: of supervised_states, row by row."""
        numbers = torch.tensor([list(self.tasks).index(task) for task in tasks], device=labels.device)
        of_token = numbers.repeat_interleave((labels[:, 1:] != IGNORE).sum(1))
        total = torch.zeros((), device=labels.device)
        for i, (name, weight) in enumerate(self.tasks.items()):
            own, count = of_token == i, (of_token == i).sum()
            loss = summed_cross_entropy(self.model.language_model.lm_head, hidden[own], target[own])
            self.note(name, loss, count)
            if self.learned:
                total = total + uncertainty_loss(loss, count, getattr(self.model, LOG_VARIANCES)[i])
            else:
                total = total + weight * loss
        return total

    def distillation(self, hidden: Tensor, theirs: Tensor) -> Tensor:
        """The divergence from the teacher, summed over N tokens, of states (N, C); in chunks as in the plain loss."""
        heads = self.model.language_model.lm_head, self.teacher.language_model.lm_head

        def chunk(ours: Tensor, theirs: Tensor) -> Tensor:
            return divergence(heads[0](ours).float(), heads[1](theirs).float(), self.temperature)

        if len(hidden) <= LOSS_CHUNK:
            return chunk(hidden, theirs)
        pairs = zip(hidden.split(LOSS_CHUNK), theirs.split(LOSS_CHUNK))
        return sum(checkpoint(chunk, *pair, use_reentrant=False) for pair in pairs)

    def penalty(self) -> Tensor:
        """EWC's lambda / 2 times the sum of F (w - w_before)^2 (Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3)."""
        trained = trainable_parameters(self.model)
        moved = ((trained[name].float() - before.float()).square() for name, before in self.before.items())
        return 0.5 * self.strength * sum((f * m).sum() for f, m in zip(self.fisher.values(), moved))

    @torch.no_grad()
    def note(self, name: str, value: Tensor, count: int | Tensor):
        row = self.totals[self.names.index(name)]
        row[0] += value
        row[1] += count

    def report(self, ranks: Distributed) -> dict:
        """Mean of every term and of each task's loss per token in this step, and learned weights; for the log."""
        sums = dict(zip(self.names, ranks.all_reduce(self.totals.clone()).tolist()))
        self.totals.zero_()
        row = {name: sums[name][0] / max(1, sums[name][1]) for name in self.names if name not in self.tasks}
        if self.tasks:
            row["task_losses"] = {name: sums[name][0] / sums[name][1] for name in self.tasks if sums[name][1]}
            if self.learned:
                weights = (0.5 * torch.exp(-getattr(self.model, LOG_VARIANCES).detach())).tolist()
                row["task_weights"] = dict(zip(self.tasks, weights))
        return row


def make_objective(args, ranks: Distributed, run: Run, model: nn.Module, dataset: Samples) -> Objective | None:
    """Return the Objective that the flags ask for, or None for the plain loss."""
    return Objective(args, ranks, run, model, dataset) if args.ewc or args.distill or args.task_weights else None
