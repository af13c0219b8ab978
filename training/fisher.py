"""Estimate how much each weight matters for what a model can do, for train.py --ewc.

    python -m training.fisher --model out/stage2 --data old.json --images DIR

The diagonal Fisher information is the mean of the squared gradients of single samples' log-likelihood (Kirkpatrick et
al. 2017, arXiv 1612.00796). It is written beside the model, as fisher.safetensors, for projector and decoder. The
square of a batch's gradient is another quantity: signs cancel in the mean of B samples, so it is about B times too
small. The command prints how much smaller it is.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from data import Records, collate
from formats.weights import load_checkpoint
from inputs import cli
from inputs.check import count_cut, refuse_bad
from inputs.files import write_atomic
from inputs.mixture import open_sources
from llava import Llava, summed_cross_entropy
from training.objectives import FISHER
from training.ranks import choose_device
from training.sharding import trainable_parameters

GROUP = 16  # samples of the batches whose squared gradient is compared
LABELS = ("model", "data")


def sample_loss(model: Llava, batch: dict, labels: str, generator: torch.Generator | None = None) -> Tensor:
    """-log p of a sample's answer, summed over its tokens: that of the data, or one drawn from the model.

    The drawn answer takes each token from the model's distribution after the data's tokens before it.
    """
    if labels == "data":
        return model(**batch)
    head = model.language_model.lm_head
    hidden, _ = model.supervised_states(**batch)
    with torch.no_grad():
        drawn = torch.multinomial(head(hidden).float().softmax(-1), 1, generator=generator)[:, 0]
    return summed_cross_entropy(head, hidden, drawn)


def estimate_fisher(model: Llava, batches: Iterable[dict], labels: str, seed: int = 0) -> tuple[dict, float]:
    """The diagonal Fisher information of what trains, by name, per supervised token; and how many times smaller the
    mean square of the gradients of GROUP samples is.

    Per token, so that with strength 1 the penalty of --ewc estimates by how much the loss per token rises on this data.
    Args: batches: of one sample each; labels: "data" (the empirical Fisher information) or "model" (the true one).
    """
    trained, tokens = trainable_parameters(model), 0
    generator = torch.Generator(model.device).manual_seed(seed)
    fisher, group, squared = ({name: torch.zeros_like(p) for name, p in trained.items()} for _ in range(3))
    for number, batch in enumerate(batches, 1):
        loss = sample_loss(model, batch, labels, generator)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients):
            if gradient is not None:  # a sample without an image has none for the projector
                fisher[name] += gradient.square()
                group[name] += gradient
            if number % GROUP == 0:
                squared[name] += group[name].square() / GROUP  # the mean gradient's square, for each of its samples
                group[name].zero_()
        tokens += int((batch["labels"][:, 1:] >= 0).sum())
    total, of_groups = (float(sum(t.double().sum() for t in tensors.values())) for tensors in (fisher, squared))
    whole = number // GROUP * GROUP / number  # the share of the samples that fill a group
    return {name: f / tokens for name, f in fisher.items()}, total * whole / max(of_groups, 1e-300)


def read_samples(args: argparse.Namespace, model: Llava, tokenizer) -> Iterable[dict]:
    """Batches of one record each, evenly spaced over the files."""
    config = model.config
    sources = open_sources(args.data, args.images)
    refuse_bad(sources, 0)
    if any(source.weight != 1 for source in sources):
        raise ValueError("--data: the files have no weights here, since records are read evenly over all of them")
    dataset = Records(sources, tokenizer, config, config.text_config.max_position_embeddings)
    if text := count_cut(dataset)[1]:
        print(text)
    count = min(args.samples, len(dataset))
    if count < GROUP:
        raise ValueError(f"--data: {count} samples are too few, {GROUP} are needed and some hundred are useful")
    for i in tqdm(range(count), "Fisher information", unit="sample"):
        batch = collate([dataset[i * len(dataset) // count]], tokenizer.pad_id)
        yield {key: v.to(model.device) if torch.is_tensor(v) else v for key, v in batch.items()}


def main():
    """Estimate and write the Fisher information."""
    parser = cli.make_parser(__doc__, "python -m training.fisher")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the model, from which the next training will start")
    add("--data", nargs="+", required=True, help="LLaVA's JSON that it was trained on")
    add("--images", nargs="+", help="folder that image paths start from, or one for each file")
    add("--samples", type=int, default=512, help="records to use, evenly spaced")
    add("--labels", choices=LABELS, default="model", help="answers drawn from the model, or those of the data")
    add("--seed", type=cli.seed, default=0, help="of the drawn answers")
    args = parser.parse_args()
    model, tokenizer = load_checkpoint(args.model, choose_device(None), torch.float32)
    if model.config.vision_config is not None:
        model.vision_tower.requires_grad_(False)
    fisher, ratio = estimate_fisher(model.train(), read_samples(args, model, tokenizer), args.labels, args.seed)
    path = args.model / FISHER
    write_atomic(path, save({name: tensor.cpu() for name, tensor in fisher.items()}))
    print(f"{path}: {len(fisher)} tensors, sum {sum(float(f.sum()) for f in fisher.values()):.4g}")
    print(f"the squared gradients of batches of {GROUP} would be {ratio:.1f} times smaller")


if __name__ == "__main__":
    cli.run(main, "training.fisher")
