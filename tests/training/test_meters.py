"""What is said of a step, against torch's own count of operations, the weights before and after, stand-in boards."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from clip import CLIPVisionConfig
from data import collate
from llava import IGNORE, Llava, LlavaConfig, TextConfig
from lora import add_lora
from nf4 import NF4Linear
from training import meters, plots

RANKS = train.Distributed("cpu")


def model():
    text = TextConfig(vocab_size=97, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4)
    shape = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=56, patch_size=14, projection_dim=48, **shape)
    return Llava(LlavaConfig(text, vision, image_token_index=96, vision_feature_layer=-2)).train()


def batch_of(length, rows=2, patches=16):
    ids = torch.randint(0, 96, (rows, length))
    ids[:, 1 : 1 + patches] = 96
    pixels = torch.randn(rows, 3, 56, 56)
    return {"input_ids": ids, "labels": ids, "pixel_values": pixels}


@pytest.mark.parametrize("trains", ["projector", "projector,llm", "vision,projector,llm"])
def test_arithmetic_is_what_torch_counts(trains):
    """Of a step of which every token is trained on. The formula leaves out the projector, norms and the like."""
    torch.manual_seed(0)
    llava, batch = model(), batch_of(64)
    train.choose_trainable(llava, trains)
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == 96, 5)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused kernel is not counted
        llava(**batch).backward()
    ours = meters.step_flops(llava, 2 * 64, 64, tiles=2)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("parts", [{"llm": 8}, {"llm": 8, "vision": 8}])
def test_arithmetic_under_lora_is_what_torch_counts(parts, bits):
    torch.manual_seed(0)
    llava, batch = model(), batch_of(64)
    train.choose_trainable(llava, "projector")
    if bits == 4:
        for path, module in list(llava.language_model.model.layers.named_modules()):
            if isinstance(module, torch.nn.Linear):
                llava.language_model.model.layers.set_submodule(path, NF4Linear.of(module.weight))
    add_lora(llava, parts, None, 0.0)
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == 96, 5)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        llava(**batch).backward()
    ours = meters.step_flops(llava, 2 * 64, 64, tiles=2)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_a_device_is_known_by_the_longest_name():
    devices = {
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "TPU": None,
    }
    for name, peak in devices.items():
        assert next((value for key, value in meters.PEAKS.items() if key in name), None) == peak
    assert meters.peak_flops(torch.device("cpu")) is None


def test_lengths_leave_out_the_padding():
    samples = [{"ids": list(range(n)), "labels": [IGNORE] * (n - 2) + [1, 2]} for n in (5, 9, 3)]
    batch = collate([sample | {"pixel_values": [], "image_sizes": []} for sample in samples], pad_id=0)
    assert meters.row_lengths(batch["labels"]).tolist() == [5, 9, 3]


@pytest.mark.parametrize("steps", [1, 7])
def test_update_norms_are_how_far_the_weights_moved(monkeypatch, steps):
    monkeypatch.setattr(meters, "PIECE", 100)
    torch.manual_seed(0)
    llava, args = model(), train.read_flags("", ["--stage", "2", "--lr", "1e-3", "--steps", "20"])
    train.choose_trainable(llava, args.train)
    optimizer = train.make_optimizer(llava, args, RANKS)
    for step in range(steps):
        before = {name: p.detach().clone() for name, p in llava.named_parameters()}
        train.train_step(args, RANKS, llava, optimizer, [batch_of(40)], step)
    norms = meters.update_norms(optimizer, RANKS, "ddp")
    for component in ("language_model", "multi_modal_projector"):
        moved = [
            (p.detach() - before[name]).square().sum()
            for name, p in llava.named_parameters()
            if name.startswith(component)
        ]
        assert norms[component] == pytest.approx(float(sum(moved).sqrt()), rel=1e-3)


@pytest.mark.parametrize("most", [0.0, 0.01, 1e9])
def test_gradients_are_clipped_as_torch_does(most):
    torch.manual_seed(0)
    llava = model()
    optimizer = SimpleNamespace(param_groups=[{"component": "all", "params": list(llava.parameters())}])
    llava(**batch_of(40)).backward()
    ours = {name: p.grad.clone() for name, p in llava.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(llava.parameters(), most or float("inf"))
    theirs = {name: p.grad.clone() for name, p in llava.named_parameters() if p.grad is not None}
    for name, p in llava.named_parameters():
        p.grad = ours.get(name)
    assert meters.gradient_norms(optimizer)["all"] == pytest.approx(float(norm))
    meters.clip_gradients(optimizer, float(norm), most)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=0) for name in theirs)


def test_boards_get_every_number(tiny, command, tmp_path, monkeypatch):
    shown = {"wandb": [], "tensorboard": []}
    wandb = ModuleType("wandb")
    wandb.init = lambda **more: shown.update(init=more)
    wandb.log = lambda row, step: shown["wandb"].append(row)
    writer = SimpleNamespace(add_scalar=lambda key, value, step: shown["tensorboard"].append((key, value, step)))
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda folder: writer
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(meters, "missing_boards", lambda names: [])
    command(train, *tiny.flags["stage2"], "--out", tmp_path / "run", "--board", "tensorboard", "wandb")
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in shown["wandb"]] == [row["loss"] for row in rows]
    assert ("grad_norms/language_model", rows[1]["grad_norms"]["language_model"], 2) in shown["tensorboard"]
    assert shown["init"]["config"]["lr"] == rows[0]["lr"]


def test_a_board_that_is_not_there_is_named(command, capsys, monkeypatch):
    monkeypatch.setattr(meters, "missing_boards", lambda names: names)
    with pytest.raises(SystemExit):
        command(train, "--stage", 2, "--board", "wandb")
    assert "pip install wandb" in capsys.readouterr().err.splitlines()[-1]


def test_runs_are_drawn_over_each_other(tiny, command, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(train.runs, "OUTPUT_ROOT", tmp_path)
    command(train, "--plot", tiny.stage1, tiny.stage2)
    path = tmp_path / "runs.png"
    assert capsys.readouterr().out.strip() == str(path) and path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as caught:
        command(train, "--plot", tmp_path / "nothing")
    assert "not a run" in caught.value.code


def test_a_skipped_step_is_not_drawn():
    steps, values = plots.column(
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}], "loss"
    )
    assert steps.tolist() == [1, 3] and values.tolist() == [2.0, 1.0]
