"""LLaVA-1.6's higher resolution ("anyres"): the image as a whole, and in tiles of the vision tower's size.

A 640 x 480 image (width x height) and a tower of 336 pixels:

    whole    resized to 336 x 336                                      24 x 24 = 576 tokens
    tiles    fitted into a canvas of 672 x 672, black bars above and   48 x 48 tokens; 6 + 6 rows of black bars are
             below, and cut into 2 x 2 tiles                           dropped, and each of the other 36 rows gets
                                                                       a newline token: 36 x 49 = 1,764 tokens

Together 2,340 tokens. Sizes are (height, width) throughout, as in image_grid_pinpoints.
Sources: the LLaVA-NeXT blog (2024-01-30) and its code; rounding as in transformers' LlavaNext.
"""

import math

import torch
from PIL import Image

Size = tuple[int, int]  # height, width


def best_canvas(size: Size, pinpoints: list[Size]) -> Size:
    """The canvas that keeps the most pixels of the image; on a tie the one with the least padding, then the first."""
    height, width = size

    def kept_and_padding(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return tuple(max(pinpoints, key=kept_and_padding))


def fit_to_canvas(size: Size, canvas: Size) -> Size:
    """The largest size with the image's aspect ratio that fits the canvas; the shorter side is rounded up."""
    (height, width), (max_height, max_width) = size, canvas
    if max_width / width < max_height / height:
        return min(math.ceil(height * (max_width / width)), max_height), max_width
    return max_height, min(math.ceil(width * (max_height / height)), max_width)


def cut_tiles(image: Image.Image, pinpoints: list[Size], side: int) -> list[Image.Image]:
    """The whole image, then its tiles row by row, each resized to (side, side) pixels."""
    size = image.height, image.width
    canvas_size = best_canvas(size, pinpoints)
    height, width = fit_to_canvas(size, canvas_size)
    canvas = Image.new("RGB", canvas_size[::-1])  # black
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(resized, ((canvas_size[1] - width) // 2, (canvas_size[0] - height) // 2))
    corners = [(x, y) for y in range(0, canvas_size[0], side) for x in range(0, canvas_size[1], side)]
    whole = image.resize((side, side), Image.Resampling.BICUBIC)
    return [whole, *(canvas.crop((x, y, x + side, y + side)) for x, y in corners)]


def tile_grid(size: Size, pinpoints: list[Size], side: int) -> Size:
    """Rows and columns of tiles for an image of this size."""
    canvas = best_canvas(size, pinpoints)
    return canvas[0] // side, canvas[1] // side


def image_area(size: Size, grid: Size) -> tuple[slice, slice]:
    """The rows and columns of a grid of features that the image covers, without the black bars."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        bar = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(bar, rows - bar), slice(0, columns)
    bar = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(bar, columns - bar)


def count_tokens(size: Size, pinpoints: list[Size], side: int, patch: int) -> int:
    """Number of tokens of an image: the whole, and its tiles without black bars but with a newline after each row."""
    per_side = side // patch
    down, across = tile_grid(size, pinpoints, side)
    rows, columns = image_area(size, (down * per_side, across * per_side))
    return per_side**2 + (rows.stop - rows.start) * (columns.stop - columns.start + 1)


def pack_tiles(tokens: torch.Tensor, size: Size, grid: Size, newline: torch.Tensor) -> torch.Tensor:
    """Tokens (T, C) of an image. Args: tokens: projected features of the whole, then of its n tiles, (1 + n, P, C)."""
    per_side = math.isqrt(tokens.shape[1])
    down, across = grid
    tiles = tokens[1:].view(down, across, per_side, per_side, -1).transpose(1, 2)  # (down, P_y, across, P_x, C)
    tiles = tiles.reshape(down * per_side, across * per_side, -1)
    rows, columns = image_area(size, tiles.shape[:2])
    tiles = tiles[rows, columns]
    ends = newline.to(tiles.dtype).expand(len(tiles), 1, -1)
    return torch.cat([tokens[0], torch.cat([tiles, ends], dim=1).flatten(0, 1)])
