"""Image files of all kinds give the right pixels, or one line with the file and the reason."""

import os
import pickle
import struct
import time
import unicodedata
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from inputs import images
from inputs.images import PAD_COLOR, BadImage, LinkedFolder, open_image, pad_to_square, resolve_inside, size_of

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def save(image, path, **options):
    image.save(path, **options)
    return path


def noise(size=(64, 48)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def assert_refused(path, *words):
    with pytest.raises(BadImage) as caught:
        open_image(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    name, reason = message[: len(str(path))], message[len(str(path)) :]
    assert name == str(path) and len(reason) > len(": ")
    assert all(word in reason for word in words), message


def pixels(path):
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


# ---------------------------------------------------------------------------------------------------------------------
# what cannot be decoded


def test_missing(tmp_path):
    assert_refused(tmp_path / "none.jpg", "no such file")


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html>\n<html><body>404</body></html>\n", b"\xff\xd8\xff", b"\0" * 4096]
)
def test_not_an_image(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    assert_refused(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.bmp", "a.tif"])
@pytest.mark.parametrize("lost", ["half", 7])
def test_truncated(tmp_path, name, lost):
    path = save(noise(), tmp_path / name)
    whole, content = pixels(path), path.read_bytes()
    path.write_bytes(content[: len(content) - (len(content) // 2 if lost == "half" else lost)])
    if lost == 7 and name == "a.png":  # its end marker is 12 bytes long: every pixel is there
        assert np.array_equal(pixels(path), whole)
    else:
        assert_refused(path)


def test_directory(tmp_path):
    assert_refused(tmp_path, ": a folder, not an image")


def test_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    assert_refused(tmp_path / "a.jpg", "not a regular file")


def test_nul_in_the_name(tmp_path):
    assert_refused(f"{tmp_path}/a\0.jpg")


def test_newline_in_the_name(tmp_path):
    with pytest.raises(BadImage) as caught:
        open_image(tmp_path / "a\nb.jpg")
    assert len(str(caught.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# what should not be decoded


def png_header(width, height):
    """A valid PNG of under 100 bytes that claims width x height RGB pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# From 2 x 89 megapixels Pillow refuses by itself, from 89 it warns, below it says nothing: each is another path.
@pytest.mark.parametrize("size", [(30_000, 30_000), (10_000, 10_000), (9_000, 9_000), (16_385, 100), (100, 16_385)])
def test_decompression_bomb(tmp_path, monkeypatch, size):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(*size))

    def load(self):
        raise AssertionError("decoded before its size was checked")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a line on stderr beside the error would be a second report
        assert_refused(path, "pixels")
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (2, 401)])
def test_too_elongated(tmp_path, size):
    assert_refused(save(Image.new("RGB", size), tmp_path / "a.png"), "elongated", f"{size[0]}x{size[1]}")


@pytest.mark.parametrize("mode, name", [("F", "a.tif"), ("I", "a.tif"), ("I", "a.pgm")])
def test_32_bit_channels_are_refused(tmp_path, mode, name):
    path = save(Image.new(mode, (4, 4), 70_000 if name != "a.pgm" else 7_000), tmp_path / name)
    with Image.open(path) as image:
        assert image.mode == mode  # or this would not test the mode
    assert_refused(path, "32 bits")


@pytest.mark.parametrize("kind, old, new", [("jpg", b"\x01\x0e\0\x02", b"\x01\0\0\x02"), ("avif", b"iloc", b"iloX")])
def test_damage_that_plugins_report_with_other_exceptions(tmp_path, kind, old, new):
    """Text in a numeric EXIF field is a struct.error, a broken AVIF index a RuntimeError; both become BadImage."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "hello", 6
    try:
        path = save(noise(), tmp_path / f"a.{kind}", exif=exif)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"this Pillow cannot write {kind}")
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    try:
        assert open_image(path).size == (48, 64)  # if it can be read all the same, then upright
    except BadImage as error:
        assert str(error).startswith(str(path))


# ---------------------------------------------------------------------------------------------------------------------
# the right pixels


def test_an_open_image_does_not_need_its_file(tmp_path):
    path = save(noise(), tmp_path / "a.png")
    image = open_image(path)
    path.unlink()
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(image))), np.asarray(noise()))


def test_rgb_png_is_unchanged(tmp_path):
    image = noise()
    assert np.array_equal(pixels(save(image, tmp_path / "a.png")), np.asarray(image))


def test_16_bit_gray_keeps_its_levels(tmp_path):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 257 * g is the 16-bit level of gray g
    got = pixels(save(Image.fromarray(ramp), tmp_path / "a.png"))
    assert np.array_equal(got, np.repeat((ramp // 257).astype(np.uint8)[..., None], 3, axis=2))


def test_16_bit_gray_is_rounded(tmp_path):
    levels = np.array([[0, 128, 129, 255, 256, 385, 386, 65535]], dtype=np.uint16)  # 0.498 0.502 0.99 1.0 1.498 1.502
    assert pixels(save(Image.fromarray(levels), tmp_path / "a.png"))[0, :, 0].tolist() == [0, 0, 1, 1, 1, 1, 2, 255]


def test_cmyk_jpeg(tmp_path):
    got = pixels(save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=95))
    assert np.abs(got.astype(int) - RED).max() <= 3


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette(RED + BLUE)
    image.putpixel((1, 0), 1)
    assert pixels(save(image, tmp_path / "a.png"))[0].tolist() == [list(RED), list(BLUE)]
    got = pixels(save(image, tmp_path / "b.png", transparency=1))  # index 1 is transparent: blue must not show
    assert got[0].tolist() == [list(RED), list(WHITE)]


def test_hidden_colors_stay_hidden(tmp_path):
    image = Image.new("RGBA", (3, 1), (*RED, 255))
    image.putpixel((1, 0), (*RED, 0))
    image.putpixel((2, 0), (*RED, 51))  # a fifth of red on white
    assert pixels(save(image, tmp_path / "a.png"))[0].tolist() == [list(RED), list(WHITE), [255, 204, 204]]


def test_one_color_is_transparent(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    got = pixels(save(image, tmp_path / "a.png", transparency=BLUE))  # a tRNS chunk; the mode stays RGB
    assert got[0].tolist() == [list(RED), list(WHITE)]


def test_gray_with_alpha(tmp_path):
    image = Image.new("LA", (2, 1), (10, 255))
    image.putpixel((1, 0), (10, 0))
    assert pixels(save(image, tmp_path / "a.png"))[0].tolist() == [[10] * 3, list(WHITE)]


@pytest.mark.parametrize("mode, value, gray", [("1", 1, 255), ("1", 0, 0), ("L", 77, 77)])
def test_gray(tmp_path, mode, value, gray):
    assert (pixels(save(Image.new(mode, (9, 5), value), tmp_path / "a.png")) == gray).all()


def turned(orientation, path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    return save(image, path, exif=exif)


@pytest.mark.parametrize("orientation, upright", [
    (1, [[RED, BLUE]]), (3, [[BLUE, RED]]), (6, [[RED], [BLUE]]), (8, [[BLUE], [RED]]),
    (0, [[RED, BLUE]]), (99, [[RED, BLUE]]),
])  # fmt: skip
def test_exif_orientation(tmp_path, orientation, upright):
    got = pixels(turned(orientation, tmp_path / "a.png"))
    assert got.tolist() == [[list(color) for color in row] for row in upright]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.mpo", "a.webp", "a.png", "a.avif", "a.tif"])
def test_the_size_in_the_header_is_that_of_the_upright_image(tmp_path, name, orientation):
    kind = name[2:].upper().replace("JPG", "JPEG").replace("TIF", "TIFF")
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    exif = Image.Exif()
    exif[0x0112] = orientation
    frames = {"save_all": True, "append_images": [noise()]} if kind == "MPO" else {}
    path = save(noise(), tmp_path / name, format=kind, exif=exif, **frames)
    assert size_of(path) == open_image(path).size[::-1] == ((48, 64) if orientation < 5 else (64, 48))


def gray_tiff(path, bits, photometric, data):
    """Write a TIFF of 2 x 1 gray pixels."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in [*tags, (279, len(data))])
    data = data.ljust(8, b"\0")
    path.write_bytes(b"II*\0" + struct.pack("<I", 16) + data + struct.pack("<H", 9) + entries + bytes(4))
    return path


@pytest.mark.parametrize("bits, photometric, data", [
    (16, 1, b"\0\0\xff\xff"), (16, 0, b"\xff\xff\0\0"), (12, 1, b"\0\x0f\xff"), (8, 1, b"\0\xff"), (8, 0, b"\xff\0"),
])  # fmt: skip
def test_black_and_white_of_a_gray_tiff(tmp_path, bits, photometric, data):
    got = pixels(gray_tiff(tmp_path / "a.tif", bits, photometric, data))
    assert got.tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("content, says", [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "(HEIC, as phones write it: save it as JPEG or PNG)"),
    (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "(HEIC,"), (b"\0\0\0\x18ftypisom\0\0\2\0isom", "(a video:"),
    (b"<?xml version='1.0'?>\n<svg/>", "(SVG:"), (b"<!DOCTYPE html>\n<html>404", "(a web page:"),
    (b"version https://git-lfs.github.com/spec/v1\n", "(a pointer of Git LFS:"), (b"\xff\x0a\0\0", "(JPEG XL:"),
    (b"hello", "not an image that can be read"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, says):
    (tmp_path / "a.jpg").write_bytes(content)
    assert_refused(tmp_path / "a.jpg", says)


def test_a_phone_photo_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise to look at me": the left of the file is the top
    image = Image.new("RGB", (64, 32), BLUE)
    image.paste(RED, (0, 0, 32, 32))
    got = pixels(save(image, tmp_path / "a.jpg", exif=exif, quality=95)).astype(int)
    assert got.shape == (64, 32, 3)
    assert np.abs(got[:16] - RED).max() < 6 and np.abs(got[-16:] - BLUE).max() < 6


def test_one_pixel(tmp_path):
    assert pixels(save(Image.new("RGB", (1, 1), RED), tmp_path / "a.png")).tolist() == [[list(RED)]]


def test_the_content_decides_not_the_name(tmp_path):
    path = save(Image.new("RGB", (4, 3), RED), tmp_path / "a.jpg", format="GIF")
    assert (pixels(path) == RED).all()


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.png"])
def test_first_frame_of_an_animation_and_one_line_that_says_so(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images, "REPORTED", [])
    frames = [Image.new("RGB", (4, 3), color) for color in (RED, BLUE)]
    assert (pixels(save(frames[0], tmp_path / f"one-{name}")) == RED).all() and capsys.readouterr().err == ""
    path = save(frames[0], tmp_path / name, save_all=True, append_images=frames[1:])
    assert (pixels(path) == RED).all() and (pixels(path) == RED).all()
    assert (
        capsys.readouterr().err == f"{path}: has several frames or pages: of such files the first one alone is read\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize("name", [
    "http://example.com/a.jpg", "file:///etc/passwd", "/etc/passwd", "../a.jpg", "sub/../../a.jpg", "a\0.jpg",
    "out/a.jpg",
])  # fmt: skip
def test_names_that_leave_the_folder(tmp_path, name):
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "a.jpg").touch()
    (tmp_path / "root" / "out").symlink_to(tmp_path)
    with pytest.raises(BadImage) as caught:
        resolve_inside(tmp_path / "root", name)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and repr(name) in message and len(message) > len(repr(name)) + 5


def test_names_that_stay_inside(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    for name in ("sub/a.jpg", "sub/../sub/a.jpg", "link/a.jpg", f"{tmp_path}/sub/a.jpg"):
        assert resolve_inside(tmp_path, name) == (tmp_path / "sub" / "a.jpg").resolve()


@pytest.fixture
def linked(tmp_path):
    """An images folder whose coco/ and one.jpg are links out of it, and a snapshot of the Hugging Face hub."""
    (tmp_path / "disk/train").mkdir(parents=True)
    Image.new("RGB", (4, 4), RED).save(tmp_path / "disk/train/a.jpg")
    (tmp_path / "play").mkdir()
    (tmp_path / "play/coco").symlink_to(tmp_path / "disk")
    (tmp_path / "play/one.jpg").symlink_to("../disk/train/a.jpg")
    snapshot, blobs = tmp_path / "hub/datasets--a--b/snapshots/1234", tmp_path / "hub/datasets--a--b/blobs"
    (snapshot / "images").mkdir(parents=True)
    blobs.mkdir()
    Image.new("RGB", (4, 4), BLUE).save(blobs / "5678", format="PNG")
    (snapshot / "images/a.jpg").symlink_to("../../../blobs/5678")
    (snapshot / "b.jpg").symlink_to("../../blobs/5678")
    (snapshot / "out.jpg").symlink_to(tmp_path / "disk/train/a.jpg")
    return tmp_path


@pytest.mark.parametrize("name, link", [("coco/train/a.jpg", "coco"), ("one.jpg", "one.jpg"), ("coco", "coco")])
def test_a_link_out_of_the_folder_is_named_or_followed(linked, name, link):
    with pytest.raises(BadImage) as caught:
        resolve_inside(linked / "play", name)
    assert f"by the link {linked}/play/{link}: --follow-links allows it" in str(caught.value)
    followed = pickle.loads(pickle.dumps(LinkedFolder(linked / "play")))  # as a worker process gets it
    assert resolve_inside(followed, name) == (linked / "play" / name).resolve()


@pytest.mark.parametrize("name", ["../disk/train/a.jpg", "coco/../../disk/train/a.jpg", "coco/../x.jpg", "/etc/passwd"])
def test_following_links_allows_nothing_else(linked, name):
    with pytest.raises(BadImage, match="leaves the images folder"):
        resolve_inside(LinkedFolder(linked / "play"), name)


def test_the_links_of_a_hub_snapshot_to_its_blobs(linked):
    snapshot = linked / "hub/datasets--a--b/snapshots/1234"
    for folder, name in ((snapshot, "b.jpg"), (snapshot, "images/a.jpg"), (snapshot / "images", "a.jpg")):
        assert open_image(resolve_inside(folder, name)).getpixel((0, 0)) == BLUE
    with pytest.raises(BadImage, match=r"out\.jpg: --follow-links"):
        resolve_inside(snapshot, "out.jpg")


@pytest.mark.parametrize("stored, written", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC"), ("NFD", "NFD")])
def test_a_name_is_found_in_either_unicode_form(tmp_path, stored, written):
    name = "photos/caf\u00e9 \u304c.png"
    path = tmp_path / unicodedata.normalize(stored, name)
    path.parent.mkdir()
    path.touch()
    assert resolve_inside(tmp_path, unicodedata.normalize(written, name)) == path.resolve()


def test_a_link_to_itself(tmp_path):
    (tmp_path / "a.jpg").symlink_to("a.jpg")
    with pytest.raises(BadImage):  # Python 3.11 and 3.12 meet it when resolving, 3.13 only when opening
        open_image(resolve_inside(tmp_path, "a.jpg"))


# ---------------------------------------------------------------------------------------------------------------------
# padding


@pytest.mark.parametrize(
    "size, corner", [((4, 7), (1, 0)), ((7, 4), (0, 1)), ((1, 4), (1, 0)), ((5, 4), (0, 0)), ((3, 3), (0, 0))]
)
def test_pad_to_square(size, corner):
    side = max(size)
    square = np.asarray(pad_to_square(Image.new("RGB", size, RED), side))
    want = np.full((side, side, 3), (122, 116, 104), dtype=np.uint8)  # the odd pixel goes to the right, or below
    want[corner[1] : corner[1] + size[1], corner[0] : corner[0] + size[0]] = RED
    assert PAD_COLOR == (122, 116, 104) and np.array_equal(square, want)


@pytest.mark.parametrize("width, height", [(640, 427), (427, 640), (1000, 5), (5, 1000), (97, 96), (50, 50), (3, 2)])
@pytest.mark.parametrize("size", [24, 336])
def test_padding_late_changes_no_bit(size, width, height):
    image, side = noise((width, height)), max(width, height)
    square = Image.new("RGB", (side, side), PAD_COLOR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    want = square.resize((size, size), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(pad_to_square(image, size)), np.asarray(want))
