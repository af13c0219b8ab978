"""Real checkpoints give the values that other programs recorded. To run it, download the checkpoints:

    LLAVA_WEIGHTS=/models pytest tests/formats/test_reference_values.py

/models holds folders with their names on the hub: clip-vit-base-patch32, Llama-2-7b-hf, llava-1.5-7b-hf. The recorded
values are in reference_values.json in the folder LLAVA_DATA. A test whose files are missing is skipped.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from prompts import prompt_ids

from data import image_pixels
from formats.weights import load_clip, load_model, load_tokenizer
from inputs.images import open_image
from inputs.tokenizer import Tokenizer
from llava import generate

WEIGHTS = Path(os.environ.get("LLAVA_WEIGHTS", "no folder named"))
DATA = Path(os.environ.get("LLAVA_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = {"device": DEVICE, "dtype": torch.float16 if DEVICE == "cuda" else torch.float32}


def folder(name):
    if not (WEIGHTS / name).exists():
        pytest.skip(f"{name} is not below LLAVA_WEIGHTS")
    return WEIGHTS / name


@pytest.fixture
def recorded():
    path = DATA / "reference_values.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return json.loads(path.read_text())


def test_clip_label_probabilities(recorded):
    want, source = recorded["openai_clip_readme"], folder("clip-vit-base-patch32")
    model, tokenizer = load_clip(source), Tokenizer.load(source)
    pixels = image_pixels(open_image(DATA / want["image"]), 224, "square")[None]
    rows = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in want["texts"]]
    longest = max(map(len, rows))
    texts = torch.tensor([row + [tokenizer.eos_id] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        images, words = model(texts, pixels)
        got = (model.logit_scale.exp() * images @ words.T).softmax(-1)[0]
    torch.testing.assert_close(got, torch.tensor(want["label_probs"]), atol=0.01, rtol=0.1)


def test_llama2_logits(recorded):
    want = recorded["hf_llama2_7b_logits_fp16"]
    model = load_model(folder("Llama-2-7b-hf"), **HALF)
    ids = torch.tensor([want["input_ids"]], device=DEVICE)
    with torch.inference_mode():
        logits = model.language_model.lm_head(model.language_model.model(model.embed(ids)))[0].float().cpu()
    torch.testing.assert_close(logits.mean(-1), torch.tensor(want["mean_over_vocab_A100"]), atol=0.03, rtol=0.01)
    torch.testing.assert_close(logits[0, :15], torch.tensor(want["logits[0,0,:15]_A100"]), atol=0.05, rtol=0.01)


def test_llama2_greedy_continuations(recorded):
    want, source = recorded["hf_llama2_7b_greedy_fp16_40tok"], folder("Llama-2-7b-hf")
    model = load_model(source, **HALF)
    tokenizer = load_tokenizer(source, model.config)
    for prompt, text in zip(want["prompts"], want["outputs"]):
        ids = prompt_ids([prompt], [], 0, tokenizer, "raw", 0)
        new = [i for (i,) in generate(model, [ids], max_new_tokens=40)]
        assert tokenizer.decode(ids + new) == text


def test_llava_describes_two_cats(recorded):
    """Recorded in 4 bits, so only the first words are compared. The image is COCO's val2017/000000039769."""
    source, image = folder("llava-1.5-7b-hf"), folder("000000039769.jpg")
    model = load_model(source, **HALF)
    tokenizer, config = load_tokenizer(source, model.config), model.config
    ids = prompt_ids(["What is this?"], [], 1, tokenizer, "llava_hf", config.vision_config.num_patches)
    pixels = image_pixels(Image.open(image).convert("RGB"), config.vision_config.image_size, config.image_mode)
    with torch.inference_mode():
        features = model.vision_features(pixels[None].to(DEVICE))
    text = tokenizer.decode([i for (i,) in generate(model, [ids], features, max_new_tokens=20)])
    expected = recorded["hf_llava15_7b_nf4_batched"]["expected"][1].split("ASSISTANT: ")[1]
    assert text.strip().split()[:5] == expected.split()[:5]
