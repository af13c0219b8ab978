"""Read what is known about images, captions and boxes, from any of these files:

    scenes.jsonl        of the embedded world (python -m world write): objects with color, shape, size, cell, box
    COCO's files        captions_*.json and instances_*.json; several files about the same images are joined
    LLaVA's captions    [{"id", "image", "conversations"}]: the answers are the captions
    a list, or jsonl    [{"id", "image", "captions": ["a dog"], "boxes": [["dog", x1, y1, x2, y2]]}]

Boxes are fractions of width and height, from the top left corner. COCO's (x, y, width, height in pixels) are converted;
in a list, pixels are refused without --pixels.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.predictions import JsonFile, Row, short
from inputs.images import BadImage, check_file, resolve_inside, size_of
from inputs.records import DataError
from world.language import write_caption
from world.scenes import Scene, SceneObject

Box = tuple[str, float, float, float, float]  # name, x1, y1, x2, y2 as fractions
TOLERANCE = 0.01  # a box may leave its image by so much, from rounding; it is cut
FORMATS = "scenes.jsonl, COCO's captions or instances, LLaVA's captions, or a list with captions and boxes"


@dataclass
class Item:
    """What is known about one image. scene: of the embedded world; whole: whether the boxes name every object of
    their categories, so that one may say what is not there."""

    id: str
    image: str  # path below the images folder
    captions: list[str] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    scene: Scene | None = None
    uncounted: set[str] = field(default_factory=set)  # names of boxes that hold a crowd
    whole: bool = False


def read_items(paths: list[Path], images: Path, pixels: bool, skip_bad: bool) -> list[Item]:
    """The items of the files, those of one id joined, in the order of the first file that names them.

    Args: images: folder of the images; pixels: boxes of a list are in pixels; skip_bad: leave out bad items and count
    them on stderr. Raises DataError with file, entry and reason for the first bad item otherwise.
    """
    items, faults = {}, []
    for path in paths:
        for where, read in read_file(path, images, pixels):
            try:
                join(items, read())
            except DataError as error:
                faults.append(str(error) if str(error).startswith(str(path)) else f"{where}: {error}")
    held_out = [key for key, item in items.items() if item.scene and item.image.startswith("heldout-")]
    for key in held_out:
        del items[key]
    if held_out:
        print(f"{len(held_out):,} held-out scenes are left out: eval.py asks about them", file=sys.stderr)
    for key, item in list(items.items()):
        try:
            check_file(resolve_inside(images, item.image))
        except BadImage as error:
            faults.append(f"{paths[0]}: id {short(key)}: captions or boxes without an image: {error}")
            del items[key]
        else:
            if not item.captions and not item.boxes:
                faults.append(f"{paths[0]}: id {short(key)}: neither captions nor boxes")
                del items[key]
    if faults and not skip_bad:
        more = f" ({len(faults):,} entries are bad; --skip-bad goes on without them)"
        raise DataError(faults[0] + more)
    if faults:
        print(f"{len(faults):,} bad entries are left out (first: {faults[0]})", file=sys.stderr)
    if not items:
        raise DataError(f"{', '.join(map(str, paths))}: no images with captions or boxes")
    return list(items.values())


def join(items: dict[str, Item], item: Item):
    """Add an item, or its captions and boxes to the item of the same id. Raises DataError if their images differ."""
    known = items.setdefault(item.id, item)
    if known is not item:
        if known.image != item.image:
            raise DataError(f"id {short(item.id)} has two images, {short(known.image)} and {short(item.image)}")
        known.captions += item.captions
        known.boxes += item.boxes
        known.uncounted |= item.uncounted
        known.whole |= item.whole


def read_file(path: Path, images: Path, pixels: bool) -> Iterator[tuple[str, object]]:
    """Yield, for each entry, how messages name it and a function that reads it. Raises DataError for other files."""
    file = JsonFile(path)
    if isinstance(file.content, dict) and "annotations" in file.content:
        yield from read_coco(file)
        return
    if not isinstance(file.content, list) or not file.content:
        raise DataError(f"{path}: unknown format; known are {FORMATS}")
    for row in file.rows():
        if "things" in row:
            yield row.where, lambda row=row: read_scene(row)
        elif row.keys() & {"captions", "caption", "boxes", "conversations"}:
            yield row.where, lambda row=row: read_row(row, images, pixels)
        else:
            keys = ", ".join(map(short, list(row)[:6]))
            raise DataError(f"{row.where}: unknown format (keys {keys}); known are {FORMATS}")


# ---------------------------------------------------------------------------------------------------------------------
# the world


def read_scene(row: Row) -> Item:
    """The item of a line of scenes.jsonl. Its caption is drawn from the world's own, by the name of the image."""
    name = row.need("image")
    try:
        things = tuple(SceneObject(**{k: v for k, v in thing.items() if k != "box"}) for thing in row["things"])
        scene = Scene(things, row.get("background", "plain"), (0, 0, 0))
        boxes = [(name_of(obj), *(min(1.0, max(0.0, v)) for v in obj.box)) for obj in things]
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{row.where}: not a scene of the embedded world ({error})") from None
    caption = write_caption(scene, random.Random(name))
    key = Path(name).with_suffix("").as_posix().replace("/", "-")
    return Item(key, name, [caption], boxes, scene, whole=True)


def name_of(obj: SceneObject) -> str:
    return "sign" if obj.text else f"{obj.size} {obj.color} {obj.shape}"


# ---------------------------------------------------------------------------------------------------------------------
# lists


def read_row(row: Row, images: Path, pixels: bool) -> Item:
    """The item of an entry with captions or boxes. Raises DataError."""
    if not isinstance(row.get("image"), str) or not row["image"]:
        raise DataError(f"{row.where}: captions or boxes without an image (image is {short(row.get('image'))})")
    if "conversations" in row:
        turns = row.need("conversations", list)
        captions = [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"]
    else:
        captions = row.get("captions", row.get("caption", []))
        captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise DataError(f"{row.where}: captions are {short(captions)}, not a list of texts")
    size = image_size(row, images) if pixels and row.get("boxes") else (1, 1)
    boxes = [read_box(row, values, size) for values in row.get("boxes") or []]
    key = row["id"] if isinstance(row.get("id"), (int, str)) else row["image"]
    return Item(str(key), row["image"], clean(captions), boxes)


def clean(captions: list[str]) -> list[str]:
    """Captions in one line each, without empty ones."""
    return [text for caption in captions if (text := " ".join(caption.split()))]


def image_size(row: Row, images: Path) -> tuple[float, float]:
    """Width and height of a row's image: its own, or those in the image's header."""
    if "width" in row and "height" in row:
        return row.need("width", int, float), row.need("height", int, float)
    try:
        height, width = size_of(resolve_inside(images, row["image"]))
    except BadImage as error:
        raise DataError(f"{row.where}: {error}") from None
    return width, height


def read_box(row: Row, values: object, size: tuple[float, float]) -> Box:
    """A box as fractions. Raises DataError. Args: size: width and height to divide by."""
    try:
        name, *corners = values
        x1, y1, x2, y2 = (float(v) / side for v, side in zip(corners, (*size, *size), strict=True))
    except (TypeError, ValueError, ZeroDivisionError):
        raise DataError(f"{row.where}: box {short(values)} is not [name, x1, y1, x2, y2]") from None
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{row.where}: box {short(values)} has no name")
    if size == (1, 1) and max(x1, y1, x2, y2) > 2:
        reason = "is in pixels, where fractions of width and height are asked: --pixels converts them"
        raise DataError(f"{row.where}: box {short(values)} {reason}")
    if not (x1 < x2 and y1 < y2):
        raise DataError(f"{row.where}: box {short(values)} is not x1 < x2, y1 < y2 (is it x, y, width, height?)")
    if not (min(x1, y1) >= -TOLERANCE and max(x2, y2) <= 1 + TOLERANCE):
        raise DataError(f"{row.where}: box {short(values)} leaves the image")
    return (" ".join(name.split()), *(min(1.0, max(0.0, v)) for v in (x1, y1, x2, y2)))


# ---------------------------------------------------------------------------------------------------------------------
# COCO


def read_coco(file: JsonFile) -> Iterator[tuple[str, object]]:
    """The items of captions_*.json or instances_*.json: one an image, and one an annotation, to be joined."""
    names = {row.get("id"): row.need("name") for row in file.rows("categories")}
    images = {row.need("id", int, str): row for row in file.rows("images")}
    for row in file.rows("annotations"):
        yield row.where, lambda row=row: read_annotation(row, images, names)


def read_annotation(row: Row, images: dict, names: dict) -> Item:
    """The captions or the box of one annotation of COCO, with its image. Raises DataError if that image is unknown."""
    image = images.get(row.get("image_id"))
    if image is None:
        raise DataError(f"{row.where}: captions or boxes without an image (image_id is {short(row.get('image_id'))})")
    item = Item(str(row["image_id"]), image.need("file_name"))
    if "caption" in row:
        item.captions = clean([row.need("caption")])
    if "bbox" in row:
        name, size = names.get(row.get("category_id")), (image.need("width", int), image.need("height", int))
        try:
            x, y, width, height = row["bbox"]
            item.boxes = [read_box(row, [name, x, y, x + width, y + height], size)]
        except (TypeError, ValueError) as error:
            reason = error if isinstance(error, DataError) else f"bbox is {short(row['bbox'])}, not four numbers"
            raise DataError(str(reason) if isinstance(error, DataError) else f"{row.where}: {reason}") from None
        item.uncounted = {name} if row.get("iscrowd") else set()
        item.whole = True  # COCO's annotators boxed every object of its categories
    return item
