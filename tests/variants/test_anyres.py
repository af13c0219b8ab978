"""LLaVA-1.6's tiles: a table of token counts, and equality with transformers' LlavaNext."""

import json

import pytest
import torch
from PIL import Image
from prompts import prompt_ids
from test_llava import IMAGE, PAD, SHAPE, close, random_ids, randomized

import train
from clip import CLIPVisionConfig
from data import Records, collate, prepare_image
from formats import layouts
from formats.configs import read_config
from formats.saving import save_model
from formats.weights import load_model
from inputs.mixture import open_sources
from inputs.tokenizer import train_bpe
from llava import Llava, LlavaConfig, TextConfig, generate
from variants.anyres import count_tokens, tile_grid

PINPOINTS = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
WIDE_FIRST = [(672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336)]  # the authors' own list, as (height, width)
WORKED = [  # width, height, tiles across and down, tokens
    (336, 336, (1, 2), 1176), (300, 300, (1, 2), 1176), (640, 480, (2, 2), 2340), (480, 640, (2, 2), 2352),
    (640, 427, (2, 2), 2144), (427, 640, (2, 2), 2160), (1024, 899, (2, 2), 2634), (1000, 500, (2, 1), 1752),
    (500, 1000, (1, 2), 1776), (1920, 1080, (2, 2), 1948), (640, 360, (2, 2), 1948), (1080, 1920, (2, 2), 1968),
    (1344, 336, (3, 1), 1890), (1500, 300, (3, 1), 1598), (300, 1500, (1, 3), 1656), (500, 500, (2, 2), 2928),
    (2000, 2000, (2, 2), 2928), (100, 30, (1, 2), 776),
]  # fmt: skip


@pytest.mark.parametrize("width, height, across_and_down, tokens", WORKED)
def test_token_counts(width, height, across_and_down, tokens):
    across, down = across_and_down
    assert tile_grid((height, width), WIDE_FIRST, 336) == (down, across)
    assert count_tokens((height, width), WIDE_FIRST, 336, 14) == tokens


# ---------------------------------------------------------------------------------------------------------------------
# against transformers

SIDE, PATCH = 16, 4
SMALL = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
SIZES = [(40, 30), (30, 40), (16, 16), (100, 20), (20, 100), (33, 47), (64, 64), (7, 90), (50, 51), (97, 31)]


def tiled(**values):
    vision = CLIPVisionConfig(24, 48, 4, 4, image_size=SIDE, patch_size=PATCH)
    text = TextConfig(**SHAPE | {"max_position_embeddings": 256})
    config = LlavaConfig(text, vision, IMAGE, image_mode="anyres", image_grid_pinpoints=SMALL, **values)
    return randomized(Llava(config))


def noise(height, width):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A random model with tiles, loaded by transformers, and transformers' image processor."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("next")
    save_model(tiled(), folder)
    model, report = transformers.LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval(), transformers.AutoImageProcessor.from_pretrained(folder, backend="pil"), folder


@pytest.mark.parametrize("size", SIZES)
def test_tiles_and_logits_equal_transformers(theirs, size):
    model, processor, folder = theirs
    ours, image = load_model(folder), noise(*size)
    prepared = prepare_image(image, ours.config)
    seen = processor(image, return_tensors="pt")
    assert seen["image_sizes"].tolist() == [list(size)] == [list(prepared.size)]
    assert torch.equal(seen["pixel_values"][0], prepared.pixels)
    ids = random_ids(9, seed=1).tolist()
    ids = torch.tensor([ids[:2] + [IMAGE] * prepared.tokens + ids[2:]])
    with torch.no_grad():
        want = model(input_ids=ids, **seen).logits
        features = ours.vision_features(prepared.pixels)
        got = ours.language_model.lm_head(ours.language_model.model(ours.embed(ids, features, [prepared.size])))
    close(got, want)


def test_files_of_transformers_load_bitwise_equal(theirs, tmp_path):
    model, _, folder = theirs
    model.save_pretrained(tmp_path)
    want, got = load_model(folder).state_dict(), load_model(tmp_path).state_dict()
    assert "image_newline" in want and want.keys() == got.keys()
    assert all(torch.equal(value, got[key]) for key, value in want.items())
    again = read_config(tmp_path)
    assert (again.image_mode, again.image_grid_pinpoints) == ("anyres", SMALL)


def test_geometry_of_llava_16_mistral(tmp_path):
    """The config.json of llava-hf/llava-v1.6-mistral-7b-hf gives transformers' names and shapes."""
    transformers = pytest.importorskip("transformers")
    text = {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
    text |= {"max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32064}
    text |= {"rms_norm_eps": 1e-5, "num_attention_heads": 32, "num_hidden_layers": 32}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}
    whole = {"model_type": "llava_next", "image_token_index": 32000, "image_grid_pinpoints": PINPOINTS}
    whole |= {"use_image_newline_parameter": True, "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with torch.device("meta"):
        ours = Llava(read_config(tmp_path))
        theirs = transformers.LlavaNextForConditionalGeneration(transformers.AutoConfig.from_pretrained(tmp_path))
    layout = layouts.LLAVA_LAYOUTS["LLaVA, transformers 5 in memory"]
    renamed = {layouts.match(name, layout)[0][0]: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert renamed == {name: tuple(p.shape) for name, p in ours.named_parameters()}
    assert ours.config.text_config.max_position_embeddings == 32768


# ---------------------------------------------------------------------------------------------------------------------
# training and answering


def test_a_batch_of_images_of_different_sizes(tmp_path):
    """Images need different numbers of tokens; answers in a batch equal single ones, and losses add up."""
    model, tokenizer = tiled(), train_bpe(["What is this? a cat"] * 3, 20)
    model.config.image_token_index, model.config.eos_token_ids = 97, []
    tokenizer.specials["<image>"] = 97
    records = []
    for i, size in enumerate(SIZES[:4]):
        noise(*size).save(tmp_path / f"{i}.png")
        turn = [{"from": "human", "value": "<image>\nab"}, {"from": "gpt", "value": "ba"}]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turn})
    (tmp_path / "r.json").write_text(json.dumps(records))
    tokenizer.encode = lambda text, prefix=True: [1 + ord(char) % 80 for char in text]  # within the tiny vocabulary
    dataset = Records(open_sources([str(tmp_path / "r.json")], None), tokenizer, model.config, 256, template="raw")
    tokenizer.specials["<s>"], tokenizer.specials["</s>"] = 95, 96
    samples = [dataset[i] for i in range(4)]
    with torch.no_grad():
        together = model(**collate(samples, PAD))
        alone = [model(**collate([sample], PAD)) for sample in samples]
        torch.testing.assert_close(together, sum(alone))
        prepared = [prepare_image(noise(*size), model.config) for size in SIZES[:4]]
        prompts = [prompt_ids(["ab"], [], 1, tokenizer, "raw", [image.tokens]) for image in prepared]
        sizes, features = [p.size for p in prepared], [model.vision_features(p.pixels) for p in prepared]
        both = zip(*generate(model, prompts, torch.cat(features), sizes, max_new_tokens=8))
        single = [
            [i for (i,) in generate(model, [prompt], seen, [size], max_new_tokens=8)]
            for prompt, seen, size in zip(prompts, features, sizes)
        ]
    assert [list(row) for row in both] == single and len({len(prompt) for prompt in prompts}) > 2


@pytest.mark.parametrize("pinpoints", [[[16, 17]], [[0, 16]], [[16]], [[16, 16, 16]]])
def test_canvases_must_consist_of_whole_tiles(pinpoints, tmp_path):
    save_model(tiled(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_grid_pinpoints": pinpoints}))
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        load_model(tmp_path)


def test_stage_2_trains_the_newline_too(tmp_path, command):
    model, tokenizer = tiled(), train_bpe([], 0)
    model.language_model = type(model.language_model)(
        TextConfig(**SHAPE | {"vocab_size": 320, "max_position_embeddings": 512})
    )
    model.config.text_config = model.language_model.model.config
    model.config.image_token_index = tokenizer.image_id
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    noise(30, 40).save(tmp_path / "a.png")
    turn = [{"from": "human", "value": "<image>\nab"}, {"from": "gpt", "value": "ba"}]
    (tmp_path / "r.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turn}] * 2))
    flags = [
        "--model",
        tmp_path / "model",
        "--data",
        tmp_path / "r.json",
        "--steps",
        1,
        "--batch-size",
        2,
        "--device",
        "cpu",
    ]
    command(train, "--stage", 2, *flags, "--out", tmp_path / "cached")
    again = load_model(tmp_path / "cached")
    assert not torch.equal(again.image_newline, load_model(tmp_path / "model").image_newline)
    command(
        train, "--stage", 2, *flags, "--max-length", 300, "--out", tmp_path / "anew", "--cache-gb", 0, "--device", "cpu"
    )
    anew = load_model(tmp_path / "anew")  # its tower ran on other batches: on some CPUs the last bits differ
    assert all((a - b).norm() <= 1e-3 * a.norm() for a, b in zip(again.parameters(), anew.parameters()))
