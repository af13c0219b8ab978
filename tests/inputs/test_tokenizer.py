"""The vocabulary: learned by hand-checked merges, reversible on any text, and the same in Hugging Face's libraries."""

import base64
import gzip
import json
import random

import pytest

from inputs.files import read_json
from inputs.tokenizer import SPECIALS, Tokenizer, train_bpe

SENTENCES = [
    "the cat sat on the mat. the cat is red, isn't it? 123 cats!",
    "What is this?\n\n  a héllo wörld",
    "猫が好き",
]
ALPHABETS = (
    "the cat sat on mat",
    " \t\n\r\v\f\x85\u00a0\u2003\u2028\u3000",  # what \s means differs between regex engines; here it must not
    "".join(map(chr, [*range(32), *range(127, 160)])),
    "👩👨👧‍🏽🏳️🌈😀",  # with the joiner and the variation selector that make one glyph of several
    "אבגשלוםمرحبا\u200f\u202e\u2066\ufeff",
    "e\u0301\u0327ñÅ한국猫が好きक्षि",
    "0123456789٠١२½Ⅷ.,!?'\"<>|/[]_-",
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(SENTENCES * 3, 60)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


def strings(count=400):
    """Random text: of one script, of all mixed, and of any code points that are text (halves of surrogates are not)."""
    rng = random.Random(0)
    result = ["", " ", "  a", "a  ", "\r\n", "'s 's", "a" * 300, "👨‍👩‍👧 مرحبا"]
    for i in range(count):
        length = rng.randrange(1, 30)
        if i % 3 == 0:
            alphabet = rng.choice(ALPHABETS)
        elif i % 3 == 1:
            alphabet = "".join(ALPHABETS)
        else:
            points = [rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(length)]
            alphabet = "".join(map(chr, points)) + " a"
        result.append("".join(rng.choices(alphabet, k=length)))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# learning


def test_merges_by_hand():
    # Words: "aab", " aab", " ab". Pairs: a+b 3, a+a 2, space+a 2: so "ab". Then a+ab 2, the two with a space 1 each:
    # so "aab". Then no pair occurs twice.
    tokenizer = train_bpe(["aab aab ab"], 10)
    assert list(tokenizer.codec.ranks)[256:] == [b"ab", b"aab"]
    assert tokenizer.specials == {"<pad>": 258, "<image>": 259, "<s>": 260, "</s>": 261}
    assert tokenizer.vocab_size == 262
    assert tokenizer.encode("aab ab b") == [257, 32, 256, 32, 98]


def test_ties_go_to_the_pair_that_sorts_first():
    tokenizer = train_bpe(["cd", "ab", "cd", "ab", "bz", "bz", "az", "az"], 10)
    assert list(tokenizer.codec.ranks)[256:] == [b"ab", b"az", b"bz", b"cd"]
    # b+b and b+c stand twice each.
    assert list(train_bpe(["bbc", "bbc"], 10).codec.ranks)[256:] == [b"bb", b"bbc"]


def test_a_pair_that_occurs_once_is_not_merged():
    assert train_bpe(["abcdef"], 10).vocab_size == 260
    assert train_bpe([], 10).vocab_size == train_bpe(["", " "], 10).vocab_size == 260


def test_counts_are_of_occurrences_not_of_words():
    # "xy" stands once in three texts, "ab" twice in one.
    assert list(train_bpe(["xy", "xy", "xy", "ab", "ab"], 1).codec.ranks)[256:] == [b"xy"]


def test_training_is_deterministic(tokenizer):
    again = train_bpe(SENTENCES * 3, 60)
    assert (
        list(again.codec.ranks.items()) == list(tokenizer.codec.ranks.items()) and again.specials == tokenizer.specials
    )
    reordered = train_bpe(SENTENCES[::-1] * 3, 60)  # only the counts matter
    assert list(reordered.codec.ranks.items()) == list(tokenizer.codec.ranks.items())


def test_more_merges_only_add(tokenizer):
    assert list(train_bpe(SENTENCES * 3, 20).codec.ranks.items()) == list(tokenizer.codec.ranks.items())[: 256 + 20]


def test_words_never_merge_across_their_border():
    for token in train_bpe(["a b a b a b 12 12 12 x.. x.."] * 3, 50).codec.ranks:
        text = token.decode("latin-1")
        assert " " not in text[1:] and not (text[-2:].strip().isdigit() and len(text.strip()) > 1), token


def test_the_end_token_is_the_highest_id(tokenizer):
    # CLIP's text tower finds the end of a text by argmax.
    assert tokenizer.eos_id == tokenizer.vocab_size - 1 == max(tokenizer.specials.values())


# ---------------------------------------------------------------------------------------------------------------------
# text to ids and back


def test_round_trip(tokenizer):
    for text in strings():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.specials.values())


def test_special_tokens_cannot_be_typed(tokenizer):
    for name in SPECIALS:
        for text in (name, f"a{name}b", name * 3, f" {name}\n"):
            ids = tokenizer.encode(text)
            assert not set(ids) & set(tokenizer.specials.values()) and tokenizer.decode(ids) == text


def test_decode_drops_special_tokens(tokenizer):
    ids = [tokenizer.bos_id, tokenizer.image_id, *tokenizer.encode("a cat"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "a cat"
    assert tokenizer.decode(list(tokenizer.specials.values())) == tokenizer.decode([]) == ""


def test_decode_of_half_a_character(tokenizer):
    assert tokenizer.decode(list("é".encode())[:1]) == "\ufffd"


def test_encode_returns_a_list_of_its_own(tokenizer):
    first = tokenizer.encode("the cat")
    first.append(0)  # the cache behind must not see this
    assert tokenizer.encode("the cat") == first[:-1]


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_save_then_load(tokenizer, folder, tmp_path):
    loaded = Tokenizer.load(folder)
    assert (loaded.codec.ranks, loaded.specials, loaded.roles, loaded.codec.split) == (
        tokenizer.codec.ranks,
        tokenizer.specials,
        tokenizer.roles,
        tokenizer.codec.split,
    )
    assert [loaded.encode(text) for text in strings()] == [tokenizer.encode(text) for text in strings()]
    loaded.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_same_ids_in_tokenizers(tokenizer, folder):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    for text in strings(1000):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text), text
        assert theirs.decode(ids) == text


def test_same_ids_in_transformers(tokenizer, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in strings():
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text), text
    assert theirs.convert_tokens_to_ids(list(SPECIALS)) == [tokenizer.specials[name] for name in SPECIALS]


RUNS = (
    "aaab caab caab caab caab aab aab",
    "..) ...) ...) ....) ((..) a..)",
    "aaaa aaaaa aa baaa abab ababab babab",
)


@pytest.mark.parametrize("text", RUNS)
def test_runs_of_one_letter(text, tmp_path):
    # "aaa" can be split as aa+a or a+aa: training, encoding and the saved merges must agree on which.
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = train_bpe([text] * 3, 30)
    tokenizer.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for word in text.split() + strings() + ["a" * n + "b" * m for n in range(9) for m in range(3)]:
        assert theirs.encode(word, add_special_tokens=False).ids == tokenizer.encode(word)


def trained_by_tokenizers(alphabet):
    """A vocabulary as SmolLM2's is made: every digit cut off first, then GPT-2's pattern."""
    tokenizers = pytest.importorskip("tokenizers")
    cut, theirs = tokenizers.pre_tokenizers, tokenizers.Tokenizer(tokenizers.models.BPE())
    digits = cut.Digits(individual_digits=True)
    theirs.pre_tokenizer = cut.Sequence([digits, cut.ByteLevel(add_prefix_space=False, use_regex=True)])
    theirs.decoder = tokenizers.decoders.ByteLevel()
    texts = [*SENTENCES, "in 2024\n\n    10 20  3.14 it's 5 's"] * 3
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(texts, trainer)
    return theirs


@pytest.mark.parametrize("whole", [True, False])
def test_digits_cut_first_and_bytes_without_an_id(whole, tmp_path):
    """Both are SmolLM2's; what is saved cuts the same way. A byte without an id leaves the text, as in tokenizers."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = trained_by_tokenizers(tokenizers.pre_tokenizers.ByteLevel.alphabet() if whole else [])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    assert (len(ours.codec.missing_bytes) == 0) == whole
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "saved/tokenizer.json"))
    for text in ["in 2024", "a  7 cats", "x = 10\n    20 30", "5's 's5", "½²", *strings(1000)]:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids == again.encode(text).ids, text
    assert Tokenizer.load(tmp_path / "saved").codec.split == ours.codec.split


@pytest.fixture
def broken(folder, tmp_path):
    """A function that writes the good file with some keys replaced and returns load's complaint, checked for form."""

    def complaint(change):
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        path = tmp_path / "tokenizer.json"
        path.write_bytes(change if isinstance(change, bytes) else json.dumps(content | change(content)).encode())
        with pytest.raises(ValueError) as caught:
            Tokenizer.load(tmp_path)
        message = str(caught.value)
        assert str(path) in message and len(message.splitlines()) == 1
        return message

    return complaint


def split_on(step):
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [step]}}


def test_load_names_the_missing_file(tmp_path):
    with pytest.raises(ValueError, match="No such file") as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def cut_by(change):
    step = {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [step | change, BYTES]}}


def special(change):
    return {"added_tokens": [{"id": 259, "content": "</s>"} | change]}


SPLIT_STEP, BYTES = {"type": "Split", "pattern": {"Regex": "."}}, {"type": "ByteLevel", "use_regex": False}
REFUSED = {
    "empty": b"",
    "not JSON": b"{,}",
    "cut off": b'{"version": "1.0", "mod',
    "no specials": lambda content: {"added_tokens": []},
    "no end token": lambda content: {"added_tokens": content["added_tokens"][:-1]},
    "another model": lambda content: {"model": {"type": "Unigram", "vocab": []}},
    "no byte level": lambda content: {"pre_tokenizer": {"type": "Whitespace"}},
    "a space in front": lambda content: {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    "two patterns": lambda content: {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT_STEP] * 2 + [BYTES]}
    },
    "words cut out": lambda content: cut_by({"behavior": "Removed"}),
    "words cut elsewhere": lambda content: cut_by({"invert": True}),
    "words left out": lambda content: cut_by({"pattern": {"Regex": "a+"}}),
    "runs of digits": lambda content: {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTES | {"use_regex": True}],
        }
    },
    "dropout": lambda content: {"model": content["model"] | {"dropout": 0.5}},
    "WordPiece": lambda content: {"model": content["model"] | {"type": "WordPiece"}},
    "no merges": lambda content: {"model": content["model"] | {"merges": [], "ignore_merges": False}},
    "merges in another order": lambda content: {
        "model": content["model"] | {"merges": content["model"]["merges"][::-1]}
    },
    "an id below 0": lambda content: special({"id": -1}),
    "an id of 10^12": lambda content: special({"id": 10**12}),
    "an id in quotes": lambda content: special({"id": "5"}),
    "half an id": lambda content: {"model": content["model"] | {"vocab": content["model"]["vocab"] | {"a": 5.5}}},
    "lower case": lambda content: {"normalizer": {"type": "Lowercase"}},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_load_refuses_in_one_line(kind, broken):
    broken(REFUSED[kind])


CRASHES = {
    "null": b"null",
    "list": b"[]",
    "no keys": b"{}",
    "not UTF-8": b'{"version": "\xff"}',
    "deep": b"[" * 200_000,
    "model null": lambda content: {"model": None},
    "pre_tokenizer null": lambda content: {"pre_tokenizer": None},  # what tokenizers writes when there is none
    "added_tokens null": lambda content: {"added_tokens": None},
    "split on a string": lambda content: split_on({"type": "Split", "pattern": {"String": " "}}),
    "broken pattern": lambda content: split_on({"type": "Split", "pattern": {"Regex": "("}}),
    "not byte-level": lambda content: {"model": content["model"] | {"vocab": {"▁a": 0}}},  # LLaMA's own spelling
}


@pytest.mark.parametrize("kind", CRASHES)
def test_load_refuses_wrong_kinds_in_one_line(kind, broken):
    broken(CRASHES[kind])


SETTINGS = {
    "a token without a name": {"added_tokens_decoder": {"300": {}}},
    "a list of tokens": {"added_tokens_decoder": [1]},
    "an id that is none": {"added_tokens_decoder": {"x": {"content": "<image>"}}},
    "an id below 0": {"added_tokens_decoder": {"-7": {"content": "<image>"}}},
    "a list for a name": {"bos_token": ["x"]},
    "a number for a name": {"eos_token": {"content": 5}},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_broken_settings_are_refused_in_one_line(kind, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS[kind]))
    with pytest.raises(ValueError) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer_config.json" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def ranks_of(ids):
    """LLaMA-3's kind of file: every byte, then two letters, each with the id given."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"cd"]
    return b"\n".join(base64.b64encode(token) + b" %d" % i for token, i in zip(tokens, ids)) + b"\n"


FILES = {
    "a rank twice": ("tokenizer.model", ranks_of([*range(257), 256])),
    "a rank left out": ("tokenizer.model", ranks_of([*range(257), 258])),
    "a byte left out": ("tokenizer.model", ranks_of(range(258)).replace(b"ag== ", b"YWE= ")),
    "a few bytes only": ("tokenizer.model", ranks_of(range(100))),
    "no rank": ("tokenizer.model", ranks_of(range(258)) + b"foo\n"),
    "not base64": ("tokenizer.model", ranks_of(range(258)) + b"!!! 258\n"),
    "four bytes": ("tok512.bin", b"xxxx"),
    "no bytes": ("tok512.bin", b""),
    "no gzip": ("bpe.txt.gz", b"x"),
    "half a gzip": ("bpe.txt.gz", gzip.compress(b"title\n" + bytes(range(256)) * 9)[:-30]),
}


@pytest.mark.parametrize("kind", FILES)
def test_other_broken_files_are_refused_in_one_line(kind, tmp_path):
    name, data = FILES[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_whole_file_of_ranks(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(ranks_of(range(258)))
    assert Tokenizer.load(tmp_path).encode("abcd.") == [256, 257, 46]


def test_a_byte_order_mark_does_not_matter(tmp_path):
    """Editors on Windows put it in front of a JSON file."""
    tokenizer = train_bpe(["a cat on a mat"] * 3, 10)
    tokenizer.save(tmp_path)
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
        assert read_json(path)
    assert Tokenizer.load(tmp_path).encode("a cat") == tokenizer.encode("a cat")
