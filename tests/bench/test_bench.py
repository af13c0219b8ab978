"""The benchmark: turns and ratios, both sides' numbers, the table and its JSON. No test asks how fast anything is."""

import json
import pickle
from dataclasses import replace

import pytest
import torch

import train
from bench import __main__ as table
from bench import contenders, models
from bench.__main__ import check_equal, format_row, make_row, take_turns
from bench.contenders import Worker
from bench.models import Job, Shape
from clip import CLIPVisionConfig
from fast.accelerate import ITEMS
from llava import Llava, LlavaConfig, TextConfig


def tiny_model(width=32):
    text = TextConfig(512, width, 64, 2, 4, 2, max_position_embeddings=256, tie_word_embeddings=True)
    vision = CLIPVisionConfig(16, 32, 2, 2, image_size=8, patch_size=4)
    return LlavaConfig(text, vision, image_token_index=511, eos_token_ids=[0], pad_token_id=0)


TINY = Shape(tiny_model, rows=3, length=20, supervised=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.SHAPES, "tiny", TINY)
        return str(models.model_folder("tiny", tmp_path_factory.mktemp("bench")))


def job(kind, folder, **options):
    return Job(kind, folder, TINY, **options)


# ---------------------------------------------------------------------------------------------------------------------
# turns and ratios


def test_sides_take_turns():
    log = []

    def call(name, seconds):
        left = iter(seconds)
        return lambda: log.append(name) or next(left)

    seconds = take_turns({"plain": call("A", [1, 2]), "fast": call("B", [3, 4]), "theirs": call("C", [5, 6])}, 2)
    assert log == ["A", "B", "C", "A", "B", "C"]
    assert seconds == {"plain": [1, 2], "fast": [3, 4], "theirs": [5, 6]}


def test_a_ratio_is_that_of_its_columns_and_above_one_the_first_side_is_better():
    row = make_row("x", "ms", {"plain": [1, 2, 10], "fast": [1, 1, 5], "theirs": [2, 6, 10]})
    assert row["values"] == {"plain": 2000, "fast": 1000, "theirs": 6000}
    assert row["ratios"] == {"plain/theirs": [2, 3, 1], "fast/plain": [1, 2, 2], "fast/theirs": [2, 6, 2]}
    assert format_row(**row) == (
        "| x, ms | 2,000 | 1,000 | 6,000 | 3.00 (1.00 to 3.00) | 2.00 (1.00 to 2.00) | 6.00 (2.00 to 6.00) |"
    )
    row = make_row("x", "samples/s", {"plain": [1, 2, 10], "fast": [1, 1, 5], "theirs": [2, 6, 10]})
    assert format_row(**row) == (
        "| x, samples/s | 0.5 | 1 | 0.167 | 3.00 (1.00 to 3.00) | 2.00 (1.00 to 2.00) | 6.00 (2.00 to 6.00) |"
    )


@pytest.mark.parametrize("unit, value", [("ms", 500), ("samples/s", 2)])
def test_values_are_in_the_unit_of_the_row(unit, value):
    assert make_row("x", unit, {"plain": [0.5]})["values"] == {"plain": value}


def test_a_side_that_is_missing_leaves_dashes():
    row = make_row("x", "MB", {"plain": [3e6], "theirs": [6e6]})
    values = {"plain": 3, "theirs": 6}
    assert row == {"name": "x", "unit": "MB", "values": values, "ratios": {"plain/theirs": [2]}}
    assert format_row(**row) == "| x, MB | 3 | - | 6 | 2.00 | - | - |"


def test_numbers_that_differ_are_an_error():
    check_equal({"plain": [1.0, 2.0], "fast": [1.0, 2.001]}, 1e-3)
    with pytest.raises(ValueError, match=r"plain and theirs .* differ by 0.1; allowed is 0.0021"):
        check_equal({"plain": [1.0, 2.0], "theirs": [1.0, 2.1]}, 1e-3)
    with pytest.raises(ValueError, match="differ by nan"):
        check_equal({"plain": [float("nan")], "theirs": [1.0]}, 1e-3)
    with pytest.raises(ValueError, match="2 numbers, theirs 1"):
        check_equal({"plain": [1.0, 2.0], "theirs": [1.0]}, 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# inputs and sides


def test_a_batch_has_an_image_in_each_row_and_as_many_labels_as_the_shape_says(folder):
    config = tiny_model()
    batch = models.make_batch(config, job("train", folder))
    assert batch["input_ids"].shape == (3, 20) and batch["pixel_values"].shape == (3, 3, 8, 8)
    assert (batch["labels"] >= 0).sum(1).tolist() == [5, 5, 5]
    assert (batch["input_ids"] == config.image_token_index).sum(1).tolist() == [4, 4, 4]
    model = Llava(config)
    train.choose_trainable(model, ["projector", "llm"])
    assert model(**batch).isfinite()


@pytest.mark.parametrize("shape", models.SHAPES.values(), ids=models.SHAPES)
def test_a_shape_can_be_sent_to_a_worker(shape):
    assert pickle.loads(pickle.dumps(shape)) == shape


def test_a_folder_is_kept_until_its_config_changes(tmp_path, monkeypatch):
    written = []
    for width in (32, 32, 64):
        monkeypatch.setitem(models.SHAPES, "x", replace(TINY, make=lambda width=width: tiny_model(width)))
        file = models.model_folder("x", tmp_path) / "model.safetensors"
        written.append(file.stat().st_mtime_ns)
    assert written[0] == written[1] < written[2]


JOBS = {
    "stage 1": {"kind": "train", "way": "stage1"},
    "stage 2, bfloat16": {"kind": "train", "way": "stage2", "dtype": "bfloat16"},
    "LoRA": {"kind": "train", "way": "lora"},
    "QLoRA": {"kind": "train", "way": "qlora"},
    "one row": {"kind": "decode"},
    "rows": {"kind": "decode", "batch": 3, "dtype": "bfloat16"},
    "first token": {"kind": "first_token"},
}


@pytest.mark.parametrize("options", JOBS.values(), ids=JOBS)
def test_all_sides_compute_the_same_numbers(options, folder):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    done = job(folder=folder, **options)
    sides = {side: contenders.make_contender(side, done) for side in table.SIDES}
    check_equal({side: numbers for side, (numbers, _) in sides.items()}, table.tolerance_of(done))
    assert all(measure()[0] > 0 for _, measure in sides.values())


def test_only_the_fast_side_is_accelerated_and_by_the_chosen_items(folder, monkeypatch):
    from bench import ours

    calls = []
    monkeypatch.setattr(ours, "accelerate", lambda model, only=None: calls.append(only))
    for side, only in [("plain", None), ("fast", None), ("fast", ["one_row"])]:
        ours.make_step(side, job("train", folder, way="stage1", only=only))
        ours.make_answerer(side, job("decode", folder, only=only), [[1, 2]], None)
    assert calls == [None, None, {"one_row"}, {"one_row"}]


def test_a_worker_does_its_work_in_another_process_and_counts_its_memory(folder):
    side = Worker("plain", job("train", folder, way="stage1"))
    expected, _ = contenders.make_contender("plain", job("train", folder, way="stage1"))
    assert side.numbers == pytest.approx(expected, abs=1e-4)
    assert side.seconds() > 0 and side.bytes > 0
    side.close()
    assert side.process.exitcode == 0


def test_a_worker_that_fails_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"plain: .*nowhere"):
        Worker("plain", job("decode", str(tmp_path / "nowhere")))


# ---------------------------------------------------------------------------------------------------------------------
# the command


class FakeSide:
    numbers, bytes = [1.0], 3_000_000

    def __init__(self, side, job):
        if side == job.way:
            raise ValueError(f"{side}: out of luck")

    def seconds(self):
        return 0.5

    def close(self):
        pass


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Rows that take no time, of which one fails on our side and one on theirs."""
    found = {"a/good": Job("train", "x"), "a/bad": Job("train", "x", way="fast"), "b": Job("decode", "x", way="theirs")}
    monkeypatch.setattr(table, "make_jobs", lambda device: found)
    monkeypatch.setattr(table, "model_folder", lambda name, root: tmp_path / name)
    monkeypatch.setattr(table, "Worker", FakeSide)
    return found


def test_rows_are_printed_and_written_and_a_row_that_fails_is_named(fakes, tmp_path, command, capsys):
    with pytest.raises(SystemExit, match="1 of 3 rows failed"):
        command(table, "--device", "cpu", "--rounds", 1, "--json", tmp_path / "b.json")
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    assert rows == [
        "| a/good, samples/s | 2 | 2 | 2 | 1.00 | 1.00 | 1.00 |",
        "| a/good, MB | 3 | 3 | 3 | 1.00 | 1.00 | 1.00 |",
        "| b, tokens/s | 2 | 2 | - | - | 1.00 | - |",
    ]
    assert "bench: a/bad: fast: out of luck" in err and "bench: b: theirs: out of luck" in err
    written = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["a/good", "a/good", "b"]
    assert written["rows"][0]["ratios"] == {"plain/theirs": [1.0], "fast/plain": [1.0], "fast/theirs": [1.0]}
    assert written["machine"]["threads"] == torch.get_num_threads() and written["machine"]["torch"]


def test_items_are_measured_each_on_its_own(fakes, command, capsys):
    command(table, "--device", "cpu", "--items", "one_row", "dropout", "--only", "a/good", "--rounds", 1)
    names = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if "samples/s" in line]
    assert names == [f"| a/good, {item}, samples/s" for item in ("all", "one_row", "dropout")]
    jobs = table.item_jobs(fakes, list(ITEMS))
    assert jobs["a/good, all"].only is None and jobs["a/good, one_row"].only == ["one_row"]
    assert len(jobs) == 3 * (1 + len(ITEMS))


def test_a_pattern_that_matches_nothing_is_an_error(command):
    with pytest.raises(SystemExit, match="no row has this name"):
        command(table, "--only", "nonsense", "--device", "cpu")


def test_rows_are_listed_by_name(command, capsys):
    command(table, "--list", "--device", "cpu")
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names))
    for name in ("speedrun/train/stage2/float32", "222m/train/qlora/bfloat16", "222m/decode/nf4/8", "222m/first-token"):
        assert name in names
    command(table, "--list", "--device", "cpu", "--only", "222m/decode/*/1", "222m/first")
    assert len(capsys.readouterr().out.splitlines()) == 4
