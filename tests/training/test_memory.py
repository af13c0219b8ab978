"""The estimate of a training step's memory against torch's allocator, and against the sums that AdamW is known for."""

import pytest
import torch
from memory_accuracy import KINDS, SPEEDRUN, SPEEDRUN_TOWER, allocated_bytes, make_batch, make_model

import train
from clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from inputs.images import BadImage
from inputs.records import DataError
from training import machine
from training.towers import Contrastive

TEXT = SPEEDRUN | {"num_hidden_layers": 2}
TOWER = SPEEDRUN_TOWER | {"image_size": 56, "patch_size": 14, "num_hidden_layers": 2}


def is_close(model, batch, dtype=torch.float32):
    """True if the estimate is within 10 % of what torch allocates."""
    found, real = machine.estimate(model, "ddp", 1, dtype, batch), allocated_bytes(model, batch, dtype)
    print(f"estimated {found.peak / 1e6:.2f} MB, allocated {real / 1e6:.2f} MB")
    return found.peak == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(("kind", "recompute"), [*((kind, False) for kind in KINDS), ("all", True), ("QLoRA", True)])
def test_the_estimate_is_what_torch_allocates(kind, recompute):
    model = make_model(TEXT, TOWER, kind, torch.float32, recompute)
    assert is_close(model, make_batch(model, 4, 120, 30))


@pytest.mark.parametrize(("kind", "recompute"), [("stage 1", False), ("stage 2", False), ("QLoRA", True)])
def test_in_bfloat16(kind, recompute):
    model = make_model(TEXT, TOWER, kind, torch.bfloat16, recompute)
    assert is_close(model, make_batch(model, 1, 60, 20), torch.bfloat16)


@pytest.mark.parametrize("supervised", [1, 40])
def test_logits_of_a_large_vocabulary(supervised):
    """Their size follows the number of supervised tokens, not of all tokens."""
    wide = {"vocab_size": 49152, "num_key_value_heads": 2, "num_hidden_layers": 1}
    model = make_model(TEXT | wide, TOWER, "stage 2", torch.float32, False)
    assert is_close(model, make_batch(model, 2, 80, supervised))


def test_precomputed_features_and_text_without_images():
    model = make_model(TEXT, TOWER, "stage 2", torch.float32, False)
    batch = make_batch(model, 4, 120, 30)
    batch["vision_features"] = model.vision_features(batch.pop("pixel_values")).detach()
    assert is_close(model, batch)
    batch["input_ids"] = batch["input_ids"] * 0
    assert is_close(model, batch | {"vision_features": None})


def test_clip_too():
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=56, patch_size=14, **shape)
    clip = Contrastive(CLIPModel(CLIPConfig(vision, CLIPTextConfig(vocab_size=900, **shape), projection_dim=64)))
    ids = torch.randint(0, 900, (16, 20))
    assert is_close(clip, {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(16, 3, 56, 56)})


def test_estimating_changes_nothing():
    model = make_model(TEXT, TOWER, "LoRA", torch.float32, True)
    before, state = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    machine.estimate(model, "ddp", 1, torch.float32, make_batch(model, 2, 60, 20))
    torch.set_rng_state(state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_recomputation_saves_activations():
    found = [
        machine.estimate(model, "ddp", 1, torch.float32, make_batch(model, 8, 120, 30))
        for model in (make_model(SPEEDRUN, TOWER, "stage 2", torch.float32, recompute) for recompute in (False, True))
    ]
    assert found[1].activations < found[0].activations / 1.5 and found[1].peak < found[0].peak


def test_the_sums_of_adamw():
    model = make_model(TEXT, TOWER, "stage 2", torch.float32, False)
    batch = make_batch(model, 1, 100, 40)
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    for shard, (w, g, s) in {"ddp": (1, 1, 1), "zero1": (1, 1, 8), "fsdp": (8, 8, 8)}.items():
        found = machine.estimate(model, shard, 8, torch.float32, batch)
        whole = machine.unsharded_bytes(model, torch.float32) if shard == "fsdp" else 0
        assert (found.weights - whole, found.gradients, found.states) == (weights // w, trained // g, 2 * trained // s)
        assert found.step > found.gradients  # DDP's buckets exist all the time, and activations come on top


class Broken:
    """Three samples, the second of which cannot be read."""

    def __len__(self):
        return 3

    def sample(self, index):
        if index == 1:
            raise BadImage("torn")
        if index == 3:
            raise DataError("none")
        return {"ids": [1] * (index + 2), "labels": [1] * (index + 2)}


def test_the_largest_batch_leaves_out_what_is_broken():
    batch = machine.largest_batch(Broken(), 4, pad_id=0)
    assert batch["input_ids"].shape == (4, 4) and (batch["input_ids"][:, -1] != 0).tolist() == [True, False] * 2


def test_what_cannot_fit_is_refused_before_it_starts(tiny, command, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda device: 1_000_000)
    with pytest.raises(SystemExit) as caught:
        command(train, *tiny.flags["stage2"], "--out", tmp_path / "run")
    line = caught.value.code
    assert "only 0.001 GB are available. Try:" in line and "--shard fsdp" in line and len(line.splitlines()) == 1
    assert not (tmp_path / "run").exists()
