"""Scenes: one to six colored shapes and at most one sign on a 3 x 3 board, sampled from a seed.

A scene is pure data. drawing.py turns it into an image and language.py into sentences, so every sentence about an
image is true by construction.
"""

import random
import zlib
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS = {  # name -> RGB
    "red": (222, 52, 48),
    "orange": (247, 148, 29),
    "yellow": (250, 218, 50),
    "green": (52, 168, 83),
    "blue": (48, 102, 214),
    "purple": (140, 72, 190),
    "black": (38, 38, 46),
}
# Fractions of the image's side.
RADIUS = {"small": 0.1, "large": 0.17}  # of shapes; large neighbors overlap
SIGN_RADIUS = {"small": 0.12, "medium": 0.145, "large": 0.17}
COUNTS = {1: 2, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2}  # number of shapes -> how often, relative to the others
WORDS = ("sun", "cat", "tea", "map", "key", "box")
SIGN_TEXTS = tuple("0123456789") + WORDS
BACKGROUNDS = ("plain", "gradient", "stripes", "dots", "tiles")


@dataclass(frozen=True)
class SceneObject:
    """One object: a shape, or a sign (shape "sign", color "white" and a text). Lengths are fractions of the side."""

    shape: str
    color: str
    size: str  # a key of RADIUS, or of SIGN_RADIUS
    cell: int  # 0..8, row by row
    dx: float = 0.0  # offset of the object's center from the center of its cell
    dy: float = 0.0
    text: str = ""

    @property
    def center(self) -> tuple[float, float]:
        row, column = divmod(self.cell, 3)
        return (column + 0.5) / 3 + self.dx, (row + 0.5) / 3 + self.dy

    @property
    def radius(self) -> float:
        return (SIGN_RADIUS if self.text else RADIUS)[self.size]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The bounding box (x1, y1, x2, y2)."""
        (x, y), r = self.center, self.radius
        return x - r, y - r, x + r, y + r


@dataclass(frozen=True)
class Scene:
    """The objects of one image and its background."""

    objects: tuple[SceneObject, ...]  # in drawing order: a later object may cover the edge of an earlier one
    background: str
    tint: tuple[int, int, int]  # base color of the background

    @property
    def shapes(self) -> list[SceneObject]:
        return [obj for obj in self.objects if not obj.text]

    @property
    def color_shape_pairs(self) -> set[tuple[str, str]]:
        return {(obj.color, obj.shape) for obj in self.shapes}

    @property
    def sign(self) -> SceneObject | None:
        return next((obj for obj in self.objects if obj.text), None)

    def is_held_out(self) -> bool:
        """True for one scene in ten. A hash of the objects decides, so training and held-out scenes never coincide."""
        facts = sorted((obj.shape, obj.color, obj.size, obj.cell, obj.text) for obj in self.objects)
        return zlib.crc32(repr(facts).encode()) % 10 == 0


def sample_scene(rng: random.Random) -> Scene:
    """Return a random scene: one to six shapes and, in half of the scenes, a sign; each in a cell of its own."""
    count, has_sign = rng.choices(list(COUNTS), list(COUNTS.values()))[0], rng.random() < 0.5
    scene = sample_shapes(count, rng)
    if not has_sign:
        return scene
    cell = rng.choice([cell for cell in range(9) if cell not in {obj.cell for obj in scene.objects}])
    sign = SceneObject("sign", "white", rng.choice(list(SIGN_RADIUS)), cell, text=rng.choice(SIGN_TEXTS))
    return replace(scene, objects=(*scene.objects, jitter(sign, rng)))


def sample_shapes(count: int, rng: random.Random) -> Scene:
    """Return a random scene of exactly `count` shapes, without a sign. Among many shapes, few are large."""
    share, objects = 0.5 if count <= 3 else 0.25, []
    for cell in rng.sample(range(9), count):
        color, size = rng.choice(list(COLORS)), "large" if rng.random() < share else "small"
        if objects and rng.random() < 0.25:  # repeated colors make counting and comparing worth asking
            color = objects[0].color
        objects.append(jitter(SceneObject(rng.choice(SHAPES), color, size, cell), rng))
    return Scene(tuple(objects), rng.choice(BACKGROUNDS), sample_tint(rng))


def sample_tint(rng: random.Random) -> tuple[int, int, int]:
    return tuple(rng.randint(200, 250) for _ in range(3))  # pale, so that every color stands out


def jitter(obj: SceneObject, rng: random.Random) -> SceneObject:
    """Move an object off its cell's center, but never into another cell."""
    return replace(obj, dx=rng.uniform(-0.02, 0.02), dy=rng.uniform(-0.02, 0.02))


# ---------------------------------------------------------------------------------------------------------------------
# the scenes of a seed
#
# Scenes come in groups of four: a base scene and three siblings, each of which differs from it in one fact. To match
# the four images to their captions, the CLIP of stage 0 has to see that fact.

GROUP_SIZE = 4


def make_scene(seed: int, index: int, held_out: bool) -> tuple[Scene, random.Random]:
    """Return scene `index` of a seed and the random generator for its text; the same on every machine."""
    base_rng = random.Random(f"{seed} {held_out} {index // GROUP_SIZE}")
    base = sample_until(lambda: sample_scene(base_rng), held_out)
    rng = random.Random(f"{seed} {held_out} {index}")
    if index % GROUP_SIZE == 0:
        return base, rng
    siblings = (change_one_fact(base, rng) for _ in range(30))
    usable = (sibling for sibling in siblings if sibling.is_held_out() == held_out)
    return next(usable, base), rng  # a scene of one shape has few siblings: if none is usable, repeat the base


def sample_until(sample, held_out: bool) -> Scene:
    """Call `sample` until it returns a held-out scene, or until it returns a training scene."""
    while (scene := sample()).is_held_out() != held_out:
        pass
    return scene


def change_one_fact(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene with one object's cell, color, shape, size or text changed, on a random background."""
    objects = list(scene.objects)
    i = rng.randrange(len(objects))
    obj = objects[i]
    free = [cell for cell in range(9) if cell not in {other.cell for other in objects}]
    edits = [replace(obj, cell=rng.choice(free))]
    if obj.text:
        edits.append(replace(obj, text=rng.choice([text for text in SIGN_TEXTS if text != obj.text])))
        edits.append(replace(obj, size=rng.choice([size for size in SIGN_RADIUS if size != obj.size])))
    else:
        edits.append(replace(obj, color=rng.choice([color for color in COLORS if color != obj.color])))
        edits.append(replace(obj, shape=rng.choice([shape for shape in SHAPES if shape != obj.shape])))
        edits.append(replace(obj, size="small" if obj.size == "large" else "large"))
    objects[i] = jitter(rng.choice(edits), rng)
    return replace(scene, objects=tuple(objects), background=rng.choice(BACKGROUNDS))
