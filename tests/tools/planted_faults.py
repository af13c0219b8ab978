"""Plant faults in the training code, train for a few steps, and print what `python -m insight` says of each run.

    python tests/tools/planted_faults.py                     all faults and all healthy runs
    python tests/tools/planted_faults.py --only rank         those whose names hold this text; or faults, or healthy
    python tests/tools/planted_faults.py --folder DIR        keep the runs there

A fault is a changed line of a function, in the process that trains and diagnoses: a user's mistake would be in both as
well. The column "clean code" says whether the unchanged code finds something in the run's folder, too.
"""

import argparse
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from faults import free_port
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import train  # noqa: E402
from insight.diagnose import diagnose  # noqa: E402
from world.writer import write_world  # noqa: E402

STEPS = 40
Edits = dict[str, list[tuple[str, str]]]  # by function: texts of its source, and what replaces them


@dataclass
class Run:
    """kind: a key of Bench.flags; more: flags; data: files of the world."""

    kind: str = "stage2"
    more: tuple = ()
    edits: Edits = field(default_factory=dict)
    data: tuple = ()
    ranks: int = 1


# name: the beginning of a sentence that must be found, and the run
TARGET, LEARN = "F.pad(labels[:, 1:], (0, 1), value=IGNORE)", "transcript.encode_text(learn=True)"
DETACH = {"llava.Llava.image_tokens": [("vision_features, *read)", "vision_features, *read).detach()")]}
FREEZE = {"train.choose_trainable": [("in components:", "in set(components) - {'llm'}:")]}
MODEL_SHIFT = {"llava.Llava.supervised_states": [(TARGET, "labels")]}
DATA_SHIFT = {"data.Records.sample": [("labels[: self.max_length]", "labels[1 : self.max_length] + [IGNORE]")]}
ROLE = {
    "data.render_dialogue": [
        ("        transcript.encode_text()\n", f"        {LEARN}\n"),
        (f"            {LEARN}", "            transcript.encode_text()"),
    ]
}
RATE = {"train.train_step": [('rate * group["peak"]', '100 * rate * group["peak"]')]}
INITIAL = {"llava.CausalLM.init_weights": [("std=module.weight.shape[1] ** -0.5", "std=1.0")]}
STRANGERS = {"data.collate": [("for sample in samples for image in", "for sample in samples[::-1] for image in")]}
DEAD = {"llava.SwiGLU.forward": [("F.silu(self.gate_proj(x))", "F.relu(self.gate_proj(x) - 20)")]}
SAME_ORDER = {"inputs.mixture.batches": [("step[rank::world]", "step[0::world]")]}
SAME_RANK = {"train.make_loader": [("ranks.rank, ranks.world_size)", "0, ranks.world_size)")]}
CACHE = {"llava.Decoder.place": [("else (cache.used,", "else (max(0, cache.used - 1),")]}
FAULTS = {
    "projector detached": ("projector: no gradient reaches it", Run(edits=DETACH)),
    "decoder frozen by mistake": (f"decoder: {STEPS} steps have not changed it", Run(edits=FREEZE)),
    "labels shifted by one, in the model": ("loss function:", Run(edits=MODEL_SHIFT)),
    "labels shifted by one, in the data": ("labels: they are not the tokens at", Run(edits=DATA_SHIFT)),
    "loss on the questions": ("labels: in 64 of 64 samples", Run(edits=ROLE)),
    "learning rate x 100, by a flag": ("learning rate:", Run(more=("--lr", 0.05))),
    "learning rate x 100, not in the log": ("replay: step 2", Run(edits=RATE)),
    "exploding initialization": ("initialization:", Run("decoder", edits=INITIAL)),
    "images of other samples": ("images:", Run(edits=STRANGERS)),
    "dead activation": ("dead units:", Run(edits=DEAD)),
    "a rank reads another's data: the order": ("ranks:", Run(edits=SAME_ORDER, ranks=2)),
    "a rank reads another's data: its number": ("replay: step 1", Run(edits=SAME_RANK, ranks=2)),
    "KV cache off by one": ("KV cache:", Run(edits=CACHE)),
    "images of other records, in the file": ("images: after 2", Run("strangers")),
}

STOP = ("progress.log(row)", "progress.log(row); stop.number = 15 if step == 29 else stop.number")  # as SIGTERM does
HEALTHY = {
    "CLIP, tiny, 100 steps": Run("clip"),
    "CLIP, small, 30 steps": Run("clip", ("--size", "small", "--seed", 1, "--steps", 30)),
    "decoder, tiny, 100 steps": Run("decoder"),
    "decoder, small, 30 steps": Run("decoder", ("--size", "small", "--seed", 1, "--steps", 30)),
    "decoder, 6 steps": Run("decoder", ("--seed", 2, "--steps", 6)),
    "stage 1": Run("stage1", ("--seed", 3)),
    "stage 1, whitened": Run("stage1", ("--whiten",)),
    "stage 1, linear projector, 6 steps": Run("stage1", ("--projector", "linear", "--steps", 6)),
    "stage 1, resampler with 4 tokens": Run("stage1", ("--projector", "resampler", "--visual-tokens", 4)),
    "stage 2": Run(),
    "stage 2, 6 steps": Run(more=("--steps", 6, "--seed", 4)),
    "stage 2, 400 steps": Run(more=("--steps", 400, "--seed", 5)),
    "stage 2, 1,300 steps of 16": Run("new", ("--steps", 1300, "--batch-size", 16, "--seed", 7)),
    "stage 2, stopped at step 30": Run(edits={"train.fit": [STOP]}),
    "stage 2, 4 micro-batches, one question": Run(more=("--accumulate", 4, "--questions", 1)),
    "stage 2, two ranks": Run(ranks=2),
    "stage 2 without stage 1": Run("new", ("--seed", 6)),
    "stage 2, the tower trains": Run(more=("--train", "vision,projector,llm", "--lr-vision", 5e-5)),
    "stage 2, recipe llava-1.5": Run(more=("--recipe", "llava-1.5", "--max-length", 1024)),
    "stage 2, text only": Run(data=("text.json",)),
    "stage 2, text and images": Run(data=("text.json", "instruct.json:2")),
    "stage 2, bfloat16": Run(more=("--dtype", "bfloat16")),
    "LoRA of the decoder": Run(more=("--lora", "llm")),
    "LoRA of both towers, rank 4": Run(more=("--lora", "both", "--lora-rank", 4, "--lr", 2e-4)),
    "QLoRA": Run(more=("--lora", "llm", "--bits", 4)),
}


def plant(edits: Edits, patch=setattr):
    """Change functions of this process, wherever they were imported. Args: patch: monkeypatch.setattr undoes it."""
    for path, changes in edits.items():
        *owner, name = path.split(".")
        depth = 2 if owner[0] == "inputs" else 1
        holder = import_module(".".join(owner[:depth]))
        for inner in owner[depth:]:
            holder = getattr(holder, inner)
        old, made = getattr(holder, name), {}
        source = textwrap.dedent(inspect.getsource(old))
        for text, new in changes:
            assert source.count(text) == 1, f"{path}: {text!r} stands {source.count(text)} times in its source"
            source = source.replace(text, new)
        exec(source, old.__globals__, made)
        modules = [module for module in list(sys.modules.values()) if getattr(module, name, None) is old]
        for place in {id(place): place for place in (holder, *modules)}.values():
            patch(place, name, made[name])


# ---------------------------------------------------------------------------------------------------------------------
# processes


def work(edits: Edits, argv: list, environment: dict, folder: Path, result: Path | None):
    """In a new process: change the code, train with `argv`, if there is any, and write a diagnosis to `result`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of DataLoader's workers
    os.dup2(os.open(folder.parent / f"{folder.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    plant(edits)
    if argv:
        sys.argv = ["train.py", *map(str, argv)]
        try:
            train.main()
        except SystemExit as end:
            assert end.code == 128 + 15, end.code  # stopped as by SIGTERM
    if result:
        begin = time.perf_counter()
        found, summary = diagnose(folder)
        seconds = time.perf_counter() - begin
        result.write_text(json.dumps({"found": found, "summary": summary, "seconds": seconds}))


def finish(edits: Edits, argv: list, folder: Path, ranks: int = 1, result: Path | None = None) -> dict:
    """Run `work` on so many ranks to its end; returns the result of rank 0."""
    context, processes, port = multiprocessing.get_context("forkserver"), [], free_port()
    context.set_forkserver_preload(
        ["train", "insight.diagnose", "matplotlib.figure", "matplotlib.backends.backend_agg"]
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        group = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in group.items()} if ranks > 1 else {}
        own = result if rank == 0 else None
        processes.append(context.Process(target=work, args=(edits, argv, environment, folder, own)))
        processes[-1].start()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes), f"see {folder.parent / folder.name}.txt"
    return json.loads(result.read_text()) if result else {}


class Bench:
    """A small world, towers and a stage 1 of it, in a folder; `flags` of each kind of run."""

    def __init__(self, root: Path):
        self.root, self.world = root, root / "world"
        if not self.world.exists():
            write_world(self.world, 300, 3, 72, 20, 2)
        common = ["--world", self.world, "--device", "cpu"]
        tower = ["--stage", 0, *common, "--size", "tiny", "--steps", 100, "--batch-size", 16]
        towers = ["--vision", root / "stage0/clip", "--llm", root / "stage0/decoder"]
        short = [*common, "--steps", STEPS, "--batch-size", 8]
        self.flags = {part: [*tower, "--tower", part] for part in ("clip", "decoder")}
        self.flags |= {"stage1": ["--stage", 1, *towers, *short], "new": ["--stage", 2, *towers, *short, "--whiten"]}
        self.flags["stage2"] = ["--stage", 2, "--model", root / "stage1", *short]
        for name, argv in {"stage0": tower, "stage1": [*self.flags["stage1"], "--whiten", "--steps", 100]}.items():
            if not (root / name).exists():
                finish({}, [*argv, "--out", root / name], root / name)

    def add_strangers(self):
        """A larger world in whose dialogues each image is that of a later record, and a longer run on it."""
        world = self.root / "strangers"
        if not world.exists():
            write_world(world, 4000, 4, 72, 20, 2)
            path = world / "instruct.json"
            records = json.loads(path.read_text())
            images = [record["image"] for record in records]
            moved = [record | {"image": image} for record, image in zip(records, images[1000:] + images[:1000])]
            path.write_text(json.dumps(moved, indent=0))
        self.flags["strangers"] = [*self.flags["new"], "--world", world, "--steps", 1300, "--batch-size", 16]

    def run(self, number: int, run: Run) -> tuple[dict, dict]:
        """Train and diagnose; returns the results of the changed code and of the clean code."""
        out = self.root / f"run{number:02}"
        folder = out / run.kind if run.kind in ("clip", "decoder") else out
        data = ["--data", *(f"{self.world}/{name}" for name in run.data)] if run.data else []
        argv = [*self.flags[run.kind], *data, *run.more, "--out", out]
        found = finish(run.edits, argv, folder, run.ranks, self.root / f"run{number:02}.json")
        return found, finish({}, [], folder, 1, self.root / f"run{number:02}-clean.json") if run.edits else found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    root = args.folder or Path(tempfile.mkdtemp())
    root.mkdir(parents=True, exist_ok=True)
    bench, failed = Bench(root), 0
    chosen = {"faults": FAULTS, "healthy": HEALTHY}.get(args.only) or [n for n in FAULTS | HEALTHY if args.only in n]
    for i, (name, (says, run)) in enumerate(tqdm(FAULTS.items(), "faults")):
        if name not in chosen:
            continue
        if run.kind == "strangers":
            bench.add_strangers()
        result, clean = bench.run(i, run)
        right = any(text.startswith(says) for text in result["found"])
        failed += not right
        print(
            f"{'found' if right else 'MISSED'}: {name} ({result['seconds']:.1f} s; {len(clean['found'])} by clean code)"
        )
        print("".join(f"    {text}\n" for text in result["found"]), end="", flush=True)
    for i, (name, run) in enumerate(tqdm(HEALTHY.items(), "healthy"), 50):
        if name not in chosen:
            continue
        result, _ = bench.run(i, run)
        failed += bool(result["found"])
        text = "; ".join([*result["found"], result["summary"]])
        print(f"{'ALARM' if result['found'] else 'quiet'}: {name} ({result['seconds']:.1f} s): {text}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
