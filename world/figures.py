"""Draw the README's figures: architecture, freeze plan, tokens with their loss mask, loss curves, held-out answers.

    python -m world.figures --run out/speedrun --out assets        (needs matplotlib: pip install matplotlib)

Each figure is a light card on a transparent background, for white and for dark pages. Without a finished run, the
first three show a new model of the speedrun's shape, and the last two are left out.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np

from clip import CLIPVisionConfig
from data import render_dialogue
from formats.configs import read_config
from inputs import cli
from inputs.files import OUTPUT_ROOT
from inputs.records import turns_of
from inputs.tokenizer import Tokenizer
from llava import IGNORE, LlavaConfig, TextConfig
from training import plots
from world.drawing import draw_scene
from world.language import TURNS
from world.report import BORDER, DARK, GRAY, PAGE, STAGES, WHITE, draw_sheet, read_rows
from world.scenes import make_scene
from world.speedrun import new_model
from world.writer import make_records

VISION, PROJECTOR, DECODER, TEXT, LABEL = "#1f6feb", "#bf6a02", "#8250df", "#4b6584", "#1a7f37"
TINT = 0.14  # opacity of a box's fill
COMPONENTS = {"Vision tower": VISION, "Projector": PROJECTOR, "Decoder": DECODER}
LLAVA_7B = LlavaConfig(TextConfig(), CLIPVisionConfig(1024, 4096, 24, 16, 336, 14))


class Card:
    """A figure of `width` x `height` units (1/100 inch, y downwards) on a card with rounded corners."""

    def __init__(self, width: float, height: float, title: str):
        self.figure = plots.new_figure(width / 100, height / 100)
        self.figure.set_layout_engine("none")  # the coordinates below are exact
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.box(1, 1, width - 2, height - 2, BORDER, radius=14, facecolor=PAGE)
        self.text(28, 30, title, size=14, weight="bold", ha="left")

    def box(self, x, y, width, height, color, text="", opacity=TINT, size=8.5, radius=5, font="sans-serif", **style):
        """Draw a rounded box in one color: its edge, its fill with this opacity, and its text (white if opaque)."""
        from matplotlib.patches import FancyBboxPatch

        style = {"facecolor": (color, opacity), "edgecolor": color, "linewidth": 1.2} | style
        shape = f"round,pad=0,rounding_size={radius}"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, shape, **style))
        self.text(x + width / 2, y + height / 2, text, WHITE if opacity == 1 else color, size, family=font)

    def component(self, x, y, width, height, color, title, title_y, size=12.0):
        """Draw the box of a part of the model, with a bold title `title_y` below its top."""
        self.box(x, y, width, height, color, radius=7)
        self.text(x + width / 2, y + title_y, title, color, size, weight="bold")

    def text(self, x, y, text, color=DARK, size=9.5, **style):
        self.axes.text(x, y, text, color=color, fontsize=size, **{"ha": "center", "va": "center"} | style)

    def shapes(self, x, y, text: str, config: LlavaConfig):
        """Write a text with {v.KEY} of a model's CLIP and {t.KEY} of its decoder; below, the same of LLaVA-1.5-7B."""
        for line, (model, color) in enumerate(((config, DARK), (LLAVA_7B, GRAY))):
            self.text(x, y + 17 * line, text.format(v=model.vision_config, t=model.text_config), color)

    def arrow(self, *points: tuple[float, float], color=GRAY):
        """Draw a line through points with a head at the last one."""
        self.axes.plot(*zip(*points[:-1]), color=color, linewidth=1.4)
        style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.4, "mutation_scale": 11}
        self.axes.annotate("", points[-1], points[-2], arrowprops=style | {"shrinkA": 0, "shrinkB": 0})

    def image(self, pixels: np.ndarray, x, y, side):
        self.axes.imshow(pixels, extent=(x, x + side, y + side, y), aspect="auto", interpolation="lanczos", zorder=2)

    def save(self, path: Path):
        self.figure.savefig(path, dpi=200, transparent=True)
        print(path)


# ---------------------------------------------------------------------------------------------------------------------
# architecture

SCENE, IMAGE_TOKEN = 1033, ""
PROMPT = ["USER:", *[IMAGE_TOKEN] * 9, "What", "color", "is", "the", "star?", "ASSISTANT:"]
ANSWER = ["The", "star", "is", "blue.", "</s>"]  # true of training scene SCENE of seed 0
LANE = (  # the steps of the image, from left to right: x, width and the text below each
    (28, 110, "3 × {v.image_size} × {v.image_size}"),
    (196, 116, "{v.num_patches} patches of {v.patch_size} × {v.patch_size}"),
    (362, 170, "{v.num_hidden_layers} layers, width {v.hidden_size:,}"),  # the vision tower
    (591, 90, "{v.num_patches} × {v.hidden_size:,}"),
    (740, 190, "{v.hidden_size:,} → {t.hidden_size:,}"),  # the projector
    (1031, 90, "{v.num_patches} × {t.hidden_size:,}"),
)
LANE_TOP, SEQUENCE_TOP, SEQUENCE_LEFT, SEQUENCE_WIDTH = 66, 300, 222, 954


def draw_architecture(config: LlavaConfig, path: Path):
    """Draw how an image and a question become logits, with the shapes of our model and of LLaVA-1.5-7B."""
    card = Card(1200, 548, "From an image and a question to an answer")
    card.text(1176, 24, "black: the speedrun's model", ha="right")
    card.text(1176, 42, "gray: LLaVA-1.5-7B", GRAY, ha="right")
    draw_image_lane(card, config)
    centers = draw_sequence(card, config)
    title = "Decoder: causal attention over image and text"
    card.component(SEQUENCE_LEFT, 366, SEQUENCE_WIDTH, 60, DECODER, title, 20, 11.5)
    layers = "{0.num_hidden_layers} layers, width {0.hidden_size:,}"
    card.text(692, 408, layers.format(config.text_config), ha="right")
    card.text(706, 408, layers.format(LLAVA_7B.text_config), GRAY, ha="left")
    for center in centers:
        card.arrow((center, 336), (center, 362))
    for center, word in zip(centers[-len(ANSWER) - 1 :], ANSWER):  # a position predicts the token after it
        card.arrow((center, 428), (center, 456), color=LABEL)
        card.box(center - word_width(word) / 2, 460, word_width(word), 30, LABEL, word)
    card.text(790, 468, "Logits only where the next token has a label:", size=10, ha="right", weight="bold")
    card.text(790, 486, "the answer and its end. Their cross-entropy is the loss.", ha="right")
    card.shapes(centers[-4], 506, f"{len(ANSWER)} × {{t.vocab_size:,}}", config)
    card.save(path)


def draw_image_lane(card: Card, config: LlavaConfig):
    """Draw the steps of LANE, the shapes below them, and arrows between them."""
    vision, y = config.vision_config, LANE_TOP
    image_x, patches_x, tower_x, features_x, projector_x, projected_x = (x for x, *_ in LANE)
    image = np.asarray(draw_scene(make_scene(0, SCENE, False)[0], 4 * vision.image_size))
    card.image(image, image_x, y, 110)
    grid, cell = vision.image_size // vision.patch_size, 4 * vision.patch_size
    for row, column in np.ndindex(grid, grid):
        patch = image[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        card.image(patch, patches_x + column * 120 / grid, y - 5 + row * 120 / grid, 120 / grid - 4)
    card.component(tower_x, y, 170, 110, VISION, "Vision tower", 38)
    card.text(tower_x + 85, y + 74, "CLIP's ViT; output of the\nsecond to last layer", size=9)
    card.component(projector_x, y, 190, 110, PROJECTOR, "Projector", 38)
    card.text(projector_x + 95, y + 66, "Linear → GELU → Linear", size=9)
    for i in range(9):  # two matrices with one row per patch
        card.box(features_x, y + 1 + i * 12.2, 90, 9, VISION, opacity=0.45, radius=2, linewidth=0.8)
        card.box(projected_x, y + 1 + i * 12.2, 90, 9, PROJECTOR, opacity=0.45, radius=2, linewidth=0.8)
    for x, width, text in LANE:
        card.shapes(x + width / 2, y + 127, text, config)
    for (x, width, _), (next_x, *_) in pairwise(LANE):
        card.arrow((x + width + 5, y + 55), (next_x - 5, y + 55))


def draw_sequence(card: Card, config: LlavaConfig) -> list[float]:
    """Draw the sequence that the decoder reads; return the center of every token."""
    y, x, centers, words = SEQUENCE_TOP, SEQUENCE_LEFT, [], [*PROMPT, *ANSWER]
    gap = (SEQUENCE_WIDTH - sum(map(word_width, words))) / (len(words) - 1)
    for i, word in enumerate(words):
        width, is_image = word_width(word), word == IMAGE_TOKEN
        color = PROJECTOR if is_image else LABEL if i >= len(PROMPT) else TEXT
        card.box(x, y, width, 34, color, word, 0.45 if is_image else TINT)
        centers.append(x + width / 2)
        x += width + gap
    source, target = LANE[-1][0] + LANE[-1][1] / 2, centers[5]
    card.arrow((source, 219), (source, 262), (target, 262), (target, y - 4), color=PROJECTOR)
    card.text(target + 14, 249, "scatter: feature i replaces the i-th <image> placeholder", PROJECTOR, ha="left")
    card.component(28, y - 26, 150, 86, DECODER, "Tokenizer,\nembedding table", 27, 10)
    card.shapes(103, y + 28, "{t.vocab_size:,} × {t.hidden_size:,}", config)
    card.arrow((182, y + 17), (218, y + 17))
    return centers


def word_width(word: str) -> float:
    return 24 if word == IMAGE_TOKEN else 7 * len(word) + 12


# ---------------------------------------------------------------------------------------------------------------------
# freeze plan

UNUSED, FROZEN = "not used", "❄ frozen"
STAGE_COLUMNS = {  # stage -> its cell in each of PLAN_ROWS
    "Stage 0, CLIP": ("trains", UNUSED, UNUSED, "images and captions", "contrastive", "pretrained CLIP-L/14-336"),
    "Stage 0, decoder": (UNUSED, UNUSED, "trains", "text alone", "next token", "pretrained Vicuna"),
    "Stage 1": (FROZEN, "trains", FROZEN, "images and captions", "next token of the caption", "558K captions"),
    "Stage 2": (FROZEN, "trains", "trains", "images and dialogues", "next token of the answers", "665K dialogues"),
}
PLAN_ROWS = COMPONENTS | {"Data": DARK, "Loss": DARK, "LLaVA-1.5": GRAY}


def draw_freeze_plan(path: Path):
    """Draw which components train, are frozen, or take no part in each stage."""
    card, tops = Card(1000, 446, "What trains in which stage"), (96, 160, 224, 300, 340, 380)
    for y, name in zip(tops, PLAN_ROWS):
        card.text(28, y + 28, name, COMPONENTS.get(name, DARK), 11, ha="left", weight="bold")
    for x, (stage, cells) in zip((150, 358, 566, 774), STAGE_COLUMNS.items()):
        card.text(x + 97, 74, stage, size=11.5, weight="bold")
        for y, cell, (name, color) in zip(tops, cells, PLAN_ROWS.items()):
            if name not in COMPONENTS:
                card.text(x + 97, y + 28, cell, color, 10)
            elif cell == UNUSED:
                card.box(x, y, 194, 56, BORDER, radius=7, facecolor=PAGE, linestyle=(0, (4, 3)))
                card.text(x + 97, y + 28, cell, GRAY, 10)
            else:
                card.box(x, y, 194, 56, color, cell, opacity=1 if cell == "trains" else TINT, size=11, radius=7)
    card.axes.plot((28, 972), (300, 300), color=BORDER, linewidth=1.2)
    card.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# tokens and loss mask


def draw_tokens(config: LlavaConfig, tokenizer: Tokenizer, path: Path):
    """Draw a training record of two questions as tokens, with id and label below each."""
    record = next(r for i in range(100) for r in make_records(0, i, TURNS)[1] if len(r["conversations"]) == 4)
    ids, labels = render_dialogue(turns_of(record), tokenizer, config.template, config.tokens_per_image)
    names = {i: name for name, i in tokenizer.specials.items()} | {tokenizer.image_id: "img"}
    boxes, x, y = [], 28, 62  # (x, y, width, text) of each token
    for token in ids:
        text = names.get(token) or tokenizer.codec.decode([token], tokenizer.word_ids)
        text = text.replace(" ", "·").replace("\n", "↵")
        width = 7.3 * max(len(text), 3) + 12
        if x + width > 1172:
            x, y = 28, y + 84
        boxes.append((x, y, width, text))
        x += width + 5
    card = Card(1200, y + 142, "One training record as tokens: only the answers are trained")
    for (x, top, width, text), token, label in zip(boxes, ids, labels):
        trained, color = label != IGNORE, PROJECTOR if token == tokenizer.image_id else TEXT
        card.box(x, top, width, 34, LABEL if trained else color, text, 1 if trained else TINT, font="monospace")
        card.text(x + width / 2, top + 46, str(token), GRAY, 7.5)
        label, color = (str(label), LABEL) if trained else ("–", GRAY)
        card.text(x + width / 2, top + 61, label, color, 7.5, weight="bold")
    legend = ("prompt", TEXT, 28), ("image token: a projected feature takes its place", PROJECTOR, 130)
    for text, color, x in (*legend, ("answer and its end: trained", LABEL, 510)):
        card.box(x, y + 104, 22, 18, color, opacity=1 if color == LABEL else TINT)
        card.text(x + 30, y + 113, text, ha="left")
    card.text(1172, y + 113, "below each token: id, label (–: −100, ignored)", GRAY, ha="right")
    card.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# loss curves

PANELS = (("stage 0, CLIP: contrastive", VISION), ("stage 0, decoder: text", DECODER))
PANELS += (("stage 1: projector", PROJECTOR), ("stage 2: + decoder", LABEL), ("stage 2: everything", LABEL))


def draw_losses(run: Path, path: Path):
    """Draw the loss of every training run of a speedrun: each step faintly, the running mean on top."""
    card = Card(1200, 312, "Training loss of the five runs of a speedrun")
    card.text(1176, 30, "loss by training step, with its running mean", GRAY, ha="right")
    for i, (name, (title, color)) in enumerate(zip(STAGES, PANELS)):
        rows = read_rows(run / name / "log.jsonl")
        steps, values = plots.column(rows, "loss")
        axes = card.figure.add_axes(((58 + 231 * i) / 1200, 50 / 312, 180 / 1200, 188 / 312), facecolor="none")
        plots.draw_curve(axes, rows, "loss", color)
        axes.set(ylim=(0, 1.05 * max(values)), xlim=(0, steps[-1]))
        axes.set_title(title, fontsize=10, color=color, weight="bold", pad=8)
        axes.set_xlabel("step", fontsize=9, color=GRAY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(BORDER)
        axes.tick_params(colors=GRAY, labelsize=8.5)
        axes.grid(axis="y", color=BORDER, linewidth=0.6)
    card.save(path)


def draw_figures(run: Path, out: Path):
    """Draw into `out` every figure for which `run` has the data; print a line for each, drawn or not."""
    plots.new_figure(1, 1)  # raises ValueError if matplotlib is missing, before anything is written
    out.mkdir(parents=True, exist_ok=True)
    trained = (run / "stage2/config.json").exists()
    config, tokenizer = (read_config(run / "stage2"), Tokenizer.load(run / "stage2")) if trained else new_model()
    draw_architecture(config, out / "architecture.png")
    draw_freeze_plan(out / "freeze_plan.png")
    draw_tokens(config, tokenizer, out / "tokens_and_mask.png")
    files = [*(run / name / "log.jsonl" for name in STAGES), run / "stage2/answers.jsonl"]
    if all(path.exists() for path in files):
        draw_losses(run, out / "loss_curves.png")
        draw_sheet(run, read_rows(files[-1]), out / "heldout_sheet.png", rows=2)
        print(out / "heldout_sheet.png")
    else:
        for name in ("loss_curves.png", "heldout_sheet.png"):
            print(f"{name} is not drawn: {run} is not the folder of a finished speedrun")


def main():
    """Draw the figures."""
    parser = argparse.ArgumentParser(prog="python -m world.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=OUTPUT_ROOT / "speedrun", help="folder of a finished speedrun")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder to write the figures to")
    args = parser.parse_args()
    draw_figures(args.run, args.out)


if __name__ == "__main__":
    cli.run(main, "figures.py")
