"""Recipes: the hyperparameters of each stage, as data. A flag of train.py overrides the recipe's value.

    python train.py --recipe llava-1.5 --stage 2 --model out/stage1 --data llava_v1_5_mix665k.json --images DIR
    python train.py --help                             lists all recipes, with hardware, time and published results

A value that a stage does not set is None. train.py then uses the model's own value (template, image mode), the
decoder's context (max_length) or --lr (the learning rate of one component).
"""

import math
from argparse import Namespace
from dataclasses import dataclass

# The hyperparameters that a recipe may set; each is a flag of train.py too.
KNOBS = ("train", "projector", "image_mode", "template", "max_length", "epochs", "steps", "batch_size")
KNOBS += ("lr", "lr_projector", "lr_vision", "warmup", "weight_decay", "beta2", "clip_grad", "loss_mean")
KNOBS += ("lora", "lora_rank", "lora_alpha", "lora_dropout")


@dataclass(frozen=True)
class Recipe:
    """Knobs by stage, their source, and what is published: hardware and time, result, image size of the tower."""

    stages: dict[int, dict]
    source: str
    cost: str
    expect: str
    image_size: int | None = None


# Found by trial on the embedded world. Small batches need small learning rates: with perfect features, 2.1 M tokens in
# batches of 16 end at loss 0.20 with 3e-4 and 0.38 with 1e-3; with real features, 2,400 steps end at 0.116 with 6e-4
# and 0.131 with 3e-4. Short runs need a smaller beta2 than LLaVA's 0.999.
WORLD = {"warmup": 0.03, "weight_decay": 0.0, "beta2": 0.99, "clip_grad": 1.0, "loss_mean": "token"}

# The authors' scripts share AdamW without weight decay, a short warm-up, a cosine to zero and bfloat16. Two values are
# not written in any script:
# * clip_grad. Their DeepSpeed files have no gradient_clipping, so nothing was clipped; LLaVA-1.0 ran on FSDP, where
#   transformers' default of 1.0 holds. Both are inferred, neither is published.
# * loss_mean. Theirs was "micro-batch", as in transformers before 4.46, which depends on the number of GPUs. "token"
#   depends on nothing. To reproduce their loss exactly, give `--loss-mean micro-batch` on as many GPUs.
AUTHORS = {"warmup": 0.03, "weight_decay": 0.0, "beta2": 0.999, "clip_grad": 0.0, "loss_mean": "token"}

# Stage 1 trains on images with bare captions ("plain"). Stage 2 uses the decoder's own template: vicuna_v1 for Vicuna.
LLAVA_1 = AUTHORS | {"max_length": 2048, "projector": "linear", "image_mode": "square", "clip_grad": 1.0}
LLAVA_15 = AUTHORS | {"max_length": 2048, "projector": "mlp2x_gelu"}
CAPTIONS, DIALOGUES = {"train": "projector", "template": "plain"}, {"train": "projector,llm"}  # stages 1 and 2
RECIPES = {
    "world": Recipe(
        stages={
            0: WORLD | {"steps": 1000, "batch_size": 64, "lr": 5e-4, "train": ""},
            1: WORLD | CAPTIONS | {"steps": 300, "batch_size": 16, "lr": 1e-3},
            2: WORLD | DIALOGUES | {"steps": 2000, "batch_size": 16, "lr": 5e-4},
        },
        source="this project, for the embedded world and other small data",
        cost="2 CPU cores, minutes",
        expect="with the steps of speedrun.sh: 87 % of the held-out questions (docs/training.md)",
    ),
    "llava-1.0": Recipe(
        stages={
            1: LLAVA_1 | CAPTIONS | {"epochs": 1, "batch_size": 128, "lr": 2e-3},
            2: LLAVA_1 | DIALOGUES | {"epochs": 3, "batch_size": 32, "lr": 2e-5},
        },
        source="Visual Instruction Tuning (2304.08485): CC3M-595K, then LLaVA-Instruct-158K; Vicuna, CLIP-L/14",
        cost="8 A100, 4 h, then 10 h",
        expect="7B: POPE 76.3 / 72.2 / 70.1 (random / popular / adversarial); LLaVA-Bench (COCO) 85.1",
        image_size=224,
    ),
    "llava-1.5": Recipe(
        stages={  # stage 1 crops the center of the image, stage 2 keeps all of it
            1: LLAVA_15 | CAPTIONS | {"epochs": 1, "batch_size": 256, "lr": 1e-3, "image_mode": "square"},
            2: LLAVA_15 | DIALOGUES | {"epochs": 1, "batch_size": 128, "lr": 2e-5, "image_mode": "pad"},
        },
        source="LLaVA's scripts/v1_5/{pretrain,finetune}.sh: LCS-558K, then mix665K; Vicuna-1.5, CLIP-L/14-336",
        cost="8 A100; 7B: 3.5 h, then 10 h; 13B: 5.5 h, then 20 h",
        expect="7B: VQAv2 78.5, GQA 62.0, TextVQA 58.2, POPE 85.9, MME 1510.7, MM-Vet 31.1",
        image_size=336,
    ),
    "llava-1.5-lora": Recipe(
        stages={
            2: LLAVA_15
            | {"train": "projector", "epochs": 1, "batch_size": 128, "image_mode": "pad"}
            | {"lora": "llm", "lora_rank": 128, "lora_alpha": 256, "lora_dropout": 0.05}
            | {"lr": 2e-4, "lr_projector": 2e-5},
        },
        source="LLaVA's scripts/v1_5/finetune_lora.sh, after stage 1 of llava-1.5",
        cost="8 GPUs, time not published",
        expect="7B: VQAv2 79.1, GQA 63.0, TextVQA 58.2, POPE 86.4, MME 1476.9, MM-Vet 30.2",
        image_size=336,
    ),
    "llava-next": Recipe(
        # The stage 1 of 1.6 is not public, and tiles are part of a model's shape: this continues from a model that has
        # them, such as a 1.6 checkpoint. The batch size is from memory; the script's learning rate is 1e-5, for Qwen2.
        stages={
            2: AUTHORS
            | {"train": "vision,projector,llm", "epochs": 1, "batch_size": 128, "lr": 2e-5, "lr_vision": 2e-6}
            | {"projector": "mlp2x_gelu", "image_mode": "anyres", "max_length": 4096},
        },
        source="LLaVA-NeXT's scripts and the released 1.6 configurations: 760K records, not published; CLIP-L/14-336",
        cost="32 A100; 34B: about a day",
        expect="1.6-Vicuna-7B: VQAv2 81.8, GQA 64.2, TextVQA 64.9, POPE 86.5, MME 1519, MM-Vet 43.9",
        image_size=336,
    ),
}


def listing() -> str:
    """Return all recipes as text for --help."""
    lines = ["recipes (hardware, time and results are the authors'; only the world's was run here):"]
    for name, recipe in RECIPES.items():
        lines.append(f"  {name}, stage {', '.join(map(str, recipe.stages))}: {recipe.source}")
        lines.append(f"      {recipe.cost}; {recipe.expect}")
    return "\n".join(lines)


def apply_recipe(args: Namespace):
    """Set the hyperparameters that no flag has set; args.differs gets those that differ from the recipe's.
    Raises ValueError if the recipe has no such stage."""
    recipe = RECIPES[args.recipe]
    if args.stage not in recipe.stages:
        raise ValueError(f"--recipe {args.recipe} has no stage {args.stage}, only {', '.join(map(str, recipe.stages))}")
    if args.steps is not None and args.epochs is not None:
        raise ValueError("--steps and --epochs both set the length of the run: give one")
    values = dict.fromkeys(KNOBS) | recipe.stages[args.stage]
    length_given = args.steps is not None or args.epochs is not None
    for key in KNOBS:
        if getattr(args, key) is None and not (length_given and key in ("steps", "epochs")):
            setattr(args, key, values[key])
    pairs = {key: {"recipe": values[key], "here": getattr(args, key)} for key in KNOBS}
    args.differs = {key: pair for key, pair in pairs.items() if pair["recipe"] != pair["here"]}


def count_steps(epochs: float, records: int, batch_size: int) -> int:
    """Return the steps in which every record is used `epochs` times; the last batch runs into the next epoch."""
    return math.ceil(epochs * records / batch_size - 1e-9)  # 0.1 * 30 is 3.0000000000000004 in floating point


def configuration_table(args: Namespace) -> str:
    """Return a table of the hyperparameters and what set them; a star marks a difference from the recipe."""
    lines = [f"  {f'recipe {args.recipe}, stage {args.stage}':<28}{'value':<24}from"]
    values = vars(args) | {key: pair["here"] for key, pair in args.differs.items()}
    for key in dict.fromkeys([*KNOBS, "image_size", *args.flags]):
        value, differs = values.get(key), args.differs.get(key)
        if key in ("recipe", "stage") or (value in (None, "", ()) and not differs):
            continue
        origin = "epochs" if key == "steps" and args.epochs else "flag" if key in args.flags else "recipe"
        origin = "model" if key == "image_size" else origin
        origin += f"; recipe: {differs['recipe']}" if differs else ""
        text = (
            ",".join(value)
            if isinstance(value, tuple)
            else " ".join(map(str, value))
            if isinstance(value, list)
            else value
        )
        lines.append(f"{'*' if differs else ' '} {key:<28}{text!s:<23} {origin}")
    return "\n".join(lines)


def check_model(args: Namespace, config):
    """Raise ValueError if a LlavaConfig contradicts recipe or flags in a shape that training cannot change. The image
    size may differ from the recipe's, as with another vision tower: args.differs notes it."""
    for key, own in (("projector", config.projector_type), ("image_mode", config.image_mode)):
        wanted = getattr(args, key)
        fixed = key == "projector" or "anyres" in (wanted, own)  # a model has tiles or not; other modes can change
        if fixed and wanted not in (None, own):
            flag, origin = f"--{key.replace('_', '-')}", "" if key in args.flags else f" (recipe {args.recipe})"
            raise ValueError(f"{flag} {wanted}{origin}, but the model has {own}: {flag} {own} trains it as it is")
    if args.visual_tokens and args.visual_tokens != config.visual_tokens:
        raise ValueError(f"--visual-tokens {args.visual_tokens}, but the model's is {config.visual_tokens}")
    context = config.text_config.max_position_embeddings
    if args.max_length and args.max_length > context:
        raise ValueError(f"--max-length {args.max_length} is more than the decoder's context, {context}")
    published, size = RECIPES[args.recipe].image_size, config.vision_config.image_size
    if published not in (None, size):
        args.differs["image_size"] = {"recipe": published, "here": size}
