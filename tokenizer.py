"""Text to ids and back: byte-level BPE on tiktoken, and a small trainer for a vocabulary of one's own.

The files are Hugging Face's `tokenizer.json`, so that other tools load what is saved here. Text is only ever text:
`encode` knows no special token, those are inserted by id, so nobody can type one.
"""

import json
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

# Words, single digits and runs of punctuation, each with the space before it; then what space is left.
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIALS = ("<pad>", "<image>", "<s>", "</s>")  # </s> last: CLIP's text tower finds its end token as the highest id


class Tokenizer:
    """A vocabulary and its special tokens.

    Args: ranks: bytes of each ordinary token -> id, in order of merging. specials: name -> id. split: the pattern that
    cuts text into words before merging.
    """

    def __init__(self, ranks: dict[bytes, int], specials: dict[str, int], split: str = SPLIT):
        self.ranks, self.specials, self.split = ranks, specials, split
        self.encoding = tiktoken.Encoding("llava", pat_str=split, mergeable_ranks=ranks, special_tokens=specials)
        self.vocab_size = max([*ranks.values(), *specials.values()]) + 1
        self.pad_id, self.image_id, self.bos_id, self.eos_id = (specials[name] for name in SPECIALS)
        # Dialogues repeat their questions: with the cache, a batch of 64 is rendered in a tenth of the time.
        self._encode = lru_cache(maxsize=1 << 16)(lambda text: tuple(self.encoding.encode_ordinary(text)))

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Special tokens are never recognised in it: "</s>" becomes four ordinary pieces."""
        return list(self._encode(text))

    def decode(self, ids: list[int]) -> str:
        """Text of the ordinary tokens among `ids`; special ones are dropped, broken UTF-8 becomes U+FFFD."""
        special = set(self.specials.values())
        return self.encoding.decode([i for i in ids if i not in special])

    def save(self, folder: str | Path):
        """Write `tokenizer.json` as Hugging Face's tokenizers reads it."""
        to_unicode = byte_alphabet()
        name = {i: "".join(to_unicode[b] for b in token) for token, i in self.ranks.items()}
        merges = [[name[self.ranks[half]] for half in halves] for halves in self._merges()]
        added = [
            {"id": i, "content": token, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for token, i in self.specials.items()
        ]
        split = {"type": "Split", "pattern": {"Regex": self.split}, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        model = {"type": "BPE", "vocab": {text: i for i, text in name.items()}, "merges": merges}
        content = {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "decoder": byte_level,
            "model": model,
        }
        Path(folder, "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

    def _merges(self):
        """The two halves each merged token was made of, found by merging its bytes with the earlier ranks only."""
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                pairs = [self.ranks.get(a + b, rank) for a, b in pairwise(parts)]
                i = min(range(len(pairs)), key=pairs.__getitem__)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                yield parts

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read the `tokenizer.json` of a byte-level BPE model. Raises ValueError if it is another kind."""
        path = Path(folder, "tokenizer.json")
        try:
            return cls(*parse(json.loads(path.read_text(encoding="utf-8"))))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, regex.error) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: not the byte-level BPE of this project ({reason})") from None


def parse(content: dict) -> tuple[dict[bytes, int], dict[str, int], str]:
    """Ranks, specials and split pattern of a tokenizer.json; any of a dozen errors if it is something else."""
    specials = {token["content"]: token["id"] for token in content["added_tokens"]}
    missing = [name for name in SPECIALS if name not in specials]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    (split,) = (
        step["pattern"]["Regex"] for step in content["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split"
    )
    regex.compile(split)
    to_byte = {char: byte for byte, char in byte_alphabet().items()}
    vocabulary = {text: i for text, i in content["model"]["vocab"].items() if text not in specials}
    ranks = {bytes(to_byte[char] for char in text): i for text, i in vocabulary.items()}
    ids = [*ranks.values(), *specials.values()]
    if len(set(ids)) < len(ids) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("an id is given twice, or a byte has none")
    return ranks, specials, split


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte, in which tokenizer.json files spell their tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def train_bpe(texts: list[str], merges: int) -> Tokenizer:
    """Learn a vocabulary: merge the most frequent neighbouring pair, `merges` times (Sennrich et al. 2016).

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
    return Tokenizer(ranks, {name: len(ranks) + i for i, name in enumerate(SPECIALS)})
