"""A run's folder: its log, its checkpoints, and how the newest one is found.

out/NAME/run.json           what was run: stage, every flag, and once it is done "finished"
out/NAME/log.jsonl          one line per step, appended
out/NAME/loss.png           the same as a picture
out/NAME/checkpoint-000200  what trains, the optimizer, the step, a manifest; safetensors and JSON only
out/NAME/latest             a link to the newest checkpoint
out/NAME/lock               held by the process that writes here
out/NAME/{config.json,model.safetensors,tokenizer.json,...}   the finished model
"""

import fcntl
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from inputs.files import (
    OUTPUT_ROOT,
    publish_folder,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
    write_tensors,
)


def finished_runs(*stages: int, root: Path = OUTPUT_ROOT) -> list[Path]:
    """Folders of the finished runs of these stages below `root`, the newest last."""
    found = []
    for path in root.glob("**/run.json"):
        values = json.loads(path.read_text())
        if values.get("finished") and values["stage"] in stages:
            found.append((values["finished"], path.parent))
    return [folder for _, folder in sorted(found)]


def newest_run(*stages: int, part: str = "") -> Path:
    """The newest finished run of these stages (of stage 0: of one tower); a ValueError names the ways to get it."""
    runs = [run for run in finished_runs(*stages) if not part or run.name == part]
    if not runs:
        names = " or ".join(map(str, stages))
        raise ValueError(
            f"no finished stage-{names} run {f'({part}) ' if part else ''}below {OUTPUT_ROOT}/: name a folder, "
            f"or make one with `python train.py --stage {stages[-1]}`, or all of them with `bash speedrun.sh`"
        )
    return runs[-1]


# Flags that change nothing about what is learned, but for the order of sums: they may differ when a run is resumed.
MAY_CHANGE = ("out", "resume", "allow_changes", "device", "workers", "save_every", "keep", "cache_gb", "timeout")
MAY_CHANGE += ("accumulate", "compile", "check_replicas", "max_skips", "shard", "recompute", "board")
MAY_CHANGE += ("offload_states",)
MAY_CHANGE += ("model", "vision", "llm", "steps")  # looked at once they are settled
MAY_CHANGE += ("flags", "differs")  # what they tell is told by the rest


def checkpoint_step(path: Path) -> int:
    """The step a checkpoint was made after."""
    return int(path.name.split("-")[1])


class Run:
    """One run's folder.

    Args: folder; values: what run.json records; resume: go on with what the folder holds; allow_changes: even if it
    was trained with other values. Raises ValueError naming what differs.
    """

    def __init__(self, folder: Path, values: dict, resume: bool, allow_changes: bool = False):
        self.folder, self.values = folder, values
        exists = (folder / "run.json").exists()
        if exists and not resume:
            raise ValueError(f"{folder} holds a run already: --resume goes on with it, another --out starts afresh")
        if resume and not exists:
            raise ValueError(f"{folder} holds no run to resume")
        self.old = read_json(folder / "run.json") if exists else {}
        self.finished = bool(self.old.get("finished"))
        fixed = self.old.keys() & values.keys() - set(MAY_CHANGE)
        for key in sorted(fixed, key=lambda key: (key != "recipe", key)):  # what sets the others comes first
            self.check_unchanged(key, values[key], allow_changes)

    def check_unchanged(self, key: str, new, allowed: bool):
        if new != self.old[key] and not allowed:
            flag = key.replace("_", "-")
            raise ValueError(
                f"{self.folder} was trained with --{flag} {self.old[key]}, not {new}: "
                "--allow-changes goes on with it all the same"
            )

    def open(self):
        """Create the folder and keep every other run out of it, until this process ends in whichever way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = (self.folder / "lock").open("w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel's: none is left behind by a kill
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{self.folder}: another process is training into this folder") from None
        for path in self.folder.glob("*-*.partial"):  # of a process that was killed while it wrote
            shutil.rmtree(path)

    def start(self, step: int) -> tuple[int, list[float]]:
        """Note what is run; on resume, forget what came after `step`.

        Returns how many steps in a row were skipped up to then, and every loss on held-out data.
        """
        write_json(self.folder / "run.json", self.values)
        rows = [row for row in self.rows() if row["step"] <= step]
        kept = self.folder / "log.jsonl.partial"
        kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(kept, self.folder / "log.jsonl")
        self.log = (self.folder / "log.jsonl").open("a")
        for path in self.checkpoints("best"):
            if checkpoint_step(path) > step:
                shutil.rmtree(path)
        skipped = next((i for i, row in enumerate(reversed(rows)) if "skipped" not in row), len(rows))
        return skipped, [row["val_loss"] for row in rows if "val_loss" in row]

    def rows(self) -> list[dict]:
        """The log's lines; one cut short by a kill is left out."""
        path, rows = self.folder / "log.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def write_row(self, row: dict):
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()

    def finish(self, save: Callable[[Path], None], summary: dict):
        """Publish the finished model's files, then mark the run as finished, then drop the checkpoints."""
        shutil.rmtree(self.folder / "final", ignore_errors=True)  # of a process that was killed below
        publish_folder(self.folder / "final", save)
        for path in sorted((self.folder / "final").iterdir()):
            os.replace(path, self.folder / path.name)
        (self.folder / "final").rmdir()
        write_json(self.folder / "run.json", self.values | summary | {"finished": time.time()})
        (self.folder / "latest").unlink(missing_ok=True)
        (self.folder / "lock").unlink()
        for path in [*self.checkpoints(), *self.checkpoints("best")]:
            shutil.rmtree(path)
        self.log.close()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoints(self, kind: str = "checkpoint") -> list[Path]:
        """Folders of the checkpoints, or of the "best" by a held-out loss, the newest last."""
        return sorted((path for path in self.folder.glob(f"{kind}-*") if not path.suffix), key=checkpoint_step)

    def last_checkpoint_hint(self) -> str:
        """For messages: what to go on from."""
        return f"the last good checkpoint is {self.checkpoints()[-1]}" if self.checkpoints() else "no checkpoint yet"

    def newest_valid_checkpoint(self) -> Path | None:
        """The newest checkpoint that is as it was written; damaged ones are named, and put aside.

        Raises ValueError if there are checkpoints, but all are damaged.
        """
        for path in reversed(self.checkpoints()):
            try:
                verify_manifest(path)
                return path
            except ValueError as error:
                aside = path.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                print(f"{error}; put aside as {aside.name}", file=sys.stderr, flush=True)
        if any(self.folder.glob("checkpoint-*.damaged")):
            raise ValueError(f"{self.folder}: every checkpoint is damaged; another --out starts afresh")
        return None

    def save_checkpoint(self, step: int, files: dict[str, dict], values: Iterator[torch.Tensor], keep: int, kind: str):
        """Publish a checkpoint of these files' tensors, then drop all but the newest `keep` of its kind.

        Args: files: tensors by file and name; values: what they hold, one after another; kind: "checkpoint", which
        `latest` then points at, or "best".
        Raises ValueError with the bytes needed and free if it cannot be written; those before it are untouched then.
        """
        path = self.folder / f"{kind}-{step:06d}"
        needed = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())

        def write(folder: Path):
            for name, tensors in files.items():
                write_tensors(folder / name, tensors, values)
            write_json(folder / "state.json", {"step": step, "run": self.values})
            write_manifest(folder)

        try:
            publish_folder(path, write)
            verify_manifest(path)
            if kind == "checkpoint":
                link = self.folder / "latest.partial"
                link.unlink(missing_ok=True)
                link.symlink_to(path.name)
                os.replace(link, self.folder / "latest")
        except OSError as error:
            shutil.rmtree(path.with_name(path.name + ".partial"), ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            why = f"{error.strerror} ({needed:,} bytes needed, {free:,} free)"
            raise ValueError(f"step {step}: cannot write {path}: {why}; {self.last_checkpoint_hint()}") from None
        finally:
            deque(values, maxlen=0)  # the other ranks take part in every one of them
        for older in self.checkpoints(kind)[:-keep]:
            shutil.rmtree(older)
