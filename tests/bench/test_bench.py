"""bench.py: which way a ratio points, what a limit is, what table and JSON hold. No test asks how fast anything is."""

import json

import pytest
import torch

import train
from bench import contenders
from bench import rows as bench_rows
from bench import table as bench
from bench.pairing import Contender, Limits, Row, Timing, agree, pair, rate_row, size_row, time_row
from bench.rows import Bench, Case
from clip import CLIPVisionConfig
from llava import Llava, TextConfig
from training import meters

CPU = torch.device("cpu")


def fake(seconds, numbers=(1.0, 2.0), log=None, name=""):
    """A contender whose calls take what they are told to."""
    left = iter(seconds)

    def call():
        if log is not None:
            log.append(name)
        return next(left)

    return Contender(lambda: torch.tensor(numbers), call)


@pytest.fixture
def llava():
    text = TextConfig(512, 32, 64, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)
    config, _ = contenders.assembled(text, CLIPVisionConfig(16, 32, 2, 2, image_size=8, patch_size=4))
    torch.manual_seed(0)
    return Llava(config)


class KnownLimits(Limits):
    """A device whose two rates are round."""

    bandwidth = 1e9

    def flops(self, dtype):
        return 1e12


# ---------------------------------------------------------------------------------------------------------------------
# pairs


def test_sides_take_turns_and_the_ratio_is_the_median_of_the_pairs():
    log = []
    ours, theirs = fake([1, 2, 10], log=log, name="A"), fake([2, 6, 10], log=log, name="B")
    timing = pair(ours, theirs, 3, 1e-3)
    assert log == ["A", "B"] * 3
    assert (timing.ours, timing.theirs, timing.ratios) == (2, 6, [2.0, 3.0, 1.0])
    row = time_row("x", timing)
    assert (row.ratio, row.spread) == (2.0, (1.0, 3.0))  # the median of the ratios, not that of the medians


def test_above_one_is_better_for_speed_time_and_memory_alike():
    timing = Timing(ours=0.5, theirs=1.0, ratios=[2.0])
    rate, time, size = rate_row("x", "samples/s", 4, timing), time_row("x", timing), size_row("x", 3e6, 6e6)
    assert (rate.ours, rate.theirs, rate.ratio) == (8, 4, 2)
    assert (time.ours, time.theirs, time.ratio) == (500, 1000, 2)
    assert (size.ours, size.theirs, size.ratio) == (3, 6, 2)


def test_without_theirs_a_row_has_ours_and_the_limit():
    row = rate_row("x", "tokens/s", 10, pair(fake([2, 2]), None, 2, 0.0), limit=20, goal=1.5)
    assert (row.ours, row.theirs, row.ratio, row.spread, row.of_limit, row.met) == (5, None, None, None, 0.25, None)


def test_sides_that_do_not_compute_the_same_are_not_timed():
    log = []
    with pytest.raises(ValueError, match="not the same numbers"):
        pair(fake([1], log=log), fake([1], numbers=(1.0, 2.1), log=log), 1, 1e-3)
    assert not log
    with pytest.raises(ValueError, match="not the same numbers"):
        agree(float("nan"), 1.0, 1e-3)
    agree(1.0, 1.0005, 1e-3)


@pytest.mark.parametrize("unit, of_limit", [("tokens/s", 0.5), ("ms", 2.0), ("MB", 2.0)])
def test_the_share_of_the_limit_goes_with_the_unit(unit, of_limit):
    assert Row("x", unit, 10, None, None, limit=20).of_limit == of_limit


@pytest.mark.parametrize(
    "goal, share, met", [(1.5, None, True), (2.5, None, False), (1.5, 0.6, False), (None, 0.5, True)]
)
def test_a_goal_is_met_if_all_of_it_is(goal, share, met):
    assert Row("x", "tokens/s", 10, 5, 2.0, limit=20, goal=goal, share=share).met is met


# ---------------------------------------------------------------------------------------------------------------------
# limits, by hand


def test_a_step_of_decoding_reads_layers_norms_and_head_once(llava, tmp_path):
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32  # q, o; k, v; the MLP; two norms
    weights = 2 * layer + 32 + 512 * 32  # the last norm, the head
    assert bench_rows.decoder_bytes(llava) == 4 * weights
    known = Bench(CPU, tmp_path, 1, theirs=False)
    known.limits = KnownLimits(CPU)
    assert bench_rows.decoding_limit(known, llava, 2) == pytest.approx(2 * 1e9 / (4 * weights))
    assert bench_rows.decoding_limit(known, llava, 10**9) == pytest.approx(1e12 / (2 * (2 * layer + 512 * 32)))
    llava.language_model.lm_head.weight = torch.nn.Parameter(torch.zeros(512, 32))  # untied: the embedding is not read
    assert bench_rows.decoder_bytes(llava) == 4 * weights


def test_the_first_token_costs_the_layers_per_token_the_head_once_and_the_tower(llava, tmp_path):
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    text = (2 * 2 * layer + 4 * 2 * 32 * 10) * 10 + 2 * 512 * 32
    assert bench_rows.forward_flops(llava, 10, 0) == text
    assert bench_rows.forward_flops(llava, 10, 1) == text + meters.step_flops(llava.requires_grad_(False), 0, 0, 1)


def test_the_rates_of_a_machine_are_measured():
    limits = Limits(CPU)
    limits.matmul_rate = {torch.float32: 5e9, torch.bfloat16: 1e9}.__getitem__
    assert limits.flops(torch.bfloat16) == 5e9  # it can be widened
    assert limits.bandwidth > 0


# ---------------------------------------------------------------------------------------------------------------------
# both sides


def test_a_batch_has_its_pictures_and_as_many_labels_as_the_shape_says(llava):
    shape = contenders.Shape(None, rows=3, length=20, supervised=5)
    batch = contenders.batch_of(llava.config, shape)
    assert batch["input_ids"].shape == (3, 20) and batch["pixel_values"].shape == (3, 3, 8, 8)
    assert (batch["labels"] >= 0).sum(1).tolist() == [5, 5, 5]
    assert (batch["input_ids"] == llava.config.image_token_index).sum(1).tolist() == [4, 4, 4]
    train.choose_trainable(llava, "projector,llm")
    assert llava(**batch).isfinite()


def test_a_folder_is_kept_until_its_shape_changes(llava, tmp_path, monkeypatch):
    def make(width):
        text = TextConfig(512, width, 64, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)
        return lambda: contenders.assembled(text, CLIPVisionConfig(16, 32, 2, 2, image_size=8, patch_size=4))

    written = []
    for width in (32, 32, 64):
        monkeypatch.setitem(contenders.SHAPES, "x", contenders.Shape(make(width), 2, 20, 5))
        folder = contenders.folder_of("x", tmp_path, "cpu")
        written.append((folder / "model.safetensors").stat().st_mtime_ns)
    assert written[0] == written[1] < written[2]
    model = contenders.our_model(folder, "cpu", torch.float32)
    tokens = contenders.our_decoding(model, [[1, 2, 3]], 4)
    assert tokens.check().shape == (1, 512) and tokens.seconds() > 0


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_rows_go_into_the_table_and_the_json_and_a_row_that_fails_is_named(tmp_path, monkeypatch, command, capsys):
    def good(run, name):
        yield size_row(name, 1e6, 2e6, limit=5e5, goal=1.5)

    def bad(run, name):
        raise RuntimeError("out of luck")
        yield

    found = [Case("a/good", good), Case("a/bad", bad), Case("a/slow", good, left_out="it is slow"), Case("b", good)]
    monkeypatch.setattr(bench, "cases", lambda *args: found)
    with pytest.raises(SystemExit, match="1 failed"):
        command(bench, "--only", "a/", "--device", "cpu", "--work", tmp_path, "--json", tmp_path / "b.json")
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "| a/good, MB | 1 | 2 | 2.00 | 1.50 (met) | 50% of 0.5 |"
    assert "a/bad: RuntimeError: out of luck" in err and "it is slow: a/slow" in err
    written = json.loads((tmp_path / "b.json").read_text())
    (row,) = written["rows"]
    assert {"name", "ours", "theirs", "ratio", "goal", "limit"} <= set(row)
    assert row["name"] == "a/good, MB" and row["ratio"] == 2
    assert written["machine"]["threads"] == torch.get_num_threads() and written["machine"]["torch"]


def test_a_pattern_that_matches_nothing_is_an_error(command):
    with pytest.raises(SystemExit, match="no row is called so"):
        command(bench, "--only", "nonsense", "--device", "cpu")


def test_names_of_the_rows_are_listed_and_each_is_there_once(command, capsys):
    command(bench, "--list", "--device", "cpu", "--slow")
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names))
    for name in ("speedrun/train/full/float32", "222m/memory/qlora/float32", "222m/decode/nf4/32", "data/start-up"):
        assert name in names
    assert "7b   (left out: it needs a GPU)" in names


def test_one_cheap_row_for_real(tmp_path):
    run = Bench(CPU, tmp_path, 1, theirs=contenders.installed("transformers"))
    (row,) = bench_rows.tokenizing(run, "data/tokenizing", "speedrun")
    assert row.name == "data/tokenizing, MB/s" and row.ours > 0
    (row,) = bench_rows.cache_bytes(run, "speedrun/kv-cache", "speedrun")
    assert row.ours >= row.limit
