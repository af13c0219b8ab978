"""A checkpoint, an adapter and a stopped run written by the first layout (commit 408b8b4) still load and go on.

tests/fixtures/old_layout was written by that code: a tiny LLaVA of 30 steps, a LoRA adapter for it, and a stage-1 run
that was killed after step 5 of 6. expected.json holds what that code computed with them.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prompts import prompt_ids

import train
from data import Records, collate, load_image
from formats.adapters import load_with_adapter
from inputs.mixture import open_sources
from llava import generate

FIXTURE = Path(__file__).parents[1] / "fixtures/old_layout"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


@pytest.fixture
def old(tmp_path) -> SimpleNamespace:
    """A copy of the fixture, with the folder's path in place of OLD_LAYOUT, as training writes paths."""
    root = tmp_path / "old"
    shutil.copytree(FIXTURE, root, symlinks=True)
    for path in (*root.glob("*/run.json"), root / "adapter/adapter_config.json"):
        path.write_text(path.read_text().replace("OLD_LAYOUT", str(root)))
    return SimpleNamespace(root=root, model=root / "model", adapter=root / "adapter", run=root / "run")


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_an_old_model_computes_and_answers_as_before(old, kind):
    expected = EXPECTED[kind]
    adapter = old.adapter if kind == "adapter" else None
    model, tokenizer = load_with_adapter(old.model, adapter, "cpu", torch.float32, 16)
    sources = open_sources([str(old.root / "data.json")], [str(old.root / "images")])
    dataset = Records(sources, tokenizer, model.config, 512)
    with torch.no_grad():
        losses = [float(model(**collate([dataset[i]], tokenizer.pad_id))) for i in range(4)]
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    image = load_image(old.root / "images", "0.png", model.config)
    prompt = prompt_ids([EXPECTED["question"]], [], 1, tokenizer, model.config.template, [image.tokens])
    assert prompt == expected["prompt"]
    answer = [i for (i,) in generate(model, [prompt], model.vision_features(image.pixels), max_new_tokens=12)]
    assert answer == expected["answer"]


def test_an_old_stopped_run_resumes(old, command):
    """The last three losses are those of the old code's uninterrupted run."""
    flags = ["--stage", 1, "--model", old.model, "--data", old.root / "data.json", "--images", old.root / "images"]
    flags += ["--device", "cpu", "--dtype", "float32", "--batch-size", 4, "--steps", 6, "--save-every", 3]
    command(train, *flags, "--template", "llava_hf", "--out", old.run, "--resume")
    losses = [json.loads(line)["loss"] for line in (old.run / "log.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(EXPECTED["run"]["losses"], rel=1e-5)
    assert json.loads((old.run / "run.json").read_text())["finished"]


def test_training_goes_on_from_an_old_model(old, command):
    flags = ["--stage", 2, "--model", old.model, "--data", old.root / "data.json", "--images", old.root / "images"]
    command(train, *flags, "--device", "cpu", "--batch-size", 4, "--steps", 2, "--out", old.root / "further")
    assert (old.root / "further/model.safetensors").exists()
