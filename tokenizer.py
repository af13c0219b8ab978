"""Text to ids and back: byte-level BPE on tiktoken, and a small trainer for a vocabulary of one's own.

The files are Hugging Face's `tokenizer.json`, so that other tools load what is saved here. Text is only ever text:
`encode` knows no special token, those are inserted by id, so nobody can type one.
"""

import json
from collections import Counter
from functools import lru_cache
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
                pairs = [self.ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
                i = min(range(len(pairs)), key=pairs.__getitem__)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                yield parts

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read the `tokenizer.json` of a byte-level BPE model. Raises ValueError if it is another kind."""
        path = Path(folder, "tokenizer.json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        specials = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        model, steps = content["model"], content.get("pre_tokenizer", {}).get("pretokenizers", [])
        splits = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
        missing = [name for name in SPECIALS if name not in specials]
        if model.get("type") != "BPE" or len(splits) != 1 or missing:
            raise ValueError(f"{path}: only this project's byte-level BPE is read; missing here: {missing or 'a Split'}")
        to_byte = {char: byte for byte, char in byte_alphabet().items()}
        ranks = {bytes(to_byte[c] for c in text): i for text, i in model["vocab"].items() if text not in specials}
        return cls(ranks, specials, splits[0])


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
            for pair in zip(parts, parts[1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        ranks[best[0] + best[1]] = len(ranks)
        for parts, _ in words:
            for i in range(len(parts) - 2, -1, -1):  # from the right, so that replaced positions stay valid
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
    return Tokenizer(ranks, {name: len(ranks) + i for i, name in enumerate(SPECIALS)})
