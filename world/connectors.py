"""Every connector at three budgets of visual tokens, and every way to shorten a plain model's: a table of measurements.

    python -m world.connectors --speedrun out/speedrun --minutes 75      33 minutes on one thread, 45 with all seeds

The images are the embedded world's, cut into 6 x 6 patches; scenes have at most three objects, and questions ask what
is learned early. The speedrun's decoder first learns to read small patches. Then each connector starts anew in front of
it: first the connector alone trains on captions, then both on dialogues. All take the same steps and rates. The three
best at the middle budget are trained with every seed; a later --repeat adds other budgets. The same command resumes;
the report is OUT/report.md. docs/connectors.md has the reasons.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from inputs import cli
from inputs.files import OUTPUT_ROOT, write_atomic
from llava import PROJECTORS
from variants.connectors import CONNECTORS, check_tokens
from world.connector_report import Cell, read_accuracy, write_report
from world.language import FAMILIES
from world.real_decoder import finished
from world.report import read_rows
from world.scenes import make_scene
from world.speedrun import Runner, Step, refuse_other_flags, run_steps, stamp

OBJECTS = 3  # in a scene, at most
ASKED = ("color", "counting", "position", "reading", "shape")  # families of the questions
SIDE = 72  # pixels of an image of the world
METHODS = ("random", "uniform", "pool", "cls", "fastv")
BEST = 3  # connectors of a budget that are trained with every seed
# For each of --minutes: images, and steps of training.
IMAGES, CLIP, BASE_1, BASE_2, CONTINUED, CELL_1, CELL_2 = 60, 4, 2, 30, 6, 1, 5


# ---------------------------------------------------------------------------------------------------------------------
# records of simple scenes


def write_records(world: Path, out: Path, images: int):
    """Write captions.json, instruct.json and questions.jsonl about the world's scenes of at most OBJECTS objects."""
    if (out / "instruct.json").exists():
        return
    scenes = {row["image"]: row for row in read_rows(world / "scenes.jsonl") if len(row["things"]) <= OBJECTS}
    training = [name for name in scenes if name.startswith("train")][:images]
    questions = [row for row in read_rows(world / "questions.jsonl") if row["image"] in scenes]
    questions = [row for row in questions if row["category"] in ASKED]
    chosen = set(training)
    captions = [row for row in json.loads((world / "captions.json").read_text()) if row["image"] in chosen]
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in questions).encode())
    write_atomic(out / "captions.json", json.dumps(captions, indent=0).encode())
    dialogues = [record for name in training for record in make_dialogues(name)]
    write_atomic(out / "instruct.json", json.dumps(dialogues, indent=0).encode())


def make_dialogues(image: str) -> Iterator[dict]:
    """Yield dialogues of two questions about a training image: one of each family that its scene allows."""
    seed, index = int(image.split("/")[0].split("-")[1]), int(Path(image).stem)
    scene, _ = make_scene(seed, index, held_out=False)
    rng = random.Random(f"{image} asked")
    pairs = [pair for family in rng.sample(ASKED, len(ASKED)) if (pair := FAMILIES[family](scene, rng))]
    for i in range(0, len(pairs), 2):
        texts = [text for pair in pairs[i : i + 2] for text in pair]
        texts[0] = "<image>\n" + texts[0]
        turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
        yield {"id": f"{index}-{i}", "image": image, "conversations": turns}


# ---------------------------------------------------------------------------------------------------------------------
# the steps


class Plan:
    """Builds the commands. `folder` of a cell holds its stage 1 and stage 2."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out, self.patches = args, args.out, (SIDE // args.patch_size) ** 2
        self.root = args.speedrun or args.out
        self.world, self.records = self.root / "world", args.out / "records"
        trained = [self.root / name for name in ("stage2", "stage0/decoder") if args.speedrun]
        self.decoder = next(filter(finished, trained), args.out / "stage0/decoder")

    def train(self, name: str, stage: int, folder: Path, rate: float, *flags, seed: int = 0) -> Step:
        """Args: rate: steps for each of --minutes."""
        steps = ["--steps", str(max(1, int(rate * self.args.minutes))), "--seed", str(seed)]
        data = [str(self.records / ("captions.json" if stage == 1 else "instruct.json")), "--images", str(self.world)]
        source = ["--world", str(self.world)] if stage == 0 else ["--data", *data]
        source += ["--cache-gb", "0"] if stage == 1 else []  # so few steps need the features of few images
        command = ["train.py", "--stage", str(stage), "--out", str(folder), *steps, *source, "--dtype", self.args.dtype]
        run = folder / flags[1] if stage == 0 else folder  # a tower of stage 0 is a run
        return Step(name, [*command, *map(str, flags)], run)

    def ask(self, name: str, model: Path, *flags) -> Step:
        asked = ["--questions", self.records / "questions.jsonl", "--images", self.world, "--max-new-tokens", 24]
        return Step(name, list(map(str, ["eval.py", "--model", model, *asked, "--dtype", self.args.dtype, *flags])))

    def draw(self) -> list[Step]:
        if self.args.speedrun:
            return []
        flags = ["--out", str(self.world), "--n", str(int(4 * IMAGES * self.args.minutes)), "--size", str(SIDE)]
        return [Step("world", ["-m", "world", "write", *flags])]

    def towers(self) -> list[Step]:
        """CLIP with small patches, and with the speedrun's decoder a LLaVA that reads all of them."""
        tower = ("--size", self.args.size, "--batch-size", 128, "--lr", 1e-3)
        clip = ("--tower", "clip", "--patch-size", self.args.patch_size, *tower)
        steps = [self.train("clip", 0, self.out / "stage0", CLIP, *clip)]
        if self.decoder == self.out / "stage0/decoder":
            flags = ("--tower", "decoder", "--size", self.args.size, "--batch-size", 16, "--lr", 4e-4)
            steps.append(self.train("decoder", 0, self.out / "stage0", 10, *flags))
        new = ("--vision", self.out / "stage0/clip", "--llm", self.decoder, "--whiten")
        steps.append(self.train("base, stage 1", 1, self.out / "base-1", BASE_1, *new))
        return [*steps, self.train("base, stage 2", 2, self.out / "base", BASE_2, "--model", self.out / "base-1")]

    def curve(self) -> list[Step]:
        """The base trains on, plain and with nested pooling; both answer with every budget."""
        budgets, base = self.args.budgets, ("--model", self.out / "base")
        plain, nested = self.out / "plain", self.out / "nested"
        steps = [self.train("plain", 2, plain, CONTINUED, *base), self.ask("plain, all tokens", plain)]
        steps += [self.ask("plain, blind", plain, "--blank")]
        for method in METHODS:
            for tokens in budgets[1:]:
                steps.append(self.ask_with(plain, f"{tokens}:{method}"))
        steps.append(self.train("nested", 2, nested, CONTINUED, *base, "--nested-pool", *budgets))
        return [*steps, *(self.ask_with(nested, f"{tokens}:pool") for tokens in budgets)]

    def ask_with(self, model: Path, budget: str) -> Step:
        out = model / "curve" / budget.replace(":", "-") / "answers.jsonl"
        return self.ask(f"{model.name}, {budget}", model, "--visual-tokens", budget, "--out", out)

    def cells(self) -> list[Cell]:
        """All connectors that are possible at each budget; those that take no number, at the first one.

        With all patches, avg_pool and pixel_shuffle are projectors again and left out.
        """
        found = []
        for tokens in self.args.budgets:
            for kind in self.args.only:
                same = tokens == self.patches and kind in ("avg_pool", "pixel_shuffle")
                numbers = (tokens, None) if tokens == self.patches else (tokens,)
                given = [number for number in numbers if self.is_possible(kind, number)]
                if given and not same:
                    found.append(Cell(kind, tokens, self.out / f"{kind}-{tokens}", given[0]))
        return found

    def is_possible(self, kind: str, tokens: int | None) -> bool:
        try:
            check_tokens(kind, tokens, self.patches)
        except ValueError:
            return False
        return True

    def cell(self, cell: Cell, seed: int) -> list[Step]:
        """A new connector before the decoder that nested pooling has taught: stages 1 and 2, and the questions."""
        name, folder = f"{cell.kind}, {cell.tokens} tokens, seed {seed}", cell.folder / f"seed{seed}"
        new = ["--vision", self.out / "stage0/clip", "--llm", self.out / "nested", "--projector", cell.kind]
        new += ["--visual-tokens", cell.given] if cell.given else []
        return [
            self.train(f"{name}, stage 1", 1, folder / "stage1", CELL_1, *new, seed=seed),
            self.train(f"{name}, stage 2", 2, folder / "stage2", CELL_2, "--model", folder / "stage1", seed=seed),
            self.ask(f"{name}, evaluation", folder / "stage2"),
        ]


def choose_best(cells: list[Cell], budgets: list[int]) -> list[Cell]:
    """The BEST cells of each of these budgets with the first seed."""
    found = []
    for tokens in budgets:
        rivals = [cell for cell in cells if cell.tokens == tokens]
        found += sorted(rivals, key=lambda cell: -read_accuracy(cell, cell.seeds[0]))[:BEST]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# the command


def read_flags() -> argparse.Namespace:
    """The command line; an unknown flag or value ends the program with status 2."""
    parser = cli.make_parser(__doc__, "python -m world.connectors")
    add, kinds = parser.add_argument, [*PROJECTORS, *CONNECTORS]
    add(
        "--speedrun", type=Path, help="a speedrun's folder, for its world and the decoder of stage 0; default: new ones"
    )
    text = "sets all numbers of images and steps; 75 took 45 on one thread"
    add("--minutes", type=cli.above_zero, default=75, help=text)
    add("--patch-size", type=int, default=12, help=f"side of a patch, for images of {SIDE} pixels")
    add("--budgets", type=int, nargs="+", default=[36, 9, 4], help="visual tokens; the first is all patches")
    add("--only", nargs="+", choices=kinds, default=kinds, help="connectors to train")
    add("--seeds", type=cli.seed, nargs="+", default=[0, 1, 2], help="of the best connectors; others have the first")
    add("--repeat", type=int, nargs="+", help="budgets whose best connectors have every seed; default: the middle one")
    add("--size", choices=("tiny", "small", "medium"), default="small", help="size of the towers")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of training and evaluation")
    add("--out", type=Path, default=OUTPUT_ROOT / "connectors", help="folder to write everything to")
    args = parser.parse_args()
    args.repeat = args.repeat or [args.budgets[len(args.budgets) // 2]]
    patches = (SIDE // args.patch_size) ** 2
    if args.budgets[0] != patches or max(args.budgets) > patches:
        parser.error(f"the first of --budgets must be all patches, {patches}, and the largest")
    cli.refuse_repeats(parser, args.seeds)
    if args.speedrun and not (args.speedrun / "world/questions.jsonl").exists():
        raise ValueError(f"--speedrun {args.speedrun}: holds no world")
    return args


def main():
    """Run every step that is not done yet, then write the report."""
    args = read_flags()
    args.out.mkdir(parents=True, exist_ok=True)
    flags = {"minutes": args.minutes, "speedrun": str(args.speedrun), "patch-size": args.patch_size}
    flags |= {"budgets": args.budgets, "size": args.size, "dtype": args.dtype, "seed": args.seeds[0]}
    plan, runner, minutes_file = Plan(args), Runner(), args.out / "minutes.json"
    flags |= {"speedrun's decoder": stamp(plan.decoder)} if args.speedrun else {}
    refuse_other_flags(args.out / "flags.json", flags)
    run_steps(plan.draw(), minutes_file, runner)
    write_records(plan.world, plan.records, int(IMAGES * args.minutes))
    cells = plan.cells()
    first = [step for cell in cells for step in plan.cell(cell, args.seeds[0])]
    run_steps([*plan.towers(), *plan.curve(), *first], minutes_file, runner)
    for cell in cells:
        cell.seeds = args.seeds[:1]
    write_report(args, plan.patches, cells)
    best = choose_best(cells, args.repeat)
    for seed in args.seeds[1:]:
        run_steps([step for cell in best for step in plan.cell(cell, seed)], minutes_file, runner)
    for cell in best:
        cell.seeds = args.seeds
    write_report(args, plan.patches, cells)


if __name__ == "__main__":
    cli.run(main, "connectors")
