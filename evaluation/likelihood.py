"""The probability that a model gives an answer, for tasks that compare given answers instead of generating one."""

from dataclasses import replace

import torch

from data import PreparedImage, render_dialogue
from inputs.records import Turn
from inputs.tokenizer import Tokenizer
from llava import Llava


@torch.inference_mode()
def answer_likelihood(
    model: Llava, tokenizer: Tokenizer, turn: Turn, images: list[PreparedImage], answer: str
) -> tuple[float, bool]:
    """The log-probability of an answer to a question, without the token that ends it; and whether each of its tokens
    is the likeliest one. Raises ValueError if it does not fit into the context."""

    def render(text: str | None) -> list[int]:
        tokens = [image.tokens for image in images]
        return render_dialogue([replace(turn, answer=text)], tokenizer, model.config.template, tokens)[0]

    prompt, ended, whole = render(None), render(""), render(answer)
    end = len(whole) - (len(ended) - len(prompt))
    pixels = [image.pixels for image in images]
    features = model.vision_features(torch.cat(pixels).to(model.device)) if images else None
    ids = torch.tensor([whole[:end]], device=model.device)
    x = model.embed(ids, features, [image.size for image in images])
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[0, len(prompt) - 1 : -1] = True  # the state of token t predicts token t + 1
    logits = model.language_model.lm_head(model.language_model.model(x, keep=keep)).float()  # (N, V)
    target = ids[0, len(prompt) :]
    logs = logits.log_softmax(-1).gather(1, target[:, None])
    return logs.sum().item(), bool((logits.argmax(-1) == target).all())
