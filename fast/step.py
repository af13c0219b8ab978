"""One token further: a step of an answer, which is the same each time.

Which token it is stands in a tensor, as do the ids, so that nothing in a step depends on a number of Python's. So a
GPU can record its hundreds of kernels as one CUDA graph, and run them again and again without waiting for Python in
between; and on a CPU, what was compiled for one token is known to fit the next.
"""

from collections.abc import Callable

import torch
from torch import nn

WARM = 3  # tokens of an answer before a step is recorded


class Step:
    """Logits (B, V) from the last ids (B,) of every row.

    Args: language_model: a llava.CausalLM; padding (B,) as in llava.Decoder.forward; cache: its llava.KVCache, which
    holds the prompts, or is to be given them by `read`.
    """

    def __init__(self, language_model: nn.Module, padding: torch.Tensor | None, cache):
        self.language_model, self.padding, self.cache = language_model, padding, cache
        device = language_model.lm_head.weight.device
        self.ids = torch.zeros(len(cache.layers[0][0]), dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.run, self.calls = self.read_one, 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids.copy_(ids)
        self.place.fill_(used := self.cache.used)
        if self.calls == WARM and (record := self.language_model.model.record):
            self.run = record(self.read_one)
        logits, self.calls = self.run(), self.calls + 1
        self.cache.used = used + 1  # whether it was counted, recorded or replayed
        return logits

    def read_one(self) -> torch.Tensor:
        return self.read(self.language_model.model.embed_tokens(self.ids)[:, None], self.place)

    def read(self, embeddings: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, V) after the last of new token embeddings (B, T, C)."""
        hidden = self.language_model.model(embeddings, self.padding, self.cache, (slice(None), -1), places)  # (B, C)
        return self.language_model.lm_head(hidden)


def as_graph(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A function of tensors that stay where they are, recorded as a CUDA graph; what it returns is always one tensor.

    It must have run before, since nothing can be compiled or chosen while it is recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def unguarded(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A function of compiled ones that has run before, without asking each of them again whether it still fits: only
    what tells one from another is looked at (torch.compiler.set_stance; a tenth of a small model's step).

    Torch compiles a layer for so many cases and no more, and runs it uncompiled in any other, which this forbids: then
    all is asked again.
    """
    asking = False

    def run() -> torch.Tensor:
        nonlocal asking
        if not asking:
            try:
                with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
                    return function()
            except RuntimeError:
                asking = True
        return function()

    return run
