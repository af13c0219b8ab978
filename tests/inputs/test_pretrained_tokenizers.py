"""Published vocabularies give the same ids as the libraries they were made with, also on adversarial text.

The files are not part of this project: LLAVA_DATA (default ../shared/data) names the folder they are in.
"""

import gzip
import json
import os
import random
import struct
import unicodedata
from pathlib import Path

import pytest

from inputs.bpe import byte_alphabet
from inputs.tokenizer import Tokenizer

DATA = Path(os.environ.get("LLAVA_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
FOLDER = DATA / "tokenizers"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"{FOLDER} is not here")
NAMES = ("clip", "gpt2", "llama2", "llama3", "minimind", "mistral-v3")


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """A tokenizer and the name of its folder, loaded once."""
    return request.param, Tokenizer.load(FOLDER / request.param)


def hostile(count=10_000):
    """Strings from all planes of Unicode, of control bytes, of long runs, and of special tokens written as text."""
    rng = random.Random(0)
    words = ["the", "The", "cat", "can't", "WE'LL", "I'm", "'S", "don’t", "naïve", "12", "3.14", "1,000", "2024"]
    words += ["foo_bar", "http://x.y?z=1&q=%20"]
    specials = ["<s>", "</s>", "<unk>", "<pad>", "<image>", "<|endoftext|>", "<|im_start|>", "<|eot_id|>", "[INST]"]
    specials += ["<0x0A>", "▁", "▁▁", "USER:", "###"]
    blanks = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u3000", "\u2028", " \n ", "\v", "\x85"]
    combining = [
        "e\u0301",
        "\u0301",
        "👩‍👩‍👧",
        "🏽",
        "🇩🇪",
        "한국",
        "각",
        "ｱﾞ",
        "\u200d",
        "\ufe0f",
        "\ufeff",
        "ﬃ",
        "Å",
        "Å",
    ]

    def anything():
        point = rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000), rng.randrange(0x250)))
        return chr(point)

    def piece():
        kind = rng.randrange(9)
        if kind == 8:
            return rng.choice((" ", "a", "=", "1", "\n", "é", "猫", "aB")) * rng.randrange(1, 60)
        pools = (words, specials, blanks, combining, "".join(map(chr, range(32))), "0123456789.,+-eE")
        return anything() if kind >= len(pools) else rng.choice(pools[kind])

    def glue():
        return rng.choice(("", "", " "))

    yield from ("", " ", "▁", "\0", "</s>", "a" * 4000, " " * 3000, "猫" * 1000)
    for _ in range(count - 8):
        yield "".join(piece() + glue() for _ in range(rng.randrange(1, 14)))


STRINGS = list(hostile())


def json_without_added_tokens(path):
    """As tokenizers reads the file, but that text never becomes a special token: that is our rule, not theirs."""
    tokenizers = pytest.importorskip("tokenizers")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"], content["post_processor"] = [], None
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def clip_of_tokenizers():
    """OpenAI's file in the parts that transformers' CLIPTokenizerFast is made of."""
    tokenizers = pytest.importorskip("tokenizers")
    lines = gzip.decompress((FOLDER / "clip/bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1:48895]]
    letters = list(byte_alphabet().values())
    names = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocab = {name: i for i, name in enumerate(names)}
    model = tokenizers.models.BPE(vocab, merges, end_of_word_suffix="</w>", continuing_subword_prefix="")
    theirs, parts = tokenizers.Tokenizer(model), tokenizers.normalizers
    spaces = parts.Replace(tokenizers.Regex(r"\s+"), " ")
    theirs.normalizer = parts.Sequence([parts.NFC(), spaces, parts.Lowercase()])
    words = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    cut, as_bytes = tokenizers.pre_tokenizers.Split, tokenizers.pre_tokenizers.ByteLevel
    steps = [cut(words, behavior="removed", invert=True), as_bytes(add_prefix_space=False)]
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    return lambda text: theirs.encode(text).ids


def reference(name):
    """The library's own reading of the file: text -> ids."""
    if name == "llama2":
        sentencepiece = pytest.importorskip("sentencepiece")
        model = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / name / "tokenizer.model"))
        return model.encode
    if name == "llama3":
        pytest.skip("a file for tiktoken, and tiktoken reads it; see test_saved_files_give_the_same_ids")
    if name == "clip":
        return clip_of_tokenizers()
    theirs = json_without_added_tokens(FOLDER / name / "tokenizer.json")
    return lambda text: theirs.encode(text).ids


def test_same_ids_as_the_library(pair):
    name, ours = pair
    encode = reference(name)
    for text in STRINGS:
        # Unicode grows: what is not yet a letter to one library is one to the next. Only CLIP's words depend on ours.
        if name != "clip" or all(unicodedata.category(char) != "Cn" for char in text):
            assert ours.encode(text) == encode(text), repr(text)


def test_saved_files_give_the_same_ids(pair, tmp_path):
    name, ours = pair
    if name == "clip":
        pytest.skip("CLIP's text tower is only read, to compare images with texts")
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.specials, again.roles, again.legacy) == (ours.specials, ours.roles, ours.legacy)
    theirs = json_without_added_tokens(tmp_path / "tokenizer.json")
    for text in STRINGS:
        ids = ours.encode(text)
        assert again.encode(text) == ids, repr(text)
        assert theirs.encode(text).ids == ids, repr(text)


def test_text_comes_back_and_special_tokens_never_do(pair):
    name, ours = pair
    special = set(ours.specials.values())
    for text in STRINGS:
        ids = ours.encode(text)
        assert not special & set(ids) and all(0 <= i < ours.vocab_size for i in ids), repr(text)
        if name == "clip":
            continue  # upper case and the kind of spaces are gone for good
        if name not in ("llama2", "mistral-v3"):
            assert ours.decode(ids) == text, repr(text)
        else:  # a ▁ that was typed is a space ever after, in sentencepiece too; without prefix, so is the first space
            spaced = text.replace("▁", " ")
            assert ours.decode(ids) == (spaced if ours.legacy else spaced.removeprefix(" ")), repr(text)


GOLDEN = {
    "clip": "clip",
    "gpt2": "gpt2",
    "llama2": "llama2_sp",
    "llama3": "llama3",
    "minimind": "minimind",
    "mistral-v3": "mistral_v3_sp",
}


def test_golden_ids(pair, tmp_path):
    name, ours = pair
    golden = json.loads((FOLDER / "golden_tokens.json").read_text())[GOLDEN[name]]
    if name == "mistral-v3":  # the golden ids are sentencepiece's; tokenizer.json has none of its prefix before a space
        (tmp_path / "tokenizer.model").symlink_to(FOLDER / name / "tokenizer.model.v3")
        ours = Tokenizer.load(tmp_path)
    start = [ours.bos_id] if name in ("llama2", "mistral-v3") else []
    for text, ids in golden.items():
        ours_too = [ours.bos_id, *ours.encode(text), ours.eos_id] if name == "clip" else start + ours.encode(text)
        assert ours_too == ids, repr(text)
    assert len(golden) >= 17


def test_llama2c_tokenizer():
    ours = Tokenizer.load(DATA / "stories260K")
    golden = json.loads((FOLDER / "golden_tokens.json").read_text())["tok512_llama2c"]
    for text, ids in golden.items():
        assert [ours.bos_id, *ours.encode(text)] == ids, repr(text)
    assert ours.vocab_size == 512


def cut(path, kind):
    data = path.read_bytes()
    return {"empty": b"", "half": data[: len(data) // 2], "text": b"hello\n" * 9, "one byte short": data[:-1]}[kind]


@pytest.mark.parametrize("kind", ["empty", "half", "text", "one byte short"])
@pytest.mark.parametrize("source", ["llama2/tokenizer.model", "../stories260K/tok512.bin"])
def test_broken_files_are_refused_in_one_line(source, kind, tmp_path):
    path = tmp_path / Path(source).name
    path.write_bytes(cut(FOLDER / source, kind))
    with pytest.raises(ValueError) as caught:
        Tokenizer.load(tmp_path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_unigram_models_are_refused(tmp_path):
    # field 1: a piece "a"; field 2, trainer_spec: model_type (field 3) 1, which is unigram
    piece = b"\x0a\x01a\x15" + struct.pack("<f", 0.0)
    data = b"\x0a" + bytes([len(piece)]) + piece + b"\x12\x02\x18\x01"
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match="not its BPE"):
        Tokenizer.load(tmp_path)
