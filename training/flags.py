"""The knobs of train.py, a line each. What no flag says, the recipe does (recipes.py)."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from inputs.mixture import as_number, read_mixing, read_shares
from inputs.templates import TEMPLATES
from llava import PROJECTORS
from lora import DROPOUT, RANKS
from training import meters, recipes, sharding
from training.towers import SIZES


def read_flags(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, what it leaves open filled in by the recipe; an unknown flag or value ends with status 2."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=recipes.listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups = (add_models_knobs, add_data_knobs, add_learning_knobs, add_lora_knobs, add_run_knobs, add_machine_knobs)
    for knobs in groups:
        knobs(parser.add_argument)
    args = parser.parse_args(argv)
    if args.plot:
        return args
    if args.stage is None:
        parser.error("--stage says what to train: 0, 1 or 2")
    args.flags = [key for key, value in vars(args).items() if value != parser.get_default(key)]
    if args.lora and args.train is None:
        args.train = "projector"  # the towers keep their weights
    try:
        recipes.fill(args)
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace):
    """Raise ValueError on the first value, or pair of values, that makes no sense."""
    counts = ("steps", "batch_size", "accumulate", "save_every", "keep", "check_replicas", "questions", "val_every")
    for key in (*counts, "patience"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be at least 1")
    if args.max_skips < 0 or not args.timeout > 0:
        raise ValueError("--max-skips must be at least 0, --timeout above 0")
    if args.epochs is not None and not 0 < args.epochs < math.inf:
        raise ValueError("--epochs must be above 0")
    if missing := meters.missing_boards(args.board):
        raise ValueError(f"--board {missing[0]}: it is not installed (pip install {missing[0]})")
    read_mixing(args.mixing)
    if args.shares:
        read_shares(args.shares)
    if args.model and (args.vision or args.llm):
        raise ValueError("--model goes on from a LLaVA, --vision and --llm build a new one: name one or the other")
    if args.patience and not args.val:
        raise ValueError("--patience needs --val to watch")
    if args.stage == 0 and (args.val or args.init_from or args.shard == "fsdp"):
        raise ValueError("--val, --init-from and --shard fsdp are for stages 1 and 2")
    check_lora(args)
    named = set(filter(None, args.train.split(",")))
    if args.stage > 0 and (unknown := named - {"vision", "projector", "llm"}):
        raise ValueError(f"--train {', '.join(unknown)}: choose from vision, projector, llm")
    if args.stage > 0 and not named and not args.lora:
        raise ValueError("--train names nothing")


def check_lora(args: argparse.Namespace):
    """The same for what concerns LoRA and four bits."""
    if args.bits == 4 and not args.lora:
        raise ValueError("--bits 4 needs --lora: weights in four bits cannot train")
    if args.bits == 4 and args.shard == "fsdp":
        raise ValueError("--bits 4 and --shard fsdp do not go together: --shard zero1 does")
    if not args.lora:
        if alone := [key for key in args.flags if key.startswith("lora_")]:
            raise ValueError(f"--{alone[0].replace('_', '-')} needs --lora")
        return
    if args.lora_alpha is not None and not 0 < args.lora_alpha < math.inf:
        raise ValueError("--lora-alpha must be above 0")
    if args.stage != 2:
        raise ValueError("--lora is for stage 2")
    if args.vision or args.llm:
        raise ValueError("--lora needs a --model, for an adapter is of use with its base only")
    if {"vision", "llm"} & set(args.train.split(",")):
        raise ValueError(
            f"--lora leaves the towers as they are, and --train {args.train} does not: name one or the other"
        )
    args.lora_rank = RANKS["llm"] if args.lora_rank is None else args.lora_rank
    args.lora_dropout = DROPOUT if args.lora_dropout is None else args.lora_dropout
    if not 0 <= args.lora_dropout < 1:
        raise ValueError("--lora-dropout must be at least 0 and below 1")


def add_models_knobs(add: Callable):
    """What is trained, and where its weights come from."""
    add("--stage", type=int, choices=(0, 1, 2), help="0 towers, 1 projector, 2 projector and decoder")
    add("--plot", nargs="+", type=Path, metavar="RUN", help="draw the logs of these runs in one picture, and no more")
    add("--recipe", choices=recipes.RECIPES, default="world", help="what sets every knob that no flag sets; see below")
    add("--tower", choices=("both", "clip", "decoder"), default="both", help="stage 0: which tower")
    add("--model", type=Path, help="LLaVA to go on from; default: the newest finished run of the stage before")
    add("--vision", type=Path, help="build a new LLaVA with this CLIP; default: the newest of stage 0")
    add("--llm", type=Path, help="build a new LLaVA with this decoder; default: the newest of stage 0")


def add_data_knobs(add: Callable):
    """What it is trained on."""
    add("--data", nargs="+", metavar="PATH[:WEIGHT]", help="LLaVA's JSON, many to mix; default: the embedded world")
    add("--images", nargs="+", help="folder the paths in --data start from, or one for each; default: where it lies")
    add("--mixing", default="proportional", help="of many files: proportional (epochs), equal, or a temperature")
    add("--shares", default="", help="of many files, as 80/20; 80/20:20/80:4 goes from one to the other in 4 steps")
    add("--skip-bad", type=percent, default=0.0, metavar="N%%", help="leave bad records out, up to so many; 0: none")
    add("--world", type=Path, help="folder that `python -m world write` wrote; default: one is drawn below out/")


def add_learning_knobs(add: Callable):
    """How it learns; what is None here, the recipe sets."""
    add("--steps", type=int, help="optimizer steps")
    add("--epochs", type=float, help="the same in passes over the data, part of a batch counted as one")
    add("--batch-size", type=int, help="samples per step, over all ranks and micro-batches")
    add("--accumulate", type=int, default=1, help="micro-batches a step is cut into, to fit the memory")
    add("--lr", type=float, help="peak learning rate")
    add("--lr-projector", type=float, help="the projector's own, default --lr (LLaVA-1.5 with LoRA: a tenth)")
    add("--lr-vision", type=float, help="the vision tower's own, default --lr (LLaVA-NeXT: a tenth)")
    add("--warmup", type=float, help="share of the steps in which the rate rises")
    add("--weight-decay", type=float, help="on matrices only")
    add("--beta2", type=float, help="AdamW's; short runs want less than LLaVA's 0.999")
    add("--clip-grad", type=float, help="largest gradient norm; 0 leaves it alone")
    loss_mean = "every token weighs the same, or every micro-batch, as in transformers before 4.46"
    add("--loss-mean", choices=("token", "micro-batch"), help=loss_mean)
    add("--train", help="what trains in stages 1 and 2: a comma-separated choice of vision, projector, llm")
    add("--template", choices=TEMPLATES, help="conversation template; default: plain in stage 1, then the decoder's")
    image_mode = "how pictures are made square; default: the model's. Tiles (anyres) are part of a model's shape"
    add("--image-mode", choices=("square", "pad", "anyres"), help=image_mode)
    add("--image-size", type=int, help="side of the pictures the tower must be made for; default: any")
    add("--image-order", choices=("first", "either"), default="first", help="picture before its question, or by a coin")
    projector = "of a new LLaVA: 1.5's (default) or 1.0's; an old one must have it"
    add("--projector", choices=PROJECTORS, help=projector)
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


def add_lora_knobs(add: Callable):
    """LoRA: small updates train, the weights stay."""
    add("--lora", choices=("llm", "vision", "both"), help="train small updates of these towers, and not their weights")
    add("--lora-rank", type=int, help=f"of the decoder's updates, default {RANKS['llm']}")
    add("--lora-rank-vision", type=int, default=RANKS["vision"], help="of the tower's")
    add("--lora-alpha", type=float, help="an update counts alpha / rank; default: twice the rank")
    add("--lora-dropout", type=float, help=f"share of what goes into an update that is left out, default {DROPOUT}")
    add("--lora-layers", type=names, help="which linear layers, as q_proj,v_proj; default: all")
    add("--bits", type=int, choices=(4, 16), default=16, help="4: the frozen decoder in NF4, as QLoRA")


def add_run_knobs(add: Callable):
    """Where it goes, how it is watched, what it survives."""
    add("--out", type=Path, help="the run's folder; default: a new one below out/")
    add("--resume", action="store_true", help="go on with the run in --out from its newest checkpoint, exactly")
    add("--allow-changes", action="store_true", help="with --resume: even if other flags are not as they were")
    add("--init-from", type=Path, help="checkpoint whose weights to begin with, at step 0: OUT/latest of another run")
    add("--val", nargs="+", metavar="PATH[:WEIGHT]", help="held-out data like --data, whose loss is watched")
    add("--val-images", nargs="+", help="the same for its pictures; default: where it lies")
    add("--val-every", type=int, default=200, help="steps between looks at it")
    add("--patience", type=int, help="stop after so many looks without a better loss, and keep the best model")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints kept: the newest, and those to fall back on if it is damaged")
    add("--max-skips", type=int, default=3, help="steps in a row that may be left out because a number is not finite")
    add("--check-replicas", type=int, default=100, help="steps between checks that all ranks hold the same weights")
    add("--timeout", type=float, default=1800, help="seconds without a step after which a process counts as hung")
    add("--board", nargs="+", choices=meters.BOARDS, default=[], help="show the log there too, if it is installed")
    add("--seed", type=int, default=0, help="of the new weights and of the order of the data")


def add_machine_knobs(add: Callable):
    """What it runs on, and how the memory is shared."""
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the arithmetic, and of weights that stand still",
    )
    add("--shard", choices=sharding.MODES, default="ddp", help="what each rank holds: all, or a share; see sharding.py")
    offload = "keep the optimizer's states in the CPU's memory: less of the GPU's, more time"
    add("--offload-states", action="store_true", help=offload)
    add("--recompute", action="store_true", help="keep a layer's input only, and run it again for its gradients")
    add(
        "--weights",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of what trains; bfloat16 takes half of the memory, optimizer included, and loses small updates",
    )
    add(
        "--compile",
        action="store_true",
        help="let torch write the layers: faster after half a minute; needs a C++ compiler",
    )


def names(text: str) -> list[str]:
    return text.split(",")


def percent(text: str) -> float:
    value = as_number(text.removesuffix("%"))
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage")
    return value
