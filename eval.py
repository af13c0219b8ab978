"""Answer the questions of a benchmark with a model, and score answers as the official scorers do.

    python eval.py --questions out/world/questions.jsonl --images out/world         your own questions, by category
    python eval.py --model DIR --task pope --questions coco_pope_*.json --images val2014 --out RUN
    python eval.py --score pope --predictions RUN/answers.jsonl --references coco_pope_*.json
    python eval.py --task probes                                    where a model of the embedded world fails

Your own questions are one JSON object a line: {"question_id", "text", "image", "answer", "category", "metric"}; all but
the first two are optional. A metric is "exact" (default), "contains", "relaxed" or "anls" (see evaluation/metrics.py).
The files of benchmarks are read as published (see evaluation/readers.py). Answers have LLaVA's format. The same command
continues a stopped run; torchrun divides a run among GPUs.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from evaluation import grader
from evaluation.answering import Cost, answer_all, answer_batch, llava_row, report_cut, sibling_file
from evaluation.choice_readers import unpack_images
from evaluation.flags import read_flags
from evaluation.manifest import save_manifest
from evaluation.predictions import END_TOKEN, Item, JsonFile, check_image_key, note, read_predictions, short
from evaluation.scores import accuracy_by_category
from evaluation.submissions import write_submission
from evaluation.tasks import TASKS, VAGUE, build_prompt, choose_image_mode, read_items
from fast.accelerate import accelerate
from formats.adapters import load_with_adapter
from formats.weights import choose_dtype, choose_template
from inputs import cli
from inputs.files import write_json
from inputs.images import LinkedFolder
from inputs.records import MARKER, SURROGATE, DataError, name_keys
from inputs.templates import is_whole_prompt
from llava import LlavaConfig
from training import runs
from training.ranks import Distributed
from variants.token_budget import limit_visual_tokens
from world import probes

# ---------------------------------------------------------------------------------------------------------------------
# questions

QUESTION_KEYS = {"question_id", "text", "image", "answer", "category", "metric"}


def read_questions(path: Path) -> list[dict]:
    """Your own questions, each with its metric if it has an answer. Raises DataError naming file, entry and reason."""
    questions, seen, guessed = list(JsonFile(path).rows()), set(), 0
    if not questions:
        raise DataError(f"{path}: no questions")
    for row in questions:
        key = row.need("question_id", int, str)
        row.need("text")
        row.need("image", str, type(None))
        check_image_key(row)
        for name in row.keys() & {"answer", "category", "metric"}:
            row.need(name)
        if row.get("category") == "overall":
            raise DataError(f"{row.where}: category 'overall' is the name of the mean over all questions")
        if "answer" in row and "metric" not in row:
            row["metric"] = probes.default_metric(row.get("category", "all"), path)
            guessed += row["metric"] != "exact"
        if row.get("metric", "exact") not in probes.METRICS:
            raise DataError(f"{row.where}: metric {row['metric']!r} is none of {', '.join(probes.METRICS)}")
        if SURROGATE.search(row["text"]):
            raise DataError(f"{row.where}: text holds half a surrogate pair")
        if key in seen:
            raise DataError(f"{row.where}: this question_id comes twice")
        seen.add(key)
    note([path], guessed, "descriptions of a world name no metric: scored by objects_f1")
    if unread := name_keys(Counter(key for row in questions for key in row.keys() - QUESTION_KEYS).most_common()):
        print(f"{path}: keys that are not read: {unread}", file=sys.stderr)
    return questions


@dataclass
class Plan:
    """The questions to answer, and how the answers are scored."""

    questions: list[dict]  # {"question_id", "text", "image", ...}
    files: list[Path]  # from which the questions were read
    images: Path  # folder of their images
    out: Path  # file of the answers
    finish: Callable[[list[dict]], None]  # prints or writes the scores of that file's rows
    suffix: str = ""  # text after each question


def plan_own_questions(args: argparse.Namespace, folder: Path) -> Plan:
    """Your own questions, from one file, scored by category."""
    if len(args.questions) > 1:
        raise DataError("--questions: several files need a --task that says what they are")
    (path,) = args.questions
    out = args.out or folder / ("answers-blank.jsonl" if args.blank else "answers.jsonl")
    questions = read_questions(path)[: args.limit]
    return Plan(questions, [path], args.images or path.parent, out, partial(print_categories, out))


def plan_benchmark(args: argparse.Namespace, folder: Path) -> Plan:
    """The questions of a benchmark, answered into a folder of their own."""
    task, items = TASKS[args.task], read_items(args.task, args.questions)[: args.limit]
    run = args.out or folder / args.task
    images = args.images or (args.questions[0] if args.questions[0].is_dir() else args.questions[0].parent)
    if any(item.data for item in items):
        images = run / "images"
        unpack_images(items, images)
    suffix, questions = task.suffix if args.suffix is None else args.suffix, []
    for item in items:
        question = {"question_id": item.id, "text": build_prompt(item, suffix), "image": item.image}
        questions.append(question | {"category": item.groups.get("category", "all")})
    out = run / "answers.jsonl"
    return Plan(questions, args.questions, images, out, partial(score_benchmark, args, items, out), suffix)


def plan_probes(args: argparse.Namespace, folder: Path, config: LlavaConfig) -> Plan:
    """The probes of the embedded world, on images as large as the model sees them."""
    if config.vision_config is None:
        raise DataError(f"{folder}: a decoder without a vision tower cannot be probed with images")
    run, side = args.out or folder / "probes", config.vision_config.image_size
    questions = probes.make_probes(run / "images", side, args.limit or 100)
    return Plan(questions, [], run / "images", run / "answers.jsonl", partial(report_probes, questions, run, side))


def report_probes(questions: list[dict], run: Path, side: int, rows: list[dict]):
    """Write and print the tables of the probes."""
    print(probes.write_report(questions, [row["text"] for row in rows], run, side))
    print(run / "probes.md")


# ---------------------------------------------------------------------------------------------------------------------
# answering


def check_prompts(questions: list[dict]):
    """Raise DataError if a question has several image markers; report questions that are whole prompts."""
    for question in questions:
        if question.get("image") and (count := question["text"].count(MARKER)) > 1:
            raise DataError(f"question {short(question['question_id'])}: {count} {MARKER} markers for one image")
    whole = [question["question_id"] for question in questions if is_whole_prompt(question["text"])]
    if whole:
        reason = f"end like whole prompts, as with ASSISTANT: roles are written twice (first: {short(whole[0])})"
        print(f"{len(whole):,} of {len(questions):,} questions {reason}", file=sys.stderr)


def answer(args: argparse.Namespace):
    """Answer all questions that have no answer yet, on all ranks; then score the answers on the first."""
    base = runs.choose_base(args.model, args.adapter, "eval.py")
    folders = [base, args.adapter] if args.adapter else [base]
    folder = folders[-1]  # the answers are stored in it and carry its name
    ranks = Distributed(args.device)
    device = str(ranks.device)
    model, tokenizer = load_with_adapter(base, args.adapter, device, choose_dtype(args.dtype, device), args.bits)
    choose_template(model.config, tokenizer, args.template)
    limit_visual_tokens(model, args.visual_tokens)
    if not args.no_fast:
        accelerate(model)
    choose_image_mode(args.task, args.image_mode, model.config)
    if args.task == "probes":
        plan = ranks.on_main(plan_probes, args, folder, model.config)
    else:
        plan = ranks.on_main(plan_benchmark if args.task else plan_own_questions, args, folder)
    if args.follow_links:
        plan.images = LinkedFolder(plan.images)
    ranks.on_main(check_prompts, plan.questions)
    if args.blank:
        plan.questions = [question | {"blank": True} for question in plan.questions]
    length = args.max_new_tokens or (TASKS[args.task].max_new_tokens if args.task in TASKS else 128)
    settings = {"task": args.task, "suffix": plan.suffix, "limit": args.limit, "blank": args.blank}
    settings |= {"batch_size": args.batch_size, "max_new_tokens": length, "bits": args.bits, "fast": not args.no_fast}
    settings |= {"visual_tokens": str(args.visual_tokens)} if args.visual_tokens else {}
    ranks.on_main(save_manifest, plan.out, folders, plan.files, plan.questions, plan.images, model, settings)
    cost, name = Cost(), folder.name + ("-blank" if args.blank else "")
    ask = partial(answer_batch, model, tokenizer, images=plan.images, max_new_tokens=length, cost=cost)
    make_row = partial(llava_row, name, answer_metadata)
    rows = answer_all(plan.questions, plan.out, args.batch_size, name, ask, make_row, ranks)
    report_cut(cost, length, ranks)
    if ranks.is_main:
        cost.save(sibling_file(plan.out, "cost.json"), device)
        plan.finish(rows)


# ---------------------------------------------------------------------------------------------------------------------
# scoring


def answer_metadata(question: dict, text: str) -> dict:
    """The category of a question and, if its true answer is known, the score of `text`."""
    metadata = {"category": question.get("category", "all")}
    if "answer" in question and "probe" not in question:
        metadata["score"] = probes.METRICS[question["metric"]](text, question["answer"])
    return metadata


def print_categories(out: Path, rows: list[dict]):
    scored = [row for row in rows if "score" in row["metadata"]]
    for category, accuracy in (accuracy_by_category(scored) if scored else {}).items():
        print(f"{category:<14}{accuracy:6.1f} %")
    rest = f", {len(rows) - len(scored)} without a true answer," if len(scored) < len(rows) else ""
    print(f"{len(scored)} scored answers{rest} in {out}")


def score_benchmark(args: argparse.Namespace, items: list[Item], out: Path, rows: list[dict]):
    """Score a benchmark's answers if the true ones are known, and write the server's file if that is requested."""
    answers = [row["text"] for row in rows]
    print(f"{len(rows)} answers in {out}")
    report_answers(args.task, items, answers)
    if args.submission:
        write_submission(args.task, items, answers, args.submission)
    if args.task in grader.REQUESTS:
        print("a language model grades these: see --score and --grader")
    elif all(item.truth is None for item in items):
        print("the files hold no answers to compare with: --submission writes what the server takes")
    else:
        scores = TASKS[args.task].score(items, answers)
        print_scores(scores)
        write_json(sibling_file(out, "scores.json"), scores)


def score_file(args: argparse.Namespace):
    """Score a file of answers of any model; with --grader, request missing grades first."""
    items = read_items(args.score, args.references)
    answers = read_predictions(args.predictions, items)
    report_answers(args.score, items, answers)
    if args.submission:
        write_submission(args.score, items, answers, args.submission)
    if args.score in grader.REQUESTS and args.grades:
        model, rule = args.grader_model or "gpt-4-0613", grader.read_rule(args.rule)
        lines = grader.build_requests(args.score, items, answers, rule, model)
        send = partial(grader.request_reply, args.grader) if args.grader else None
        grades = grader.collect_grades(args.score, lines, args.grades, send)
        unread = [grades.get(str(item.id)) is None for item in items]
        report_count("answers have no grade that can be read, which counts as the worst", items, unread)
        print_scores(grader.SCORES[args.score](items, grades))
    elif not args.submission:
        print_scores(TASKS[args.score].score(items, answers))


def report_answers(task: str, items: list[Item], answers: list[str | None]):
    """Print how many answers are missing, empty, or not what the scorer of the task expects."""
    empty = [answer is not None and not answer.strip() for answer in answers]
    report_count("questions have no answer, which counts as wrong", items, [answer is None for answer in answers])
    report_count("questions have an empty answer", items, empty)
    left = [bool(END_TOKEN.search(answer or "")) for answer in answers]
    report_count("answers end with an end token (</s>, ...), which is scored as text: remove it", items, left)
    what, is_vague = VAGUE.get(task, ("", None))
    vague = [bool(what and text and text.strip()) and is_vague(item, text) for item, text in zip(items, answers)]
    report_count(what, items, vague)


def report_count(what: str, items: list[Item], which: list[bool]):
    """Print how many items are True in `which`, and the id of the first."""
    if any(which):
        first = short(items[which.index(True)].id)
        print(f"{sum(which):,} of {len(items):,} {what} (first: {first})", file=sys.stderr)


def print_scores(scores: dict[str, float]):
    for name, value in scores.items():
        print(f"{name} {value:.4f}")


def main():
    args = read_flags(__doc__)
    score_file(args) if args.score else answer(args)


if __name__ == "__main__":
    cli.run(main, "eval.py")
