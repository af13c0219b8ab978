"""LLaVA-1.6's way to see more: the picture once as a whole, and once in tiles of the tower's own size.

    640 x 480, tower of 336:   whole, squeezed to 336 x 336         576 tokens
                               2 x 2 tiles of the picture in        36 rows of 48 tokens, the black bars cut away,
                               672 x 672, black bars above          a newline token after each
                               and below                            2,340 tokens in all

Sources: the LLaVA-NeXT blog (2024-01-30) and its code; rounding as in transformers' LlavaNext (facts with each rule).
Sizes are (height, width) throughout, as in image_grid_pinpoints.
"""

import math

import torch
from PIL import Image

Size = tuple[int, int]  # height, width


def best_canvas(size: Size, pinpoints: list[Size]) -> Size:
    """The canvas that keeps most of the picture's pixels; of equals, the one that wastes least; then the first."""
    height, width = size

    def kept_and_wasted(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return tuple(max(pinpoints, key=kept_and_wasted))


def fit_to_canvas(size: Size, canvas: Size) -> Size:
    """The picture's size when it fills the canvas one way, its shape kept; the other side is rounded up."""
    (height, width), (most_high, most_wide) = size, canvas
    if most_wide / width < most_high / height:
        return min(math.ceil(height * (most_wide / width)), most_high), most_wide
    return most_high, min(math.ceil(width * (most_high / height)), most_wide)


def cut_tiles(image: Image.Image, pinpoints: list[Size], side: int) -> list[Image.Image]:
    """The whole squeezed into a square, then its tiles row by row, all `side` pixels square."""
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
    """Rows and columns of tiles for a picture of this size."""
    canvas = best_canvas(size, pinpoints)
    return canvas[0] // side, canvas[1] // side


def image_area(size: Size, grid: Size) -> tuple[slice, slice]:
    """Which rows and columns of a grid of features the picture itself covers, the black bars left out."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        bar = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(bar, rows - bar), slice(0, columns)
    bar = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(bar, columns - bar)


def count_tokens(size: Size, pinpoints: list[Size], side: int, patch: int) -> int:
    """Tokens of a picture: the whole, then what is left of the tiles with a newline after each row."""
    per_side = side // patch
    tall, wide = tile_grid(size, pinpoints, side)
    rows, columns = image_area(size, (tall * per_side, wide * per_side))
    return per_side**2 + (rows.stop - rows.start) * (columns.stop - columns.start + 1)


def pack_tiles(tokens: torch.Tensor, size: Size, grid: Size, newline: torch.Tensor) -> torch.Tensor:
    """Projected features of one picture, whole first and then its tiles (1 + n, P, C), as its tokens (T, C)."""
    per_side = math.isqrt(tokens.shape[1])
    tall, wide = grid
    tiles = tokens[1:].view(tall, wide, per_side, per_side, -1).transpose(1, 2)  # (tall, P_y, wide, P_x, C)
    tiles = tiles.reshape(tall * per_side, wide * per_side, -1)
    rows, columns = image_area(size, tiles.shape[:2])
    tiles = tiles[rows, columns]
    ends = newline.to(tiles.dtype).expand(len(tiles), 1, -1)
    return torch.cat([tokens[0], torch.cat([tiles, ends], dim=1).flatten(0, 1)])
