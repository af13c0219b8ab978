"""Text to ids and back: byte-level BPE on tiktoken, LLaMA's and CLIP's from bpe.py, and a trainer for one's own.

What is saved is Hugging Face's `tokenizer.json`, so that other tools load it. Text is only ever text: `encode` knows
no special token, those are inserted by id, so nobody can type one.
"""

import base64
import json
import struct
import unicodedata
import zlib
from collections import Counter
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from inputs.bpe import (
    SPACE,
    ClipBPE,
    SentencePiece,
    clip_from_json,
    from_json,
    merges_of,
    read_clip,
    read_llama2c,
    read_model,
)
from inputs.files import read_json, write_json

# Words, single digits and runs of punctuation, each with the space before it; then what space is left.
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLIT_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's once every digit is cut off, as SmolLM2 has it: spaces before a digit end a piece, as where the text ends.
SPLIT_DIGITS = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
SPLIT_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<pad>", "<image>", "<s>", "</s>")  # </s> last: CLIP's text tower finds its end token as the highest id
ROLES = {  # which names stand for what, in files that do not say
    "pad": ("<pad>", "<|finetune_right_pad_id|>", "<unk>", "<|endoftext|>", "<|end_of_text|>"),
    "image": ("<image>",),
    "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>"),
}


class ByteLevel:
    """Byte-level BPE, on tiktoken. Args: ranks: bytes of each token -> id, in order of merging. split: the pattern
    that cuts text into words before merging. nfc: put accents and letters together first, as Qwen2 does.

    Bytes without an id, of which SmolLM2 has some, are left out of the text, as Hugging Face's tokenizers does.
    """

    def __init__(self, ranks: dict[bytes, int], split: str, nfc: bool = False):
        self.ranks, self.split, self.nfc = ranks, split, nfc
        self.lacking = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        self.encoding = tiktoken.Encoding("llava", pat_str=split, mergeable_ranks=ranks, special_tokens={})
        self.words, self.highest_id = set(ranks.values()), max(ranks.values())

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if not (self.lacking and set(self.lacking) & set(text.encode())):
            return self.encoding.encode_ordinary(text)
        words = (word.encode().translate(None, self.lacking) for word in regex.findall(self.split, text))
        return [i for word in words if word for i in self.encoding._encode_single_piece(word)]

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode([i for i in ids if i in self.words])  # a vocabulary may have rows without a token

    def merges(self):
        """The two halves each merged token was made of, found by merging its bytes with the earlier ranks only.

        LLaMA-3 has tokens that no merge leads to: like tiktoken, its files take a whole word if it is a token.
        """
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                pairs = [self.ranks.get(a + b, rank) for a, b in pairwise(parts)]
                i = min(range(len(pairs)), key=pairs.__getitem__)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2 and all(part in self.ranks for part in parts):
                yield parts


class Tokenizer:
    """A vocabulary behind one interface, whichever way it cuts text.

    Args: codec: ByteLevel, SentencePiece or ClipBPE. specials: name -> id. roles: "bos", "eos", "pad", "image" ->
    name. legacy: of SentencePiece, whether text after a special token gets a space in front, as at the start.
    """

    def __init__(
        self,
        codec: ByteLevel | SentencePiece | ClipBPE,
        specials: dict[str, int],
        roles: dict[str, str],
        legacy: bool = True,
    ):
        self.codec, self.specials, self.roles, self.legacy = codec, specials, roles, legacy
        if "eos" not in roles:
            raise ValueError("no token that ends a text")
        # Dialogues repeat their questions: with the cache, a batch of 64 is rendered in a tenth of the time.
        self._encode = lru_cache(maxsize=1 << 16)(lambda text, prefix: tuple(codec.encode(text, prefix)))

    def __reduce__(self):
        """For pickle: what is remembered of texts stays behind."""
        return Tokenizer, (self.codec, self.specials, self.roles, self.legacy)

    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text gets."""
        codec = {name: value for name, value in vars(self.codec).items() if isinstance(value, (dict, list, str, int))}
        parts = [type(self.codec).__name__, codec, self.specials, self.roles, self.legacy]
        return sha256(repr(parts).encode()).hexdigest()

    def role(self, name: str) -> int | None:
        return self.specials[self.roles[name]] if name in self.roles else None

    bos_id = property(lambda self: self.role("bos"))  # None: texts start without
    eos_id = property(lambda self: self.role("eos"))
    pad_id = property(lambda self: self.role("pad"))
    image_id = property(lambda self: self.role("image"))  # None: the model takes no images

    @property
    def vocab_size(self) -> int:
        return max(self.codec.highest_id, *self.specials.values()) + 1

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """Ids of a text. Special tokens are never recognized in it: "</s>" becomes four ordinary pieces.

        Args: prefix: the text starts here; False: it goes on from other text (SentencePiece cares).
        """
        return list(self._encode(text, prefix))

    def decode(self, ids: list[int]) -> str:
        """Text of the ordinary tokens among `ids`; special ones are dropped, broken UTF-8 becomes U+FFFD."""
        special = set(self.specials.values())
        return self.codec.decode([i for i in ids if i not in special])

    def add_special(self, name: str) -> int:
        """Id of a special token, a new one at the end if there is none of that name."""
        return self.specials.setdefault(name, self.vocab_size)

    def save(self, folder: str | Path):
        """Write `tokenizer.json` as Hugging Face's tokenizers reads it, and `tokenizer_config.json` with the roles."""
        added = [
            {"id": i, "content": token, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for token, i in sorted(self.specials.items(), key=lambda item: item[1])
        ]
        spell = byte_level_json if isinstance(self.codec, ByteLevel) else sentencepiece_json
        content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
        content |= spell(self) | {"post_processor": None}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        if bos := self.roles.get("bos"):  # set in front of every text
            begin = {"SpecialToken": {"id": bos, "type_id": 0}}
            named = {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}}
            single = {"single": [begin, text], "pair": [begin, text, begin, text], "special_tokens": named}
            content["post_processor"] = {"type": "TemplateProcessing"} | single
        settings = {f"{role}_token": name for role, name in self.roles.items()}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "legacy": self.legacy}
        write_json(Path(folder, "tokenizer.json"), content)
        write_json(Path(folder, "tokenizer_config.json"), settings)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read a folder's tokenizer: tokenizer.json (byte-level BPE, LLaMA's or CLIP's), tokenizer.model
        (SentencePiece, or LLaMA-3's for tiktoken), llama2.c's tok*.bin or OpenAI's *.txt.gz. Raises ValueError."""
        folder = Path(folder)
        added, named, legacy = read_settings(folder / "tokenizer_config.json")
        names = ("tokenizer.json", "tokenizer.model", "tok*.bin", "*.txt.gz")
        path = next((path for name in names for path in sorted(folder.glob(name))), folder / names[0])
        try:
            if path.suffix == ".json":
                codec, specials, bos = parse(json.loads(path.read_text(encoding="utf-8")))
                roles = roles_of(specials, named | {"bos": bos}) if bos else roles_of(specials, named)
                if not bos:  # nothing stands in front of a text, whatever tokens there are
                    roles.pop("bos", None)
            else:
                codec, specials = read_vocabulary(path, legacy)
                specials |= added if path.suffix == ".model" else {}
                roles = roles_of(specials, named)
            return cls(codec, specials, roles, legacy=not getattr(codec, "unless_spaced", False))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        except CORRUPT as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: not a tokenizer that is built ({reason})") from None


# ---------------------------------------------------------------------------------------------------------------------
# files

MOST_IDS = 1 << 24  # far beyond any vocabulary: an id above is a broken file, not a reason to reserve memory
CORRUPT = (EOFError, ValueError, LookupError, TypeError, AttributeError, RecursionError)  # what broken files raise
CORRUPT += (struct.error, zlib.error, regex.error)
EVERY_KIND = "".join(map(chr, range(0x250))) + "\u2028\u3000猫が👩‍👩‍👧\u0301\ufeff"  # of character
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>"]
LLAMA3_SPECIALS += [RESERVED[4], "<|eot_id|>", *RESERVED[5:]]  # in the order of Meta's code: ids 128,000 to 128,255


def read_settings(path: Path) -> tuple[dict[str, int], dict[str, str], bool]:
    """Of a tokenizer_config.json: ids of added tokens, the names that roles have, and "legacy". Raises ValueError."""
    settings = read_json(path) if path.exists() else {}
    try:
        added = {token["content"]: int(i) for i, token in (settings.get("added_tokens_decoder") or {}).items()}
        named = {role: token for role in ROLES if (token := settings.get(f"{role}_token"))}
        named = {role: token["content"] if isinstance(token, dict) else token for role, token in named.items()}
        check_ids(added)
        check_ids(dict.fromkeys(named.values(), 0))
    except CORRUPT as error:
        raise ValueError(f"{path}: its added_tokens_decoder or a *_token is not one ({error!r})") from None
    return added, named, bool(settings.get("legacy", True))


def check_ids(vocabulary: dict[str, int]):
    """Raises ValueError on a name that is no text or an id that is none."""
    for name, i in vocabulary.items():
        if type(name) is not str or type(i) is not int or not 0 <= i < MOST_IDS:
            raise ValueError(f"the id of {name!r} is {i!r}")


def read_vocabulary(path: Path, legacy: bool) -> tuple[ByteLevel | SentencePiece | ClipBPE, dict[str, int]]:
    """Codec and specials of a file that is no JSON. Raises any of CORRUPT."""
    if path.suffix == ".gz":
        return read_clip(path, byte_alphabet())
    if path.suffix == ".bin":
        return read_llama2c(path)
    if not path.read_bytes()[:64].split(b"\n")[0].endswith(b" 0"):
        return read_model(path, unless_spaced=not legacy)
    lines = [line.split() for line in path.read_bytes().splitlines()]  # LLaMA-3's: a base64 token and its rank
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if list(ranks.values()) != list(range(len(lines))) or len(lines) < 256:  # its special tokens are counted from there
        raise ValueError("tokens are given twice, or missing")
    codec = ByteLevel(ranks, SPLIT_LLAMA3)
    if codec.lacking:
        raise ValueError("a byte has no id")
    return codec, {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIALS)}


def roles_of(specials: dict[str, int], named: dict[str, str]) -> dict[str, str]:
    """Which special token is "bos", "eos", "pad", "image": as the settings say, or else the first of ROLES there is."""
    roles = {}
    for role, usual in ROLES.items():
        found = [name for name in (named.get(role), *usual) if name in specials]
        if found:
            roles[role] = found[0]
    return {"pad": roles["eos"]} | roles if "eos" in roles else roles


def byte_level_json(tokenizer: Tokenizer) -> dict:
    """The sections of a tokenizer.json that say how a byte-level BPE cuts text."""
    codec, to_unicode = tokenizer.codec, byte_alphabet()
    name = {i: "".join(to_unicode[b] for b in token) for token, i in codec.ranks.items()}
    merges = [[name[codec.ranks[half]] for half in halves] for halves in codec.merges()]
    split = {"type": "Split", "pattern": {"Regex": codec.split}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": {"type": "NFC"} if codec.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": {v: k for k, v in name.items()}, "merges": merges},
    }


def sentencepiece_json(tokenizer: Tokenizer) -> dict:
    """The same of a SentencePiece vocabulary; where the space in front goes tells legacy from not."""
    codec, legacy = tokenizer.codec, tokenizer.legacy
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefixed = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
    steps = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    back = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    vocabulary = codec.ids | {f"<0x{byte:02X}>": i for byte, i in enumerate(codec.byte_ids)}
    vocabulary |= {name: i for name, i in tokenizer.specials.items() if i < len(vocabulary) + 3}
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    return {
        "normalizer": prefixed if legacy else None,
        "pre_tokenizer": None if legacy else steps,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": model | {"vocab": vocabulary, "merges": merges_of(codec)},
    }


def parse(content: dict) -> tuple[ByteLevel | SentencePiece | ClipBPE, dict[str, int], str]:
    """Codec, specials and the token set in front of every text ("" for none) of a tokenizer.json.

    Raises any of a dozen errors if it is something else.
    """
    specials, model = {token["content"]: token["id"] for token in content["added_tokens"]}, content["model"]
    check_ids(model["vocab"] | specials)
    if model.get("type", "BPE") != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise ValueError("its model is not plain BPE")
    first = [
        step["single"][0].get("SpecialToken", {}).get("id", "")
        for step in steps_of(content.get("post_processor"), "processors")
        if step["type"] == "TemplateProcessing"
    ]
    if model.get("byte_fallback"):
        return from_json(model, specials, spaces_of(content)), specials, (first or [""])[0]
    if model.get("end_of_word_suffix") == "</w>":
        return clip_from_json(model, specials, byte_alphabet()), specials, (first or [""])[0]
    normalizer = [step["type"] for step in steps_of(content.get("normalizer"), "normalizers")]
    if normalizer not in ([], ["NFC"]):
        raise ValueError(f"its normalizer is {', '.join(normalizer)}")
    split = split_of(steps_of(content["pre_tokenizer"], "pretokenizers"))
    to_byte = {char: byte for byte, char in byte_alphabet().items()}
    vocabulary = {text: i for text, i in model["vocab"].items() if text not in specials}
    ranks = {bytes(to_byte[char] for char in text): i for text, i in vocabulary.items()}
    ids = [*ranks.values(), *specials.values()]
    codec = ByteLevel(ranks, split, nfc=normalizer == ["NFC"])
    if len(set(ids)) < len(ids) or (codec.lacking and model.get("unk_token")) or model.get("end_of_word_suffix"):
        raise ValueError("an id is given twice, what has none gets <unk>, or words end in a mark")
    check_merges(model, vocabulary)
    return codec, specials, (first or [""])[0]


def check_merges(model: dict, vocabulary: dict[str, int]):
    """We join what gives the lowest id. Raises ValueError if the file's list of merges says otherwise."""
    merges = ("".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model["merges"])
    joined = [vocabulary[text] for text in merges]
    alone = {i for text, i in vocabulary.items() if len(text) > 1} - set(joined)
    if joined != sorted(joined) or (alone and not model.get("ignore_merges")):
        raise ValueError("its merges are not in the order of the ids, or leave tokens out")


def spaces_of(content: dict) -> bool:
    """Whether a tokenizer.json of SentencePiece leaves out its first space where the text brings one ("non-legacy").

    Raises ValueError if it treats spaces, or text, in a way that is not built.
    """
    normalizer = [step["type"] for step in steps_of(content["normalizer"], "normalizers")]
    cut = [(step["type"], step.get("prepend_scheme")) for step in steps_of(content["pre_tokenizer"], "pretokenizers")]
    if normalizer == ["Prepend", "Replace"] and not cut:
        return False
    if not normalizer and cut == [("Metaspace", "first")]:
        return True
    raise ValueError(f"its normalizer is {normalizer}, its pre_tokenizer {cut}")


def steps_of(part: dict | None, name: str) -> list[dict]:
    """A section of a tokenizer.json is one step, a sequence of steps, or nothing."""
    return [] if part is None else part[name] if part["type"] == "Sequence" else [part]


def split_of(steps: list[dict]) -> str:
    """The pattern that cuts text into words. Raises ValueError if it is cut in another way."""
    *cuts, last = steps
    kinds, pattern = [step["type"] for step in cuts], None
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if not last.get("use_regex", True):
            if kinds == ["Split"] and cuts[0]["behavior"] == "Isolated" and not cuts[0]["invert"]:
                pattern = cuts[0]["pattern"]["Regex"]
        elif not kinds:
            pattern = SPLIT_GPT2
        elif kinds == ["Digits"] and cuts[0]["individual_digits"]:
            pattern = SPLIT_DIGITS
    if pattern is None:
        raise ValueError(f"text is cut by {json.dumps(steps)[:300]}")
    if regex.sub(pattern, "", EVERY_KIND):  # tiktoken would drop it
        raise ValueError(f"the pattern {pattern!r} leaves text out")
    return pattern


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte, in which tokenizer.json files spell their tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def train_bpe(texts: list[str], merges: int) -> Tokenizer:
    """Learn a vocabulary: merge the most frequent neighboring pair, `merges` times (Sennrich et al. 2016).

    It starts from the 256 bytes, so any text can be encoded. Ties go to the pair that sorts first, so the same texts
    give the same vocabulary on every machine. Stops early when no pair occurs twice.
    """
    counts = Counter(word for text in texts for word in regex.findall(SPLIT, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    ranks = {bytes([b]): b for b in range(256)}
    for _ in range(merges):
        pairs = Counter()
        for parts, n in words:
            for pair in pairwise(parts):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        ranks[best[0] + best[1]] = len(ranks)
        for parts, _ in words:
            i = 0  # from the left, as every encoder will
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
                i += 1
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return Tokenizer(ByteLevel(ranks, SPLIT), specials, roles_of(specials, {}))
