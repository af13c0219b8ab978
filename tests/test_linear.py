"""What is fast must be the same: products of few rows and of 16 bits, and decoding that is compiled."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

import linear
import train
from clip import CLIPVisionConfig
from llava import KVCache, Llava, LlavaConfig, TextConfig, compile_decoding, generate
from weights import load_both


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


def small_llava(**text) -> Llava:
    torch.manual_seed(0)
    text = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2} | text
    text = TextConfig(vocab_size=300, hidden_size=64, intermediate_size=96, max_position_embeddings=64, **text)
    vision = CLIPVisionConfig(32, 64, 2, 2, image_size=28, patch_size=14)
    return Llava(LlavaConfig(text, vision, image_token_index=299, eos_token_ids=[])).eval()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_decoding_says_the_same(dtype):
    model = small_llava().to(dtype)
    prompts = [[5, 299, 299, 299, 299, 7, 8], [299, 299, 299, 299, 9]]
    features = torch.randn(2, 4, 32, dtype=dtype)
    want = list(generate(model, prompts, features, max_new_tokens=8))
    alone = list(generate(model, prompts[:1], features[:1], max_new_tokens=8))
    compile_decoding(model)
    torch.compiler.reset()
    assert list(generate(model, prompts[:1], features[:1], max_new_tokens=8)) == alone
    assert list(generate(model, prompts, features, max_new_tokens=8)) == want


def test_compiling_without_a_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        compile_decoding(small_llava())


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
    copied, _ = load_both(tiny.stage2, "cpu", torch.float32)
    mapped, _ = load_both(tiny.stage2, "cpu", torch.float32, copy=False)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), mapped.parameters()))
    with torch.no_grad():
        for p in mapped.parameters():
            p.add_(1)
    assert file.read_bytes() == before


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_run_has_the_same_losses(tiny, command, tmp_path):
    command(train, *tiny.flags["stage2"], "--compile", "--out", tmp_path / "run")
    torch.compiler.reset()
    plain, compiled = (
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (tiny.stage2, tmp_path / "run")
    )
    assert compiled == pytest.approx(plain, rel=1e-4)
