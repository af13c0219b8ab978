"""Train a LLaVA: the towers (stage 0), the projector on captions (stage 1), projector and decoder on dialogues (2).

    python train.py --stage 0                          CLIP by contrast, and the decoder on text
    python train.py --stage 1                          only the projector, on captions
    python train.py --stage 2                          projector and decoder, on dialogues
    python train.py --stage 2 --data my.json --images my_pictures
    torchrun --nproc_per_node=8 train.py --stage 2     the same on eight GPUs

Each stage goes on from the newest finished run of the one before. Without --data it trains on the embedded world of
shapes.py. The batch size counts all ranks and micro-batches, so the result does not depend on how the work is cut
(but for CLIP, whose negatives come from one micro-batch of all ranks).
"""

import argparse
import math
import sys
import time
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import plots
import runs
import shapes
from clip import save_clip
from data import CaptionPairs, Records, Samples, Skips, collate, name_skipped, picture_faults, refuse_bad
from images import BadImage
from llava import IGNORE, Llava
from mixture import Source, as_number, batches, check_mixing, open_sources, order_of, read_mixing, read_shares
from ranks import Ranks, autocast
from templates import TEMPLATES
from tokenizer import Tokenizer, train_bpe
from towers import SIZES, Contrastive, assemble, new_clip, new_decoder, whiten_patches, whiten_projector
from weights import load_model, load_tokenizer, save_model

# ---------------------------------------------------------------------------------------------------------------------
# knobs

# What each stage trains with unless a flag says otherwise: right for the embedded world, found by trial. Small batches
# want small rates: with perfect features, 2.1 M tokens in batches of 16 end at loss 0.20 with 3e-4, 0.38 with 1e-3;
# with real ones, 2,400 steps end at 0.116 with 6e-4, 0.131 with 3e-4.
STAGES = {
    0: {"steps": 1000, "batch_size": 64, "lr": 5e-4, "train": ""},
    1: {"steps": 300, "batch_size": 16, "lr": 1e-3, "train": "projector"},
    2: {"steps": 2000, "batch_size": 16, "lr": 5e-4, "train": "projector,llm"},
}


def read_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, what it leaves open filled in by stage; an unknown flag or value ends with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--stage", type=int, choices=STAGES, required=True, help="0 towers, 1 projector, 2 projector and decoder")
    add("--tower", choices=("both", "clip", "decoder"), default="both", help="stage 0: which tower")
    add("--model", type=Path, help="LLaVA to go on from; default: the newest finished run of the stage before")
    add("--vision", type=Path, help="build a new LLaVA with this CLIP; default: the newest of stage 0")
    add("--llm", type=Path, help="build a new LLaVA with this decoder; default: the newest of stage 0")
    add("--data", nargs="+", metavar="PATH[:WEIGHT]", help="LLaVA's JSON, many to mix; default: the embedded world")
    add("--images", nargs="+", help="folder the paths in --data start from, or one for each; default: where it lies")
    add("--mixing", default="proportional", help="of many files: proportional (epochs), equal, or a temperature")
    add("--shares", default="", help="of many files, as 80/20; 80/20:20/80:4 goes from one to the other in 4 steps")
    add("--skip-bad", type=percent, default=0.0, metavar="N%%", help="leave bad records out, up to so many; 0: none")
    add("--world", type=Path, help="folder that shapes.py wrote; default: one is drawn below out/")
    add("--out", type=Path, help="the run's folder; default: a new one below out/")
    add("--resume", action="store_true", help="go on with the run in --out from its newest checkpoint, exactly")
    add("--steps", type=int, help="optimizer steps; default by stage")
    add("--batch-size", type=int, help="samples per step, over all ranks and micro-batches; default by stage")
    add("--accumulate", type=int, default=1, help="micro-batches a step is cut into, to fit the memory")
    add("--lr", type=float, help="peak learning rate; default by stage")
    add("--lr-projector", type=float, help="the projector's own, default --lr (LLaVA-1.5 with LoRA: a tenth)")
    add("--lr-vision", type=float, help="the vision tower's own, default --lr (LLaVA-NeXT: a tenth)")
    add("--warmup", type=float, default=0.03, help="share of the steps in which the rate rises (LLaVA: 0.03)")
    add("--weight-decay", type=float, default=0.0, help="on matrices only (LLaVA: none)")
    add("--beta2", type=float, default=0.99, help="AdamW's; short runs want less than LLaVA's 0.999")
    add("--clip-grad", type=float, default=1.0, help="largest gradient norm; 0 leaves it alone")
    add("--train", help="what trains in stages 1 and 2: a comma-separated choice of vision, projector, llm")
    add("--template", choices=TEMPLATES, help="conversation template; default: plain in stage 1, then the decoder's")
    add("--image-mode", choices=("square", "pad"), help="how pictures are made square; default: the model's")
    add("--image-order", choices=("first", "either"), default="first", help="picture before its question, or by a coin")
    add("--projector", choices=("mlp2x_gelu", "linear"), default="mlp2x_gelu", help="of a new LLaVA: 1.5's, or 1.0's")
    add(
        "--whiten",
        action="store_true",
        help="start a new projector from features whose ranges are evened out",
    )
    add("--size", choices=SIZES, default="small", help="stage 0: shape of the new towers")
    add(
        "--patch-size",
        type=int,
        default=24,
        help="stage 0: side of a patch; pictures are 72 pixels, the world's cells 24",
    )
    add("--questions", type=int, help="most questions in a sample: longer dialogues are cut; default: none is")
    add("--max-length", type=int, help="tokens of a sample, picture counted; default: the decoder's context")
    add("--cache-gb", type=float, default=4.0, help="memory for the features of a frozen tower; 0: compute each time")
    add("--workers", type=int, default=0, help="processes that load data; 0 loads in this one")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--seed", type=int, default=0, help="of the new weights and of the order of the data")
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the arithmetic; weights are float32",
    )
    add("--compile", action="store_true", help="torch.compile: slow to start, then faster; needs a C++ compiler")
    args = parser.parse_args(argv)
    for key, value in STAGES[args.stage].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for key in ("steps", "batch_size", "accumulate", "save_every", "questions"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            parser.error(f"--{key.replace('_', '-')} must be at least 1")
    try:
        read_mixing(args.mixing)
        if args.shares:
            read_shares(args.shares)
    except ValueError as error:
        parser.error(str(error))
    unknown = set(args.train.split(",")) - {"vision", "projector", "llm"}
    if args.model and (args.vision or args.llm):
        parser.error("--model goes on from a LLaVA, --vision and --llm build a new one: name one or the other")
    if args.stage > 0 and unknown:
        parser.error(f"--train {', '.join(unknown)}: choose from vision, projector, llm")
    return args


def percent(text: str) -> float:
    value = as_number(text.removesuffix("%"))
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Rate of step 0 .. steps - 1: a linear rise over the share `warmup` of the steps, then a cosine to zero."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizer(model: nn.Module, args: argparse.Namespace, ranks: Ranks) -> torch.optim.AdamW:
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
    ranks.say(f"{'trains':<24}{'parameters':>14}{'rate':>10}{'decay':>8}")
    for group in groups.values():
        count = sum(p.numel() for p in group["params"])
        ranks.say(f"{group['component']:<24}{count:>14,}{group['peak']:>10.1e}{group['weight_decay']:>8g}")
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    ranks.say(f"{'(frozen)':<24}{frozen:>14,}")
    return torch.optim.AdamW(list(groups.values()), lr=args.lr, betas=(0.9, args.beta2), fused=True)


def micro_batch(args, ranks: Ranks) -> int:
    """Samples that a rank sees at a time. Raises ValueError if the batch cannot be cut so."""
    share = args.batch_size // ranks.world // args.accumulate
    if share * ranks.world * args.accumulate != args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {ranks.world} ranks x {args.accumulate}")
    return share


def make_loader(dataset: Samples, args, ranks: Ranks, pad_id: int, start: int, group: int) -> DataLoader:
    """Micro-batches of every step from `start` on; the order is a pure function of (seed, step, rank)."""
    share, total = micro_batch(args, ranks), args.steps * args.batch_size
    weights = [source.weight for source in dataset.sources]
    order = order_of(dataset.sizes, weights, args.seed, total, args.mixing, args.shares, group)
    lengths = dataset.lengths() if isinstance(dataset, Records) else None
    steps = batches(order, args.batch_size, args.seed, start, args.steps, ranks.rank, ranks.world, group, lengths)
    micro = (step[i * share : (i + 1) * share] for step in steps for i in range(args.accumulate))
    pinned = ranks.device.type == "cuda"
    collated = partial(collate, pad_id=pad_id)
    return DataLoader(dataset, batch_sampler=micro, collate_fn=collated, num_workers=args.workers, pin_memory=pinned)


def fit(args, ranks: Ranks, run: runs.Run, model: nn.Module, dataset, pad_id: int, save, group: int = 1):
    """Train `model`, whose forward(**batch) is the summed loss of a batch, and publish it in the run's folder.

    Args: save: writes the finished model into a folder. group: neighbours in the data that stay in one batch.
    """
    model.to(ranks.device)
    optimizer = make_optimizer(model, args, ranks)
    start = run.load_checkpoint(model, optimizer)
    if ranks.first:
        run.start()
    network = torch.compile(model) if args.compile else model
    if dist.is_initialized():
        unused = "vision" in args.train  # a rank without a picture leaves a training tower without gradients
        network = DistributedDataParallel(network, find_unused_parameters=unused)
    loader = iter(make_loader(dataset, args, ranks, pad_id, start, group))
    model.train()
    bar = tqdm(
        range(start, args.steps), run.folder.name, args.steps, initial=start, disable=not ranks.first, unit="step"
    )
    for step in bar:
        begin = time.perf_counter()
        micro = [next(loader) for _ in range(args.accumulate)]
        waited = time.perf_counter() - begin
        row = {"step": step + 1, **train_step(args, ranks, network, optimizer, micro, step)}
        seconds = time.perf_counter() - begin
        row |= {"tokens_per_s": round(row.pop("tokens") / seconds), "data_wait": round(waited / seconds, 3)}
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            raise ValueError(f"step {step + 1}: the loss is {row['loss']}; the last checkpoint in {run.folder} is good")
        if ranks.first:
            run.write_row(row)
            bar.set_postfix(
                {key: f"{row[key]:.4g}" for key in ("loss", "lr", "tokens_per_s", "data_wait")}, refresh=False
            )
            if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
                run.save_checkpoint(step + 1, model, optimizer)
    if ranks.first:
        rows = run.rows()
        tail = [row["loss"] for row in rows[-max(1, len(rows) // 20) :]]
        plots.loss_curve(run.folder / "loss.png", {run.folder.name: rows})
        run.finish(save, {"loss": round(sum(tail) / len(tail), 4)})
        ranks.say(f"{run.folder}: loss {sum(tail) / len(tail):.3f} over the last {len(tail)} steps")
    if dist.is_initialized():
        dist.barrier()


def train_step(args, ranks: Ranks, network: nn.Module, optimizer, micro: list[dict], step: int) -> dict:
    """One update from this rank's micro-batches. The loss is the mean over every supervised token of all ranks."""
    rate = learning_rate(step, args.steps, 1.0, args.warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["peak"]
    supervised = ranks.total(sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in micro))
    tokens = ranks.total(sum(batch["input_ids"].numel() for batch in micro))
    total = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro):
        batch = {k: v.to(ranks.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        last = i == len(micro) - 1  # gradients cross the wire once per step, with the last micro-batch
        synced = nullcontext() if last or not dist.is_initialized() else network.no_sync()
        with synced:
            with autocast(ranks.device, args.dtype):
                loss = network(**batch)
            # DDP averages over ranks; we want the sum over ranks divided by all supervised tokens.
            (loss * ranks.world / max(1, supervised)).backward()
        total += loss.detach()
    if dist.is_initialized():
        dist.all_reduce(total)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": float(total) / max(1, supervised), "lr": rate * args.lr, "grad_norm": float(norm), "tokens": tokens}


# ---------------------------------------------------------------------------------------------------------------------
# stage 0: the towers


def train_clip(args, ranks: Ranks, tokenizer: Tokenizer, run: runs.Run):
    """The tower that sees: CLIP on the captions, scenes that differ in one fact kept in one batch."""
    model = new_clip(args.size, args.patch_size, tokenizer.vocab_size)
    dataset = CaptionPairs(data_files(args, ranks, "captions"), tokenizer, model.config, args.image_mode or "pad")
    allow_skips(args, ranks, run, dataset)
    whiten_patches(model, dataset)

    def save(folder: Path):
        save_clip(model, folder)
        tokenizer.save(folder)

    fit(args, ranks, run, Contrastive(model), dataset, tokenizer.pad_id, save, group=shapes.FAMILY)


def train_decoder(args, ranks: Ranks, tokenizer: Tokenizer, run: runs.Run):
    """The tower that speaks: a decoder on records without their pictures."""
    model = new_decoder(args.size, tokenizer, args.template or "llava_hf")
    options = {"text_only": True, "questions": args.questions}
    dataset = Records(data_files(args, ranks, "text"), tokenizer, model.config, args.max_length or 1024, **options)
    allow_skips(args, ranks, run, dataset)

    def save(folder: Path):
        save_model(model, folder)
        tokenizer.save(folder)

    fit(args, ranks, run, model, dataset, tokenizer.pad_id, save)


def stage0(args, ranks: Ranks, folder: Path):
    """Both towers, one after the other, with a vocabulary learned from the text they are trained on."""
    sources = data_files(args, ranks, "text")
    records = (source.file[i] for source in sources for i in source.usable()[: 20_000 // len(sources)])
    texts = [message["value"] for record in records for message in record["conversations"]]
    form = TEMPLATES[args.template or "llava_hf"]  # its roles stand in every dialogue, so they are to be words
    tokenizer = train_bpe(texts + [form.user, form.assistant] * 2000, merges=600)
    for part, train in (("clip", train_clip), ("decoder", train_decoder)):
        if args.tower in ("both", part):
            run = open_run(args, folder / part)
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
        layer = model.config.vision_feature_layer
        used = layer if layer >= 0 else len(tower.encoder.layers) + 1 + layer
        tower.encoder.layers[used:].requires_grad_(False)


@torch.no_grad()
def precompute_features(args, ranks: Ranks, model: Llava, dataset: Records):
    """Let a frozen tower see every picture once, if all features fit into --cache-gb; else each time it comes up."""
    vision, count = model.config.vision_config, sum(source.file.pictures for source in dataset.sources)
    tiles = [1 + math.prod(size) // vision.image_size**2 for size in model.config.image_grid_pinpoints or [(0, 0)]]
    gigabytes = count * max(tiles) * vision.num_patches * vision.hidden_size * 4 / 1e9
    if "vision" in args.train or gigabytes > args.cache_gb or not count:
        return
    pictures = list(dataset.pictures().items())
    model.to(ranks.device).eval()
    for i in tqdm(range(0, len(pictures), 64), "features of the frozen tower", disable=not ranks.first, unit="batch"):
        part = dataset.load(dict(pictures[i : i + 64]))
        if not part:
            continue
        pixels = torch.cat([picture.pixels for picture in part.values()])
        features = model.vision_features(pixels.to(ranks.device)).cpu()
        for picture, own in zip(part.values(), features.split([len(picture.pixels) for picture in part.values()])):
            picture.pixels = own.clone()
        dataset.features |= part


def train_llava(args, ranks: Ranks, folder: Path):
    """Stages 1 and 2: they differ in what trains, on which data, in which template."""
    run = open_run(args, folder)
    if run.finished:
        return
    choose_sources(args, run)
    sources = data_files(args, ranks, "captions" if args.stage == 1 else "instruct")
    if args.vision:
        model, tokenizer = assemble(args.vision, args.llm, args.projector, args.seed)
    else:
        ranks.say(f"going on from {args.model}")
        model = load_model(args.model)
        tokenizer = load_tokenizer(args.model, model.config)
    if model.config.vision_config is None:
        raise ValueError(f"{args.model} is a decoder without a vision tower: build a LLaVA with --vision and --llm")
    if args.image_mode and model.config.image_grid_pinpoints:
        raise ValueError("--image-mode: this model takes its pictures in tiles (anyres), which is part of its shape")
    model.config.image_mode = args.image_mode or model.config.image_mode
    if args.stage == 2 and args.template:
        model.config.template = args.template
    choose_trainable(model, args.train)
    template = args.template or ("plain" if args.stage == 1 else model.config.template)
    max_length = args.max_length or model.config.text_config.max_position_embeddings
    options = {"image_order": args.image_order, "seed": args.seed, "template": template, "questions": args.questions}
    dataset = Records(sources, tokenizer, model.config, max_length, **options)
    allow_skips(args, ranks, run, dataset)
    if args.whiten and args.vision and dataset.pictures(1):
        whiten_projector(model, dataset)
    precompute_features(args, ranks, model, dataset)

    def save(folder: Path):
        save_model(model, folder)
        tokenizer.save(folder)

    fit(args, ranks, run, model, dataset, tokenizer.pad_id, save)


# ---------------------------------------------------------------------------------------------------------------------
# files


def data_files(args, ranks: Ranks, kind: str) -> list[Source]:
    """What to train on, checked; the embedded world's file of this kind if none is named, drawn if need be."""
    if args.data:
        sources = open_sources(args.data, args.images)
    else:
        sources = open_sources([str(world_of(args, ranks) / f"{kind}.json")], None)
    if args.skip_bad:  # one rank looks, so that all leave out the same
        missing = ranks.agree([picture_faults(source) for source in sources] if ranks.first else None)
        for source, faults in zip(sources, missing):
            source.faults |= faults
    refuse_bad(sources, args.skip_bad)
    group = shapes.FAMILY if args.stage == 0 and args.tower != "decoder" else 1
    check_mixing([source.weight for source in sources], args.mixing, args.shares, group)
    count = sum(len(source.usable()) for source in sources)
    if count < ranks.world:
        raise ValueError(f"--data: {count} records for {ranks.world} ranks")
    return sources


def world_of(args, ranks: Ranks) -> Path:
    """The folder of the embedded world, drawn if need be."""
    world = args.world or runs.ROOT / "world"
    if not (world / "instruct.json").exists():
        if world.exists():
            raise ValueError(
                f"{world} holds no world: name a folder that shapes.py wrote, or one that is not there yet"
            )
        if ranks.first:
            runs.publish(world, lambda folder: shapes.write_world(folder, 20_000, 0, 72, 2_000, shapes.TURNS))
        ranks.agree(None)
    return world


def allow_skips(args, ranks: Ranks, run: runs.Run, dataset: Samples):
    """With --skip-bad: name in the run's folder what is left out, and from here on replace what else is found bad."""
    if args.skip_bad:
        faults = [fault for source in dataset.sources for fault in source.faults.values()]
        path = run.folder / "skipped.jsonl"
        if ranks.first:
            name_skipped(path, faults)
            ranks.say(
                f"--skip-bad: {len(faults):,} records are left out; {path} names them, and what else is found bad"
            )
        ranks.agree(None)
        dataset.skips = Skips(args.skip_bad, len(dataset), path)


def open_run(args, folder: Path) -> runs.Run:
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    resume = args.resume and (
        args.stage > 0 or (folder / "run.json").exists()
    )  # stage 0 may not have begun its second tower
    return runs.Run(folder, values, resume)


def main():
    """Train one stage on every rank; what a user can mend ends in one line and status 1."""
    args = read_flags()
    try:
        ranks = Ranks(args.device)
        micro_batch(args, ranks)
        folder = args.out or runs.ROOT / f"stage{args.stage}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = Path(ranks.agree(str(folder)))
        (stage0 if args.stage == 0 else train_llava)(args, ranks, folder)
        ranks.say(f"done: {folder}")
    except (ValueError, BadImage) as error:  # one line for what a user can mend; anything else keeps its traceback
        sys.exit(f"train.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
