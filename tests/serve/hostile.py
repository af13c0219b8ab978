"""Files that are no image, or none that may be decoded, by name: each must be refused with one line."""

import gzip
import pickle
import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
HEADS = {
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heif": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic",
    "mp4": b"\0\0\0\x18ftypisom\0\0\2\0isom", "webm": b"\x1aE\xdf\xa3\0\0\0\0", "jpeg-xl": b"\xff\x0a\0\0",
    "svg": b"<svg onload='alert(1)'/>", "xml-svg": b"<?xml version='1.0'?>\n<svg/>", "pdf": b"%PDF-1.7\n",
    "html": b"<!DOCTYPE html>\n<html>404", "lfs": b"version https://git-lfs.github.com/spec/v1\n", "text": b"hello",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "empty": b"",
    "zeros": b"\0" * 4096, "elf": b"\x7fELF\2\1\1", "zip": b"PK\3\4" + b"\0" * 60, "jpeg-start": b"\xff\xd8\xff",
    "gzip": gzip.compress(b"a" * 1000), "pickle": pickle.dumps([1]), "shell": b"#!/bin/sh\nid\n",
}  # fmt: skip


def png_header(width: int, height: int) -> bytes:
    """A PNG of under 100 bytes that claims so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def write(image: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def hostile_files() -> dict[str, bytes]:
    files = dict(HEADS)
    for width, height in [(30_000, 30_000), (10_000, 10_000), (9_000, 9_000), (16_385, 100), (100, 16_385), (0, 9)]:
        files[f"bomb-{width}x{height}"] = png_header(width, height)
    for size in [(1, 4000), (4000, 1), (2, 401)]:
        files[f"elongated-{size[0]}x{size[1]}"] = write(Image.new("RGB", size), "PNG")
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"):
        whole = write(NOISE, kind)
        files[f"half-{kind}"] = whole[: len(whole) // 2]
    files["32-bit-float"], files["32-bit-int"] = (write(Image.new(mode, (4, 4), 70_000), "TIFF") for mode in "FI")
    files["other-formats-ppm"], files["other-formats-ico"] = write(NOISE, "PPM"), write(NOISE, "ICO")
    return files
