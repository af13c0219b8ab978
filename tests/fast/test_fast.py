"""fast/ gives the same numbers as the plain model: values, gradients, greedy answers; and compiling changes nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from clip import CLIPVisionConfig
from fast import linear
from fast.accelerate import ITEMS, accelerate
from fast.attention import SHORT, attend
from fast.compile import compile_decoding
from fast.quantized import FastDropout, prepare_nf4
from formats import nf4_files
from llava import Llava, LlavaConfig, TextConfig, generate
from lora import NF4Linear, add_lora, find_linears, lora_layers

HERE = Path(linear.__file__).parents[1]
PROMPTS = [[5, 299, 299, 299, 299, 7, 8], [299, 299, 299, 299, 9]]


def small_llava(**text) -> Llava:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    shape |= {"intermediate_size": 344, "vocab_size": 300, "max_position_embeddings": 64}
    vision = CLIPVisionConfig(32, 64, 2, 2, image_size=28, patch_size=14)
    return Llava(LlavaConfig(TextConfig(**shape | text), vision, image_token_index=299, eos_token_ids=[])).eval()


def wide_llava(**text) -> Llava:
    """Matrices large enough for every kernel of fast/, heads that share keys."""
    return small_llava(hidden_size=512, intermediate_size=1024, num_attention_heads=8, **text)


def loss_and_gradients(model: Llava, autocast: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(0, 290, (4, 24))
    ids[:, 2:6] = 299
    labels = ids.masked_fill(torch.arange(24) < 12, -100)
    pixels = torch.randn(4, 3, 28, 28, dtype=torch.float64).to(model.dtype)
    model.train().zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, labels, pixel_values=pixels)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("item", [None, *ITEMS])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_values_and_gradients_are_the_plain_models(monkeypatch, item, model_type):
    """Against float64: the plain model rounds to 1.4e-6 of the gradient, fast/ to 2.1e-6."""
    model = wide_llava(model_type=model_type)
    state = list(model.state_dict())
    exact_loss, exact = loss_and_gradients(wide_llava(model_type=model_type).double())
    loss, plain = loss_and_gradients(model)
    monkeypatch.setattr("fast.accelerate.lacks_16_bit", lambda: True)
    assert item in [None, *accelerate(model, None if item is None else {item})]
    assert list(model.state_dict()) == state
    fast_loss, fast = loss_and_gradients(model)
    assert fast_loss == pytest.approx(exact_loss, rel=1e-6) and loss == pytest.approx(exact_loss, rel=1e-6)
    apart = [distance(gradients, exact) for gradients in (plain, fast)]
    assert apart[1] <= 2 * apart[0] + 1e-7 and apart[1] < 5e-6


def distance(gradients: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two whole gradients, relative to the second's."""
    assert list(gradients) == list(exact)
    apart = sum(float((gradients[name].double() - exact[name]).square().sum()) for name in exact)
    return (apart / sum(float(gradient.square().sum()) for gradient in exact.values())) ** 0.5


def test_under_autocast_gradients_are_as_close_to_float32s_as_the_plain_models():
    model = small_llava()
    _, exact = loss_and_gradients(model)
    loss, plain = loss_and_gradients(model, autocast=True)
    accelerate(model)
    fast_loss, fast = loss_and_gradients(model, autocast=True)
    assert fast_loss == pytest.approx(loss, rel=1e-2)
    apart = [distance(found, exact) for found in (plain, fast)]
    assert apart[1] <= 1.1 * apart[0]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_answers_are_the_plain_models(model_type, dtype):
    model = wide_llava(model_type=model_type).to(dtype)
    features = torch.randn(2, 4, 32, dtype=dtype)
    want = list(generate(model, PROMPTS, features, max_new_tokens=12))
    accelerate(model)
    assert list(generate(model, PROMPTS, features, max_new_tokens=12)) == want


def test_an_unknown_item_is_named():
    with pytest.raises(ValueError, match="no item 'fastest', only one_row"):
        accelerate(small_llava(), {"fastest"})


# ---------------------------------------------------------------------------------------------------------------------
# kernels


def layer_of(items: set[str], weight: torch.Tensor, bias: torch.Tensor | None) -> linear.FastLinear:
    layer = linear.FastLinear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight, layer.items = torch.nn.Parameter(weight), frozenset(items)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias)
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_widened(dtype):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((4, 20, 96), (64, 96), (64,)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    found = layer_of({"widen"}, weight, bias)(x)
    assert found.dtype == dtype and (found - exact).abs().max() < 0.02 * exact.abs().max()


def test_autocast_is_widened_too_and_its_gradients_are():
    torch.manual_seed(0)
    layer, x = layer_of({"widen"}, torch.randn(64, 96), torch.zeros(64)), torch.randn(4, 20, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.weight.grad, x.detach().sum((0, 1)).expand_as(layer.weight), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("length", [SHORT - 1, SHORT])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, "autocast"])
def test_attention_of_short_rows_is_as_exact_and_its_gradients_are(length, kind):
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "autocast" else kind
    q, k, v = (torch.randn(2, heads, length, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        y = attend(q, k, v, attn_mask=None, is_causal=True, enable_gqa=True)
    assert y.dtype == (torch.bfloat16 if kind == "autocast" else kind)
    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*exact_inputs, is_causal=True, enable_gqa=True)
    precision = {torch.float64: 1e-12, torch.float32: 1e-5}.get(kind, 2e-2)
    found = (y, *torch.autograd.grad(y.sum(), (q, k, v)))
    for got, exact in zip(found, (want, *torch.autograd.grad(want.sum(), exact_inputs))):
        assert (got.double() - exact).abs().max() <= precision * exact.abs().max()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_its_share_and_keeps_the_mean(share, dtype):
    torch.manual_seed(0)
    x = torch.ones(1003, 997, dtype=dtype, requires_grad=True)
    y = FastDropout(share).train()(x)
    nothing, kept = y.unique().tolist()
    assert nothing == 0 and kept == pytest.approx(1 / (1 - share), rel=4e-3)
    for zeroed in (y == 0).float().mean(dim=0), (y == 0).float().mean(dim=1):  # rows and columns, binomial
        assert (zeroed - share).abs().max() < 6 * (share * (1 - share) / 997) ** 0.5
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    assert torch.equal(FastDropout(share).eval()(x), x)


# ---------------------------------------------------------------------------------------------------------------------
# compiling


def in_four_bits(model: Llava):
    for path in find_linears(model, "llm"):
        model.set_submodule(path, NF4Linear.from_weight(model.get_submodule(path).weight))


def test_nf4_prepared_for_compiling_holds_the_same_numbers():
    torch.manual_seed(0)
    layer, x = NF4Linear.from_weight(torch.randn(48, 100)), torch.randn(3, 100)  # rows begin within a block
    want, codes, y = layer.dequantize(), layer.packed.clone(), layer(x)
    prepare_nf4(layer)
    prepare_nf4(layer)  # a second time changes nothing
    assert torch.equal(layer.dequantize(), want) and torch.equal(layer(x), y)
    assert not torch.equal(layer.weight, codes) and torch.equal(layer.packed, codes)
    assert torch.equal(layer.loop_dequantize(), want)
    stored = nf4_files.to_files("w", layer)
    assert torch.equal(stored["w"], codes) and "w.nested_absmax" not in stored


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_nf4_computes_the_same_and_stores_no_weight(dtype):
    torch.manual_seed(0)
    layer = NF4Linear.from_weight(torch.randn(192, 320, dtype=dtype))  # 960 absmax: the last block of 256 is not full
    x = torch.randn(40, 320, dtype=dtype, requires_grad=True)
    y = layer(x)
    (want,) = torch.autograd.grad(y.square().sum(), x)
    prepare_nf4(layer)
    layer.compile()
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        found = layer(x)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], want)
    assert all(t.numel() < 192 * 320 for t in stored if t.is_floating_point())
    with torch.inference_mode():
        one = layer(x[:1])  # a loop of its own, whose sums are in another order
    assert (one - y[:1]).abs().max() <= {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype] * y.abs().max()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "gpt2", "four bits", "lora"])
def test_compiled_decoding_gives_the_same_answers(kind):
    model = small_llava(model_type="gpt2" if kind == "gpt2" else "llama")
    if kind == "bfloat16":
        model.to(torch.bfloat16)
    if kind == "four bits":
        in_four_bits(model)
    if kind == "lora":
        add_lora(model, {"llm": 4}, None, 0.0)
        for path, layer in lora_layers(model).items():
            torch.nn.init.normal_(layer.lora_B.weight)
            layer.scale *= 3 if "layers.1." in path else 1  # a constant for the compiler: this layer is compiled apart
        model.eval()
    features = torch.randn(2, 4, 32, dtype=model.dtype)
    want = list(generate(model, PROMPTS, features, max_new_tokens=8))
    alone = list(generate(model, PROMPTS[:1], features[:1], max_new_tokens=8))
    single = list(generate(model, [[5]], max_new_tokens=4))
    accelerate(model)
    compile_decoding(model)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert list(generate(model, [[5]], max_new_tokens=4)) == single
    assert list(generate(model, PROMPTS[:1], features[:1], max_new_tokens=8)) == alone
    assert list(generate(model, PROMPTS, features, max_new_tokens=8)) == want
    assert not torch._dynamo.utils.counters["graph_break"]  # a layer is compiled whole


def test_a_program_that_compiles_nothing_does_not_import_the_compiler():
    code = "import sys, sample, train, eval; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


def test_compiling_without_a_compiler_is_one_line(tmp_path):
    bare = tmp_path / "bare"  # a compiler without its headers
    bare.write_text('#!/bin/sh\nexec g++ -nostdinc "$@"\n')
    bare.chmod(0o755)
    if not shutil.which("g++"):
        pytest.skip("no g++ to call")
    code = "import torch; from fast.compile import require_compiler; require_compiler(torch.device('cpu'))"
    found = {"CXX": str(bare), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=HERE, env=os.environ | found, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: --compile does not work here: ") and "No such file" in last and len(last) < 300


@pytest.mark.usefixtures("compiler")
def test_a_compiled_run_has_the_same_losses(tiny, command, tmp_path):
    command(train, *tiny.flags["stage2"], "--compile", "--out", tmp_path / "run")
    torch.compiler.reset()
    plain, compiled = (
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (tiny.stage2, tmp_path / "run")
    )
    assert compiled == pytest.approx(plain, rel=1e-4)
