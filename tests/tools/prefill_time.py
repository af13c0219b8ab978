"""Time to read a prompt with 576 and with 144 visual tokens, on a random decoder of 8 layers.

The budgets take turns in one run; printed are the median milliseconds, and the median ratio to all patches.

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

BUDGETS, WORDS, ROUNDS = ("576:uniform", "144:uniform", "144:fastv:2"), 40, 5


def build(budget: str) -> Llava:
    text = TextConfig(1000, 256, 688, num_hidden_layers=8, num_attention_heads=8)
    model = Llava(LlavaConfig(text, CLIPVisionConfig(64, 64, 2, 2, image_size=336, patch_size=14), 999)).eval()
    limit_visual_tokens(model, read_budget(budget))
    return model


@torch.inference_mode()
def seconds(model: Llava) -> float:
    count, decoder = model.config.visual_tokens or 576, model.language_model.model
    ids, features = torch.tensor([[1] * 2 + [999] * count + [1] * WORDS]), torch.randn(1, count, 64)
    cache = KVCache(model.config.text_config, 1, ids.shape[1], like=decoder.embed_tokens.weight)
    start = time.perf_counter()
    decoder(model.embed(ids, features), None, cache)
    return time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    models = {budget: build(budget) for budget in BUDGETS}
    times = {budget: [] for budget in BUDGETS}
    for turn in range(ROUNDS + 1):
        for budget, model in models.items():
            times[budget] += [seconds(model)] if turn else [seconds(model)][1:]  # the first turn warms up
    whole = times[BUDGETS[0]]
    for budget, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, whole))
        print(f"{budget:14}{1000 * statistics.median(values):8.1f} ms{ratio:8.2f}")
