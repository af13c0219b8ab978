"""sample.py --batch: equal to questions asked alone, complete after any kill, and nothing left out without a word."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest

import sample
from evaluation.answering import part_files
from evaluation.many import find_images
from formats.weights import load_model
from inputs.tokenizer import Tokenizer

LENGTH = 12


@pytest.fixture(scope="module")
def names(tiny):
    return find_images(tiny.world / "heldout-0")


@pytest.fixture
def photos(tiny, names, tmp_path):
    """A folder of ten images, some in a subfolder."""
    for number, name in enumerate(names[:10]):
        path = tmp_path / "photos" / ("sub" if number % 3 == 0 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny.world / "heldout-0" / name, path)
    return tmp_path / "photos"


@pytest.fixture
def run(command, babbler, tmp_path):
    """Run sample.py --batch; returns the rows that it writes."""

    def call(batch, *more, model=babbler, out=tmp_path / "out.jsonl"):
        flags = ["--model", model, "--device", "cpu", "--max-new-tokens", LENGTH, "--batch-size", 4]
        command(sample, *flags, "--batch", batch, "--out", out, *more)
        return [json.loads(line) for line in out.read_text().splitlines()]

    return call


def refusal(run, *argv, **more):
    with pytest.raises(SystemExit) as caught:
        run(*argv, **more)
    line = caught.value.code
    assert isinstance(line, str) and line.startswith("sample.py: ") and len(line.splitlines()) == 1, line
    return line


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixed_rows(names):
    """Questions of different lengths about no image, one image and several."""
    texts = ["Red?", "What is this?", "Is it red? " * 9, "Describe the image in one sentence."]
    images = [None, names[0], [names[1], names[2]], names[3], [names[4]]]
    rows = [{"prompt": texts[i % 4], "image": images[i % 5]} for i in range(17)]
    rows.append({"id": "x", "prompt": "Is <image> larger than <image>?", "image": names[5:7]})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# what is written


def test_every_image_of_a_folder_gets_a_row(run, photos, capsys):
    (photos / "notes.txt").write_text("not an image")
    (photos / ".hidden.png").write_bytes(b"")
    rows = run(photos)
    ids = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("[0-9].png"))
    assert [row["id"] for row in rows] == [row["image"] for row in rows] == ids
    assert all(list(row) == ["id", "image", "prompt", "text"] for row in rows)
    assert {row["prompt"] for row in rows} == {sample.DESCRIBE} and len({row["text"] for row in rows}) == 10
    said = capsys.readouterr()
    assert said.out == "" and f"{photos}: left out, as no images: 'hidden files' (1), '.txt' (1)" in said.err
    assert f"10 answers in {photos.parent / 'out.jsonl'}" in said.err
    assert "of the 10 answers given now were cut at --max-new-tokens 12" in said.err


def test_answers_are_those_to_questions_asked_alone(run, tiny, babbler, names, tmp_path):
    asked = mixed_rows(names)
    rows = run(write(tmp_path / "q.jsonl", asked), "--images", tiny.world / "heldout-0")
    assert [row["id"] for row in rows] == [*range(1, 18), "x"]
    assert [(row["prompt"], row["image"]) for row in rows] == [(row["prompt"], row["image"]) for row in asked]
    model, tokenizer = load_model(babbler), Tokenizer.load(babbler)
    for row in rows:
        images = row["image"] if isinstance(row["image"], list) else filter(None, [row["image"]])
        paths = [tiny.world / "heldout-0" / name for name in images]
        chat = sample.Chat(model, tokenizer, paths, max_new_tokens=LENGTH)
        alone = "".join(chat.ask(row["prompt"])).strip()  # which waits for the rest of a character that is cut
        assert alone.rstrip("\ufffd") == row["text"].rstrip("\ufffd") != "", row
    assert len({row["text"] for row in rows}) > 12


def test_a_prompt_for_all_rows_may_stand_in_the_command(run, photos, tmp_path, capsys):
    path = write(tmp_path / "q.jsonl", [{"image": "1.png"}, {"image": "1.png", "prompt": "Red?", "hint": "no"}])
    rows = run(path, "--images", photos, "--prompt", "Blue?")
    assert "keys that are not read: 'hint' (1)" in capsys.readouterr().err
    assert [row["prompt"] for row in rows] == ["Blue?", "Red?"]
    assert rows[0]["text"] == run(photos, "--prompt", "Blue?", out=tmp_path / "b.jsonl")[0]["text"]


# ---------------------------------------------------------------------------------------------------------------------
# stops


def test_a_run_killed_at_random_times_loses_and_repeats_no_row(run, tiny, names, tmp_path):
    path = write(tmp_path / "q.jsonl", [row | {"id": i} for i, row in enumerate(mixed_rows(names) * 3)])
    flags, rng = [path, "--images", tiny.world / "heldout-0"], random.Random(0)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(*flags, out=whole)
    kills = 0
    while not out.exists():
        before = sum(part.stat().st_size for part in part_files(out))
        goal = before + rng.randint(1, whole.stat().st_size // 4)
        child = multiprocessing.get_context("fork").Process(target=run, args=flags)
        child.start()
        while child.is_alive() and sum(part.stat().st_size for part in part_files(out)) < goal:
            time.sleep(0.005)
        time.sleep(rng.random() / 20)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        kills += child.exitcode != 0
        for part in part_files(out) if child.exitcode else []:  # the last line may be torn
            part.write_bytes(part.read_bytes()[: -rng.randint(0, 40)] if rng.random() < 0.5 else part.read_bytes())
    assert kills >= 3
    assert out.read_bytes() == whole.read_bytes() and not part_files(out)


@pytest.mark.parametrize("change, why", [
    ("input", "questions"), ("image", "pictures_sha256"), ("flag", "max_new_tokens"), ("prompt", "default_prompt"),
    ("model", "model"),
])  # fmt: skip
def test_a_changed_run_is_not_gone_on_with(run, tiny, photos, tmp_path, change, why):
    path = write(tmp_path / "q.jsonl", [{"image": "1.png", "prompt": "Red?"}])
    flags = [path, "--images", photos]
    run(*flags)
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(*flags) and (tmp_path / "out.jsonl").read_bytes() == before  # the same command
    if change == "input":
        write(path, [{"image": "1.png", "prompt": "Red?"}, {"image": "1.png", "prompt": "Blue?"}])
    if change == "image":
        (photos / "1.png").write_bytes((photos / "1.png").read_bytes() + b"\0")
    more = {"flag": ["--max-new-tokens", 3], "prompt": ["--prompt", "Blue?"]}.get(change, [])
    line = refusal(run, *flags, *more, **({"model": tiny.stage2} if change == "model" else {}))
    assert f"was started with another {why}" in line and (tmp_path / "out.jsonl").read_bytes() == before


def test_a_file_that_holds_no_answers_is_left_alone(run, photos, tmp_path):
    path = write(tmp_path / "q.jsonl", [{"id": 1, "image": "1.png", "prompt": "Red?"}])
    before = path.read_bytes()
    assert "q.jsonl" in refusal(run, path, "--images", photos, out=path)
    assert path.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# bad images


def test_a_bad_image_stops_the_run_and_skipping_it_goes_on(run, photos, tmp_path, capsys):
    for name in ("0.png", "8.png"):
        good = (photos / "sub/6.png").read_bytes()
        (photos / name).write_bytes(good[: len(good) // 2])
    line = refusal(run, photos)
    assert f"{photos / '0.png'}: cannot be decoded" in line and "--skip-bad" in line
    rows, said = run(photos, "--skip-bad"), capsys.readouterr().err
    bad = [row for row in rows if "error" in row]
    assert [row["id"] for row in bad] == ["0.png", "8.png"] and all(row["text"] is None for row in bad)
    assert len(rows) == 11 and "9 answers in" in said and "2 of 11 rows have an error (first: question 0.png: " in said
    run(photos, "--skip-bad", out=tmp_path / "whole.jsonl")
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_missing_images_are_named_before_anything_is_answered(run, photos, tmp_path):
    rows = [{"id": name, "image": name, "prompt": "Red?"} for name in ("1.png", "no.png", "../x.png", "2.png")]
    path = write(tmp_path / "q.jsonl", rows)
    line = refusal(run, path, "--images", photos)
    assert "question no.png: " in line and "no such file (and 1 more images cannot be read)" in line
    assert not part_files(tmp_path / "out.jsonl")
    found = {row["id"]: row.get("error") for row in run(path, "--images", photos, "--skip-bad")}
    assert found["1.png"] is found["2.png"] is None
    assert "no such file" in found["no.png"] and "leaves the images folder" in found["../x.png"]


# ---------------------------------------------------------------------------------------------------------------------
# errors that a user can fix are one line


@pytest.mark.parametrize("row, why", [
    ({"image": "1.png"}, "prompt is None"), ({"prompt": 7}, "prompt is 7"), ({"prompt": "?", "image": 7}, "image is 7"),
    ({"prompt": "?", "image": ["1.png", None]}, "not a path or a list"), ({"prompt": "?", "id": [1]}, "id is [1]"),
    ({"prompt": "?", "id": 1}, "the id 1 comes twice"), ({"prompt": "?", "images": ["1.png"]}, "'images' looks like"),
    ({"prompt": "<image>?"}, "no image for it"), ({"prompt": "?\ud800"}, "half a surrogate pair"),
    ({"prompt": "<image> or <image>?", "image": "1.png"}, "2 <image> markers for 1 images"), ([], "is a list"),
])  # fmt: skip
def test_a_row_that_is_none_is_named_by_its_line(run, photos, tmp_path, row, why):
    path = write(tmp_path / "q.jsonl", [{"prompt": "Red?"}, row])
    line = refusal(run, path, "--images", photos)
    assert f"{path}: line 2" in line and why in line and not part_files(tmp_path / "out.jsonl")


def test_folders_without_images_and_models_without_a_tower_are_told(run, tiny, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty: no images" in refusal(run, tmp_path / "empty")
    assert "nowhere" in refusal(run, tmp_path / "nowhere")
    assert "without a vision tower" in refusal(run, photos, "--skip-bad", model=tiny.decoder)
    path = write(tmp_path / "q.jsonl", [{"prompt": "Red?"}])
    assert len(run(path, model=tiny.decoder, out=tmp_path / "d.jsonl")) == 1


@pytest.mark.parametrize("argv, why", [
    (["--batch", "x"], "needs --out"), (["--out", "x"], "--out goes with --batch"),
    (["--images", "x"], "--images goes with --batch"), (["--batch", "x", "--out", "y", "--json"], "no --json"),
    (["--batch", "x", "--out", "y", "--image", "z"], "no --image"),
    (["--batch", "x", "--out", "y", "--temperature", "1"], "greedy"),
    (["--batch", "x", "--out", "y", "--batch-size", "0"], "above 0"),
    (["--batch", "x", "--out", "y", "--top-k", "5"], "greedy"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_named(command, capsys, argv, why):
    with pytest.raises(SystemExit) as caught:
        command(sample, *argv)
    assert caught.value.code == 2 and why in capsys.readouterr().err


def test_links_out_of_a_folder_are_read_only_if_allowed(run, photos, tmp_path):
    shutil.move(photos / "1.png", tmp_path / "1.png")
    (photos / "1.png").symlink_to(tmp_path / "1.png")
    assert "--follow-links allows it" in refusal(run, photos)
    assert run(photos, "--follow-links")[0]["id"] == "1.png"


def test_a_file_name_that_is_not_utf8_is_one_bad_row(run, photos):
    odd = photos / os.fsdecode(b"caf\xe9.png")
    shutil.copy(photos / "1.png", odd)
    rows = run(photos, "--skip-bad")
    (bad,) = [row for row in rows if "error" in row]
    assert len(rows) == 11 and odd.name in bad.values()
