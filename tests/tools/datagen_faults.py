"""An endpoint that fails in twelve ways, and a process that is killed again and again: is every record there, once?

python tests/tools/datagen_faults.py faults --records 1000
python tests/tools/datagen_faults.py kills --kills 50

`faults`: every request fails once to three times before it is answered; the key must stand in no file and no output.
`kills`: python -m datagen is killed (SIGKILL) at random instants and started again until it ends by itself; data.json
must equal that of a run that nobody killed, and no answer may be stored twice.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fake_endpoint import FAULTS, FakeEndpoint
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import datagen.__main__ as script  # noqa: E402
from datagen import endpoint  # noqa: E402

KEY = "sk-test-0123456789abcdef-SECRET"
START = "from datagen import endpoint; endpoint.FIRST_WAIT = 0.02; from datagen.__main__ import main; main()"


def write_items(folder: Path, count: int) -> list[str]:
    """A list of items with one caption and one box each; returns the arguments that read it."""
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    rows = [
        {
            "id": i,
            "image": "red.png",
            "captions": [f"Vehicle {i} of {count} is a red car."],
            "boxes": [["car", 0, 0, 1, 1]],
        }
        for i in range(count)
    ]
    (folder / "items.json").write_text(json.dumps(rows))
    return [str(folder / "items.json"), "--images", str(folder)]


def command(source: list[str], out: Path, url: str, *more: str) -> list[str]:
    teacher = ["--endpoint", url, "--llm", "fake", "--yes", "--kinds", "conversation", "--out", str(out)]
    return [sys.executable, "-c", START, "make", *source, *teacher, "--filters", "format", *more]


def run(argv: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(argv, env=os.environ | {"DATAGEN_KEY": KEY}, capture_output=True, text=True)


def fail_first(key: str, attempt: int) -> str:
    """One to three faults, chosen by the request's hash, then an answer."""
    number = int(key, 16)
    return FAULTS[(number // 3 + attempt * 5) % len(FAULTS)] if attempt <= number % 3 else ""


def check_once(out: Path, count: int):
    """Raise AssertionError unless every record is there once, in data.json and in the store."""
    records = json.loads((out / "data.json").read_text())
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records) == count, len(records)
    assert len({row["custom_id"] for row in rows}) == len(rows) == count, len(rows)
    for i, record in enumerate(records):
        assert f"Vehicle {i} of" in record["conversations"][1]["value"], record


def measure_faults(folder: Path, args: argparse.Namespace):
    source, out, start = write_items(folder, args.records), folder / "out", time.monotonic()
    with FakeEndpoint(fail_first) as server:
        done = run(command(source, out, server.url, "--workers", "32", "--timeout", "1"))
        seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr[-2000:]
    check_once(out, args.records)
    leaks = [path.name for path in out.rglob("*") if KEY in path.read_text(errors="replace")]
    assert not leaks and KEY not in done.stdout + done.stderr, leaks
    seen = Counter({name or "answered": count for name, count in server.seen.items()})
    print(f"{args.records:,} records whole in {seconds:.0f} s, the key in no file and no output; {dict(seen)}")


def measure_kills(folder: Path, args: argparse.Namespace):
    """Processes are forked, so that none spends seconds on imports before there is something to kill."""
    source, kills, rounds, asked_again, rng = write_items(folder, args.records), 0, 0, 0, random.Random(args.seed)
    fork = multiprocessing.get_context("fork")

    def start(server: FakeEndpoint, out: Path):
        child = fork.Process(target=call, args=(command(source, out, server.url, "--workers", "4")[3:],))
        child.start()
        return child

    with FakeEndpoint(delay=0.05) as server:
        start(server, folder / "whole").join()
    while kills < args.kills:
        out, rounds = folder / f"out-{rounds}", rounds + 1
        with FakeEndpoint(delay=0.05) as server:
            while True:
                before, child = server.tries.total(), start(server, out)
                while server.tries.total() == before and child.is_alive():
                    time.sleep(0.002)  # until it asks: a kill before that finds nothing to lose
                child.join(rng.uniform(0, 1) if kills < args.kills else None)
                if not child.is_alive():
                    break
                os.kill(child.pid, signal.SIGKILL)
                child.join()
                kills += 1
        assert child.exitcode == 0, child.exitcode
        check_once(out, args.records)
        assert (out / "data.json").read_bytes() == (folder / "whole/data.json").read_bytes()
        asked_again += server.tries.total() - args.records
    print(
        f"{kills} kills in {rounds} runs of {args.records} records: all equal to the run that nobody killed; ", end=""
    )
    print(f"{asked_again} requests were on the way at a kill and were asked again")


def call(argv: list[str]):
    """python -m datagen in this process, silent."""
    os.environ["DATAGEN_KEY"], sys.argv, endpoint.FIRST_WAIT = KEY, ["datagen", *argv], 0.02
    with open(os.devnull, "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
        script.main()
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("faults", "kills"))
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (measure_faults if args.what == "faults" else measure_kills)(Path(folder), args)


if __name__ == "__main__":
    main()
