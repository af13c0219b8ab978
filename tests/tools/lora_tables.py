"""Full fine-tuning, LoRA and QLoRA side by side, and which part to adapt when the images change: docs/lora.md's tables.

    python tests/tools/lora_tables.py --speedrun out/speedrun --easy-vqa easy-vqa --out out/lora-tables

Two runs at a time, one thread each. A finished run is not repeated, so other --steps or --lr need another --out.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WAYS = {
    "full": ["--train", "projector,llm"],
    "LoRA": ["--lora", "llm"],
    "QLoRA": ["--lora", "llm", "--bits", "4"],
}
PARTS = {
    "projector": ["--train", "projector"],
    "decoder, LoRA of rank 16": ["--lora", "llm"],
    "tower, LoRA of rank 32": ["--lora", "vision"],
    "both": ["--lora", "both"],
}


@dataclass
class Trial:
    """A fine-tuning run and the questions it is asked afterwards."""

    name: str
    flags: list[str]
    asked: list[str]
    base: Path
    out: Path

    def run(self, script: str, *flags) -> str:
        """Run a script; returns its output and its standard error."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(REPOSITORY / script), *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{self.name}: {done.stderr.splitlines()[-1]}")
        return done.stdout + done.stderr

    def go(self) -> "Trial":
        """Train the model and ask it, unless that is done."""
        told, answers = self.out / "told.txt", self.out / "answers.jsonl"
        if not told.exists():
            flags = ["--stage", 2, "--model", self.base, *self.flags, "--out", self.out]
            text = self.run("train.py", *flags, *(["--resume"] if (self.out / "run.json").exists() else []))
            bits = ["--bits", 4] if "--bits" in self.flags else []
            text += self.run("eval.py", "--model", self.out, *bits, *self.asked, "--out", answers)
            told.write_text(text)
        print(f"done: {self.name}", file=sys.stderr, flush=True)
        return self

    @property
    def accuracy(self) -> float:
        return float(re.search(r"overall\s+([\d.]+) %", (self.out / "told.txt").read_text())[1])

    @property
    def held(self) -> float:
        """MB of weights, gradients, states and activations, as estimated before the first step."""
        text = (self.out / "told.txt").read_text()
        return 1000 * float(re.search(r"peak ([\d.e-]+) GB;", text)[1])

    @property
    def peak(self) -> float:
        """GB of the process at its peak, torch itself and the kept features among them."""
        return max(json.loads(line)["memory_gb"] for line in (self.out / "log.jsonl").read_text().splitlines())

    @property
    def trained(self) -> int:
        """Parameters that train."""
        rows = re.findall(
            r"^(?:language_model|multi_modal_projector|vision_tower)\s+([\d,]+) ",
            (self.out / "told.txt").read_text(),
            re.M,
        )
        return sum(int(row.replace(",", "")) for row in rows)

    @property
    def loss(self) -> float:
        return json.loads((self.out / "run.json").read_text())["loss"]


def main():
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--speedrun", type=Path, default=Path("out/speedrun"), help="folder of a finished speedrun")
    add("--easy-vqa", type=Path, help="folder of easy-VQA in LLaVA's JSON")
    add("--out", type=Path, default=Path("out/lora-tables"))
    add("--steps", type=int, default=2000, help="in the world; half of it, at twice the batch, in easy-VQA")
    add("--lr", default="2e-3", help="of LoRA; full fine-tuning has the recipe's")
    add("--jobs", type=int, default=2)
    args = parser.parse_args()
    trials = {}

    def add_trial(table: str, name: str, base: str, data: Path, images: Path, asked: Path, steps: int, flags: list):
        rate = args.lr if "--lora" in flags else "5e-4"
        common = ["--data", data, "--images", images, "--steps", steps, "--lr", rate, "--save-every", 1000]
        out = args.out / re.sub(r"\W+", "-", f"{table}-{name}").lower()
        questions = ["--questions", asked, "--images", images]
        trials[table, name] = Trial(f"{table}, {name}", [*flags, *common], questions, args.speedrun / base, out)

    def draw(shift: str) -> Path:
        world = args.out / f"world-{shift}"
        if not world.exists():
            command = [sys.executable, "-m", "world", "write", "--out", world, "--n", "4000", "--seed", "1"]
            subprocess.run([*map(str, command), "--shift", shift, "--questions", "1000"], check=True)
        return world

    world = draw("none")
    for name, flags in WAYS.items():
        add_trial(
            "the world", name, "stage1", world / "instruct.json", world, world / "questions.jsonl", args.steps, flags
        )
        if args.easy_vqa:
            data, asked = args.easy_vqa / "train.json", args.easy_vqa / "test_questions.jsonl"
            more = [*flags, "--batch-size", "32", "--questions", "1"]
            add_trial("easy-VQA", name, "stage2", data, args.easy_vqa / "images", asked, args.steps // 2, more)
    shifts = ("palette", "noise", "gray")
    for shift in shifts:
        world = draw(shift)
        for name, flags in PARTS.items():
            steps, asked = 3 * args.steps // 10, world / "questions.jsonl"
            add_trial(shift, name, "stage2", world / "instruct.json", world, asked, steps, flags)
        asked = ["--questions", world / "questions.jsonl", "--images", world]
        folder = args.out / f"{shift}-before"
        folder.mkdir(exist_ok=True)
        trials[shift, "before"] = Trial(f"{shift}, before", [], asked, args.speedrun / "stage2", folder)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda trial: trial.go() if trial.flags else ask(trial), trials.values()))
    print("| | | trains | loss | accuracy | of full | held, MB (estimated) | process, GB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for (table, name), trial in sorted(trials.items(), key=lambda pair: pair[0][0], reverse=True):
        if name in WAYS:
            share = 100 * trial.accuracy / trials[table, "full"].accuracy
            row = f"| {table} | {name} | {trial.trained:,} | {trial.loss:.3f} | {trial.accuracy:.1f} % | {share:.1f} % "
            print(f"{row}| {trial.held:.0f} | {trial.peak:.2f} |")
    print("\n| what trains | " + " | ".join(shifts) + " |\n|---|" + "---:|" * len(shifts))
    for name in ("before", *PARTS):
        cells = " | ".join(f"{trials[shift, name].accuracy:.1f} %" for shift in shifts)
        print(f"| {name} | {cells} |")


def ask(trial: Trial) -> Trial:
    """Ask the model as it was before any training."""
    if not (trial.out / "told.txt").exists():
        text = trial.run("eval.py", "--model", trial.base, *trial.asked, "--out", trial.out / "answers.jsonl")
        (trial.out / "told.txt").write_text(text)
    return trial


if __name__ == "__main__":
    main()
