"""A run's folder: its log, its checkpoints, and how the newest one is found.

    out/NAME/run.json           what was run: stage, every flag, and once it is done "finished"
    out/NAME/log.jsonl          one line per step, appended
    out/NAME/loss.png           the same as a picture
    out/NAME/checkpoint-000200  what trains, the optimizer, the step; safetensors and JSON only
    out/NAME/{config.json,model.safetensors,tokenizer.json,...}   the finished model

Whatever is published appears whole or not at all: it is written beside its place, flushed to the disk, then renamed.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path("out")


def publish(folder: Path, write: Callable[[Path], None]):
    """Make `folder` appear whole: `write` fills a folder beside it, which is flushed and then takes the name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    partial.mkdir()
    write(partial)
    for path in [*partial.iterdir(), partial]:
        flush(path)
    partial.rename(folder)
    flush(folder.parent)


def flush(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: Path, values: dict):
    """Replace a JSON file in one step; a reader sees the old or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    flush(partial)
    os.replace(partial, path)


def refuse_duplicates(pairs: list) -> dict:
    """For json.loads, as object_pairs_hook. Raises ValueError if an object names a key twice."""
    result = dict(pairs)
    if len(result) < len(pairs):  # Python would keep the last one: what was checked is not what is used
        raise ValueError(f"key given twice among {[key for key, _ in pairs][:6]}")
    return result


def read_json(path: Path) -> dict:
    """A JSON object. Raises ValueError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_duplicates)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not an object")
    return values


def finished_runs(*stages: int, root: Path = ROOT) -> list[Path]:
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
            f"no finished stage-{names} run {f'({part}) ' if part else ''}below {ROOT}/: name a folder, "
            f"or make one with `python train.py --stage {stages[-1]}`, or all of them with `bash speedrun.sh`"
        )
    return runs[-1]


class Run:
    """One run's folder. Args: folder; values: what run.json records; resume: go on with what the folder holds."""

    def __init__(self, folder: Path, values: dict, resume: bool):
        self.folder, self.values = folder, values
        exists = (folder / "run.json").exists()
        if exists and not resume:
            raise ValueError(f"{folder} holds a run already: --resume goes on with it, another --out starts afresh")
        if resume and not exists:
            raise ValueError(f"{folder} holds no run to resume")
        self.old = json.loads((folder / "run.json").read_text()) if exists else {}
        self.finished = bool(self.old.get("finished"))

    def start(self):
        """Create the folder; on resume, forget log lines of steps that no checkpoint kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "run.json", self.values)
        for path in self.folder.glob("checkpoint-*.partial"):  # of a process that was killed while it wrote
            shutil.rmtree(path)
        last = self.checkpoints()[-1][0] if self.checkpoints() else 0
        rows = [row for row in self.rows() if row["step"] <= last]
        kept = self.folder / "log.jsonl.partial"
        kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(kept, self.folder / "log.jsonl")
        self.log = (self.folder / "log.jsonl").open("a")

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

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every whole checkpoint, the newest last."""
        paths = [path for path in self.folder.glob("checkpoint-*") if path.suffix != ".partial"]
        return sorted((int(path.name.split("-")[1]), path) for path in paths)

    def save_checkpoint(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        """Keep what a resume needs: everything that trains, and the optimizer. The one before is removed after."""
        older = self.checkpoints()

        def write(folder: Path):
            trained = {name: p.data.contiguous() for name, p in model.named_parameters() if p.requires_grad}
            save_file(trained, folder / "trained.safetensors")
            state = {
                f"{name}.{key}": value
                for name, p in model.named_parameters()
                for key, value in optimizer.state.get(p, {}).items()
            }
            save_file(state, folder / "optimizer.safetensors")

        publish(self.folder / f"checkpoint-{step:06d}", write)
        for _, path in older:
            shutil.rmtree(path)

    def load_checkpoint(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore the newest checkpoint into model and optimizer; returns its step, 0 if there is none."""
        if not self.checkpoints():
            return 0
        step, folder = self.checkpoints()[-1]
        trained, state = load_file(folder / "trained.safetensors"), load_file(folder / "optimizer.safetensors")
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if set(trained) != set(parameters):
            differ = sorted(set(trained) ^ set(parameters))[:5]
            raise ValueError(f"{folder}: other parameters train now than then: {', '.join(differ)}")
        for name, p in parameters.items():
            p.data.copy_(trained[name])
            entries = {
                key: state[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in state
            }
            on_device = optimizer.defaults["fused"]  # the fused kernel reads the step there, the plain one on the CPU
            optimizer.state[p] = {
                key: value if key == "step" and not on_device else value.to(p.device) for key, value in entries.items()
            }
        return step

    def finish(self, save: Callable[[Path], None], summary: dict):
        """Publish the finished model's files, then mark the run as finished, then drop the checkpoints."""
        shutil.rmtree(self.folder / "final", ignore_errors=True)  # of a process that was killed below
        publish(self.folder / "final", save)
        for path in sorted((self.folder / "final").iterdir()):
            os.replace(path, self.folder / path.name)
        (self.folder / "final").rmdir()
        write_json(self.folder / "run.json", self.values | summary | {"finished": time.time()})
        for _, path in self.checkpoints():
            shutil.rmtree(path)
        self.log.close()
