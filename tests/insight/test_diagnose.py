"""The diagnosis finds planted faults, is silent about healthy runs, and leaves a training run as it is.

tests/tools/planted_faults.py plants all faults, and makes 23 healthy runs: docs/diagnosis.md has its table.
"""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from planted_faults import FAULTS, plant
from safetensors.torch import load_file

import train
from formats.weights import load_model
from insight import __main__ as program
from insight import diagnose, measures, rebuild
from llava import IGNORE

# The check that finds a fault which is in the code, whatever the run did.
CHECKS = {
    "labels shifted by one, in the model": diagnose.check_loss_function,
    "labels shifted by one, in the data": diagnose.check_labels,
    "loss on the questions": diagnose.check_labels,
    "images of other samples": diagnose.check_images,
    "dead activation": diagnose.check_units,
    "projector detached": diagnose.check_gradients,
    "a rank reads another's data: the order": diagnose.check_ranks,
    "KV cache off by one": diagnose.check_cache,
}


@pytest.fixture
def started(tiny):
    """A finished stage 2, built again as it started."""
    return rebuild.TrainedRun(tiny.stage2)


@pytest.mark.parametrize("name", ["clip", "decoder", "stage1", "stage2"])
def test_a_healthy_run_takes_one_line(tiny, name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["insight", str(tiny.folders[name])])
    monkeypatch.setattr(diagnose, "draw_flow", lambda run, path: None)
    with pytest.raises(SystemExit) as end:
        program.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and line.startswith("nothing found in ")


@pytest.mark.parametrize("name", CHECKS)
def test_a_fault_in_the_code_is_found(started, monkeypatch, name):
    assert CHECKS[name](started) == []
    says, run = FAULTS[name]
    plant(run.edits, monkeypatch.setattr)
    started.sample.cache_clear()
    (text,) = CHECKS[name](started)
    assert text.startswith(says.replace("64 of 64", "48 of 48"))


@pytest.mark.parametrize(
    "flags",
    [
        "--augment flip,crop",
        "--distill 0.5:2",
        "--nested-pool 9 1",
        "--task-weights instruct=2",
        "--lora llm --lora-dropout 0 --lora-plus 16 --warmup 0",
        "--relevance reinforce",
    ],
)
def test_flags_that_change_loss_or_samples_are_no_fault(tiny, command, tmp_path, flags):
    command(train, *tiny.flags["stage2"], *flags.split(), "--out", tmp_path / "run")
    run = rebuild.TrainedRun(tmp_path / "run")
    assert not diagnose.check_start(run) and not diagnose.check_replay(run)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("decoder frozen by mistake", ["replay: step 2", "decoder: 6 steps have not changed it"]),
        ("learning rate x 100, not in the log", ["replay: step 2"]),
        ("images of other samples", ["replay: step 1"]),
    ],
)
def test_a_fault_in_code_that_was_repaired_is_found_in_the_run(tiny, command, tmp_path, name, says):
    """The faulty code trained; the diagnosis has the right code."""
    with pytest.MonkeyPatch.context() as patch:
        plant(FAULTS[name][1].edits, patch.setattr)
        command(train, *tiny.flags["stage2"], "--out", tmp_path / "run")
    run = rebuild.TrainedRun(tmp_path / "run")
    found = diagnose.check_replay(run)
    run.load_trained()
    found += diagnose.check_training(run)
    assert [text[: len(start)] for text, start in zip(found, says, strict=True)] == says


def test_the_flow_is_drawn(tiny, started):
    pytest.importorskip("matplotlib")
    started.load_trained()
    diagnose.check_gradients(started)
    diagnose.draw_flow(started, tiny.root / "flow.png")
    assert (tiny.root / "flow.png").read_bytes()[1:4] == b"PNG"


# ---------------------------------------------------------------------------------------------------------------------
# single measures, against numbers computed in another way


def test_a_run_is_built_again_to_the_bit(tiny, started):
    """The start is stage 1's model, and load_trained() makes it stage 2's."""
    for folder in (tiny.stage1, tiny.stage2):
        expected = load_file(folder / "model.safetensors")
        for name, p in load_model(folder).named_parameters():
            assert torch.equal(dict(started.model.named_parameters())[name], p)
        assert expected
        started.load_trained()


def test_gradient_norms_are_those_of_backward(started):
    batch = started.batch(started.probe[:4])
    norms = measures.gradient_norms(started.model, batch)
    assert all(p.grad is None for p in started.model.parameters())
    (started.model(**batch) / measures.count_labels(batch)).backward()
    layer = started.model.language_model.model.layers[1]
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in layer.parameters()))
    assert norms["decoder"]["decoder layer 1"] == pytest.approx(expected, rel=1e-5)
    assert set(norms) == {"decoder", "projector"}


def test_dead_units_are_counted(started):
    layer = started.model.language_model.model.layers[0].mlp
    with torch.no_grad():
        layer.up_proj.weight[:40] = 0
    (text,) = measures.find_dead(started.model, started.batch(started.probe[:4]))
    assert text.startswith(f"dead units: 25% of {layer.up_proj.out_features} in decoder layer 0 ")


@pytest.mark.parametrize(("off", "negative", "found"), [(4, False, 0), (8, False, 1), (4, True, 1), (1, True, 0)])
def test_more_units_may_be_off_behind_a_relu(off, negative, found):
    """Of ten units; other activation functions have negative outputs."""
    model = torch.nn.Module()
    model.multi_modal_projector = torch.nn.ModuleDict({"linear_2": torch.nn.Linear(10, 1)})
    model.forward = lambda x: model.multi_modal_projector["linear_2"](x)
    x = torch.rand(3, 10) + 0.1
    x[0] *= -1 if negative else 1
    x[:, :off] = 0
    assert len(measures.find_dead(model, {"x": x})) == found


def test_a_blind_model_is_told_from_a_young_one(tiny, started, monkeypatch):
    started.load_trained()
    assert diagnose.check_looking(started) == [] and "too early to tell" in started.note
    monkeypatch.setattr(diagnose, "LOOK_AFTER", 8)
    (text,) = diagnose.check_looking(started)
    assert text.startswith("images: after 48 samples the loss grows by")
    with torch.no_grad():
        started.model.multi_modal_projector.linear_2.weight.zero_()
    assert diagnose.check_looking(started) == [measures.BLIND]


@pytest.mark.parametrize(("shift", "says"), [(1, "one place after"), (-1, "one place before"), (0, "no token trains")])
def test_shifted_and_missing_labels_are_found(shift, says):
    ids = torch.arange(10, 30).view(2, 10)
    labels = torch.where(ids % 10 > 5, ids, IGNORE)
    assert measures.find_labels({"input_ids": ids, "labels": labels}) == []
    wrong = torch.roll(labels, -1, 1) if shift == 1 else torch.roll(labels, 1, 1) if shift else labels * 0 + IGNORE
    (text,) = measures.find_labels({"input_ids": ids, "labels": wrong})
    assert says in text


# ---------------------------------------------------------------------------------------------------------------------
# train.py --diagnose


@pytest.mark.parametrize("flags", [[], ["--lora", "llm"]])
def test_the_live_check_changes_no_bit(tiny, command, tmp_path, flags, capsys):
    command(train, *tiny.flags["stage2"], *flags, "--diagnose", 2, "--out", tmp_path / "with")
    assert "Likely cause" not in capsys.readouterr().err
    if flags:  # dropout
        command(train, *tiny.flags["stage2"], *flags, "--out", tmp_path / "without")
    (path,) = (tmp_path / "without" if flags else tiny.stage2).glob("*model.safetensors")
    assert (tmp_path / "with" / path.name).read_bytes() == path.read_bytes()


LIVE = {"projector detached": "projector: no gradient", "labels shifted by one, in the data": "labels: they are not"}
LIVE |= {"dead activation": "dead units: 100% of"}


@pytest.mark.parametrize("name", LIVE)
def test_the_live_check_says_once_what_is_wrong(started, monkeypatch, capsys, name):
    plant(FAULTS[name][1].edits, monkeypatch.setattr)
    check = measures.LiveCheck(started.args, train.Distributed("cpu"), started.model.train())
    for step in (1, 2):
        check([started.batch(started.probe[:4])], step)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"step 1: {LIVE[name]}")


def test_the_live_check_names_what_is_frozen_or_blind(started, capsys):
    model = started.model
    model.language_model.requires_grad_(False)
    with torch.no_grad():
        model.multi_modal_projector.linear_2.weight.zero_()
    measures.LiveCheck(started.args, train.Distributed("cpu"), model)([started.batch(started.probe[:4])], 3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(". ")[0] for line in lines] == [
        "step 3: decoder: frozen, though the flags say that it trains",
        "step 3: projector: no gradient reaches projector linear_1",
        "step 3: images: the loss is the same with those of other samples",
    ]


def test_ranks_that_read_the_same_samples_are_named(started, monkeypatch):
    ranks = SimpleNamespace(world_size=3)
    batches = [started.batch(started.probe[first : first + 4])["input_ids"].tolist() for first in (0, 4, 0)]
    monkeypatch.setattr(measures.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(measures.dist, "all_gather_object", lambda found, own: found.__setitem__(slice(None), batches))
    (text,) = measures.LiveCheck(None, ranks, None).find_repeated({"input_ids": torch.tensor(batches[0])})
    assert text.startswith("ranks 0 and 2: they read the same samples")
