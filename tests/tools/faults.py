"""Kill, stop and restart training runs many times, and print a table of how many end as an uninterrupted run.

    python tests/tools/faults.py                       all of it but the soak: about half an hour on two cores
    python tests/tools/faults.py --only kills          steps, kills, nodes, restarts or stops
    python tests/tools/faults.py --only soak           train, kill, resume for --minutes 30

Every trial compares the hash of the finished weights with that of an uninterrupted run. `bash test.sh` does not run
this; its tests try six of the instants.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import train  # noqa: E402
from world.writer import write_world  # noqa: E402

STEPS, SAVE_EVERY = 24, 4

# ---------------------------------------------------------------------------------------------------------------------
# processes


def wait_to_be_killed(function: str, path: str, calls: int, marker: Path):
    """Make a function touch `marker` and wait at its n-th call, counting calls whose path ends in `path`."""
    module, _, name = function.rpartition(".")
    original, number = getattr(sys.modules[module], name), count(1)

    def waiting(*args, **kwargs):
        if (not path or str(args[0]).endswith(path)) and next(number) == calls:
            marker.touch()
            time.sleep(600)
        return original(*args, **kwargs)

    setattr(sys.modules[module], name, waiting)


def run_train(argv: list, environment: dict, fault: tuple | None):
    """Run train.py in this process, without its output."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if fault:
        wait_to_be_killed(*fault)
    sys.argv = ["train.py", *map(str, argv)]
    train.main()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(argv: list, ranks: int = 1, fault: tuple | None = None) -> list[multiprocessing.Process]:
    """Start a process for each rank; with a `fault` (function, path, calls, marker), rank 0 waits there."""
    context = multiprocessing.get_context("forkserver")  # torch is imported once for all of them
    context.set_forkserver_preload(["train"])
    processes, port = [], free_port()
    for rank in range(ranks):
        group = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in group.items()} if ranks > 1 else {}
        own_fault = None if rank else fault
        processes.append(context.Process(target=run_train, args=(argv, environment, own_fault), daemon=True))
        processes[-1].start()
    return processes


def kill(processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def finish(argv: list, ranks: int = 1):
    """Run to the end."""
    processes = start(argv, ranks)
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]


def kill_at(argv: list, fault: tuple, ranks: int = 1):
    """Run up to the fault, and send SIGKILL there."""
    *_, marker = fault
    marker.unlink(missing_ok=True)
    processes, end = start(argv, ranks, fault), time.monotonic() + 90
    while not marker.exists():
        assert processes[0].is_alive() and time.monotonic() < end, f"{fault[:3]} never came"
        time.sleep(0.01)
    kill(processes)
    assert processes[0].exitcode == -signal.SIGKILL


# ---------------------------------------------------------------------------------------------------------------------
# what is compared


def weights_hash(folder: Path) -> str:
    (path,) = folder.glob("*model.safetensors")  # of an adapter, adapter_model.safetensors
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steps_logged(folder: Path) -> int:
    path = folder / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def steps_kept(folder: Path) -> int:
    """The step from which a resume continues. Only complete checkpoints have such a name."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-??????")), default=0)


def resume(argv: list, folder: Path, ranks: int = 1):
    """Run to the end, with --resume if the run had begun before it was killed."""
    finish([*argv, "--resume"] if (folder / "run.json").exists() else argv, ranks)


class Bench:
    """A tiny world and models, and for each kind of run its flags and the hash of an uninterrupted run's weights."""

    def __init__(self, root: Path):
        self.root = root
        world, common = root / "world", ["--batch-size", 8, "--device", "cpu", "--dtype", "float32", "--keep", 2]
        write_world(world, 64, 0, 72, 20, 2)
        common += ["--world", world]
        finish(["--stage", 0, "--size", "tiny", *common, "--steps", 6, "--out", root / "towers"])
        common += ["--steps", STEPS, "--save-every", SAVE_EVERY]
        towers = ["--vision", root / "towers/clip", "--llm", root / "towers/decoder"]
        self.flags = {"stage 1": ["--stage", 1, *towers, *common]}
        finish([*self.flags["stage 1"], "--out", root / "first"])
        self.flags["stage 2"] = ["--stage", 2, "--model", root / "first", *common]
        finish([*self.flags["stage 2"], "--out", root / "second"])
        finish([*self.flags["stage 2"], "--out", root / "both"], ranks=2)
        self.flags["LoRA"] = [*self.flags["stage 2"], "--lora", "llm"]
        self.flags["QLoRA"] = [*self.flags["LoRA"], "--bits", 4]
        self.flags["compiled"] = [*self.flags["stage 2"], "--compile"]
        for name in ("LoRA", "QLoRA", "compiled"):
            finish([*self.flags[name], "--out", root / name])
        folders = {"stage 1": "first", "stage 2": "second"} | {name: name for name in ("LoRA", "QLoRA", "compiled")}
        self.expected = {name: weights_hash(root / folder) for name, folder in folders.items()}
        self.expected_of_two = weights_hash(root / "both")

    def new(self, name: str) -> tuple[list, Path]:
        """Flags of a run in an empty folder, and the folder."""
        folder = self.root / "run"
        shutil.rmtree(folder, ignore_errors=True)
        return [*self.flags[name], "--out", folder], folder


# ---------------------------------------------------------------------------------------------------------------------
# trials: each yields rows of the table


KINDS = (("stage 1", 1), ("stage 2", 1), ("stage 2", 2), ("LoRA", 1), ("QLoRA", 1), ("compiled", 1))


def every_step(bench: Bench, kinds=KINDS):
    """Kill a run at the start of each step, and resume it."""
    for name, ranks in kinds:
        equal = 0
        expected = bench.expected_of_two if ranks == 2 else bench.expected[name]
        for step in tqdm(range(1, STEPS + 1), f"{name}, {ranks} ranks"):
            argv, folder = bench.new(name)
            kill_at(argv, ("train.train_step", "", step, bench.root / "here"), ranks)
            resume(argv, folder, ranks)
            equal += weights_hash(folder) == expected
        kind = f"{name}{', 2 ranks' if ranks == 2 else ''}"
        yield f"killed at every step of {STEPS}, {kind}", f"{equal}/{STEPS} end in the same bits"


PARTIAL = "checkpoint-000008.partial"
PHASES = {  # of writing a checkpoint, and the finished model: function, the path it is given, which call
    "before the first tensor": ("training.runs.write_tensors", f"{PARTIAL}/trained.safetensors", 1),
    "between its two files": ("training.runs.write_tensors", f"{PARTIAL}/optimizer.safetensors", 1),
    "before the manifest": ("training.runs.write_manifest", PARTIAL, 1),
    "inside the manifest": ("inputs.files.fsync", f"{PARTIAL}/manifest.json.partial", 1),
    "before it is on the disk": ("inputs.files.fsync", f"{PARTIAL}/trained.safetensors", 1),
    "before it has its name": ("inputs.files.fsync", PARTIAL, 1),
    "before it is verified": ("training.runs.verify_manifest", "checkpoint-000008", 1),
    "before the link to it": ("os.replace", "latest.partial", 2),
    "before the oldest goes": ("shutil.rmtree", "checkpoint-000004", 1),
    "the model half in place": ("os.replace", "final/model.safetensors", 1),
    "in place, not yet marked": ("training.runs.write_json", "run/run.json", 2),
}


def random_kills(bench: Bench, trials: int):
    """Kill runs four times in every phase of writing, and otherwise at random times."""
    rng, lost, equal = random.Random(0), [], 0
    argv, folder = bench.new("stage 2")
    begin = time.monotonic()
    finish(argv)
    duration = time.monotonic() - begin
    faults = [(name, phase) for name, phase in PHASES.items() for _ in range(4)]
    faults += [(None, None)] * (trials - len(faults))
    for name, phase in tqdm(faults, "kills"):
        argv, folder = bench.new("stage 2")
        if phase:
            steps = ["--keep", 1] if name == "before the oldest goes" else []
            argv += steps
            kill_at(argv, (*phase, bench.root / "here"))
        else:
            processes = start(argv)
            processes[0].join(rng.uniform(0, duration))
            kill(processes)
        if not json.loads((folder / "run.json").read_text() if (folder / "run.json").exists() else "{}").get(
            "finished"
        ):
            lost.append(steps_logged(folder) - steps_kept(folder))
            resume(argv, folder)
        equal += weights_hash(folder) == bench.expected["stage 2"]
    outcome = f"{equal}/{len(faults)} end in the same bits, at most {max(lost)} of {SAVE_EVERY} steps lost"
    yield f"SIGKILL at {len(faults)} instants, {len(PHASES)} phases of writing among them", outcome


WRAPPER = """
import os, signal, sys
sys.path.insert(0, {repository!r})
import torch, train
torch.set_num_threads(1)
step = train.train_step
def faulty(*args):
    at = (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"], args[-1])
    if at == ("0", {rank!r}, {step}):
        os.kill(os.getpid(), signal.{number})
    return step(*args)
train.train_step = faulty
train.main()
"""


def torchrun(bench: Bench, rank: int, step: int, number: str, *flags) -> tuple[bool, float]:
    """Send a signal to one of two ranks before a step; returns whether the run ends as it should, and its seconds.

    Without --out, each restart has to find the folder that the first start has named.
    """
    argv, place = bench.flags["stage 2"], bench.root / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    script = bench.root / "wrapper.py"
    script.write_text(WRAPPER.format(repository=str(REPOSITORY), rank=str(rank), step=step, number=number))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    command = [*launch, script, *argv, *flags]
    begin = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=place
    )
    try:
        status = process.wait(180)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return False, 180.0
    seconds, folders = time.monotonic() - begin, list((place / "out").iterdir())
    return status == 0 and [weights_hash(folder) for folder in folders] == [bench.expected_of_two], seconds


def restarts(bench: Bench, trials: int):
    """Kill one rank under torchrun --max-restarts."""
    rng = random.Random(1)
    results = [torchrun(bench, i % 2, rng.randrange(STEPS), "SIGKILL") for i in tqdm(range(trials), "restarts")]
    seconds = statistics.median(seconds for _, seconds in results)
    good = sum(good for good, _ in results)
    outcome = f"{good}/{trials} recover to the same bits, {seconds:.0f} s in the median for the whole run"
    yield "one of two ranks killed under `torchrun --max-restarts`", outcome


def stops(bench: Bench, trials: int):
    """Stop one rank without killing it: its connections stay open."""
    limit = 10
    results = [torchrun(bench, i % 2, 9, "SIGSTOP", "--timeout", limit) for i in tqdm(range(trials), "stops")]
    seconds = statistics.median(seconds for _, seconds in results)
    good = sum(good for good, _ in results)
    outcome = f"{good}/{trials} are restarted and end in the same bits, {seconds:.0f} s in the median"
    yield f"one of two ranks stopped (SIGSTOP), `--timeout {limit}`", outcome


def nodes(bench: Bench):
    """Run two agents that find each other, as on two machines."""
    argv, folder = bench.new("stage 2")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d"]
    launch += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=two"]
    command = list(map(str, [*launch, REPOSITORY / "train.py", *argv]))
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    agents = [subprocess.Popen(command, env=environment, **silent) for _ in range(2)]
    good = [agent.wait(180) for agent in agents] == [0, 0] and weights_hash(folder) == bench.expected_of_two
    outcome = "the same bits as two ranks of one" if good else "DIFFER"
    yield "two agents of torchrun (`--nnodes 2`), one rank each", outcome


def soak(bench: Bench, minutes: float):
    """Train, kill, resume; memory and open files of the training process, as slopes over its life."""
    rng, samples, kills = random.Random(2), [], 0
    argv, folder = bench.new("stage 2")
    argv += ["--steps", 10_000_000, "--save-every", 50]
    end = time.monotonic() + 60 * minutes
    with tqdm(total=round(60 * minutes), desc="soak", unit="s") as bar:
        while time.monotonic() < end:
            processes = start([*argv, "--resume"] if kills else argv)
            born, life = time.monotonic(), min(rng.uniform(20, 180), max(5, end - time.monotonic()))
            life_samples = []
            while time.monotonic() < born + life:
                time.sleep(1)
                bar.update(1)
                assert processes[0].is_alive(), f"it ended by itself: {processes[0].exitcode}"
                if time.monotonic() > born + 10:  # once it is warm
                    life_samples.append((time.monotonic() - born, *usage(processes[0].pid)))
            samples += [life_samples] if len(life_samples) > 10 else []
            kill(processes)
            kills += 1
    slopes = np.array([np.polyfit(*np.array(life).T[[0, column]], 1)[0] for life in samples for column in (1, 2)])
    memory, opened = 60 * slopes.reshape(-1, 2).T
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    whole = steps == list(range(1, len(steps) + 1))
    outcome = f"{kills} kills, {len(steps):,} steps, log {'without a gap' if whole else 'BROKEN'}; "
    outcome += f"{np.median(memory) / 1e6:+.2f} MB and {np.median(opened):+.2f} open files per minute in the median"
    yield f"soak of {minutes:g} minutes", outcome


def usage(pid: int) -> tuple[int, int]:
    """Resident bytes and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("steps", "kills", "nodes", "restarts", "stops", "soak"))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--restarts", type=int, default=50)
    parser.add_argument("--stops", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=30, help="of the soak")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root))
        trials = {
            "steps": lambda: every_step(bench),
            "kills": lambda: random_kills(bench, args.kills),
            "nodes": lambda: nodes(bench),
            "restarts": lambda: restarts(bench, args.restarts),
            "stops": lambda: stops(bench, args.stops),
            "soak": lambda: soak(bench, args.minutes),
        }
        chosen = [args.only] if args.only else [name for name in trials if name != "soak"]
        print("| what was done | what came of it |\n|---|---|", flush=True)
        for name in chosen:
            for what, outcome in trials[name]():
                print(f"| {what} | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
