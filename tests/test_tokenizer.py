"""The vocabulary: learnt by hand-checked merges, reversible on any text, and the same in Hugging Face's libraries."""

import json
import random

import pytest

from tokenizer import SPECIALS, Tokenizer, train_bpe

SENTENCES = [
    "the cat sat on the mat. the cat is red, isn't it? 123 cats!",
    "What is this?\n\n  a héllo wörld",
    "猫が好き",
]
ALPHABETS = (
    "the cat sat on mat",
    " \t\n\r\v\f\x85\u00a0\u2003\u2028\u3000",  # what \s means differs between regex engines; here it must not
    "".join(map(chr, [*range(32), *range(127, 160)])),
    "👩👨👧‍🏽🏳️🌈😀",  # with the joiner and the variation selector that make one picture of several
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
