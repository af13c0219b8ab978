"""From LLaVA's JSON to batches, in an order that depends on nothing but its arguments.

A record is {"id", "image" (path, or list of paths, or absent), "conversations": [{"from": "human"|"gpt", "value"}]}.

    python data.py --data a.json --images DIR --model DIR      print one record with what is trained on in colour
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from anyres import Size, count_tokens, cut_tiles
from clip import preprocess
from files import refuse_duplicates
from images import BadImage, open_image, pad_to_square, resolve_inside
from llava import IGNORE
from templates import TEMPLATES, Turn, render
from tokenizer import Tokenizer

MARKER = "<image>"  # stands for a picture in the human turns of a record that has one; everywhere else it is text


class DataError(ValueError):
    """A record that cannot be used; the message is one line: file, record, reason."""


# ---------------------------------------------------------------------------------------------------------------------
# records


def read_records(path: str | Path) -> list[dict]:
    """LLaVA's JSON, checked record by record. Raises DataError naming the file, the record and the reason."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        records = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_duplicates)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: must hold a list of records, and at least one")
    for number, record in enumerate(records):
        try:
            check_record(record)
        except ValueError as error:
            name = f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else ""
            raise DataError(f"{path}: record {number}{name}: {error}") from None
    return records


def refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON value")


def check_record(record: dict):
    """Raise ValueError with the reason if a record is not LLaVA's JSON, or says something about pictures it has not."""
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, not an object")
    for path in images_of(record):
        if not isinstance(path, str) or not path:
            raise ValueError(f"image {path!r} is not a path")
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise ValueError("no conversations")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise ValueError(f"turn {i} has no text value")
        role = ("human", "gpt")[i % 2]
        if message.get("from") != role:
            raise ValueError(
                f"turn {i} is from {message.get('from')!r}, should be {role!r}: turns alternate, human first"
            )
        if any(0xD800 <= ord(char) <= 0xDFFF for char in message["value"]):
            raise ValueError(f"turn {i} holds half a surrogate pair, which is not text")
    if len(messages) % 2:
        raise ValueError("the last question has no answer")
    if record.get("template", "plain") not in list(TEMPLATES):
        raise ValueError(f"template {record['template']!r} is none of {', '.join(TEMPLATES)}")
    images = len(images_of(record))
    markers = sum(message["value"].count(MARKER) for message in messages[::2])
    if images and markers != images:
        raise ValueError(f"{markers} {MARKER} markers for {images} pictures")


def images_of(record: dict) -> list[str]:
    image = record.get("image")
    return [] if image is None else image if isinstance(image, list) else [image]


def turns_of(record: dict, image_last: bool = False) -> list[Turn]:
    """The dialogue of a record; its markers taken out of the questions, each picture put before (or after) its text."""
    has_image = bool(images_of(record))
    messages, turns = record["conversations"], []
    for human, gpt in zip(messages[::2], messages[1::2]):
        count = human["value"].count(MARKER) if has_image else 0
        question = human["value"].replace(MARKER, "").strip() if count else human["value"]
        turns.append(Turn(question, gpt["value"], count, image_last and count > 0))
    return turns


def cut_dialogue(record: dict, questions: int) -> list[dict]:
    """Pieces of a dialogue, of at most so many questions each; a piece starts with all pictures shown up to then.

    Later answers often follow from earlier ones, so a model may learn them without a look at the picture.
    """
    messages, images, pieces, shown = record["conversations"], images_of(record), [], 0
    for start in range(0, len(messages), 2 * questions):
        first, *rest = messages[start : start + 2 * questions]
        again = MARKER * shown + "\n" if shown else ""
        if images:
            shown += sum(message["value"].count(MARKER) for message in [first, *rest][::2])
        dialogue = [first | {"value": again + first["value"]}, *rest]
        pieces.append(record | {"image": images[:shown], "conversations": dialogue})
    return pieces


@dataclass
class Picture:
    """A picture ready for the tower. pixels (N, 3, S, S): one square, or with anyres the whole and its tiles."""

    pixels: torch.Tensor
    size: Size  # height and width as it came
    tokens: int  # placeholders it takes in a prompt


def load_picture(root: str | Path, name: str, config) -> Picture:
    """One picture below the folder `root`, as the LlavaConfig `config` wants it. Raises BadImage."""
    return prepare_picture(open_image(resolve_inside(root, name)), config)


def prepare_picture(image: Image.Image, config) -> Picture:
    vision, size, pinpoints = config.vision_config, (image.height, image.width), config.image_grid_pinpoints
    if not pinpoints:
        pixels = image_pixels(image, vision.image_size, config.image_mode)
        return Picture(pixels[None], size, vision.num_patches)
    tiles = cut_tiles(image, pinpoints, vision.image_size)
    pixels = torch.stack([preprocess(tile, vision.image_size) for tile in tiles])
    return Picture(pixels, size, count_tokens(size, pinpoints, vision.image_size, vision.patch_size))


def image_pixels(image: Image.Image, size: int, mode: str) -> torch.Tensor:
    """An RGB picture made square, `size` pixels a side: "pad" keeps all of it, "square" cuts out the centre."""
    if mode not in ("pad", "square"):
        raise ValueError(f"image mode {mode!r} is neither pad nor square")
    return preprocess(pad_to_square(image) if mode == "pad" else image, size)


# ---------------------------------------------------------------------------------------------------------------------
# samples and batches


class Records(Dataset):
    """Training samples of one file: {"ids", "labels", "pixel_values" or "vision_features"}.

    Args: data, images: the JSON and the folder its paths start from. max_length: tokens, placeholders counted; a
    longer dialogue loses its end, never a part of a picture. image_order "either" puts the first picture before or
    after its question, by a coin that depends only on (seed, record): LLaVA-1.0's paper; the released code, and the
    default, put it "first". text_only leaves the pictures out: what a decoder learns from before it can see.
    questions: the most that a sample asks, longer dialogues are cut into several; None: dialogues stay whole.
    """

    def __init__(
        self,
        data,
        images,
        tokenizer,
        config,
        max_length,
        image_order="first",
        seed=0,
        text_only=False,
        template=None,
        questions=None,
    ):
        self.data, self.images, self.tokenizer, self.config = data, images, tokenizer, config
        self.max_length, self.image_order, self.seed, self.text_only = max_length, image_order, seed, text_only
        self.template = template or config.template
        self.records = [  # numbered as in the file
            (number, piece)
            for number, record in enumerate(read_records(data))
            for piece in (cut_dialogue(record, questions) if questions else [record])
        ]
        self.features: dict[str, Picture] = {}  # of a frozen tower, in the place of pixels (see train.py)

    def __len__(self) -> int:
        return len(self.records)

    def where(self, index: int) -> str:
        number, record = self.records[index]
        return f"{self.data}: record {number} (id {record.get('id')!r})"

    def lengths(self) -> list[int]:
        """About how long each sample is, in words and signs of punctuation: enough to put like with like."""
        per_image = 0 if self.text_only or not self.config.vision_config else self.config.vision_config.num_patches
        return [
            sum(len(re.findall(r"\w+|[^\w\s]", message["value"])) for message in record["conversations"])
            + per_image * len(images_of(record))
            for _, record in self.records
        ]

    def pictures(self) -> dict[str, int]:
        """Every picture of the file once, with the sample it is first seen in."""
        found = {}
        for index, (_, record) in enumerate(self.records):
            for name in images_of(record):
                found.setdefault(name, index)
        return found

    def picture(self, name: str, index: int) -> Picture:
        """Picture `name` of sample `index`. Raises DataError naming the record."""
        try:
            return load_picture(self.images, name, self.config)
        except BadImage as error:
            raise DataError(f"{self.where(index)}: {error}") from None

    def __getitem__(self, index: int) -> dict:
        _, record = self.records[index]
        names = [] if self.text_only else images_of(record)
        if names and self.config.vision_config is None:
            raise DataError(f"{self.where(index)}: has a picture, but the model has no vision tower")
        image_last = self.image_order == "either" and np.random.default_rng([self.seed, index]).random() < 0.5
        pictures = [self.features.get(name) or self.picture(name, index) for name in names]
        tokens = [picture.tokens for picture in pictures]
        template = record.get("template", self.template)
        turns = turns_of(record, image_last)
        if self.text_only:
            turns = [replace(turn, images=0) for turn in turns]
        ids, labels = render(turns, self.tokenizer, template, tokens)
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if ids.count(self.tokenizer.image_id) != sum(tokens) or labels.count(IGNORE) == len(labels):
            raise DataError(
                f"{self.where(index)}: its picture and question leave no room for an answer in {self.max_length} tokens"
            )
        kind = "vision_features" if self.features else "pixel_values"
        tiles = [tile for picture in pictures for tile in picture.pixels]
        sizes = [picture.size for picture in pictures] if self.config.image_grid_pinpoints else []
        return {"ids": ids, "labels": labels, kind: tiles, "image_sizes": sizes}


def collate(samples: list[dict], pad_id: int) -> dict:
    """Right-pad to the longest: input_ids, labels (B, T); the pictures of all samples in order, or None.

    image_sizes holds (height, width) of each where pictures come in tiles, and is empty where they do not.
    """
    longest = max(len(sample["ids"]) for sample in samples)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([sample[key] + [fill] * (longest - len(sample[key])) for sample in samples])

    batch = {"input_ids": padded("ids", pad_id), "labels": padded("labels", IGNORE)}
    for kind in ("pixel_values", "vision_features"):
        pictures = [picture for sample in samples for picture in sample.get(kind, [])]
        batch[kind] = torch.stack(pictures) if pictures else None
    batch["image_sizes"] = [size for sample in samples for size in sample.get("image_sizes", [])]
    return batch


def text_about(record: dict) -> str:
    """What a record says about its picture: a caption; of a dialogue, the questions and answers one after another."""
    turns = turns_of(record)
    return turns[0].answer if len(turns) == 1 else " ".join(f"{turn.question} {turn.answer}." for turn in turns)


class CaptionPairs(Dataset):
    """Pictures with a text each, for CLIP: of every record that has one picture.

    The text is cut to the text tower's length, between a begin and an end token.
    """

    def __init__(self, data, images, tokenizer, config, image_mode: str):
        self.data, self.images, self.tokenizer, self.config, self.image_mode = (
            data,
            images,
            tokenizer,
            config,
            image_mode,
        )
        numbered = enumerate(read_records(data))
        self.records = [(number, record) for number, record in numbered if len(images_of(record)) == 1]
        if not self.records:
            raise DataError(f"{data}: no record has a picture")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        number, record = self.records[index]
        room = self.config.text_config.max_position_embeddings - 2
        text = self.tokenizer.encode(text_about(record))[:room]
        ids = [self.tokenizer.bos_id, *text, self.tokenizer.eos_id]
        side = self.config.vision_config.image_size
        try:
            pixels = image_pixels(open_image(resolve_inside(self.images, images_of(record)[0])), side, self.image_mode)
        except BadImage as error:
            raise DataError(f"{self.data}: record {number} (id {record.get('id')!r}): {error}") from None
        labels = [IGNORE] * (len(ids) - 1) + ids[-1:]  # one for each pair: what the loss is divided by
        return {"ids": ids, "labels": labels, "pixel_values": [pixels]}


GROUPED_STEPS = 16  # steps whose records are sorted together: 7 % of the world's tokens are padding, not 29 %


def batches(
    count: int, batch_size: int, seed: int, start: int, stop: int, rank: int, world: int, group: int = 1, lengths=None
) -> Iterator[list[int]]:
    """This rank's indices for every step from `start` to `stop`: a pure function of its arguments.

    Each epoch is a new permutation of `count` records; a batch may span two epochs, so none is ever short. Nothing has
    to be replayed on resume. `batch_size` counts all ranks; `group` keeps that many neighbours in one batch. With
    `lengths`, one per record, a batch holds records of like length, as with LLaVA's group_by_modality_length.
    """

    @lru_cache(2)
    def epoch_order(epoch: int) -> np.ndarray:
        groups = np.random.default_rng([seed, epoch]).permutation(-(-count // group))
        order = (groups[:, None] * group + np.arange(group)).ravel()
        return order[order < count]

    def records_of(first: int, steps: int) -> list[int]:
        positions = range(first * batch_size, (first + steps) * batch_size)
        return [int(epoch_order(position // count)[position % count]) for position in positions]

    @lru_cache(1)
    def grouped(block: int) -> list[list[int]]:
        """The batches of one block of steps, sorted within, shuffled among themselves."""
        found = sorted(records_of(block * GROUPED_STEPS, GROUPED_STEPS), key=lambda record: lengths[record])
        shuffled = np.random.default_rng([seed, block, 1]).permutation(GROUPED_STEPS)
        return [found[i * batch_size : (i + 1) * batch_size] for i in shuffled]

    for step in range(start, stop):
        whole = grouped(step // GROUPED_STEPS)[step % GROUPED_STEPS] if lengths is not None else records_of(step, 1)
        yield whole[rank::world] if group == 1 else whole[rank * batch_size // world : (rank + 1) * batch_size // world]


def main():
    """Print one record as the model reads it, what is trained on in green."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="LLaVA's JSON")
    add("--model", required=True, help="folder with a tokenizer.json")
    add("--record", type=int, default=0, help="which record to print")
    add("--template", choices=TEMPLATES, default="vicuna_v1")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.model)
    ids, labels = render(turns_of(read_records(args.data)[args.record]), tokenizer, args.template, features=1)
    names = {i: name for name, i in tokenizer.specials.items()}
    for i, label in zip(ids, labels):
        text = names.get(i) or tokenizer.decode([i])
        print(f"\033[32m{text}\033[0m" if label != IGNORE else text, end="|")
    print()


if __name__ == "__main__":
    main()
