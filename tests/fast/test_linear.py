"""What is fast or lean must be the same: products of few rows and of 16 bits, activations made again, compiling."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import train
from clip import CLIPMLP, CLIPVisionConfig
from fast import linear
from fast.step import as_graph
from formats.weights import load_checkpoint
from llava import GeluMLP, KVCache, Llava, LlavaConfig, RMSNorm, SwiGLU, TextConfig, compile_decoding, generate
from lora import add_lora, find_linears, lora_layers
from nf4 import NF4Linear
from training import memory

HERE = Path(linear.__file__).parents[1]


@pytest.mark.parametrize("rows", [1, 2, 32, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_in_pieces_are_the_whole_product(rows, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 1, 512), torch.randn(1024, 512)
    bias = torch.randn(1024) if bias else None
    with torch.inference_mode():
        found = linear.product(x, weight, bias)
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double()).float()
    assert found.shape == (rows, 1, 1024)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN")
@pytest.mark.parametrize("rows, wide", [(1, 512), (5, 512), (40, 512), (1400, 64)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_by_onednn_a_product_and_its_gradients_are_the_same(monkeypatch, rows, wide, biased, trained):
    monkeypatch.setattr(linear, "ONEDNN", True)
    torch.manual_seed(0)
    x = torch.randn(3, rows, wide, requires_grad=True)
    weight = torch.randn(2 * wide, wide, requires_grad=trained)
    bias = torch.randn(2 * wide, requires_grad=True) if biased else None
    with torch.no_grad():
        alone = linear.product(x, weight, bias)
    found = linear.product(x, weight, bias)
    way = "TrainedProduct" if trained else "FrozenProduct"
    assert torch.equal(found, alone) and way in type(found.grad_fn).__name__
    kept = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)
    for got, exact in zip(torch.autograd.grad(found.sin().sum(), kept), torch.autograd.grad(want.sin().sum(), kept)):
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN")
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("learning", [False, True])
def test_by_onednn_a_compiled_product_is_the_same(monkeypatch, learning):
    monkeypatch.setattr(linear, "ONEDNN", True)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 512, requires_grad=learning), torch.randn(1024, 512), torch.randn(1024)
    want = linear.product(x, weight, bias)
    found = torch.compile(linear.product, fullgraph=True)(x, weight, bias)
    torch.testing.assert_close(found, want)
    if learning:
        torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in (found, want)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_row_of_16_bits(monkeypatch, dtype):
    monkeypatch.setattr(linear, "EMULATED", False)
    monkeypatch.setattr(linear, "ONEDNN", False)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((1, 1, 512), (1024, 512), (1024,)))
    with torch.inference_mode():
        found = linear.product(x, weight, bias)
        again = linear.product(x, weight)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert found.dtype == dtype and found.shape == (1, 1, 1024)
    assert (found - exact).abs().max() < 0.01 * exact.abs().max()
    assert (again - (exact - bias)).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize("length", [linear.SHORT - 1, linear.SHORT])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, "autocast"])
def test_attention_of_short_rows_is_as_exact_and_its_gradients_are(length, kind):
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "autocast" else kind
    q, k, v = (torch.randn(2, heads, length, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        y = linear.attend(q, k, v, is_causal=True, enable_gqa=True)
    assert y.dtype == (torch.bfloat16 if kind == "autocast" else kind)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    precision = {torch.float64: 1e-12, torch.float32: 1e-5}.get(kind, 2e-2)
    pairs = zip((y, *torch.autograd.grad(y.sum(), (q, k, v))), (want, *torch.autograd.grad(want.sum(), wide)))
    for found, exact in pairs:
        assert (found.double() - exact).abs().max() <= precision * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_widened_where_a_cpu_has_none(monkeypatch, dtype):
    monkeypatch.setattr(linear, "EMULATED", True)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((4, 20, 96), (64, 96), (64,)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    found = linear.product(x, weight, bias)
    assert found.dtype == dtype
    assert torch.equal(found, exact.float().to(dtype)) or (found - exact).abs().max() < 0.02 * exact.abs().max()


def test_autocast_is_widened_too_and_its_gradients_are(monkeypatch):
    monkeypatch.setattr(linear, "EMULATED", True)
    torch.manual_seed(0)
    layer, x = linear.Linear(96, 64), torch.randn(4, 20, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.weight.grad, x.detach().sum((0, 1)).expand_as(layer.weight), rtol=1e-2, atol=1e-2)


def mlp(kind: type) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    if kind is CLIPMLP:
        return kind(CLIPVisionConfig(**sizes))
    return kind(TextConfig(**sizes))


def costs(module: torch.nn.Module, x: torch.Tensor) -> tuple[int, list[torch.Tensor], int]:
    """Bytes alive after a forward pass, beside x and the weights; the gradients of x and the weights; FLOPs in all."""
    x = x.clone().requires_grad_()
    with FlopCounterMode(display=False) as flops, memory.MemoryCounter([x, *module.parameters()]) as counted:
        before = counted.now
        with linear.lean():
            y = module(x)
        alive = counted.now - before
        y.square().sum().backward()
    gradients = [x.grad, *(p.grad.clone() for p in module.parameters())]
    module.zero_grad()
    return alive, gradients, flops.get_total_flops()


@pytest.mark.parametrize("kind, wide", [(SwiGLU, 2), (GeluMLP, 1), (CLIPMLP, 1)])
def test_an_mlp_keeps_what_goes_into_its_activation_and_makes_no_product_twice(monkeypatch, kind, wide):
    module, x = mlp(kind), torch.randn(4, 32, 64)
    alive, gradients, flops = costs(module, x)
    assert alive == (wide * 256 + 64) * 4 * 32 * 4  # and y
    monkeypatch.setattr("fast.linear.remade", lambda function, *inputs: function(*inputs))
    more, want, same = costs(module, x)
    assert more >= alive + 256 * 4 * 32 * 4 and flops == same
    assert all(map(torch.equal, gradients, want))


def learned(model: torch.nn.Module, narrow: bool, parts: int = 1) -> tuple[int, list[torch.Tensor]]:
    """Bytes that forward passes of a batch in so many parts keep beside the weights, and all gradients."""
    torch.manual_seed(0)
    ids = torch.randint(0, 290, (4, 24))
    ids[:, 2:6] = 299
    labels = ids.masked_fill(torch.arange(24) < 12, -100)
    features, kept = torch.randn(4, 4, 32), 0
    for part in range(parts):
        rows = slice(4 * part // parts, 4 * (part + 1) // parts)
        with memory.MemoryCounter(model.parameters()) as counted:
            before = counted.now
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                loss = model(ids[rows], labels[rows], vision_features=features[rows])
            kept = max(kept, counted.now - before)
        loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return kept, gradients


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_what_is_made_again_is_not_kept_and_changes_no_gradient(monkeypatch, model_type, narrow):
    monkeypatch.setattr(linear, "EMULATED", False)
    model = small_llava(model_type=model_type).train()
    kept, gradients = learned(model, narrow)
    monkeypatch.setattr("fast.linear.remade", lambda function, *inputs: function(*inputs))
    more, want = learned(model, narrow)
    layer = 4 * 24 * (2 * 64 + 344) * (2 if narrow else 4)  # two norms' outputs and the MLP's product
    layer += 2 * sum(p.numel() for p in model.language_model.model.layers[0].parameters() if p.ndim == 2) * narrow
    assert more - kept > 2.5 * layer  # of three layers; the last has fewer tokens in its MLP
    assert not linear.RECIPES
    assert len(gradients) == len(want) and all(map(torch.equal, gradients, want))


def test_a_forward_pass_without_a_way_back_leaves_nothing_behind():
    model, ids = small_llava(), torch.randint(0, 290, (2, 8))
    with memory.MemoryCounter(model.parameters()) as counted:
        before = counted.now
        model(ids, ids)
        assert counted.now - before < 2_000  # positions, and what the counting itself needs


def test_lora_keeps_nothing_of_an_mlp_but_what_goes_into_its_activation():
    model = small_llava()
    model.requires_grad_(False)
    add_lora(model, {"llm": 4}, None, 0.5, ["down_proj"])
    mlp, x = model.language_model.model.layers[0].mlp.train(), torch.randn(4, 32, 64, requires_grad=True)
    with linear.lean(), memory.MemoryCounter(mlp.parameters()) as counted:
        counted.count(x)
        before = counted.now
        y = mlp(x)
        kept = counted.now - before
    assert kept <= 4 * 4 * 32 * (2 * 344 + 64) + 10_000  # gate, up, y; the generator
    y.sum().backward()
    assert mlp.down_proj.lora_B.weight.grad.abs().max() > 0


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_tied_embedding_has_both_parts_of_its_gradient(monkeypatch, model_type, narrow):
    model = small_llava(model_type=model_type, tie_word_embeddings=True).train()
    monkeypatch.setattr("fast.tied.ROWS", 100)  # of 290
    _, gradients = learned(model, narrow, parts=2)
    monkeypatch.setattr("llava.TiedEmbedding.forward", torch.nn.Embedding.forward)
    monkeypatch.setattr("llava.TiedHead.forward", linear.Linear.forward)
    _, want = learned(model, narrow, parts=2)
    for found, exact in zip(gradients, want):
        assert (found - exact).norm() <= (1e-2 if narrow else 1e-5) * exact.norm()
    assert not model.language_model.lm_head.owed


def test_a_tied_embedding_of_a_batch_without_labels_has_a_gradient_of_zeros():
    model = small_llava(tie_word_embeddings=True).train()
    ids = torch.randint(0, 290, (2, 8))
    model(ids, torch.full_like(ids, -100)).backward()
    assert model.language_model.lm_head.weight.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_keeps_its_input_and_has_its_gradients(dtype):
    torch.manual_seed(0)
    norm, x = RMSNorm(64, 1e-5), torch.randn(4, 32, 64, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    norm.to(dtype)
    want = torch.autograd.functional.vjp(
        lambda x, w: F.rms_norm(x, (64,), w, 1e-5),
        (x.double(), norm.weight.detach().double()),
        torch.ones(4, 32, 64).double(),
    )[1]
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = norm(x)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), norm.weight.data_ptr()}
    y.backward(torch.ones_like(y))
    precision = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]  # it divides in float32
    for found, exact in zip((x.grad, norm.weight.grad), want):
        assert found.dtype == dtype
        assert (found.double() - exact).abs().max() <= precision * exact.abs().max()


def small_llava(**text) -> Llava:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    shape |= {"intermediate_size": 344, "vocab_size": 300, "max_position_embeddings": 64}
    text = TextConfig(**shape | text)  # of 64 x 344 in four bits the last 256 absmax are not whole
    vision = CLIPVisionConfig(32, 64, 2, 2, image_size=28, patch_size=14)
    return Llava(LlavaConfig(text, vision, image_token_index=299, eos_token_ids=[])).eval()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "gpt2", "four bits", "lora"])
def test_compiled_decoding_says_the_same(kind):
    model = small_llava(model_type="gpt2" if kind == "gpt2" else "llama")
    if kind == "bfloat16":
        model.to(torch.bfloat16)
    if kind == "four bits":
        for path in find_linears(model, "llm"):
            model.set_submodule(path, NF4Linear.of(model.get_submodule(path).weight))
    if kind == "lora":
        add_lora(model, {"llm": 4}, None, 0.0)
        for path, layer in lora_layers(model).items():
            torch.nn.init.normal_(layer.lora_B.weight)
            layer.scale *= 3 if "layers.1." in path else 1  # for the compiler a constant: the layer is one of its own
        model.eval()
    prompts = [[5, 299, 299, 299, 299, 7, 8], [299, 299, 299, 299, 9]]
    features = torch.randn(2, 4, 32, dtype=model.dtype)
    want = list(generate(model, prompts, features, max_new_tokens=8))
    alone = list(generate(model, prompts[:1], features[:1], max_new_tokens=8))
    single = list(generate(model, [[5]], max_new_tokens=4))  # read as a token of an answer is, but without a mask
    compile_decoding(model)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert list(generate(model, [[5]], max_new_tokens=4)) == single
    assert list(generate(model, prompts[:1], features[:1], max_new_tokens=8)) == alone
    assert list(generate(model, prompts, features, max_new_tokens=8)) == want
    assert not torch._dynamo.utils.counters["graph_break"]  # a layer is one piece


def replayed(function):
    """What as_graph makes, of aten's operations in place of a GPU's kernels: tensors stay where they are, numbers of
    Python's stay what they were when it was recorded."""
    graph, nothing = make_fx(lambda nothing: function())(torch.zeros(1)), torch.zeros(1)
    return lambda: graph(nothing)


CUDA = pytest.param(as_graph, "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("record, device", [pytest.param(replayed, "cpu"), CUDA])
def test_a_recorded_step_goes_on_as_one_that_is_run(model_type, record, device):
    model, features = small_llava(model_type=model_type).to(device), torch.randn(2, 4, 32, device=device)
    prompts = [[5, 299, 299, 299, 299, 7, 8], [299, 299, 299, 299, 9]]
    want = list(generate(model, prompts, features, max_new_tokens=12))
    alone = list(generate(model, prompts[:1], features[:1], max_new_tokens=12))
    recorded = []
    model.language_model.model.record = lambda function: recorded.append(record(function)) or recorded[-1]
    assert list(generate(model, prompts, features, max_new_tokens=12)) == want
    assert list(generate(model, prompts[:1], features[:1], max_new_tokens=12)) == alone
    assert len(recorded) == 2


def test_a_program_that_compiles_nothing_does_not_import_the_compiler():
    code = "import sys, sample, train, eval; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


@pytest.mark.parametrize("cxx, reason", [("none", "No working C++ compiler found"), ("bare", "No such file")])
def test_compiling_without_a_compiler_is_one_line(tmp_path, cxx, reason):
    bare = tmp_path / "bare"  # a compiler is there, what it is to include is not
    bare.write_text('#!/bin/sh\nexec g++ -nostdinc "$@"\n')
    bare.chmod(0o755)
    if cxx == "bare" and not shutil.which("g++"):
        pytest.skip("no g++ to take the headers from")
    code = "import torch, linear; linear.need_compiler(torch.device('cpu'))"
    found = {"CXX": str(tmp_path / cxx), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=HERE, env=os.environ | found, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: --compile does not work here: ") and reason in last and len(last) < 300


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_second_turn_reads_only_what_is_new(model_type):
    model, features = small_llava(model_type=model_type), torch.randn(1, 4, 32)
    decoder, read = model.language_model.model, []
    decoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))
    cache = KVCache(model.config.text_config, 1, 0, like=decoder.embed_tokens.weight)
    prompt = [5, 299, 299, 299, 299, 7, 8]
    answer = [i for (i,) in generate(model, [prompt], features, max_new_tokens=6, cache=cache)]
    longer = [*prompt, *answer, 11, 12, 13]
    want = list(generate(model, [longer], features, max_new_tokens=6))
    read.clear()
    assert list(generate(model, [longer], features, max_new_tokens=6, cache=cache)) == want
    assert read[0] == 1 + 3  # the last token of the answer was never read, only said

    other = [*longer[:9], 20, 21]  # what was said is not what is remembered: back to where they part
    want = list(generate(model, [other], features, max_new_tokens=6))
    read.clear()
    assert list(generate(model, [other], features, max_new_tokens=6, cache=cache)) == want and read[0] == 2

    moved = [5, 6, *longer[1:]]  # a picture in another place is read again
    want = list(generate(model, [moved], features, max_new_tokens=6))
    read.clear()
    assert list(generate(model, [moved], features, max_new_tokens=6, cache=cache)) == want
    assert read[0] == len(moved)


def test_a_mapped_model_is_the_copied_one_and_never_reaches_its_file(tiny):
    file = next(tiny.stage2.glob("*.safetensors"))
    before = file.read_bytes()
    copied, _ = load_checkpoint(tiny.stage2, "cpu", torch.float32)
    mapped, _ = load_checkpoint(tiny.stage2, "cpu", torch.float32, copy=False)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), mapped.parameters()))
    with torch.no_grad():
        for p in mapped.parameters():
            p.add_(1)
    assert file.read_bytes() == before


@pytest.mark.usefixtures("compiler")
def test_a_compiled_run_has_the_same_losses(tiny, command, tmp_path):
    command(train, *tiny.flags["stage2"], "--compile", "--out", tmp_path / "run")
    torch.compiler.reset()
    plain, compiled = (
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (tiny.stage2, tmp_path / "run")
    )
    assert compiled == pytest.approx(plain, rel=1e-4)
