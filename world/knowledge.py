"""Measure a language model without images: perplexity on English, twenty plain questions; write its answers as data.

    python -m world.knowledge ask --model DIR --out FILE.json --text BOOK.txt
    python -m world.knowledge replay --model DIR --out FILE.json

`ask` measures a decoder, a LLaVA or an adapter. `replay` writes the model's answers to the prompts of prompts.txt as
LLaVA's JSON, text only: mixed into stage 2, they keep a decoder close to what it was (self-distillation; for the idea
of mixing in old data see Rolnick et al. 2019, arXiv 1811.11682).
"""

import argparse
import hashlib
import json
import math
import re
from pathlib import Path

import torch
from tqdm import tqdm

from data import render_dialogue
from evaluation.answering import Cost, answer_batch
from fast.accelerate import accelerate
from formats.adapters import load_with_adapter
from formats.weights import DTYPES, choose_dtype, choose_template
from inputs import cli
from inputs.files import write_atomic, write_json
from inputs.records import Turn
from inputs.templates import stop_text
from inputs.tokenizer import Tokenizer
from llava import Llava, generate
from training.ranks import choose_device

PROMPTS = Path(__file__).parent / "prompts.txt"
DOCS = Path(__file__).parents[1] / "docs"
WINDOW = 1024  # tokens that the perplexity reads at a time
MOST_TOKENS = 16_384  # of the text; the rest is not read
PARAGRAPH = re.compile(r"[A-Za-z(`]|\*\*")  # how prose begins: perhaps with code or in bold, not as a list
BATCH = 64  # prompts that are answered at a time
# Question -> accepted answers. Chosen from 60: SmolLM2-135M-Instruct answers all of these correctly.
QUESTIONS = {
    "What is the capital of France?": ("Paris",),
    "What is the capital of Japan?": ("Tokyo",),
    "What is the capital of Germany?": ("Berlin",),
    "What is the capital of England?": ("London",),
    "What is the opposite of hot?": ("cold",),
    "What is the opposite of day?": ("night",),
    "What is 2 + 2?": ("4", "four"),
    "What is the largest ocean on Earth?": ("Pacific",),
    "Who wrote Romeo and Juliet?": ("Shakespeare",),
    "Who painted the Mona Lisa?": ("Leonardo", "da Vinci"),
    "What is the chemical formula of water?": ("H2O", "H₂O"),
    "What gas do humans need to breathe?": ("oxygen",),
    "What is the tallest mountain in the world?": ("Everest",),
    "What is the longest river in Africa?": ("Nile",),
    "What is the currency of Japan?": ("yen",),
    "Who developed the theory of relativity?": ("Einstein",),
    "Which organ pumps blood through the body?": ("heart",),
    "What is the currency of the United States?": ("dollar", "dollars"),
    "In which country are the pyramids of Giza?": ("Egypt",),
    "At what temperature in degrees Celsius does water boil?": ("100",),
}


# ---------------------------------------------------------------------------------------------------------------------
# what it knows


def is_right(answer: str, accepted: tuple[str, ...]) -> bool:
    """Whether an answer holds one of the accepted texts as whole words, in either case."""
    return any(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.IGNORECASE) for text in accepted)


def ask_questions(model: Llava, tokenizer: Tokenizer) -> list[dict]:
    """Greedy answers of at most 48 tokens: [{"question", "answer", "right"}]."""
    rows = [{"question_id": i, "text": question} for i, question in enumerate(QUESTIONS)]
    answers = answer_batch(model, tokenizer, rows, Path(), max_new_tokens=48, cost=Cost())
    pairs = zip(QUESTIONS.items(), answers)
    return [{"question": q, "answer": answer, "right": is_right(answer, wanted)} for (q, wanted), answer in pairs]


@torch.inference_mode()
def perplexity(model: Llava, ids: list[int], bos_id: int | None) -> float:
    """exp of the mean loss, in nats, of every token but the first, read WINDOW tokens at a time.

    A window starts with the begin token, if the model has one, and the last token of the window before it. It sees
    nothing else of that window.
    """
    model.eval()
    start = [] if bos_id is None else [bos_id]
    window = min(WINDOW, model.config.text_config.max_position_embeddings - 1 - len(start))
    total, count = 0.0, len(ids) - 1
    for first in tqdm(range(0, count, window), "perplexity", unit="window"):
        row = torch.tensor([start + ids[first : first + window + 1]], device=model.device)
        labels = row.clone()
        labels[:, : len(start) + 1] = -100  # the loss leaves out the tokens that start the window
        total += float(model(row, labels))
    return math.exp(total / count)


def read_prose(folder: Path) -> str:
    """The paragraphs of a folder's Markdown, in the order of the files: no headings, tables, lists, or commands."""
    texts = (path.read_text("utf-8") for path in sorted(folder.glob("*.md")))
    pages = (re.sub("^```.*?^```$", "", text, flags=re.M | re.S) for text in texts)
    blocks = (block for page in pages for block in page.split("\n\n"))
    return "\n\n".join(block for block in blocks if PARAGRAPH.match(block) and "\n|" not in block)


def read_text(path: Path | None) -> tuple[str, str]:
    """The held-out English and its name: a file, or the prose of docs/. Raises ValueError."""
    if path is None:
        return read_prose(DOCS), "the prose of docs/*.md"
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"--text {path}: is not UTF-8") from None
    if len(text.split()) < 100:
        raise ValueError(
            f"--text {path}: {len(text.split())} words; a perplexity needs 100 and means something from 1,000"
        )
    return text, path.name


def stamp_text(path: Path) -> str:
    """The path of the held-out English and a checksum of it: perplexities of other texts do not compare."""
    text, _ = read_text(path)
    return f"{path} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def ask(model: Llava, tokenizer: Tokenizer, args: argparse.Namespace):
    """Measure a model and write {"perplexity", "tokens", "text", "right", "answers", ...}."""
    text, name = read_text(args.text)
    ids = tokenizer.encode(text)
    read = ids[: MOST_TOKENS + 1]
    if len(read) < len(ids):
        print(f"{name}: the first {len(read):,} of {len(ids):,} tokens are read")
    answers = ask_questions(model, tokenizer)
    right = sum(row["right"] for row in answers)
    values = {"model": str(args.model), "template": model.config.template, "dtype": str(model.dtype).split(".")[-1]}
    values |= {"text": name, "tokens": len(read), "tokens_of_text": len(ids)}
    values |= {"perplexity": perplexity(model, read, tokenizer.bos_id), "right": right, "answers": answers}
    write_json(args.out, values)
    print(f"{args.model}: perplexity {values['perplexity']:.2f}, {right} of {len(answers)} questions right: {args.out}")


# ---------------------------------------------------------------------------------------------------------------------
# its own answers, as data


def replay(model: Llava, tokenizer: Tokenizer, args: argparse.Namespace):
    """Write answers to the prompts, drawn at a temperature of 0.7. Those that do not end are counted and left out."""
    prompts = PROMPTS.read_text("utf-8").splitlines()
    count = min(args.limit, len(prompts))
    prompts = [prompts[i * len(prompts) // count] for i in range(count)]  # evenly spaced: the file is sorted by kind
    records, ends, stop = [], set(model.config.eos_token_ids), stop_text(model.config.template)
    sampling = {"temperature": 0.7, "generator": torch.Generator(model.device).manual_seed(args.seed)}
    for first in tqdm(range(0, len(prompts), BATCH), "replay", unit="batch"):
        asked = prompts[first : first + BATCH]
        rows = [render_dialogue([Turn(text, None)], tokenizer, model.config.template, 0)[0] for text in asked]
        answers = [[] for _ in asked]
        for step in generate(model, rows, max_new_tokens=args.max_new_tokens, **sampling):
            for answer, token in zip(answers, step):
                answer += [] if token is None else [token]
        for prompt, ids in zip(asked, answers):
            text, ended = tokenizer.decode([i for i in ids if i not in ends]), bool(ends.intersection(ids))
            if stop and stop in text:
                text, ended = text.split(stop)[0], True
            if ended and text.strip():
                turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": text.strip()}]
                records.append({"id": f"replay-{len(records)}", "conversations": turns})
    left = len(prompts) - len(records)
    if not records:
        raise ValueError(f"{args.model}: none of {len(prompts)} answers ended within {args.max_new_tokens} tokens")
    write_atomic(args.out, json.dumps(records, indent=0).encode())
    print(
        f"{args.out}: {len(records)} answers; {left} that were empty or over {args.max_new_tokens} tokens are left out"
    )


def main():
    """Load the model, then run the command."""
    parser = cli.make_parser(__doc__, "python -m world.knowledge")
    commands = parser.add_subparsers(required=True)
    for run in (ask, replay):
        command = commands.add_parser(run.__name__, help=run.__doc__.splitlines()[0])
        command.set_defaults(run=run)
        add = command.add_argument
        add("--model", type=Path, required=True, help="folder or .gguf file of a model, or folder of an adapter")
        add("--out", type=Path, required=True, help="JSON file to write")
        default, text = ("float32" if run is ask else "auto"), "auto: bfloat16 on a GPU, float32 on a CPU"
        add("--dtype", choices=DTYPES, default=default, help=f"{text}; default: {default}")
    add = commands.choices["ask"].add_argument
    add("--text", type=Path, help="English in UTF-8; default: the prose of docs/")
    add("--bits", type=int, choices=(4, 16), default=16, help="4: the decoder's layers in NF4, as QLoRA trained them")
    add = commands.choices["replay"].add_argument
    add("--limit", type=int, default=1000, help="prompts to answer; default: all")
    add("--max-new-tokens", type=int, default=160, help="longest answer that is kept")
    add("--seed", type=cli.seed, default=0, help="seed of the draws")
    args = parser.parse_args()
    if min(getattr(args, "limit", 1), getattr(args, "max_new_tokens", 1)) < 1:
        parser.error("--limit and --max-new-tokens must be above 0")
    device = choose_device(None)
    bits = getattr(args, "bits", 16)
    model, tokenizer = load_with_adapter(args.model, None, device, choose_dtype(args.dtype, device), bits)
    choose_template(model.config, tokenizer)
    accelerate(model)
    args.run(model, tokenizer, args)


if __name__ == "__main__":
    cli.run(main, "knowledge")
