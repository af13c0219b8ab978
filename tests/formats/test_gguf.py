"""GGUF files: the same weights, logits and answers as transformers reads from them, and malformed ones refused."""

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_writer import CHATML, small_model, small_tokenizer, their_model, their_tokenizer, write_model
from test_llava import logits_of

import eval as evaluation
import sample
import train
from data import render_dialogue
from formats import __main__ as formats_cli
from formats import gguf as ours_gguf
from formats.configs import read_config
from formats.tensors import open_tensors
from formats.weights import load_checkpoint, load_model
from inputs.files import read_json
from inputs.records import Turn
from inputs.tokenizer import Tokenizer
from llava import generate

REAL = Path(os.environ.get("LLAVA_GGUF", "absent.gguf")).resolve()
real = pytest.mark.skipif(not REAL.is_file(), reason="LLAVA_GGUF names no file: SmolLM2-135M-Instruct in GGUF")
gguf = pytest.importorskip("gguf")
IDS = torch.tensor([[5, 1, 70, 33, 200, 8, 8, 91, 64, 250, 3, 17]])


def close_to(ours, theirs):
    """Equal to 1e-4 of the largest logit."""
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# weights


KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
CASES = [("llama", False, kind) for kind in KINDS] + [("llama", True, "Q4_1"), ("qwen2", True, "F16")]


@pytest.mark.parametrize("family, tied, kind", [*CASES, ("qwen2", False, "Q8_0")])
def test_logits_equal_transformers(family, tied, kind, tmp_path):
    model = small_model(family, tied)
    path = write_model(tmp_path / "model.gguf", model, kind, pre="qwen2" if family == "qwen2" else "smollm")
    ours, theirs = load_model(path), their_model(path)
    with torch.no_grad():
        close_to(logits_of(ours, IDS), theirs(IDS).logits)
    if kind == "F32":
        assert torch.equal(logits_of(ours, IDS), logits_of(model, IDS))
    assert ours.config.text_config.tie_word_embeddings == tied


def test_every_format_is_dequantized_as_the_package_does_it(tmp_path):
    """Random blocks in all formats that the package reads, also if rows are read in several pieces."""
    generator, tensors, writer = np.random.default_rng(0), {}, gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        content = generator.integers(0, 120, (7, 512 // block * size), dtype=np.uint8) if block <= 512 else None
        try:
            want = gguf.quants.dequantize(content, kind)
        except NotImplementedError:
            continue
        tensors[kind.name] = want
        writer.add_tensor(kind.name, content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(tensors) > 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours_gguf, "CHUNK", 1024)
        for name, lazy in open_tensors(tmp_path / "all.gguf").items():
            assert lazy.shape == (7, 512)
            np.testing.assert_array_equal(lazy.read().float().numpy(), tensors[name])


def test_scaled_rope(tmp_path):
    """LLaMA-3's factors are recognized, a linear factor is read, others are refused."""
    head = small_model().config.text_config.head_dim
    theta, low, high = 500_000.0, 8192 / 1, 8192 / 4
    waves = 2 * np.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = (8192 / waves - 1) / 3
    factors = np.where(waves < high, 1, np.where(waves > low, 32, 1 / ((1 - smooth) / 32 + smooth))).astype("f4")
    path = write_model(tmp_path / "a.gguf", tensors={"rope_freqs.weight": factors})
    scaling = load_model(path).config.text_config.rope_scaling
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == 32 and len(set(factors)) > 2
    path = write_model(tmp_path / "b.gguf", tensors={"rope_freqs.weight": factors + np.arange(head // 2, dtype="f4")})
    with pytest.raises(ValueError, match="another way than LLaMA-3"):
        load_model(path)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    scaling = load_model(write_model(tmp_path / "c.gguf", **linear)).config.text_config.rope_scaling
    assert scaling == {"rope_type": "linear", "factor": 4.0}
    with pytest.raises(ValueError, match="yarn"):
        load_model(write_model(tmp_path / "d.gguf", **linear | {"llama.rope.scaling.type": "yarn"}))


# ---------------------------------------------------------------------------------------------------------------------
# commands


def test_convert_writes_a_folder_that_transformers_loads(tmp_path, command):
    transformers = pytest.importorskip("transformers")
    path = write_model(tmp_path / "model.gguf", kind="Q8_0")
    command(formats_cli, "convert", path, tmp_path / "out")
    ours = load_model(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        close_to(logits_of(ours, IDS), theirs(IDS).logits)
    assert torch.equal(logits_of(ours, IDS), logits_of(load_model(tmp_path / "out"), IDS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the cat sat", "  in 2024, it isn't\n\n", "café 猫 \x00"):
        ids = Tokenizer.load(path).encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == Tokenizer.load(tmp_path / "out").encode(text) == ids
    assert (tmp_path / "out/chat_template.jinja").read_text() == CHATML


def test_commands_take_a_file_and_a_folder_that_holds_one(tmp_path, command, capsys, tiny):
    (tmp_path / "folder").mkdir()
    path = write_model(tmp_path / "folder/model.gguf", kind="Q5_1")
    command(formats_cli, "inspect", path)
    told = capsys.readouterr().out
    assert "in GGUF" in told and "Q5_1 (16)" in told and "vocabulary" in told
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "Where is the cat?"}\n')
    command(evaluation, "--model", path, "--questions", tmp_path / "q.jsonl", "--max-new-tokens", 2, "--device", "cpu",
            "--out", tmp_path / "answers.jsonl")  # fmt: skip
    hashed = read_json(tmp_path / "manifest.json")["model"][0]["files"]
    assert [line.split()[1] for line in hashed] == [path.name]
    capsys.readouterr()
    for model in (path, path.parent):
        flags = ["--model", model, "--prompt", "the cat", "--max-new-tokens", 3, "--device", "cpu", "--json"]
        command(sample, *flags)
        assert json.loads(capsys.readouterr().out)["prompt_ids"][-3:]
    flags = ["--stage", 1, "--vision", tiny.clip, "--llm", path, "--world", tiny.world, "--steps", 2, "--batch-size", 2]
    command(train, *flags, "--device", "cpu", "--out", tmp_path / "run")
    model, tokenizer = load_checkpoint(tmp_path / "run", "cpu", torch.float32)
    text = "the cat  isn't in 2024"
    assert tokenizer.encode(text) == small_tokenizer().encode(text) and model.config.template == "smollm_2"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        close_to(logits_of(model, IDS), theirs(input_ids=IDS).logits)
    decoder = load_model(path).language_model.model.layers.state_dict()
    trained = model.language_model.model.layers.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in decoder.items())
    write_model(tmp_path / "folder/other.gguf")
    with pytest.raises(SystemExit, match="holds 2 GGUF files"):
        command(formats_cli, "inspect", path.parent)


# ---------------------------------------------------------------------------------------------------------------------
# malformed files


def refusal(path):
    """The one line that loading a model and its tokenizer ends with."""
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path, "cpu", torch.float32)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_cut_files_are_refused(tmp_path):
    content = write_model(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [0, 1, 4, 7, 12, 24, 30, *range(50, len(content), len(content) // 40), len(content) - 40]:
        path.write_bytes(content[:length])
        assert "cut short" in (reason := refusal(path)) or (length < 4 and "not a GGUF file" in reason)
        with pytest.raises(ValueError):
            open_tensors(path)


CHANGES = {  # metadata -> what the line says
    "architecture": ({"general.architecture": "gemma2"}, "architecture is 'gemma2', none of llama, qwen2"),
    "pre": ({"tokenizer.ggml.pre": "poro-chat"}, "'poro-chat', none of gpt-2, smollm, qwen2, llama-bpe"),
    "no pre": ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is None, none of"),
    "tokenizer": ({"tokenizer.ggml.model": "t5"}, "'t5'; gpt2 and llama are supported"),
    "no tokenizer": ({"tokenizer.ggml.model": None}, "there is none"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens"),
    "no merges": ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
    "merges": ({"tokenizer.ggml.merges": ["x"]}, "not a supported tokenizer"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, "another number of scores or types"),
    "end": ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id"),
    "layers": ({"llama.block_count": 10**9}, "num_hidden_layers is 1000000000"),
    "more layers": ({"llama.block_count": 900}, "missing"),
    "width": ({"llama.embedding_length": 2**30}, "hidden_size is"),
    "heads": ({"llama.attention.head_count": 0}, "model.gguf"),
    "key heads": ({"llama.attention.head_count_kv": 3}, "model.gguf"),
    "heads by layer": ({"llama.attention.head_count": [4, 4]}, "model.gguf"),
    "text": ({"llama.embedding_length": "wide"}, "model.gguf"),
    "no width": ({"llama.embedding_length": None}, "no llama.embedding_length"),
    "another width": ({"llama.embedding_length": 128}, "model.gguf"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count is 8, and only 0"),
    "rotated part": ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
    "alignment": ({"general.alignment": 33}, "general.alignment is 33"),
    "parts": ({"split.count": 3}, "one of 3 parts"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_unsupported_metadata_is_refused(change, tmp_path):
    changes, reason = CHANGES[change]
    assert reason in refusal(write_model(tmp_path / "model.gguf", **changes))


def test_a_file_without_a_tokenizer_can_be_inspected(tmp_path, command, capsys):
    path = write_model(tmp_path / "model.gguf", **{"tokenizer.ggml.model": None, "tokenizer.chat_template": None})
    command(formats_cli, "inspect", path)
    assert "vocabulary" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is none"):
        command(sample, "--model", path, "--prompt", "Hello", "--device", "cpu")
    with pytest.raises(SystemExit, match="there is none"):
        command(formats_cli, "convert", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_malformed_tensors_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    assert "down_proj.weight missing" in refusal(write_model(path, drop=("blk.1.ffn_down.weight",)))
    assert "token_embd.weight" in refusal(write_model(path, drop=("token_embd.weight",)))
    small = np.zeros((32, 64), np.float32)
    assert "o_proj.weight is (32, 64), should be (64, 64)" in refusal(
        write_model(path, tensors={"blk.0.attn_output.weight": small})
    )
    assert "extra.weight not expected" in refusal(write_model(path, tensors={"extra.weight": small}))
    infinite = small_model()
    infinite.language_model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("inf")
    assert "not finite" in refusal(write_model(path, infinite))


def patched(path, old, new):
    """The file with the only occurrence of some bytes replaced."""
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


def test_malformed_headers_are_refused(tmp_path):
    whole = write_model(tmp_path / "whole.gguf").read_bytes()
    path, pairs = tmp_path / "model.gguf", struct.unpack("<Q", whole[16:24])[0]
    kind = b"blk.0.ffn_up.weight" + struct.pack("<IQQ", 2, 64, 96)

    def damaged(old, new):
        path.write_bytes(whole)
        return refusal(patched(path, old, new))

    assert "not a GGUF" in damaged(whole[:24], b"PK\3\4" + whole[4:24])
    assert "version 1," in damaged(whole[:24], whole[:4] + struct.pack("<I", 1) + whole[8:24])
    assert "big-endian" in damaged(whole[:24], whole[:4] + struct.pack(">I", 3) + whole[8:24])
    assert "cut short" in damaged(whole[:24], whole[:16] + struct.pack("<Q", 1 << 60))
    assert "its tensor ''" in damaged(whole[:24], whole[:8] + struct.pack("<QQ", 1 << 60, pairs))  # reads padding
    assert "number 99" in damaged(kind + struct.pack("<I", 0), kind + struct.pack("<I", 99))
    assert "Q8_K" in damaged(kind + struct.pack("<I", 0), kind + struct.pack("<I", 15))
    assert "shape" in damaged(kind, b"blk.0.ffn_up.weight" + struct.pack("<IQQ", 2, 0, 1 << 63))
    assert "cut short" in damaged(kind, b"blk.0.ffn_up.weight" + struct.pack("<IQQ", 2, 1 << 40, 1 << 40))
    assert "twice" in damaged(b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight")
    tokens = b"tokenizer.ggml.tokens" + struct.pack("<II", 9, 8)
    assert "cut short" in damaged(tokens + whole.split(tokens)[1][:8], tokens + struct.pack("<Q", 1 << 61))
    assert "unknown type 77" in damaged(tokens, tokens[:-8] + struct.pack("<II", 77, 8))


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    path, rng = tmp_path / "model.gguf", random.Random(0)
    content = write_model(path, small_model(num_hidden_layers=1)).read_bytes()
    header, refused = content.index(b"output_norm.weight"), 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.choice((rng.randrange(header), rng.randrange(700)))] = rng.choice((0, 1, 127, 255, 3, 9))
        path.write_bytes(damaged)
        try:
            load_checkpoint(path, "cpu", torch.float32)
        except ValueError:
            refused += 1
    assert refused > 30


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    plain, quantized = write_model(tmp_path / "a.gguf", kind="F16"), write_model(tmp_path / "b.gguf", kind="Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    ours_gguf.find_format.cache_clear()
    assert load_model(plain)
    assert "pip install gguf" in refusal(quantized)


# ---------------------------------------------------------------------------------------------------------------------
# a real file


@real
def test_real_logits_and_answers():
    model, theirs, tokenizer = load_model(REAL), their_model(REAL), Tokenizer.load(REAL)
    prompts = [f"{start} {topic}" for start in ("The history of", "Once upon a time,", "In short,", "I think that")
               for topic in ("the sea", "a small dog", "the number 7", "music", "France")]  # fmt: skip
    model.config.eos_token_ids, worst = [], 0.0
    for text in prompts:
        ids = tokenizer.encode(text)
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        with torch.no_grad():
            want = theirs(**inputs).logits
            worst = max(worst, float((logits_of(model, inputs["input_ids"]) - want).abs().max() / want.abs().max()))
            options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
            told = theirs.generate(**inputs, **options, eos_token_id=None)[0, len(ids) :].tolist()
        assert [token for (token,) in generate(model, [ids], max_new_tokens=64)] == told, text
    print(f"largest difference of logits: {worst:.1e} of the largest")
    assert worst < 1e-4 and len(prompts) == 20


@pytest.mark.parametrize("file", ["small", pytest.param(REAL, marks=real, id="real")])
def test_dialogues_as_the_chat_template_in_the_file_renders_them(file, tmp_path):
    """SmolLM2-Instruct's chat template is one of ours, with its own system prompt if there is none."""
    path = write_model(tmp_path / "model.gguf", pre="gpt-2") if file == "small" else file
    config, tokenizer, theirs = read_config(path), Tokenizer.load(path), their_tokenizer(path)
    assert config.template == "smollm_2"
    turns = [("What is 12 x 3?", "36."), ("And  why?\n", "Because. "), ("Thanks", None)]
    for system in ("", "Answer in French."):
        for count in (1, 3):
            asked = [Turn(question, answer) for question, answer in turns[:count]]
            asked[0].system, asked[-1].answer = system, None
            messages = [{"role": "system", "content": system}] if system else []
            for turn in asked:
                messages.append({"role": "user", "content": turn.question})
                messages += [{"role": "assistant", "content": turn.answer}] if turn.answer else []
            want = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            ids, _ = render_dialogue(asked, tokenizer, "smollm_2", 0)
            assert ids == want


@real
def test_real_conversion(tmp_path, command):
    """The converted folder gives transformers our logits, ids and dialogues."""
    transformers = pytest.importorskip("transformers")
    command(formats_cli, "convert", REAL, tmp_path / "out")
    model, tokenizer = load_checkpoint(REAL, "cpu", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        close_to(logits_of(model, IDS), theirs(IDS).logits)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.pad_token_id, theirs.eos_token_id) == (tokenizer.pad_id, tokenizer.eos_id) == (2, 2)
    for text in ("  in 2024, it isn't\n\n 12", "café 猫 \0 <|im_end|>", "\t a\r\n  7"):
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == tokenizer.encode(text), repr(text)
    messages = [{"role": "user", "content": "Hi"}]
    want = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert want == render_dialogue([Turn("Hi", None)], tokenizer, "smollm_2", 0)[0]


MEASURE = r"""
import re, sys, time
from pathlib import Path
import torch, gguf
from formats.weights import load_checkpoint

def resident(key):
    return 1024 * int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])

before, start = resident("VmRSS"), time.perf_counter()
model, _ = load_checkpoint(Path(sys.argv[1]), "cpu", torch.float32)
seconds = time.perf_counter() - start
print((resident("VmHWM") - before) / sum(4 * p.numel() for p in model.parameters()), seconds)
"""


@real
def test_real_memory_and_time():
    out = subprocess.run([sys.executable, "-c", MEASURE, str(REAL)], capture_output=True, text=True, check=True)
    share, seconds = map(float, out.stdout.split())
    print(f"peak {share:.2f} of the weights in float32, {seconds:.1f} s")
    assert share < 1.5 and seconds < 5


@real
def test_real_answer(command, capsys):
    command(sample, "--model", REAL, "--prompt", "What is the capital of France?", "--device", "cpu")
    assert "Paris" in capsys.readouterr().out
