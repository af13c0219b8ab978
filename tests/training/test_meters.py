"""FLOPs against torch's own counter, gradient norms and clipping against torch's, the dashboards, the plots."""

import json
import re
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
from lora import NF4Linear, add_lora
from training import meters, plots


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
    train.choose_trainable(llava, trains.split(","))
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
    train.choose_trainable(llava, ["projector"])
    if bits == 4:
        for path, module in list(llava.language_model.model.layers.named_modules()):
            if isinstance(module, torch.nn.Linear):
                llava.language_model.model.layers.set_submodule(path, NF4Linear.from_weight(module.weight))
    add_lora(llava, parts, None, 0.0)
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == 96, 5)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        llava(**batch).backward()
    ours = meters.step_flops(llava, 2 * 64, 64, tiles=2)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("TPU", None),
    ],
)
def test_a_device_is_found_by_whole_words_of_its_name(name, peak):
    assert meters.peak_flops(name) == peak


def test_lengths_leave_out_the_padding():
    samples = [{"ids": list(range(n)), "labels": [IGNORE] * (n - 2) + [1, 2]} for n in (5, 9, 3)]
    batch = collate([sample | {"pixel_values": [], "image_sizes": []} for sample in samples], pad_id=0)
    assert meters.row_lengths(batch["labels"]).tolist() == [5, 9, 3]


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


def test_runs_are_drawn_over_each_other(tiny, command, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "both.png"
    command(plots, tiny.stage1, tiny.stage2, "--out", path)
    assert capsys.readouterr().out.strip() == str(path) and path.read_bytes().startswith(b"\x89PNG")


def test_a_log_that_is_still_being_written_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    plots.compare_runs([tmp_path], tmp_path / "curve.png")
    assert plots.read_log(tmp_path) == [{"step": 1, "loss": 2.0}] and (tmp_path / "curve.png").exists()


@pytest.mark.parametrize(("log", "words"), [(None, "not a run"), ("", "no step is logged")])
def test_what_cannot_be_drawn_is_one_line(command, tmp_path, log, words):
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    with pytest.raises(SystemExit) as caught:
        command(plots, tmp_path, "--out", tmp_path / "x.png")
    assert words in caught.value.code and str(tmp_path) in caught.value.code and "\n" not in caught.value.code


def test_a_skipped_step_is_not_drawn():
    steps, values = plots.column(
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}], "loss"
    )
    assert steps.tolist() == [1, 3] and values.tolist() == [2.0, 1.0]


def test_the_progress_bar_of_a_run_ends_at_its_last_step(tiny, command, tmp_path, capsys):
    command(train, *tiny.flags["stage1"], "--out", tmp_path / "run")
    last = capsys.readouterr().err.rsplit("\r", 1)[-1]
    assert re.search(r"run: 100%.* 6/6 .*loss=", last), last
