"""What the layers of both transformers are made of: products that are fast on a CPU, too, and what is not kept.

An answer is made a token at a time, so that every matrix is read from memory for a single row: what a CPU can do then
is bytes per second. In training it is the activations, kept for the gradients, that fill the memory, and most of them
are cheap to make again. Figures, and of which machines, are in LOG.md.
"""

import weakref
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

SHORT = 320  # positions
FEW = 32  # rows
LARGE = 1 << 18  # numbers in a matrix, or in what it is multiplied by; a smaller one stays in the cache
PIECES = 8
EMULATED = torch.backends.cpu.get_cpu_capability() == "AVX2"  # such a CPU has no arithmetic in 16 bits
CPUINFO = Path("/proc/cpuinfo")
# MKL, which torch multiplies float32 with, is Intel's; on AMD's processors oneDNN, in torch as well, is faster.
ONEDNN = CPUINFO.exists() and "AuthenticAMD" in CPUINFO.read_text() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextmanager
def not_emulated():
    """As if this CPU had arithmetic in 16 bits."""
    global EMULATED
    before, EMULATED = EMULATED, False
    try:
        yield
    finally:
        EMULATED = before


def need_compiler(device: torch.device):
    """Let torch.compile show that it works: on a CPU it takes a C++ compiler (CXX, or g++) and Python's headers.

    Raises ValueError, of one line, if it does not.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except RuntimeError as error:  # its message has the compiler's whole command in it
        lines = str(error).splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0])
        raise ValueError(f"--compile does not work here: {reason}") from None


def prepare(model: nn.Module):
    """Before compiling: let layers do what they have to."""
    for module in model.modules():
        if hasattr(module, "before_compiling"):
            module.before_compiling()


# ---------------------------------------------------------------------------------------------------------------------
# what is made again on the way back


class Remade(torch.autograd.Function):
    """function(*inputs), of which the inputs alone are kept. The value is made again, once, when it is first asked for
    on the way back: by the gradients of what used it (see `lean`), or by its own, which is the last to ask."""

    @staticmethod
    def forward(ctx, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.function, ctx.again = function, None
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (value, inputs), ctx.again = made_again(ctx), None
        value.backward(gradient)
        return None, *(x.grad for x in inputs)


def made_again(ctx) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The value of a Remade, and the inputs that its gradients are taken of."""
    if ctx.again is None:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(n) for x, n in zip(ctx.saved_tensors, ctx.needs_input_grad[1:])]
            ctx.again = ctx.function(*inputs), inputs
    return ctx.again


RECIPES = {}  # the storage of every value of a Remade that is alive -> how it is made


def remade(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """function(*inputs), something cheap, which within `lean` nothing keeps for the gradients that is made of it."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        return function(*inputs)  # the compiler chooses by itself what to keep
    value = Remade.apply(function, *inputs)
    storage = value.untyped_storage()
    if storage._cdata not in [x.untyped_storage()._cdata for x in inputs]:  # else there was nothing to make
        RECIPES[storage._cdata] = value.grad_fn
        weakref.finalize(storage, RECIPES.pop, storage._cdata, None)
    return value


def projected(layer: nn.Module, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """layer(function(*inputs)), of which only the inputs are kept. What a layer such as LoRA's makes before its product
    is more than `remade` knows of; a checkpoint makes it again, and goes no further than it has to."""
    plain = isinstance(layer, nn.Linear) or torch.compiler.is_compiling() or not torch.is_grad_enabled()
    if plain:
        return layer(remade(function, *inputs))
    return checkpoint(lambda *inputs: layer(function(*inputs)), *inputs, use_reentrant=False)


def lean() -> torch.autograd.graph.saved_tensors_hooks:
    """While a forward pass runs in it: what is to be kept for the gradients and has a recipe, is kept as that.

    No product is run twice for it, as checkpointing whole layers would (Chen et al. 2016, 1604.06174).
    """

    def pack(kept: torch.Tensor):
        recipe = RECIPES.get(kept.untyped_storage()._cdata)
        if recipe is None:
            return kept.detach()  # an output that held what made it would never be freed, without a way back
        return recipe, kept.shape, kept.stride(), kept.storage_offset()

    def unpack(kept) -> torch.Tensor:
        if torch.is_tensor(kept):
            return kept
        recipe, *view = kept
        return made_again(recipe)[0].detach().as_strided(*view)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """norm(x) as products will have it; where it trains, and they do, they do not keep it for their gradients."""
    if not norm.weight.requires_grad:
        return narrowed(norm(x))
    names, weights = zip(*norm.named_parameters())

    def again(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return functional_call(norm, dict(zip(names, weights)), (x,)).to(dtype)

    dtype = arithmetic_of(x)
    return remade(again, x, *weights)


def narrowed(x: torch.Tensor) -> torch.Tensor:
    """x as its products will have it: rounded once, and kept once, for all of them; autocast does it for each."""
    return x.to(arithmetic_of(x))


def arithmetic_of(x: torch.Tensor) -> torch.dtype:
    """The type that a product of x is computed in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# ---------------------------------------------------------------------------------------------------------------------
# products


class Linear(nn.Linear):
    """torch.nn.Linear, by `product`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self.bias)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., C) times the transpose of weight (N, C), plus bias (N,): what torch.nn.functional.linear gives."""
    rows, dtype, cpu = x.numel() // x.shape[-1], arithmetic_of(x), x.device.type == "cpu"
    learning = torch.is_grad_enabled()
    if cpu and dtype.itemsize == 2 and EMULATED and rows > PIECES:
        return widened(x, weight, bias, dtype)
    if weight.dtype.itemsize > dtype.itemsize:  # autocast would round it, too, and keep that for the gradients
        weight = remade(lambda weight: weight.to(dtype), weight)
    if cpu and rows > 1 and suits_onednn(x, weight):
        if learning and weight.requires_grad:
            return TrainedProduct.apply(x, weight, bias)
        if learning and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return FrozenProduct.apply(x, bias, lambda dtype: weight)
        return by_onednn(x, weight, bias)
    if cpu and rows <= FEW and not learning:
        y = of_few_rows(x, weight, dtype)
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def suits_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN is the faster one: in float32, and not for what is small on both sides."""
    large = weight.numel() >= LARGE or x.numel() >= LARGE
    return ONEDNN and large and x.dtype == weight.dtype == arithmetic_of(x) == torch.float32


def by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """oneDNN's product, without gradients."""
    if torch.compiler.is_compiling():
        return opaque(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("llava::by_onednn", mutates_args=())
def opaque(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same as an operator of ours, which the compiler calls as it is; of torch's it asks that the weight be a
    constant, as in no model that is compiled a layer for all. Each call takes 0.1 ms more."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@opaque.register_fake
def shape_of_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def of_few_rows(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (..., C) of at most FEW rows times the transpose of weight (N, C), without gradients: bytes per second."""
    one, large = x.numel() == x.shape[-1], weight.numel() >= LARGE
    if one and torch.compiler.is_compiling():  # becomes one loop over the matrix, of which no product is kept
        return (weight.float() * x.float().flatten()).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
    if one and large and dtype.itemsize == 2 and not EMULATED and not ONEDNN:
        return torch.mv(weight.to(dtype), x.to(dtype).flatten()).view(*x.shape[:-1], -1)
    if large and len(weight) % PIECES == 0 and dtype == torch.float32 and weight.is_contiguous():
        return in_pieces(x, weight)
    return F.linear(x, weight)


class FrozenProduct(torch.autograd.Function):
    """x W^T + b, of which nothing is kept. W stands still, and is made by `make` when it is needed, in the type asked
    for: of four bits it need not be kept either."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, make: Callable[[torch.dtype], torch.Tensor]):
        ctx.make = make
        return product(x, make(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        of_x, of_bias, _ = ctx.needs_input_grad
        return (
            product(gradient, ctx.make(gradient.dtype).T) if of_x else None,
            gradient.flatten(0, -2).sum(0) if of_bias else None,
            None,
        )


class TrainedProduct(torch.autograd.Function):
    """x W^T + b, of a W that trains: its gradient is no product of that form, and MKL is as fast at it or faster."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)  # (rows, N)
        return (
            product(gradient, weight.T) if of_x else None,
            rows.T @ x.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
    """torch's scaled_dot_product_attention of q (B, H, T, D), k and v (B, KV, S, D): (B, H, T, D).

    To train on short rows a CPU does it in float32, whatever they are in: in 16 bits the way back would take 3 times as
    long.
    """
    dtype = arithmetic_of(q)
    if q.device.type != "cpu" or dtype.itemsize > 2 or k.shape[-2] >= SHORT or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        q, k, v = (remade(torch.Tensor.float, x) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, **options)
        return remade(lambda y: y.to(dtype), y)


def attend_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The same for a single token, of which q (B, KV, H / KV, D) are the heads. On a CPU the compiler gets it written
    out, and makes it part of a loop it has anyway, where the kernel takes longer to be called than to work."""
    if mask is None or q.device.type != "cpu" or not torch.compiler.is_compiling():
        return attend(q, k, v, attn_mask=mask)
    scores = (q[..., None, :].float() * k[..., None, :, :].float()).sum(-1) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)  # (B, KV, H / KV, S)
    return (weights[..., None] * v[..., None, :, :].float()).sum(-2).to(q.dtype)


def widened(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """In float32, rounded to `dtype` at the end: 8 times as fast as emulating 16 bits, and 60 times on the way back."""
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)


def in_pieces(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As a batch of PIECES products, which all cores share; for one whole product of few rows only one core works."""
    pieces = weight.view(PIECES, -1, x.shape[-1]).transpose(1, 2)  # (PIECES, C, N / PIECES)
    y = torch.bmm(x.reshape(1, -1, x.shape[-1]).expand(PIECES, -1, -1), pieces)  # (PIECES, rows, N / PIECES)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)
