"""LoRA for images only: text alone is the base model's, bit for bit, and images get the whole update."""

import json
import queue

import pytest
import torch

import train
from data import load_image, render_dialogue
from formats import __main__ as formats_cli
from formats.adapters import load_with_adapter
from formats.weights import load_model
from inputs.files import read_json, write_json
from inputs.records import Turn
from llava import generate
from lora import lora_layers
from sample import Chat
from serve.engine import Engine, Job


@pytest.fixture(scope="module")
def adapter(tiny, command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image-lora") / "run"
    command(train, *tiny.flags["stage2"], "--lora", "llm", "--lora-images-only", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def models(tiny, adapter, tmp_path_factory):
    """(base, with the adapter, with the adapter as an ordinary one), the updates enlarged, and their tokenizer."""
    ordinary = tmp_path_factory.mktemp("ordinary")
    for path in adapter.iterdir():
        if path.is_file():
            (ordinary / path.name).write_bytes(path.read_bytes())
    values = read_json(ordinary / "config.json")
    assert values.pop("lora_images_only") is True
    write_json(ordinary / "config.json", values)
    gated, tokenizer = load_with_adapter(adapter, None, "cpu", torch.float32)
    plain, _ = load_with_adapter(ordinary, None, "cpu", torch.float32)
    for model in (gated, plain):
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(
                layer.lora_B.weight, generator=torch.Generator().manual_seed(len(layer.lora_B.weight))
            )
    return load_model(tiny.stage1), gated, plain, tokenizer


def prompts(models, world, kinds):
    """Prompts with the given numbers of images, and the images' features."""
    _, gated, _, tokenizer = models
    names = sorted(str(path.relative_to(world)) for path in world.glob("train-0/**/*.png"))
    turns = [Turn(f"What is {'here ' * (i + 1)}?", None, images) for i, images in enumerate(kinds)]
    images = [load_image(world, names[i], gated.config) for i in range(sum(kinds))]
    features = gated.vision_features(torch.cat([image.pixels for image in images])) if images else None
    return [render_dialogue([turn], tokenizer, "llava_hf", 9)[0] for turn in turns], features


def answer(model, rows, features):
    with torch.no_grad():
        return list(zip(*generate(model, rows, features, max_new_tokens=12)))


@pytest.mark.parametrize("keep", ["some tokens", "all tokens"])
@torch.no_grad()
def test_each_row_of_a_batch_gets_its_own_model(models, tiny, keep):
    base, gated, plain, _ = models
    rows, features = prompts(models, tiny.world, [0, 1, 0, 2])
    ids = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    mask = None if keep == "all tokens" else torch.arange(ids.shape[1]).expand_as(ids) % 2 == 0
    states = []
    for model in (gated, base, plain):
        model.multi_modal_projector.load_state_dict(gated.multi_modal_projector.state_dict())
        found = model.language_model.model(model.embed(ids, features), keep=mask)
        states.append(found.view(4, -1, found.shape[-1]))
    text, images = [0, 2], [1, 3]
    assert torch.equal(states[0][text], states[1][text]) and torch.equal(states[0][images], states[2][images])
    assert not torch.allclose(states[0][text], states[2][text]) and not torch.allclose(
        states[0][images], states[1][images]
    )


def test_answers_in_a_batch_and_in_the_server(models, tiny):
    base, gated, plain, tokenizer = models
    rows, features = prompts(models, tiny.world, [0, 1, 0, 2])
    together = answer(gated, rows, features)
    alone = [answer(gated, [row], part)[0] for row, part in zip(rows, (None, features[:1], None, features[1:]))]
    assert together == alone and together[0] == answer(base, rows[:1], None)[0]
    assert together[3] == answer(plain, rows[3:], features[1:])[0] and together[0] != answer(plain, rows[:1], None)[0]
    names = sorted(str(path.relative_to(tiny.world)) for path in tiny.world.glob("train-0/**/*.png"))
    images = [[], [0], [], [1, 2]]
    jobs = [
        Job(row, [load_image(tiny.world, names[i], gated.config) for i in own], 12) for row, own in zip(rows, images)
    ]
    engine = Engine(gated, tokenizer, rows=3)
    for job in jobs:
        job.pieces = queue.Queue()
        job.send = lambda piece, reason, job=job: job.pieces.put(reason)
    engine.submit(jobs[0]), engine.submit(jobs[1]), engine.submit(jobs[2]), engine.submit(jobs[3])
    for job in jobs:
        while not job.pieces.get(timeout=60):
            pass
    engine.close()
    assert [tuple(job.ids) for job in jobs] == [tuple(i for i in row if i is not None) for row in together]


def test_a_conversation_keeps_its_image(models, tiny):
    _, gated, plain, tokenizer = models
    image = sorted(tiny.world.glob("train-0/**/*.png"))[0]
    chats = [Chat(model, tokenizer, [image], max_new_tokens=8) for model in (gated, plain)]
    for question in ("What is it?", "And what else?"):  # the second reads text only, after the image in its cache
        for chat in chats:
            "".join(chat.ask(question))
        assert chats[0].last["ids"] == chats[1].last["ids"]


def test_merging_says_that_text_changes_too(tiny, adapter, command, tmp_path, capsys):
    command(formats_cli, "merge", tiny.stage1, adapter, tmp_path / "merged")
    assert "applies to text without an image, too" in capsys.readouterr().out
    assert "lora_images_only" not in json.loads((tmp_path / "merged/config.json").read_text())


def test_the_flag_needs_lora(tiny, command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(train, *tiny.flags["stage2"], "--lora-images-only", "--out", tmp_path / "run")
    assert "--lora-images-only needs --lora" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(train, *tiny.flags["stage2"], "--lora", "vision", "--lora-images-only", "--out", tmp_path / "run")
    assert "--lora-images-only is for the decoder" in capsys.readouterr().err


def test_a_map_between_two_steps_changes_no_answer(models, tiny):
    """A pass over an image without a cache, as for a map, leaves the rows of text alone."""
    _, gated, _, tokenizer = models
    (text, seen), features = prompts(models, tiny.world, [0, 1])
    engine = Engine(gated, tokenizer, rows=2)

    def ask():
        job, pieces = Job(text, [], 20), queue.Queue()
        job.send = lambda piece, reason: pieces.put((piece, reason))
        engine.submit(job)
        return job, pieces

    def look():
        with torch.inference_mode():
            gated.language_model.model(gated.embed(torch.tensor([seen]), features))
        return "drawn"

    job, pieces = ask()
    while not pieces.get(timeout=60)[1]:
        pass
    other, pieces = ask()
    reasons = []
    while not any(reasons):
        assert engine.call(look) == "drawn"
        while not pieces.empty():
            reasons.append(pieces.get()[1])
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0)
    engine.close()
    assert other.ids == job.ids
