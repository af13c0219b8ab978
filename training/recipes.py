"""Recipes: what a stage is trained with, as data. What a flag of train.py does not say, the recipe does.

    python train.py --recipe llava-1.5 --stage 2 --model out/stage1 --data llava_v1_5_mix665k.json --images DIR
    python train.py --help                             lists them, with hardware, time and the number to expect

A knob that a stage does not name is None: the model's own, the decoder's context, and the rate of all for one part.
"""

import math
from argparse import Namespace
from dataclasses import dataclass

# Every knob a recipe may set; each is a flag of train.py, which goes before it.
KNOBS = ("train", "projector", "image_size", "image_mode", "template", "max_length", "epochs", "steps", "batch_size")
KNOBS += ("lr", "lr_projector", "lr_vision", "warmup", "weight_decay", "beta2", "clip_grad", "loss_mean")
KNOBS += ("lora", "lora_rank", "lora_alpha", "lora_dropout")


@dataclass(frozen=True)
class Recipe:
    """Values by stage, where they are from, and what to expect of them."""

    stages: dict[int, dict]
    source: str
    hardware: str
    time: str
    expect: str


# Right for the embedded world, found by trial. Small batches want small rates: with perfect features, 2.1 M tokens in
# batches of 16 end at loss 0.20 with 3e-4, 0.38 with 1e-3; with real ones, 2,400 steps end at 0.116 with 6e-4, 0.131
# with 3e-4. Short runs want a smaller beta2 than LLaVA's 0.999.
WORLD = {"warmup": 0.03, "weight_decay": 0.0, "beta2": 0.99, "clip_grad": 1.0, "loss_mean": "token"}

# What the authors' scripts share: AdamW without weight decay, a short rise, a cosine to zero, bfloat16. Two things no
# line of theirs says:
# * clip_grad. Their DeepSpeed files have no gradient_clipping, so nothing was clipped; LLaVA-1.0 ran on FSDP, where
#   transformers' own default of 1.0 holds. Both inferred, neither published.
# * loss_mean. Theirs was "micro-batch", as in transformers before 4.46: a token in a short micro-batch counts for more,
#   by how much depends on the number of GPUs. "token" depends on nothing; for their numbers to the last digit, say
#   `--loss-mean micro-batch` on as many GPUs.
AUTHORS = {"warmup": 0.03, "weight_decay": 0.0, "beta2": 0.999, "clip_grad": 0.0, "loss_mean": "token"}

# Stage 1 shows pictures and bare captions ("plain"). In stage 2 the template is the decoder's own: vicuna_v1 for
# Vicuna. A projector's kind is named only where one is new; a picture's size is that of the CLIP it was published with.
LLAVA_1 = AUTHORS | {"max_length": 2048, "projector": "linear", "image_size": 224, "image_mode": "square"}
LLAVA_1 |= {"clip_grad": 1.0}
LLAVA_15 = AUTHORS | {"max_length": 2048, "projector": "mlp2x_gelu", "image_size": 336}
CAPTIONS, DIALOGUES = {"train": "projector", "template": "plain"}, {"train": "projector,llm"}  # stages 1 and 2
RECIPES = {
    "world": Recipe(
        stages={
            0: WORLD | {"steps": 1000, "batch_size": 64, "lr": 5e-4, "train": ""},
            1: WORLD | CAPTIONS | {"steps": 300, "batch_size": 16, "lr": 1e-3},
            2: WORLD | DIALOGUES | {"steps": 2000, "batch_size": 16, "lr": 5e-4},
        },
        source="this project, for the embedded world and other small data",
        hardware="2 CPU cores",
        time="minutes",
        expect="with the sizes of the speedrun: 91 % of the held-out questions (README)",
    ),
    "llava-1.0": Recipe(
        stages={
            1: LLAVA_1 | CAPTIONS | {"epochs": 1, "batch_size": 128, "lr": 2e-3},
            2: LLAVA_1 | DIALOGUES | {"epochs": 3, "batch_size": 32, "lr": 2e-5},
        },
        source="Visual Instruction Tuning (2304.08485): CC3M-595K, then LLaVA-Instruct-158K; Vicuna, CLIP-L/14",
        hardware="8 A100",
        time="4 h, then 10 h",
        expect="7B: POPE 76.3 / 72.2 / 70.1 (random / popular / adversarial); LLaVA-Bench (COCO) 85.1",
    ),
    "llava-1.5": Recipe(
        stages={  # the center is cut out while the projector aligns, then all of the picture is kept
            1: LLAVA_15 | CAPTIONS | {"epochs": 1, "batch_size": 256, "lr": 1e-3, "image_mode": "square"},
            2: LLAVA_15 | DIALOGUES | {"epochs": 1, "batch_size": 128, "lr": 2e-5, "image_mode": "pad"},
        },
        source="LLaVA's scripts/v1_5/{pretrain,finetune}.sh: LCS-558K, then mix665K; Vicuna-1.5, CLIP-L/14-336",
        hardware="8 A100",
        time="7B: 3.5 h, then 10 h; 13B: 5.5 h, then 20 h",
        expect="7B: VQAv2 78.5, GQA 62.0, TextVQA 58.2, POPE 85.9, MME 1510.7, MM-Vet 31.1",
    ),
    "llava-1.5-lora": Recipe(
        stages={
            2: LLAVA_15
            | {"train": "projector", "epochs": 1, "batch_size": 128, "image_mode": "pad"}
            | {"lora": "llm", "lora_rank": 128, "lora_alpha": 256, "lora_dropout": 0.05}
            | {"lr": 2e-4, "lr_projector": 2e-5},
        },
        source="LLaVA's scripts/v1_5/finetune_lora.sh, after stage 1 of llava-1.5",
        hardware="8 GPUs",
        time="not published",
        expect="7B: VQAv2 79.1, GQA 63.0, TextVQA 58.2, POPE 86.4, MME 1476.9, MM-Vet 30.2",
    ),
    "llava-next": Recipe(
        # Tiles are part of a model's shape, and only a later script's stage 1 is public: so this goes on from a model
        # that has them, as the 1.6 checkpoints do. The batch is from memory; the script's rate is 1e-5, for Qwen2.
        stages={
            2: AUTHORS
            | {"train": "vision,projector,llm", "epochs": 1, "batch_size": 128, "lr": 2e-5, "lr_vision": 2e-6}
            | {"projector": "mlp2x_gelu", "image_size": 336, "image_mode": "anyres", "max_length": 4096},
        },
        source="LLaVA-NeXT's scripts and the released 1.6 configurations: 760K records, not published; CLIP-L/14-336",
        hardware="32 A100",
        time="34B: about a day",
        expect="1.6-Vicuna-7B: VQAv2 81.8, GQA 64.2, TextVQA 64.9, POPE 86.5, MME 1519, MM-Vet 43.9",
    ),
}


def listing() -> str:
    """Every recipe, for --help."""
    lines = ["recipes (hardware, time and numbers are the authors'; but for the world's, none was run here):"]
    for name, recipe in RECIPES.items():
        lines += [f"  {name}, stage {', '.join(map(str, recipe.stages))}: {recipe.source}"]
        lines += [f"      {recipe.hardware}, {recipe.time}; {recipe.expect}"]
    return "\n".join(lines)


def fill(args: Namespace):
    """Settle every knob that no flag set; args.differs then holds where the flags left the recipe.

    Raises ValueError if the recipe has no such stage.
    """
    recipe = RECIPES[args.recipe]
    if args.stage not in recipe.stages:
        raise ValueError(f"--recipe {args.recipe} has no stage {args.stage}, only {', '.join(map(str, recipe.stages))}")
    length = {key: getattr(args, key) for key in ("steps", "epochs")}
    if None not in length.values():
        raise ValueError("--steps and --epochs say the same thing in two ways: give one")
    values = dict.fromkeys(KNOBS) | recipe.stages[args.stage]
    for key in KNOBS:
        if getattr(args, key) is None and not (key in length and any(length.values())):
            setattr(args, key, values[key])
    pairs = {key: {"recipe": values[key], "here": getattr(args, key)} for key in KNOBS}
    args.differs = {key: pair for key, pair in pairs.items() if pair["recipe"] != pair["here"]}


def steps_of(epochs: float, records: int, batch_size: int) -> int:
    """Steps in which every record comes up `epochs` times; LLaVA-1.5's stage 2 has 5,198, the last one part full."""
    return math.ceil(epochs * records / batch_size - 1e-9)  # 0.1 epochs of 30 are three records, and no rounding more


def describe(args: Namespace) -> str:
    """The configuration as a table: each knob's value, and whether recipe or flag set it; what differs has a star."""
    lines = [f"  {f'recipe {args.recipe}, stage {args.stage}':<28}{'value':<24}from"]
    for key in [*KNOBS, *(flag for flag in args.flags if flag not in (*KNOBS, "recipe", "stage"))]:
        value, other = getattr(args, key), args.differs.get(key)
        if value not in (None, "") or other:
            origin = "epochs" if key == "steps" and args.epochs else "flag" if key in args.flags else "recipe"
            origin += f"; recipe: {other['recipe']}" if other else ""
            shown = " ".join(value) if isinstance(value, list) else value
            lines.append(f"{'*' if other else ' '} {key:<28}{shown!s:<23} {origin}")
    return "\n".join(lines)


def check_model(args: Namespace, config):
    """Raise ValueError if a LlavaConfig is of another shape than recipe or flag say; what cannot be set is checked."""
    tiled = bool(config.image_grid_pinpoints)
    shape = {"projector": config.projector_type, "image_size": config.vision_config.image_size}
    if tiled or args.image_mode == "anyres":
        shape["image_mode"] = "anyres" if tiled else config.image_mode
    for key, own in shape.items():
        if (wanted := getattr(args, key)) not in (None, own):
            flag = f"--{key.replace('_', '-')}"
            origin = "" if key in args.flags else f" (recipe {args.recipe})"
            raise ValueError(f"{flag} {wanted}{origin}, but this model's is {own}: if that is meant, say {flag} {own}")
    context = config.text_config.max_position_embeddings
    if args.max_length and args.max_length > context:
        raise ValueError(f"--max-length {args.max_length} is more than the decoder's context, {context}")
