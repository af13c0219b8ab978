"""Train a LLaVA: the towers (stage 0), the projector on captions (stage 1), projector and decoder on dialogues (2).

    python train.py --stage 0                          CLIP by contrast, and the decoder on text
    python train.py --stage 1                          only the projector, on captions
    python train.py --stage 2                          projector and decoder, on dialogues
    python train.py --stage 2 --data my.json --images my_pictures
    python train.py --recipe llava-1.5 --stage 2       every knob as LLaVA-1.5 had it
    torchrun --nproc_per_node=8 train.py --stage 2     the same on eight GPUs

Each stage goes on from the newest finished run of the one before. Without --data it trains on the embedded world of
world/. The batch size counts all ranks and micro-batches, so the result does not depend on how the work is cut
(but for CLIP, whose negatives come from one micro-batch of all ranks).
"""

import argparse
import faulthandler
import math
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from clip import save_clip
from data import CaptionPairs, Records, collate
from fast.accelerate import accelerate
from fast.compile import compile_layers
from formats.adapters import is_adapter, sample_weights, save_adapter
from formats.saving import save_model
from formats.weights import load_checkpoint
from inputs.check import Skips, image_faults, log_skipped, refuse_bad
from inputs.files import publish_folder, verify_manifest
from inputs.images import BadImage
from inputs.mixture import Source, batches, check_mixing, counts_of, open_sources, order_of
from inputs.records import DataError
from inputs.samples import Samples
from inputs.templates import end_ids, template_words
from inputs.tokenizer import Tokenizer, train_bpe
from llava import IGNORE, Llava
from lora import NF4Linear, add_lora
from training import memory, meters, plots, recipes, runs, sharding
from training.checkpoint import checkpoint_tensors, gather_tensors, restore_checkpoint
from training.flags import read_flags
from training.ranks import Distributed, autocast, compute_dtype
from training.towers import Contrastive, assemble, new_clip, new_decoder, whiten_patches, whiten_projector
from world.language import TURNS
from world.scenes import GROUP_SIZE
from world.writer import write_world

# ---------------------------------------------------------------------------------------------------------------------
# the loop


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Rate of step 0 .. steps - 1: a linear rise over the share `warmup` of the steps, then a cosine to zero."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def settle(args, ranks: Distributed, run: runs.Run, records: int):
    """What only the data can say is how many steps make --epochs; then all is known, printed and kept in run.json."""
    if args.epochs:
        args.steps = recipes.steps_of(args.epochs, records, args.batch_size)
        ranks.print0(f"{args.epochs:g} epochs of {records:,} records: {args.steps:,} steps")
    if run.old:
        run.check_unchanged("steps", args.steps, args.allow_changes)
    run.values["steps"] = args.steps
    ranks.print0(recipes.describe(args))


def make_optimizer(model: nn.Module, args: argparse.Namespace, ranks: Distributed) -> torch.optim.Optimizer:
    """AdamW over what trains: a group per component, each with its own rate, matrices with weight decay."""
    rates = {"vision_tower": args.lr_vision, "multi_modal_projector": args.lr_projector}
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            component, decay = name.split(".")[0], args.weight_decay if p.ndim >= 2 else 0.0
            group = {
                "params": [],
                "component": component,
                "peak": args.lr if rates.get(component) is None else rates[component],
                "weight_decay": decay,
            }
            groups.setdefault((component, decay), group)["params"].append(p)
    ranks.print0(f"{'trains':<24}{'parameters':>14}{'rate':>10}{'decay':>8}")
    for group in groups.values():
        count = sum(p.numel() for p in group["params"])
        ranks.print0(f"{group['component']:<24}{count:>14,}{group['peak']:>10.1e}{group['weight_decay']:>8g}")
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    ranks.print0(f"{'(frozen)':<24}{frozen:>14,}")
    return sharding.make_adamw(list(groups.values()), args.shard, lr=args.lr, betas=(0.9, args.beta2))


def micro_batch(args, ranks: Distributed) -> int:
    """Samples that a rank sees at a time. Raises ValueError if the batch cannot be cut so."""
    share = args.batch_size // ranks.world_size // args.accumulate
    if share * ranks.world_size * args.accumulate != args.batch_size:
        raise ValueError(
            f"--batch-size {args.batch_size} is not a multiple of {ranks.world_size} ranks x {args.accumulate}"
        )
    return share


def make_loader(dataset: Samples, args, ranks: Distributed, pad_id: int, start: int, group: int) -> DataLoader:
    """Micro-batches of every step from `start` on; the order is a pure function of (seed, step, rank)."""
    share, total = micro_batch(args, ranks), args.steps * args.batch_size
    weights = [source.weight for source in dataset.sources]
    order = order_of(dataset.sizes, weights, args.seed, total, args.mixing, args.shares, group)
    lengths = dataset.lengths() if isinstance(dataset, Records) else None
    steps = batches(order, args.batch_size, args.seed, start, args.steps, ranks.rank, ranks.world_size, group, lengths)
    micro = (step[i * share : (i + 1) * share] for step in steps for i in range(args.accumulate))
    pinned = ranks.device.type == "cuda"
    collated = partial(collate, pad_id=pad_id)
    return DataLoader(
        dataset,
        batch_sampler=micro,
        collate_fn=collated,
        num_workers=args.workers,
        pin_memory=pinned,
        worker_init_fn=ignore_signals,
    )


class Stop:
    """SIGINT (Ctrl-C) and SIGTERM ask for a checkpoint and an end after this step; a second one ends at once."""

    def __enter__(self):
        self.asked = 0
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number: int, frame):
        self.asked = number
        self.__exit__()

    def __exit__(self, kind=None, error=None, trace=None):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.asked and isinstance(error, RuntimeError):  # a terminal tells a compiler at work, too, which then fails
            raise KeyboardInterrupt from None


def ignore_signals(worker: int):
    """A Ctrl-C in a terminal reaches the loading processes too; they end with the training, not before it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def fit(
    args, ranks: Distributed, run: runs.Run, model: nn.Module, dataset, pad_id: int, save, group: int = 1, held_out=None
):
    """Train `model`, whose forward(**batch) is the summed loss of a batch, and publish it in the run's folder.

    Args: save: writes the finished model into a folder. group: neighbors in the data that stay in one batch.
    held_out: a dataset whose loss is watched, or None.
    Raises ValueError if it cannot go on, naming the last good checkpoint; SystemExit when a signal ends it.
    """
    settle(args, ranks, run, sum(counts_of(dataset.sizes, [source.weight for source in dataset.sources])))
    model.train()
    accelerate(model)
    check_memory(args, ranks, model, dataset, pad_id)
    if args.compile:
        compile_layers(model)
        ranks.print0("--compile: the first steps will take half a minute")
    sharding.shard_model(model, args.shard, ranks, compute_dtype(ranks.device, args.dtype))
    optimizer = make_optimizer(model, args, ranks)
    start, skipped, watched = go_on(ranks, run, model, optimizer)
    network = sharding.wrap_model(model, args.shard)
    loader = iter(make_loader(dataset, args, ranks, pad_id, start, group))
    boards = meters.Boards(args.board if ranks.is_main else [], run.folder, run.values)
    bar = tqdm(
        range(start, args.steps), run.folder.name, args.steps, initial=start, disable=not ranks.is_main, unit="step"
    )
    with Stop() as stop:
        for step in bar:
            faulthandler.dump_traceback_later(args.timeout, exit=True, file=sys.__stderr__)  # hung: say where, and end
            row = {"step": step + 1, **measured_step(args, ranks, model, network, optimizer, loader, step)}
            skipped = skipped + 1 if "skipped" in row else 0
            looking = held_out and (step + 1) % args.val_every == 0
            if looking:
                row["val_loss"] = held_out_loss(args, ranks, model, held_out, pad_id)
                watched.append(row["val_loss"])
            if ranks.is_main:
                run.write_row(row)
                boards.write(row)
                bar.set_postfix({key: row[key] for key in ("loss", "tokens_per_s", "data_wait")}, refresh=False)
            if skipped > args.max_skips:
                raise ValueError(
                    f"step {step + 1}: {row['skipped']}, {skipped} steps in a row; {run.last_checkpoint_hint()}"
                )
            better = looking and args.patience and row["val_loss"] == min(watched)
            if better:
                save_checkpoint(args, ranks, run, model, optimizer, step + 1, "best")
            if step + 1 == args.steps or (looking and out_of_patience(watched, args.patience)):
                break
            stopping = ranks.all_reduce_max(stop.asked)
            due = (step + 1) % args.save_every == 0 and not skipped  # what makes steps fail may be in the weights
            if due or stopping or better:  # a resume before the best one would have to find it again
                save_checkpoint(args, ranks, run, model, optimizer, step + 1)
            elif (step + 1) % args.check_replicas == 0:
                check_weights(args, ranks, run, model, step + 1)
            if stopping:
                bar.close()
                ranks.print0(
                    f"stopped after step {step + 1}; the same command with --out {run.folder} --resume goes on"
                )
                raise SystemExit(128 + stopping)
    faulthandler.cancel_dump_traceback_later()
    if best := ranks.on_main(run.checkpoints, "best"):
        ranks.print0(f"{best[-1].name} had the smallest loss on held-out data, {min(watched):.4f}: it is kept")
        restore_checkpoint(best[-1], model)
    check_weights(args, ranks, run, model, args.steps)
    ranks.on_main(finish, run, partial(save, sharding.gather_weights(model, ranks)))


def check_memory(args, ranks: Distributed, model: nn.Module, dataset, pad_id: int) -> memory.Estimate:
    """Say what a rank will hold, and return it. Raises ValueError if that cannot fit."""
    batch = largest_batch(dataset, micro_batch(args, ranks), pad_id)
    needed = memory.estimate(model, args.shard, ranks.world_size, compute_dtype(ranks.device, args.dtype), batch)
    available = memory.available_bytes(ranks.device)
    ranks.print0(f"{needed}; {available / 1e9:.3g} GB are available")
    memory.check_fits(needed, available)
    return needed


def largest_batch(dataset: Samples, rows: int, pad_id: int) -> dict | None:
    """The longest samples, and so the micro-batch that takes most; what is broken is left to the step that meets it."""
    lengths = abs(dataset.lengths()) if isinstance(dataset, Records) else range(len(dataset))
    samples = []
    for index in np.argsort(lengths)[::-1][:rows]:
        with suppress(DataError, BadImage):
            samples.append(dataset.sample(int(index)))
    return collate((samples * rows)[:rows], pad_id) if samples else None


def go_on(ranks: Distributed, run: runs.Run, model: nn.Module, optimizer) -> tuple[int, int, list[float]]:
    """Take the run's folder, and what its newest checkpoint holds: its step, and what `Run.start` returns."""
    ranks.on_main(run.open)
    checkpoint = ranks.on_main(run.newest_valid_checkpoint)
    start = restore_checkpoint(checkpoint, model, optimizer) if checkpoint else 0
    return start, *ranks.on_main(run.start, start)


def out_of_patience(losses: list[float], patience: int | None) -> bool:
    """Whether none of the last `patience` losses is below all before them."""
    return bool(patience) and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


@torch.no_grad()
def held_out_loss(args, ranks: Distributed, model: nn.Module, dataset, pad_id: int) -> float:
    """Mean loss per supervised token of a dataset, a part of it on each rank."""
    model.eval()
    share, sums = micro_batch(args, ranks), torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for first in range(ranks.rank * share, len(dataset) + ranks.rank * share, share * ranks.world_size):
        # Slices of the weights are gathered by all ranks together, so one that has nothing left takes part with any.
        samples = [dataset[i] for i in range(first, min(first + share, len(dataset)))]
        batch = to_device(collate(samples or [dataset[0]], pad_id), ranks.device)
        with autocast(ranks.device, args.dtype):
            loss = model(**batch)
        if samples:
            sums += torch.stack([loss.double(), (batch["labels"][:, 1:] != IGNORE).sum().double()])
    ranks.all_reduce(sums)
    if args.shard == "fsdp" and dist.is_initialized():
        model.reshard()  # after a forward pass alone it stays whole
    model.train()
    return float(sums[0] / sums[1])


def to_device(batch: dict, device: torch.device) -> dict:
    return {key: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for key, v in batch.items()}


def save_checkpoint(args, ranks: Distributed, run: runs.Run, model: nn.Module, optimizer, step: int, kind="checkpoint"):
    """All ranks hand over what they hold, rank 0 writes. Raises ValueError as check_weights and Run's own do."""
    check_weights(args, ranks, run, model, step)
    state = checkpoint_tensors(model, optimizer)
    values = gather_tensors(state, optimizer, ranks)
    if not ranks.is_main:
        deque(values, maxlen=0)
    ranks.on_main(run.save_checkpoint, step, state, values, 1 if kind == "best" else args.keep, kind)


def check_weights(args, ranks: Distributed, run: runs.Run, model: nn.Module, step: int):
    """Raises ValueError, on all ranks, if what trained is not finite, or not the same on every rank."""
    trained = [sharding.local_shard(p) for p in sharding.trainable_parameters(model).values()]
    if ranks.all_reduce_max(not all(bool(p.isfinite().all()) for p in trained)):
        raise ValueError(f"step {step}: weights are not finite; {run.last_checkpoint_hint()}")
    if args.shard != "fsdp" and not ranks.replicas_match(trained):
        raise ValueError(f"step {step}: the ranks' weights differ; {run.last_checkpoint_hint()}")


def finish(run: runs.Run, save):
    """Draw the losses and publish the finished model."""
    rows = run.rows()
    tail = [row["loss"] for row in rows[-max(1, len(rows) // 20) :] if row["loss"] is not None]
    loss = sum(tail) / max(1, len(tail))
    skipped = sum("skipped" in row for row in rows)
    plots.loss_curve(run.folder / "loss.png", {run.folder.name: rows})
    run.finish(save, {"loss": round(loss, 4), "skipped": skipped})
    more = f"; {skipped} steps were skipped, see log.jsonl" if skipped else ""
    print(f"{run.folder}: loss {loss:.3f} over the last {len(tail)} steps{more}", file=sys.stderr, flush=True)


def measured_step(args, ranks: Distributed, model: nn.Module, network: nn.Module, optimizer, loader, step: int) -> dict:
    """train_step on the next micro-batches, and what it cost. mfu: share of what this rank's GPU could do at most."""
    begin = time.perf_counter()
    micro = [next(loader) for _ in range(args.accumulate)]
    waited = time.perf_counter() - begin
    lengths = torch.cat([meters.row_lengths(batch["labels"]) for batch in micro])
    tiles = sum(len(batch["pixel_values"]) for batch in micro if batch["pixel_values"] is not None)
    tokens, samples = ranks.all_reduce_sum(lengths.sum(), len(lengths))
    row = train_step(args, ranks, network, optimizer, micro, step)
    seconds = time.perf_counter() - begin
    row |= {"tokens_per_s": round(tokens / seconds), "samples_per_s": round(samples / seconds, 2)}
    row |= {"data_wait": round(waited / seconds, 3), "memory_gb": round(meters.peak_memory(ranks.device) / 1e9, 3)}
    if peak := meters.peak_flops(ranks.device):
        flops = meters.step_flops(model, int(lengths.sum()), float(lengths.float().mean()), tiles)
        row["mfu"] = round(flops / seconds / peak, 4)
    return row


def train_step(args, ranks: Distributed, network: nn.Module, optimizer, micro: list[dict], step: int) -> dict:
    """One update from this rank's micro-batches. The loss is the mean over every supervised token of all ranks.

    With --loss-mean micro-batch, it is the mean over all micro-batches of each one's own: 0 if nothing is supervised.
    """
    rate = learning_rate(step, args.steps, 1.0, args.warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["peak"]
    counts = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in micro]
    (supervised,) = ranks.all_reduce_sum(sum(counts))
    weights = [1.0] * len(micro)
    if args.loss_mean == "micro-batch":
        weights = [supervised / (max(1, count) * len(micro) * ranks.world_size) for count in counts]
    torch.manual_seed((args.seed << 44) + (step << 16) + ranks.rank)  # chance does not depend on the steps before
    total = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro):
        batch = to_device(batch, ranks.device)
        with sharding.gradient_sync(network, last=i == len(micro) - 1):
            with autocast(ranks.device, args.dtype):
                loss = network(**batch) * weights[i]
            # The ranks' gradients are averaged; we want their sum, divided by all supervised tokens.
            (loss * ranks.world_size / max(1, supervised)).backward()
        total += loss.detach()
    ranks.all_reduce(total)
    return update(args, ranks, optimizer, float(total) / max(1, supervised), step) | {"supervised": supervised}


def update(args, ranks: Distributed, optimizer, loss: float, step: int) -> dict:
    """Move the weights, unless loss or gradient is not finite; both are sums over the ranks, so all decide alike."""
    norms = meters.gradient_norms(optimizer)
    norm = math.hypot(*norms.values())
    row = {"loss": loss, "lr": learning_rate(step, args.steps, args.lr, args.warmup), "grad_norm": norm}
    if math.isfinite(loss) and math.isfinite(norm):
        meters.clip_gradients(optimizer, norm, args.clip_grad)
        optimizer.step()
        row["grad_norms"] = norms
    else:
        row |= {"loss": None, "grad_norm": None, "skipped": f"the loss is {loss}, the gradient's norm {norm}"}
    optimizer.zero_grad(set_to_none=True)
    return row


# ---------------------------------------------------------------------------------------------------------------------
# stage 0: the towers


def train_clip(args, ranks: Distributed, tokenizer: Tokenizer, run: runs.Run):
    """The tower that sees: CLIP on the captions, scenes that differ in one fact kept in one batch."""
    model = new_clip(args.size, args.patch_size, tokenizer.vocab_size)
    dataset = CaptionPairs(data_files(args, ranks, "captions"), tokenizer, model.config, args.image_mode or "pad")
    allow_skips(args, ranks, run, dataset)
    whiten_patches(model, dataset)

    def save(trained: dict, folder: Path):
        save_clip(model, folder)
        tokenizer.save(folder)

    fit(args, ranks, run, Contrastive(model), dataset, tokenizer.pad_id, save, group=GROUP_SIZE)


def train_decoder(args, ranks: Distributed, tokenizer: Tokenizer, run: runs.Run):
    """The tower that speaks: a decoder on records without their pictures."""
    model = new_decoder(args.size, tokenizer, args.template or "llava_hf")
    options = {"text_only": True, "questions": args.questions}
    dataset = Records(data_files(args, ranks, "text"), tokenizer, model.config, args.max_length or 1024, **options)
    allow_skips(args, ranks, run, dataset)

    def save(trained: dict, folder: Path):
        save_model(model, folder)
        tokenizer.save(folder)

    fit(args, ranks, run, model, dataset, tokenizer.pad_id, save)


def stage0(args, ranks: Distributed, folder: Path):
    """Both towers, one after the other, with a vocabulary learned from the text they are trained on."""
    sources = data_files(args, ranks, "text")
    records = (source.file[i] for source in sources for i in source.usable()[: 20_000 // len(sources)])
    texts = [message["value"] for record in records for message in record["conversations"]]
    words = template_words(args.template or "llava_hf")  # its roles stand in every dialogue, so they are to be words
    tokenizer = train_bpe(texts + words * 2000, merges=600)
    for part, train in (("clip", train_clip), ("decoder", train_decoder)):
        if args.tower in ("both", part):
            run = open_run(args, ranks, folder / part)
            if not run.finished:
                torch.manual_seed(args.seed)
                train(args, ranks, tokenizer, run)


# ---------------------------------------------------------------------------------------------------------------------
# stages 1 and 2: the LLaVA


def choose_sources(args, run: runs.Run):
    """Settle in `args` where the weights come from: a LLaVA, or a CLIP and a decoder. A resumed run keeps its own."""
    names = ("model", "vision", "llm")
    if run.old:
        for name in names:
            if getattr(args, name):
                run.check_unchanged(name, str(getattr(args, name).resolve()), args.allow_changes)
            else:
                setattr(args, name, run.old[name] and Path(run.old[name]))
    elif args.vision or args.llm or (args.stage == 1 and not args.model):
        args.vision = args.vision or runs.newest_run(0, part="clip")
        args.llm = args.llm or runs.newest_run(0, part="decoder")
    else:
        args.model = args.model or runs.newest_run(1)
    run.values |= {name: str(path.resolve()) for name in names if (path := getattr(args, name))}


def choose_trainable(model: Llava, train: str):
    """Freeze everything but the components named in `train`; of the tower, only what its features depend on."""
    model.requires_grad_(False)
    if "projector" in train:
        model.multi_modal_projector.requires_grad_(True)
        if model.config.image_grid_pinpoints:
            model.image_newline.requires_grad_(True)
    if "llm" in train:
        model.language_model.requires_grad_(True)
    if "vision" in train:
        tower = model.vision_tower.vision_model
        tower.requires_grad_(True)
        tower.post_layernorm.requires_grad_(False)
        tower.encoder.layers.requires_grad_(False)
        tower.blocks(model.config.vision_feature_layer).requires_grad_(True)


def adapt(args, model: Llava) -> dict:
    """Put the updates that --lora names onto the model; returns what save_adapter needs to know, {} without --lora."""
    if not args.lora:
        return {}
    torch.manual_seed(args.seed)
    ranks = {"llm": args.lora_rank, "vision": args.lora_rank_vision}
    ranks = {part: rank for part, rank in ranks.items() if args.lora in (part, "both")}
    layers = add_lora(model, ranks, args.lora_alpha, args.lora_dropout, args.lora_layers)
    sample = sample_weights(model, layers)
    return {"layers": layers, "dropout": args.lora_dropout, "base": args.model.resolve(), "sample": sample}


def tower_trains(model: Llava) -> bool:
    return any(p.requires_grad for p in model.vision_tower.parameters())


@torch.no_grad()
def precompute_features(args, ranks: Distributed, model: Llava, dataset: Records):
    """Let a frozen tower see every picture once, if all features fit into --cache-gb; else each time it comes up."""
    vision, count = model.config.vision_config, sum(source.file.distinct_images for source in dataset.sources)
    tiles = [1 + math.prod(size) // vision.image_size**2 for size in model.config.image_grid_pinpoints or [(0, 0)]]
    gigabytes = count * max(tiles) * vision.num_patches * vision.hidden_size * 4 / 1e9
    if tower_trains(model) or gigabytes > args.cache_gb or not count:
        return
    pictures = list(dataset.images().items())
    model.vision_tower.to(ranks.device)
    for i in tqdm(range(0, len(pictures), 64), "features of the frozen tower", disable=not ranks.is_main, unit="batch"):
        part = dataset.load(dict(pictures[i : i + 64]))
        if not part:
            continue
        pixels = torch.cat([picture.pixels for picture in part.values()])
        features = model.vision_features(pixels.to(ranks.device)).cpu()
        for picture, own in zip(part.values(), features.split([len(picture.pixels) for picture in part.values()])):
            picture.pixels = own.clone()
        dataset.features |= part


def train_llava(args, ranks: Distributed, folder: Path):
    """Stages 1 and 2: they differ in what trains, on which data, in which template."""
    run = open_run(args, ranks, folder)
    if run.finished:
        return
    choose_sources(args, run)
    sources = data_files(args, ranks, "captions" if args.stage == 1 else "instruct")
    watched = val_files(args)
    if args.vision:
        model, tokenizer = assemble(args.vision, args.llm, args.projector or "mlp2x_gelu", args.seed)
    else:
        ranks.print0(f"going on from {args.model}")
        if is_adapter(args.model):
            raise ValueError(f"{args.model} is an adapter: `python -m formats merge` makes a model of it and its base")
        model, tokenizer = load_checkpoint(args.model, "cpu", torch.float32, args.bits)
    if model.config.vision_config is None:
        raise ValueError(f"{args.model} is a decoder without a vision tower: build a LLaVA with --vision and --llm")
    recipes.check_model(args, model.config)
    model.config.image_mode = args.image_mode or model.config.image_mode
    if args.stage == 2 and args.template:
        model.config.template = args.template
        model.config.eos_token_ids = sorted({*model.config.eos_token_ids, *end_ids(args.template, tokenizer)})
    if any(isinstance(module, NF4Linear) for module in model.modules()) and not (
        args.lora or args.train == "projector"
    ):
        raise ValueError(
            f"{args.model or args.llm} is in four bits, which cannot train: --lora llm, or --train projector"
        )
    choose_trainable(model, args.train)
    adapted = adapt(args, model)
    if args.init_from:
        verify_manifest(args.init_from)
        ranks.print0(f"weights as after step {restore_checkpoint(args.init_from, model)} of {args.init_from}")
    template = args.template or model.config.template
    max_length = args.max_length or model.config.text_config.max_position_embeddings
    options = {"image_order": args.image_order, "seed": args.seed, "template": template, "questions": args.questions}
    dataset = Records(sources, tokenizer, model.config, max_length, **options)
    allow_skips(args, ranks, run, dataset)
    held_out = Records(watched, tokenizer, model.config, max_length, **options) if watched else None
    if args.whiten and args.vision and dataset.images(1):
        whiten_projector(model, dataset)
    # What stands still is kept as it came, for the finished model's files; in training it is as narrow as can be.
    kept = [] if adapted or not ranks.is_main else model.named_parameters()
    frozen = {name: p.data for name, p in kept if not p.requires_grad}
    sharding.cast_weights(model, args.shard, getattr(torch, args.weights), compute_dtype(ranks.device, args.dtype))
    for records in (dataset, held_out) if held_out else (dataset,):
        precompute_features(args, ranks, model, records)
    model.language_model.model.recompute = args.recompute
    model.vision_tower.vision_model.recompute = args.recompute and tower_trains(model)

    def save(trained: dict, folder: Path):
        if adapted:
            save_adapter(trained, folder, model.config, **adapted)
        else:
            save_model(model, folder, frozen | trained)
        tokenizer.save(folder)

    fit(args, ranks, run, model, dataset, tokenizer.pad_id, save, held_out=held_out)


# ---------------------------------------------------------------------------------------------------------------------
# files


def data_files(args, ranks: Distributed, kind: str) -> list[Source]:
    """What to train on, checked; the embedded world's file of this kind if none is named, drawn if need be."""
    if args.data:
        sources = open_sources(args.data, args.images)
    else:
        sources = open_sources([str(world_of(args, ranks) / f"{kind}.json")], None)
    if args.skip_bad:  # one rank looks, so that all leave out the same
        missing = ranks.broadcast([image_faults(source) for source in sources] if ranks.is_main else None)
        for source, faults in zip(sources, missing):
            source.faults |= faults
    refuse_bad(sources, args.skip_bad)
    group = GROUP_SIZE if args.stage == 0 and args.tower != "decoder" else 1
    check_mixing([source.weight for source in sources], args.mixing, args.shares, group)
    count = sum(len(source.usable()) for source in sources)
    if count < ranks.world_size:
        raise ValueError(f"--data: {count} records for {ranks.world_size} ranks")
    return sources


def val_files(args) -> list[Source]:
    """The held-out data, if any; every record of it must be good."""
    sources = open_sources(args.val or [], args.val_images)
    refuse_bad(sources, 0)
    return sources


def world_of(args, ranks: Distributed) -> Path:
    """The folder of the embedded world, drawn if need be."""
    world = args.world or runs.OUTPUT_ROOT / "world"
    if not (world / "instruct.json").exists():
        if world.exists():
            raise ValueError(f"{world} holds no world: name a folder written by `python -m world write`, or a new one")
        draw = partial(write_world, n=20_000, seed=0, side=72, questions=2_000, turns=TURNS)
        ranks.on_main(publish_folder, world, draw)
    return world


def allow_skips(args, ranks: Distributed, run: runs.Run, dataset: Samples):
    """With --skip-bad: name in the run's folder what is left out, and from here on replace what else is found bad."""
    if args.skip_bad:
        faults = [fault for source in dataset.sources for fault in source.faults.values()]
        path = run.folder / "skipped.jsonl"
        if ranks.is_main:
            log_skipped(path, faults)
            ranks.print0(
                f"--skip-bad: {len(faults):,} records are left out; {path} names them, and what else is found bad"
            )
        ranks.broadcast(None)
        dataset.skips = Skips(args.skip_bad, len(dataset), path)


def open_run(args, ranks: Distributed, folder: Path) -> runs.Run:
    """The run in `folder`: a new one, or one to go on with, as asked or because torchrun has restarted us."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    exists = (folder / "run.json").exists()
    resume = args.resume and (exists or args.stage > 0)  # stage 0 may not have begun its second tower
    return runs.Run(folder, values, resume or (exists and ranks.attempt > 0), args.allow_changes)


def main():
    """Train one stage on every rank; what a user can mend ends in one line and status 1."""
    args = read_flags(__doc__)
    try:
        ranks = Distributed(args.device, args.timeout)
        micro_batch(args, ranks)
        if args.weights == "bfloat16" and compute_dtype(ranks.device, args.dtype) == torch.float32:
            raise ValueError("--weights bfloat16 needs --dtype bfloat16 on this machine")
        new = f"stage{args.stage}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = args.out or runs.OUTPUT_ROOT / ranks.shared_run_name(new)
        (stage0 if args.stage == 0 else train_llava)(args, ranks, folder)
        ranks.print0(f"done: {folder}")
    except (ValueError, BadImage) as error:  # one line for what a user can mend; anything else keeps its traceback
        sys.exit(f"train.py: {error}")
    except OSError as error:
        sys.exit(f"train.py: {error.filename or 'a file'}: {error.strerror}")
    except KeyboardInterrupt:
        print("train.py: interrupted; what was saved is whole", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        faulthandler.cancel_dump_traceback_later()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
