"""Finds the objects that a text mentions, and those of them that an image does not have, by the rule of CHAIR.

Rohrbach et al. 2018, arXiv 1809.02156: a closed list of object names with synonyms; a mention is true if the name is
among the image's annotated boxes or in one of its reference captions.
    CHAIRi = false mentions / mentions        CHAIRs = texts with a false mention / texts
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from datagen.items import Item
from inputs.records import DataError
from world.scenes import SHAPES

LIST = Path(__file__).parent / "nouns.txt"
WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
IRREGULAR = {"man": "men", "woman": "women", "child": "children", "person": "persons", "mouse": "mice"}
IRREGULAR |= {"calf": "calves", "goose": "geese", "knife": "knives", "sheep": "sheep", "scissors": "scissors"}
IRREGULAR |= {"people": "peoples", "skis": "skis", "policeman": "policemen", "gentleman": "gentlemen"}


class Nouns:
    """A closed list of objects. Args: synonyms: other words for each name. Words are compared in lower case, singular
    and plural; the longest phrase at a place counts."""

    def __init__(self, synonyms: dict[str, Iterable[str]]):
        self.names, self.phrases = list(synonyms), {}
        for name, words in synonyms.items():
            for phrase in words:
                for form in {phrase, plural(phrase)}:
                    self.phrases.setdefault(tuple(WORD.findall(form.lower())), name)
        self.longest = max(map(len, self.phrases))

    def mentions(self, text: str) -> list[tuple[str, int]]:
        """Name and place of every mention, in order. A place is a character of `text`."""
        found = [(match[0].lower(), match.start()) for match in WORD.finditer(text)]
        words, result, i = [word for word, _ in found], [], 0
        is_toilet = "toilet" in words or "toilets" in words  # its seat is no chair
        while i < len(words):
            for length in range(min(self.longest, len(words) - i), 0, -1):
                name = self.phrases.get(tuple(words[i : i + length]))
                if name and not (is_toilet and words[i] in ("seat", "seats")):
                    result.append((name, found[i][1]))
                    break
            i += length
        return result

    def names_in(self, text: str) -> set[str]:
        return {name for name, _ in self.mentions(text)}

    def objects(self, item: Item) -> set[str]:
        """The objects of an image: its boxes, and what its captions mention."""
        texts = [*item.captions, *(f"{box[0]}, {plural(box[0])}" for box in item.boxes)]
        return set().union(*map(self.names_in, texts))

    def false_mentions(self, text: str, objects: set[str]) -> list[str]:
        """Names that a text mentions and the image does not have, each mention once (CHAIR's hallucinated words)."""
        return [name for name, _ in self.mentions(text) if name not in objects]


def plural(phrase: str) -> str:
    """A phrase with its last word in the plural."""
    *before, word = phrase.split()
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif re.search(r"(s|x|z|ch|sh)$", word):
        word += "es"
    elif re.search(r"[^aeiou]y$", word):
        word = word[:-1] + "ies"
    else:
        word += "s"
    return " ".join([*before, word])


@cache
def read_nouns(path: Path = LIST) -> Nouns:
    """The list in a file: one object a line, "name: other word, other word". Raises DataError."""
    synonyms = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            name, _, others = line.partition(":")
            words = [word.strip() for word in others.split(",") if word.strip()]
            if not WORD.search(name) or name.strip() in synonyms:
                raise DataError(f"{path}: line {number}: not 'name: word, word' with a new name")
            synonyms[name.strip()] = [name.strip(), *words]
    if not synonyms:
        raise DataError(f"{path}: names no objects")
    return Nouns(synonyms)


WORLD = Nouns({name: [name] for name in (*SHAPES, "sign")})


def nouns_of(item: Item, nouns: Nouns) -> Nouns:
    """The list to check an item with: the embedded world has words of its own."""
    return WORLD if item.scene else nouns


def chair(texts: Iterable[tuple[str, Item]], nouns: Nouns) -> dict[str, float]:
    """CHAIRi and CHAIRs of texts about items, as fractions, with their counts."""
    mentions = false = bad = count = 0
    for text, item in texts:
        wrong = nouns.false_mentions(text, nouns.objects(item))
        mentions, false = mentions + len(nouns.mentions(text)), false + len(wrong)
        bad, count = bad + bool(wrong), count + 1
    return {"CHAIRi": false / max(1, mentions), "CHAIRs": bad / max(1, count), "mentions": mentions, "texts": count}
