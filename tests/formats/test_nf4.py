"""NF4: known codes, equality with bitsandbytes to the bit, the gradient, and files in both directions."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_llava import close, logits_of, prompt, random_images, randomized

import lora
import lora as nf4
import sample
from clip import CLIPVisionConfig
from formats import __main__ as formats_cli
from formats import nf4_files
from formats.saving import save_model
from formats.tensors import open_tensors
from formats.weights import load_model
from inputs.tokenizer import Tokenizer
from llava import Llava, LlavaConfig, TextConfig
from lora import NF4Linear
from training.machine import MemoryCounter

REPOSITORY = Path(lora.__file__).parent
SHAPES = [(64, 64), (48, 40), (1, 1), (3, 33), (7, 9), (5, 64), (1, 63), (2, 8192), (300, 100)]
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weight_of(shape, dtype, seed=0):
    """Normally distributed weights, among them a block of zeros and a block of equal numbers."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    flat = weight.view(-1)
    flat[64:128], flat[128:192] = 0, 0.03125
    return weight.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# known codes


def test_codes_of_one_minus_one_and_zeros():
    packed, absmax = nf4.quantize(torch.tensor([1.0, -1.0] + [0.0] * 62))
    assert packed[0].item() == 0xF0 and set(packed[1:].flatten().tolist()) == {0x77} and absmax.tolist() == [1.0]
    packed, absmax = nf4.quantize(torch.zeros(64))
    assert set(packed.flatten().tolist()) == {0x77} and absmax.tolist() == [0.0]
    assert torch.equal(nf4.dequantize(packed, absmax, (64,)), torch.zeros(64))


def test_number_between_two_values_is_rounded_down():
    borders = nf4.boundaries(torch.tensor(nf4.NF4_VALUES))
    packed, _ = nf4.quantize(torch.cat([borders, torch.tensor([1.0])]))
    codes = [half for byte in packed.flatten().tolist() for half in (byte >> 4, byte & 15)]
    assert codes[:15] == list(range(15)) and codes[15] == 15


@pytest.mark.parametrize("count, size, blocks", [(99, 50, 2), (64, 32, 1), (1, 1, 1), (4096, 2048, 64)])
def test_sizes_of_codes_and_absmax(count, size, blocks):
    packed, absmax = nf4.quantize(torch.randn(count))
    assert packed.shape == (size, 1) and packed.dtype == torch.uint8 and absmax.shape == (blocks,)


def test_bits_per_weight():
    layer = NF4Linear.from_weight(torch.randn(256, 1024))
    bits = 8 * sum(p.nbytes for name, p in layer.named_parameters() if name != "nested_offset") / (256 * 1024)
    assert bits == pytest.approx(4.126953, abs=1e-6)


def test_chunk_size_does_not_change_the_codes(monkeypatch):
    weight = weight_of((301, 101), torch.float32)
    whole = nf4.quantize(weight)
    monkeypatch.setattr(nf4, "CHUNK", 128)
    assert all(torch.equal(a, b) for a, b in zip(whole, nf4.quantize(weight)))


def test_double_quantization_rounds_to_the_nearest_value():
    absmax = torch.rand(1000) * 0.1
    codes, nested, offset = nf4.quantize_absmax(absmax)
    book = nf4.nested_code_book(torch.device("cpu"))
    assert len(book.unique()) == 256 and (book == 0).sum() == 1
    scaled = (absmax - offset) / nested.repeat_interleave(256)[:1000]
    apart = (scaled[:, None] - book).abs()
    assert torch.equal(apart.gather(1, codes.long()[:, None])[:, 0], apart.min(1).values)


# ---------------------------------------------------------------------------------------------------------------------
# bitsandbytes


@pytest.fixture(scope="module")
def bnb():
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional

    return bitsandbytes.functional


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_numbers_equal_bitsandbytes(bnb, shape, dtype):
    weight = weight_of(shape, dtype)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4")
    packed, absmax = nf4.quantize(weight)
    assert torch.equal(packed, theirs) and torch.equal(absmax, state.absmax)
    ours = nf4.dequantize(packed, absmax, shape).to(dtype)
    assert torch.equal(ours, bnb.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_midpoints_and_zeros_equal_bitsandbytes(bnb, dtype):
    borders = nf4.boundaries(torch.tensor(nf4.NF4_VALUES))
    nearby = torch.stack([borders, borders.nextafter(torch.tensor(2.0)), borders.nextafter(torch.tensor(-2.0))])
    weight = torch.cat([F.pad(row, (0, 49), value=1.0) * size for row in nearby for size in (1.0, 0.3, 1e-3)])
    weight = torch.cat([weight, torch.zeros(128)]).to(dtype)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4")
    packed, absmax = nf4.quantize(weight)
    assert torch.equal(packed, theirs) and torch.equal(absmax, state.absmax)


def through_their_table(scaled):
    """Round to the 256 values as bitsandbytes does on a CPU: through a table of 65,536 entries."""
    book = nf4.nested_code_book(torch.device("cpu"))
    entries = torch.arange(65536, dtype=torch.float32) / 65535 * 2 - 1
    table = torch.bucketize(entries, nf4.boundaries(book))
    return table[((scaled + 1) * 0.5 * 65535 + 0.5).floor().long().clamp(0, 65535)]


def test_double_quantization_equals_bitsandbytes_except_for_its_table(bnb):
    weight = weight_of((1024, 640), torch.float32)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    absmax = nf4.quantize(weight)[1]
    codes, nested, offset = nf4.quantize_absmax(absmax)
    assert torch.equal(nested, state.state2.absmax) and torch.equal(offset, state.offset)
    assert torch.equal(nf4.nested_code_book(torch.device("cpu")), state.state2.code)
    apart = codes != state.absmax
    print(f"{int(apart.sum())} of {len(codes)} codes differ")
    assert apart.float().mean() < 0.005
    scaled = (absmax - offset) * (1 / nested).repeat_interleave(256)[: len(absmax)]
    assert torch.equal(through_their_table(scaled).to(torch.uint8), state.absmax)  # the table explains every difference
    given = nf4.dequantize_absmax(state.absmax, state.state2.absmax, state.offset)
    numbers = nf4.dequantize(theirs, given, weight.shape)
    assert torch.equal(numbers, bnb.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
def test_files_are_exchanged_with_bitsandbytes(bnb, dtype, double, tmp_path):
    """Their file, read and written again, has the same bytes; they read the same numbers from our file."""
    weight = weight_of((80, 64), dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    theirs = {"a.weight": packed} | {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    kind = f"a.weight{nf4_files.STATE}nf4"
    ours = {name.removeprefix("a.weight"): tensor for name, tensor in theirs.items() if name != kind}
    layer = nf4_files.from_files("a.weight", nf4_files.read_state("a.weight", "nf4", theirs[kind]), ours)
    assert torch.equal(layer.dequantize(), bnb.dequantize_4bit(packed, state))
    written = nf4_files.to_files("a.weight", layer)
    assert written.keys() == theirs.keys() and all(torch.equal(written[name], theirs[name]) for name in theirs)
    layer = NF4Linear.from_weight(weight, double)
    written = {key.removeprefix("a.weight."): tensor for key, tensor in nf4_files.to_files("a.weight", layer).items()}
    packed = written.pop("a.weight")
    read = bnb.QuantState.from_dict(written, device="cpu")
    assert torch.equal(bnb.dequantize_4bit(packed, read), layer.dequantize())


@pytest.mark.parametrize("storage", [*DTYPES, torch.float64, torch.int8], ids=str)
def test_every_storage_dtype_of_bitsandbytes_is_read(bnb, storage, tmp_path):
    """bnb_4bit_quant_storage gives the same bytes another dtype, in which some of them are NaNs."""
    weight = weight_of((80, 64), torch.bfloat16)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, quant_storage=storage)
    assert packed.dtype == storage
    tensors = {"a.weight": packed} | {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    layer = open_tensors(tmp_path)["a.weight"].read()
    assert torch.equal(layer.weight, bnb.quantize_4bit(weight, quant_type="nf4")[0])
    assert torch.equal(layer.dequantize(), bnb.dequantize_4bit(packed, state))


def test_layer_equals_linear4bit(bnb):
    from bitsandbytes.nn import Linear4bit

    weight, x = weight_of((96, 64), torch.float32), torch.randn(3, 5, 64, requires_grad=True)
    theirs = Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4")
    theirs.weight = type(theirs.weight)(weight, False, compress_statistics=False, quant_type="nf4")
    theirs = theirs.to("cpu")
    expected = theirs(x)
    (their_gradient,) = torch.autograd.grad(expected.sum(), x)
    layer = NF4Linear.from_weight(weight, double=False)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, expected) and torch.allclose(gradient, their_gradient, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# the layer


@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_backward_equal_those_of_the_dequantized_weight(bias):
    layer = NF4Linear.from_weight(torch.randn(48, 32))
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(48), requires_grad=False)
    x = torch.randn(2, 7, 32, requires_grad=True)
    expected = F.linear(x, layer.dequantize(), layer.bias)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    up = torch.randn_like(y)
    (gradient,), (wanted,) = torch.autograd.grad(y, x, up), torch.autograd.grad(expected, x, up)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-6)


def test_dequantized_weight_is_not_stored_for_backward():
    layer = NF4Linear.from_weight(torch.randn(256, 256))
    weight = layer.dequantize()  # also fills the cached code books
    with MemoryCounter(layer.parameters()) as counted:
        x = torch.randn(4, 256, requires_grad=True)
        before = counted.now
        y = layer(x)
        assert counted.now - before <= y.nbytes + 1000 < counted.peak - before
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, -1))


def test_layer_computes_in_bfloat16_under_autocast():
    layer, x = NF4Linear.from_weight(torch.randn(32, 32)), torch.randn(3, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = F.linear(x, layer.dequantize())
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_quantized_weights_are_counted_as_whole_ones():
    layer = torch.nn.Linear(48, 64)
    small = NF4Linear.from_weight(layer.weight)
    small.bias = layer.bias
    assert nf4.count_weights(small) == nf4.count_weights(layer) == 48 * 64 + 64


def test_a_tied_head_is_counted_once():
    from llava import CausalLM, TextConfig

    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = CausalLM(TextConfig(**shape, num_attention_heads=2, tie_word_embeddings=True))
    assert nf4.count_weights(model) == sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# whole models


@pytest.fixture(scope="module")
def small(babbler, tmp_path_factory):
    """The folders of a model and of the same model in four bits."""
    folder = tmp_path_factory.mktemp("four") / "model"
    formats_cli.quantize_folder(babbler, folder)
    return babbler, folder


def test_only_matrices_of_decoder_layers_are_quantized(small):
    whole, four = load_model(small[0]), load_model(small[1])
    quantized = {path for path, module in four.named_modules() if isinstance(module, NF4Linear)}
    layers = {path for path, module in whole.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantized == {path for path in layers if path.startswith("language_model.model.layers.")} != set()
    before = dict(whole.named_parameters())
    for name, p in four.named_parameters():
        if name.rpartition(".")[0] not in quantized:
            assert torch.equal(p, before[name]), name
    assert nf4.count_weights(four) == nf4.count_weights(whole)


def test_quantizing_while_loading_equals_quantizing_before(small):
    one, other = load_model(small[0], bits=4), load_model(small[1])
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


def test_transformers_loads_a_quantized_folder(bnb, small):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(small[1], dtype=torch.float32).eval()
    assert any("Linear4bit" in str(type(module)) for module in theirs.modules())
    ours = load_model(small[1])
    ids = torch.randint(0, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    whole = torch.randn(64, 160)  # the shape of a matrix of this model
    if (bnb.dequantize_4bit(*bnb.quantize_4bit(whole, quant_type="nf4")) - whole).abs().max() > 1:
        pytest.skip("bitsandbytes 0.50.2 mixes up the blocks of rows of 160 on a CPU with AVX-512")
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        hidden = ours.language_model.model(ours.embed(ids))
    torch.testing.assert_close(ours.language_model.lm_head(hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=["square", "anyres"])
def regular(request, tmp_path_factory):
    """A LLaVA in four bits, in float32, of widths that every kernel of bitsandbytes takes, and its folder."""
    anyres = {"image_mode": "anyres", "image_grid_pinpoints": [[8, 16], [16, 8]]} if request.param == "anyres" else {}
    whole, folder = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("regular")
    text = TextConfig(99, 64, 128, 2, 4, 2)
    vision = CLIPVisionConfig(64, 128, 3, 4, image_size=8, patch_size=4)
    save_model(randomized(Llava(LlavaConfig(text, vision, image_token_index=97, **anyres))), whole)
    model = load_model(whole, bits=4)
    save_model(model, folder)
    return model, folder


def test_tower_and_projector_are_named_as_not_quantized(regular):
    """transformers 5 compares the beginnings of names that start with "model.", and 4 of names without it."""
    skipped = json.loads((regular[1] / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    for name in ("vision_tower.vision_model.encoder.layers.0.mlp.fc1", "multi_modal_projector.linear_1", "lm_head"):
        for prefix in ("",) if name == "lm_head" else ("", "model."):
            assert any(f"{prefix}{name}.".startswith(f"{module}.") for module in skipped), prefix + name


def test_transformers_runs_a_quantized_folder_on_an_image(bnb, regular):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from bitsandbytes.nn import Linear4bit

    ours, folder = regular
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    quantized = [(name, module) for name, module in theirs.named_modules() if isinstance(module, Linear4bit)]
    assert len(quantized) == 14 and all(name.startswith("model.language_model.layers.") for name, _ in quantized)
    for _, module in quantized:
        module.support_avx512bf16_for_cpu = False  # a kernel that rounds to bfloat16
    if ours.config.image_grid_pinpoints:
        return  # the tiles are compared in the tests of variants/
    ids, images = torch.tensor([prompt(15, 1)]), random_images(1)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=images).logits
    close(logits_of(ours, ids, images), expected)


def test_quantized_model_answers(small, command, tiny, capsys):
    image = next((tiny.world / "heldout-0").rglob("*.png"))
    command(sample, "--model", small[1], "--image", image, "--max-new-tokens", 8)
    quantized = capsys.readouterr().out
    command(sample, "--model", small[0], "--image", image, "--max-new-tokens", 8, "--bits", 4)
    assert capsys.readouterr().out == quantized != ""


PEAK = """
import re, sys
from pathlib import Path
import torch
from formats import weights

def most():  # peak of this process; getrusage may return the parent's
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

weights.NF4Linear.from_weight(torch.ones(64, 64))  # fills the cached code books
begin = most()
model = weights.load_model(sys.argv[1], bits=4)
print(most() - begin, sum(p.nbytes for p in model.parameters()))
"""


def test_whole_model_is_never_in_memory(tmp_path, monkeypatch):
    """The peak is at most 1.2 times the quantized model plus one shard."""
    shard = 24_000_000
    monkeypatch.setattr("formats.saving.SHARD_BYTES", shard)
    text = TextConfig(300, 512, 1408, 20, 8)
    model = Llava(LlavaConfig(text, image_token_index=299))
    save_model(model, tmp_path)
    command = [sys.executable, "-c", PEAK, tmp_path]
    # The allocator returns freed memory at once, so that only live memory counts.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True, env=environment)
    peak, kept = map(int, done.stdout.split())
    whole = sum(p.nbytes for p in model.parameters())
    print(f"peak {peak / 1e6:.0f} MB for {kept / 1e6:.0f} MB in four bits, {whole / 1e6:.0f} MB before")
    assert kept < whole / 7 and kept < peak < 1.2 * kept + shard


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def refused(folder, change):
    """Change the tensors of a quantized folder; returns the error message of loading it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


NAME = "language_model.model.layers.0.self_attn.q_proj.weight"
STATE = f"{NAME}{nf4_files.STATE}nf4"


def as_bytes(values):
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("storage", [*DTYPES, torch.int8], ids=str)
def test_codes_stored_in_another_dtype_are_read(small, tmp_path, storage):
    tensors = load_file(small[1] / "model.safetensors")
    for name in [name.split(nf4_files.STATE)[0] for name in tensors if nf4_files.STATE in name]:
        tensors[name] = tensors[name].flatten().view(storage)[:, None]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((small[1] / "config.json").read_bytes())
    read, expected = load_model(tmp_path).state_dict(), load_model(small[1]).state_dict()
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in expected)


BROKEN = {
    "no state": (lambda t: t.pop(STATE), NAME),
    "no absmax": (lambda t: t.pop(f"{NAME}.absmax"), "absmax missing"),
    "no nested": (lambda t: t.pop(f"{NAME}.nested_absmax"), "nested_absmax missing"),
    "state cut": (lambda t: t.update({STATE: t[STATE][:-3].clone()}), "cannot be read"),
    "state empty": (lambda t: t.update({STATE: as_bytes({})}), "cannot be read"),
    "absmax cut": (lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"][:-1].clone()}), "should be"),
    "codes cut": (lambda t: t.update({NAME: t[NAME][:-1].clone()}), "should be"),
    "another book": (lambda t: t[f"{NAME}.quant_map"].mul_(2), "differs from the values"),
    "not finite": (lambda t: t[f"{NAME}.nested_absmax"].fill_(math.nan), "not finite"),
    "offset is none": (
        lambda t: t.update({STATE: as_bytes(json.loads(bytes(t[STATE].tolist())) | {"nested_offset": None})}),
        "cannot be read",
    ),
    "nested whole": (lambda t: t.update({f"{NAME}.nested_absmax": t[f"{NAME}.nested_absmax"].long()}), "should be"),
    "deep": (lambda t: t.update({STATE: torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)}), "cannot be read"),
    "huge": (
        lambda t: t.update({STATE: as_bytes({"shape": [1e30, 1e30], "dtype": "float32", "blocksize": 64})}),
        "cannot",
    ),
    "fp4": (lambda t: t.update({f"{NAME}{nf4_files.STATE}fp4": t.pop(STATE)}), "fp4"),
    "weights gone": (lambda t: t.pop(NAME), NAME),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_damaged_quantized_checkpoint_is_refused(small, tmp_path, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in small[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change, words = BROKEN[kind]
    assert words in refused(folder, change)


def test_quantized_model_is_not_quantized_again(small, tmp_path, command):
    with pytest.raises(SystemExit, match="four bits already"):
        command(formats_cli, "quantize", small[1], tmp_path / "again")
    with pytest.raises(SystemExit, match="exists"):
        command(formats_cli, "quantize", small[0], small[1])
    assert not (tmp_path / "again").exists()


def test_quantize_prints_the_bits_per_weight(babbler, tmp_path, command, capsys):
    command(formats_cli, "quantize", babbler, tmp_path / "four")
    assert "bits each" in capsys.readouterr().out
    assert Tokenizer.load(tmp_path / "four").vocab_size == Tokenizer.load(babbler).vocab_size
