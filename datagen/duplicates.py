"""Near duplicates among many texts: MinHash signatures, bands to find candidates, exact Jaccard to decide.

Two texts are compared by their sets of three words in a row. The share of equal positions in two signatures estimates
the Jaccard similarity |A and B| / |A or B| of the sets (Broder 1997). Signatures are cut into bands; texts with an
equal band are candidates (locality-sensitive hashing), so no text is compared with all others.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

PERMUTATIONS, SEED, BANDS, ROWS = 128, 1, 25, 5  # finds a pair of Jaccard 0.8 with 99.99 %, one of 0.9 always
PRIME, MAX_HASH = np.uint64((1 << 61) - 1), np.uint64((1 << 32) - 1)


def make_permutations(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors a and offsets b of h -> (a * h + b) mod 2^61 - 1, drawn as datasketch draws them ("legacy" scheme)."""
    rng, end = np.random.RandomState(seed), int(PRIME)
    pairs = [[rng.randint(low, end, dtype=np.uint64) for low in (1, 0)] for _ in range(count)]
    return tuple(np.array(pairs, dtype=np.uint64).T)


FACTORS, OFFSETS = make_permutations(PERMUTATIONS, SEED)


def shingles(text: str, size: int = 3) -> set[str]:
    """All runs of `size` words in lower case; the whole text if it is shorter."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def signature(items: Iterable[str]) -> np.ndarray:
    """The MinHash signature of a set: (PERMUTATIONS,) uint64, the least value under each permutation.

    An item is hashed to the first four bytes of its SHA-1, little-endian. Products wrap at 2^64, as in datasketch.
    """
    hashes = [int.from_bytes(hashlib.sha1(item.encode()).digest()[:4], "little") for item in items]
    values = np.array(hashes, dtype=np.uint64)[:, None]  # (items, 1)
    return ((values * FACTORS + OFFSETS) % PRIME & MAX_HASH).min(axis=0)


def jaccard(a: set, b: set) -> float:
    return len(a & b) / max(1, len(a | b))


class DuplicateFinder:
    """Texts seen so far. `find` returns the first one that a new text is a near duplicate of."""

    def __init__(self):
        self.texts, self.buckets = {}, defaultdict(list)

    def find(self, key: str, text: str, threshold) -> str | None:
        """Add a text; return the key of an earlier one with a Jaccard similarity of at least threshold(its key)."""
        own = shingles(text)
        values = signature(own)
        bands = [hash((i, values[i * ROWS : (i + 1) * ROWS].tobytes())) for i in range(BANDS)]  # 8 bytes each
        candidates = {other: None for band in bands for other in self.buckets[band]}  # in order, each once
        for other in candidates:
            if jaccard(own, shingles(self.texts[other])) >= threshold(other):
                return other
        self.texts[key] = text
        for band in bands:
            self.buckets[band].append(key)
        return None
