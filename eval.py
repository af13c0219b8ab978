"""Answer the questions of a benchmark with a model, and score answers as the official scorers do.

    python eval.py --questions out/world/questions.jsonl --images out/world               our own questions, by family
    python eval.py --model DIR --task pope --questions coco_pope_*.json --images val2014 --out RUN
    python eval.py --score pope --predictions RUN/answers.jsonl --references coco_pope_*.json
    python eval.py --task probes                                                          where a model goes wrong

Our own questions are {"question_id", "image" (optional), "text", "answer" (optional), "category" (optional)}, one a
line; the files of every benchmark are read as they are published, see tasks.py. Answers are in LLaVA's format. A run
that was stopped goes on where it was; torchrun spreads it over GPUs.
"""

import argparse
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from evaluation import answering, grader
from evaluation.answering import Cost
from evaluation.predictions import Item, load, read_predictions, shown
from evaluation.scores import accuracy_by_category
from evaluation.submissions import server_format, write_submission
from evaluation.tasks import TASKS, prompt_of, read_items, unpack_images
from fast.accelerate import accelerate
from formats.adapters import base_of_adapter, load_with_adapter
from formats.weights import DTYPES, choose_dtype
from inputs.files import to_json, write_json
from inputs.images import BadImage
from inputs.records import SURROGATE, DataError
from inputs.templates import TEMPLATES
from llava import LlavaConfig
from training import runs
from training.ranks import Distributed
from world import probes

# ---------------------------------------------------------------------------------------------------------------------
# what is asked


@dataclass
class Plan:
    """questions: {"question_id", "text", "image", ...}; files: what they come from; suffix: what they end with, for the
    manifest; items: of a benchmark, the same questions with their truth."""

    questions: list[dict]
    files: list[Path]
    images: Path
    out: Path
    suffix: str = ""
    items: list[Item] = field(default_factory=list)

    @property
    def manifest(self) -> Path:
        return sibling_file(self.out, "manifest.json")


def sibling_file(out: Path, name: str) -> Path:
    """A file that goes with answers: in a run's folder by that name, elsewhere by the name of the answers too."""
    run = out.name == "answers.jsonl" and not (out.parent / "config.json").exists()
    return out.with_name(name if run else f"{out.stem}-{name}")


def read_questions(path: Path) -> list[dict]:
    """Our own questions. Raises DataError naming file, line and reason."""
    content, seen = load(path), set()
    if content == []:
        raise DataError(f"{path}: no questions")
    for number, row in enumerate(content if isinstance(content, list) else [content], 1):
        if not isinstance(row, dict) or not isinstance(row.get("question_id"), (int, str)):
            raise DataError(f"{path}: line {number}: needs a question_id, a number or a string")
        kinds = {"text": str, "image": (str, type(None)), "answer": str, "category": str, "metric": str}
        for key, kind in kinds.items():
            if not isinstance(row.get(key, None if key == "text" else ""), kind):
                raise DataError(f"{path}: line {number}: {key} is not text")
        if SURROGATE.search(row["text"]):
            raise DataError(f"{path}: line {number}: text holds half a surrogate pair")
        if row["question_id"] in seen:
            raise DataError(f"{path}: line {number}: question_id {row['question_id']!r} comes twice")
        seen.add(row["question_id"])
        if "answer" in row:
            row.setdefault("metric", probes.default_metric(row.get("category", "all"), path))
        if row.get("metric", "exact") not in probes.METRICS:
            raise DataError(f"{path}: line {number}: metric {row['metric']!r} is none of {', '.join(probes.METRICS)}")
    return content


def plan_lines(args: argparse.Namespace, folder: Path) -> Plan:
    """Our own questions, from one file, scored by category."""
    if len(args.questions) > 1:
        raise DataError("--questions: several files need a --task that says what they are")
    (path,) = args.questions
    out = args.out or folder / ("answers-blank.jsonl" if args.blank else "answers.jsonl")
    return Plan(read_questions(path)[: args.limit], [path], args.images or path.parent, out)


def answer_metadata(question: dict, answer: str) -> dict:
    """An answer's metadata: the category of its question and, where the truth is known, its score."""
    metadata = {"category": question.get("category", "all")}
    if "answer" in question and "probe" not in question:
        metadata["score"] = probes.METRICS[question["metric"]](answer, question["answer"])
    return metadata


def print_families(rows: list[dict], out: Path):
    rows = [row for row in rows if "score" in row["metadata"]]
    for category, accuracy in (accuracy_by_category(rows) if rows else {}).items():
        print(f"{category:<14}{accuracy:6.1f} %")
    print(f"{len(rows)} scored answers in {out}")


def plan_task(args: argparse.Namespace, folder: Path) -> Plan:
    """A benchmark's questions, in a run's folder of their own."""
    task, items = TASKS[args.task], read_items(args.task, args.questions)[: args.limit]
    run = args.out or folder / args.task
    suffix = task.suffix if args.suffix is None else args.suffix
    images = args.images or (args.questions[0] if args.questions[0].is_dir() else args.questions[0].parent)
    if any(item.data for item in items):
        images = run / "pictures"
        unpack_images(items, images)
    questions = [
        {"question_id": item.id, "text": prompt_of(item, suffix), "image": item.image, **item.groups} for item in items
    ]
    return Plan(questions, args.questions, images, run / "answers.jsonl", suffix, items)


def finish_task(args: argparse.Namespace, items: list[Item], rows: list[dict], out: Path):
    """Score a task's answers where the truth is known; write what its server takes, if that is asked for."""
    answers = [row["text"] for row in rows]
    print(f"{len(rows)} answers in {out}")
    if args.submission:
        write_submission(args.task, items, answers, args.submission)
    if args.task in grader.REQUESTS:
        print("a language model grades these: see --score and --grader")
    elif all(item.truth is None for item in items):
        print("the files hold no answers to compare with: --submission writes what the server takes")
    else:
        show_scores(TASKS[args.task].score(items, answers), sibling_file(out, "scores.json"))


def plan_probes(args: argparse.Namespace, folder: Path, config: LlavaConfig) -> Plan:
    """The probes, whose pictures are as large as the model sees them."""
    if config.vision_config is None:
        raise DataError(f"{folder}: a decoder alone sees no pictures to be probed with")
    run, side = args.out or folder / "probes", config.vision_config.image_size
    questions = probes.make_probes(run / "pictures", side, args.limit or 100)
    return Plan(questions, [], run / "pictures", run / "answers.jsonl")


def finish_probes(plan: Plan, rows: list[dict], side: int):
    run, found = plan.out.parent, probes.summarize(plan.questions, [row["text"] for row in rows])
    write_json(run / "probes.json", found)
    (run / "probes.md").write_text(probes.to_markdown(found, side))
    probes.draw_bars(found, run / "probes.png")
    print(probes.to_markdown(found, side) + f"\n{run}/probes.md")


# ---------------------------------------------------------------------------------------------------------------------
# answering


def choose_image_mode(args: argparse.Namespace, config: LlavaConfig):
    """Benchmarks are answered with padded pictures, as LLaVA-1.5's figures were, whatever a converted checkpoint says;
    tiles are part of a model, and stay. Raises DataError."""
    mode = args.image_mode or ("pad" if args.task in TASKS else config.image_mode)
    if config.vision_config is None or (config.image_grid_pinpoints and args.image_mode is None):
        return
    if config.image_grid_pinpoints:
        raise DataError(f"--image-mode {mode}: this model sees pictures in tiles")
    if mode != config.image_mode:
        print(f"pictures are made square by {mode!r}, the model's own way is {config.image_mode!r}", file=sys.stderr)
    config.image_mode = mode


def run(args: argparse.Namespace):
    """Answer what is not answered yet, on all ranks, then score on the first."""
    base = args.model or (base_of_adapter(args.adapter) if args.adapter else runs.newest_run(1, 2))
    folders = [base, args.adapter] if args.adapter else [base]
    folder = folders[-1]  # where answers go, and whose name they have
    ranks = Distributed(args.device)
    device = str(ranks.device)
    model, tokenizer = load_with_adapter(base, args.adapter, device, choose_dtype(args.dtype, device), args.bits)
    accelerate(model)
    choose_image_mode(args, model.config)
    if args.task == "probes":
        plan = ranks.on_main(plan_probes, args, folder, model.config)
    else:
        plan = ranks.on_main(plan_task if args.task else plan_lines, args, folder)
    if args.blank:
        plan.questions = [question | {"blank": True} for question in plan.questions]
    longest = args.max_new_tokens or (TASKS[args.task].max_new_tokens if args.task in TASKS else 128)
    settings = {"task": args.task, "suffix": plan.suffix, "limit": args.limit, "blank": args.blank}
    settings |= {"batch_size": args.batch_size, "max_new_tokens": longest, "bits": args.bits}
    form, first = TEMPLATES[model.config.template], plan.questions[0]
    picture = "<image>\n" if first.get("image") else ""
    settings["prompt"] = f"{form.first}{picture}{first['text']}{form.assistant}"
    settings["pictures_sha256"] = ranks.on_main(answering.hash_images, plan.questions, plan.images)
    ranks.on_main(answering.keep_manifest, plan.manifest, plan.out, folders, plan.files, model, settings)
    cost = Cost()
    ask = partial(answering.answer_batch, model, tokenizer, images=plan.images, max_new_tokens=longest, cost=cost)
    name = folder.name + ("-blank" if args.blank else "")
    rows = answering.answer_all(plan.questions, plan.out, args.batch_size, name, ask, answer_metadata, ranks)
    if ranks.is_main:
        answering.show_cost(cost, sibling_file(plan.out, "cost.json"), device)
        if args.task == "probes":
            finish_probes(plan, rows, model.config.vision_config.image_size)
        elif args.task:
            finish_task(args, plan.items, rows, plan.out)
        else:
            print_families(rows, plan.out)


# ---------------------------------------------------------------------------------------------------------------------
# scoring


def score_file(args: argparse.Namespace):
    """Score a file of answers, wherever it was made; with --grader, have it graded first."""
    items = read_items(args.score, args.references)
    answers = read_predictions(args.predictions, items)
    report_count("questions have no answer, which counts as wrong", items, [answer is None for answer in answers])
    report_count(
        "questions have an empty answer", items, [answer is not None and not answer.strip() for answer in answers]
    )
    if args.submission:
        write_submission(args.score, items, answers, args.submission)
    if args.score in grader.REQUESTS and args.grades:
        model = args.grader_model or "gpt-4-0613"
        lines = grader.requests(args.score, items, answers, grader.read_rule(args.rule), model)
        if args.grader:
            grader.grade(lines, args.grades, partial(grader.ask, args.grader))
        grades = grader.graded(items, lines, args.grades, args.score)
        unread = [grades[str(item.id)] is None for item in items]
        report_count("answers have no grade that can be read, which counts as the worst", items, unread)
        score = grader.score_mmvet if args.score == "mmvet" else grader.score_llavabench
        show_scores(score(items, grades))
    elif not args.submission:
        show_scores(TASKS[args.score].score(items, answers))


def report_count(what: str, items: list[Item], which: list[bool]):
    """Say how many questions something is the case of, if it is of any, and name the first."""
    if any(which):
        first = shown(items[which.index(True)].id)
        print(f"{sum(which):,} of {len(items):,} {what} (first: {first})", file=sys.stderr)


def show_scores(figures: dict[str, float], path: Path | None = None):
    """A line for each figure; and all of them in a file."""
    for name, value in figures.items():
        print(f"{name} {value:.4f}")
    if path:
        path.write_text(to_json(figures))


# ---------------------------------------------------------------------------------------------------------------------


def read_flags() -> argparse.Namespace:
    """The command line; an unknown flag or value ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", type=Path, help="folder of a model; default: the newest finished run below out/")
    add("--adapter", type=Path, help="folder of what LoRA trained, to put onto --model")
    add("--bits", type=int, choices=(4, 16), default=16, help="4: the decoder's layers in NF4, a quarter of the memory")
    add("--task", choices=[*TASKS, "probes"], help="the benchmark; default: our own questions")
    add("--questions", type=Path, nargs="+", help="our jsonl of questions, or the benchmark's files, truth included")
    add("--images", type=Path, help="folder of the pictures; default: the one --questions is in")
    add("--out", type=Path, help="jsonl of answers, of a task the folder for them; default: in the model's folder")
    add("--batch-size", type=int, default=64, help="questions answered at one time")
    add("--max-new-tokens", type=int, help="longest answer; default: LLaVA's, 128 or 1024 by task")
    add("--limit", type=int, help="only the first questions; of the probes, scenes per condition (100)")
    add("--suffix", help="what questions end with; default: LLaVA-1.5's for the task")
    add("--image-mode", choices=("pad", "square"), help="how pictures are made square; default: pad for benchmarks")
    add("--blank", action="store_true", help="show mean-colored pictures: what the language alone gives away")
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    add("--submission", type=Path, metavar="FILE", help="also write what the benchmark's server takes")
    add("--score", choices=TASKS, help="score a file of answers made elsewhere")
    add("--predictions", type=Path, help="it: LLaVA's jsonl, the server's list, COCO results, or MME's folder")
    add("--references", type=Path, nargs="+", help="the benchmark's files that hold the truth")
    add("--grades", type=Path, help="MM-Vet, LLaVA-Bench: the file of a language model's grades")
    add("--grader", metavar="URL", help="ask for those that are missing: an OpenAI-compatible address, http://HOST/v1")
    add("--grader-model", help="the model it is asked for; default: gpt-4-0613")
    add("--rule", type=Path, help="the official prompt: rule.json of LLaVA-Bench, or MM-Vet's in a text file")
    args = parser.parse_args()
    if args.score and not (args.predictions and args.references):
        parser.error("--score needs --predictions and --references")
    if not args.score and args.task != "probes" and not args.questions:
        parser.error("the following arguments are required: --questions")
    if (
        args.submission
        and "llavabench" in (args.score, args.task)
        and (args.rule or args.grader_model)
        and not args.grades
    ):
        parser.error(
            "--submission of llavabench is in words of our own and names no model: no --rule, no --grader-model"
        )
    if args.grader and not args.grades:
        parser.error("--grader needs --grades, the file that keeps what it says")
    if any(count is not None and count < 1 for count in (args.batch_size, args.limit, args.max_new_tokens)):
        parser.error("--batch-size, --limit and --max-new-tokens must be above 0")
    if args.suffix is not None and args.task not in TASKS:
        parser.error("--suffix is for the questions of a benchmark, see --task")
    if args.score and args.limit:
        parser.error("--limit is for answering: a score is over all questions of --references")
    if args.task == "mme" and args.limit and args.limit % 2:
        parser.error("--limit of MME must be even: it asks two questions of each picture")
    return args


def main():
    """Answer and score, or only score; bad input ends in one line and status 1, the answers kept."""
    args = read_flags()
    try:
        if args.submission:
            server_format(args.score or args.task)  # now, not after hours
        score_file(args) if args.score else run(args)
    except (ValueError, BadImage, OSError) as error:
        sys.exit(f"eval.py: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
