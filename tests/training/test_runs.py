"""A run's folder survives damaged checkpoints, a second writer, signals, a full disk and steps that are not finite."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import train
from formats.weights import load_model
from inputs import files
from training import runs, sharding
from training.checkpoint import checkpoint_tensors, gather_tensors, restore_checkpoint

REPOSITORY = Path(train.__file__).parent
RANKS = train.Distributed("cpu")


def train_small(steps):
    """Return a small model and its optimizer after so many steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = sharding.make_adamw([{"params": list(model.parameters())}], "ddp", lr=0.1)
    for _ in range(steps):
        model(torch.ones(3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def same_bits(one, two):
    """True if two pairs of model and optimizer hold the same bits."""
    states = [checkpoint_tensors(*pair) for pair in (one, two)]
    assert [list(state) for state in states[0].values()] == [list(state) for state in states[1].values()]
    tensors = [[value for file in state.values() for value in file.values()] for state in states]
    return all(torch.equal(a, b) for a, b in zip(*tensors))


def open_run(folder, resume=False):
    run = runs.Run(folder, {"stage": 1, "lr": 0.1}, resume)
    run.open()
    run.start(0)
    return run


def save(run, step):
    model, optimizer = train_small(step)
    state = checkpoint_tensors(model, optimizer)
    run.save_checkpoint(step, state, gather_tensors(state, optimizer, RANKS), 2, "checkpoint")


@pytest.fixture
def two(tmp_path):
    """A run with checkpoints after steps 2 and 4."""
    run = open_run(tmp_path / "run")
    for step in (2, 4):
        save(run, step)
    return run


def resume(folder):
    """Return what a resume restores: step, (model, optimizer)."""
    path = runs.Run(folder, {"stage": 1}, resume=True).newest_valid_checkpoint()
    pair = train_small(0)
    return restore_checkpoint(path, *pair), pair


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def test_a_checkpoint_brings_back_every_bit(two):
    step, pair = resume(two.folder)
    assert step == 4 and same_bits(pair, train_small(4)) and not same_bits(pair, train_small(2))


def test_our_files_are_those_safetensors_writes(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(()), "c": torch.randn(5, dtype=torch.bfloat16)}
    tensors |= {"d": torch.arange(6).view(2, 3).T, "e": torch.empty(0, 4), "f": torch.tensor([1, 255]).byte()}
    files.write_tensors(tmp_path / "x.safetensors", tensors, iter(tensors.values()))
    back = load_file(tmp_path / "x.safetensors")
    assert list(back) == list(tensors) and all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert all(back[key].dtype == tensors[key].dtype for key in tensors)


def test_the_newest_are_kept_and_latest_points_at_the_last(two):
    save(two, 6)
    assert [path.name for path in two.checkpoints()] == ["checkpoint-000004", "checkpoint-000006"]
    assert (two.folder / "latest").resolve() == two.checkpoints()[-1].resolve()


def test_leftovers_of_a_kill_are_deleted(two):
    torn = two.folder / "checkpoint-000006.partial"
    torn.mkdir()
    (torn / "trained.safetensors").write_bytes(b"\x10")
    runs.Run(two.folder, {"stage": 1}, resume=True).open()
    assert not torn.exists() and resume(two.folder)[0] == 4


def check_damage(two, tmp_path, number, change):
    """After `change(folder)` on the newest checkpoint, a resume must restore the one before it."""
    folder = tmp_path / f"copy-{number}"
    shutil.copytree(two.folder, folder, symlinks=True)
    change(folder / "checkpoint-000004")
    step, pair = resume(folder)
    assert step == 2 and same_bits(pair, train_small(2))
    shutil.rmtree(folder)


def test_a_truncated_file_is_found_and_the_checkpoint_before_it_used(two, tmp_path, capsys):
    names = sorted(path.name for path in two.checkpoints()[-1].iterdir())
    assert names == ["manifest.json", "optimizer.safetensors", "state.json", "trained.safetensors"]
    for name in names:
        for part in range(64):

            def cut(folder, name=name, part=part):
                data = (folder / name).read_bytes()
                (folder / name).write_bytes(data[: len(data) * part // 64])

            check_damage(two, tmp_path, part, cut)
            line = capsys.readouterr().err
            assert name in line and "put aside" in line and len(line.splitlines()) == 1


def test_five_hundred_flipped_bits_are_found(two, tmp_path):
    generator = torch.Generator().manual_seed(0)
    paths = sorted(two.checkpoints()[-1].iterdir())
    for number in range(500):

        def flip(folder, number=number):
            path = folder / paths[number % len(paths)].name
            data = bytearray(path.read_bytes())
            bit = int(torch.randint(8 * len(data), (), generator=generator))
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)

        check_damage(two, tmp_path, number, flip)


def test_an_additional_and_a_missing_file_are_found(two, tmp_path):
    check_damage(two, tmp_path, 0, lambda folder: (folder / "more.json").write_text("{}"))
    check_damage(two, tmp_path, 1, lambda folder: (folder / "state.json").unlink())


def test_with_all_checkpoints_damaged_nothing_is_overwritten(two):
    for path in two.checkpoints():
        (path / "state.json").write_text("{}")
    for _ in range(2):  # and asking again does not help
        with pytest.raises(ValueError, match="every checkpoint is damaged"):
            resume(two.folder)
    assert len(list(two.folder.glob("checkpoint-*.damaged"))) == 2


def test_a_full_disk_is_named_and_the_checkpoint_before_it_stays(two):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # fails like a full disk
    try:
        with pytest.raises(ValueError) as caught:
            save(two, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    needed = sum(t.nbytes for file in checkpoint_tensors(*train_small(6)).values() for t in file.values())
    line = str(caught.value)
    assert "checkpoint-000006" in line and "File too large" in line and f"{needed} bytes needed" in line
    assert "the last good checkpoint" in line and "checkpoint-000004" in line and len(line.splitlines()) == 1
    assert resume(two.folder)[0] == 4 and not list(two.folder.glob("*.partial"))


# ---------------------------------------------------------------------------------------------------------------------
# whole runs


def test_a_folder_that_is_not_writable(tiny, command):
    with pytest.raises(SystemExit) as caught:
        command(train, *tiny.flags["stage1"], "--out", "/proc/no-such-place/run")
    assert "/proc/no-such-place" in caught.value.code and len(caught.value.code.splitlines()) == 1


def test_the_newest_finished_run_of_a_stage_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "OUTPUT_ROOT", tmp_path)
    values = {"a": (2, 30), "b": (2, 20), "c": (1, 40), "later": (2, None), "0/clip": (0, 1), "0/decoder": (0, 2)}
    for name, (stage, finished) in values.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(json.dumps({"stage": stage, "finished": finished}))
    assert runs.newest_run(2) == tmp_path / "a" and runs.newest_run(1, 2) == tmp_path / "c"
    assert runs.newest_run(0, part="clip") == tmp_path / "0/clip"
    with pytest.raises(ValueError, match=r"no finished run of stage 0 \(tower\) .* name a folder"):
        runs.newest_run(0, part="tower")
    (tmp_path / "a/run.json").write_text("{")
    with pytest.raises(ValueError, match=r"a/run\.json: not JSON"):
        runs.newest_run(2)


def test_only_one_process_trains_into_a_folder(tmp_path):
    folder = tmp_path / "run"
    code = f"""
import pathlib
from training import runs
run = runs.Run(pathlib.Path({str(folder)!r}), {{'stage': 1}}, False)
run.open()"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "\nprint('held', flush=True); import time; time.sleep(60)"],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process"):
            open_run(folder)
    finally:
        holder.kill()
        holder.wait()
    open_run(folder)  # a dead process holds no lock


@pytest.mark.parametrize("flag, value", [("--lr", 1e-5), ("--seed", 5), ("--max-length", 500), ("--steps", 9)])
def test_a_resumed_run_is_the_same_run(tiny, command, tmp_path, monkeypatch, flag, value):
    argv = [*tiny.flags["stage1"], "--out", tmp_path / "run"]
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: 1 / 0 if args[-1] == 3 else step(*args))
    with pytest.raises(ZeroDivisionError):
        command(train, *argv)
    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(SystemExit) as caught:
        command(train, *argv, "--resume", flag, value)
    assert flag in caught.value.code and str(value) in caught.value.code and "--allow-changes" in caught.value.code
    command(train, *argv, "--resume", flag, value, "--allow-changes")
    assert json.loads((tmp_path / "run/run.json").read_text())["finished"]


def test_weights_only(tiny, command, tmp_path, monkeypatch):
    """--init-from begins at step 0 with the weights of a checkpoint, and a new optimizer."""
    argv = [*tiny.flags["stage2"], "--keep", 5]
    monkeypatch.setattr(runs.Run, "finish", lambda *_: None)  # it would delete the checkpoints
    command(train, *argv, "--out", tmp_path / "first")
    monkeypatch.undo()
    command(train, *argv, "--out", tmp_path / "second", "--init-from", tmp_path / "first/latest")
    rows = [json.loads(line) for line in (tmp_path / "second/log.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (tmp_path / "first/log.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1 and rows[0]["loss"] < before[0]["loss"] - 0.5
    (tmp_path / "first/latest/trained.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as caught:
        command(train, *argv, "--out", tmp_path / "third", "--init-from", tmp_path / "first/latest")
    assert "trained.safetensors" in caught.value.code


def run_with_signals(tiny, folder, *numbers, name="stage1"):
    """Return exit status and last line of a run that gets these signals after two steps."""
    argv = [*tiny.flags[name], "--out", folder, "--steps", 100_000, "--save-every", 50_000]
    folder = folder / "clip" if name == "clip" else folder
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "train.py", *map(str, argv)], stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while not (folder / "log.jsonl").exists() or (folder / "log.jsonl").read_bytes().count(b"\n") < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    for number in numbers:
        process.send_signal(number)
    output = process.communicate(timeout=60)[1]
    return process.returncode, output.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(tiny, tmp_path, number):
    status, line = run_with_signals(tiny, tmp_path / "run", number)
    assert status == 128 + number and "stopped after step" in line and "--resume" in line
    step = json.loads((tmp_path / "run/latest/state.json").read_text())["step"]
    rows = [json.loads(row) for row in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert step == len(rows) and f"after step {step};" in line


def test_a_stopped_stage_0_names_the_folder_that_the_same_command_resumes(tiny, tmp_path):
    status, line = run_with_signals(tiny, tmp_path / "towers", signal.SIGTERM, name="clip")
    assert status == 143 and line.endswith(f"; continue with --out {tmp_path / 'towers'} --resume")
    assert (tmp_path / "towers/clip/latest/state.json").exists()


@pytest.mark.parametrize("teacher", [False, True])
def test_a_resumed_run_that_began_with_a_checkpoint(tiny, command, tmp_path, monkeypatch, teacher):
    """It needs that checkpoint only as the teacher, and then refuses another."""
    monkeypatch.setattr(runs.Run, "finish", lambda *_: None)  # it would delete the checkpoints
    command(train, *tiny.flags["stage2"], "--out", tmp_path / "first")
    monkeypatch.undo()
    start = tmp_path / "first/latest"
    argv = [*tiny.flags["stage2"], "--out", tmp_path / "run", "--init-from", start, "--save-every", 1]
    argv += ["--distill", 0.5] if teacher else []
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: 1 / 0 if args[-1] == 3 else step(*args))
    with pytest.raises(ZeroDivisionError):
        command(train, *argv)
    monkeypatch.setattr(train, "train_step", step)
    shutil.rmtree(tmp_path / "first")
    if teacher:
        with pytest.raises(SystemExit) as caught:
            command(train, *argv, "--resume")
        assert "no checkpoint of a run" in caught.value.code
        shutil.copytree(tmp_path / "run" / "latest", start)
        with pytest.raises(SystemExit) as caught:
            command(train, *argv, "--resume")
        assert "--init-from weights whose sha256 is" in caught.value.code
    else:
        command(train, *argv, "--resume")
        assert json.loads((tmp_path / "run/run.json").read_text())["finished"]


def test_a_whitened_projector_of_a_checkpoint_is_not_whitened_again(tiny, command, tmp_path, monkeypatch):
    argv = [*tiny.flags["stage1"], "--whiten"]
    monkeypatch.setattr(runs.Run, "finish", lambda *_: None)  # it would delete the checkpoints
    command(train, *argv, "--out", tmp_path / "first")
    monkeypatch.undo()
    command(train, *argv, "--out", tmp_path / "second", "--init-from", tmp_path / "first/latest", "--lr", 0)
    saved = load_file(tmp_path / "first/latest/trained.safetensors")
    kept = {name: p for name, p in load_model(tmp_path / "second").named_parameters() if name in saved}
    assert kept.keys() == saved.keys() and all(torch.equal(kept[name], saved[name]) for name in saved)


def stop_at_step_3(command, monkeypatch, *argv):
    step = train.train_step
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda *args: 1 / 0 if args[-1] == 3 else step(*args))
        with pytest.raises(ZeroDivisionError):
            command(train, *argv)


def test_a_resumed_run_with_another_base_or_other_data_is_refused(tiny, command, tmp_path, monkeypatch):
    base, data = shutil.copytree(tiny.stage1, tmp_path / "base"), tmp_path / "data.json"
    data.write_text((tiny.world / "instruct.json").read_text())
    argv = ["--stage", 2, "--model", base, "--data", data, "--images", tiny.world, "--steps", 4, "--batch-size", 4]
    argv += ["--out", tmp_path / "run", "--save-every", 1]
    stop_at_step_3(command, monkeypatch, *argv)
    data.write_text(data.read_text().replace("red", "der"))
    with pytest.raises(SystemExit, match="files whose sha256"):
        command(train, *argv, "--resume")
    data.write_text((tiny.world / "instruct.json").read_text())
    weights = load_file(base / "model.safetensors")
    save_file({name: p + 0.001 for name, p in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="other frozen weights"):
        command(train, *argv, "--resume")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    command(train, *argv, "--resume")


def test_the_negatives_of_clip_stay_the_same(tiny, command, tmp_path, monkeypatch):
    argv = ["--stage", 0, "--tower", "clip", "--world", tiny.world, "--size", "tiny", "--steps", 4, "--batch-size", 16]
    argv += ["--out", tmp_path / "run", "--save-every", 1]
    with pytest.raises(SystemExit, match="holds no run to resume"):
        command(train, *argv, "--resume")
    stop_at_step_3(command, monkeypatch, *argv)
    with pytest.raises(SystemExit, match="--accumulate 1, not 2"):
        command(train, *argv, "--resume", "--accumulate", 2)


def test_a_model_is_not_overwritten(tiny, command, tmp_path):
    folder = shutil.copytree(tiny.stage1, tmp_path / "model")
    (folder / "run.json").unlink()  # as in a downloaded one
    with pytest.raises(SystemExit, match="holds a model, which the run would replace"):
        command(train, *tiny.flags["stage2"], "--model", folder, "--out", folder)


def test_the_last_step_is_validated_and_a_damaged_best_checkpoint_refused(tiny, command, tmp_path, monkeypatch):
    argv = [*tiny.flags["stage2"], "--val", tiny.world / "instruct.json", "--patience", 1, "--out", tmp_path / "run"]
    finish = train.Saver.finish

    def damage(run):
        (best,) = run.checkpoints("best")
        content = bytearray((best / "trained.safetensors").read_bytes())
        content[-1] ^= 1
        (best / "trained.safetensors").write_bytes(content)

    monkeypatch.setattr(train.Saver, "finish", lambda saver, *more: (damage(saver.run), finish(saver, *more)))
    with pytest.raises(SystemExit, match="was changed after it was written"):
        command(train, *argv)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert "val_loss" in rows[-1]


def test_what_init_from_expects_is_said(tiny, command, tmp_path):
    with pytest.raises(SystemExit) as caught:
        command(train, *tiny.flags["stage2"], "--out", tmp_path / "run", "--init-from", tmp_path)
    assert f"--init-from {tmp_path}: no checkpoint of a run, as OUT/latest is one" in caught.value.code


def test_an_error_after_a_stop_signal_counts_as_interruption(tiny, command, tmp_path, monkeypatch, capsys):
    def compiler(*_):
        signal.raise_signal(signal.SIGINT)  # a terminal sends it to every process, also to the C++ compiler
        raise RuntimeError("C++ compile error")

    monkeypatch.setattr(train, "train_step", compiler)
    with pytest.raises(SystemExit) as caught:
        command(train, *tiny.flags["stage2"], "--out", tmp_path / "run")
    assert caught.value.code == 130 and "train.py: interrupted" in capsys.readouterr().err


def test_a_second_signal_does_not_wait(tiny, tmp_path):
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
import train
step = train.train_step
def slow(*args):
    if args[-1] == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    return step(*args)
train.train_step = slow
sys.argv = ["train.py", *{[str(value) for value in (*tiny.flags["stage1"], "--out", tmp_path / "run")]!r}]
train.main()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=50, capture_output=True).returncode == -signal.SIGTERM
    assert not (tmp_path / "run/latest").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_left_out(tiny, command, tmp_path, monkeypatch, number):
    """Its loss is not logged, the weights stay, and training continues."""
    forward, calls = train.Llava.forward, []

    def poisoned(self, *args, **more):
        calls.append(0)
        return forward(self, *args, **more) * (
            number if len(calls) == 4 else 1.0
        )  # the first call is machine.py's estimate

    monkeypatch.setattr(train.Llava, "forward", poisoned)
    command(train, *tiny.flags["stage2"], "--out", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "skipped" in row] == [3] and rows[2]["loss"] is None
    assert str(number) in rows[2]["skipped"]
    assert json.loads((tmp_path / "run/run.json").read_text())["skipped"] == 1
    clean = [json.loads(line)["loss"] for line in (tiny.stage2 / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows[:2]] == clean[:2] and rows[3]["loss"] < clean[0]


def test_weights_that_are_not_finite_are_never_saved(tiny, command, tmp_path):
    flags = [*tiny.flags["stage2"], "--lr", 1e39, "--save-every", 1, "--clip-grad", 0]
    with pytest.raises(SystemExit) as caught:
        command(train, *flags, "--out", tmp_path / "run")
    assert "step 1: weights are not finite" in caught.value.code
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_process_that_hangs_ends_and_says_where(tiny, tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
import train
train.train_step = lambda *args: time.sleep(60)
sys.argv = ["train.py", *{[str(v) for v in (*tiny.flags["stage1"], "--timeout", 1, "--out", tmp_path / "run")]!r}]
train.main()
"""
    result = subprocess.run([sys.executable, "-c", code], timeout=50, capture_output=True, text=True)
    assert result.returncode == 1 and "Timeout" in result.stderr and " in fit" in result.stderr
    assert os.listdir(tmp_path / "run")
