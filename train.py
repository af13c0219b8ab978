"""Train a LLaVA in three stages: 0 the two towers, 1 the projector on captions, 2 projector and decoder on dialogues.

    python train.py --stage 0                          CLIP on images and captions, a decoder on text
    python train.py --stage 1                          only the projector, on captions
    python train.py --stage 2                          projector and decoder, on dialogues
    python train.py --stage 2 --data my.json --images my_images
    python train.py --recipe llava-1.5 --stage 2       every hyperparameter of LLaVA-1.5
    torchrun --nproc_per_node=8 train.py --stage 2     the same on eight GPUs

Each stage continues from the newest finished run of the stage before. Without --data it trains on the embedded world
(world/). The batch size counts all ranks and micro-batches, so the result does not depend on how a batch is divided.
CLIP is the exception: its negatives come from one micro-batch of all ranks.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from clip import save_clip
from data import CaptionPairs, Records, collate
from fast.accelerate import accelerate
from fast.compile import compile_layers
from formats.adapters import is_adapter, sample_base, save_adapter
from formats.saving import save_model
from formats.tuning_files import save_tuning
from formats.weights import choose_dtype, choose_template, load_checkpoint
from inputs import cli
from inputs.augment import Augment, mark_steps
from inputs.files import publish_folder
from inputs.mixture import Source, batches, counts_of, make_order
from inputs.samples import Samples
from inputs.templates import answer_start_ids, template_words
from inputs.tokenizer import Tokenizer, train_bpe
from insight.measures import LiveCheck
from llava import IGNORE, Llava
from lora import NF4Linear, add_lora, find_linears
from training import meters, objectives, recipes, runs, sharding
from training.checkpoint import Saver, check_base, restore_start
from training.flags import read_flags
from training.machine import check_machine, largest_batch
from training.meters import Progress, step_costs
from training.ranks import Distributed, autocast
from training.signals import StopSignal, ignore_signals, watchdog
from training.sources import open_data, report_cut, report_shares, skip_bad_samples
from training.towers import Contrastive, assemble, new_clip, new_decoder, whiten_patches, whiten_projector
from variants.image_lora import ImageRows
from variants.nested_pool import NestedPool
from variants.relevance import train_relevance
from variants.tuning import add_tuning
from world.language import TURNS
from world.scenes import GROUP_SIZE
from world.writer import write_world

# ---------------------------------------------------------------------------------------------------------------------
# data: the embedded world or files, and the order in which samples come


def open_sources(args, ranks: Distributed, kind: str) -> tuple[list[Source], list[Source]]:
    """Return training and validation files, checked. Without --data, the embedded world's file of this kind."""
    default = None if args.data else world_folder(args, ranks) / f"{kind}.json"
    return open_data(args, ranks, default, GROUP_SIZE if args.stage == 0 and args.tower != "decoder" else 1)


def world_folder(args, ranks: Distributed) -> Path:
    """Return the folder of the embedded world, which is drawn if it does not exist."""
    world = args.world or runs.OUTPUT_ROOT / "world"
    if not (world / "instruct.json").exists():
        if world.exists():
            raise ValueError(f"{world} holds no world: name a folder that `python -m world write` made, or a new one")
        draw = partial(write_world, n=20_000, seed=0, side=72, questions=2_000, turns=TURNS)
        ranks.on_main(publish_folder, world, draw)
    return world


def micro_batch_size(args, ranks: Distributed) -> int:
    """Return the samples in one forward pass of one rank. Raises ValueError if the batch cannot be divided equally."""
    size, rest = divmod(args.batch_size, ranks.world_size * args.accumulate)
    if rest:
        parts = f"{ranks.world_size} ranks x --accumulate {args.accumulate}"
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {parts}")
    return size


def make_loader(dataset: Samples, args, ranks: Distributed, pad_id: int, start: int, group: int = 1) -> DataLoader:
    """Return this rank's micro-batches from step `start` on; their order is a pure function of (seed, step, rank)."""
    size, total = micro_batch_size(args, ranks), args.steps * args.batch_size
    weights = [source.weight for source in dataset.sources]
    order = make_order(dataset.sizes, weights, args.seed, total, args.mixing, args.shares, group)
    lengths = dataset.lengths() if isinstance(dataset, Records) else None  # samples of similar length share a batch
    ranges = (args.batch_size, args.seed, start, args.steps, ranks.rank, ranks.world_size)
    steps = batches(order, *ranges, group, lengths)
    if getattr(dataset, "augment", None):
        steps = mark_steps(steps, start)
    return DataLoader(
        dataset,
        batch_sampler=(step[i * size : (i + 1) * size] for step in steps for i in range(args.accumulate)),
        collate_fn=partial(objectives.collate_with_tasks if args.task_weights else collate, pad_id=pad_id),
        num_workers=args.workers,
        pin_memory=ranks.device.type == "cuda",
        worker_init_fn=ignore_signals,
    )


def to_device(batch: dict, device: torch.device) -> dict:
    return {key: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for key, v in batch.items()}


def count_supervised(batch: dict) -> int:
    """Return the number of supervised labels. The first label of a row does not count: nothing predicts it."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


# ---------------------------------------------------------------------------------------------------------------------
# model: what is frozen, what trains


def choose_trainable(model: Llava, components: Iterable[str]):
    """Freeze everything but these components: flags.COMPONENTS, of which recipes.py has some for every stage."""
    model.requires_grad_(False)
    tower = model.vision_tower.vision_model
    parts = {
        # The features come from an inner layer: blocks after it and the last norm would never get a gradient.
        "vision": [tower.embeddings, tower.pre_layrnorm, tower.blocks(model.config.vision_feature_layer)],
        "projector": [model.multi_modal_projector],
        "llm": [model.language_model],
    }
    if model.config.relevance_bounds:
        parts["relevance"] = [model.relevance]
    if model.config.image_grid_pinpoints:
        parts["projector"].append(model.image_newline)
    for component in components:
        for part in parts[component]:
            part.requires_grad_(True)


def add_adapters(args, model: Llava) -> Callable[[dict, Path], None] | None:
    """Add the updates of --lora or the part of --tune; returns a function that writes them, None without either."""
    if not args.lora and not args.tune:
        return None
    torch.manual_seed(args.seed)
    if args.tune:
        options = {"method": args.tune, "base": args.model.resolve()}
        options["sample"] = sample_base(model, find_linears(model, "llm"))
        add_tuning(model, args.tune, args.prefix_length, args.tune_width)
        return partial(
            save_tuning, config=model.config, tokens=getattr(model.language_model.model, "virtual", None), **options
        )
    lora_ranks = {"llm": args.lora_rank, "vision": args.lora_rank_vision}
    lora_ranks = {tower: rank for tower, rank in lora_ranks.items() if args.lora in (tower, "both")}
    layers = add_lora(model, lora_ranks, args.lora_alpha, args.lora_dropout, args.lora_layers, args.dora)
    if args.lora_images_only:
        model.config.lora_images_only = True
        ImageRows(model)
    options = {"layers": layers, "dropout": args.lora_dropout, "base": args.model.resolve()}
    options["sample"] = sample_base(model, layers)
    return partial(save_adapter, config=model.config, **options)


def tower_trains(model: Llava) -> bool:
    return any(p.requires_grad for p in model.vision_tower.parameters())


@torch.no_grad()
def precompute_features(args, ranks: Distributed, model: Llava, dataset: Records):
    """Compute a frozen tower's features of every image once, if they fit into --cache-gb: they never change."""
    vision, count = model.config.vision_config, sum(source.file.distinct_images for source in dataset.sources)
    tiles = [1 + math.prod(size) // vision.image_size**2 for size in model.config.image_grid_pinpoints or [(0, 0)]]
    gigabytes = count * max(tiles) * vision.num_patches * vision.hidden_size * 4 / 1e9
    changes = dataset.augment and dataset.augment.changes_images
    if tower_trains(model) or changes or gigabytes > args.cache_gb or not count:
        return
    names = list(dataset.images().items())
    model.vision_tower.to(ranks.device)
    for i in tqdm(range(0, len(names), 64), "features of the frozen tower", disable=not ranks.is_main, unit="batch"):
        images = dataset.load(dict(names[i : i + 64]))
        if not images:
            continue
        pixels = torch.cat([image.pixels for image in images.values()])
        features = model.vision_features(pixels.to(ranks.device)).cpu()
        for image, own in zip(images.values(), features.split([len(image.pixels) for image in images.values()])):
            image.pixels = own.clone()
        dataset.features |= images


# ---------------------------------------------------------------------------------------------------------------------
# optimizer: a learning rate per component, and its schedule


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up over the share `warmup` of the steps, then a cosine to 0."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizer(model: nn.Module, args: argparse.Namespace, ranks: Distributed) -> torch.optim.Optimizer:
    """AdamW over what trains: each component has its own peak learning rate, and only matrices decay."""
    peaks = {"vision_tower": args.lr_vision, "multi_modal_projector": args.lr_projector}
    peaks[objectives.LOG_VARIANCES] = objectives.LOG_VARIANCE_RATE
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            component, decay = name.split(".")[0], args.weight_decay if p.ndim >= 2 else 0.0
            peak = args.lr if peaks.get(component) is None else peaks[component]
            if args.lora_plus and ".lora_B." in name:
                peak *= args.lora_plus  # LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns faster than A
            empty = {"params": [], "component": component, "peak": peak, "weight_decay": decay}
            groups.setdefault((component, decay, peak), empty)["params"].append(p)
    ranks.print0(f"{'trains':<24}{'parameters':>14}{'rate':>10}{'decay':>8}")
    for group in groups.values():
        count = sum(p.numel() for p in group["params"])
        ranks.print0(f"{group['component']:<24}{count:>14,}{group['peak']:>10.1e}{group['weight_decay']:>8g}")
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    ranks.print0(f"{'(frozen)':<24}{frozen:>14,}")
    return sharding.make_adamw(list(groups.values()), args.shard, lr=args.lr, betas=(0.9, args.beta2))


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def train_step(args, ranks: Distributed, network: nn.Module, optimizer, micro_batches: list[dict], step: int) -> dict:
    """Run one optimizer step on this rank's micro-batches; returns the step's row of the log.

    The loss is the sum over the supervised tokens of all micro-batches and ranks, divided by their number. With
    --loss-mean micro-batch it is the mean of the micro-batches' means.
    """
    rate = learning_rate(step, args.steps, 1.0, args.warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["peak"]
    counts = [count_supervised(batch) for batch in micro_batches]
    (supervised,) = ranks.all_reduce_sum(sum(counts))
    weights = [1.0] * len(counts)
    if args.loss_mean == "micro-batch":
        weights = [supervised / (max(1, count) * len(counts) * ranks.world_size) for count in counts]
    torch.manual_seed((args.seed << 44) + (step << 16) + ranks.rank)  # dropout does not depend on the steps before
    total = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro_batches):
        with sharding.gradient_sync(network, last=i == len(micro_batches) - 1):  # once per step, not per micro-batch
            with autocast(ranks.device, args.dtype):
                loss = network(**to_device(batch, ranks.device)) * weights[i]
            # DDP averages gradients over the ranks; times world_size, it is their sum.
            (loss * ranks.world_size / max(1, supervised)).backward()
        total += loss.detach()
    ranks.all_reduce(total)
    loss, norms = float(total) / max(1, supervised), meters.gradient_norms(optimizer)
    norm = math.hypot(*norms.values())
    row = {"loss": loss, "lr": rate * args.lr, "grad_norm": norm, "grad_norms": norms, "supervised": supervised}
    if math.isfinite(loss) and math.isfinite(norm):  # the same on all ranks
        meters.clip_gradients(optimizer, norm, args.clip_grad)
        optimizer.step()
    else:
        skipped = f"the loss is {loss}, the gradient's norm {norm}"
        row = {"loss": None, "lr": rate * args.lr, "grad_norm": None, "supervised": supervised, "skipped": skipped}
    optimizer.zero_grad(set_to_none=True)
    return row


@torch.no_grad()
def validation_loss(args, ranks: Distributed, model: nn.Module, dataset, pad_id: int) -> float:
    """Return the mean loss per supervised token of a dataset; the ranks divide its samples among them."""
    model.eval()
    size, sums = micro_batch_size(args, ranks), torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for first in range(ranks.rank * size, len(dataset) + ranks.rank * size, size * ranks.world_size):
        samples = [dataset[i] for i in range(first, min(first + size, len(dataset)))]
        # Under fsdp all ranks gather each layer's weights together, so a rank without samples runs the first one.
        batch = to_device(collate(samples or [dataset[0]], pad_id), ranks.device)
        with autocast(ranks.device, args.dtype):
            loss = model(**batch)
        if samples:
            sums += torch.stack([loss.double(), sums.new_tensor(count_supervised(batch))])
    ranks.all_reduce(sums)
    if args.shard == "fsdp" and dist.is_initialized():
        model.reshard()  # only a backward pass does it by itself
    model.train()
    return float(sums[0] / sums[1])


def fit(args, ranks: Distributed, run: runs.Run, model, dataset, tokenizer, save, group=1, val=None, nested=None):
    """Train `model`, whose forward(**batch) is the summed loss of a batch, and publish it in the run's folder.

    Args: save: save(trained_weights, folder) writes the model; group: neighboring records that stay in one batch;
    val: a dataset for validation, or None; nested: variants/nested_pool.py for this model, or None.
    Raises ValueError, naming the last good checkpoint, if training cannot go on; SystemExit after a signal.
    """
    resolve_steps(args, ranks, run, dataset)
    report_cut(ranks, run, dataset, val)
    pad_id = tokenizer.pad_id
    model.train()
    if not args.no_fast:
        accelerate(model)
    dtype = choose_dtype(args.dtype, ranks.device.type)
    check_machine(ranks, model, args.shard, dtype, largest_batch(dataset, micro_batch_size(args, ranks), pad_id))
    objective = objectives.make_objective(args, ranks, run, model, dataset)  # None: the plain loss
    if args.compile:
        compile_layers(model)
        ranks.print0("--compile: the first steps take half a minute")
    network = sharding.shard_model(objective or model, args.shard, ranks, dtype)
    optimizer = make_optimizer(model, args, ranks)
    saver = Saver(args, ranks, run, model, optimizer)
    start, skipped, val_losses = saver.resume()
    loader = iter(make_loader(dataset, args, ranks, pad_id, start, group))
    progress = Progress(args, ranks, run, skipped, val_losses)
    check = LiveCheck(args, ranks, model) if args.diagnose else None
    with StopSignal() as stop, watchdog(args.timeout) as reset_watchdog:
        for step in progress.steps(start):
            reset_watchdog()
            begin = time.perf_counter()
            micro_batches = [next(loader) for _ in range(args.accumulate)]
            waited = time.perf_counter() - begin
            if nested:
                micro_batches = [nested(batch, step) for batch in micro_batches]
            row = {"step": step + 1} | train_step(args, ranks, network, optimizer, micro_batches, step)
            row |= objective.report(ranks) if objective else {}
            row |= step_costs(ranks, model, micro_batches, waited, time.perf_counter() - begin)
            if val and ((step + 1) % args.val_every == 0 or step + 1 == args.steps):
                row["val_loss"] = validation_loss(args, ranks, model, val, pad_id)
            progress.log(row)
            if check and (step + 1) % args.diagnose == 0:
                check(micro_batches, step + 1)
            if best := progress.is_best(row):
                saver.save(step + 1, "best")
            if step + 1 == args.steps or ("val_loss" in row and progress.out_of_patience()):
                break
            signal = ranks.all_reduce_max(stop.number)  # all ranks stop after the same step
            due = (step + 1) % args.save_every == 0 and not progress.skipped  # broken weights would be saved
            if due or best or signal:
                saver.save(step + 1)
            if signal:
                progress.bar.close()
                folder = run.folder.parent if args.stage == 0 else run.folder  # stage 0 has a run for each tower
                ranks.print0(f"stopped after step {step + 1}; continue with --out {folder} --resume")
                raise SystemExit(128 + signal)
    saver.finish(save, tokenizer)


def resolve_steps(args, ranks: Distributed, run: runs.Run, dataset: Samples):
    """Turn --epochs into steps, now that the dataset's size is known, and print the whole configuration."""
    records = sum(counts_of(dataset.sizes, [source.weight for source in dataset.sources]))  # in an epoch
    if args.epochs:
        args.steps = recipes.count_steps(args.epochs, records, args.batch_size)
    epochs = args.steps * args.batch_size / records
    ranks.print0(f"{args.steps:,} steps of {args.batch_size} records: {epochs:.3g} epochs of {records:,} records")
    report_shares(args, ranks, dataset)
    if run.old:
        run.check_unchanged("steps", args.steps)
    run.values["steps"] = args.steps
    ranks.print0(recipes.configuration_table(args))


# ---------------------------------------------------------------------------------------------------------------------
# the stages


def train_stage0(args, ranks: Distributed, folder: Path):
    """Train CLIP, then the decoder, with a vocabulary learned from the text they are trained on."""
    if args.resume and not any((folder / part / "run.json").exists() for part in ("clip", "decoder")):
        raise ValueError(f"{folder} holds no run to resume")
    sources, _ = open_sources(args, ranks, "text")
    records = (source.file[i] for source in sources for i in source.usable()[: 20_000 // len(sources)])
    texts = [message["value"] for record in records for message in record["conversations"]]
    words = template_words(args.template or "llava_hf")  # they are in every dialogue: each should become one token
    tokenizer = train_bpe(texts + words * 2000, merges=600)
    for part, train in (("clip", train_clip), ("decoder", train_decoder)):
        if args.tower in ("both", part):
            run = open_run(args, ranks, folder / part)
            if not run.finished:
                torch.manual_seed(args.seed)
                train(args, ranks, tokenizer, run, sources)


def train_clip(args, ranks: Distributed, tokenizer: Tokenizer, run: runs.Run, sources: list[Source]):
    """Train CLIP on images and captions. The world's scenes that differ in one fact share a batch: hard negatives."""
    model = new_clip(args.size, args.patch_size, tokenizer.vocab_size)
    if not args.data:
        sources, _ = open_sources(args, ranks, "captions")
    dataset = CaptionPairs(sources, tokenizer, model.config, args.image_mode or "pad")
    skip_bad_samples(args, ranks, run, dataset)
    whiten_patches(model, dataset)
    network = Contrastive(model)
    fit(args, ranks, run, network, dataset, tokenizer, lambda _, folder: save_clip(model, folder), group=GROUP_SIZE)


def train_decoder(args, ranks: Distributed, tokenizer: Tokenizer, run: runs.Run, sources: list[Source]):
    """Train a decoder on dialogues without their images."""
    model = new_decoder(args.size, tokenizer, args.template or "llava_hf")
    options = {"text_only": True, "questions": args.questions}
    context = model.config.text_config.max_position_embeddings
    if (args.max_length or 0) > context:
        raise ValueError(f"--max-length {args.max_length} is more than the new decoder's context: {context}")
    dataset = Records(sources, tokenizer, model.config, args.max_length or context, **options)
    skip_bad_samples(args, ranks, run, dataset)
    fit(args, ranks, run, model, dataset, tokenizer, lambda _, folder: save_model(model, folder))


def train_llava(args, ranks: Distributed, folder: Path):
    """Train stage 1 or 2, which differ in trainable components, data and template only."""
    run = open_run(args, ranks, folder)
    if run.finished:
        return
    runs.choose_weights(args, run)
    sources, val_sources = open_sources(args, ranks, "captions" if args.stage == 1 else "instruct")
    model, tokenizer = load_start(args, ranks)
    if model.config.relevance_bounds and args.questions != 1:
        raise ValueError(f"{args.model} chooses patches for one question: add --questions 1")
    if args.relevance and args.lora and not model.config.relevance_bounds:
        raise ValueError(f"{args.model} has no scorer, and an adapter cannot add one: train it first, without --lora")
    if args.relevance:
        torch.manual_seed(args.seed)
        train_relevance(model, args.relevance, args.token_price)
    choose_trainable(model, args.train)
    save_trained = add_adapters(args, model)
    check_base(model, run, every=bool(args.distill or args.ewc))

    context = model.config.text_config.max_position_embeddings
    max_length = args.max_length or context
    if max_length > context:
        raise ValueError(f"--max-length {max_length} is more than virtual tokens leave of the context: {context}")
    template = args.template or model.config.template
    model.config.answer_start_ids = answer_start_ids(template, tokenizer)  # none in stage 1: captions have no question
    options = {"image_order": args.image_order, "seed": args.seed, "template": template, "questions": args.questions}
    augment = Augment(args.augment, args.seed) if args.augment else None
    dataset = Records(sources, tokenizer, model.config, max_length, **options, augment=augment)
    skip_bad_samples(args, ranks, run, dataset)
    if augment:
        ranks.print0(augment.describe(map(dataset.record, range(len(dataset)))))
    val = Records(val_sources, tokenizer, model.config, max_length, **options) if val_sources else None

    if args.whiten and args.vision and dataset.images(1):
        whiten_projector(model, dataset)
    if args.init_from and (args.distill or not run.checkpoints()):  # a resumed run reads them for its teacher only
        ranks.print0(restore_start(args.init_from, model, run))
    # Frozen weights are used in the compute dtype; they are saved as they were loaded.
    named = model.named_parameters() if ranks.is_main and not save_trained else []
    frozen = {name: p.data for name, p in named if not p.requires_grad}
    sharding.cast_weights(model, args.shard, getattr(torch, args.weights), choose_dtype(args.dtype, ranks.device.type))
    for records in filter(None, (dataset, val)):
        precompute_features(args, ranks, model, records)
    model.language_model.model.recompute = args.recompute
    model.vision_tower.vision_model.recompute = args.recompute and tower_trains(model)

    def save(weights: dict, folder: Path):
        weights.pop(objectives.LOG_VARIANCES, None)  # it belongs to the run, not to the model
        if save_trained:
            save_trained(weights, folder)
        else:
            save_model(model, folder, frozen | weights)

    nested = None if args.nested_pool is None else NestedPool(model, args.nested_pool, args.seed)
    fit(args, ranks, run, model, dataset, tokenizer, save, val=val, nested=nested)


def load_start(args, ranks: Distributed) -> tuple[Llava, Tokenizer]:
    """Return model and tokenizer to start from, in float32. Raises ValueError if they contradict flags or recipe."""
    if args.vision:
        ranks.print0(f"a new LLaVA from {args.vision} and {args.llm}")
        projector = args.projector or "mlp2x_gelu"
        model, tokenizer = assemble(args.vision, args.llm, projector, args.seed, args.visual_tokens)
    else:
        ranks.print0(f"continuing from {args.model}")
        if is_adapter(args.model):
            raise ValueError(f"{args.model} is an adapter: `python -m formats merge` adds it to its base model")
        model, tokenizer = load_checkpoint(args.model, "cpu", torch.float32, bits=args.bits)
    config = model.config
    if config.vision_config is None:
        raise ValueError(f"{args.model} is a decoder without a vision tower: build a LLaVA with --vision and --llm")
    recipes.check_model(args, config)
    if "llm" in args.train and any(isinstance(module, NF4Linear) for module in model.modules()):
        folder = args.model or args.llm
        raise ValueError(f"{folder} is in four bits, which cannot train: --lora llm, or --train projector")
    config.image_mode = args.image_mode or config.image_mode
    if args.stage == 2:
        choose_template(config, tokenizer, args.template)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# setup


def open_run(args, ranks: Distributed, folder: Path) -> runs.Run:
    """Return the run in `folder`: a new one or, with --resume or after a restart by torchrun, the one that is there."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    values["train"] = ",".join(args.train)
    exists = (folder / "run.json").exists()
    resume = args.resume and (exists or args.stage > 0)  # stage 0 may have been stopped before its second tower
    return runs.Run(folder, values, resume or (exists and ranks.attempt > 0))


def main():
    """Train one stage, on every rank."""
    args = read_flags(__doc__)
    ranks = Distributed(args.device, args.timeout)
    try:
        micro_batch_size(args, ranks)  # fails now rather than after the data is read
        if args.weights == "bfloat16" and choose_dtype(args.dtype, ranks.device.type) == torch.float32:
            raise ValueError("--weights bfloat16 needs --dtype bfloat16 on this machine")
        name = ranks.shared_run_name(f"stage{args.stage}-{datetime.now():%Y%m%d-%H%M%S}")
        folder = args.out or runs.OUTPUT_ROOT / name
        (train_stage0 if args.stage == 0 else train_llava)(args, ranks, folder)
        ranks.print0(f"done: {folder}")
    finally:
        ranks.leave()


if __name__ == "__main__":
    cli.run(main, "train.py")
