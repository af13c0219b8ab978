"""A tokenizer with special tokens: text to ids and back; and a trainer for new vocabularies.

A tokenizer is saved as Hugging Face's `tokenizer.json`, so that other programs can load it. `encode` recognizes no
special tokens; they are inserted by id, so a user cannot type one. Added tokens that are not special are found.
"""

import struct
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import regex

from inputs.added_tokens import AddedToken, compile_names, content_of, read_added, special_names, split_text
from inputs.bpe import SPACE, ByteLevel, Codec, PickledByFields, SentencePiece
from inputs.files import read_optional_json, write_json
from inputs.gguf_files import find_gguf
from inputs.gguf_vocabularies import read_gguf_vocabulary
from inputs.vocabularies import MAKE, SPLIT, byte_level_json, check_ids, read_vocabulary, sentencepiece_json

SPECIALS = ("<pad>", "<image>", "<s>", "</s>")  # </s> last: CLIP's text tower finds its end token as the highest id
ROLES = {  # the usual special tokens of each role, for files that do not name one
    "pad": ("<pad>", "<|finetune_right_pad_id|>", "<unk>", "<|endoftext|>", "<|end_of_text|>"),
    "image": ("<image>",),
    "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>"),
}
NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tok*.bin", "*.txt.gz")  # the first found is read
MARKERS = {"<|im_start|>", "<|start_header_id|>", "<|end_header_id|>"}  # other names of templates, always special
CORRUPT = (EOFError, ValueError, LookupError, TypeError, AttributeError, RecursionError)  # errors of malformed files
CORRUPT += (struct.error, zlib.error, regex.error)


@dataclass(eq=False)
class Tokenizer(PickledByFields):
    """A vocabulary with its special tokens: one interface to all codecs."""

    codec: Codec  # turns ordinary text into ids
    specials: dict[str, int]  # name -> id
    roles: dict[str, str]  # "bos", "eos", "pad", "image" -> name
    legacy: bool = True  # SentencePiece: text after an added token gets a space in front, as at the start of a text
    added: dict[str, AddedToken] = field(default_factory=dict)  # those that a file lists; if not special, words

    def __post_init__(self):
        if "eos" not in self.roles:
            raise ValueError("no token that ends a text")
        self.words = {name: token for name, token in self.added.items() if name and name not in self.specials}
        normalize = self.codec.normalize
        spelled = {normalize(name) if token.normalized else name: token for name, token in self.words.items()}
        raw = {name: token for name, token in spelled.items() if not token.normalized}
        normalized = {name: token for name, token in spelled.items() if token.normalized}
        self.finders = [(compile_names(tokens), tokens) for tokens in (raw, normalized)]  # as split_text takes them
        self.word_ids = {token.id: name for name, token in spelled.items()}
        # Dialogues repeat their questions: with this cache, a batch of 64 is rendered in a tenth of the time.
        self._encode = lru_cache(maxsize=1 << 16)(self.encode_uncached)

    def fingerprint(self) -> str:
        """A hash of everything that the ids of a text depend on: the fields of this class and of the codec."""
        return sha256(repr(self).encode()).hexdigest()

    def role(self, name: str) -> int | None:
        return self.specials[self.roles[name]] if name in self.roles else None

    bos_id = property(lambda self: self.role("bos"))  # None: texts start without one
    eos_id = property(lambda self: self.role("eos"))
    pad_id = property(lambda self: self.role("pad"))
    image_id = property(lambda self: self.role("image"))  # None: the model takes no images

    @property
    def vocab_size(self) -> int:
        return max(self.codec.highest_id, *self.specials.values(), *self.word_ids) + 1

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """Ids of a text. Special tokens are not recognized in it: "</s>" becomes ordinary pieces.

        Args: prefix: False if the text continues another one; it only matters for SentencePiece.
        """
        return self._encode(text, prefix).copy()

    def encode_uncached(self, text: str, prefix: bool) -> list[int]:
        ids = []
        for part, word in split_text(text, *self.finders[0]):
            normalized = self.codec.normalize(part, prefix)
            for rest, inner in [("", word)] if word else split_text(normalized, *self.finders[1]):
                ids += [inner.id] if inner else self.codec.encode_normalized(rest, prefix)
                prefix = self.legacy
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ordinary tokens among `ids`; special ones are dropped, broken UTF-8 becomes U+FFFD."""
        special = set(self.specials.values())
        return self.codec.decode([i for i in ids if i not in special], self.word_ids)

    def add_special(self, name: str) -> int:
        """The id of the special token `name`, which is added at the end if there is none."""
        i = self.specials.setdefault(name, self.added[name].id if name in self.words else self.vocab_size)
        if name in self.added:
            self.added[name] = replace(self.added[name], special=True)
        self.__post_init__()  # it is no word any longer
        return i

    def save(self, folder: str | Path):
        """Write `tokenizer.json` for Hugging Face's tokenizers, and `tokenizer_config.json` with the roles."""
        tokens = {name: self.added.get(name, AddedToken(i)) for name, i in self.specials.items()} | self.words
        by_id = sorted(tokens.items(), key=lambda item: item[1].id)
        added = [{"id": token.id, "content": name} | asdict(token) for name, token in by_id]
        content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
        content |= byte_level_json(self.codec) if isinstance(self.codec, ByteLevel) else sentencepiece_json(self.codec)
        vocabulary = content["model"]["vocab"]
        vocabulary |= {name: token.id for name, token in tokens.items() if token.id < self.codec.highest_id}
        after = sorted({token.id for token in tokens.values()} - set(vocabulary.values()))
        if after != list(range(len(vocabulary), len(vocabulary) + len(after))):  # as tokenizers would number them
            vocabulary |= {name: token.id for name, token in tokens.items()}
        content["post_processor"] = None
        if bos := self.roles.get("bos"):  # set in front of every text
            begin, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
            named = {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}}
            single = {"single": [begin, text], "pair": [begin, text, begin, text], "special_tokens": named}
            content["post_processor"] = {"type": "TemplateProcessing"} | single
        settings = {f"{role}_token": name for role, name in self.roles.items()}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "legacy": self.legacy}
        write_json(Path(folder, "tokenizer.json"), content)
        write_json(Path(folder, "tokenizer_config.json"), settings)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read a folder's tokenizer. Raises ValueError.

        Formats: tokenizer.json (byte-level BPE, LLaMA's or CLIP's), tokenizer.model (SentencePiece, or LLaMA-3's for
        tiktoken), vocab.json with merges.txt (byte-level BPE), llama2.c's tok*.bin, OpenAI's *.txt.gz, a GGUF.
        """
        folder = Path(folder)
        path = folder / "tokenizer_config.json"
        settings = read_optional_json(path)
        try:
            added, settings = read_added(folder, settings)
            check_ids({name: token.id for name, token in added.items()})
            parse_roles(settings)
            path = find_vocabulary(folder) or folder / NAMES[0]
            if not path.exists():
                raise OSError(f"No such file, nor {', '.join(NAMES[1:])}; {MAKE}")
            is_gguf = path.suffix == ".gguf"
            codec, tokens, settings, bos = read_gguf_vocabulary(path) if is_gguf else read_vocabulary(path, settings)
            if path.suffix == ".model" and isinstance(codec, SentencePiece):  # found before the prefix is there
                added = {name: replace(token, normalized=False) for name, token in added.items()}
            tokens = merge_added(codec, tokens, added if path.suffix in (".json", ".model") else {})
            special = MARKERS.union(*ROLES.values(), special_names(settings))
            tokens |= {name: replace(tokens[name], special=True) for name in special & tokens.keys()}
            specials = {name: token.id for name, token in tokens.items() if token.special}
            roles = find_roles(specials, parse_roles(settings) | ({"bos": bos} if bos else {}))
            if bos == "":  # no token is set in front of a text, even if there is one of that name
                roles.pop("bos", None)
            return cls(codec, specials, roles, getattr(codec, "scheme", "") != "first", tokens)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        except CORRUPT as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: not a supported tokenizer ({reason})") from None


def find_vocabulary(folder: Path) -> Path | None:
    """The file with the vocabulary of a folder, or of a GGUF file, None without one."""
    return find_gguf(folder) or next((path for name in NAMES for path in sorted(folder.glob(name))), None)


def parse_roles(settings: dict) -> dict[str, str]:
    """The names of special tokens by role, from a tokenizer_config.json."""
    named = {role: content_of(token) for role in ROLES if (token := settings.get(f"{role}_token"))}
    check_ids(dict.fromkeys(named.values(), 0))
    return named


def merge_added(codec: Codec, tokens: dict[str, AddedToken], more: dict[str, AddedToken]) -> dict[str, AddedToken]:
    """The added tokens of a vocabulary file, and those listed beside it, whose flags hold. Raises ValueError."""
    taken = {token.id: name for name, token in tokens.items()}
    for name, token in more.items():
        piece = codec.spelled.get(token.id, b"").decode(errors="replace")
        other = taken.get(token.id, piece) if token.special or piece != name.replace(SPACE, " ") else ""
        if name not in tokens and other:
            raise ValueError(f"{name!r} has the id {token.id}, which is that of {other!r}")
        taken[token.id] = name
    return tokens | {name: replace(token, id=tokens.get(name, token).id) for name, token in more.items()}


def find_roles(specials: dict[str, int], named: dict[str, str]) -> dict[str, str]:
    """The special token of each role: `named` by the settings, else the first in ROLES that exists."""
    found = {role: [name for name in (named.get(role), *usual) if name in specials] for role, usual in ROLES.items()}
    roles = {role: names[0] for role, names in found.items() if names}
    return {"pad": roles["eos"]} | roles if "eos" in roles else roles


def train_bpe(texts: list[str], merges: int) -> Tokenizer:
    """Learn a byte-level vocabulary: merge the most frequent neighboring pair, `merges` times (Sennrich et al. 2016).

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
            i = 0  # from the left, like every encoder
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
                i += 1
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return Tokenizer(ByteLevel(ranks, SPLIT), specials, find_roles(specials, {}))
