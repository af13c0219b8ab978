"""A teacher without a model or a network: questions and answers from templates over what is known about an image.

For scenes of the embedded world the sentences are the world's own (world/language.py). For photographs they follow from
boxes and captions. Every answer is true if the boxes and captions are.
"""

import random
import re
from collections import defaultdict

from datagen.asking import Request, Turns, box_text
from datagen.items import Box, Item
from datagen.nouns import Nouns, plural
from world.language import CELL_PHRASES, FAMILIES, join_list

TURNS = 4  # questions of a conversation
SCENE_FAMILIES = {  # of the world's questions, by kind
    "conversation": ("existence", "color", "shape", "counting", "position", "reading"),
    "detail": ("description",),
    "reasoning": ("relation", "comparison"),
}
TRIES = 8  # draws of a question, as some leave nothing to ask
PEOPLE = {"person": "people"}  # plurals that sound better than those of the list of nouns


def ask_templates(request: Request, nouns: Nouns) -> Turns:
    """Turns about an item, an empty list if it leaves nothing to ask. The request's id seeds the choices."""
    rng, item = random.Random(request.id), request.item
    if request.kind == "referring":
        return refer(item, rng)
    if item.scene:
        return ask_scene(item, request.kind, rng)
    return {"conversation": converse, "detail": describe, "reasoning": reason}[request.kind](item, rng, nouns)


def ask_scene(item: Item, kind: str, rng: random.Random) -> Turns:
    """Turns from the world's own questions: one, or TURNS different ones in a conversation."""
    families, turns = SCENE_FAMILIES[kind], {}
    most = TURNS if kind == "conversation" else 1
    for family in rng.sample(families, len(families)) * (1 if kind == "conversation" else TRIES):
        pair = FAMILIES[family](item.scene, rng)
        if pair and len(turns) < most:
            turns.setdefault(*pair)
    return list(turns.items())


def refer(item: Item, rng: random.Random) -> Turns:
    """Up to three turns about objects that their name alone tells apart: where they are, or what is at a place."""
    turns = []
    for name, *corners in rng.sample(single_boxes(item), min(3, len(single_boxes(item)))):
        box = box_text(corners)
        if rng.random() < 0.5:
            turns.append((f"Where is the {name}? Answer with its box.", f"The {name} is at {box}."))
        else:
            turns.append((f"What is at {box}?", f"At this place is {article(name)}."))
    return turns


def single_boxes(item: Item) -> list[Box]:
    """The boxes whose name no other box has. A scene's names also say size and color."""
    names = [box[0] for box in item.boxes]
    return [box for box in item.boxes if names.count(box[0]) == 1 and box[0] not in item.uncounted]


# ---------------------------------------------------------------------------------------------------------------------
# photographs


def count_boxes(item: Item) -> dict[str, int]:
    """Number of boxes by name, of the names that can be counted."""
    counts = defaultdict(int)
    for name, *_ in item.boxes:
        counts[name] += name not in item.uncounted
    return {name: count for name, count in counts.items() if count}


def many(name: str) -> str:
    """The plural; a name in -s is one already, but for those in -us and -ss: bus, wine glass."""
    return name if re.search("[^su]s$", name) else PEOPLE.get(name, plural(name))


def is_plural(name: str) -> bool:
    """Whether a name has no singular: scissors, skis."""
    return name.endswith("s") and name == many(name)


def article(name: str) -> str:
    if is_plural(name):
        return name
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def number(count: int, name: str) -> str:
    """A count with its noun: "a dog", "3 dogs"."""
    return article(name) if count == 1 else f"{count} {many(name)}"


def there(count: int, name: str) -> str:
    return f"There {'is' if count == 1 and not is_plural(name) else 'are'} {number(count, name)}"


def where(box: Box) -> str:
    """The place of a box's center, as the world says it: "in the top left"."""
    _, x1, y1, x2, y2 = box
    column, row = (min(2, int(3 * (a + b) / 2)) for a, b in ((x1, x2), (y1, y2)))
    return CELL_PHRASES[3 * row + column]


def sentence(caption: str) -> str:
    return caption[:1].upper() + caption[1:].rstrip(" .") + "."


def converse(item: Item, rng: random.Random, nouns: Nouns) -> Turns:
    """Up to TURNS turns: what the image shows, counts, existence, places, relations."""
    turns = [("What does the image show?", sentence(rng.choice(item.captions)))] if item.captions else []
    asked = [count_question, yes_question, no_question, place_question, relation_question]
    for ask in rng.sample(asked, len(asked)):
        if len(turns) < TURNS and (turn := ask(item, rng, nouns)):
            turns.append(turn)
    return turns


def count_question(item: Item, rng: random.Random, nouns: Nouns):
    if counts := count_boxes(item):
        name = rng.choice(sorted(counts))
        return f"How many {many(name)} are in the image?", f"{there(counts[name], name)}."


def yes_question(item: Item, rng: random.Random, nouns: Nouns):
    if boxes := single_boxes(item):
        box = rng.choice(boxes)
        verb, it = ("Are there", "they are") if is_plural(box[0]) else ("Is there", "it is")
        return f"{verb} {article(box[0])} in the image?", f"Yes, {it} {where(box)}."


def no_question(item: Item, rng: random.Random, nouns: Nouns):
    """Ask for an object that neither boxes nor captions name; only if the boxes name all objects."""
    absent = sorted({*nouns.names} - nouns.objects(item)) if item.boxes and item.whole else []
    if absent:
        name = many(rng.choice(absent))
        return f"Are there any {name} in the image?", f"No, there are no {name} in the image."


def place_question(item: Item, rng: random.Random, nouns: Nouns):
    if boxes := [box for box in single_boxes(item) if not is_plural(box[0])]:
        box = rng.choice(boxes)
        return f"Where in the image is the {box[0]}?", f"The {box[0]} is {where(box)}."


def relation_question(item: Item, rng: random.Random, nouns: Nouns):
    """Ask on which side of an object another one is; only if their boxes do not overlap in that direction."""
    boxes = [box for box in single_boxes(item) if not is_plural(box[0])]
    pairs = [(a, b) for a in boxes for b in boxes if a[3] < b[1]]
    if pairs:
        left, right = rng.choice(pairs)
        first, second, side = rng.choice(((left, right, "left"), (right, left, "right")))
        question = f"On which side of the {second[0]} is the {first[0]}?"
        return question, f"The {first[0]} is to the {side} of the {second[0]}."


def describe(item: Item, rng: random.Random, nouns: Nouns) -> Turns:
    """One description: a caption, what the boxes count, and where the largest single objects are."""
    captions = sorted(set(item.captions), key=lambda caption: -len(caption.split()))
    parts = [sentence(caption) for caption in captions[: 1 if item.boxes else 2]]
    if counts := count_boxes(item):
        parts.append(f"In the image there are {join_list([number(n, name) for name, n in counts.items()])}.")
    boxes = [box for box in single_boxes(item) if not is_plural(box[0])]
    for box in sorted(boxes, key=lambda box: (box[1] - box[3]) * (box[4] - box[2]))[:4]:
        parts.append(f"The {box[0]} is {where(box)}.")
    return [("Describe the image in detail.", " ".join(parts))]


def reason(item: Item, rng: random.Random, nouns: Nouns) -> Turns:
    """One comparison whose answer states both facts before its conclusion: of counts, or of the boxes' areas."""
    counts, options = count_boxes(item), []
    pairs = [(a, b) for a in counts for b in counts if counts[a] > counts[b]]
    if pairs:
        more, fewer = rng.choice(pairs)
        first, second = rng.sample((more, fewer), 2)
        facts = f"{there(counts[first], first)} and {number(counts[second], second)}"
        options.append((f"Are there more {many(first)} or more {many(second)}?", f"{facts}, so more {many(more)}."))
    single = [(box, 100 * (box[3] - box[1]) * (box[4] - box[2])) for box in single_boxes(item)]
    pairs = [(a, b) for a in single for b in single if a[1] > max(1, 2 * b[1]) and not is_plural(b[0][0])]
    if pairs:
        (large, area), (small, less) = rng.choice(pairs)
        first, second = rng.sample((large[0], small[0]), 2)
        share = f"{max(1, less):.0f} %" if less >= 1 else "less than 1 %"
        question = f"Which takes up more of the image, the {first} or the {second}?"
        facts = f"The {large[0]} takes up {area:.0f} % of the image and the {small[0]} {share}"
        options.append((question, f"{facts}, so the {large[0]}."))
    return [rng.choice(options)] if options else []
