"""A teacher on this machine: a decoder's folder or GGUF file, or a LLaVA's, which is asked without an image."""

import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from data import render_dialogue
from datagen.asking import Request
from evaluation.answering import Cost, answer_prompts
from fast.accelerate import accelerate
from formats.adapters import load_with_adapter
from formats.weights import choose_dtype, choose_template
from inputs.records import Turn
from inputs.templates import find_template
from inputs.tokenizer import Tokenizer
from training.ranks import choose_device


def make_turns(messages: tuple[dict, ...], template: str) -> list[Turn]:
    """The messages as turns. A template without a place for a system prompt gets it before the first question."""
    system, *rest = [message["content"] for message in messages]
    turns = [Turn(question, answer) for question, answer in zip(rest[::2], [*rest[1::2], None])]
    if find_template(template).system:
        turns[0].system = system
    else:
        turns[0].question = f"{system}\n\n{turns[0].question}"
    return turns


def ask_local(
    folder: Path, requests: list[Request], max_tokens: int, batch_size: int,
    keep: Callable[[dict], None], fail: Callable[[dict], None],
):  # fmt: skip
    """Greedy answers to all requests, in batches of similar length; longest first, so that too little memory shows at
    once. Args: keep: called with each answer's row, fail: with {"custom_id", "reason"} of a prompt that is too long."""
    device = choose_device(None)
    model, tokenizer = load_with_adapter(folder, None, device, choose_dtype("auto", device))
    choose_template(model.config, tokenizer)
    accelerate(model)
    template, limit = model.config.template, model.config.text_config.max_position_embeddings
    prompts = {}
    for request in requests:
        ids, _ = render_dialogue(make_turns(request.messages, template), tokenizer, template, 0)
        if len(ids) + max_tokens > limit:
            reason = f"{len(ids):,} tokens of prompt and {max_tokens:,} of answer; the context holds {limit:,}"
            fail({"custom_id": request.id, "reason": reason})
        else:
            prompts[request.id] = ids
    order = sorted(prompts, key=lambda key: -len(prompts[key]))
    with tqdm(total=len(order), unit="answer", disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(order), batch_size):
            keys = order[start : start + batch_size]
            for row in answer_batch(model, tokenizer, {key: prompts[key] for key in keys}, max_tokens):
                keep(row)
            bar.update(len(keys))


def answer_batch(model, tokenizer: Tokenizer, prompts: dict[str, list[int]], max_tokens: int) -> list[dict]:
    """The rows of answers.jsonl. An answer that fills max_tokens counts as cut."""
    texts = answer_prompts(model, tokenizer, [(ids, []) for ids in prompts.values()], max_tokens, Cost())
    rows = []
    for (key, ids), text in zip(prompts.items(), texts):
        count = len(tokenizer.encode(text))
        rows.append({"custom_id": key, "text": text, "finish_reason": "length" if count >= max_tokens - 1 else "stop"})
        rows[-1] |= {"model": None, "input_tokens": len(ids), "output_tokens": count}
    return rows
