"""The estimate of a training step's memory against what autograd really saves, and against 7B's known sums."""

import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memory
import train
from clip import CLIPVisionConfig
from llava import Llava, LlavaConfig, TextConfig
from lora import add_lora
from nf4 import NF4Linear


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


class Allocated(TorchDispatchMode):
    """Bytes of all tensors that are alive, those of `known` among them, and the most there were."""

    def __init__(self, known):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0
        for tensor in known:
            self.count(tensor)

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result


def peak_of_a_step(llava, batch):
    """Bytes that torch holds at most in a training step, the parameters and AdamW's states among them."""
    optimizer = torch.optim.AdamW([p for p in llava.parameters() if p.requires_grad], fused=True)
    for _ in range(2):  # the states exist from the first step on
        states = [value for state in optimizer.state.values() for value in state.values()]
        with Allocated([*llava.parameters(), *states]) as allocated:
            llava(**batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return allocated.peak


@pytest.mark.parametrize("kind", ["full", "LoRA", "QLoRA"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_whole_estimate_is_what_torch_allocates(kind, recompute):
    torch.manual_seed(0)
    llava = model(layers=6)
    train.choose_trainable(llava, "projector,llm" if kind == "full" else "projector")
    if kind == "QLoRA":
        for path, module in list(llava.language_model.model.layers.named_modules()):
            if isinstance(module, torch.nn.Linear):
                llava.language_model.model.layers.set_submodule(path, NF4Linear.of(module.weight))
    if kind != "full":
        add_lora(llava, {"llm": 8}, None, 0.0)
    llava.language_model.model.recompute = recompute
    ids = torch.randint(0, 900, (4, 200))
    found = memory.estimate(llava, "ddp", 1, torch.float32, 4, 200, recompute)
    peak = peak_of_a_step(llava, {"input_ids": ids, "labels": ids})
    print(f"{kind}: estimated {(found.fixed + found.activations) / 1e6:.1f} MB, allocated {peak / 1e6:.1f} MB")
    assert found.fixed + found.activations == pytest.approx(peak, rel=0.1)


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
