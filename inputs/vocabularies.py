"""Read vocabulary files into codecs, and write them: tokenizer.json, tokenizer.model, llama2.c's and OpenAI CLIP's.

The readers do not catch the errors of malformed files: Tokenizer.load turns them into one line with the file's name.
"""

import base64
import gzip
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import regex

from inputs.added_tokens import AddedToken, content_of, special_names
from inputs.bpe import SPACE, ByteLevel, ClipBPE, Codec, SentencePiece, byte_alphabet
from inputs.files import read_json, read_optional_json

# Ours: words, single digits and runs of punctuation, each with the space before it; then the remaining spaces.
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLIT_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2: GPT-2's pattern, applied to the pieces between single digits. Spaces before a digit end a piece.
SPLIT_DIGITS = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
SPLIT_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EVERY_KIND = "".join(map(chr, range(0x250))) + "\u2028\u3000猫が👩‍👩‍👧\u0301\ufeff"  # characters of every kind
MAX_IDS = 1 << 24  # far above any vocabulary: a higher id means a malformed file and would reserve memory
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>"]
LLAMA3_SPECIALS += [RESERVED[4], "<|eot_id|>", *RESERVED[5:]]  # in the order of Meta's code: ids 128,000 to 128,255
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
CLIP_MERGES = 48_894  # OpenAI's file lists more merges than CLIP uses
# The ways to put SentencePiece's dummy prefix in front of text, as normalizer and pre_tokenizer of a tokenizer.json:
#   prepend  of every text between added tokens; transformers 4, legacy
#   double   the same, but added tokens are found before; transformers 5, legacy, made from a tokenizer.model
#   always   of every text between added tokens that does not start with a space; transformers 5, legacy
#   first    of the whole text if it starts with neither an added token nor a space; not legacy
#   never    of no text; some GGUF files
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
DOUBLE = {"type": "Replace", "pattern": {"Regex": rf"\A{SPACE}"}, "content": SPACE * 2}
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
PREFIXES = {
    "prepend": ([{"type": "Prepend", "prepend": SPACE}, SPACES], []),
    "double": ([SPACES, DOUBLE], [METASPACE | {"prepend_scheme": "always"}]),
    "always": ([], [METASPACE | {"prepend_scheme": "always"}]),
    "first": ([], [METASPACE]),
    "never": ([SPACES], []),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's types of a piece


def check_ids(vocabulary: dict[str, int]):
    """Raise ValueError if a name is not text or an id is not a number from 0 to MAX_IDS."""
    for name, i in vocabulary.items():
        if type(name) is not str or type(i) is not int or not 0 <= i < MAX_IDS:
            raise ValueError(f"the id of {name!r} is {i!r}")


def read_vocabulary(path: Path, settings: dict) -> tuple[Codec, dict[str, AddedToken], dict, str | None]:
    """Read a vocabulary file. Args: settings: the content of tokenizer_config.json.

    Returns the codec, its added tokens, the settings with the defaults of a vocab.json, and the token in front of every
    text: "" stands for none, None for the usual one.
    """
    if path.suffix != ".json":
        codec, specials = read_binary(path, legacy=bool(settings.get("legacy", True)))
        added = {name: AddedToken(i) for name, i in specials.items()}
        return codec, added, settings, "" if settings.get("add_bos_token") is False else None
    if path.name == "vocab.json":
        content, settings = read_merges(path.parent, settings)
    else:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    added = {token["content"]: AddedToken.parse(token["id"], token) for token in content["added_tokens"]}
    codec, bos = parse_json(content, added)
    return codec, added, settings, bos


def read_binary(path: Path, legacy: bool) -> tuple[Codec, dict[str, int]]:
    """The codec and the special tokens of a file that is not JSON."""
    if path.suffix == ".gz":
        return read_clip(path)
    if path.suffix == ".bin":
        return read_llama2c(path)
    if not path.read_bytes()[:64].split(b"\n")[0].endswith(b" 0"):
        return read_sentencepiece(path, "prepend" if legacy else "first")
    lines = [line.split() for line in path.read_bytes().splitlines()]  # LLaMA-3's: a token in base64, and its rank
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    every_byte = all(bytes([byte]) in ranks for byte in range(256))
    if not every_byte or list(ranks.values()) != list(range(len(lines))):  # the special tokens' ids follow these
        raise ValueError("tokens are given twice, or missing")
    return ByteLevel(ranks, SPLIT_LLAMA3), {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIALS)}


def read_llama2c(path: Path) -> tuple[SentencePiece, dict[str, int]]:
    """Read llama2.c's tokenizer.bin: an int32, then score (float32), length (int32) and text of each piece."""
    data, at, pieces = path.read_bytes(), 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        (text,) = struct.unpack_from(f"{length}s", data, at + 8)  # struct.error if the file ends within it
        i, at = len(pieces), at + 8 + length
        kind = UNKNOWN if i == 0 else CONTROL if i < 3 else BYTE if i < 259 else NORMAL
        pieces.append((text.decode().replace(" ", SPACE), score, kind))
    return from_pieces(pieces, "prepend"), {"<unk>": 0, "<s>": 1, "</s>": 2}


def read_clip(path: Path) -> tuple[ClipBPE, dict[str, int]]:
    """Read OpenAI's bpe_simple_vocab_16e6.txt.gz: a title line, then merges.

    The ids count the bytes, the bytes that end a word, the merged tokens, and two special tokens, in this order.
    """
    with gzip.open(path) as file:
        lines = file.read(20_000_000).decode().split("\n")[1 : 1 + CLIP_MERGES]
    merged, letters = [line.replace(" ", "") for line in lines], byte_alphabet().values()
    names = [*letters, *(letter + "</w>" for letter in letters), *merged, *CLIP_SPECIALS]
    ids = {name: i for i, name in enumerate(names)}
    specials = {name: ids.pop(name) for name in CLIP_SPECIALS}
    return ClipBPE(ids, merged), specials


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.model of SentencePiece


def read_sentencepiece(path: Path, scheme: str) -> tuple[SentencePiece, dict[str, int]]:
    """Read a tokenizer.model, and its special tokens by name. Field numbers: sentencepiece_model.proto."""
    fields = list(read_fields(path.read_bytes()))
    pieces = [{1: b"", 2: bytes(4), 3: NORMAL} | dict(read_fields(value)) for number, value in fields if number == 1]
    pieces = [(piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]) for piece in pieces]
    trainer, normalizer = (
        dict(entry for number, value in fields if number == wanted for entry in read_fields(value)) for wanted in (2, 3)
    )
    if not pieces or trainer.get(3) != 2:
        raise ValueError("not SentencePiece, or not its BPE")
    rewrites = normalizer.get(2) or not normalizer.get(3, 1) or normalizer.get(4, 1)
    if rewrites or any(kind == USER_DEFINED for _, _, kind in pieces):
        raise ValueError("it rewrites its text before encoding, which is not supported")
    specials = {text: i for i, (text, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL)}
    return from_pieces(pieces, scheme), specials


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, int or bytes) of a protobuf message. Raises ValueError or IndexError if it is malformed."""
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        number, wire = divmod(read_varint(stream), 8)
        if wire not in (0, 1, 2, 5):
            raise ValueError(f"wire type {wire} before byte {stream.tell()}")
        if wire == 0:
            yield number, read_varint(stream)
            continue
        size = read_varint(stream) if wire == 2 else {1: 8, 5: 4}[wire]
        value = stream.read(size)
        if len(value) < size:
            raise ValueError(f"a field of {size} bytes, of which {len(value)} are there")
        yield number, value


def read_varint(stream: io.BytesIO) -> int:
    """The number that starts here: seven bits in each byte, the lowest first; the eighth bit says that more follow."""
    value = 0
    for shift in range(0, 64, 7):
        byte = stream.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError(f"no number before byte {stream.tell()}")


def from_pieces(pieces: list[tuple[str, float, int]], scheme: str) -> SentencePiece:
    """A codec from (text, score, type) of every id. Raises ValueError if only some bytes have an id."""
    ids = {text: i for i, (text, _, kind) in enumerate(pieces) if kind == NORMAL}
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    by_byte = {int(text[3:5], 16): i for i, (text, _, kind) in enumerate(pieces) if kind == BYTE}
    unknown = next((i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), 0)
    if len(by_byte) not in (0, 256):
        raise ValueError(f"{len(by_byte)} of 256 bytes have an id")
    return SentencePiece(ids, scores, [by_byte[byte] for byte in range(len(by_byte))], unknown, scheme)


# ---------------------------------------------------------------------------------------------------------------------
# vocab.json and merges.txt of transformers' "slow" tokenizers

SPLIT_QWEN2 = SPLIT_LLAMA3.replace("{1,3}", "")  # every digit on its own
MAKE = "in transformers, AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes tokenizer.json"
END = {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
CLASSES = {  # transformers' class: pattern that cuts text, normalizer, special tokens that the files need not name
    "GPT2Tokenizer": (SPLIT_GPT2, None, END | {"bos_token": "<|endoftext|>"}),
    "Qwen2Tokenizer": (SPLIT_QWEN2, {"type": "NFC"}, END | {"pad_token": "<|endoftext|>"}),
    "RobertaTokenizer": (SPLIT_GPT2, None, ROBERTA),
}
MODEL_TYPES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "roberta": "RobertaTokenizer"}


def read_merges(folder: Path, settings: dict) -> tuple[dict, dict]:
    """The tokenizer.json that vocab.json and merges.txt stand for, and the settings with the class's defaults."""
    config = read_optional_json(folder / "config.json")
    config = config.get("text_config") or config
    name = settings.get("tokenizer_class") or MODEL_TYPES.get(config.get("model_type"), "")
    if name.removesuffix("Fast") not in CLASSES:
        raise ValueError(f"with merges.txt, it is read for {', '.join(CLASSES)}, not for {name or 'no class'}; {MAKE}")
    if not (folder / "merges.txt").exists():
        raise ValueError(f"there is no merges.txt beside it; {MAKE}")
    pattern, normalizer, defaults = CLASSES[name.removesuffix("Fast")]
    settings = defaults | {key: value for key, value in settings.items() if value is not None}
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    vocabulary, bos = read_json(folder / "vocab.json"), settings.get("bos_token")
    added = [{"id": i, "content": token} for token, i in vocabulary.items() if token in special_names(settings)]
    adds_bos = settings.get("add_bos_token", name.startswith("Roberta")) and bos
    first = {"SpecialToken": {"id": content_of(bos)}}
    return {
        "normalizer": normalizer,
        "pre_tokenizer": split_section(pattern, settings.get("add_prefix_space", False)),
        "post_processor": {"type": "TemplateProcessing", "single": [first]} if adds_bos else None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        "added_tokens": added,
    }, settings


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json of Hugging Face


def parse_json(content: dict, added: dict[str, AddedToken]) -> tuple[Codec, str]:
    """The codec of a tokenizer.json, and the token in front of every text ("" if there is none)."""
    model = content["model"]
    check_ids(model["vocab"] | {name: token.id for name, token in added.items()})
    if model.get("type", "BPE") != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise ValueError("its model is not plain BPE")
    steps = list_steps(content.get("post_processor"), "processors")
    first = [step["single"][0] for step in steps if step["type"] == "TemplateProcessing"]
    bos = first[0].get("SpecialToken", {}).get("id", "") if first else ""
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    if lost := next((left + right for left, right in merges if left + right not in model["vocab"]), None):
        raise ValueError(f"its merges make {lost!r:.60}, which has no id")
    pieces = {left + right for left, right in merges} | {text for text in model["vocab"] if len(text) == 1}
    # A word that is a piece, too, stays one: longer pieces may be made of it.
    specials = {name: token.id for name, token in added.items() if token.special or name not in pieces}
    if model.get("byte_fallback"):
        codec = parse_sentencepiece(content, specials, merges)
    elif model.get("end_of_word_suffix") == "</w>":
        ids = {text: i for text, i in model["vocab"].items() if text not in specials}
        codec = ClipBPE(ids, [left + right for left, right in merges])
    else:
        codec = parse_byte_level(content, specials, merges)
    return codec, bos


def parse_sentencepiece(content: dict, specials: dict[str, int], merges: list[list[str]]) -> SentencePiece:
    """SentencePiece's BPE in a tokenizer.json. Raises ValueError if it treats spaces in a way that is not supported."""
    vocabulary, unknown = content["model"]["vocab"], content["model"].get("unk_token")
    byte_ids = [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)]
    others = {*specials.values(), *byte_ids}
    ids, scores = {text: i for text, i in vocabulary.items() if i not in others}, {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))  # the first way to a piece decides
    normalizers = list_steps(content["normalizer"], "normalizers")
    pretokenizers = list_steps(content["pre_tokenizer"], "pretokenizers")
    pretokenizers = [{key: step[key] for key in step if key != "add_prefix_space"} for step in pretokenizers]
    steps = ([] if pretokenizers and normalizers == [SPACES] else normalizers), pretokenizers  # Metaspace does it, too
    scheme = next((name for name, known in PREFIXES.items() if steps == known), None)
    if scheme is None:
        raise ValueError(f"its normalizer and pre_tokenizer are {json.dumps(steps)[:300]}")
    return SentencePiece(ids, scores, byte_ids, vocabulary.get(unknown, 0), scheme)


def parse_byte_level(content: dict, specials: dict[str, int], merges: list[list[str]]) -> ByteLevel:
    """The byte-level BPE of a tokenizer.json. Raises ValueError on a step that is not supported."""
    model, to_byte = content["model"], {char: byte for byte, char in byte_alphabet().items()}
    normalizer = [step["type"] for step in list_steps(content.get("normalizer"), "normalizers")]
    if normalizer not in ([], ["NFC"]):
        raise ValueError(f"its normalizer is {', '.join(normalizer)}")
    split = parse_split(list_steps(content["pre_tokenizer"], "pretokenizers"))
    vocabulary = {text: i for text, i in model["vocab"].items() if text not in specials}
    merged = [vocabulary[left + right] for left, right in merges]
    unmerged = {i for text, i in vocabulary.items() if len(text) > 1} - set(merged)
    if merged == sorted(merged):
        ranks, ids = vocabulary, ()
    else:
        order = order_of_merging(vocabulary, merges)
        ranks, ids = {text: rank for rank, text in enumerate(order)}, tuple(vocabulary[text] for text in order)
    ranks = {bytes(to_byte[char] for char in text): rank for text, rank in ranks.items()}
    codec = ByteLevel(ranks, split, normalizer == ["NFC"], ids)
    all_ids = [*vocabulary.values(), *specials.values()]
    twice = len(set(all_ids)) < len(all_ids)
    if twice or (codec.missing_bytes and model.get("unk_token")) or model.get("end_of_word_suffix"):
        raise ValueError("an id is given twice, bytes without an id become <unk>, or words end in a mark")
    if unmerged and not model.get("ignore_merges"):  # with it, a whole word that is a token needs no merge
        raise ValueError("its merges leave tokens out")
    return codec


def order_of_merging(vocabulary: dict[str, int], merges: list[list[str]]) -> list[str]:
    """All tokens: single bytes, merged ones in order, others. Raises ValueError if a part is merged after the whole."""
    order = dict.fromkeys(sorted((text for text in vocabulary if len(text) == 1), key=vocabulary.get))
    for left, right in merges:  # tiktoken merges to the lowest rank first
        if not {left, right} <= order.keys() or left + right in order:
            raise ValueError("its merges are not in the order in which tokens are merged")
        order[left + right] = None
    return [*order, *(text for text in vocabulary if text not in order)]


def list_steps(section: dict | None, name: str) -> list[dict]:
    """The steps of a section of a tokenizer.json, which is null, one step, or a sequence of steps."""
    return [] if section is None else section[name] if section["type"] == "Sequence" else [section]


def parse_split(steps: list[dict]) -> str:
    """The pattern that cuts text into words. Raises ValueError if text is cut in a way that is not supported."""
    *cuts, last = steps or [{}]
    byte_level = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    match byte_level and cuts, last.get("use_regex", True):
        case [], True:
            return SPLIT_GPT2
        case [{"type": "Digits", "individual_digits": True}], True:
            return SPLIT_DIGITS
        case [{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}], False:
            if regex.sub(pattern, "", EVERY_KIND, timeout=5):  # tiktoken would drop the rest silently
                raise ValueError(f"the pattern {pattern!r} leaves text out")
            return pattern
    raise ValueError(f"text is cut by {json.dumps(steps)[:300]}")


def split_section(pattern: str, add_prefix_space: bool = False) -> dict:
    """The pre_tokenizer section of a tokenizer.json that cuts text by a pattern, for byte-level BPE."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


def byte_level_json(codec: ByteLevel) -> dict:
    """The sections of a tokenizer.json for byte-level BPE: how text is cut and merged."""
    to_unicode = byte_alphabet()
    name = {rank: "".join(to_unicode[b] for b in token) for token, rank in codec.ranks.items()}
    vocabulary = {token: codec.ids[rank] if codec.ids else rank for rank, token in name.items()}
    merges = [[name[codec.ranks[part]] for part in parts] for parts in codec.merges()]
    pre_tokenizer = split_section(codec.split)
    return {
        "normalizer": {"type": "NFC"} if codec.nfc else None,
        "pre_tokenizer": pre_tokenizer,
        "decoder": pre_tokenizer["pretokenizers"][-1],
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": merges},
    }


def sentencepiece_json(codec: SentencePiece) -> dict:
    """The same sections for SentencePiece. The merges are all of two pieces to a third, the best first."""
    normalizers, pretokenizers = PREFIXES[codec.scheme]
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    decoders += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": int(codec.scheme != "never"), "stop": 0}]
    vocabulary = codec.ids | {f"<0x{byte:02X}>": i for byte, i in enumerate(codec.byte_ids)}
    merges = [
        (-score, codec.ids[piece[:cut]], codec.ids[piece[cut:]], [piece[:cut], piece[cut:]])
        for piece, score in codec.scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in codec.ids and piece[cut:] in codec.ids
    ]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pretokenizers} if pretokenizers else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model | {"vocab": vocabulary, "merges": [parts for *_, parts in sorted(merges)]},
    }
