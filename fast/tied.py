"""An embedding whose matrix is the head's, too, as in GPT-2 and small LLaMAs (Press & Wolf 2016, arXiv 1608.05859).

Its gradient has two parts, and is as large as the vocabulary. The head's part is the first that is known on the way
back, while all activations are still there, and that of the embedding's rows the last. So the head leaves its part as
the two factors it is a product of, and the rows make the whole of it, in one matrix where autograd would have three.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fast.linear import Linear, narrowed, product

ROWS = 4096  # of the gradient made at a time: in 16 bits they are made apart


class TiedEmbedding(nn.Embedding):
    """torch.nn.Embedding, of (V, C) numbers."""

    def __init__(self, *shape: int):
        super().__init__(*shape)
        self.owed = []  # gradients (N, V) of logits, and the states (N, C) they were made from

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return TiedRows.apply(self.weight, input_ids, self.owed)
        return super().forward(input_ids)


class TiedRows(torch.autograd.Function):
    """The rows (..., C) of ids, and on the way back the gradient of all uses of the weight."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, input_ids: torch.Tensor, owed: list) -> torch.Tensor:
        ctx.like, ctx.owed = weight.detach(), owed
        ctx.save_for_backward(input_ids)
        return F.embedding(input_ids, weight)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (ids,) = ctx.saved_tensors
        of_weight = torch.zeros_like(ctx.like)
        while ctx.owed:
            of_logits, hidden = ctx.owed.pop()
            for piece, part in zip(of_weight.split(ROWS), of_logits.T.split(ROWS)):
                piece += part @ hidden
        return of_weight.index_add_(0, ids.flatten(), gradient.flatten(0, -2).to(of_weight.dtype)), None, None


class TiedHead(Linear):
    """Logits (..., V) of states (..., C), by the matrix of an embedding."""

    def __init__(self, embedding: TiedEmbedding):
        vocabulary, width = embedding.weight.shape
        super().__init__(width, vocabulary, bias=False)  # draws what is not used: a seed keeps its model
        self.weight, self.owed = embedding.weight, embedding.owed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return TiedProduct.apply(x, self.weight, self.owed)
        return super().forward(x)


class TiedProduct(torch.autograd.Function):
    """x W^T, whose gradient of W is left to TiedRows."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, owed: list) -> torch.Tensor:
        ctx.owed, x = owed, narrowed(x)
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight = ctx.saved_tensors
        ctx.owed.append((gradient.flatten(0, -2), x.flatten(0, -2)))
        return product(gradient, weight.to(gradient.dtype).T), None, None
