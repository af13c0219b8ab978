"""Change a sample's image and text so that its answers stay true: crop, flip, color, paraphrase (train.py --augment).

Only records with exactly one image are changed. Each change is made to half of the records whose text allows it, and
which half depends on (seed, sample, step) only. A text that may become false keeps its record as it is: a record is
never left out. The rules know English. docs/augment.md says for each change what is guaranteed and what is not.

A record may name what must stay in the image: "boxes": [[x1, y1, x2, y2], ...], as fractions of its width and height.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from PIL import Image, ImageEnhance, ImageOps

from inputs.records import MARKER, image_paths

KINDS = ("crop", "flip", "color", "paraphrase")
SHARE = 0.5  # of the records that allow a change
KEEP_BOXES, KEEP = 0.8, 0.9  # least share of each side that a crop keeps, with and without boxes
JITTER = 0.2  # brightness, contrast and saturation are multiplied by 1 - JITTER to 1 + JITTER

Change = Callable[[Image.Image], Image.Image]


def words(text: str) -> re.Pattern:
    return re.compile(rf"\b(?:{text})\b", re.IGNORECASE)


# A mirrored image has mirrored writing, clocks, maps and flags. "number of" is a count.
WRITING = words(
    r"signs?|signpost|text|letters?|words?|written|writes?|writing|reads?|reading|says?|said|spell\w*|numbers?(?! of)|"
    r"digits?|numerals?|logos?|brands?|labels?|labell?ed|titles?|titled|names?|named|caption\w*|banners?|posters?|"
    r"billboards?|license plates?|newspapers?|menus?|documents?|pages?|charts?|graphs?|ax[ie]s|books?|tokens?|ocr|"
    r"clocks?|o'clock|watch|what time|calendars?|maps?|flags?|east|west|eastern|western|mirror\w*|flipped|"
    r"(?:counter-?|anti-?)?clockwise|starboard|port side|drivers?'?s? side|country|wrong|right of way|"
    r"izquierd\w+|derech\w+|gauche|droite|links|rechts|sinistr\w+|destr\w+|esquerd\w+|direit\w+"
)
POSITION = words(
    r"left\w*|right\w*|top|bottom|cent(?:er|re)|middle|corners?|edges?|sides?|upper|lower|where|position\w*|located|"
    r"location|background|foreground|border|entire|whole"
)
WHOLE_IMAGE = words(r"how many|number of|count|describe|description|detail\w*|caption|all|every\w*|only|no other")
COLOR = words(
    r"colou?r\w*|red\w*|orange|yellow\w*|green\w*|blue\w*|purple|violet|pink\w*|brown\w*|beige|tan|black\w*|white\w*|"
    r"gr[ae]y\w*|silver|gold\w*|blond\w*|bronze|copper|turquoise|teal|maroon|navy|cyan|magenta|crimson|"
    r"dark\w*|bright\w*|light\w*|pale|shad\w+|tones?|hues?|tint\w*|faded|vivid|vibrant|stain\w*|"
    r"sun\w*|cloud\w*|overcast|weather|night\w*|day\w*|dusk|dawn|evening|morning|ripe|unripe|rust\w*"
)

# "left" and "right" as directions: the words before and after them. Others may be "has left", "right now".
BEFORE = words(
    r"the|to|on|at|in|from|top|bottom|upper|lower|far|middle|cent(?:er|re)|front|back|rear|and|or|facing|turn\w*|"
    r"his|her|its|their|your|my|outer|inner|lower|extreme"
)
AFTER = words(
    r"of|side|sides|hand|hands|arm|arms|leg|legs|foot|eye|ear|corner|edge|half|part|portion|wall|end|and|or|is|are|was|"
    r"there|in|with|has|have|behind|near|standing|sitting|holding|wearing|front|rear|back|wing|shoulder|knee|wrist|"
    r"elbow|lung|lobe|kidney|breast|ventricle|hemisphere|atrium|than|while|we|you|at|on|next"
)
SIDE = re.compile(r"\b(left|right)(?=most\b|wards?\b|-|\b)", re.IGNORECASE)
ALWAYS = re.compile(r"(most|wards?|-hand|-handed|-most)\b", re.IGNORECASE)  # "rightmost" is a direction wherever it is
TO_OTHER = re.compile(r" to (the )?(left|right)\b", re.IGNORECASE)  # after it: "from left to right"
NUMBER = r"\s*(\d*\.?\d+)\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")
COORDINATES = re.compile(r"\[\s*[\d.]+\s*,|\(\s*0?\.\d+\s*,|<(box|loc|point|ref|st)|\b0\.\d+")
SINGLE = re.compile(r"\s*(left|right)\.?\s*", re.IGNORECASE)  # as a whole answer
ASKS_SIDE = words(r"left|right|side|direction|which way|where")
PROMPT = re.compile(r"\n(Answer (the question|with the option's letter)\b[^\n]*|Provide a one-sentence caption[^\n]*)$")
FOREIGN = re.compile(r"[^\W\d_a-zA-Z\u00c0-\u024f]")  # letters of other scripts

NOUN = r"[a-z][a-z'-]*(?: [a-z][a-z'-]*){0,2}"
NAMED = r"(?:(?:red|orange|yellow|green|blue|purple|black|white|small|large|big) )?[a-z]+"
PARAPHRASES = (  # each line: one question in several forms
    (r"an? " + NAMED, "Is there {}?", "Is there {} in the image?", "Do you see {}?", "Can you see {}?"),
    (NOUN, "What color is the {}?", "Which color does the {} have?", "Which color is the {}?"),
    (NOUN, "How many {} are there?", "How many {} do you see?", "How many {} can you count?"),
    (
        NAMED,
        "Where is the {}?",
        "Where in the image is the {}?",
        "In which place is the {}?",
        "In which part of the image is the {}?",
    ),
    (NAMED, "What does the {} say?", "What is written on the {}?"),
    ("", "Describe the image.", "Describe this image.", "Give a description of the image.", "What do you see?"),
    (
        "",
        "Describe the image in detail.",
        "Describe this image in detail.",
        "Give a detailed description of the image.",
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# what a record allows


def texts_of(record: dict) -> str:
    """All turns of a record, without image markers and format prompts."""
    return "\n".join(PROMPT.sub("", message["value"].replace(MARKER, "")) for message in record["conversations"])


def is_direction(text: str, found: re.Match) -> bool:
    """True if this "left" or "right" is surely a direction: for each occurrence, the words beside it decide."""
    before, after = text[: found.start()].rstrip(), text[found.end() :]
    if ALWAYS.match(after):
        return True
    if (
        "\n" in text[len(before) : found.start()]
        or not before
        or not BEFORE.match(re.split(r"[^\w']", before)[-1] or " ")
    ):
        return False
    if TO_OTHER.match(after):
        return True
    return bool(re.match(r"\s*([.,;:?!)\n]|$)", after) or AFTER.match(after.lstrip(" -")))


def flip_text(text: str) -> str | None:
    """The text about the mirrored image: left and right, and boxes [x1, y1, x2, y2] of fractions. None if it may be
    false: writing, a "right" that is no direction, other coordinates, other languages. A format prompt stays."""
    prompt = PROMPT.search(text)
    text, prompt = (text[: prompt.start()], prompt[0]) if prompt else (text, "")
    if (
        WRITING.search(text)
        or FOREIGN.search(text)
        or not all(is_direction(text, found) for found in SIDE.finditer(text))
    ):
        return None
    boxes = list(BOX.finditer(text))
    if any(max(map(float, box.groups())) > 1 for box in boxes) or COORDINATES.search(BOX.sub("", text)):
        return None
    return BOX.sub(mirror_box, SIDE.sub(other_side, text)) + prompt


def other_side(found: re.Match) -> str:
    word = found[0]
    other = "right" if word.lower() == "left" else "left"
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


def mirror_box(found: re.Match) -> str:
    """[0.1, 0.2, 0.4, 0.6] as [0.6, 0.2, 0.9, 0.6]: x becomes 1 - x, with as many decimals."""
    x1, y1, x2, y2 = found.groups()
    digits = max(len(x.partition(".")[2]) for x in (x1, x2))
    return f"[{1 - float(x2):.{digits}f}, {y1}, {1 - float(x1):.{digits}f}, {y2}]"


def flip_record(record: dict) -> dict | None:
    """The record about the mirrored image, or None if a text of it may become false."""
    values, question = [], ""
    for message in record["conversations"]:
        text = message["value"]
        side = SINGLE.fullmatch(text) and ASKS_SIDE.search(question)
        values.append(SIDE.sub(other_side, text) if side else flip_text(text))
        question = text
    if None in values:
        return None
    messages = [message | {"value": value} for message, value in zip(record["conversations"], values)]
    return record | {"conversations": messages}


def crop_limits(record: dict) -> tuple[float, list] | None:
    """Least share of each side that a crop must keep, and the boxes that must stay whole; None: it must not be cropped.

    Without boxes a crop may cut what stands at the edge, so it is small, and questions about all of the image, about
    places and about writing are left alone.
    """
    text, boxes = texts_of(record), record.get("boxes")
    if POSITION.search(text) or COORDINATES.search(text) or FOREIGN.search(text):
        return None
    if boxes is None:
        return None if WRITING.search(text) or WHOLE_IMAGE.search(text) else (KEEP, [])
    numbers = isinstance(boxes, list) and all(isinstance(box, list) and len(box) == 4 for box in boxes)
    if not numbers or not all(isinstance(x, (int, float)) and -1 < x < 2 for box in boxes for x in box):
        return None  # no fractions
    return KEEP_BOXES, boxes


def crop_window(rng: random.Random, keep: float, boxes: list) -> tuple[float, float, float, float]:
    """A random window (x1, y1, x2, y2), in fractions, of the image's own shape, that holds all of the boxes."""
    first = [min([1.0, *(max(0.0, box[i]) for box in boxes)]) for i in (0, 1)]
    last = [max([0.0, *(min(1.0, box[i]) for box in boxes)]) for i in (2, 3)]
    side = max(rng.uniform(keep, 1), *(b - a for a, b in zip(first, last)))
    corner = [rng.uniform(max(0.0, b - side), min(a, 1 - side)) for a, b in zip(first, last)]
    return corner[0], corner[1], corner[0] + side, corner[1] + side


def cut(image: Image.Image, window: tuple[float, float, float, float]) -> Image.Image:
    """The window of an image; pixels that it touches are kept whole."""
    x1, y1, x2, y2 = (share * size for share, size in zip(window, image.size * 2))
    return image.crop((int(x1), int(y1), min(image.width, int(-(-x2 // 1))), min(image.height, int(-(-y2 // 1)))))


def allows_color(record: dict) -> bool:
    return not COLOR.search(texts_of(record)) and not FOREIGN.search(texts_of(record))


def jitter(image: Image.Image, factors: list[float]) -> Image.Image:
    for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
        image = enhance(image).enhance(factor)
    return image


def other_forms(line: str) -> list[str]:
    """The other forms of a question, [] if it has none."""
    for noun, *forms in PARAPHRASES:
        for form in forms:
            before, _, after = form.partition("{}")
            pattern = re.escape(before) + (f"({noun})" if noun else "") + re.escape(after)
            if found := re.fullmatch(pattern, line):
                return [other.format(*found.groups()) for other in forms if other != form]
    return []


def paraphrase(record: dict, rng: random.Random) -> dict:
    """The record with its questions in other forms; lines of a question that have none stay."""
    messages = []
    for message in record["conversations"]:
        lines = message["value"].split("\n")
        if message["from"] == "human" and len(lines) <= 4:
            lines = [rng.choice([line, *other_forms(line)]) for line in lines]
        messages.append(message | {"value": "\n".join(lines)})
    return record | {"conversations": messages}


# ---------------------------------------------------------------------------------------------------------------------
# samples


class Drawn(int):
    """The number of a sample, and the step that draws it: each step changes the sample in another way."""

    step = 0


def mark_steps(steps: Iterable[list[int]], start: int) -> Iterator[list[Drawn]]:
    """The samples of each step as Drawn. Args: start: the first step."""
    for step, numbers in enumerate(steps, start):
        drawn = [Drawn(number) for number in numbers]
        for number in drawn:
            number.step = step
        yield drawn


class Augment:
    """Changes records and their images. Args: kinds: comma-separated, of KINDS. Raises ValueError on others."""

    def __init__(self, kinds: str, seed: int):
        self.kinds, self.seed = kinds.split(","), seed
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"--augment {unknown[0]}: choose from {', '.join(KINDS)}")
        self.changes_images = bool({*self.kinds} - {"paraphrase"})

    def __call__(self, record: dict, index: int) -> tuple[dict, Change]:
        """The record of sample `index`, changed, and the function that changes its image."""
        rng = random.Random(f"{self.seed} {int(index)} {getattr(index, 'step', 0)}")
        chosen = {kind: rng.random() < SHARE and kind in self.kinds for kind in KINDS}
        changes = []
        if len(image_paths(record)) != 1:
            return record, apply(changes)
        if chosen["crop"] and (limits := crop_limits(record)):
            window = crop_window(rng, *limits)
            changes.append(lambda image: cut(image, window))
        if chosen["color"] and allows_color(record):
            factors = [rng.uniform(1 - JITTER, 1 + JITTER) for _ in range(3)]
            changes.append(lambda image: jitter(image, factors))
        if chosen["flip"] and (flipped := flip_record(record)):
            record = flipped
            changes.append(ImageOps.mirror)
        return paraphrase(record, rng) if chosen["paraphrase"] else record, apply(changes)

    def describe(self, records: Iterable[dict], most: int = 1000) -> str:
        """One line: how many of the first records each change can be made to."""
        first, counts = list(islice(records, most)), Counter()
        allows = {"crop": crop_limits, "flip": flip_record, "color": allows_color, "paraphrase": has_other_forms}
        for record in first:
            if len(image_paths(record)) == 1:
                counts.update(kind for kind in self.kinds if allows[kind](record))
        parts = ", ".join(f"{kind} {counts[kind]:,}" for kind in self.kinds)
        return f"--augment changes half of those that allow it, of the first {len(first):,} records: {parts}"


def apply(changes: list[Change]) -> Change:
    def changed(image: Image.Image) -> Image.Image:
        for change in changes:
            image = change(image)
        return image

    return changed


def has_other_forms(record: dict) -> bool:
    return any(other_forms(line) for message in record["conversations"][::2] for line in message["value"].split("\n"))
