"""Nested pooling: a step is one of a model with that budget; the scale follows from seed and step."""

import json
from collections import Counter

import pytest
import torch
from test_llava import IMAGE
from test_token_budget import PATCHES, images, make, prompt

import train
from data import collate
from formats.configs import read_config
from llava import IGNORE
from variants.nested_pool import NestedPool, halvings


def rows(tokens):
    """Samples with one image, two images in a row, and none; the last token of each is trained."""
    ids = [prompt(9, tokens, 1), [IMAGE] * 2 * tokens + [4, 5, 6], [7, 8, 9, 10]]
    return [{"ids": row, "labels": [IGNORE] * (len(row) - 1) + row[-1:]} for row in ids]


def test_scales_are_those_of_the_paper():
    assert halvings(576) == [576, 144, 36, 9, 1] and halvings(36) == [36, 9, 1] and halvings(1) == [1]


@pytest.mark.parametrize("tokens", [16, 9, 4, 1])
def test_a_step_is_that_of_a_model_with_so_many_tokens(tokens):
    nested, limited = make(), make(f"{tokens}:pool")
    pooling = NestedPool(nested, [tokens], seed=0)
    got, want = pooling(collate(rows(PATCHES), pad_id=0), step=3), collate(rows(tokens), pad_id=0)
    assert all(torch.equal(got[key], want[key]) for key in ("input_ids", "labels"))
    gradients = []
    for model, batch in ((nested, got), (limited, want)):
        loss = model.train()(batch["input_ids"], batch["labels"], pixel_values=images(3))
        gradients.append([loss, *torch.autograd.grad(loss, list(model.multi_modal_projector.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and gradients[0][1].abs().sum() > 0


def test_the_scale_follows_from_seed_and_step():
    batch, draws = collate(rows(PATCHES), pad_id=0), {}
    for seed in (0, 1):
        pooling = NestedPool(make(), [], seed)
        for step in reversed(range(300)):  # in another order: the past does not matter
            pooling(batch, step)
            draws[seed, step] = pooling.tokens
    again = NestedPool(make(), [], 0)
    for step in range(5):
        again(batch, step)
        assert again.tokens == draws[0, step]
    counts = Counter(draws[0, step] for step in range(300))
    assert set(counts) == {16, 4, 1} and min(counts.values()) > 75
    assert any(draws[0, step] != draws[1, step] for step in range(9))


@torch.no_grad()
def test_validation_and_answers_read_all_tokens():
    plain, nested, batch = make(), make(), collate(rows(PATCHES), pad_id=0)
    NestedPool(nested, [4], seed=0)(batch, step=0)
    loss = [model.eval()(batch["input_ids"], batch["labels"], pixel_values=images(3)) for model in (plain, nested)]
    assert torch.equal(*loss)


def test_training_draws_scales_and_is_resumed_bit_for_bit(tiny, command, tmp_path, monkeypatch):
    draws, call = [], NestedPool.__call__

    def stop(self, batch, step):
        if len(draws) == 3:
            raise KeyboardInterrupt
        draws.append(step)
        return call(self, batch, step)

    flags = [*tiny.flags["stage2"], "--nested-pool", 9, 4, 1]
    command(train, *flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(NestedPool, "__call__", stop)
        command(train, *flags, "--out", tmp_path / "stopped")
    command(train, *flags, "--out", tmp_path / "stopped", "--resume")
    weights = {name: (folder / "model.safetensors").read_bytes() for name, folder in folders(tiny, tmp_path).items()}
    assert draws == [0, 1, 2] and weights["whole"] == weights["stopped"] != weights["plain"]
    losses = {name: read_losses(folder) for name, folder in folders(tiny, tmp_path).items()}
    assert losses["whole"] == losses["stopped"]
    assert read_config(tmp_path / "whole") == read_config(tiny.stage2)


def folders(tiny, tmp_path):
    return {"plain": tiny.stage2, "whole": tmp_path / "whole", "stopped": tmp_path / "stopped"}


def read_losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "scales, reason", [((5,), "--nested-pool 5:pool: pool needs a square"), ((4, 4), "comes twice")]
)
def test_impossible_scales_are_refused_in_one_line(scales, reason):
    with pytest.raises(ValueError, match=reason):
        NestedPool(make(), list(scales), 0)
