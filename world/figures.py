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
        """Draw the box of a part of the model, with its bold title `title_y` below the box's top."""
        self.box(x, y, width, height, color, radius=7)
        self.text(x + width / 2, y + title_y, title, color, size, weight="bold")

    def text(self, x, y, text, color=DARK, size=9.5, **style):
        self.axes.text(x, y, text, color=color, fontsize=size, **{"ha": "center", "va": "center"} | style)

    def shapes(self, x, y, ours: str, theirs: str):
        """Write a shape of our model and, below it, of LLaVA-1.5-7B."""
        self.text(x, y, ours)
        self.text(x, y + 17, theirs, GRAY)

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

SCENE, IMAGE_TOKEN = 62, ""
PROMPT = ["USER:", *[IMAGE_TOKEN] * 9, "What", "color", "is", "the", "star?", "ASSISTANT:"]
ANSWER = ["The", "star", "is", "blue.", "</s>"]  # true of training scene SCENE of seed 0
# (x, width) of image, patches, vision tower, features, projector and projected features, from left to right
LANE = ((28, 110), (196, 116), (362, 170), (591, 90), (740, 190), (1031, 90))
LANE_TOP, SEQUENCE_TOP, SEQUENCE_LEFT, SEQUENCE_WIDTH = 66, 300, 222, 954


def draw_architecture(config: LlavaConfig, path: Path):
    """Draw the way from an image and a question to logits, with shapes of our model and of LLaVA-1.5-7B."""
    card, ours, theirs = Card(1200, 548, "From an image and a question to an answer"), config.text_config, TextConfig()
    card.text(1176, 24, "black: the speedrun's model", ha="right")
    card.text(1176, 42, "gray: LLaVA-1.5-7B", GRAY, ha="right")
    draw_image_lane(card, config)
    centers = draw_sequence(card, ours, theirs)
    title = "Decoder: causal attention over image and text"
    card.component(SEQUENCE_LEFT, 366, SEQUENCE_WIDTH, 60, DECODER, title, 20, 11.5)
    card.text(692, 408, f"{ours.num_hidden_layers} layers, width {ours.hidden_size}", ha="right")
    card.text(706, 408, f"{theirs.num_hidden_layers} layers, width {theirs.hidden_size:,}", GRAY, ha="left")
    for center in centers:
        card.arrow((center, 336), (center, 362))
    for center, word in zip(centers[-len(ANSWER) - 1 :], ANSWER):  # a position predicts the token after it
        width = word_width(word)
        card.arrow((center, 428), (center, 456), color=LABEL)
        card.box(center - width / 2, 460, width, 30, LABEL, word)
    card.text(790, 468, "Logits only where the next token has a label:", size=10, ha="right", weight="bold")
    card.text(790, 486, "the answer and its end. Their cross-entropy is the loss.", ha="right")
    card.shapes(centers[-4], 506, *(f"{len(ANSWER)} × {text.vocab_size:,}" for text in (ours, theirs)))
    card.save(path)


def draw_image_lane(card: Card, config: LlavaConfig):
    """Draw the stations of LANE, the shapes below them, and arrows between them."""
    vision, y = config.vision_config, LANE_TOP
    image = np.asarray(draw_scene(make_scene(0, SCENE, False)[0], 4 * vision.image_size))
    (image_x, _), (patches_x, _), (tower_x, tower_width), (features_x, _), (projector_x, projector_width), _ = LANE
    card.image(image, image_x, y, 110)
    grid, cell = vision.image_size // vision.patch_size, 4 * vision.patch_size
    for row, column in np.ndindex(grid, grid):
        patch = image[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        card.image(patch, patches_x + column * 120 / grid, y - 5 + row * 120 / grid, 120 / grid - 4)
    card.component(tower_x, y, tower_width, 110, VISION, "Vision tower", 38)
    card.text(tower_x + tower_width / 2, y + 74, "CLIP's ViT; output of the\nsecond to last layer", size=9)
    card.component(projector_x, y, projector_width, 110, PROJECTOR, "Projector", 38)
    card.text(projector_x + projector_width / 2, y + 66, "Linear → GELU → Linear", size=9)
    for x, color in ((features_x, VISION), (LANE[-1][0], PROJECTOR)):
        for i in range(9):  # a matrix with one row per patch
            card.box(x, y + 1 + i * 12.2, 90, 9, color, opacity=0.45, radius=2, linewidth=0.8)
    for (x, width), ours, theirs in zip(LANE, lane_shapes(config), lane_shapes(LLAVA_7B)):
        card.shapes(x + width / 2, y + 127, ours, theirs)
    for (x, width), (next_x, _) in pairwise(LANE):
        card.arrow((x + width + 5, y + 55), (next_x - 5, y + 55))


def lane_shapes(config: LlavaConfig) -> list[str]:
    """Return the text below each station of LANE."""
    vision, width = config.vision_config, config.text_config.hidden_size
    side, patch, count, features = vision.image_size, vision.patch_size, vision.num_patches, vision.hidden_size
    shapes = [f"3 × {side} × {side}", f"{count} patches of {patch} × {patch}"]
    shapes += [f"{vision.num_hidden_layers} layers, width {features:,}", f"{count} × {features:,}"]
    return [*shapes, f"{features:,} → {width:,}", f"{count} × {width:,}"]


def draw_sequence(card: Card, ours: TextConfig, theirs: TextConfig) -> list[float]:
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
    card.shapes(103, y + 28, *(f"{text.vocab_size:,} × {text.hidden_size:,}" for text in (ours, theirs)))
    card.arrow((182, y + 17), (218, y + 17))
    return centers


def word_width(word: str) -> float:
    return 24 if word == IMAGE_TOKEN else 7 * len(word) + 12


# ---------------------------------------------------------------------------------------------------------------------
# freeze plan

STAGE_COLUMNS = {  # stage -> states of COMPONENTS, data, loss, and the data or model in LLaVA-1.5
    "Stage 0, CLIP": ("trains", "", "", "images and captions", "contrastive", "pretrained CLIP-L/14-336"),
    "Stage 0, decoder": ("", "", "trains", "text alone", "next token", "pretrained Vicuna"),
    "Stage 1": ("frozen", "trains", "frozen", "images and captions", "next token of the caption", "558K captions"),
    "Stage 2": ("frozen", "trains", "trains", "images and dialogues", "next token of the answers", "665K dialogues"),
}
PLAN_ROWS = COMPONENTS | {"Data": DARK, "Loss": DARK, "LLaVA-1.5": GRAY}


def draw_freeze_plan(path: Path):
    """Draw which components train, are frozen, or take no part in each stage."""
    card, width, height = Card(1000, 446, "What trains in which stage"), 194, 56
    rows = [96, 160, 224, 300, 340, 380]  # top of each row
    for y, name in zip(rows, PLAN_ROWS):
        card.text(28, y + 28, name, COMPONENTS.get(name, DARK), 11, ha="left", weight="bold")
    for column, (stage, cells) in enumerate(STAGE_COLUMNS.items()):
        x = 150 + column * (width + 14)
        card.text(x + width / 2, 74, stage, size=11.5, weight="bold")
        for y, cell, (name, color) in zip(rows, cells, PLAN_ROWS.items()):
            if name not in COMPONENTS:
                card.text(x + width / 2, y + 28, cell, color, 10)
            elif cell == "trains":
                card.box(x, y, width, height, color, cell, opacity=1, size=11, radius=7)
            elif cell == "frozen":
                card.box(x, y, width, height, color, f"❄ {cell}", size=11, radius=7)
            else:
                card.box(x, y, width, height, BORDER, radius=7, facecolor=PAGE, linestyle=(0, (4, 3)))
                card.text(x + width / 2, y + 28, "not used", GRAY, 10)
    card.axes.plot((28, 972), (300, 300), color=BORDER, linewidth=1.2)
    card.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# tokens and loss mask


def draw_tokens(config: LlavaConfig, tokenizer: Tokenizer, path: Path):
    """Draw a training record of two questions as tokens, with id and label below each."""
    record = next(r for i in range(100) for r in make_records(0, i, TURNS)[1] if len(r["conversations"]) == 4)
    ids, labels = render_dialogue(turns_of(record), tokenizer, config.template, config.vision_config.num_patches)
    names = {i: name for name, i in tokenizer.specials.items()} | {tokenizer.image_id: "img"}
    cells, x, y = [], 28, 62
    for token, label in zip(ids, labels):
        text = names.get(token) or tokenizer.codec.decode([token]).replace(" ", "·").replace("\n", "↵")
        width = 7.3 * max(len(text), 3) + 12
        if x + width > 1172:
            x, y = 28, y + 84
        color = PROJECTOR if token == tokenizer.image_id else TEXT if label == IGNORE else LABEL
        cells.append((x, y, width, text, color, token, label))
        x += width + 5
    card = Card(1200, y + 142, "One training record as tokens: only the answers are trained")
    for x, cell_y, width, text, color, token, label in cells:
        draw_token(card, x, cell_y, width, text, color)
        card.text(x + width / 2, cell_y + 46, str(token), GRAY, 7.5)
        text, color = ("–", GRAY) if label == IGNORE else (str(label), LABEL)
        card.text(x + width / 2, cell_y + 61, text, color, 7.5, weight="bold")
    legend = ("prompt", TEXT, 28), ("image token: a projected feature takes its place", PROJECTOR, 130)
    for text, color, x in (*legend, ("answer and its end: trained", LABEL, 510)):
        draw_token(card, x, y + 104, 22, "", color, 18)
        card.text(x + 30, y + 113, text, ha="left")
    card.text(1172, y + 113, "below each token: id, label (–: −100, ignored)", GRAY, ha="right")
    card.save(path)


def draw_token(card: Card, x: float, y: float, width: float, text: str, color: str, height: float = 34):
    card.box(x, y, width, height, color, text, opacity=1 if color == LABEL else TINT, font="monospace")


# ---------------------------------------------------------------------------------------------------------------------
# loss curves

PANELS = (("stage 0, CLIP: contrastive", VISION), ("stage 0, decoder: text", DECODER))
PANELS += (("stage 1: projector", PROJECTOR), ("stage 2: projector, decoder", LABEL))


def draw_losses(run: Path, path: Path):
    """Draw the loss of every training run of a speedrun: each step faintly, the running mean on top."""
    card = Card(1200, 312, "Training loss of the four runs of a speedrun")
    card.text(1176, 30, "loss by training step, with its running mean", GRAY, ha="right")
    for i, (name, (title, color)) in enumerate(zip(STAGES, PANELS)):
        axes = card.figure.add_axes(((62 + 288 * i) / 1200, 50 / 312, 226 / 1200, 188 / 312))
        rows = read_rows(run / name / "log.jsonl")
        steps, values = plots.column(rows, "loss")
        plots.draw_curve(axes, rows, "loss", color)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(BORDER)
        axes.set_title(title, fontsize=10, color=color, weight="bold", pad=8)
        axes.set(ylim=(0, 1.05 * max(values)), xlim=(0, steps[-1]), facecolor="none")
        axes.set_xlabel("step", fontsize=9, color=GRAY)
        axes.tick_params(colors=GRAY, labelsize=8.5)
        axes.grid(axis="y", color=BORDER, linewidth=0.6)
    card.save(path)


def draw_figures(run: Path, out: Path):
    """Draw every figure that `run` has the data for into `out`; print a line for each, drawn or not."""
    plots.new_figure(1, 1)  # raises ValueError if matplotlib is missing, before anything is written
    out.mkdir(parents=True, exist_ok=True)
    trained = (run / "stage2/config.json").exists()
    config, tokenizer = (read_config(run / "stage2"), Tokenizer.load(run / "stage2")) if trained else new_model()
    draw_architecture(config, out / "architecture.png")
    draw_freeze_plan(out / "freeze_plan.png")
    draw_tokens(config, tokenizer, out / "tokens_and_mask.png")
    if all((run / name / "log.jsonl").exists() for name in STAGES):
        draw_losses(run, out / "loss_curves.png")
    else:
        print(f"loss_curves.png is not drawn: {run} is not the folder of a finished speedrun")
    if answers := read_rows(run / "stage2/answers.jsonl"):
        draw_sheet(run, answers, out / "heldout_sheet.png", rows=2)
        print(out / "heldout_sheet.png")
    else:
        print(f"heldout_sheet.png is not drawn: {run}/stage2 has no answers.jsonl")


def main():
    """Draw the figures."""
    parser = argparse.ArgumentParser(prog="python -m world.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=OUTPUT_ROOT / "speedrun", help="folder of a finished speedrun")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder to write the figures to")
    args = parser.parse_args()
    draw_figures(args.run, args.out)


if __name__ == "__main__":
    cli.run(main, "figures.py")
