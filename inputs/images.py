"""Opening a stranger's picture: the right pixels, or one clear line that says why not.

Half of the pictures that fail in practice fail silently (a 16-bit PNG turns white, a transparent one shows the
colors hidden under its alpha, a phone photo lies on its side), so every mode is handled by name here and everything
else is refused. Sizes are checked on the header, before a byte of pixels is decoded.
"""

import os
import stat
import unicodedata
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000  # a 50-megapixel photo is 150 MB decoded; what is larger is a bomb or a mistake
MAX_SIDE = 16_384
MAX_ASPECT = 200  # beyond 200:1 the center crop sees half a per cent of the picture
PAD_COLOR = (122, 116, 104)  # int(255 * CLIP's mean): LLaVA-1.5's expand2square background


class BadImage(ValueError):
    """A picture that cannot be used; the message is one line that names the file and the reason."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def resolve_inside(root: str | Path, name: str) -> Path:
    """The path of picture `name` below the folder `root`. Raises BadImage if it points anywhere else.

    Absolute names, `..` and symbolic links are judged by where they lead, not by how they are spelled.
    """
    if "://" in name:
        raise BadImage(f"{name!r} is an address; pictures are read from the images folder only")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in name):
        raise BadImage(f"{name!r} is not a file name: it holds a control character")
    root = Path(root).resolve()
    path = Path(os.path.realpath(root / name))  # Path.resolve raises where a link leads to itself
    if not path.is_relative_to(root):
        raise BadImage(f"{name!r} leaves the images folder {root}")
    return path


def open_image(path: str | Path) -> Image.Image:
    """Decode a picture file of any common kind to 8-bit RGB, upright. Raises BadImage.

    EXIF rotation is applied; transparency is composited on white, as viewers and transformers 5 show it; 16-bit gray
    is scaled to 8 bits; of an animation the first frame is taken; CMYK, gray and palette pictures are converted.
    """
    path = Path(path)
    check_file(path)
    try:
        # Pillow only warns of a bomb, and of broken metadata that does not matter.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            check_size(image.size, path)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image, path)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{path}: not a picture that can be read") from None
    except Image.DecompressionBombError:
        raise BadImage(f"{path}: more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's forty plugins raise whatever their parsers stumble over
        raise BadImage(f"{path}: cannot be decoded ({error})") from None


def check_file(path: Path):
    """Raise BadImage if no file is there that a picture could be in."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device would block for ever
            raise BadImage(f"{path}: not a regular file")
    except FileNotFoundError:
        raise BadImage(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in its name
        raise BadImage(f"{path}: {error}") from None


def size_of(path: Path) -> tuple[int, int]:
    """Height and width as open_image would give them, from the header alone. Raises BadImage."""
    check_file(path)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            # Only a photograph lies on its side; for the EXIF of a PNG, Pillow would decode all of it.
            turned = image.format == "JPEG" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size if turned else image.size[::-1]
    except Exception as error:
        raise BadImage(f"{path}: cannot be decoded ({error})") from None


def check_size(size: tuple[int, int], path: Path):
    """Refuse on the header what would exhaust memory or leave nothing to see. `size` is (width, height) in pixels."""
    width, height = size
    if min(size) < 1:
        raise BadImage(f"{path}: {width}x{height} has no pixels")
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        raise BadImage(f"{path}: {width}x{height} is over the limit of {MAX_PIXELS:,} pixels, {MAX_SIDE:,} a side")
    if max(size) > MAX_ASPECT * min(size):
        raise BadImage(f"{path}: {width}x{height} is more elongated than {MAX_ASPECT}:1")


def to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Any Pillow mode to RGB without losing what a person would see."""
    if image.mode.startswith("I;16"):  # convert("RGB") would saturate: every value above 255 turns white
        gray = np.asarray(image).astype(np.float64) / 257  # 65535 / 257 = 255
        return Image.fromarray(np.rint(gray).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(f"{path}: {image.mode} pixels (32 bits a channel) have no agreed range; save it with 8 or 16")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def pad_to_square(image: Image.Image, size: int) -> Image.Image:
    """The picture centerd on a square of its longer side (LLaVA-1.5's expand2square, background PAD_COLOR), which is
    resized to `size` pixels a side.

    Pillow resizes in two steps, all rows and then all columns, with bytes in between: so the rows of a wide picture
    are resized before it is padded, and the bits are the same. Rows of one color would stay what they are.
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
