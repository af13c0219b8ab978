"""What is forgotten: the formulas on a worked example, a tiny table of remedies and a tiny matrix from end to end."""

import argparse

import pytest

from inputs.files import read_json, write_json
from world import forgetting
from world.forgetting import REMEDIES

MATRIX = [[90.0, 10.0, 5.0], [60.0, 80.0, 20.0], [70.0, 85.0, 95.0]]  # after each of three stages


def test_the_formulas_on_a_worked_example():
    assert forgetting.backward_transfer(MATRIX) == ((70 - 90) + (85 - 80)) / 2
    assert forgetting.forgetting(MATRIX) == ((90 - 70) + (80 - 85)) / 2
    better_later = [[50.0, 0.0, 0.0], [70.0, 80.0, 0.0], [60.0, 80.0, 90.0]]  # the largest earlier value, not the first
    assert forgetting.forgetting(better_later) == (10 + 0) / 2 and forgetting.backward_transfer(better_later) == 5
    assert forgetting.brought_back(80, 30, 70) == 80 and forgetting.brought_back(30, 30, 70) is None


@pytest.fixture
def small(in_process, monkeypatch):
    """A small new world, and the list of the commands that ran."""
    monkeypatch.setattr(forgetting, "IMAGES", 8)
    monkeypatch.setattr(forgetting, "KEPT", 20)
    return in_process


def test_remedies_differ_in_what_they_say_only(tiny, tmp_path, monkeypatch):
    write_json(tiny.root / "speedrun.json", {"seed": 0})
    args = argparse.Namespace(speedrun=tiny.root, out=tmp_path, shift="gray", questions=10, seeds=[3], steps=5)
    args.run_name = "stage2"
    args.only = list(REMEDIES)
    commands = {step.name: " ".join(step.command) for step in forgetting.plan_remedies(args)}
    assert len(commands) == 5 + 3 * len(REMEDIES)
    base = commands["seed 3, none"]
    assert f"--model {tmp_path}/before" in base and "--seed 3" in base and "--shares" not in base
    assert commands["seed 3, replay 5 %, average"].endswith(
        "seed3/replay-5 " + f"{tmp_path}/seed3/replay-5-average --share 0.5"
    )
    for name in ("EWC", "distillation", "LoRA"):
        assert commands[f"seed 3, {name}"] == " ".join([base.replace("/none", f"/{name}"), *REMEDIES[name].flags])
    assert "--shares 5/95" in commands["seed 3, replay 5 %"]
    assert f"average {tmp_path}/before {tmp_path}/seed3/none" in commands["seed 3, average"]
    assert "--shift gray" in commands["new world"] and "--seed 0" in commands["new world"]


def test_a_tiny_table_and_a_tiny_matrix(tiny, tmp_path, command, small, capsys):
    write_json(tiny.root / "speedrun.json", {"seed": 0})
    argv = ["remedies", "--speedrun", tiny.root, "--steps", 2, "--seeds", 0, "--questions", 10, "--out", tmp_path]
    argv += ["--only", "replay 5 %, average", "average"]
    command(forgetting, *argv)
    text = (tmp_path / "remedies.md").read_text()
    assert text in capsys.readouterr().out and "| replay 5 % |" in text and "Lost without a remedy" in text
    found = read_json(tmp_path / "remedies.json")
    assert (
        list(found) == ["before", "none", "replay 5 %", "average", "replay 5 %, average"] and len(found["average"]) == 1
    )
    assert set(found["none"][0]["old"]) > {"overall", "color"} and (tmp_path / "remedies.png").stat().st_size > 10_000
    count = len(small)
    command(forgetting, *argv)
    assert len(small) == count  # nothing runs twice

    out, models = tmp_path / "matrix", [tmp_path / "before", tmp_path / "seed0/none"]
    argv = ["matrix", "--models", *models, "--worlds", tiny.world, tmp_path / "world", "--questions", 10, "--out", out]
    command(forgetting, *argv, "--text", forgetting.__file__)
    result = read_json(out / "matrix.json")
    old = read_json(tmp_path / "remedies.json")["none"][0]["old"]["overall"]
    assert result["matrix"][1][0] == pytest.approx(old) and (out / "matrix.png").exists()
    assert result["forgetting"] == -result["backward transfer"] == result["matrix"][0][0] - old
    assert "perplexity" in (out / "matrix.md").read_text()

    argv = ["matrix", "--models", tiny.decoder, models[0], "--worlds", tiny.world, "--questions", 10]
    command(forgetting, *argv, "--out", tmp_path / "stages")  # a decoder alone is not asked about images
    result = read_json(tmp_path / "stages/matrix.json")
    assert result["matrix"][0] == [None] and result["matrix"][1][0] is not None and "forgetting" not in result


def test_wrong_arguments_end_with_one_line(tiny, command, tmp_path):
    for argv, word in (
        (["remedies", "--speedrun", tmp_path], "holds no finished stage2"),
        (["matrix", "--models", tiny.stage1, "--worlds", tiny.world, tiny.root], "give a model for each world"),
    ):
        with pytest.raises(SystemExit) as caught:
            command(forgetting, *argv, "--out", tmp_path / "out")
        assert word in caught.value.code and not (tmp_path / "out").exists()
