"""The page of sample.py --look: words, places on the image, and one-line refusals."""

import json

import numpy as np
import pytest
from PIL import Image
from test_llava import IMAGE, SHAPE

import sample
from clip import CLIPVisionConfig
from data import prepare_image
from inputs.tokenizer import train_bpe
from insight import look as page
from insight.look import LOOKS, paint_map, token_boxes
from insight.maps import NEWLINE, find_words, patch_numbers
from llava import LlavaConfig, TextConfig

# ---------------------------------------------------------------------------------------------------------------------
# words


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the star is blue, so no. " * 3], 20)


@pytest.mark.parametrize(
    "text, words",
    [
        ("The star is blue.", ["The", "star", "is", "blue"]),
        ("Don't: a top-left né ☃ 42!", ["Don't", "a", "top-left", "né", "42"]),
        ("...", []),
    ],
)
def test_words_are_made_of_their_tokens(tokenizer, text, words):
    ids = [*tokenizer.encode(" " + text), tokenizer.eos_id]
    found = find_words([1, 2, 3], ids, text, tokenizer)
    assert [word.text for word in found] == words
    for word in found:
        assert word.text in tokenizer.decode([ids[i - 3] for i in word.positions])
        for drop in (word.positions[:-1], word.positions[1:]):  # each of the tokens is needed
            assert word.text not in tokenizer.decode([ids[i - 3] for i in drop])


def test_tokens_after_the_text_are_left_out(tokenizer):
    """Some templates end an answer with a text, such as ###, whose tokens are generated."""
    ids = tokenizer.encode(" so no### USER")
    assert [word.text for word in find_words([], ids, "so no", tokenizer)] == ["so", "no"]


# ---------------------------------------------------------------------------------------------------------------------
# places

SIDE, PATCH = 48, 12
MODES = {"pad": {}, "square": {}, "anyres": {"image_grid_pinpoints": [[48, 96], [96, 48], [96, 96]]}}


def config_of(mode):
    vision = CLIPVisionConfig(24, 48, 2, 4, image_size=SIDE, patch_size=PATCH)
    return LlavaConfig(TextConfig(**SHAPE), vision, IMAGE, image_mode=mode, **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(90, 200), (60, 100), (100, 60), (150, 150)])
def test_the_box_of_a_token_is_what_its_patch_shows(mode, size):
    """If an image is white in the box of a token and black elsewhere, that token's patch is the whitest of its tile."""
    config = config_of(mode)
    boxes, numbers = token_boxes(size, config), patch_numbers(size, config)
    assert len(boxes) == len(numbers) == prepare_image(Image.new("RGB", size[::-1]), config).tokens
    tested = 0
    for box, number in zip(boxes, numbers):
        assert (box is None) == (number == NEWLINE)
        if box is None:
            continue
        x1, y1, x2, y2 = (round(edge) for edge in box)
        pixels = np.zeros((*size, 3), np.uint8)
        pixels[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)] = 255
        if pixels.mean() < 0.3 * 255 * (x2 - x1) * (y2 - y1) / (size[0] * size[1]):
            continue  # it shows mostly padding, whose color is not black
        tile, patch = divmod(number, config.vision_config.num_patches)
        seen = prepare_image(Image.fromarray(pixels), config).pixels[tile].mean(0)
        bright = seen.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).mean((2, 3)).flatten()
        assert bright.argmax() == patch
        tested += 1
    assert tested >= config.vision_config.num_patches // 2


def test_a_map_covers_the_image_without_its_padding():
    """A wide image: of 4 x 4 patches, the first and the last row are padding, and their value is not drawn."""
    size, config = (50, 100), config_of("pad")
    values = np.arange(16.0)
    heat = paint_map(values, token_boxes(size, config), size, scale=2)
    assert heat.shape == (100, 200)
    assert [heat[25, 25 + 50 * i] for i in range(4)] == [4, 5, 6, 7]
    assert [heat[75, 25 + 50 * i] for i in range(4)] == [8, 9, 10, 11]
    assert not paint_map(-values, token_boxes(size, config), size, 2).any()


def test_views_of_tiles_add_up():
    """A patch of a tile is a quarter of a patch of the whole image: the same value is four times as bright on it."""
    config, size = config_of("anyres"), (96, 96)
    boxes, numbers = token_boxes(size, config), patch_numbers(size, config)
    heat = np.zeros((2, 2))
    for i, tile in enumerate((0, 1)):  # patch 0 of the whole, patch 0 of the first tile
        values = np.zeros(len(boxes))
        values[numbers.index(tile * 16)] = 1
        painted = paint_map(values, boxes, size, 1)
        heat[i] = painted[3, 3], painted[15, 15]
    assert heat[0, 0] == heat[0, 1] > 0
    assert heat[1].tolist() == [4 * heat[0, 0], 0]


# ---------------------------------------------------------------------------------------------------------------------
# the page


@pytest.fixture
def image_paths(tiny):
    return sorted((tiny.world / "heldout-0/0000").iterdir())


@pytest.fixture
def ask(command, babbler, capsys):
    def call(*argv, model=babbler):
        command(sample, "--model", model, "--device", "cpu", "--max-new-tokens", 6, *argv)
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("by", LOOKS)
def test_the_answer_is_printed_and_the_page_written(ask, image_paths, tmp_path, by):
    question = ["--image", image_paths[0], "--prompt", "What is this?"]
    out = tmp_path / "page.png"
    plain, looked = (json.loads(ask(*question, "--json", *flags)) for flags in ([], ["--look", out, "--look-by", by]))
    assert plain["text"] == looked["text"] and plain["ids"] == looked["ids"]
    with Image.open(out) as image:
        assert image.mode == "RGB" and min(image.size) > 200


def test_without_a_prompt_the_image_is_described(ask, image_paths, tmp_path, monkeypatch):
    """Also on a terminal, where sample.py would else hold a conversation."""
    monkeypatch.setattr(sample.sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(sample.sys.stdout, "isatty", lambda: True, raising=False)
    out = ask("--image", image_paths[0], "--look", tmp_path / "a.png")
    assert out == ask("--image", image_paths[0], "--prompt", sample.DESCRIBE) and (tmp_path / "a.png").exists()


def test_each_image_has_its_row(ask, image_paths, tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr(page, "draw_page", lambda header, rows: pages.append(rows) or Image.new("RGB", (9, 9)))
    wide = tmp_path / "wide.png"
    Image.linear_gradient("L").resize((300, 100)).convert("RGB").save(wide)
    ask("--image", image_paths[0], wide, "--prompt", "Which?", "--look", tmp_path / "a.png", "--look-by", "attention")
    first, second = pages[0]
    assert len(first) == len(second) > 1 and [row[0][1] for row in (first, second)] == [image_paths[0].name, "wide.png"]
    assert [title for _, title, _ in first[1:]] == [title for _, title, _ in second[1:]]
    assert {panel.size for panel, *_ in first} == {(220, 220)} and {panel.size for panel, *_ in second} == {(220, 73)}


def test_what_cannot_be_looked_at_is_refused_before_a_model_is_loaded(ask, image_paths, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_with_adapter", None)
    (tmp_path / "folder.png").mkdir()
    cases = {
        "needs --image": ["--look", tmp_path / "a.png"],
        "must end in .png": ["--image", image_paths[0], "--look", tmp_path / "a.jpg"],
        "no/a.png: cannot be written": ["--image", image_paths[0], "--look", tmp_path / "no/a.png"],
        "folder.png: cannot be written": ["--image", image_paths[0], "--look", tmp_path / "folder.png"],
    }
    for reason, argv in cases.items():
        with pytest.raises(SystemExit) as caught:
            ask("--prompt", "What?", *argv)
        assert caught.value.code.startswith("sample.py: --look") and reason in caught.value.code
        assert len(caught.value.code.splitlines()) == 1


def test_a_decoder_alone_is_refused(ask, tiny, image_paths, tmp_path):
    with pytest.raises(SystemExit, match="a decoder without a vision tower"):
        ask("--image", image_paths[0], "--look", tmp_path / "a.png", model=tiny.decoder)


def test_an_answer_without_words_is_refused(ask, image_paths, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda *_, **__: iter([[None]][:0]))
    with pytest.raises(SystemExit, match="has no word"):
        ask("--image", image_paths[0], "--prompt", "What?", "--look", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_fewer_tokens_than_patches_are_refused(babbler, image_paths, monkeypatch):
    """Other connectors, or --visual-tokens, give tokens that stand for no single patch."""
    chat = sample.Chat(*sample.load_with_adapter(babbler, None, "cpu", None), image_paths[:1], max_new_tokens=6)
    list(chat.ask("What is this?"))
    monkeypatch.setattr(chat.model.config, "visual_tokens", 4)
    with pytest.raises(ValueError, match="one token for each patch"):
        page.look(chat, image_paths[:1], "attention")
