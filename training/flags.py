"""The flags of train.py, one line each. Recipes (recipes.py) set the values that no flag sets."""

import argparse
import math
from pathlib import Path

from inputs import cli
from inputs.augment import KINDS as AUGMENTS
from inputs.augment import Augment
from inputs.mixture import read_mixing, read_shares
from inputs.templates import TEMPLATES
from llava import PROJECTORS
from lora import DROPOUT, RANKS
from training import meters, recipes, sharding
from training.objectives import read_distill, read_task_weights
from training.towers import SIZES
from variants.connectors import CONNECTORS
from variants.estimators import ESTIMATORS
from variants.tuning import LENGTH, METHODS, VIRTUAL, WITH_WIDTH

COMPONENTS = ("vision", "projector", "llm", "relevance")  # what --train may name
USELESS = dict.fromkeys((1, 2), ("tower", "size", "patch_size"))  # flags that do nothing in a stage
USELESS[0] = ("train", "model", "vision", "llm", "projector", "whiten", "image_order", "lr_projector", "lr_vision")
USELESS[0] += ("augment", "visual_tokens", "nested_pool", "task_weights", "ewc", "distill", "recompute", "cache_gb")

PARSER = argparse.ArgumentParser("train.py", epilog=recipes.listing())
PARSER.formatter_class = argparse.RawDescriptionHelpFormatter
PARSER.allow_abbrev = False  # a later flag may make an abbreviation ambiguous


def new_group(title: str):
    """Return a function that adds a flag to a new group of --help; the help of each flag ends with its default."""
    group = PARSER.add_argument_group(title)

    def add(flag: str, help: str, unset: str = "", **more):
        """Args: unset: describes the value if neither the command line nor `more` sets one."""
        default = more.get("default", "off" if "action" in more else None)
        if default in (None, "", []):
            default = unset or ("the recipe's" if flag[2:].replace("-", "_") in recipes.KNOBS else "none")
        group.add_argument(flag, help=f"{help} (default: {default})".replace("%", "%%"), **more)

    return add


def percent(text: str) -> float:
    value = cli.as_number(text.removesuffix("%"))
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage")
    return value


add = new_group("what to train")
add("--stage", "0: the towers; 1: the projector; 2: projector and decoder", type=int, choices=(0, 1, 2), required=True)
add("--recipe", "sets the hyperparameters that no flag sets, see below", choices=recipes.RECIPES, default="world")
add("--train", "stages 1 and 2: components that train, a comma-separated choice of vision, projector, llm, relevance")
add("--tower", "stage 0: which tower", choices=("both", "clip", "decoder"), default="both")
add("--model", "LLaVA to continue from", "the newest finished run of the stage before", type=Path)
add("--vision", "CLIP for a new LLaVA", "the newest of stage 0", type=Path)
add("--llm", "decoder for a new LLaVA", "the newest of stage 0", type=Path)
add("--init-from", "checkpoint whose weights a new run starts with, as in OUT/latest of another run", type=Path)

add = new_group("data")
add("--data", "LLaVA's JSON; several files are mixed", "the embedded world", nargs="+", metavar="PATH[:WEIGHT]")
text = "folder that image paths start from, or one for each file of --data and then --val"
add("--images", text, "each file's own folder", nargs="+", metavar="DIR")
add("--follow-links", "read images also where links lead out of their folder", action="store_true")
add("--mixing", "share of each file: proportional to its records, equal, or a temperature", default="proportional")
text = "shares of the files, as 80/20; 80/20:20/80:4 goes from the first to the second in 4 steps"
add("--shares", text, "as --mixing says", default="")
add("--skip-bad", "leave out bad records, up to this share of all", type=percent, default=0.0, metavar="PERCENT")
add("--world", "folder of the embedded world", "out/world, drawn if it is missing", type=Path)
add("--questions", "most questions in a sample; longer dialogues are cut into several", "no limit", type=int)
add("--max-length", "tokens of a sample, image tokens included", "the decoder's context", type=int)
add("--image-order", "image before its question, or at random", choices=("first", "either"), default="first")
text = f"change images and texts so that answers stay true: {','.join(AUGMENTS)}, or some of them"
add("--augment", text, default="", metavar="KINDS")
add("--workers", "processes that load data; 0: the training process loads it", type=int, default=0)
add("--cache-gb", "memory for a frozen tower's features; 0: compute them in every step", type=float, default=4.0)

add = new_group("optimization")
add("--steps", "optimizer steps", type=int)
add("--epochs", "length of the run in passes over the data, instead of --steps", type=cli.above_zero)
add("--batch-size", "samples per step, over all ranks and micro-batches", type=int)
add("--accumulate", "micro-batches per step; more need less memory", type=int, default=1)
add("--lr", "peak learning rate", type=float)
add("--lr-projector", "peak learning rate of the projector (LLaVA-1.5 with LoRA: a tenth)", "--lr", type=float)
add("--lr-vision", "peak learning rate of the vision tower (LLaVA-NeXT: a tenth)", "--lr", type=float)
add("--warmup", "share of the steps in which the learning rate rises", type=float)
add("--weight-decay", "AdamW's, on matrices only", type=float)
add("--beta2", "AdamW's; short runs need less than LLaVA's 0.999", type=float)
add("--clip-grad", "largest gradient norm; 0: no clipping", type=float)
text = "mean over the tokens of a step, or over its micro-batches as in transformers before 4.46"
add("--loss-mean", text, choices=("token", "micro-batch"))
add("--seed", "seed of new weights, dropout and the order of the data", type=cli.seed, default=0)

add = new_group("several tasks, and not forgetting")
text = (
    "weights of tasks, as vqa=2,captions=0.5, or uncertainty: learned; a task is a record's task, else its file's name"
)
add("--task-weights", text, "all tokens alike", default="")
text = "strength of elastic weight consolidation towards the model before; try 1000: docs/forgetting.md"
add("--ewc", text, type=float)
text = "share of the loss that keeps the answers of the model before, as 0.5 or, with a temperature, 0.5:2"
add("--distill", text, default="", metavar="ALPHA[:T]")

add = new_group("parts of a new model")
text = "LLaVA-1.5's MLP, LLaVA-1.0's single layer, or a connector with --visual-tokens"
add("--projector", text, choices=[*PROJECTORS, *CONNECTORS])
add("--visual-tokens", "tokens of an image behind a new connector", type=int)
text = "average an image's tokens to a grid that every step draws: numbers of tokens; none: all, then halves a side"
add("--nested-pool", text, "off", type=int, nargs="*", metavar="N")
add("--whiten", "start the projector from whitened features; towers of stage 0 need it", action="store_true")
text = "stage 2: let the question choose the patches; by which gradient the choice is learned: docs/relevance.md"
add("--relevance", text, choices=ESTIMATORS)
add("--token-price", "with --relevance: loss, in nats of an answer, that a kept patch costs", type=float, default=0.02)
add("--template", "conversation template", "plain in stage 1, then the decoder's", choices=TEMPLATES)
text = "how images become square; only a model with tiles can have anyres"
add("--image-mode", text, "the recipe's or the model's", choices=("square", "pad", "anyres"))
add("--size", "stage 0: size of the towers", choices=SIZES, default="small")
add("--patch-size", "stage 0: side of a patch, for images of 72 pixels", type=int, default=24)

add = new_group("LoRA and QLoRA")
add("--lora", "train low-rank updates of these towers, not their weights", choices=("llm", "vision", "both"))
text = f"the recipe's, else {RANKS['llm']} (llm) and {RANKS['vision']} (vision)"
add("--lora-rank", "rank of the updates", text, type=int)
add("--lora-alpha", "an update is scaled by alpha / rank", "the recipe's, else twice the rank", type=cli.above_zero)
add("--lora-dropout", "dropout on the input of an update", f"the recipe's, else {DROPOUT}", type=float)
add("--lora-layers", "layers to adapt, as q_proj,v_proj", "all linear layers", type=lambda text: text.split(","))
add("--lora-images-only", "the decoder's updates leave text without an image as it is", action="store_true")
add("--lora-plus", "learning rate of B, as a multiple of A's", "1", type=cli.above_zero)
add("--dora", "also train the magnitude of each row of the matrices", action="store_true")
add("--bits", "4: the frozen decoder in NF4, as in QLoRA", type=int, choices=(4, 16), default=16)

add = new_group("other small parts that train instead of the decoder: docs/tuning.md")
add("--tune", "the method", choices=METHODS)
add("--prefix-length", "number of virtual tokens of a prompt or prefix", str(LENGTH), type=int)
text = "width of a bottleneck, or of the MLP that makes virtual tokens"
add("--tune-width", text, "a 16th of the decoder's (bottleneck), its keys' (prefix-mlp), the decoder's", type=int)

add = new_group("the run: its folder, validation, checkpoints")
add("--out", "the run's folder", "a new folder below out/", type=Path)
add("--resume", "continue the run in --out from its newest checkpoint, bit for bit", action="store_true")
add("--allow-changes", "with --resume: accept flags that differ from the run's", action="store_true")
add("--val", "validation data, as --data, whose loss is logged", nargs="+", metavar="PATH")
add("--val-every", "steps between validations", type=int, default=200)
add("--patience", "stop after so many validations without a better loss and keep the best model", type=int)
add("--save-every", "steps between checkpoints", type=int, default=200)
add("--keep", "checkpoints to keep; an older one is used if the newest is damaged", type=int, default=2)
add("--diagnose", "steps between checks of the live model, which print what is wrong", "off", type=int)
add("--board", "also log to these", nargs="+", choices=meters.BOARDS, default=[])
add("--timeout", "seconds after which a step counts as hung and the process ends", type=cli.above_zero, default=1800)

add = new_group("the machine: device, memory, speed")
add("--device", "cpu, cuda or cuda:N", "cuda if there is one")
text = "compute dtype, and dtype of frozen weights; auto: bfloat16 on a GPU"
add("--dtype", text, choices=("auto", "float32", "bfloat16"), default="auto")
text = "dtype of trained weights and AdamW's states; bfloat16 halves them and loses small updates"
add("--weights", text, choices=("float32", "bfloat16"), default="float32")
add("--shard", "what ranks divide: nothing, AdamW's states, or all", choices=sharding.MODES, default="ddp")
add("--recompute", "recompute activations in the backward pass: less memory, more time", action="store_true")
add("--compile", "torch.compile the layers: half a minute, and a C++ compiler on a CPU", action="store_true")
add("--no-fast", "plain PyTorch layers, without fast/", action="store_true")


def read_flags(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's values, completed by the recipe. A wrong flag ends the process with one line, status 2.

    `args.flags` lists the flags given, `args.differs` those that differ from the recipe, `args.train` the COMPONENTS.
    """
    PARSER.description = description
    args = PARSER.parse_args(argv)
    args.flags = [key for key, value in vars(args).items() if value != PARSER.get_default(key)]
    if args.train is None and (args.lora or args.tune or args.relevance):
        args.train = "relevance" if args.relevance else "projector"  # the towers' own weights stay as they are
    try:
        recipes.apply_recipe(args)
        args.train = tuple(name for name in args.train.split(",") if name)
        check(args)
        check_objectives(args)
        check_lora(args)
        check_tune(args)
        check_relevance(args)
    except ValueError as error:
        PARSER.error(str(error))
    return args


def refuse(wrong, reason: str):
    if wrong:
        raise ValueError(reason)


def check(args: argparse.Namespace):
    """Raise ValueError on the first value, or pair of values, that makes no sense."""
    counts = ("steps", "batch_size", "accumulate", "save_every", "keep", "questions", "val_every", "patience")
    counts += ("visual_tokens", "diagnose", "prefix_length", "tune_width", "max_length", "patch_size")
    for key in counts:
        value = getattr(args, key)
        refuse(value is not None and value < 1, f"--{key.replace('_', '-')} must be at least 1")
    refuse(not 0 <= args.warmup <= 1, "--warmup is a share of the steps, from 0 to 1")
    refuse(args.workers < 0, "--workers must be at least 0")
    for key in ("lr", "lr_projector", "lr_vision", "weight_decay", "clip_grad", "cache_gb"):
        value = getattr(args, key)
        wrong = value is not None and not 0 <= value < math.inf
        refuse(wrong, f"--{key.replace('_', '-')} must be a number, at least 0")
    pairs = args.stage == 0 and args.tower != "decoder" and args.batch_size // args.accumulate
    alone = "CLIP compares the pairs of a micro-batch: --batch-size must be at least twice --accumulate"
    refuse(pairs == 1, alone)
    read_mixing(args.mixing)
    if args.shares:
        read_shares(args.shares)
    if args.augment:
        Augment(args.augment, args.seed)
    missing, unknown = " ".join(meters.missing_boards(args.board)), set(args.train) - set(COMPONENTS)
    refuse(missing, f"--board {missing}: not installed (pip install {missing})")
    refuse(args.images and not (args.data or args.val), "--images needs --data or --val")
    refuse(args.patience and not args.val, "--patience needs --val")
    late = args.val or args.init_from or args.shard == "fsdp"
    refuse(args.stage == 0 and late, "--val, --init-from and --shard fsdp are for stages 1 and 2")
    refuse(args.diagnose and args.shard == "fsdp", "--diagnose reads whole gradients, which --shard fsdp divides")
    teacher = "--nested-pool and --distill do not go together: the teacher reads all tokens of an image"
    refuse(args.nested_pool is not None and args.distill, teacher)
    for key in args.flags:
        refuse(key in USELESS[args.stage], f"--{key.replace('_', '-')} does nothing in stage {args.stage}")
    old = args.model or (args.stage == 2 and not (args.vision or args.llm))
    refuse(args.whiten and old, "--whiten starts a new projector: give --vision and --llm, or stage 1")
    either = "--model continues from a LLaVA, --vision and --llm build a new one: give one or the other"
    refuse(args.model and (args.vision or args.llm), either)
    refuse(unknown, f"--train {', '.join(sorted(unknown))}: choose from {', '.join(COMPONENTS)}")
    refuse(args.stage > 0 and not (args.train or args.lora or args.tune), "--train names nothing")
    frozen = "lr_vision" in args.flags and "vision" not in args.train and args.lora not in ("vision", "both")
    refuse(frozen, "--lr-vision: the vision tower does not train, see --train")


def check_objectives(args: argparse.Namespace):
    """Raise ValueError on weights of tasks and remedies against forgetting that make no sense."""
    if args.task_weights:
        read_task_weights(args.task_weights)
        refuse(args.loss_mean != "token", "--task-weights are per token: leave --loss-mean micro-batch out")
    if args.distill:
        read_distill(args.distill)
        refuse(args.tune in VIRTUAL, f"--tune {args.tune} changes all answers before it trains: no --distill")
    refuse(args.ewc is not None and not 0 < args.ewc < math.inf, "--ewc must be a number above 0")
    held = "--ewc holds weights, which --lora and --tune leave as they are: give one or the other"
    refuse(args.ewc and (args.lora or args.tune), held)
    refuse(args.ewc and args.init_from, "--ewc starts from --model, which has the Fisher information, not --init-from")
    whole = args.ewc or args.distill or args.task_weights
    refuse(whole and args.shard == "fsdp", "--task-weights, --ewc and --distill need whole weights, not --shard fsdp")


def check_lora(args: argparse.Namespace):
    """Raise ValueError on LoRA flags that make no sense; set the ranks and the dropout that nothing has set."""
    small = args.lora or args.tune
    refuse(args.bits == 4 and not small, "--bits 4 needs --lora or --tune: weights in four bits cannot train")
    refuse(args.bits == 4 and args.shard == "fsdp", "--bits 4 and --shard fsdp do not go together: --shard zero1 does")
    if not args.lora:
        for key in args.flags:
            refuse(key.startswith(("lora_", "dora")), f"--{key.replace('_', '-')} needs --lora")
        return
    refuse(args.stage != 2, "--lora is for stage 2")
    refuse(args.lora_images_only and args.lora == "vision", "--lora-images-only is for the decoder: --lora llm or both")
    refuse(args.dora and args.lora_images_only, "--dora changes every row: no --lora-images-only")
    refuse(args.vision or args.llm, "--lora needs --model: an adapter is only of use with its base model")
    either = f"--lora freezes the towers, --train {','.join(args.train)} trains one: give one or the other"
    refuse({"vision", "llm"} & set(args.train), either)
    # run.json has one key for each tower's rank. Without --lora-rank, each tower has its own default.
    rank = args.lora_rank
    args.lora_rank, args.lora_rank_vision = (RANKS[tower] if rank is None else rank for tower in ("llm", "vision"))
    args.lora_dropout = DROPOUT if args.lora_dropout is None else args.lora_dropout
    refuse(not 0 <= args.lora_dropout < 1, "--lora-dropout must be at least 0 and below 1")


def check_tune(args: argparse.Namespace):
    """Raise ValueError on flags of --tune that make no sense."""
    refuse(args.prefix_length and args.tune not in VIRTUAL, f"--prefix-length needs --tune {', '.join(VIRTUAL)}")
    refuse(args.tune_width and args.tune not in WITH_WIDTH, f"--tune-width needs --tune {', '.join(WITH_WIDTH)}")
    if not args.tune:
        return
    refuse(args.lora, "--tune and --lora: both train instead of the decoder, give one or the other")
    refuse(args.stage != 2, "--tune is for stage 2")
    refuse(args.vision or args.llm, "--tune needs --model: what it trains is only of use with its base model")
    either = f"--tune freezes the towers, --train {','.join(args.train)} trains one: give one or the other"
    refuse({"vision", "llm"} & set(args.train), either)


def check_relevance(args: argparse.Namespace):
    """Raise ValueError on flags of the choice of patches that make no sense; a sample gets one question."""
    if not args.relevance:
        for key in args.flags:
            refuse(key == "token_price", "--token-price needs --relevance")
        refuse("relevance" in args.train, "--train relevance needs --relevance, which says how the choice is learned")
        return
    refuse(args.stage != 2, "--relevance is for stage 2: captions have no question")
    for key in ("nested_pool", "task_weights", "ewc", "distill", "lora_images_only", "tune", "compile"):
        given = getattr(args, key) not in (None, "", False)
        refuse(given, f"--relevance and --{key.replace('_', '-')} do not go together")
    refuse("relevance" not in args.train, "--relevance trains the choice: add relevance to --train")
    refuse(not 0 <= args.token_price < math.inf, "--token-price must be a number of nats, at least 0")
    refuse(args.questions not in (None, 1), "--relevance chooses patches for one question: --questions 1")
    args.questions = 1
