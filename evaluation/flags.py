"""The command line of eval.py."""

import argparse
from pathlib import Path

from evaluation.submissions import SUBMISSIONS
from evaluation.tasks import TASKS
from formats.weights import DTYPES
from inputs.cli import make_parser
from inputs.templates import TEMPLATES
from variants.token_budget import read_budget


def read_flags(description: str) -> argparse.Namespace:
    """The parsed flags. A wrong flag, value or combination ends the program with status 2."""
    parser = make_parser(description)
    add = parser.add_argument_group("answering").add_argument
    add("--model", type=Path, help="folder of a model; default: the newest finished run below out/")
    add("--adapter", type=Path, help="folder of an adapter (LoRA or --tune) for --model")
    add("--bits", type=int, choices=(4, 16), default=16, help="4: decoder layers in NF4, a quarter of the memory")
    add("--template", choices=TEMPLATES, help="conversation template; default: the model's")
    add("--task", choices=[*TASKS, "probes"], help="the benchmark; default: your own questions")
    add("--questions", type=Path, nargs="+", help="your jsonl of questions, or the benchmark's files")
    add("--images", type=Path, help="folder of the images; default: the folder of --questions")
    add("--follow-links", action="store_true", help="read images also where links lead out of their folder")
    add("--out", type=Path, help="jsonl of answers; with --task a folder; default: in the model's folder")
    add("--batch-size", type=int, default=64, help="questions in a batch")
    add("--max-new-tokens", type=int, help="tokens of the longest answer; default: LLaVA's, 128 or 1024 by task")
    add("--limit", type=int, help="answer only so many questions; for probes: scenes per condition (default 100)")
    add("--suffix", help="text after each question; default: LLaVA-1.5's for the task")
    add("--image-mode", choices=("pad", "square"), help="how images are made square; default: pad for benchmarks")
    add("--visual-tokens", type=read_budget, metavar="N[:METHOD]", help="tokens of an image: docs/token-budget.md")
    add("--blank", action="store_true", help="replace images by their mean color: what language alone can answer")
    add("--device", help="cpu, cuda or cuda:N; default: cuda if there is a GPU")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    add("--no-fast", action="store_true", help="plain PyTorch layers, without those of fast/")
    add("--submission", type=Path, metavar="FILE", help="also write the file that the benchmark's server takes")
    add = parser.add_argument_group("scoring answers of any model").add_argument
    add("--score", choices=TASKS, help="score --predictions, answer nothing")
    add("--predictions", type=Path, help="LLaVA's jsonl, the server's list, COCO results, or MME's folder")
    add("--references", type=Path, nargs="+", help="the benchmark's files with the true answers")
    add("--grades", type=Path, help="MM-Vet, LLaVA-Bench: file of a language model's grades")
    add("--grader", metavar="URL", help="request missing grades from an OpenAI-compatible address, http://HOST/v1")
    add("--grader-model", help="model name for --grader; default: gpt-4-0613")
    add("--rule", type=Path, help="official prompt: rule.json of LLaVA-Bench, or MM-Vet's in a text file")
    args = parser.parse_args()
    if reason := why_refused(args):
        parser.error(reason)
    return args


def why_refused(args: argparse.Namespace) -> str:
    """Why the flags do not go together; "" if they do."""
    task = args.score or args.task
    if args.score and not (args.predictions and args.references):
        return "--score needs --predictions and --references"
    if args.predictions and not args.score:
        return "--predictions needs --score, the benchmark that they answer"
    if not args.score and args.task != "probes" and not args.questions:
        return "the following arguments are required: --questions"
    if args.task == "probes" and (args.questions or args.images):
        return "--task probes draws its own scenes: no --questions, no --images"
    if args.submission and task == "llavabench" and not args.grades and (args.rule or args.grader_model):
        return "--submission of llavabench has our own prompt and names no model: no --rule, no --grader-model"
    if args.submission and task not in SUBMISSIONS:
        return f"--submission: no server takes {task or 'these'}, only {', '.join(SUBMISSIONS)}"
    if args.submission and args.limit:
        return "--submission needs an answer to every question: no --limit"
    if args.grader and not args.grades:
        return "--grader needs --grades, the file that keeps the replies"
    if any(count is not None and count < 1 for count in (args.batch_size, args.limit, args.max_new_tokens)):
        return "--batch-size, --limit and --max-new-tokens must be above 0"
    if args.suffix is not None and args.task not in TASKS:
        return "--suffix is for the questions of a benchmark, see --task"
    if args.score and args.limit:
        return "--limit is for answering: a score covers all questions of --references"
    if args.task == "mme" and args.limit and args.limit % 2:
        return "--limit of MME must be even: it asks two questions about each image"
    return ""
