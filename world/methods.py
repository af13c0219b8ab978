"""Every method that trains a small part of the decoder, at about equally many trained parameters: a table.

    python -m world.methods --model out/speedrun/stage2 --old out/speedrun/world --data NEW/instruct.json --images NEW
        --test NEW/questions.jsonl [--text book.txt]

The model learns a new task, each time with another method, equal steps and a frozen projector. The table has its
accuracy on the new task and on the old world, if that is another, the perplexity on English text, the seconds of a step
and the memory. All methods run with the first seed, the best on the new task with every seed. The same command resumes,
and a later one may add methods and seeds; the table is OUT/methods.md.
"""

import argparse
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.scores import accuracy_by_category
from formats.weights import open_model
from inputs import cli
from inputs.files import OUTPUT_ROOT, read_json, write_json
from llava import Llava, LlavaConfig, TextConfig
from variants.tuning import LENGTH
from world.claims import find_seeds, mean_and_error
from world.knowledge import read_text, stamp_text
from world.real_report import table
from world.report import read_rows
from world.speedrun import Runner, Step, refuse_other_flags, run_steps, stamp

BEST = 3  # methods that are trained with every seed
MOST_TOKENS = 100  # of a prompt or prefix; more take the room of image and text
WIDEST = 4096  # of a bottleneck or MLP, and the largest rank


# ---------------------------------------------------------------------------------------------------------------------
# methods, and how many parameters each trains


def matrices(config: TextConfig) -> list[tuple[int, int]]:
    """(in, out) of a layer's linear layers: q, k, v, o, gate (none in GPT-2), up, down."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    attention = [(width, queries), (width, keys), (width, keys), (queries, width)]
    return [*attention, *[(width, inner)] * (1 if config.gpt2 else 2), (inner, width)]


def count_lora(config: TextConfig, rank: int) -> int:
    return config.num_hidden_layers * rank * sum(map(sum, matrices(config)))


def count_dora(config: TextConfig, rank: int) -> int:
    return count_lora(config, rank) + config.num_hidden_layers * sum(out for _, out in matrices(config))


def cache_width(config: TextConfig) -> int:
    """Numbers of a token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def count_p_tuning(config: TextConfig, width: int) -> int:
    """LENGTH virtual tokens made by an MLP of three layers."""
    d = config.hidden_size
    return LENGTH * d + (d * width + width) + (width * width + width) + (width * d + d)


def count_prefix_mlp(config: TextConfig, width: int) -> int:
    """LENGTH virtual tokens made by an MLP of two layers."""
    d = config.num_key_value_heads * config.head_dim
    return LENGTH * d + (d * width + width) + cache_width(config) * (width + 1)


def count_bottleneck(config: TextConfig, width: int) -> int:
    """One bottleneck in each layer."""
    return config.num_hidden_layers * (2 * config.hidden_size * width + width + config.hidden_size)


def count_ia3(config: TextConfig, size: int) -> int:
    keys = config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * (2 * keys + config.intermediate_size)


def count_decoder(config: TextConfig, size: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Llava(LlavaConfig(config)).language_model.parameters())


@dataclass(frozen=True)
class Method:
    """flags: of train.py; rate: --lr; count(config, size): the parameters that train; size: the flag that sets how
    many, up to `most`, or "" if nothing does."""

    flags: str
    rate: str
    count: Callable[[TextConfig, int], int]
    size: str = ""
    most: int = WIDEST


LORA = "--lora llm --lora-dropout 0 --train="
METHODS = {
    "full": Method("--train llm", "5e-4", count_decoder),
    "LoRA": Method(LORA, "3e-3", count_lora, "--lora-rank"),
    "LoRA+": Method(f"{LORA} --lora-plus 4", "3e-3", count_lora, "--lora-rank"),
    "DoRA": Method(f"{LORA} --dora", "3e-3", count_dora, "--lora-rank"),
    "prompt": Method("--tune prompt --train=", "1e-2", lambda c, n: n * c.hidden_size, "--prefix-length", MOST_TOKENS),
    "p-tuning": Method("--tune p-tuning --train=", "3e-3", count_p_tuning, "--tune-width"),
    "prefix": Method("--tune prefix --train=", "3e-2", lambda c, n: n * cache_width(c), "--prefix-length", MOST_TOKENS),
    "prefix-mlp": Method("--tune prefix-mlp --train=", "1e-2", count_prefix_mlp, "--tune-width"),
    "houlsby": Method("--tune houlsby --train=", "1e-2", lambda c, w: 2 * count_bottleneck(c, w), "--tune-width"),
    "pfeiffer": Method("--tune pfeiffer --train=", "1e-2", count_bottleneck, "--tune-width"),
    "ia3": Method("--tune ia3 --train=", "3e-2", count_ia3),
}


def choose_size(method: Method, config: TextConfig, wanted: int) -> int:
    """The size with which a method trains as nearly as possible `wanted` parameters, in ratio."""
    return min(range(1, method.most + 1), key=lambda size: abs(math.log(method.count(config, size) / wanted)))


# ---------------------------------------------------------------------------------------------------------------------
# the runs


def find_tests(args: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """Questions and images of the new task, and of the old one if it is another."""
    tests = {"new": (args.test, args.images), "old": (args.old / "questions.jsonl", args.old)}
    return tests if args.test.resolve() != tests["old"][0].resolve() else {"new": tests["new"]}


class Plan:
    """Builds the commands. A method's run is OUT/seedN/METHOD."""

    def __init__(self, args: argparse.Namespace, config: TextConfig):
        self.args, self.config = args, config
        self.wanted = args.parameters or count_lora(config, 2)
        self.sizes = {
            name: choose_size(METHODS[name], config, self.wanted) if METHODS[name].size else 0 for name in METHODS
        }

    def folder(self, name: str, seed: int) -> Path:
        return self.args.out / f"seed{seed}" / re.sub("[^A-Za-z0-9]+", "-", name.replace("+", "-plus"))

    def train(self, name: str, seed: int) -> list[Step]:
        """Train with a method, then measure."""
        args, method, folder = self.args, METHODS[name], self.folder(name, seed)
        command = ["train.py", "--stage", "2", "--model", str(args.model), "--data", str(args.data)]
        command += ["--images", str(args.images), "--steps", str(args.steps), "--batch-size", str(args.batch_size)]
        command += ["--seed", str(seed), "--dtype", args.dtype, "--save-every", "100000", "--out", str(folder)]
        command += [*args.flags.split(), *method.flags.split(), "--lr", args.rate or method.rate]
        command += [method.size, str(self.sizes[name])] if method.size else []
        return [Step(f"seed {seed}, {name}", command, folder), *self.measure(f"seed {seed}, {name}", folder, folder)]

    def find_seeds(self, done: dict[str, float]) -> dict[str, list[int]]:
        """The seeds of every method's finished runs, also those of earlier commands. Args: done: finished steps."""
        last = "English" if self.args.text else f"{list(find_tests(self.args))[-1]} task"
        found = {name: find_seeds(done, f"{name}, {last}") for name in METHODS}
        return {name: seeds for name, seeds in found.items() if seeds}

    def measure(self, name: str, model: Path, out: Path) -> list[Step]:
        """Ask both tasks, and measure the perplexity."""
        args = self.args
        steps = []
        for task, (questions, images) in find_tests(args).items():
            asked = ["--questions", str(questions), "--images", str(images), "--limit", str(args.questions)]
            asked += ["--dtype", args.dtype, "--out", f"{out}/{task}.jsonl"]
            steps.append(Step(f"{name}, {task} task", ["eval.py", "--model", str(model), *asked]))
        if args.text:
            ask = ["--model", str(model), "--text", str(args.text), "--out", f"{out}/knowledge.json"]
            steps.append(Step(f"{name}, English", ["-m", "world.knowledge", "ask", *ask]))
        return steps


# ---------------------------------------------------------------------------------------------------------------------
# the table


def read_measures(folder: Path) -> dict[str, float]:
    """What a folder holds: accuracies in percent, perplexity and right answers to plain questions, median seconds of a
    step, peak memory in GB."""
    answers = {task: read_rows(folder / f"{task}.jsonl") for task in ("new", "old")}
    found = {task: accuracy_by_category(rows)["overall"] for task, rows in answers.items() if rows}
    if (folder / "knowledge.json").exists():
        known = read_json(folder / "knowledge.json")
        found |= {"perplexity": known["perplexity"], "right": known["right"]}
    if (folder / "log.jsonl").exists():
        rows = [row for row in read_rows(folder / "log.jsonl") if "samples_per_s" in row]
        batch = read_json(folder / "run.json")["batch_size"]
        found["seconds"] = statistics.median(batch / row["samples_per_s"] for row in rows)
        found["gigabytes"] = max(row["memory_gb"] for row in rows)
    return found


def write_report(plan: Plan, seeds: dict[str, list[int]]):
    """Write methods.json and methods.md, and print the table. Args: seeds: those of each method with a run."""
    args, before = plan.args, read_measures(plan.args.out / "before")
    found = {name: [read_measures(plan.folder(name, seed)) for seed in seeds[name]] for name in seeds}
    values = [*find_tests(args), *(["perplexity", "right"] if args.text else []), "seconds", "gigabytes"]
    units = {"new": "new task, %", "old": "old task, %", "seconds": "seconds a step", "gigabytes": "memory, GB"}
    units["right"] = "plain questions, of 20"
    rows = [["before", "", "", *(f"{before[key]:.2f}" if key in before else "" for key in values)]]
    for name in seeds:
        method, size = METHODS[name], plan.sizes[name]
        count = method.count(plan.config, size)
        flag = f"`{method.size} {size}`" if method.size else ""
        cells = [mean_and_error([run[key] for run in found[name]]) for key in values[:-2]]
        cells += [f"{statistics.mean(run[key] for run in found[name]):.3g}" for key in values[-2:]]
        ratio = count / plan.wanted
        rows.append([name, f"{count:,} ({ratio:.{1 if ratio < 10 else 0}f} x)", flag, *cells])
    head = ["method", "parameters", "size", *(units.get(key, key) for key in values)]
    lines = [f"# Tuning methods, {args.steps} steps of {args.batch_size}, about {plan.wanted:,} parameters", ""]
    lines += table(head, rows)
    write_json(args.out / "methods.json", {"before": before, "methods": found, "seeds": seeds, "sizes": plan.sizes})
    (args.out / "methods.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def read_flags() -> argparse.Namespace:
    """The command line. Raises ValueError with one line if a file is missing."""
    parser = cli.make_parser(__doc__, "python -m world.methods")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the LLaVA that learns the new task")
    add("--old", type=Path, required=True, help="the world that it was trained on")
    add("--data", type=Path, required=True, help="LLaVA's JSON of the new task")
    add("--images", type=Path, required=True, help="folder of the new task's images")
    add("--test", type=Path, required=True, help="questions of the new task, one JSON object per line")
    add("--text", type=Path, help="also measure the perplexity on this English text, in UTF-8")
    add("--parameters", type=int, help="wanted number of trained parameters; default: that of LoRA with rank 2")
    add("--steps", type=int, default=300, help="steps of each training")
    add("--batch-size", type=int, default=16, help="records of a step")
    add("--flags", default="", help="more flags of train.py for every method, such as --flags='--questions 1'")
    add("--rate", help="learning rate of every method; default: one for each")
    add("--questions", type=int, default=500, help="questions to ask of each task")
    add("--seeds", type=cli.seed, nargs="+", default=[0, 1, 2], help="of the best methods; others have the first")
    add("--only", nargs="+", choices=METHODS, default=list(METHODS), help="methods to try")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of training and evaluation")
    add("--out", type=Path, default=OUTPUT_ROOT / "methods", help="folder to write everything to")
    args = parser.parse_args()
    if min(args.questions, args.steps, args.batch_size, args.parameters or 1) < 1:
        parser.error("--questions, --steps, --batch-size and --parameters must be above 0")
    cli.refuse_repeats(parser, args.seeds)
    for path in (args.old / "questions.jsonl", args.data, args.test):
        if not path.exists():
            raise ValueError(f"{path}: not found")
    if any("answer" not in row for row in read_rows(args.test)):
        raise ValueError(f"--test {args.test}: a question has no answer to compare with")
    if args.text:
        read_text(args.text)
    return args


def main():
    """Run every step that is not done yet, then write the table."""
    args = read_flags()
    plan = Plan(args, open_model(args.model)[0].text_config)
    args.out.mkdir(parents=True, exist_ok=True)
    changeable = ("only", "seeds", "out")
    flags = {key.replace("_", "-"): str(value) for key, value in vars(args).items() if key not in changeable}
    flags |= {key: stamp(getattr(args, key)) for key in ("model", "data", "test")}
    flags |= {"text": stamp_text(args.text)} if args.text else {}
    refuse_other_flags(args.out / "flags.json", flags)
    (args.out / "before").mkdir(exist_ok=True)
    runner, minutes_file = Runner(), args.out / "minutes.json"
    first, *others = args.seeds
    steps = plan.measure("before", args.model, args.out / "before")
    for name in args.only:
        steps += plan.train(name, first)
    done = run_steps(steps, minutes_file, runner)
    write_report(plan, plan.find_seeds(done))
    best = sorted(args.only, key=lambda name: -read_measures(plan.folder(name, first))["new"])[:BEST]
    for seed in others:
        done = run_steps([step for name in best for step in plan.train(name, seed)], minutes_file, runner)
        write_report(plan, plan.find_seeds(done))


if __name__ == "__main__":
    cli.run(main, "methods")
