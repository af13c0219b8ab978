"""The probability of an answer: equal to transformers' on the exported model, and consistent with generation."""

import pytest
import torch

from data import load_image, render_dialogue
from evaluation.likelihood import answer_likelihood
from evaluation.many import find_images
from formats.weights import load_model
from inputs.images import open_image
from inputs.records import Turn, question_turn
from inputs.tokenizer import Tokenizer
from llava import generate


@pytest.fixture(scope="module")
def llava(babbler):
    return load_model(babbler), Tokenizer.load(babbler)


@pytest.fixture(scope="module")
def names(tiny):
    return find_images(tiny.world / "heldout-0")[:3]


@pytest.mark.parametrize("images", [0, 1, 3])
def test_it_is_the_one_of_transformers(tiny, babbler, llava, names, images):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(babbler)
    processor = transformers.AutoProcessor.from_pretrained(babbler)
    opened = [open_image(tiny.world / "heldout-0" / name) for name in names[:images]]
    content = [{"type": "image"} for _ in opened] + [{"type": "text", "text": "What is this?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    for answer in ("red", "a large blue circle", "7 < 8"):
        inputs, start = (
            processor(text=text, images=opened or None, return_tensors="pt") for text in (f"{prompt} {answer}", prompt)
        )
        start = start["input_ids"].shape[1]
        with torch.inference_mode():
            logs = theirs(**inputs).logits[0, start - 1 : -1].double().log_softmax(-1)
        ids = inputs["input_ids"][0, start:]
        want = logs[range(len(ids)), ids].sum().item()
        prepared = [load_image(tiny.world / "heldout-0", name, llava[0].config) for name in names[:images]]
        value, _ = answer_likelihood(*llava, question_turn("What is this?", images), prepared, answer)
        assert value == pytest.approx(want, abs=2e-4) and value < -1, answer


def test_an_answer_is_greedy_if_generation_gives_it(tiny, llava, names):
    model, tokenizer = llava
    image, checked = load_image(tiny.world / "heldout-0", names[0], model.config), 0
    for length in range(1, 4):
        for text in ("Red?", "What is this?", "How many shapes are there?", "Where is the circle?"):
            turn = question_turn(text, 1)
            prompt, _ = render_dialogue([turn], tokenizer, model.config.template, [image.tokens])
            features = model.vision_features(image.pixels)
            ids = [i for (i,) in generate(model, [prompt], features, max_new_tokens=length)]
            answer = tokenizer.decode(ids)
            if tokenizer.encode(answer) == ids and answer.startswith(" "):  # the text of an answer gives the same ids
                likely, is_greedy = answer_likelihood(model, tokenizer, turn, [image], answer[1:])
                assert is_greedy
                changed = answer_likelihood(model, tokenizer, turn, [image], answer[1:] + " blue")
                assert changed[0] < likely and not changed[1]
                checked += 1
    assert checked


def test_an_answer_that_does_not_fit_is_refused(llava):
    with pytest.raises(ValueError, match="do not fit: the context holds 1024"):
        answer_likelihood(*llava, Turn("Red?", None), [], "red " * 1100)
