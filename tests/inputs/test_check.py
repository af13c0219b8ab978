"""Bad data is reported by kind, ends a run in one line before any work, or is skipped and logged."""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import BATCH
from data_files import CONFIG, TOKENIZER, record, with_image, without_image, write_json
from PIL import Image
from torch.utils.data import DataLoader

import data
import eval as eval_script
import train
from data import Records, collate
from formats.weights import load_model
from inputs import check
from inputs.mixture import (
    open_sources,
)
from inputs.records import DataError
from inputs.tokenizer import Tokenizer


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A good file, a file of 20 records with faults of five kinds, and a folder of images, one of them broken."""
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (72, 72)).save(images / "a.png")
    (images / "broken.png").write_bytes(b"<html>")
    good = write_json(tmp_path / "good.json", with_image("a.png", 8) + without_image(12))
    content = with_image("a.png", 8) + without_image(12)
    content[1] = record("What?", "a", "a.png", "one")  # no marker
    content[4] = record("<image>", "a", "gone.png", "four")
    content[5] = record("<image>", "a", "../a.png", "five")
    content[6] = record("<image>", "a", "broken.png", "six")
    text = json.dumps(content)
    text = text.replace(json.dumps(content[9]), '{"id": NaN}')
    (tmp_path / "bad.json").write_text(text)
    write_json(
        tmp_path / "unmarked.json", [record("What?", "a", "a.png", i) for i in range(2)] + with_image("a.png", 2)
    )
    return SimpleNamespace(good=good, bad=tmp_path / "bad.json", images=images, folder=tmp_path)


def status(command, *argv):
    with pytest.raises(SystemExit) as caught:
        command(data, *argv)
    return caught.value.code


def test_check_counts_faults_by_kind_and_sets_the_exit_status(mine, command, capsys):
    assert status(command, "check", mine.good, "--images", mine.images) == 0
    assert "all 20 records are good" in capsys.readouterr().out
    assert status(command, "check", f"{mine.good}:2", mine.bad, "--images", mine.images) == 1
    said = capsys.readouterr().out
    assert "4 of 40 records are bad" in said and "weight 2; 0 bad" in said
    for kind in (
        "… <image> markers for … images",
        "image: no such file",
        "… leaves the images folder",
        "not JSON (NaN",
    ):
        assert f"1  {kind}" in said, said
    assert "record 4 (id 'four')" in said and "gone.png" in said and "record 9 (id nan)" in said
    assert status(command, "check", mine.bad, "--images", mine.images, "--decode") == 1
    said = capsys.readouterr().out
    assert "5 of 20 records are bad" in said and "record 6 (id 'six')" in said and "not an image" in said
    assert status(command, "check", mine.folder / "unmarked.json", "--images", mine.images) == 1
    assert "        2  … <image> markers for … images" in capsys.readouterr().out


def test_check_prints_lengths_that_include_images(mine, tiny, command, capsys):
    assert status(command, "check", mine.good, "--images", mine.images, "--model", tiny.stage1) == 0
    lines = capsys.readouterr().out.splitlines()
    bars = [line for line in lines if " - " in line]
    assert any("tokens: " in line for line in lines) and sum(int(bar.split()[3].replace(",", "")) for bar in bars) == 20
    dataset = Records(
        open_sources([str(mine.good)], [mine.images]),
        Tokenizer.load(tiny.stage1),
        load_model(tiny.stage1).config,
        999,
    )
    assert f"tokens: {np.abs(dataset.lengths()).sum():,} in all" in "\n".join(lines)


def test_cut_answers_are_said_before_the_run_and_by_check(mine, tiny, command, capsys):
    text = "of 20 samples are longer than 30 tokens and lose"
    assert status(command, "check", mine.good, "--images", mine.images, "--model", tiny.stage1) == 0
    assert "all fit into 1,024 tokens" in capsys.readouterr().out
    flags = ["--images", mine.images, "--max-length", 30]
    assert status(command, "check", mine.good, *flags, "--model", tiny.stage1) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if text in line]
    command(train, *tiny.flags["stage2"], "--data", mine.good, *flags, "--val", mine.good, "--out", "run")
    said = capsys.readouterr().err.splitlines()
    assert line in said and f"validation: {line}" in said
    counts = json.loads(Path("run/run.json").read_text())["lengths"]
    assert counts["max_length"] == 30 and line.startswith(f"{counts['cut']} of 20") and counts["unanswered"] == 0
    assert f" {counts['tokens_lost']} trained tokens" in line


def test_a_sample_without_room_for_an_answer_ends_the_run_before_it_starts(mine, tiny, command, capsys):
    flags = ["--images", mine.images, "--max-length", 11]
    assert status(command, "check", mine.good, *flags, "--model", tiny.stage1) == 1
    assert "8 have no room for an answer" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^train.py: .*8 have no room for an answer \(first: .*record 0"):
        command(train, *tiny.flags["stage2"], "--data", mine.good, *flags, "--out", "run")
    assert not Path("run/log.jsonl").exists()


def test_data_without_an_image_is_said(mine, tiny, command, capsys):
    write_json(mine.folder / "text.json", without_image(8))
    command(train, *tiny.flags["stage2"], "--data", "text.json", "--out", "run")
    assert "no record has an image" in capsys.readouterr().err


def test_keys_that_nothing_reads_are_named(mine, tiny, command, capsys):
    content = without_image(8)
    content[0]["rejected"] = "no"
    content[1]["conversations"][1]["weight"] = content[2]["conversations"][1]["weight"] = 0
    write_json(mine.folder / "keys.json", content)
    assert status(command, "check", "keys.json") == 0
    line = "keys that are not read: 'weight of a turn' (2), 'rejected' (1)"
    assert f"  {line}\n" in capsys.readouterr().out
    command(train, *tiny.flags["stage2"], "--data", "keys.json", "--out", "run")
    assert f"keys.json: {line}\n" in capsys.readouterr().err


def test_what_a_run_reads_is_said(mine, tiny, command, capsys):
    flags = [*tiny.flags["stage1"], "--data", mine.good, "--images", mine.images]
    command(train, *flags, "--out", "run")
    said = capsys.readouterr().err
    assert f"a new LLaVA from {tiny.clip} and {tiny.decoder}" in said
    assert "6 steps of 8 records: 2.4 epochs of 20 records" in said
    assert "template plain: 8 records of an image and one question are read without their question" in said
    command(train, *tiny.flags["stage2"], "--data", mine.good, "--images", mine.images, "--out", "run2")
    assert "without their question" not in capsys.readouterr().err


def test_data_that_changed_is_not_resumed(mine, tiny, command, monkeypatch):
    flags = [*tiny.flags["stage2"], "--data", mine.good, "--images", mine.images, "--out", "run", "--save-every", 2]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            command(train, *flags)
    mine.good.write_text(mine.good.read_text().replace("a cat", "a dog.", 1))
    with pytest.raises(SystemExit, match="run was trained with files whose sha256 are"):
        command(train, *flags, "--resume")
    command(train, *flags, "--resume", "--allow-changes")


def test_linked_folders_in_check_training_and_evaluation(mine, tiny, command, capsys):
    (mine.folder / "play").mkdir()
    (mine.folder / "play/coco").symlink_to(mine.images)
    write_json(mine.folder / "linked.json", with_image("coco/a.png", 8))
    question = {"question_id": 1, "image": "coco/a.png", "text": "What?"}
    (mine.folder / "q.jsonl").write_text(json.dumps(question) + "\n")
    folder = ["--images", "play"]
    training = [*tiny.flags["stage2"], "--data", "linked.json", *folder]
    asking = ["--model", tiny.stage2, "--questions", "q.jsonl", *folder, "--device", "cpu", "--max-new-tokens", 2]
    assert status(command, "check", "linked.json", *folder) == 1
    assert "by the link" in capsys.readouterr().out
    for script, flags in ((train, [*training, "--out", "no"]), (eval_script, [*asking, "--out", "no.jsonl"])):
        with pytest.raises(SystemExit, match="play/coco: --follow-links allows it"):
            command(script, *flags)
    assert status(command, "check", "linked.json", *folder, "--follow-links") == 0
    command(train, *training, "--follow-links", "--out", "run", "--workers", 1, "--cache-gb", 0)
    command(eval_script, *asking, "--follow-links", "--out", "a.jsonl")
    assert len(rows(Path("run"))) == 6 and len(Path("a.jsonl").read_text().splitlines()) == 1


def test_show_prints_a_record(mine, tiny, command, capsys):
    command(data, "show", mine.good, "--model", tiny.stage1, "--record", 1)
    assert "\033[32m" in capsys.readouterr().out


@pytest.mark.parametrize("number", [-1, 20])
def test_show_names_the_records_there_are(number, mine, tiny, command):
    with pytest.raises(SystemExit, match=rf"^data.py: --record {number}: .*good.json has records 0 to 19$"):
        command(data, "show", mine.good, "--model", tiny.stage1, "--record", number)


BAD_FLAGS = {
    "weight": (["--data", "good.json:two"], "'two' is no weight"),
    "weight 0": (["--data", "good.json", "good.json:0"], "good.json:0"),
    "no JSON": (["--data", "good.json", "noise.json"], "noise.json: not JSON"),
    "no file": (["--data", "none.json"], "none.json: No such file"),
    "no images": (["--data", "good.json", "--images", "nowhere"], "--images nowhere: no such folder"),
    "two folders for three files": (
        ["--data", *["good.json"] * 3, "--images", "images", "images"],
        "--images names 2",
    ),
    "shares of three": (["--data", "good.json", "good.json", "--shares", "1/1/1"], "--shares 1/1/1 is for 3 files"),
    "shares and weights": (["--data", "good.json:2", "good.json", "--shares", "1/1"], "leave the weights"),
    "shares and mixing": (
        ["--data", "good.json", "good.json", "--shares", "1/1", "--mixing", "equal"],
        "leave the weights",
    ),
    "a bad record": (["--data", "bad.json"], "bad.json: record 1 (id 'one'): 0 <image> markers"),
    "too many": (["--data", "bad.json", "--skip-bad", "15%"], "4 of 20 records are bad, over the 15 % of --skip-bad"),
}


@pytest.mark.parametrize("kind", BAD_FLAGS)
@pytest.mark.parametrize("stage", ["stage2", "clip", "decoder"])
def test_bad_input_ends_in_one_line_before_any_work(kind, stage, mine, tiny, command, monkeypatch):
    argv, says = BAD_FLAGS[kind]
    if stage == "clip" and kind.startswith("shares"):
        says = "neighbors"
    (mine.folder / "noise.json").write_text("<html>")
    monkeypatch.setattr(train, "load_checkpoint", lambda *_: pytest.fail("the model is loaded"))
    monkeypatch.setattr(train, "new_decoder", lambda *_: pytest.fail("the model is made"))
    monkeypatch.setattr(train, "train_bpe", lambda *_, **__: pytest.fail("the vocabulary is learned"))
    argv = ["--images", mine.images, *argv] if "--images" not in argv else argv
    with pytest.raises(SystemExit) as caught:
        command(train, *tiny.flags[stage], *argv, "--out", "run")
    assert caught.value.code.startswith("train.py: ") and says in caught.value.code
    assert len(caught.value.code.splitlines()) == 1
    assert not (mine.folder / "run").exists() and not (mine.folder / "out").exists()


@pytest.mark.parametrize("argv, says", [
    (["--mixing", "warm"], "--mixing warm"), (["--mixing", "0"], "--mixing 0"), (["--shares", "80"], None),
    (["--shares", "80/20:1"], "--shares 80/20:1"), (["--skip-bad", "many"], "not a percentage"),
    (["--skip-bad", "101"], "101"), (["--size", "tiny"], "--size does nothing in stage 2"),
    (["--whiten", "--model", "x"], "--whiten starts a new projector"),
])  # fmt: skip
def test_bad_flags_are_refused(argv, says, command, capsys):
    if says is None:
        assert train.read_flags("", ["--stage", "2", *argv]).shares == "80"
        return
    with pytest.raises(SystemExit) as caught:
        train.read_flags("", ["--stage", "2", *argv])
    assert caught.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_more_ranks_than_records(mine, tiny, command):
    args = train.read_flags(
        "", ["--stage", "2", "--data", str(mine.good), "--images", str(mine.images), "--batch-size", "8"]
    )
    ranks = SimpleNamespace(world_size=32, is_main=True, broadcast=lambda value: value)
    with pytest.raises(ValueError, match="20 records for 32 ranks"):
        train.open_sources(args, ranks, "instruct")
    with pytest.raises(ValueError, match="--batch-size 8 is not a multiple of 32 ranks"):
        train.micro_batch_size(args, ranks)


def dataset_of(mine, percent, path):
    sources = open_sources([str(mine.bad)], [str(mine.images)])
    for source in sources:
        source.faults |= check.image_faults(source)
    dataset = Records(sources, TOKENIZER, CONFIG, 500)
    dataset.skips = check.Skips(percent, len(dataset), path)
    return dataset


def test_a_broken_image_is_replaced_by_the_next_good_sample(mine):
    path = mine.folder / "run/skipped.jsonl"
    dataset = dataset_of(mine, 10, path)
    assert dataset.numbers.tolist() == [0, 2, 3, 6, 7, 8, *range(10, 20)]
    assert dataset[3]["ids"] == dataset[4]["ids"] and dataset[3]["ids"] == dataset[3]["ids"]
    (line,) = path.read_text().splitlines()
    assert "record 6 (id 'six')" in line and "not an image" in json.loads(line)["reason"]
    assert dataset_of(mine, 10, path)[3]["ids"] == dataset[4]["ids"]  # in another process or after a resume, too
    assert len(path.read_text().splitlines()) == 1
    with pytest.raises(DataError, match=r"record 6.*over the 5 % of --skip-bad"):
        dataset_of(mine, 5, path)[3]
    dataset.skips = None
    with pytest.raises(DataError, match="record 6"):
        dataset[3]


def test_loader_workers_share_the_state_of_bad_samples(mine):
    dataset = dataset_of(mine, 100, mine.folder / "run/skipped.jsonl")
    order = [[i] for i in range(16)] * 2
    loader = DataLoader(dataset, batch_sampler=order, num_workers=2, collate_fn=lambda part: collate(part, 0))
    assert len(list(loader)) == 32
    assert dataset.skips.state.tolist() == [1, 1, 1, 3] + [1] * 12


def test_an_error_in_a_worker_is_one_line(mine):
    (source,) = open_sources([str(mine.bad)], [str(mine.images)])
    dataset = Records([source], TOKENIZER, CONFIG, 500)
    with pytest.raises(DataError) as caught:
        list(DataLoader(dataset, batch_sampler=[[3]], num_workers=1, collate_fn=list))
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).startswith(
        f"{mine.bad}: record 4 (id 'four'): "
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cache", [4, 0])
def test_bad_records_are_left_out_and_logged(mine, tiny, command, capsys, cache):
    argv = [*tiny.flags["stage2"], "--data", mine.bad, mine.good, "--images", mine.images, "--skip-bad", "20%"]
    command(train, *argv, "--cache-gb", cache, "--out", "run")
    said = capsys.readouterr().err
    assert "4 records are left out" in said and "5 bad records were left out or replaced, see skipped.jsonl" in said
    named = [json.loads(line)["record"] for line in Path("run/skipped.jsonl").read_text().splitlines()]
    assert [name.split("record ")[1].split(" ")[0].rstrip(":") for name in named] == ["1", "9", "4", "5", "6"]
    assert len(rows(Path("run"))) == 6


def test_a_mixture_trains_and_resumes_bit_by_bit(mine, tiny, command, monkeypatch, capsys):
    argv = [*tiny.flags["stage2"], "--data", mine.bad, mine.good, "--images", mine.images, "--skip-bad", "20"]
    argv += ["--shares", "80/20:20/80:2", "--workers", 2]
    command(train, *argv, "--out", "whole")
    told = re.findall(r"json is read (\S+) times, (\d+) of its (\d+) samples never", capsys.readouterr().err)
    total = len(rows(Path("whole"))) * BATCH
    assert len(told) == 2 and sum(float(times) * int(size) for times, _, size in told) == pytest.approx(total, rel=0.01)
    step = train.train_step

    def interrupted(*args):
        if args[-1] == 4:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        with pytest.raises(SystemExit):
            command(train, *argv, "--out", "parts")
    command(train, *argv, "--out", "parts", "--resume")
    assert Path("whole/model.safetensors").read_bytes() == Path("parts/model.safetensors").read_bytes()
    assert Counter(Path("parts/skipped.jsonl").read_text().splitlines()).most_common(1)[0][1] == 1


def test_train_uses_the_order_of_the_mixture(mine, tiny, command, monkeypatch):
    """The loader gives every sample of the epoch, those of the second file twice."""
    asked = []
    monkeypatch.setattr(
        train, "fit", lambda args, ranks, run, model, dataset, *rest, **more: asked.append((args, dataset))
    )
    argv = [*tiny.flags["stage2"], "--data", mine.good, f"{mine.good}:2", "--images", mine.images]
    command(train, *argv, "--steps", 15, "--batch-size", 4, "--out", "run")
    ((args, dataset),) = asked
    loader = train.make_loader(dataset, args, train.Distributed("cpu"), 0, 0, 1)
    assert sorted(chain(*loader.batch_sampler)) == sorted([*range(20), *range(20, 40), *range(20, 40)])
