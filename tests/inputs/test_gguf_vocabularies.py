"""The tokenizers of GGUF files give the ids of the libraries that the vocabularies were made with."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from gguf_writer import small_tokenizer, their_tokenizer, tokenizer_values, write_gguf
from test_pretrained_tokenizers import FOLDER, hostile

from inputs.added_tokens import AddedToken
from inputs.bpe import SentencePiece
from inputs.tokenizer import Tokenizer
from inputs.vocabularies import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

REAL = Path(os.environ.get("LLAVA_GGUF", "absent.gguf")).resolve()
STRINGS = list(hostile(2000))
published = pytest.mark.skipif(not FOLDER.exists(), reason=f"{FOLDER} is not here")


def write_tokenizer(path, values, **changes):
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return write_gguf(path, {"general.architecture": "llama"} | values | changes, {})


def same_ids(ours, theirs, texts=STRINGS):
    for text in texts:
        assert ours.encode(text) == theirs(text), repr(text)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level(pre, tmp_path):
    """The tokenizer that was written comes back, and saved it gives transformers the same ids."""
    ours = small_tokenizer(pre)
    path = write_tokenizer(tmp_path / "a.gguf", tokenizer_values(ours, pre, tmp_path), add_bos_token=True)
    read = Tokenizer.load(path)
    assert (read.specials, read.roles) == (ours.specials, ours.roles)
    same_ids(read, ours.encode)
    (tmp_path / "saved").mkdir()
    read.save(tmp_path / "saved")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("the cat").input_ids == [read.bos_id, *read.encode("the cat")]
    options = {"add_special_tokens": False, "split_special_tokens": True}
    same_ids(read, lambda text: theirs.encode(text, **options))
    if pre != "smollm":  # as gpt-2 in transformers, which cuts before " 1", not before "1"
        theirs = their_tokenizer(path)
        if pre == "qwen2":  # transformers does not compose letters and accents of a GGUF file of the family llama
            same_ids(read, lambda text: theirs.encode(unicodedata.normalize("NFC", text), **options))
        else:
            same_ids(read, lambda text: theirs.encode(text, **options))


def test_types_of_tokens(tmp_path):
    values = tokenizer_values(small_tokenizer(), "smollm", tmp_path)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    more = {"tokens": [*tokens, "<loc_1>", "<|tool|>", "[PAD9]"], "token_type": [*types, USER_DEFINED, CONTROL, 5]}
    read = Tokenizer.load(write_tokenizer(tmp_path / "a.gguf", values, **more, add_bos_token=False))
    n = len(tokens)
    assert read.words == {"<loc_1>": AddedToken(n, special=False)} and read.specials["<|tool|>"] == n + 1
    assert read.encode("cat<loc_1>") == [*read.encode("cat"), n] and n + 1 not in read.encode("<|tool|>")
    assert read.vocab_size == n + 2 and read.decode([n, n + 1]) == "<loc_1>" and read.bos_id is None
    # A token that a role names is special, whatever its type.
    types = [NORMAL if token == "</s>" else kind for token, kind in zip(tokens, types)]
    read = Tokenizer.load(write_tokenizer(tmp_path / "a.gguf", values, token_type=types, add_bos_token=False))
    assert read.roles["eos"] == "</s>" and read.eos_id not in read.encode("</s>")


@published
@pytest.mark.parametrize("name, pre", [("gpt2", "gpt-2"), ("llama3", "llama-bpe")])
def test_published_byte_level(name, pre, tmp_path):
    ours = Tokenizer.load(FOLDER / name)
    values = tokenizer_values(ours, pre, tmp_path)
    read = Tokenizer.load(write_tokenizer(tmp_path / "a.gguf", values, add_bos_token=None))
    assert read.specials == ours.specials and read.roles["eos"] == ours.roles["eos"]
    assert read.bos_id == (ours.bos_id if pre == "llama-bpe" else None)  # as in llama.cpp without add_bos_token
    same_ids(read, ours.encode)
    if name == "gpt2":  # LLaMA-3's takes transformers ten seconds
        theirs = their_tokenizer(tmp_path / "a.gguf")
        same_ids(read, lambda text: theirs.encode(text, add_special_tokens=False, split_special_tokens=True))


def sentencepiece_values():
    """The metadata of LLaMA-2's tokenizer.model, read by sentencepiece, and sentencepiece's own encoder."""
    model = pytest.importorskip("sentencepiece").SentencePieceProcessor(str(FOLDER / "llama2/tokenizer.model"))
    ids = range(model.vocab_size())
    kinds = [UNKNOWN if model.is_unknown(i) else CONTROL if model.is_control(i) else NORMAL for i in ids]
    kinds = [BYTE if model.is_byte(i) else kind for i, kind in zip(ids, kinds)]
    values = {"model": "llama", "tokens": [model.id_to_piece(i) for i in ids], "token_type": kinds}
    values |= {"scores": [model.get_score(i) for i in ids], "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}, model.encode


@published
def test_sentencepiece(tmp_path):
    values, encode = sentencepiece_values()
    read = Tokenizer.load(write_tokenizer(tmp_path / "a.gguf", values))
    same_ids(read, encode)
    theirs = their_tokenizer(tmp_path / "a.gguf")  # puts no prefix in front of a space
    texts = [text for text in STRINGS if not text.startswith((" ", "▁"))]
    same_ids(read, lambda text: theirs.encode(text, add_special_tokens=False, split_special_tokens=True), texts)
    assert read.bos_id == 1 and read.roles["eos"] == "</s>" and read.fingerprint()
    folder = Tokenizer.load(FOLDER / "llama2")
    assert (read.specials, read.roles, repr(read.codec)) == (folder.specials, folder.roles, repr(folder.codec))


@published
def test_sentencepiece_without_a_prefix(tmp_path):
    values, encode = sentencepiece_values()
    path = write_tokenizer(tmp_path / "a.gguf", values, add_space_prefix=False, add_bos_token=False)
    read = Tokenizer.load(path)
    assert isinstance(read.codec, SentencePiece) and read.bos_id is None
    for text in ("\n=x", "\n  cat", "\n\n1"):  # the prefix is a piece of its own
        assert read.encode(text) == encode(text)[1:]
        assert read.decode(read.encode(text)) == text
    assert read.decode(read.encode(" cat")) == " cat"
    (tmp_path / "saved").mkdir()
    read.save(tmp_path / "saved")
    again, theirs = Tokenizer.load(tmp_path / "saved"), pytest.importorskip("tokenizers").Tokenizer
    content = json.loads((tmp_path / "saved/tokenizer.json").read_text()) | {"added_tokens": []}
    theirs = theirs.from_str(json.dumps(content))
    same_ids(read, again.encode)
    same_ids(read, lambda text: theirs.encode(text, add_special_tokens=False).ids)
    for text in STRINGS:
        assert theirs.decode(read.encode(text)) == read.decode(read.encode(text))


@pytest.mark.skipif(not REAL.is_file(), reason="LLAVA_GGUF names no file: SmolLM2-135M-Instruct in GGUF")
def test_real_ids():
    """SmolLM2's: transformers takes GPT-2's cuts for it; with those of SmolLM2's tokenizer.json all ids are ours."""
    parts = pytest.importorskip("tokenizers").pre_tokenizers
    read, theirs = Tokenizer.load(REAL), their_tokenizer(REAL)
    options = {"add_special_tokens": False, "split_special_tokens": True}
    differ = sum(read.encode(text) != theirs.encode(text, **options) for text in STRINGS)
    steps = [parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False, use_regex=True)]
    theirs.backend_tokenizer.pre_tokenizer = parts.Sequence(steps)
    same_ids(read, lambda text: theirs.encode(text, **options))
    print(f"{differ} of {len(STRINGS)} strings differ under GPT-2's cuts")
