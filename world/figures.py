"""Draw the README's figures: architecture, freeze plan, tokens with their loss mask, loss curves, held-out answers.

    python -m world.figures --run out/speedrun --out assets        (needs matplotlib: pip install matplotlib)

Each figure is a light card on a transparent background, so it reads on a white and on a dark page. Without a finished
run, the shapes are the speedrun's, the tokenizer is trained here, and the last two figures are left out.
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
from inputs.tokenizer import Tokenizer, train_bpe
from llava import IGNORE, LlavaConfig, TextConfig
from training import plots
from training.towers import new_clip, new_decoder
from world.drawing import draw_scene
from world.language import TURNS
from world.report import BORDER, DARK, GRAY, PAGE, STAGES, WHITE, draw_sheet, read_rows
from world.scenes import make_scene
from world.writer import make_records

VISION, PROJECTOR, DECODER, TEXT, LABEL = "#1f6feb", "#bf6a02", "#8250df", "#4b6584", "#1a7f37"
COMPONENTS = {"Vision tower": VISION, "Projector": PROJECTOR, "Decoder": DECODER}
LLAVA_7B = LlavaConfig(TextConfig(), CLIPVisionConfig(1024, 4096, 24, 16, 336, 14))


def load_subject(run: Path) -> tuple[LlavaConfig, Tokenizer]:
    """Return the config and tokenizer of a run's stage 2; without one, those of a new model of the same shape."""
    if (run / "stage2/config.json").exists():
        return read_config(run / "stage2"), Tokenizer.load(run / "stage2")
    records = [record for i in range(300) for record in make_records(0, i, TURNS)[1]]
    texts = [message["value"] for record in records for message in record["conversations"]]
    tokenizer = train_bpe([*texts, *["USER: ", " ASSISTANT:"] * 300], merges=600)
    config = new_decoder("small", tokenizer, "llava_hf").config
    config.vision_config = new_clip("small", 24, tokenizer.vocab_size).config.vision_config
    return config, tokenizer


class Card:
    """A figure of `width` x `height` units (1/100 inch, y downwards) on a card with rounded corners."""

    def __init__(self, width: float, height: float, title: str):
        self.figure = plots.new_figure(width / 100, height / 100)
        self.figure.set_layout_engine("none")  # the coordinates below are exact
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.box(1, 1, width - 2, height - 2, PAGE, BORDER, radius=14)
        self.text(28, 30, title, size=14, weight="bold", ha="left")

    def box(self, x, y, width, height, fill, edge, text="", color=DARK, size=10, radius=7, **style):
        """Draw a rounded box with centered text."""
        from matplotlib.patches import FancyBboxPatch

        shape = f"round,pad=0,rounding_size={radius}"
        style = {"facecolor": fill, "edgecolor": edge, "linewidth": 1.2} | style
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, shape, **style))
        self.text(x + width / 2, y + height / 2, text, color, size)

    def text(self, x, y, text, color=DARK, size=9.5, **style):
        self.axes.text(x, y, text, color=color, fontsize=size, **{"ha": "center", "va": "center"} | style)

    def shapes(self, x, y, ours: str, theirs: str):
        """Write a shape of our model and, below it, of LLaVA-1.5-7B."""
        self.text(x, y, ours)
        self.text(x, y + 17, theirs, GRAY)

    def arrow(self, *points: tuple[float, float], color=GRAY):
        """Draw a line through points with a head at the last one."""
        for start, end in pairwise(points):
            self.axes.plot(*zip(start, end), color=color, linewidth=0 if end == points[-1] else 1.4)
        style = {
            "arrowstyle": "-|>",
            "color": color,
            "linewidth": 1.4,
            "mutation_scale": 11,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        self.axes.annotate("", points[-1], points[-2], arrowprops=style)

    def image(self, pixels: np.ndarray, x, y, side):
        self.axes.imshow(pixels, extent=(x, x + side, y + side, y), aspect="auto", interpolation="lanczos", zorder=2)

    def save(self, path: Path):
        self.figure.savefig(path, dpi=200, transparent=True)
        print(path)


def tint(color: str, amount: float = 0.14) -> tuple[float, ...]:
    """Mix a color with white."""
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return tuple(1 - amount * (1 - channel) for channel in channels)


# ---------------------------------------------------------------------------------------------------------------------
# architecture

SCENE, IMAGE_TOKEN = 62, ""
PROMPT = ["USER:", *[IMAGE_TOKEN] * 9, "What", "color", "is", "the", "star?", "ASSISTANT:"]
ANSWER = ["The", "star", "is", "blue.", "</s>"]  # true of training scene SCENE of seed 0


def draw_architecture(config: LlavaConfig, path: Path):
    """Draw the way from an image and a question to logits, with shapes of our model and of LLaVA-1.5-7B."""
    card, ours, theirs = Card(1200, 548, "From an image and a question to an answer"), config.text_config, TextConfig()
    card.text(1176, 24, "black: the speedrun's model", ha="right")
    card.text(1176, 42, "gray: LLaVA-1.5-7B", GRAY, ha="right")
    draw_image_lane(card, config)
    centers = draw_sequence(card, ours, theirs)
    card.box(222, 366, 954, 60, tint(DECODER), DECODER)
    card.text(699, 386, "Decoder: causal attention over image and text", DECODER, 11.5, weight="bold")
    card.text(692, 408, f"{ours.num_hidden_layers} layers, width {ours.hidden_size}", ha="right")
    card.text(706, 408, f"{theirs.num_hidden_layers} layers, width {theirs.hidden_size:,}", GRAY, ha="left")
    for center in centers:
        card.arrow((center, 336), (center, 362))
    for center, word in zip(centers[-len(ANSWER) - 1 :], ANSWER):  # a position predicts the token after it
        width = word_width(word)
        card.arrow((center, 428), (center, 456), color=LABEL)
        card.box(center - width / 2, 460, width, 30, tint(LABEL, 0.2), LABEL, word, LABEL, 8.5, 5)
    card.text(790, 468, "Logits only where the next token has a label:", size=10, ha="right", weight="bold")
    card.text(790, 486, "the answer and its end. Their cross-entropy is the loss.", ha="right")
    count = len(ANSWER)
    card.shapes(centers[-4], 506, f"{count} × {ours.vocab_size:,}", f"{count} × {theirs.vocab_size:,}")
    card.save(path)


def draw_image_lane(card: Card, config: LlavaConfig):
    """Draw image, patches, vision tower, features, projector and projected features, from left to right."""
    ours, theirs, y = config.vision_config, LLAVA_7B.vision_config, 66
    image = np.asarray(draw_scene(make_scene(0, SCENE, False)[0], 4 * ours.image_size))
    card.image(image, 28, y, 110)
    grid, cell = ours.image_size // ours.patch_size, 4 * ours.patch_size
    for row, column in np.ndindex(grid, grid):
        patch = image[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        card.image(patch, 196 + column * 120 / grid, y - 5 + row * 120 / grid, 120 / grid - 4)
    for x, width, name, detail in (
        (362, 170, "Vision tower", "CLIP's ViT; output of the\nsecond to last layer"),
        (740, 190, "Projector", "Linear → GELU → Linear\n"),
    ):
        card.box(x, y, width, 110, tint(COMPONENTS[name]), COMPONENTS[name])
        card.text(x + width / 2, y + 38, name, COMPONENTS[name], 12, weight="bold")
        card.text(x + width / 2, y + 74, detail, size=9)
    for x, color in ((591, VISION), (1031, PROJECTOR)):
        for i in range(9):  # a matrix with one row per patch
            card.box(x, y + 1 + i * 12.2, 90, 9, tint(color, 0.45), color, radius=2, linewidth=0.8)
    columns = []
    for vision, width in ((ours, config.text_config.hidden_size), (theirs, LLAVA_7B.text_config.hidden_size)):
        side, patch, n = vision.image_size, vision.patch_size, vision.num_patches
        features = vision.hidden_size
        column = [f"3 × {side} × {side}", f"{n} patches of {patch} × {patch}"]
        column += [f"{vision.num_hidden_layers} layers, width {features:,}", f"{n} × {features:,}"]
        columns.append([*column, f"{features:,} → {width:,}", f"{n} × {width:,}"])
    for x, *pair in zip((83, 254, 447, 636, 835, 1076), *columns):
        card.shapes(x, y + 127, *pair)
    for start, end in ((144, 186), (320, 358), (536, 586), (686, 736), (934, 1026)):
        card.arrow((start, y + 55), (end, y + 55))


def draw_sequence(card: Card, ours: TextConfig, theirs: TextConfig) -> list[float]:
    """Draw the sequence that the decoder reads; return the center of every token."""
    y, x, centers, words = 300, 222, [], [*PROMPT, *ANSWER]
    gap = (954 - sum(map(word_width, words))) / (len(words) - 1)
    for i, word in enumerate(words):
        width, is_image = word_width(word), word == IMAGE_TOKEN
        color = PROJECTOR if is_image else LABEL if i >= len(PROMPT) else TEXT
        card.box(x, y, width, 34, tint(color, 0.45 if is_image else 0.14), color, word, color, 8.5, 5)
        centers.append(x + width / 2)
        x += width + gap
    target = centers[5]
    card.arrow((1076, 219), (1076, 262), (target, 262), (target, y - 4), color=PROJECTOR)
    card.text(target + 14, 249, "scatter: feature i replaces the i-th <image> placeholder", PROJECTOR, ha="left")
    card.box(28, y - 26, 150, 86, tint(DECODER), DECODER)
    card.text(103, y + 1, "Tokenizer,\nembedding table", DECODER, 10, weight="bold")
    pair = (f"{text.vocab_size:,} × {text.hidden_size:,}" for text in (ours, theirs))
    card.shapes(103, y + 28, *pair)
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


def draw_freeze_plan(path: Path):
    """Draw which components train, are frozen, or take no part in each stage."""
    card, width, height = Card(1000, 446, "What trains in which stage"), 194, 56
    rows = [96 + i * (height + 8) for i in range(3)] + [300 + i * 40 for i in range(3)]
    for y, name in zip(rows, (*COMPONENTS, "Data", "Loss", "LLaVA-1.5")):
        color = COMPONENTS.get(name, DARK)
        card.text(28, y + 28, name, color, 11, ha="left", weight="bold")
    for column, (stage, cells) in enumerate(STAGE_COLUMNS.items()):
        x = 150 + column * (width + 14)
        card.text(x + width / 2, 74, stage, size=11.5, weight="bold")
        for y, cell, color in zip(rows, cells, COMPONENTS.values()):
            if cell == "trains":
                card.box(x, y, width, height, color, color, cell, WHITE, 11)
            elif cell == "frozen":
                card.box(x, y, width, height, tint(color), color, f"❄ {cell}", color, 11)
            else:
                card.box(x, y, width, height, PAGE, BORDER, "not used", GRAY, linestyle=(0, (4, 3)))
        for y, cell, color in zip(rows[3:], cells[3:], (DARK, DARK, GRAY)):
            card.text(x + width / 2, y + 28, cell, color, 10)
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
        cells.append((x, y, width, text, token, label))
        x += width + 5
    card = Card(1200, y + 142, "One training record as tokens: only the answers are trained")
    for x, y, width, text, token, label in cells:
        color = PROJECTOR if token == tokenizer.image_id else TEXT if label == IGNORE else LABEL
        draw_token(card, x, y, width, text, color)
        card.text(x + width / 2, y + 46, str(token), GRAY, 7.5)
        text, color = ("–", GRAY) if label == IGNORE else (str(label), LABEL)
        card.text(x + width / 2, y + 61, text, color, 7.5, weight="bold")
    legend = ("prompt", TEXT, 28), ("image token: a projected feature takes its place", PROJECTOR, 130)
    for text, color, x in (*legend, ("answer and its end: trained", LABEL, 510)):
        draw_token(card, x, y + 104, 22, "", color, 18)
        card.text(x + 30, y + 113, text, ha="left")
    card.text(1172, y + 113, "below each token: id, label (–: −100, ignored)", GRAY, ha="right")
    card.save(path)


def draw_token(card: Card, x: float, y: float, width: float, text: str, color: str, height: float = 34):
    fill, ink = (color, WHITE) if color == LABEL else (tint(color), color)
    card.box(x, y, width, height, fill, color, radius=5)
    card.text(x + width / 2, y + height / 2, text, ink, 8.5, family="monospace")


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
        axes.set_title(title, fontsize=10, color=color, weight="bold", pad=8)
        axes.set(ylim=(0, 1.05 * max(values)), xlim=(0, steps[-1]), facecolor="none")
        axes.set_xlabel("step", fontsize=9, color=GRAY)
        axes.tick_params(colors=GRAY, labelsize=8.5)
        axes.spines[["left", "bottom"]].set_color(BORDER)
        axes.grid(axis="y", color=BORDER, linewidth=0.6)
    card.save(path)


# ---------------------------------------------------------------------------------------------------------------------


def draw_figures(run: Path, out: Path):
    """Draw every figure that `run` has the data for into `out`, and say which it has not."""
    plots.new_figure(1, 1)  # raises ValueError if matplotlib is missing, before anything is written
    out.mkdir(parents=True, exist_ok=True)
    config, tokenizer = load_subject(run)
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
