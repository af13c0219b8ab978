"""Gradients through a choice: keep some of n patches, see the loss, and learn which to keep.

    gumbel       straight-through Gumbel top-k: a hard choice forward, the gradient of a soft one backward
    concrete     relaxed Bernoulli (binary concrete): soft gates between 0 and 1, forward and backward
    reinforce    hard choices; those that did better than the other samples become likelier (leave-one-out baseline)

All three estimate the gradient of a mean loss over one distribution: n independent coins with the given logits, on the
condition that between `least` and `most` of them show 1. With least = most = k it is a distribution over the subsets of
k. Its likeliest subset is `choose`, which is used at inference.

    python -m variants.estimators        bias and variance of each beside exact enumeration: 12 patches, 4 kept

Sources: Kool et al. 2019 (Gumbel top-k, arXiv 1903.06059; leave-one-out, "Buy 4 REINFORCE samples"), Maddison et al.
2016 (concrete, 1611.00712), Jang et al. 2016 (straight-through, 1611.01144), Williams 1992 (REINFORCE), Ahmed et al.
2022 (SIMPLE, 2210.01941: the recursion over sums). Shapes: N images, n patches of each, B rows, K samples.
"""

from collections.abc import Callable
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from inputs import cli

TEMPERATURE = 0.5  # of the soft gates; lower is closer to a hard choice, and its gradient is noisier
SAMPLES = 4  # choices that reinforce compares for each row
NEVER = -1e9  # log of an impossible number; finite, so that its gradient is 0 and not NaN
Bounds = tuple[int, int]  # least and most patches that are kept
LossOf = Callable[[Tensor], Tensor]  # gates (N, n), 0: dropped, 1: kept, to the loss of each row (B,)

# ---------------------------------------------------------------------------------------------------------------------
# the distribution


def choose(scores: Tensor, bounds: Bounds) -> Tensor:
    """The patches (N, n) with scores above 0, but at least and at most as many as `bounds` say; bool."""
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks < (scores > 0).sum(1, keepdim=True).clamp(*bounds)


def log_sums(logits: Tensor, most: int) -> list[Tensor]:
    """For j = 0 .. n: log of the sum of exp(logits) products over all subsets of k of the first j, (N, most + 1) for k.

    A subset of the first j lacks patch j or holds it: sums_j[k] = sums_{j-1}[k] + exp(logit_j) sums_{j-1}[k - 1].
    """
    sums = [torch.full((len(logits), most + 1), NEVER, dtype=logits.dtype, device=logits.device)]
    sums[0][:, 0] = 0
    for logit in logits.split(1, dim=1):
        with_it = F.pad(sums[-1][:, :-1], (1, 0), value=NEVER) + logit
        sums.append(torch.logaddexp(sums[-1], with_it))
    return sums


def expected_count(logits: Tensor, bounds: Bounds) -> Tensor:
    """Mean number (N,) of patches that are kept."""
    least, most = bounds
    chances = log_sums(logits, most)[-1][:, least:].softmax(dim=1)
    return chances @ torch.arange(least, most + 1, dtype=logits.dtype, device=logits.device)


def log_probability(kept: Tensor, logits: Tensor, bounds: Bounds) -> Tensor:
    """Log-probability (N,) of the choices `kept` (N, n); (K, N) of (K, N, n)."""
    least, most = bounds
    return (logits * kept).sum(-1) - log_sums(logits, most)[-1][:, least:].logsumexp(dim=1)


@torch.no_grad()
def draw(logits: Tensor, bounds: Bounds) -> Tensor:
    """A choice (N, n) of zeros and ones from the distribution: first how many, then patch by patch from the last."""
    least, most = bounds
    sums, kept = log_sums(logits, most), torch.zeros_like(logits)
    left = least + torch.multinomial(sums[-1][:, least:].softmax(dim=1), 1)  # (N, 1) still to be kept
    for j in reversed(range(logits.shape[1])):
        without, whole = sums[j].gather(1, (left - 1).clamp(min=0)), sums[j + 1].gather(1, left)
        chance = (logits[:, j : j + 1] + without - whole).exp() * (left > 0)
        kept[:, j : j + 1] = torch.rand_like(chance) < chance
        left = left - kept[:, j : j + 1].long()
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# the estimators: each returns a loss for each row, whose gradient is the estimate


def noisy_scores(logits: Tensor, bounds: Bounds) -> Tensor:
    """Logits with Gumbel noise, moved so that as many are above 0 as the bounds allow: (N, n).

    Each patch draws a Gumbel number for "keep" and one for "drop"; their difference is a logistic number. Without
    bounds, a patch is above 0 with probability sigmoid(logit).
    """
    uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
    scores = logits + uniform.log() - (-uniform).log1p()
    ordered = scores.sort(dim=1, descending=True).values
    count = (scores > 0).sum(1, keepdim=True)
    wanted = count.clamp(*bounds)
    edges = torch.cat([ordered[:, :1] + 2, ordered, ordered[:, -1:] - 2], dim=1)  # if all or none are to be kept
    middle = (edges.gather(1, wanted) + edges.gather(1, wanted + 1)) / 2  # between the last kept and the first dropped
    return scores - middle * (count != wanted)


def gumbel(logits: Tensor, bounds: Bounds, loss_of: LossOf, rows: Tensor) -> Tensor:
    scores = noisy_scores(logits, bounds)
    soft, hard = (scores / TEMPERATURE).sigmoid(), choose(scores, bounds)
    return loss_of(hard + soft - soft.detach())


def concrete(logits: Tensor, bounds: Bounds, loss_of: LossOf, rows: Tensor) -> Tensor:
    return loss_of((noisy_scores(logits, bounds) / TEMPERATURE).sigmoid())


def reinforce(logits: Tensor, bounds: Bounds, loss_of: LossOf, rows: Tensor) -> Tensor:
    choices = draw(logits.repeat(SAMPLES, 1), bounds).unflatten(0, (SAMPLES, -1))  # (K, N, n)
    losses = torch.stack([loss_of(kept) for kept in choices])  # (K, B)
    others = (losses.sum(0) - losses) / (SAMPLES - 1)  # mean loss of a row's other samples
    logs = log_probability(choices, logits, bounds)  # (K, N)
    logs = torch.zeros_like(losses).index_add(1, rows, logs)  # (K, B): a row may have several images
    estimate = ((losses - others).detach() * logs).mean(0)
    return losses.mean(0) + estimate - estimate.detach()  # the value is the mean loss alone


ESTIMATORS = {"gumbel": gumbel, "concrete": concrete, "reinforce": reinforce}

# ---------------------------------------------------------------------------------------------------------------------
# against the truth


class Toy:
    """A loss of 12 patches, of which 4 are kept: attention reads the kept ones, and a linear head names a class."""

    patches, kept = 12, 4

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.values, self.head = torch.randn(12, 6, generator=generator), torch.randn(6, 3, generator=generator)
        self.weights, self.logits = torch.rand(12, generator=generator) + 0.5, torch.randn(12, generator=generator)
        self.bounds = (self.kept, self.kept)

    def loss_of(self, gates: Tensor) -> Tensor:
        """The loss (N,) of gates (N, 12)."""
        weights = gates * self.weights
        read = weights @ self.values / weights.sum(1, keepdim=True)
        return -(2 * read @ self.head).log_softmax(dim=1)[:, 0]

    def exact_gradient(self) -> Tensor:
        """The gradient (12,) of the mean loss over all 495 subsets, by enumeration."""
        logits = self.logits.clone().requires_grad_()
        subsets = torch.zeros(495, 12)
        for row, subset in enumerate(combinations(range(12), 4)):
            subsets[row, list(subset)] = 1
        mean = (subsets @ logits).softmax(0) @ self.loss_of(subsets)
        return torch.autograd.grad(mean, logits)[0]

    def estimates(self, estimator: Callable, count: int) -> Tensor:
        """`count` independent estimates (count, 12) of that gradient."""
        logits = self.logits.repeat(count, 1).requires_grad_()
        losses = estimator(logits, self.bounds, self.loss_of, torch.arange(count))
        return torch.autograd.grad(losses.sum(), logits)[0]


def compare(toy: Toy, estimator: Callable, count: int) -> dict[str, float]:
    """Bias of the mean of `count` estimates, its standard error and the deviation of one estimate, as shares of the
    length of the true gradient; and the cosine between mean and truth."""
    truth, found = toy.exact_gradient(), toy.estimates(estimator, count)
    mean, deviation = found.mean(0), found.var(0).sum().sqrt()
    length = truth.norm()
    return {
        "bias": float((mean - truth).norm() / length),
        "standard error": float(deviation / count**0.5 / length),
        "deviation": float(deviation / length),
        "cosine": float(F.cosine_similarity(mean, truth, dim=0)),
    }


def main():
    """Print the table of all estimators."""
    parser = cli.make_parser(__doc__, "python -m variants.estimators")
    parser.add_argument("--count", type=int, default=200_000, help="estimates of each")
    args = parser.parse_args()
    if args.count < 2:
        parser.error("--count must be at least 2")
    print("| estimator | losses | bias | standard error of it | deviation of one | cosine |\n|---|" + "---:|" * 5)
    for name, estimator in ESTIMATORS.items():
        torch.manual_seed(0)
        row = compare(Toy(), estimator, args.count)
        cells = [f"{row[key]:.3f}" for key in ("bias", "standard error", "deviation", "cosine")]
        print(f"| {name} | {SAMPLES if name == 'reinforce' else 1} | {' | '.join(cells)} |")


if __name__ == "__main__":
    cli.run(main, "variants.estimators")
