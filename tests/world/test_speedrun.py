"""The speedrun: the commands of its plan, what a second run repeats, and how signals end it."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from world.speedrun import choose_compile, plan, refuse_other_flags

ROOT = Path(__file__).parents[2]
# A step that notes each signal in a file, as a training run that saves a checkpoint, and ends with the usual status.
SAVING = """
import pathlib, signal, sys, time
def save(number, frame):
    with open("signals", "a") as file: file.write(f"{number} ")
signal.signal(signal.SIGINT, save); signal.signal(signal.SIGTERM, save)
pathlib.Path("started").touch()
while not pathlib.Path("signals").exists(): time.sleep(0.01)
time.sleep(0.3)
sys.exit(128 + int(open("signals").read().split()[0]))
"""
SPEEDRUN = f"""
from pathlib import Path
from world.speedrun import Runner, Step, run_steps
steps = [Step("first", ["-c", "open('first', 'a').write('x')"]), Step("second", ["-c", {SAVING!r}])]
print(run_steps(steps, Path("minutes.json"), Runner()))
"""


def options(command: list[str]) -> dict[str, str]:
    return dict(zip(command[1::2], command[2::2]))


def test_the_plan_trains_what_it_always_did():
    steps = {step.name: step for step in plan(20, 3, Path("out/s"), ablation=False, stage2_flags=["--compile"])}
    assert list(steps) == [
        "world", "clip", "decoder", "stage1", "stage2-frozen", "stage2", "evaluation", "blind evaluation", "probes"
    ]  # fmt: skip
    assert steps["world"].command == ["-m", "world", "write", "--out", "out/s/world", "--n", "15000", "--seed", "3"]
    trained = {name: options(step.command) for name, step in steps.items() if step.command[0] == "train.py"}
    assert {name: values["--steps"] for name, values in trained.items()} == {
        "clip": "720", "decoder": "1650", "stage1": "360", "stage2-frozen": "10200", "stage2": "2550"
    }  # fmt: skip
    assert all(values["--seed"] == "3" and values["--world"] == "out/s/world" for values in trained.values())
    assert [step.run for step in steps.values() if step.run] == [
        Path("out/s") / name for name in ("stage0/clip", "stage0/decoder", "stage1", "stage2-frozen", "stage2")
    ]
    assert steps["stage2"].command[-5:] == ["--train", "vision,projector,llm", "--lr", "3e-4", "--compile"]
    assert "--train" not in steps["stage2-frozen"].command
    assert steps["stage1"].command[-1] == "--whiten" and steps["stage2"].command[-1] == "--compile"
    names = [step.name for step in plan(20, 3, Path("out/s"), ablation=True, stage2_flags=[])]
    assert names[5:9] == ["no-stage1", "ablation evaluation", "stage2-frozen", "stage2"]  # stage2 stays the newest run


@pytest.mark.usefixtures("compiler")
def test_stage_2_is_compiled_where_that_works_and_pays():
    assert choose_compile(10) == ["--compile"] and choose_compile(9.9) == []


def test_a_compiler_that_does_not_work_is_named(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CXX", "none")
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    assert choose_compile(10) == []
    assert "stage 2 trains without --compile: --compile does not work here: " in capsys.readouterr().err


def test_a_folder_begun_with_other_flags_is_refused(tmp_path):
    refuse_other_flags(tmp_path / "speedrun.json", {"minutes": 15, "seed": 0})
    refuse_other_flags(tmp_path / "speedrun.json", {"minutes": 15, "seed": 0})
    with pytest.raises(SystemExit, match="was begun with --seed 0, not 1"):
        refuse_other_flags(tmp_path / "speedrun.json", {"minutes": 15, "seed": 1})


def test_a_training_step_resumes_what_it_had_begun(tmp_path):
    step = plan(1, 0, tmp_path, False, [])[1]
    assert "--resume" not in step.resumed()
    (tmp_path / "stage0/clip").mkdir(parents=True)
    (tmp_path / "stage0/clip/run.json").touch()
    assert step.resumed() == [*step.command, "--resume"]


def start(folder: Path, **more) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", SPEEDRUN], cwd=folder, env=environment, text=True, **more)


def wait_for(path: Path):
    limit = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < limit, f"no {path.name} after a minute"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_save_and_end(tmp_path, number):
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(tmp_path / "started")
    process.send_signal(number)  # to the speedrun alone: it has no terminal, and passes the signal on
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error == "speedrun: stopped in second; the same command resumes it\n"
    assert (tmp_path / "signals").read_text().split() == [str(int(number))]
    assert list(json.loads((tmp_path / "minutes.json").read_text())) == ["first"]
    process = start(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # it stops in the same step again
    assert process.wait(60) == 1 and (tmp_path / "first").read_text() == "x"  # the first step was not repeated


def test_a_training_run_inside_saves_and_ends(tiny, tmp_path):
    run = tmp_path / "run"
    more = ["--steps", "100000", "--save-every", "50000", "--out", str(run)]
    argv = ["train.py", *map(str, tiny.flags["stage2"]), *more]
    program = "from pathlib import Path; from world.speedrun import Runner, Step, run_steps\n"
    program += f"run_steps([Step('stage2', {argv!r})], Path({str(tmp_path / 'minutes.json')!r}), Runner())"
    more = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", program], **more)
    wait_for(run / "log.jsonl")
    while not (rows := (run / "log.jsonl").read_text().count("\n")):
        time.sleep(0.01)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in error
    saved, stopped = error.splitlines()[-2:]
    step = json.loads((run / "latest/state.json").read_text())["step"]
    assert step == (run / "log.jsonl").read_text().count("\n") >= rows
    assert saved == f"stopped after step {step}; continue with --out {run} --resume"
    assert stopped == "speedrun: stopped in stage2; the same command resumes it"


def test_ctrl_c_in_a_terminal_reaches_the_step_once(tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, "-c", SPEEDRUN], os.environ | {"PYTHONPATH": str(ROOT)})
    wait_for(tmp_path / "started")
    os.write(terminal, b"\x03")
    output = b""
    while True:
        try:
            piece = os.read(terminal, 1000)
        except OSError:  # the terminal's other end is closed
            break
        if not piece:
            break
        output += piece
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130 and b"Traceback" not in output
    assert b"speedrun: stopped in second" in output
    assert (tmp_path / "signals").read_text().split() == ["2"]
