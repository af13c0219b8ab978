"""The folder of a training run: its log, its checkpoints, and the finished model.

out/NAME/run.json           stage and all flags; after the end also "finished" and a summary
out/NAME/log.jsonl          one line per step, appended
out/NAME/loss.png           the loss curve
out/NAME/checkpoint-000200  trainable weights, optimizer, step, manifest (safetensors and JSON only)
out/NAME/best-000100        the same, of the smallest validation loss so far (with --patience)
out/NAME/latest             a link to the newest checkpoint
out/NAME/lock               locked by the process that trains into this folder
out/NAME/{config.json,model.safetensors,tokenizer.json,...}   the finished model

Every file appears whole or not at all. Checksums verify every checkpoint after it is written and before it is used. So
a run that was killed at any instant resumes from its newest valid checkpoint.
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

from formats.adapters import base_of_adapter
from inputs import files
from inputs.files import OUTPUT_ROOT, publish_folder, verify_manifest, write_json, write_manifest, write_tensors
from training import plots

WEIGHTS = ("model", "vision", "llm")  # flags that name folders of weights
# Flags that may differ when a run is resumed: they change at most the order of summation. Those of the last line are
# compared elsewhere (WEIGHTS, steps) or repeat other flags (flags, differs).
MAY_CHANGE = ("out", "resume", "allow_changes", "device", "workers", "save_every", "keep", "cache_gb", "timeout")
MAY_CHANGE += ("accumulate", "compile", "no_fast", "shard", "recompute", "board", "diagnose")
MAY_CHANGE += (*WEIGHTS, "steps", "flags", "differs")


def newest_run(*stages: int, part: str = "") -> Path:
    """Return the newest finished run of these stages; of stage 0, of one tower. Raises ValueError if there is none."""
    finished = {}
    for path in OUTPUT_ROOT.glob("**/run.json"):
        run = files.read_json(path)
        if run.get("finished") and run["stage"] in stages and part in ("", path.parent.name):
            finished[run["finished"]] = path.parent
    if not finished:
        names = " or ".join(map(str, stages)) + (f" ({part})" if part else "")
        ways = f"`python train.py --stage {stages[-1]}`, or make all of them with `bash speedrun.sh`"
        raise ValueError(f"no finished run of stage {names} below {OUTPUT_ROOT}/: name a folder, make one with {ways}")
    return finished[max(finished)]


def choose_base(model: Path | None, adapter: Path | None, script: str) -> Path:
    """The folder of --model, else the base of --adapter or the newest finished run, which is named on stderr."""
    if model:
        return model
    base = base_of_adapter(adapter) if adapter else newest_run(1, 2)
    print(f"{script}: --model {base}, {'named by the adapter' if adapter else 'the newest'}", file=sys.stderr)
    return base


class Run:
    """The folder of one run.

    Args: folder: need not exist. values: all flags, for run.json. resume: continue the run that the folder holds.
    Raises ValueError if there is a run and resume is False, if there is none to resume, or if a flag differs.
    """

    def __init__(self, folder: Path, values: dict, resume: bool):
        self.folder, self.values = folder, values
        exists = (folder / "run.json").exists()
        if exists and not resume:
            raise ValueError(f"{folder} already holds a run: add --resume to continue it, or name another --out")
        if resume and not exists:
            raise ValueError(f"{folder} holds no run to resume")
        if not exists and ((folder / "config.json").exists() or any(folder.glob("*.safetensors"))):
            raise ValueError(f"{folder} holds a model, which the run would replace: name another --out")
        self.old = files.read_json(folder / "run.json") if exists else {}
        self.finished = bool(self.old.get("finished"))
        fixed = self.old.keys() & values.keys() - set(MAY_CHANGE)
        if folder.name == "clip" or values.get("loss_mean") == "micro-batch":
            fixed |= self.old.keys() & {"accumulate"}  # CLIP compares the pairs of a micro-batch
        for key in sorted(fixed, key=lambda key: (key != "recipe", key)):  # the recipe first: it sets the others
            self.check_unchanged(key, values[key])

    def check_unchanged(self, key: str, new, what: str = ""):
        """Raise ValueError if a flag, or the value that `what` names, differs from the run's, unless --allow-changes is
        given. A run that has no such value accepts any."""
        if new != (old := self.old.get(key, new)) and not self.values.get("allow_changes"):
            flags = f"{what or '--' + key.replace('_', '-')} {old}, not {new}"
            raise ValueError(f"{self.folder} was trained with {flags}: add --allow-changes to continue anyway")

    def open(self):
        """Create the folder and lock it until this process ends. Raises ValueError if another one holds the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = (self.folder / "lock").open("w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it even after a kill
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{self.folder}: another process is training into this folder") from None
        for path in self.folder.glob("*-*.partial"):  # left by a process that was killed while writing
            shutil.rmtree(path)

    def start(self, step: int) -> tuple[int, list[float]]:
        """Write run.json and open the log. On resume, drop log rows and best checkpoints from after `step`. Returns the
        number of skipped steps in a row just before `step`, and all validation losses so far."""
        write_json(self.folder / "run.json", self.values)
        path = self.folder / "log.jsonl"
        rows = [row for row in plots.read_log(self.folder) if row["step"] <= step] if path.exists() else []
        files.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self.log = path.open("a", buffering=1)  # each line is written at once
        for path in self.checkpoints("best"):
            if int(path.name.removeprefix("best-")) > step:
                shutil.rmtree(path)
        skipped = next((i for i, row in enumerate(reversed(rows)) if "skipped" not in row), len(rows))
        return skipped, [row["val_loss"] for row in rows if "val_loss" in row]

    def write_row(self, row: dict):
        self.log.write(json.dumps(row) + "\n")

    def finish(self, save: Callable[[Path], None]):
        """Draw the loss, publish the finished model, mark the run as finished, then delete the checkpoints, in that
        order. Prints the loss over the last 5 % of the steps."""
        rows = plots.read_log(self.folder)
        losses = [row["loss"] for row in rows[-max(1, len(rows) // 20) :] if row["loss"] is not None]
        loss, skipped = sum(losses) / max(1, len(losses)), sum("skipped" in row for row in rows)
        bad = len(files.read_complete_lines(self.folder / "skipped.jsonl").splitlines())  # of --skip-bad
        summary = {"loss": round(loss, 4), "skipped": skipped, "bad_records": bad}
        plots.loss_curve(self.folder / "loss.png", {self.folder.name: rows})
        shutil.rmtree(self.folder / "final", ignore_errors=True)  # left by a process that was killed here
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
        more = f"; {skipped} steps were skipped, see log.jsonl" if skipped else ""
        more += f"; {bad:,} bad records were left out or replaced, see skipped.jsonl" if bad else ""
        print(f"{self.folder}: loss {loss:.3f} over the last {len(losses)} steps{more}", file=sys.stderr, flush=True)

    def checkpoints(self, kind: str = "checkpoint") -> list[Path]:
        """Return the folders of the checkpoints of a kind, "checkpoint" or "best", newest last."""
        folders = [path for path in self.folder.glob(f"{kind}-*") if not path.suffix]
        return sorted(folders, key=lambda path: int(path.name.removeprefix(f"{kind}-")))

    def last_checkpoint_hint(self) -> str:
        """Return the end of an error message: which checkpoint a resume would use."""
        return f"the last good checkpoint is {self.checkpoints()[-1]}" if self.checkpoints() else "no checkpoint yet"

    def newest_valid_checkpoint(self) -> Path | None:
        """Return the newest checkpoint whose checksums hold, None if there is none. Damaged ones are renamed to
        *.damaged, with a line on stderr. Raises ValueError if all are damaged."""
        for path in reversed(self.checkpoints()):
            try:
                verify_manifest(path)
                return path
            except ValueError as error:
                damaged = path.with_suffix(".damaged")
                shutil.rmtree(damaged, ignore_errors=True)
                path.rename(damaged)
                print(f"{error}; put aside as {damaged.name}", file=sys.stderr, flush=True)
        if any(self.folder.glob("checkpoint-*.damaged")):
            raise ValueError(f"{self.folder}: every checkpoint is damaged; start again with another --out")
        return None

    def save_checkpoint(self, step: int, tensors: dict, values: Iterator[torch.Tensor], keep: int, kind: str):
        """Publish a checkpoint, point `latest` at it, then delete all but the newest `keep` of its kind.

        Args: tensors: {file: {name: tensor}}, for names, shapes and dtypes. values: the data, in the same order.
        kind: "checkpoint" or "best", which does not move `latest`.
        Raises ValueError with the bytes needed and free if it cannot be written; older checkpoints stay untouched.
        """
        path = self.folder / f"{kind}-{step:06d}"

        def write(folder: Path):
            for name, contents in tensors.items():
                write_tensors(folder / name, contents, values)
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
            needed = sum(tensor.nbytes for contents in tensors.values() for tensor in contents.values())
            free = shutil.disk_usage(self.folder).free
            reason = f"{error.strerror} ({needed:,} bytes needed, {free:,} free)"
            raise ValueError(f"step {step}: cannot write {path}: {reason}; {self.last_checkpoint_hint()}") from None
        finally:
            deque(values, maxlen=0)  # the other ranks take part in gathering every tensor, also after an error
        for older in self.checkpoints(kind)[:-keep]:
            shutil.rmtree(older)


def choose_weights(args, run: Run):
    """Set --model, or --vision and --llm, if the command line does not. A resumed run keeps its own."""
    if run.old:
        for name in WEIGHTS:
            if getattr(args, name):
                run.check_unchanged(name, str(getattr(args, name).resolve()))
            else:
                setattr(args, name, run.old[name] and Path(run.old[name]))
    elif args.vision or args.llm or (args.stage == 1 and not args.model):
        args.vision = args.vision or newest_run(0, part="clip")
        args.llm = args.llm or newest_run(0, part="decoder")
    else:
        args.model = args.model or newest_run(1)
    run.values |= {name: str(path.resolve()) for name in WEIGHTS if (path := getattr(args, name))}
