"""The speedrun: every step from an empty folder to a model that answers, as the commands a person would type.

    python speedrun.py --minutes 15        (bash speedrun.sh installs first)

One dial, the minutes, sets sizes and steps; they do not depend on how fast the machine is, so the same dial and seed
give the same numbers. A run that was stopped goes on where it was. The report is out/speedrun/report.md.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import report

OUT = Path("out/speedrun")


def plan(minutes: float, seed: int, out: Path, ablation: bool) -> list[tuple[str, list[str], Path]]:
    """(name, command, the file that shows it is done) of every step, for a run of so many minutes on two cores."""
    world, common = out / "world", ["--world", str(out / "world"), "--seed", str(seed)]
    pictures, size = int(1000 * minutes), "small"
    questions = ["--questions", str(world / "questions.jsonl"), "--images", str(world)]

    def train(stage: int, name: str, steps: float, *flags: str) -> tuple[str, list[str], Path]:
        command = ["train.py", "--stage", str(stage), "--out", str(out / name), "--steps", str(int(steps * minutes))]
        return name, command + common + list(flags), out / name

    def stage(number: int, name: str, steps: float, *flags: str):
        label, command, folder = train(number, name, steps, *flags)
        return label, command, folder / "run.json"

    towers = ["--vision", str(out / "stage0/clip"), "--llm", str(out / "stage0/decoder")]
    draw = ["shapes.py", "--out", str(world), "--n", str(pictures), "--seed", str(seed)]
    clip = train(0, "stage0", 16, "--tower", "clip", "--batch-size", "128", "--lr", "1e-3", "--size", size)
    decoder = train(0, "stage0", 110, "--tower", "decoder", "--batch-size", "16", "--lr", "4e-4", "--size", size)
    steps = [
        ("world", draw, world / "instruct.json"),
        ("clip", clip[1], out / "stage0/clip/run.json"),
        ("decoder", decoder[1], out / "stage0/decoder/run.json"),
        stage(1, "stage1", 24, *towers, "--whiten"),
    ]
    if ablation:  # the same stage 2 on a projector that no stage 1 has trained; first, so that the newest run is whole
        steps.append(stage(2, "no-stage1", 540, *towers, "--whiten"))
        evaluate = ["eval.py", "--model", str(out / "no-stage1"), *questions]
        steps.append(("ablation evaluation", evaluate, out / "no-stage1/answers.jsonl"))
    evaluate = ["eval.py", "--model", str(out / "stage2"), *questions]
    return [
        *steps,
        stage(2, "stage2", 540, "--model", str(out / "stage1")),
        ("evaluation", evaluate, out / "stage2/answers.jsonl"),
        ("blind evaluation", [*evaluate, "--blank"], out / "stage2/answers-blank.jsonl"),
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--minutes", type=float, default=15, help="the dial: how long it may take on two cores, installation aside")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=OUT)
    add("--ablation", action="store_true", help="also train stage 2 without stage 1 (beyond the minutes)")
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error("--minutes must be above 0")
    args.out.mkdir(parents=True, exist_ok=True)
    times_file = args.out / "minutes.json"
    times = json.loads(times_file.read_text()) if times_file.exists() else {}
    for name, command, done in plan(args.minutes, args.seed, args.out, args.ablation):
        if name in times:
            continue
        resume = ["--resume"] if command[0] == "train.py" and done.exists() else []
        print(f"\n=== {name}: python {' '.join(command + resume)}", flush=True)
        begin = time.time()
        if subprocess.run([sys.executable, *command, *resume]).returncode:
            sys.exit(f"speedrun.py: {name} stopped; the same command goes on from here")
        times[name] = (time.time() - begin) / 60
        times_file.write_text(json.dumps(times, indent=2) + "\n")
    report.write(args.out, times, args.minutes)


if __name__ == "__main__":
    main()
