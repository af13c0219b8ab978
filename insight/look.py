"""Draw which parts of the images the words of an answer come from: sample.py --look page.png; or which patches the
decoder has read: --show-tokens page.png.

Each word is a panel: the image, darkened where the map of that word is low. All panels of a page share one scale, so a
word that no patch matters for stays dark. With --look-by lens, a panel is a layer instead, and each patch carries the
word that its token is closest to. insight/maps.py computes what is drawn.
"""

import io
import os
import textwrap
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import prepare_image
from inputs.files import write_atomic
from inputs.images import open_image
from inputs.tokenizer import Tokenizer
from insight.maps import MAPS, NEWLINE, Answer, find_words, image_features, log_probabilities, logit_lens, patch_numbers
from llava import Llava, LlavaConfig
from variants.anyres import Size, best_canvas, fit_to_canvas

LOOKS = (*MAPS, "lens")
SCALES = {  # what the largest number of a page is
    "attention": "{:.1%} of a position's attention",
    "gradient": "a relevance of {:.3g}",
    "occlusion": "a drop of {:.3g} in the word's log-probability",
}
PANEL, COLUMNS, LAYERS, MARGIN, CELL = 220, 6, 6, 16, 56  # pixels of a panel; most panels in a row; most layers; pixels
FAINT = 0.2  # brightness of the image where a map is zero
Box = tuple[float, float, float, float]  # x1, y1, x2, y2
load_font = partial(ImageFont.load_default)  # the font that Pillow ships; it has Latin letters only


def check_page(path: Path, images: list[Path], flag: str = "--look"):
    """Raise ValueError if --look, or another flag that draws, cannot work, before a model is loaded."""
    if not images:
        raise ValueError(f"{flag} draws on the images of an answer: it needs --image")
    if path.suffix.lower() != ".png":
        raise ValueError(f"{flag} {path}: the name of a PNG file must end in .png")
    if path.is_dir() or not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"{flag} {path}: cannot be written")


# ---------------------------------------------------------------------------------------------------------------------
# from patches to places on the image


def tile_frames(size: Size, config: LlavaConfig) -> list[Box]:
    """The box that each tile of an image shows, in pixels of the image; what lies outside the image is padding."""
    (height, width), side = size, config.vision_config.image_size
    if not config.image_grid_pinpoints:
        shown = max(size) if config.image_mode == "pad" else min(size)
        left, top = (width - shown) / 2, (height - shown) / 2
        return [(left, top, left + shown, top + shown)]
    canvas = best_canvas(size, config.image_grid_pinpoints)
    inner_height, inner_width = fit_to_canvas(size, canvas)
    left, top = (canvas[1] - inner_width) // 2, (canvas[0] - inner_height) // 2
    x_scale, y_scale = width / inner_width, height / inner_height
    frames = [(0, 0, width, height)]
    for y, x in product(range(-top, canvas[0] - top, side), range(-left, canvas[1] - left, side)):
        frames.append((x * x_scale, y * y_scale, (x + side) * x_scale, (y + side) * y_scale))
    return frames


def token_boxes(size: Size, config: LlavaConfig) -> list[Box | None]:
    """The box of each token of an image, in pixels of the image; None for a newline token."""
    vision, frames, boxes = config.vision_config, tile_frames(size, config), []
    per_row, step = vision.image_size // vision.patch_size, vision.patch_size / vision.image_size
    for number in patch_numbers(size, config):
        if number == NEWLINE:
            boxes.append(None)
            continue
        x1, y1, x2, y2 = frames[number // vision.num_patches]
        row, column = divmod(number % vision.num_patches, per_row)
        width, height = (x2 - x1) * step, (y2 - y1) * step
        x, y = x1 + column * width, y1 + row * height
        boxes.append((x, y, x + width, y + height))
    return boxes


def paint_map(values: np.ndarray, boxes: list[Box | None], size: Size, scale: float) -> np.ndarray:
    """Spread the positive values of an image's tokens evenly over their boxes, on an image `scale` times as large.

    Views add up where they overlap: the whole image and its tiles. Returns value per patch area, where a patch is the
    mean one; (height, width). What falls on padding is left out.
    """
    heat = np.zeros([max(1, round(side * scale)) for side in size])
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in filter(None, boxes)]
    for value, box in zip(values, boxes):
        if box and value > 0:
            x1, y1, x2, y2 = (max(0, round(edge * scale)) for edge in box)
            heat[y1:y2, x1:x2] += value * np.mean(areas) / ((box[2] - box[0]) * (box[3] - box[1]))
    return heat


# ---------------------------------------------------------------------------------------------------------------------
# drawing


def look(chat, paths: list[Path], by: str) -> Image.Image:
    """The page of the last answer. Args: chat: a sample.Chat that has answered; paths: its images; by: one of LOOKS."""
    model, tokenizer, last, question = chat.model, chat.tokenizer, chat.last, chat.turns[-1].question
    if model.config.relevance_bounds:
        raise ValueError("--look: this model's question chooses the patches: --show-tokens draws them")
    images = [open_image(path) for path in paths]
    words = find_words(last["prompt_ids"], last["ids"], last["text"], tokenizer)
    answer = Answer(last["prompt_ids"] + last["ids"], words, [prepare_image(image, model.config) for image in images])
    if not words:
        raise ValueError(f"--look: the answer {last['text']!r:.50} has no word")
    if any(image.tokens != len(patch_numbers(image.size, model.config)) for image in answer.images):
        raise ValueError("--look: this model does not have one token for each patch of an image")
    header = [f"{question}  {last['text']}"]
    if by == "lens":
        header.append("lens: the token that each image token's state is closest to; gray: below 50 %")
        return draw_page(header, draw_lens(model, tokenizer, answer, images))
    maps = MAPS[by](model, answer).split([image.tokens for image in answer.images], dim=1)  # (W, its tokens) each
    chances = log_probabilities(model, answer, [image_features(model, answer)])[0].exp().tolist()
    rows, heats = [], []
    for image, values in zip(images, maps):
        size, scale = (image.height, image.width), PANEL / max(image.size)
        heats.append([paint_map(v.numpy(), token_boxes(size, model.config), size, scale) for v in values])
    peak = max(heat.max() for one in heats for heat in one) or 1
    for path, image, one in zip(paths, images, heats):
        titles = [(word.text, f"{chance:.0%}") for word, chance in zip(words, chances)]
        panels = [(shade(image, heat / peak), *title) for heat, title in zip(one, titles)]
        rows.append([(image.resize(panels[0][0].size, Image.Resampling.LANCZOS), path.name[-20:], ""), *panels])
    header.append(f"{by}: the brightest patch stands for {SCALES[by].format(peak)}; %: probability of the word")
    return draw_page(header, rows)


def show_tokens(chat, paths: list[Path]) -> Image.Image:
    """The page of --show-tokens: each image of the last answer, its dropped patches darkened. Args: as in look."""
    model, question, rows, counts = chat.model, chat.turns[-1].question, [], []
    if not hasattr(model, "kept_patches"):
        reason = (
            "no model of train.py --relevance, and no --visual-tokens with random, uniform or cls below all patches"
        )
        raise ValueError(f"--show-tokens: this model reads all patches ({reason})")
    for path, kept in zip(paths, model.kept_patches):
        image = open_image(path)
        size, scale = (image.height, image.width), PANEL / max(image.size)
        heat = paint_map(kept.float().numpy(), token_boxes(size, model.config), size, scale)
        shown, counts = shade(image, heat), [*counts, f"{kept.sum()} of {len(kept)} patches"]
        rows.append(
            [(image.resize(shown.size, Image.Resampling.LANCZOS), path.name[-20:], ""), (shown, counts[-1], "")]
        )
    return draw_page([f"{question}  {chat.last['text']}", "dark: patches that the decoder has not read"], rows)


def shade(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The image at the size of `heat` (0 to 1), darkened where it is low."""
    pixels = np.asarray(image.resize(heat.shape[::-1], Image.Resampling.LANCZOS))
    return Image.fromarray((pixels * (FAINT + (1 - FAINT) * heat[..., None])).astype(np.uint8))


def draw_lens(model: Llava, tokenizer: Tokenizer, answer: Answer, images: list[Image.Image]) -> list[list[tuple]]:
    """Rows of panels for draw_page: of each image, up to LAYERS layers with the words of its patches."""
    ids, chances = logit_lens(model, answer)
    names = {i: name for name, i in tokenizer.specials.items()}
    layers = sorted({round(i) for i in np.linspace(0, len(ids) - 1, LAYERS)})
    rows, first = [], 0
    for image, prepared in zip(images, answer.images):
        boxes = token_boxes(prepared.size, model.config)
        if model.config.image_grid_pinpoints:  # the whole image would be written over its tiles
            boxes[: model.config.vision_config.num_patches] = [None] * model.config.vision_config.num_patches
        scale = max(PANEL / max(image.size), CELL / min(x2 - x1 for x1, _, x2, _ in filter(None, boxes)))
        size, panels = (round(image.width * scale), round(image.height * scale)), []
        for layer in layers:
            panel = Image.blend(image.resize(size, Image.Resampling.LANCZOS), Image.new("RGB", size, "white"), 0.7)
            pen = ImageDraw.Draw(panel)
            for i, box in enumerate(boxes, first):
                if box:
                    center = scale * (box[0] + box[2]) / 2, scale * (box[1] + box[3]) / 2
                    token, color = ids[layer, i].item(), "black" if chances[layer, i] >= 0.5 else "gray"
                    text = names.get(token) or tokenizer.decode([token]).strip() or repr(tokenizer.decode([token]))
                    pen.text(center, text[:8], color, load_font(13), anchor="mm")
            panels.append((panel, f"after layer {layer}" if layer else "before layer 1", ""))
        rows.append(panels)
        first += prepared.tokens
    return rows


def draw_page(header: list[str], rows: list[list[tuple[Image.Image, str, str]]]) -> Image.Image:
    """A white page: lines of text, then rows of panels (image, title, note), wrapped after COLUMNS panels."""
    rows = [row[i : i + COLUMNS] for row in rows for i in range(0, len(row), COLUMNS)]
    width = max(sum(panel.width + MARGIN for panel, *_ in row) for row in rows) + MARGIN
    lines = [part for line in header for part in textwrap.wrap(line, max(20, (width - 2 * MARGIN) // 8))]
    heights = [max(panel.height for panel, *_ in row) + 2 * MARGIN + 24 for row in rows]
    page = Image.new("RGB", (width, 2 * MARGIN + 22 * len(lines) + sum(heights)), "white")
    pen, y = ImageDraw.Draw(page), MARGIN
    for line in lines:
        pen.text((MARGIN, y), line, "black", load_font(16))
        y += 22
    y += MARGIN
    for row, height in zip(rows, heights):
        x = MARGIN
        for panel, title, note in row:
            pen.text((x, y), title, "black", load_font(18))
            pen.text((x + panel.width, y + 3), note, "gray", load_font(14), anchor="ra")
            page.paste(panel, (x, y + 24))
            x += panel.width + MARGIN
        y += height
    return page


def save_page(page: Image.Image, path: Path):
    """Write a page as PNG, whole or not at all."""
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())
