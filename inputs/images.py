"""Open any image file as upright 8-bit RGB, or raise BadImage with the reason in one line.

Pillow alone reads many files wrongly and without an error: a 16-bit PNG turns white, a transparent image shows the
colors under its alpha, a phone photo is rotated. Sizes are checked in the header, before pixels are decoded.
"""

import os
import re
import stat
import sys
import unicodedata
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000  # 150 MB decoded; anything larger is a decompression bomb or a mistake
MAX_SIDE = 16_384
MAX_ASPECT = 200  # width : height or height : width; beyond it, the center crop keeps under 0.5 % of the image
PAD_COLOR = (122, 116, 104)  # int(255 * CLIP's mean): LLaVA-1.5's expand2square background

ANIMATED = ("GIF", "WEBP", "AVIF", "PNG", "TIFF")  # not MPO, a photo whose other frames are its previews or depths
IN_MEMORY = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # from strangers: EPS, say, is a program
REPORTED: list[Path] = []  # the first file of several frames that this process has opened
UNREADABLE = {  # what a file is, with a remedy, and how it begins
    "HEIC, as phones write it: save it as JPEG or PNG": rb"....ftyp(hei|hev|mif1|msf1)",
    "AVIF: install a Pillow that reads it, or save it as JPEG or PNG": rb"....ftypavi[fs]",
    "JPEG XL: save it as JPEG or PNG": rb"\xff\x0a|....JXL ",
    "a video: extract its frames": rb"....ftyp|\x1aE\xdf\xa3",
    "SVG: render it as PNG": rb"\s*(<\?xml.*)?<svg",
    "a web page: download the image again": rb"(?i)\s*<(!doctype )?html",
    "a pointer of Git LFS: run git lfs pull": rb"version https://git-lfs",
}


class BadImage(ValueError):
    """An image that cannot be used. The message is one line: file, reason."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class LinkedFolder(type(Path())):
    """An images folder whose links may lead out of it, as the user says with --follow-links."""


def resolve_inside(root: str | Path, name: str) -> Path:
    """The path of image `name` in the folder `root`. Raises BadImage if it is outside.

    Absolute names, `..` and symbolic links are resolved before this is checked. Links may lead out of a LinkedFolder,
    and from a snapshot of the Hugging Face hub to its own blobs.
    """
    if "://" in name:
        raise BadImage(f"{name!r} is an address; images are read from the images folder only")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in name):
        raise BadImage(f"{name!r} is not a file name: it holds a control character")
    root = (Path(root) if isinstance(root, str) else root).resolve()
    if not name.isascii() and not os.path.lexists(root / name):  # macOS writes \u00e9 as e and an accent (NFD)
        forms = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
        name = next((form for form in forms if os.path.lexists(root / form)), name)
    path = Path(os.path.realpath(root / name))  # Path.resolve raises if a link points to itself
    if path.is_relative_to(root):
        return path
    links = [part for part in [*(root / name).parents, root / name] if part.is_relative_to(root) and part.is_symlink()]
    if not links or ".." in Path(name).parts:
        raise BadImage(f"{name!r} leaves the images folder {root}")
    blobs = [folder.parent / "blobs" for folder in root.parents if folder.name == "snapshots"]
    if not isinstance(root, LinkedFolder) and not any(map(path.is_relative_to, blobs)):
        raise BadImage(f"{name!r} leaves the images folder {root} by the link {links[0]}: --follow-links allows it")
    return path


def open_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB. Raises BadImage. Args: content: of a file in memory, which `path` only names.

    EXIF rotation is applied. Transparent pixels are blended with white, as in viewers and transformers 5. 16-bit gray
    is scaled to 8 bits; CMYK, gray and palette images are converted. Of an animation or of several pages, the first is
    returned; the first such file is named on stderr.
    """
    path = Path(path)
    if content is None:
        check_file(path)
    try:
        # Pillow warns of large images, which check_size refuses, and of broken metadata, which does not matter here.
        with warnings.catch_warnings(action="ignore"), open_with_pillow(path, content) as image:
            check_size(image.size, path)
            if not REPORTED and image.format in ANIMATED and image.is_animated:
                REPORTED.append(path)
                text = "has several frames or pages: of such files the first one alone is read"
                print(f"{path}: {text}", file=sys.stderr)
            image.load()
            with suppress(Exception):  # a broken block is no reason to refuse the image
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image, path)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{path}: not an image that can be read{name_format(path, content)}") from None
    except Exception as error:  # each of Pillow's plugins raises its own errors
        raise BadImage(f"{path}: cannot be decoded ({error})") from None


def open_with_pillow(path: Path, content: bytes | None) -> Image.Image:
    return Image.open(path) if content is None else Image.open(BytesIO(content), formats=IN_MEMORY)


def name_format(path: Path, content: bytes | None) -> str:
    """Return the format of a file that Pillow cannot read, in parentheses with a remedy; "" if not in UNREADABLE."""
    with path.open("rb") if content is None else BytesIO(content) as file:
        head = file.read(64)
    return next((f" ({name})" for name, pattern in UNREADABLE.items() if re.match(pattern, head, re.DOTALL)), "")


def check_file(path: Path):
    """Raise BadImage if `path` is not a regular file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise BadImage(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadImage(f"{path}: {error}") from None
    if not stat.S_ISREG(mode):  # a pipe or a device would block for ever
        raise BadImage(f"{path}: {'a folder, not an image' if stat.S_ISDIR(mode) else 'not a regular file'}")


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of open_image(path), read from the header alone. Raises BadImage."""
    check_file(path)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            # Pillow swaps the sides of a TIFF by itself. It would decode a whole PNG to look for EXIF after the pixels.
            known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            rotated = False
            with suppress(Exception):  # as in open_image
                rotated = known and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return image.size if rotated else image.size[::-1]
    except Exception as error:
        raise BadImage(f"{path}: cannot be decoded ({error})") from None


def check_size(size: tuple[int, int], path: Path):
    """Raise BadImage if an image is too large or too elongated. Args: size: (width, height) in pixels."""
    width, height = size
    if min(size) < 1:
        raise BadImage(f"{path}: {width}x{height} has no pixels")
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        raise BadImage(f"{path}: {width}x{height} is over the limit of {MAX_PIXELS:,} pixels, {MAX_SIDE:,} a side")
    if max(size) > MAX_ASPECT * min(size):
        raise BadImage(f"{path}: {width}x{height} is more elongated than {MAX_ASPECT}:1")


def to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Convert an image of any Pillow mode to RGB, as viewers show it. Raises BadImage for 32 bits a channel."""
    if image.mode.startswith("I;16"):  # convert("RGB") would clip every value above 255 to white
        tags = getattr(image, "tag_v2", {})  # of a TIFF, which may have 12 bits, or 0 for white
        white = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
        gray = np.asarray(image).astype(np.float64) * 255 / white
        gray = 255 - gray if tags.get(ExifTags.Base.PhotometricInterpretation) == 0 else gray
        return Image.fromarray(np.rint(gray).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(f"{path}: {image.mode} pixels (32 bits a channel) have no agreed range; save it with 8 or 16")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy an RGB image


def pad_to_square(image: Image.Image, size: int) -> Image.Image:
    """Center the image on a square of PAD_COLOR (LLaVA-1.5's expand2square) and resize it to (size, size).

    Pillow resizes all rows first, rounds to bytes, then resizes all columns. So the rows of a wide image can be resized
    before the padding: the result is identical, and the rows of padding, all of one color, need no resizing.
    """
    width, height = image.size
    side, across = max(width, height), size if width > height else height
    if width > height:
        image = image.resize((size, height), Image.Resampling.BICUBIC)
    if width != height:
        padded = Image.new("RGB", (across, side), PAD_COLOR)
        padded.paste(image, ((across - image.width) // 2, (side - height) // 2))
        image = padded
    return image.resize((size, size), Image.Resampling.BICUBIC)
