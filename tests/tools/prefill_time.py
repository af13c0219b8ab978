"""Time to read a prompt with fewer visual tokens than 576, on a random decoder of 8 layers, beside its FLOPs.

The budgets take turns in one run, in one thread; printed are the median milliseconds of CPU time, the median ratio to
all patches, and the ratio of FLOPs. relevance:N is a model whose question chooses, made to keep N patches; its scorer
is counted.

python tests/tools/prefill_time.py
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from clip import CLIPVisionConfig
from llava import KVCache, Llava, LlavaConfig, TextConfig
from variants.token_budget import limit_visual_tokens, read_budget

BUDGETS = (
    "576:uniform",
    "144:uniform",
    "144:fastv:2",
    "relevance:400",
    "relevance:256",
    "relevance:144",
    "relevance:64",
)
WORDS, ROUNDS, WIDTH, INNER, LAYERS, TOWER = 42, 5, 256, 688, 8, 64


def build(budget: str) -> Llava:
    text = TextConfig(1000, WIDTH, INNER, num_hidden_layers=LAYERS, num_attention_heads=8)
    config = LlavaConfig(text, CLIPVisionConfig(TOWER, TOWER, 2, 2, image_size=336, patch_size=14), 999)
    if kept := budget.partition("relevance:")[2]:
        config.relevance_bounds = [int(kept) / 576] * 2
        return Llava(config).eval()
    model = Llava(config).eval()
    limit_visual_tokens(model, read_budget(budget))
    return model


@torch.inference_mode()
def seconds(model: Llava) -> float:
    count, decoder = model.config.visual_tokens or 576, model.language_model.model
    ids, features = torch.tensor([[1] * 2 + [999] * count + [1] * (WORDS - 2)]), torch.randn(1, count, TOWER)
    cache = KVCache(model.config.text_config, 1, ids.shape[1], like=decoder.embed_tokens.weight)
    start = time.process_time()
    decoder(model.embed(ids, features), None, cache)
    return time.process_time() - start


def flops(budget: str) -> float:
    """2 for each weight and token, and 4 x width for each pair of tokens in attention."""

    def layer(tokens: int) -> float:
        length = tokens + WORDS
        return 2 * length * (4 * WIDTH**2 + 3 * WIDTH * INNER) + 4 * WIDTH * length**2

    kept = int(budget.replace("relevance:", "").split(":")[0])
    whole = int(budget.split(":")[2]) if "fastv" in budget else 0  # layers that read all patches
    total = whole * layer(576) + (LAYERS - whole) * layer(kept)
    projected = kept if "uniform" in budget else 576
    total += 2 * projected * (TOWER * WIDTH + WIDTH**2)
    if "relevance" in budget:  # two layers of attention to patches and words, and an MLP of twice the width
        total += 2 * (2 * 576 * 8 * TOWER**2 + 4 * TOWER * 576 * (576 + WORDS))
    return total


if __name__ == "__main__":
    torch.set_num_threads(1)
    models = {budget: build(budget) for budget in BUDGETS}
    times = {budget: [] for budget in BUDGETS}
    for turn in range(ROUNDS + 1):
        for budget, model in models.items():
            times[budget] += [seconds(model)] if turn else [seconds(model)][1:]  # the first turn warms up
    whole = times[BUDGETS[0]]
    print(f"{'budget':16}{'ms':>8}{'of all':>8}{'FLOPs':>8}")
    for budget, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, whole))
        predicted = flops(budget) / flops(BUDGETS[0])
        print(f"{budget:16}{1000 * statistics.median(values):8.0f}{ratio:8.2f}{predicted:8.2f}")
