"""Ask a model about an image.

    python sample.py --image cat.jpg                          describe it
    python sample.py --image cat.jpg --prompt "What color?"   answer one question
    python sample.py --image a.jpg b.jpg --prompt "Which is larger, <image> or <image>?"
    python sample.py --prompt "Hello"                         no image; a decoder alone answers too
    python sample.py --image cat.jpg --look page.png          and draw where on it each word comes from
    python sample.py --image cat.jpg --show-tokens page.png   and draw which patches the decoder has read
    python sample.py --batch photos/ --out answers.jsonl      describe all images in a folder; see evaluation/many.py

On a terminal without --prompt, it holds a conversation. Standard output has the answer and nothing else. Images go to
the <image> markers of the first question, one for each, or before it if it has none.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from data import prepare_image, render_dialogue
from evaluation import many
from fast.accelerate import accelerate
from fast.compile import compile_decoding
from formats.adapters import load_with_adapter
from formats.weights import DTYPES, choose_dtype, choose_template
from inputs import cli
from inputs.images import open_image
from inputs.records import question_turn
from inputs.templates import TEMPLATES, is_whole_prompt, stop_text
from inputs.tokenizer import Tokenizer
from insight.look import LOOKS, check_page, look, save_page, show_tokens
from llava import KVCache, Llava, generate
from training import runs
from training.ranks import Distributed
from variants.token_budget import limit_visual_tokens, read_budget

DESCRIBE = "Describe the image."  # as in the training data of the embedded world


class Chat:
    """A conversation with a model, about some images or none. Each turn reads only the tokens that are new."""

    def __init__(self, model: Llava, tokenizer: Tokenizer, images: list[Path], **sampling):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.turns, self.features, self.image_sizes, self.image_tokens = [], None, [], []
        self.cache = KVCache(model.config.text_config, 1, 0, like=model.language_model.model.embed_tokens.weight)
        self.read_ids = []  # the tokens in the cache
        if images:
            if model.config.vision_config is None:
                raise ValueError("this model is a decoder without a vision tower: ask it without --image")
            prepared = [prepare_image(open_image(image), model.config) for image in images]
            self.image_sizes, self.image_tokens = [one.size for one in prepared], [one.tokens for one in prepared]
            with torch.inference_mode():
                self.features = model.vision_features(torch.cat([one.pixels for one in prepared]).to(model.device))

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer in pieces; afterwards `last` holds the fields that --json prints."""
        template = self.model.config.template
        turn = question_turn(question, images=0 if self.turns else len(self.image_tokens))
        prompt, _ = render_dialogue([*self.turns, turn], self.tokenizer, template, self.image_tokens)
        ids, text, stop, begin = [], "", "length", time.perf_counter()
        end = stop_text(template)  # some templates end an answer with a text, such as ###, instead of a token
        for token in self.next_tokens(prompt):
            ids.append(token)
            decoded = self.tokenizer.decode(ids).lstrip()
            if token in self.model.config.eos_token_ids or (end and end in decoded):
                stop = "eos"
                decoded = decoded.split(end)[0] if end else decoded
            elif decoded.endswith(("\ufffd", *(end[:n] for n in range(1, len(end))))):
                continue  # part of a character, or perhaps of the end text: wait for the rest
            yield decoded[len(text) :]
            text = decoded
            if stop == "eos":
                break
        if stop == "length" and (rest := self.tokenizer.decode(ids).lstrip().rstrip("\ufffd")[len(text) :]):
            yield rest  # it was held back
            text += rest
        speed = round(len(ids) / (time.perf_counter() - begin), 1)
        self.last = {"text": text, "ids": ids, "prompt_ids": prompt, "stop": stop, "tokens_per_s": speed}
        turn.answer = text
        self.turns.append(turn)

    def next_tokens(self, prompt: list[int]) -> Iterator[int]:
        """Generate an answer. Tokens that start both the cache and the prompt are not read again."""
        differs = [a != b for a, b in zip(self.read_ids, prompt[:-1])]  # the last is always read, to choose the next
        self.cache.used = differs.index(True) if True in differs else len(differs)
        if self.model.config.relevance_bounds:
            self.cache.used = 0  # another question chooses other patches
        images = {"vision_features": None}
        if self.model.config.image_token_index in prompt[self.cache.used :]:  # an image cannot be read in part
            self.cache.used, images = 0, {"vision_features": self.features, "image_sizes": self.image_sizes}
        ids = list(prompt)
        try:
            for (token,) in generate(self.model, [prompt], **images, cache=self.cache, **self.sampling):
                ids.append(token)
                yield token
        finally:  # also after Ctrl-C
            self.read_ids = ids[: self.cache.used]


def read_flags() -> argparse.Namespace:
    """The command line; an unknown flag or value ends the program with status 2."""
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="folder of a model; default: the newest finished run below out/")
    add("--adapter", type=Path, help="folder of an adapter (LoRA or --tune) for --model")
    add("--bits", type=int, choices=(4, 16), default=16, help="4: the decoder's layers in NF4, a quarter of the memory")
    add("--template", choices=TEMPLATES, help="conversation template; default: the model's")
    add("--image", type=Path, nargs="+", action="extend", default=[], help="the images to ask about")
    add("--prompt", help=f"the question; default: {DESCRIBE!r}, or a conversation on a terminal")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens whose probabilities add up to this")
    add("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    add("--seed", type=int, default=0, help="seed of the draws")
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    add("--visual-tokens", type=read_budget, metavar="N[:METHOD]", help="tokens of an image: docs/token-budget.md")
    add("--no-fast", action="store_true", help="plain PyTorch layers, without those of fast/")
    add("--compile", action="store_true", help="faster answers after some 10 seconds; on a CPU it needs a C++ compiler")
    add("--look", type=Path, help="also write a PNG file: where on the images each word of the answer comes from")
    add("--look-by", choices=LOOKS, default="occlusion", help="the map that --look draws, see docs/looking.md")
    add("--show-tokens", type=Path, help="also write a PNG file: which patches were kept, docs/relevance.md")
    add("--json", action="store_true", help="print one line of JSON: text, ids, prompt_ids, stop, tokens_per_s")
    many.add_flags(parser)
    args = parser.parse_args()
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or args.top_k < 0 or args.max_new_tokens < 1:
        parser.error("--temperature must be >= 0, --top-p in (0, 1], --top-k >= 0, --max-new-tokens >= 1")
    if not 0 <= args.seed < 2**63:
        parser.error("--seed must be in [0, 2^63)")
    if args.look and args.visual_tokens:
        parser.error("--look draws all patches of an image: no --visual-tokens")
    if reason := many.why_refused(args):
        parser.error(reason)
    if (args.top_k or args.top_p < 1) and not args.temperature:
        parser.error("--top-k and --top-p draw tokens: they need --temperature above 0")
    return args


def answer_once(chat: Chat, question: str, as_json: bool):
    """Print one answer as it is generated, or as one line of JSON."""
    if is_whole_prompt(question):
        print("sample.py: the question ends like a whole prompt: its roles are written twice", file=sys.stderr)
    for piece in chat.ask(question):
        if not as_json:
            print(piece, end="", flush=True)
    print(json.dumps(chat.last) if as_json else "")


def converse(chat: Chat):
    """Ask on the terminal until an empty line; Ctrl-C stops an answer."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and recalls earlier ones
    print("An empty line ends the conversation.", file=sys.stderr)
    while True:
        try:
            question = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if not question:
            return
        try:
            answer_once(chat, question, as_json=False)
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            print(f"sample.py: {error}", file=sys.stderr)


def main():
    """Answer one question or many, or hold a conversation."""
    args = read_flags()
    for flag, page in (("--look", args.look), ("--show-tokens", args.show_tokens)):
        if page:
            check_page(page, args.image, flag)
    folder = runs.choose_base(args.model, args.adapter, "sample.py")
    ranks = Distributed(args.device)
    device = str(ranks.device)
    model, tokenizer = load_with_adapter(folder, args.adapter, device, choose_dtype(args.dtype, device), args.bits)
    choose_template(model.config, tokenizer, args.template)
    limit_visual_tokens(model, args.visual_tokens)
    if not args.no_fast:
        accelerate(model)
    if args.compile:
        compile_decoding(model)
    if args.batch:
        return many.answer_batches(model, tokenizer, folder, args, DESCRIBE, ranks)
    generator = torch.Generator(device).manual_seed(args.seed)
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "generator": generator}
    chat = Chat(model, tokenizer, args.image, max_new_tokens=args.max_new_tokens, **sampling)
    if (
        args.prompt is None
        and not (args.json or args.look or args.show_tokens)
        and sys.stdin.isatty()
        and sys.stdout.isatty()
    ):
        converse(chat)
    else:
        answer_once(chat, DESCRIBE if args.prompt is None else args.prompt, args.json)
    if args.look:
        save_page(look(chat, args.image, args.look_by), args.look)
    if args.show_tokens:
        save_page(show_tokens(chat, args.image), args.show_tokens)


if __name__ == "__main__":
    cli.run(main, "sample.py")
