"""Added tokens that are not special are vocabulary: found in text, part of answers, and written with their flags."""

import json
import random
import struct

import pytest
import torch
from PIL import Image

import sample
from clip import CLIPVisionConfig
from data import render_dialogue
from formats import __main__ as formats_cli
from formats.weights import load_tokenizer
from inputs.added_tokens import AddedToken
from inputs.bpe import ClipBPE, byte_alphabet
from inputs.records import Turn
from inputs.tokenizer import Tokenizer
from inputs.vocabularies import PREFIXES
from llava import LlavaConfig, TextConfig

PLAIN = {"special": False, "normalized": True, "single_word": False, "lstrip": False, "rstrip": False}
WORDS = {"<box>": {}, "<w>": {"normalized": False}, "<l>": {"lstrip": True}, "<r>": {"rstrip": True}}
WORDS |= {"dogz": {"single_word": True}, "[SEG]": {"normalized": False, "lstrip": True, "rstrip": True}}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
LETTERS = ["▁", *"abcdogz<>wrlx/s", "\n"]
MERGES = [("▁", "a"), ("d", "o"), ("▁", "do"), ("do", "g"), ("▁do", "g"), ("▁", "▁"), ("b", "o"), ("bo", "x")]
PIECES += [*LETTERS, *(left + right for left, right in MERGES)]


def added(start, **flags):
    """Entries of tokenizer.json's added_tokens: <image>, then WORDS."""
    image = {"id": start, "content": "<image>"} | PLAIN | {"special": True, "normalized": False}
    return [image, *({"id": start + 1 + i, "content": n} | PLAIN | f | flags for i, (n, f) in enumerate(WORDS.items()))]


def sentencepiece_file(scheme):
    """A tokenizer.json of SentencePiece's BPE, as transformers writes it."""
    normalizers, pretokenizers = PREFIXES[scheme]
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": int(scheme != "never"), "stop": 0}]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "merges": MERGES}
    model |= {"vocab": {piece: i for i, piece in enumerate(PIECES)}, "dropout": None}
    control = [{"id": i, "content": PIECES[i]} | PLAIN | {"special": True, "normalized": False} for i in range(3)]
    return {
        "version": "1.0",
        "added_tokens": control + added(len(PIECES)),
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pretokenizers} if pretokenizers else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def byte_level_file(nfc=False):
    """A tokenizer.json of byte-level BPE with GPT-2's pattern."""
    letters = [*byte_alphabet().values(), "do", "dog", "Ġa"]
    merges = [("d", "o"), ("do", "g"), ("Ġ", "a")]
    start, byte_level = len(letters), {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end = {"id": start, "content": "</s>"} | PLAIN | {"special": True, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [end, *added(start + 1)],
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": merges},
    }


FILES = {scheme: sentencepiece_file(scheme) for scheme in PREFIXES}
FILES |= {"byte level": byte_level_file(), "byte level, NFC": byte_level_file(nfc=True)}


def write(folder, content, settings=None):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | (settings or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def texts(count=500):
    rng = random.Random(0)
    pieces = [*WORDS, " ", "  ", "\n", "a", "dog", "dogs", "dogz", "é", "e\u0301", "▁", "_", "1", "x"]
    return ["", *("".join(rng.choice(pieces) for _ in range(rng.randrange(1, 9))) for _ in range(count))]


@pytest.mark.parametrize("kind", FILES)
def test_same_ids_and_text_as_transformers(kind, tmp_path):
    """Of the file that transformers wrote and of ours, for every way to write a prefix and every flag."""
    transformers = pytest.importorskip("transformers")
    folder, copy = write(tmp_path / "source", FILES[kind]), tmp_path / "copy"
    ours = Tokenizer.load(folder)
    copy.mkdir()
    ours.save(copy)
    again = Tokenizer.load(copy)
    assert again.added == ours.added and again.fingerprint() == Tokenizer.load(copy).fingerprint()
    for source in (folder, copy):
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(source)
        for text in texts():
            ids = theirs.encode(text, add_special_tokens=False)
            assert ours.encode(text) == ids == again.encode(text), text
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    written = {token["content"]: token for token in json.loads((copy / "tokenizer.json").read_text())["added_tokens"]}
    for token in FILES[kind]["added_tokens"]:
        assert written[token["content"]] == token


@pytest.mark.parametrize("kind", ["first", "byte level"])
def test_words_are_found_and_special_tokens_are_not(kind, tmp_path):
    ours = Tokenizer.load(write(tmp_path / "source", FILES[kind]))
    ids = ours.encode("a<box> [SEG] a</s><image>dogz")
    box, seg, dogz = (ours.words[name].id for name in ("<box>", "[SEG]", "dogz"))
    assert [i for i in ids if i in ours.word_ids] == [box, seg, dogz]
    assert not set(ids) & set(ours.specials.values())
    assert ours.decode(ids) == "a<box>[SEG]a</s><image>dogz" and ours.decode([ours.image_id, box]) == "<box>"
    assert ours.encode("dogzs") != [dogz] and dogz not in ours.encode("dogzs adogz")
    assert ours.add_special("<box>") == box and ours.encode("<box>") != [box] and ours.decode([box]) == ""


def test_tokens_that_control_a_dialogue_are_special_whatever_the_file_says(tmp_path):
    content = byte_level_file()
    names = ("<|im_start|>", "<|endoftext|>", "<end>", "<more>")
    content["added_tokens"] += [{"id": 270 + i, "content": name} | PLAIN for i, name in enumerate(names)]
    folder = write(tmp_path / "a", content, {"eos_token": "<end>", "extra_special_tokens": ["<more>"]})
    ours = Tokenizer.load(folder)
    assert set(names) <= ours.specials.keys() and ours.eos_id == 272
    assert not {270, 271, 272, 273} & set(ours.encode("".join(names)))


@pytest.mark.parametrize("scheme", PREFIXES)
def test_text_after_an_image_has_the_ids_of_transformers(scheme, tmp_path):
    """Also after a word and after a special token of the template: there a legacy tokenizer puts a space."""
    transformers = pytest.importorskip("transformers")
    content = FILES[scheme] | {"post_processor": TEMPLATE}
    folder = write(tmp_path / "source", content, {"bos_token": "<s>"})
    ours = Tokenizer.load(folder)
    (tmp_path / "copy").mkdir()
    ours.save(tmp_path / "copy")
    turns = [Turn("a dog<box>", "<w>", 1), Turn("<box>dog", "a")]
    ids, _ = render_dialogue(turns, ours, "llava_hf", 2)
    text = "USER: <image><image>\na dog<box> ASSISTANT: <w></s>USER: <box>dog ASSISTANT: a</s>"
    for source in (folder, tmp_path / "copy"):
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(source)
        prompt = text.split(" <w>")[0]  # its last chunk ends here, as in sampling
        assert theirs.encode(prompt) == ids[: len(theirs.encode(prompt))]
        assert theirs.encode(text) == ids
    after = ids[ids.index(ours.image_id) + 2]
    assert after == ours.codec.ids["\n" if scheme in ("first", "never") else "▁"]


SPECIAL = {"SpecialToken": {"id": "<s>", "type_id": 0}}
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
TEMPLATE = {"type": "TemplateProcessing", "single": [SPECIAL, SEQUENCE], "pair": [SPECIAL, SEQUENCE, SEQUENCE]}
TEMPLATE["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}


# ---------------------------------------------------------------------------------------------------------------------
# files beside tokenizer.model


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number, value):
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def model_file():
    """A tokenizer.model with PIECES: field 1 a piece (text, score, type), 2 the trainer, 3 the normalizer."""
    merged = {left + right: rank for rank, (left, right) in enumerate(MERGES)}
    data = b""
    for i, piece in enumerate(PIECES):
        kind = 2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1
        data += field(1, field(1, piece) + b"\x15" + struct.pack("<f", -merged.get(piece, 99)) + bytes([0x18, kind]))
    return data + field(2, bytes([0x18, 2])) + field(3, bytes([0x18, 1, 0x20, 0]))


@pytest.mark.parametrize("listed", ["added_tokens.json", "added_tokens_decoder"])
@pytest.mark.parametrize("legacy", [True, False])
def test_words_beside_tokenizer_model(legacy, listed, tmp_path):
    """The ids of the tokenizer.json that transformers makes of it: text is cut before it is normalized."""
    (tmp_path / "tokenizer.model").write_bytes(model_file())
    tokens, settings = added(len(PIECES)), {"legacy": legacy}
    if listed == "added_tokens.json":
        (tmp_path / listed).write_text(json.dumps({token["content"]: token["id"] for token in tokens}))
        (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<l>"]}')
    else:
        settings[listed] = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in tokens}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer.load(tmp_path)
    special = {"<image>", "<unk>", "<s>", "</s>"} | ({"<l>"} if listed == "added_tokens.json" else set())
    assert ours.specials.keys() == special and ours.words.keys() == (WORDS.keys() - special)
    ids = {token["content"]: token["id"] for token in tokens}
    dog, space = ours.codec.ids["▁dog"], ours.codec.ids["▁"]
    after = [dog] if legacy else [ours.codec.ids["dog"]]
    assert ours.encode("dog<box>dog") == [dog, ids["<box>"], *after]
    assert ours.encode("dog <box>") == [dog, space, ids["<box>"]]
    assert ours.decode([dog, ids["<box>"], dog]) == "dog<box> dog"
    (tmp_path / "copy").mkdir()
    ours.save(tmp_path / "copy")
    again = Tokenizer.load(tmp_path / "copy")
    assert [again.encode(text) for text in texts()] == [ours.encode(text) for text in texts()]
    assert again.words == ours.words and again.added["<image>"] == AddedToken(len(PIECES))


def test_ids_with_gaps_are_kept_in_transformers(tmp_path):
    """tokenizers numbers added tokens without gaps unless the vocabulary holds them."""
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(write(tmp_path / "source", byte_level_file()))
    ours.specials["<far>"] = 400
    (tmp_path / "copy").mkdir()
    ours.save(tmp_path / "copy")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "copy")
    assert theirs.encode("<box>a<far>") == [*ours.encode("<box>a"), 400]
    assert Tokenizer.load(tmp_path / "copy").specials == ours.specials


def test_clip_decodes_words():
    letters = byte_alphabet().values()
    names = [*letters, *(letter + "</w>" for letter in letters), "do", "dog</w>"]
    codec = ClipBPE({name: i for i, name in enumerate(names)}, names[-2:])
    added = {"<box>": AddedToken(600, special=False)}
    ours = Tokenizer(codec, {"<|endoftext|>": 601}, {"eos": "<|endoftext|>"}, added=added)
    ids = ours.encode("A <box>dog \u00e9!")
    assert ids[:3] == [names.index("a</w>"), 600, names.index("dog</w>")]
    assert ours.decode(ids) == "a <box> dog \u00e9 !"


def test_a_word_that_becomes_special_is_saved_as_special(tmp_path):
    ours = Tokenizer.load(write(tmp_path / "source", byte_level_file()))
    i = ours.words["<box>"].id
    assert ours.add_special("<box>") == i not in ours.encode("a<box>")
    (tmp_path / "copy").mkdir()
    ours.save(tmp_path / "copy")
    again = Tokenizer.load(tmp_path / "copy")
    assert again.specials["<box>"] == i and again.encode("a<box>") == ours.encode("a<box>")


def test_an_id_of_two_tokens_is_refused(tmp_path):
    decoder = {"260": {"content": "<image>", "special": True}}
    with pytest.raises(ValueError, match="'<image>' has the id 260, which is that of"):
        Tokenizer.load(write(tmp_path / "a", byte_level_file() | {"added_tokens": [
            {"id": 259, "content": "</s>"} | PLAIN, {"id": 260, "content": "<box>"} | PLAIN
        ]}, {"added_tokens_decoder": decoder}))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# vocab.json and merges.txt; add_bos_token


def slow_files(folder, name, settings=None):
    """Write the files of a slow tokenizer of transformers: vocab.json, merges.txt, <box> in added_tokens.json."""
    model = byte_level_file()["model"]
    special = {"GPT2Tokenizer": ["<|endoftext|>"], "Qwen2Tokenizer": []}.get(name, ["<s>", "<pad>", "</s>", "<unk>"])
    tokens = [*model["vocab"], *special]
    if name == "RobertaTokenizer":  # ids by frequency, not in the order of merging
        tokens = [*special, "dog", "Ġa", *list(model["vocab"])[:256][::-1], "do", "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    more = {"<box>": len(tokens)} | ({"<|endoftext|>": len(tokens) + 1} if name == "Qwen2Tokenizer" else {})
    (folder / "added_tokens.json").write_text(json.dumps(more))
    values = {"tokenizer_class": name} | (settings or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "RobertaTokenizer", "Qwen2Tokenizer"])
def test_vocab_json_and_merges(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    slow_files(tmp_path, name)
    (tmp_path / "copy").mkdir()
    ours = Tokenizer.load(tmp_path)
    ours.save(tmp_path / "copy")
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    copy = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "copy")
    for text in [*texts(), "it's 123  dogs\n\n a", "E\u0301"]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids == copy.encode(text, add_special_tokens=False), text
        assert Tokenizer.load(tmp_path / "copy").encode(text) == ids and ours.decode(ids) == theirs.decode(ids), text
    assert ours.eos_id == theirs.eos_token_id and "<box>" in ours.words
    assert ours.bos_id == (theirs.bos_token_id if name == "RobertaTokenizer" else None)
    assert not set(ours.encode("<s></s><mask><|endoftext|>")) & set(theirs.all_special_ids)


def test_which_slow_files_are_read_is_said(tmp_path):
    slow_files(tmp_path, "LEDTokenizer")
    with pytest.raises(ValueError, match=r"vocab\.json: .*GPT2Tokenizer.*not for LEDTokenizer.*save_pretrained"):
        Tokenizer.load(tmp_path)
    slow_files(tmp_path, "GPT2Tokenizer")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"no merges\.txt beside it"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: No such file, nor tokenizer\.model, vocab\.json"):
        Tokenizer.load(tmp_path)


def test_text_after_an_image_in_a_folder_of_llavas_authors(tmp_path, capsys):
    """Their code encodes it on its own, so with a space in front, even if the tokenizer is not legacy."""
    (tmp_path / "tokenizer.model").write_bytes(model_file())
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    rows = len(PIECES)
    config = LlavaConfig(TextConfig(rows, 8, 8, 1, 1), CLIPVisionConfig(), image_token_index=rows)
    ours, newline = load_tokenizer(tmp_path, config), PIECES.index("\n")
    ids, _ = render_dialogue([Turn("a", None, 1)], ours, "llava_hf", 1)
    at = ids.index(rows)
    assert ids[at + 1 : at + 3] == [PIECES.index("▁"), newline]
    assert "text after an image gets a space in front" in capsys.readouterr().err
    (tmp_path / "copy").mkdir()
    ours.save(tmp_path / "copy")
    config.text_config.vocab_size += 1  # what convert writes has a row for the placeholder
    again = load_tokenizer(tmp_path / "copy", config)
    assert render_dialogue([Turn("a", None, 1)], again, "llava_hf", 1)[0] == ids and not capsys.readouterr().err


@pytest.mark.parametrize("add", [True, False, None])
def test_add_bos_token_beside_tokenizer_model(add, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_file())
    values = {"bos_token": "<s>"} | ({} if add is None else {"add_bos_token": add})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    ours = Tokenizer.load(tmp_path)
    first = [] if add is False else [1]
    assert render_dialogue([Turn("a", None)], ours, "raw", 1)[0] == [*first, ours.codec.ids["▁a"]]
    (tmp_path / "copy").mkdir()
    ours.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").bos_id == ours.bos_id
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "copy")
    assert theirs.encode("a") == [*first, ours.codec.ids["▁a"]]


# ---------------------------------------------------------------------------------------------------------------------
# a whole LLaVA


@pytest.mark.parametrize("kind", ["prepend", "always", "first", "byte level"])
def test_the_processor_of_a_folder_and_of_its_conversion_gives_the_same_ids(kind, tmp_path, command, capsys):
    """Prompts and answers with words, of a random LLaVA that transformers wrote."""
    transformers = pytest.importorskip("transformers")
    folder, content = tmp_path / "hf", FILES[kind]
    names = {token["content"]: token["id"] for token in content["added_tokens"]}
    if kind != "byte level":
        content = content | {"post_processor": TEMPLATE}
    write(folder, content, {"bos_token": "<s>"} if "<s>" in names else {})
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**shape, image_size=28, patch_size=14)
    text = transformers.LlamaConfig(**shape, vocab_size=max(names.values()) + 1)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=names["<image>"])
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.lm_head.weight.data[: names["<box>"]] = 0  # it answers with words
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    template = {"image_token": "<image>", "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    image_processor = transformers.CLIPImageProcessor(**size)
    transformers.LlavaProcessor(image_processor, tokenizer, patch_size=14, **template).save_pretrained(folder)
    command(formats_cli, "convert", folder, tmp_path / "ours")
    picture = Image.new("RGB", (28, 28))
    picture.save(tmp_path / "a.png")
    for source in (folder, tmp_path / "ours"):
        processor = transformers.AutoProcessor.from_pretrained(source)
        prompt = "USER: <image>\nWhere is <box> <w>? ASSISTANT:"
        theirs = processor(images=picture, text=prompt, return_tensors="pt")["input_ids"][0].tolist()
        capsys.readouterr()
        flags = ["--image", tmp_path / "a.png", "--prompt", "Where is <box> <w>?", "--max-new-tokens", 8, "--json"]
        command(sample, "--model", source, *flags, "--template", "llava_hf", "--device", "cpu")
        told = json.loads(capsys.readouterr().out)
        assert told["prompt_ids"] == theirs
        assert told["text"] == processor.decode(told["ids"], skip_special_tokens=True).strip() != ""
