"""Compare our reading of object mentions with CHAIR's own code, on captions of photographs.

python tests/tools/datagen_chair.py --photos photos.json --chair chair.py --synonyms synonyms.txt --inflect inflect.py

chair.py and synonyms.txt are those of github.com/LisaAnne/Hallucination (utils/, data/), inflect.py is that of
github.com/clips/pattern (pattern/text/en/); nltk must be installed. The code is Python 2: the one method that reads a
caption is cut out and run, with NLTK's word tokenizer and pattern's singularize.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from datagen.items import read_items  # noqa: E402
from datagen.nouns import Nouns, chair, read_nouns  # noqa: E402


def load_singularize(path: Path):
    """pattern's function, from the part of its file that needs nothing else."""
    source = path.read_text("utf-8")
    begin, end = source.index("plural_prepositions"), source.index("#### VERB CONJUGATION")
    space = {"re": re, "NOUN": "NN", "ADJECTIVE": "JJ", "VERB": "VB"}
    exec(source[begin:end], space)
    return space["singularize"]


def load_chair(path: Path, synonyms: Path, inflect: Path):
    """caption_to_words(caption) -> (words, names), and the pairs of words that count as one."""
    from nltk.tokenize.destructive import NLTKWordTokenizer

    def tokenize(text: str) -> list[str]:  # nltk.word_tokenize, with sentences split by a rule instead of by Punkt
        return [word for part in re.split(r"(?<=[.!?])\s+", text) for word in NLTKWordTokenizer().tokenize(part)]

    source = path.read_text()
    source = source[source.index("class CHAIR") : source.index("    def _load_generated_captions")]
    method = path.read_text()
    source += method[method.index("    def caption_to_words") : method.index("    def get_annotations_from_segments")]
    source = source.replace("'data/synonyms.txt'", repr(str(synonyms)))
    space = {"nltk": SimpleNamespace(word_tokenize=tokenize), "singularize": load_singularize(inflect)}
    exec(source, space)
    official = space["CHAIR"]([], "")
    return official.caption_to_words, official.double_word_dict


def published_nouns(synonyms: Path, pairs: dict[str, str]) -> Nouns:
    """CHAIR's list in our form, without what its code never finds: three words, and words after a second blank."""
    rows = [line.strip().split(", ") for line in synonyms.read_text().splitlines()]
    rows = [[word for word in row if word == word.strip() and word.count(" ") < 2] for row in rows]
    name_of = {word: row[0] for row in rows for word in row}
    lists = {row[0]: list(row) for row in rows}
    for pair, word in pairs.items():
        if word in name_of:
            lists[name_of[word]].append(pair)
    return Nouns(lists)


def main():
    """Print how many captions have the same mentions, and both CHAIR scores of other people's captions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("photos", "chair", "synonyms", "inflect"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    official, pairs = load_chair(args.chair, args.synonyms, args.inflect)
    theirs, ours = published_nouns(args.synonyms, pairs), read_nouns()
    items = read_items([args.photos], args.photos.parent / "images", False, False)
    captions = [caption for item in items for caption in item.captions]
    for title, nouns in (("CHAIR's list", theirs), ("our list", ours)):
        same, missed, added = 0, Counter(), Counter()
        for caption in captions:
            expected, found = official(caption)[1], [name for name, _ in nouns.mentions(caption)]
            same += expected == found
            missed.update(Counter(expected) - Counter(found))
            added.update(Counter(found) - Counter(expected))
            if nouns is theirs and expected != found:
                print(f"  {caption!r}: CHAIR {expected}, ours {found}")
        differ = f"missed {dict(missed)}, added {dict(added)}"
        print(f"{title}: {same} of {len(captions)} captions with equal mentions; {differ}")
    for title, nouns in (("CHAIR's list", theirs), ("our list", ours)):
        rows = []
        for item in items:  # one caption against boxes and the four others
            for i, caption in enumerate(item.captions):
                others = SimpleNamespace(captions=item.captions[:i] + item.captions[i + 1 :], boxes=item.boxes)
                rows.append((caption, others))
        print(title, json.dumps({name: round(value, 4) for name, value in chair(rows, nouns).items()}))


if __name__ == "__main__":
    main()
