"""Draw a scene as an image, and shift images to another look to fine-tune on."""

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from world.scenes import COLORS, Scene, SceneObject

OVERSAMPLING = 4  # scenes are drawn four times as large and averaged down, to smooth the edges


def draw_scene(scene: Scene, side: int, sign_scale: float = 1.0) -> Image.Image:
    """Return the scene as an RGB image, `side` pixels square, with its sign `sign_scale` times as large as it says."""
    large = OVERSAMPLING * side
    canvas = draw_background(scene, side).resize((large, large), Image.Resampling.NEAREST)
    pen, line_width = ImageDraw.Draw(canvas), max(1, round(large * 0.012))
    for obj in scene.objects:
        if obj.text:
            draw_sign(pen, obj, large, line_width, sign_scale)
        else:
            draw_shape(pen, obj, large, line_width)
    return canvas.reduce(OVERSAMPLING)


def draw_background(scene: Scene, side: int) -> Image.Image:
    """Return a pale pattern in the scene's tint, independent of the objects."""
    y, x = np.mgrid[0:side, 0:side] / side
    amount = {
        "plain": 0 * x,
        "gradient": x + y - 1,
        "stripes": np.sin(2 * math.pi * 5 * (x + y)),
        "dots": np.sin(2 * math.pi * 6 * x) * np.sin(2 * math.pi * 6 * y),
        "tiles": np.sign(np.sin(2 * math.pi * 4 * x) * np.sin(2 * math.pi * 4 * y)),
    }[scene.background]
    pixels = np.array(scene.tint) + 9 * amount[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_heart() -> list[tuple[float, float]]:
    """Return the classic parametric heart, scaled into the unit square."""
    turns = [2 * math.pi * i / 48 for i in range(48)]
    wave = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(0.5 + 0.5 * math.sin(t) ** 3, 0.44 - w / 32) for t, w in zip(turns, wave)]


A, B = 0.33, 0.67  # edges of the cross's arms
RADII = [0.52, 0.22] * 5  # of the star's points and of the corners between them
CORNERS = {  # of each shape in the unit square, y downwards; a circle has none
    "square": [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)],
    "triangle": [(0.5, 0.02), (1, 0.94), (0, 0.94)],
    "cross": [(A, 0), (B, 0), (B, A), (1, A), (1, B), (B, B), (B, 1), (A, 1), (A, B), (0, B), (0, A), (A, A)],
    "star": [(0.5 + r * math.sin(math.pi * i / 5), 0.52 - r * math.cos(math.pi * i / 5)) for i, r in enumerate(RADII)],
    "heart": make_heart(),
}


def draw_shape(pen: ImageDraw.ImageDraw, obj: SceneObject, side: int, line_width: int):
    x1, y1, x2, y2 = (side * v for v in obj.box)
    fill = COLORS[obj.color]
    outline = tuple(int(0.6 * channel) for channel in fill)
    if obj.shape == "circle":
        pen.ellipse((x1, y1, x2, y2), fill, outline, line_width)
    else:
        points = [(x1 + (x2 - x1) * u, y1 + (y2 - y1) * v) for u, v in CORNERS[obj.shape]]
        pen.polygon(points, fill, outline, line_width)


def draw_sign(pen: ImageDraw.ImageDraw, obj: SceneObject, side: int, line_width: int, scale: float):
    (x, y), r = (side * v for v in obj.center), side * scale * obj.radius
    pen.rounded_rectangle((x - r, y - r, x + r, y + r), 0.18 * r, (252, 252, 248), (70, 70, 80), line_width)
    pen.text((x, y), obj.text, (25, 25, 35), load_font(font_size(obj.text, r)), anchor="mm")


def font_size(text: str, radius: float) -> int:
    """Font size of the text of a sign of this radius: a word is written smaller than a digit."""
    return round(radius * (1.6 if len(text) == 1 else 0.91))


@lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # the font that Pillow ships, so it is the same on every machine


# ---------------------------------------------------------------------------------------------------------------------
# shifts: the same scenes with other pixels
#
# The text stays true, but a model has to adapt its vision. docs/lora.md compares which parts to fine-tune on these.


def shift_palette(image: Image.Image, seed: int) -> Image.Image:
    """Turn every hue by 28 degrees and halve its saturation."""
    hue, saturation, value = image.convert("HSV").split()
    bands = hue.point(lambda h: (h + 20) % 256), saturation.point(lambda s: s // 2), value
    return Image.merge("HSV", bands).convert("RGB")


def add_noise(image: Image.Image, seed: int) -> Image.Image:
    """Add normal noise with a standard deviation of 40 (of 255) to every pixel and channel."""
    pixels = np.asarray(image) + np.random.default_rng(seed).normal(0, 40, (*image.size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def invert_gray(image: Image.Image, seed: int) -> Image.Image:
    """Return the inverted grayscale image, like an X-ray; only brightness still tells colors apart."""
    return ImageOps.invert(ImageOps.grayscale(image)).convert("RGB")


SHIFTS = {"none": lambda image, seed: image, "palette": shift_palette, "noise": add_noise, "gray": invert_gray}
