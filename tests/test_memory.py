"""The estimate of a training step's memory against what autograd really saves, and against 7B's known sums."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import memory
import train
from clip import CLIPVisionConfig
from llava import Llava, LlavaConfig, TextConfig


def model(layers=4, **text):
    shape = {"num_hidden_layers": layers, "num_attention_heads": 4}
    text = TextConfig(vocab_size=1000, hidden_size=128, intermediate_size=344, **shape, **text)
    vision = CLIPVisionConfig(hidden_size=96, intermediate_size=384, image_size=56, patch_size=14, **shape)
    return Llava(LlavaConfig(text, vision, image_token_index=999)).train()


def saved_by(llava, dtype, rows, length):
    """Bytes that autograd holds as the backward pass begins, parameters left out."""
    ids = torch.randint(0, 900, (rows, length))
    ids[:, 1:17] = 999
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == 999, 1), "pixel_values": torch.randn(rows, 3, 56, 56)}
    known = {p.untyped_storage().data_ptr() for p in llava.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    narrow = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with saved_tensors_hooks(pack, lambda tensor: tensor), narrow:
        llava(**batch)
    gradient = 4 * rows * length * 1000  # of the logits, with which the way back begins
    return sum(size for size, _ in saved.values()) + gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", ["projector", "projector,llm", "vision,projector,llm"])
@pytest.mark.parametrize("shape", [(2, 200), (8, 64)])
def test_activations_are_what_autograd_saves(dtype, trains, shape):
    llava = model()
    train.choose_trainable(llava, trains)
    ours = memory.activations(llava, dtype, *shape, recompute=False)
    assert ours == pytest.approx(saved_by(llava, dtype, *shape), rel=0.15)


def test_recomputing_keeps_less():
    llava = model(layers=8)
    train.choose_trainable(llava, "projector,llm")
    kept = saved_by(llava, torch.float32, 2, 200)
    llava.language_model.model.recompute = True
    assert memory.activations(llava, torch.float32, 2, 200, True) < memory.activations(
        llava, torch.float32, 2, 200, False
    )
    assert saved_by(llava, torch.float32, 2, 200) < kept / 2


def test_the_sums_of_adamw():
    llava = model()
    train.choose_trainable(llava, "projector,llm")
    weights = sum(p.numel() for p in llava.parameters()) * 4
    trained = sum(p.numel() for p in llava.parameters() if p.requires_grad) * 4
    for shard, (w, g, s) in {"ddp": (1, 1, 1), "zero1": (1, 1, 8), "fsdp": (8, 8, 8)}.items():
        found = memory.estimate(llava, shard, 8, torch.float32, 1, 100, False)
        assert (found.weights, found.gradients, found.states) == (weights // w, trained // g, 2 * trained // s)


def test_what_cannot_fit_is_refused_before_it_starts(tiny, command, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(SystemExit) as caught:
        command(train, *tiny.flags["stage2"], "--out", tmp_path / "run")
    line = caught.value.code
    assert "--shard fsdp" in line and "0.001" in line and len(line.splitlines()) == 1
    assert not (tmp_path / "run").exists()
