"""A model trained for equal steps on data from templates, from a language model, and on both (docs/datagen.md).

    python tests/tools/datagen_training.py --speedrun out/speedrun --llm SmolLM2-135M-Instruct.Q4_1.gguf

The facts are the scenes of the speedrun's training images. Every data set is about the same images and continues the
same model with the same steps; the world's own dialogues about these images are the row to compare with. Accuracy is on
held-out questions of the world, whose answers are exact. The same command resumes.
"""

import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from evaluation.scores import accuracy_by_category  # noqa: E402
from inputs import cli  # noqa: E402
from world.claims import mean_and_error  # noqa: E402
from world.real_report import table  # noqa: E402
from world.report import read_rows  # noqa: E402
from world.speedrun import Runner, Step, run_steps  # noqa: E402

DATA = ("the world's dialogues", "templates", "teacher", "templates and teacher")


def main():
    """Make the data, train on each of DATA with each seed, print the table."""
    parser = cli.make_parser(__doc__, "python tests/tools/datagen_training.py")
    add = parser.add_argument
    add("--speedrun", type=Path, required=True, help="folder of a finished speedrun")
    add("--llm", type=Path, required=True, help="the teacher: folder or GGUF file of a language model")
    add("--start", nargs="+", default=["stage1", "stage2"], help="runs of the speedrun to continue")
    add("--images", type=int, default=150, help="training images to ask the teacher about")
    add("--max-tokens", type=int, default=200, help="longest answer of the teacher")
    add("--steps", type=int, default=500, help="steps of each training, of 16 records")
    add("--questions", type=int, default=500, help="held-out questions")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--out", type=Path, default=Path("out/datagen-training"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    files = collect(args.speedrun / "world", args.out, args.images)
    folders = {
        (name, start): [args.out / f"{start}-{DATA.index(name)}-seed{seed}" for seed in args.seeds]
        for name in DATA
        for start in args.start
    }
    run_steps(plan(args, files, folders), args.out / "minutes.json", Runner())
    rows = []
    for name in DATA:
        count = sum(len(json.loads(path.read_text())) for path in files[name])
        cells = [mean_and_error([accuracy(folder) for folder in folders[name, start]]) for start in args.start]
        rows.append([name, f"{count:,}", *cells])
    print("\n".join(table(["data", "records", *(f"after {start}, %" for start in args.start)], rows)))


def accuracy(folder: Path) -> float:
    return accuracy_by_category(read_rows(folder / "answers.jsonl"))["overall"]


def plan(args, files: dict[str, list[Path]], folders: dict[tuple[str, str], list[Path]]) -> list[Step]:
    """The steps: both data sets, then each training and its questions."""
    world, out = args.speedrun / "world", args.out
    make = ["-m", "datagen", "make", f"{world}/scenes.jsonl", "--images", str(world), "--n", str(args.images)]
    teacher = ["--llm", str(args.llm), "--max-tokens", str(args.max_tokens)]
    steps = [Step("templates", [*make, "--out", f"{out}/templates"])]
    steps += [Step("teacher", [*make, "--out", f"{out}/teacher", *teacher])]
    for (name, start), runs in folders.items():
        data = ["--data", *map(str, files[name]), *(["--mixing", "equal"] if len(files[name]) > 1 else [])]
        for seed, folder in zip(args.seeds, runs):
            command = ["train.py", "--stage", "2", "--model", f"{args.speedrun}/{start}", "--out", str(folder), *data]
            command += ["--images", str(world), "--steps", str(args.steps), "--seed", str(seed)]
            ask = ["--questions", f"{world}/questions.jsonl", "--images", str(world)]
            ask += ["--limit", str(args.questions), "--out", f"{folder}/answers.jsonl"]
            label = f"{start}, {name}, seed {seed}"
            steps.append(Step(label, [*command, "--save-every", "100000"], folder))
            steps.append(Step(f"{label}, questions", ["eval.py", "--model", str(folder), *ask]))
    return steps


def collect(world: Path, out: Path, images: int) -> dict[str, list[Path]]:
    """The files of each of DATA. The world's dialogues are those about the images that the others are about."""
    paths = {name: out / name / "data.json" for name in ("templates", "teacher")}
    chosen = {row["image"] for row in read_rows(world / "scenes.jsonl")[:images]}
    own = out / "world.json"
    records = json.loads((world / "instruct.json").read_text())
    own.write_text(json.dumps([record for record in records if record.get("image") in chosen]))
    templates, teacher = paths["templates"], paths["teacher"]
    return dict(zip(DATA, ([own], [templates], [teacher], [templates, teacher])))


if __name__ == "__main__":
    cli.run(main, "datagen_training")
