"""Turn LLaVA's JSON into batches: a dialogue into ids and labels, an image into pixels, samples into a batch.

    record   {"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, ...]}
    sample   {"ids": [1, 32000, 32000, ...], "labels": [-100, -100, ...], "pixel_values": [(3, 336, 336)]}
    batch    {"input_ids": (B, T), "labels": (B, T), "pixel_values": (N, 3, 336, 336), ...}

Two commands inspect data before training:

    python data.py show a.json --model DIR               print a record as the model reads it, trained tokens in green
    python data.py check a.json b.json:2 --images DIR    count bad records by kind; exit status 1 if there is one
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip import normalize, preprocess
from formats.configs import read_config
from inputs import cli
from inputs.check import count_cut, print_lengths, report_faults
from inputs.images import BadImage, open_image, pad_to_square, resolve_inside, size_of
from inputs.index import read_records
from inputs.mixture import Source, open_sources
from inputs.parallel import parallel_map
from inputs.records import DataError, Turn, image_paths, turns_of
from inputs.samples import Samples
from inputs.templates import MARKUP, TEMPLATES, find_template, special_id
from inputs.tokenizer import Tokenizer
from llava import IGNORE
from variants.anyres import Size, count_tokens, cut_tiles

# ---------------------------------------------------------------------------------------------------------------------
# a dialogue becomes ids and labels


def render_dialogue(
    turns: list[Turn], tokenizer: Tokenizer, template: str, image_tokens: int | list[int]
) -> tuple[list[int], list[int]]:
    """Ids and labels of a dialogue, built together in one pass. Training, sampling and evaluation all use it.

    A dialogue about an image of two tokens, in the template "llava_hf" (a dot is IGNORE: no loss here):

        ids      <s>  USER :  <image> <image>  \\n What is this ?  ASSISTANT :   a cat  </s>
        labels    .    .   .     .       .      .   .   .   .  .      .      .   a cat  </s>

    The loss covers the answers and their end tokens. Special tokens and labels follow from the turns and are never
    searched for in text, so a user who types "</s>" or "ASSISTANT:" cannot change them.

    Args: image_tokens: placeholders per image (576 for CLIP-L/14-336), or a list with the number for each image.
    Returns two lists of equal length. Raises ValueError if the tokenizer lacks a special token of the template,
    DataError if the template has no place for the dialogue's system prompt.
    """
    form, transcript = find_template(template), Transcript(tokenizer)
    counts = repeat(image_tokens) if isinstance(image_tokens, int) else iter(image_tokens)
    for i, turn in enumerate(turns):
        if i == 0 and turn.system:
            if not form.system:
                raise DataError(f"has a system prompt, and the template {template} has no place for one")
            before, _, after = form.first.partition(form.system)
            transcript.add_markup(before)
            transcript.text += turn.system
            transcript.add_markup(after)
        else:
            transcript.add_markup(form.user if i else form.first)
        add_question(turn, transcript, counts, form.plain, alone=len(turns) == 1)
        transcript.add_markup(form.assistant)
        transcript.encode_text()
        if turn.answer is not None:
            transcript.text += (form.space if turn.answer else "") + turn.answer
            transcript.add_markup(form.end, learn=True)
            transcript.encode_text(learn=True)
    return transcript.ids, transcript.labels


def add_question(turn: Turn, transcript: "Transcript", counts: Iterator[int], plain: bool, alone: bool):
    """Add the question of a turn and the placeholders of its images, whose numbers `counts` yields."""
    if plain and alone and turn.images and not turn.image_last:
        parts = [""] * (turn.images + 1)  # without the question, as in LLaVA's code of stage 1
    elif turn.image_last:
        parts = [turn.question + "\n"] + [""] * turn.images
    else:
        before = "\n" if turn.images and not plain else ""
        parts = [*(turn.parts or [""] * turn.images + [before + turn.question])]
        parts[-1] += "\n" if turn.question and plain else ""
    transcript.text += parts[0]
    for part in parts[1:]:
        transcript.add_images(islice(counts, 1))
        transcript.text += part


class Transcript:
    """Ids and labels of a dialogue, written from left to right.

    Text is gathered in `text` and encoded in chunks, which end at an image, a special token, or before and after an
    answer. So a prompt has the same ids whether its answer follows (training) or not (sampling).
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.labels, self.text = tokenizer, [], [], ""
        if tokenizer.bos_id is not None:
            self.add_ids([tokenizer.bos_id])
        self.starts = True  # False if the next chunk continues a text: SentencePiece puts no space in front

    def add_ids(self, ids: list[int], learn: bool = False):
        self.ids += ids
        self.labels += ids if learn else [IGNORE] * len(ids)

    def encode_text(self, learn: bool = False):
        """Encode the text gathered so far; the next chunk continues it."""
        if self.text:
            self.add_ids(self.tokenizer.encode(self.text, self.starts), learn)
            self.text, self.starts = "", self.tokenizer.legacy and self.ids[-1] in self.tokenizer.word_ids

    def add_markup(self, text: str, learn: bool = False):
        """Add text of a template, where special tokens are in braces."""
        for i, piece in enumerate(MARKUP.split(text)):  # text, name, text, name, ..., text
            if i % 2 == 0:
                self.text += piece
                continue
            self.encode_text(learn)
            token = special_id(piece, self.tokenizer)
            if token is None:
                raise ValueError(f"the template needs {piece}, a special token that this tokenizer does not have")
            self.add_ids([token], learn)
            self.starts = self.tokenizer.legacy

    def add_images(self, counts: Iterable[int]):
        """Add the placeholders of some images. The model replaces each placeholder by one visual feature."""
        self.encode_text()
        self.add_ids([self.tokenizer.image_id] * sum(counts))
        self.starts = self.tokenizer.legacy


# ---------------------------------------------------------------------------------------------------------------------
# an image becomes pixels


@dataclass
class PreparedImage:
    """An image for the vision tower. pixels (N, 3, S, S): one square; with anyres the whole image, then its tiles."""

    pixels: torch.Tensor
    size: Size  # height and width before it was resized
    tokens: int  # number of its placeholders in a prompt


def load_image(root: str | Path, name: str, config, change=None) -> PreparedImage:
    """Image `name` below the folder `root`, changed by the function `change` (of inputs/augment.py) if there is one,
    and prepared as the LlavaConfig `config` says. Raises BadImage."""
    image = open_image(resolve_inside(root, name))
    return prepare_image(change(image) if change else image, config)


def prepare_image(image: Image.Image, config) -> PreparedImage:
    """An RGB image prepared as the LlavaConfig `config` says."""
    vision, size, pinpoints = config.vision_config, (image.height, image.width), config.image_grid_pinpoints
    if not pinpoints:
        pixels = image_pixels(image, vision.image_size, config.image_mode)
        return PreparedImage(pixels[None], size, config.tokens_per_image)
    pixels = torch.stack([normalize(tile) for tile in cut_tiles(image, pinpoints, vision.image_size)])
    return PreparedImage(pixels, size, count_tokens(size, pinpoints, vision.image_size, vision.patch_size))


def image_pixels(image: Image.Image, size: int, mode: str) -> torch.Tensor:
    """An RGB image as a normalized square (3, size, size): "pad" keeps all of it, "square" cuts out the center."""
    if mode not in ("pad", "square"):
        raise ValueError(f"image mode {mode!r} is neither pad nor square")
    return normalize(pad_to_square(image, size)) if mode == "pad" else preprocess(image, size)


def count_image_tokens(root: str | Path, name: str, config) -> int:
    """Number of an image's placeholders. With anyres it depends on the image's size, read from the file's header."""
    vision, pinpoints = config.vision_config, config.image_grid_pinpoints
    if not vision or not pinpoints:
        return config.tokens_per_image
    try:
        sizes = [size_of(resolve_inside(root, name))]
    except BadImage:  # count the largest; the error is raised when the sample is loaded
        sizes = pinpoints
    return max(count_tokens(size, pinpoints, vision.image_size, vision.patch_size) for size in sizes)


# ---------------------------------------------------------------------------------------------------------------------
# records become samples


class Records(Samples):
    """Training samples of a LLaVA.

    Args: max_length: in tokens, images included; a longer dialogue loses its end, but never a part of an image.
    image_order: "first" puts images before their question, as in LLaVA's code; "either" before or after it at random,
    as in the paper of LLaVA-1.0, depending on (seed, index) only. text_only: leave the images out, for a decoder that
    learns text first. template: for records that name none; default: the model's. augment: inputs.augment.Augment.
    """

    def __init__(
        self, sources: list[Source], tokenizer, config, max_length: int,
        image_order="first", seed=0, text_only=False, template=None, questions=None, augment=None,
    ):  # fmt: skip
        super().__init__(sources, [source.usable() for source in sources], questions)
        self.tokenizer, self.config = tokenizer, config
        self.max_length, self.image_order, self.seed, self.text_only = max_length, image_order, seed, text_only
        self.template, self.augment = template or config.template, augment
        # Images by (folder, name), with features of a frozen vision tower instead of pixels; filled by train.py.
        self.features: dict[tuple[Path, str], PreparedImage] = {}

    def sample(self, index: int) -> dict:
        record, change = self.record(index), None
        if self.augment:
            record, change = self.augment(record, index)
        names = self.image_names(index, record)
        if names and self.config.vision_config is None:
            raise DataError("has an image, but the model has no vision tower")
        image_last = self.image_order == "either" and np.random.default_rng([self.seed, index]).random() < 0.5
        images = [self.features.get(name) or load_image(*name, self.config, change) for name in names]
        tokens = [image.tokens for image in images]
        ids, labels = self.render(record, tokens, image_last)
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if ids.count(self.tokenizer.image_id) != sum(tokens) or labels.count(IGNORE) == len(labels):
            raise DataError(f"its image and question leave no room for an answer in {self.max_length} tokens")
        kind = "vision_features" if self.features else "pixel_values"
        tiles = [tile for image in images for tile in image.pixels]
        sizes = [image.size for image in images] if self.config.image_grid_pinpoints else []
        task = record.get("task", self.source(index).file.path.stem)  # for --task-weights
        return {"ids": ids, "labels": labels, kind: tiles, "image_sizes": sizes, "task": task}

    def image_names(self, index: int, record: dict) -> list[tuple[Path, str]]:
        """Folder and name of each image in a sample."""
        return [] if self.text_only else [(self.source(index).images, name) for name in image_paths(record)]

    def render(self, record: dict, tokens: list[int], image_last: bool) -> tuple[list[int], list[int]]:
        """Ids and labels, not yet cut to max_length. Args: tokens: placeholders of each image."""
        turns = turns_of(record, image_last)
        if self.text_only:
            turns = [replace(turn, images=0, parts=()) for turn in turns]
        return render_dialogue(turns, self.tokenizer, record.get("template", self.template), tokens)

    def images(self, most: int | None = None) -> dict[tuple[Path, str], int]:
        """All different images, or the first `most` of them: (folder, name) -> the first sample that has it."""
        found = {}
        for index in range(len(self)):
            if most and len(found) >= most:
                break
            for name in self.image_names(index, self.record(index)):
                found.setdefault(name, index)
        return found

    def load(self, names: dict[tuple[Path, str], int]) -> dict[tuple[Path, str], PreparedImage]:
        """Load and prepare some of `images()`. A bad image raises DataError; with `skips` it is left out."""
        found = {}
        for name, index in names.items():
            try:
                found[name] = load_image(*name, self.config)
            except BadImage as error:
                if not self.skips:
                    raise DataError(f"{self.where(index)}: {error}") from None
        return found

    def lengths(self) -> np.ndarray:
        """Tokens of each sample, negative if it has no image: (N,) int32. Similar lengths in a batch save padding."""
        return np.clip(self.whole_lengths(), -self.max_length, self.max_length).astype(np.int32)

    def whole_lengths(self) -> np.ndarray:
        """The lengths before samples are cut. They are counted once and kept beside each file's index."""
        pinpoints, counts = self.config.image_grid_pinpoints, []
        key = [self.tokenizer.fingerprint(), self.template, self.questions, self.text_only]
        key += [self.config.vision_config and self.config.tokens_per_image, pinpoints]
        for source, size, end in zip(self.sources, self.sizes, self.ends.tolist()):
            folder = pinpoints and str(source.images.resolve())  # only with anyres do tokens depend on the images
            count = partial(parallel_map, self.length, range(end - size, end), f"tokens of {source.file.path.name}")
            counts.append(source.file.cached("lengths", [*key, folder, sorted(source.faults)], count))
        return np.concatenate(counts)

    def length(self, index: int) -> int:
        """Tokens of a sample, not cut to max_length; negative if it has no image."""
        ids, _, has_image = self.render_whole(index)
        return len(ids) if has_image else -len(ids)

    def render_whole(self, index: int) -> tuple[list[int], list[int], bool]:
        """Ids and labels of a sample, not cut, images before their question; and whether it has an image."""
        record = self.record(index)
        tokens = [count_image_tokens(*name, self.config) for name in self.image_names(index, record)]
        try:
            return *self.render(record, tokens, image_last=False), bool(tokens)
        except DataError as error:  # with --skip-bad, loading the sample raises it again
            if not self.skips:
                raise DataError(f"{self.where(index)}: {error}") from None
            return [], [], bool(tokens)

    def long_samples(self) -> list[int]:
        return np.flatnonzero(np.abs(self.whole_lengths()) > self.max_length).tolist()

    def answer_tokens(self, index: int) -> tuple[int, int]:
        ids, labels, _ = self.render_whole(index)
        whole = len(labels) - labels.count(IGNORE)
        lost = sum(label != IGNORE for label in labels[self.max_length :])
        return whole, 0 if self.tokenizer.image_id in ids[self.max_length :] else whole - lost


class CaptionPairs(Samples):
    """Pairs of an image and a text, for CLIP: all records with exactly one image.

    The text is cut to the length of the text tower and stands between a begin and an end token.
    """

    remedy = "the text tower reads no more, so shorten them"

    def __init__(self, sources: list[Source], tokenizer, config, image_mode: str):
        usable = [(source, source.usable()) for source in sources]
        single = ((source, part[source.file.image_counts[part] == 1]) for source, part in usable)
        single = [(source, part) for source, part in single if len(part)]
        if not single:
            raise DataError(f"{sources[0].file.path}: no record has an image")
        super().__init__(*map(list, zip(*single)))
        self.tokenizer, self.config, self.image_mode = tokenizer, config, image_mode
        self.max_length = config.text_config.max_position_embeddings - 2  # without the begin and the end token
        self.left_out = sum(len(part) for _, part in usable) - len(self)

    def text_ids(self, record: dict) -> list[int]:
        """The ids of a caption; of a dialogue, those of all its turns."""
        turns = turns_of(record)
        text = turns[0].answer if len(turns) == 1 else " ".join(f"{turn.question} {turn.answer}." for turn in turns)
        return self.tokenizer.encode(text)

    def long_samples(self) -> range:
        return range(len(self))

    def answer_tokens(self, index: int) -> tuple[int, int]:
        count = len(self.text_ids(self.record(index)))
        return count, min(count, self.max_length)

    def sample(self, index: int) -> dict:
        record = self.record(index)
        ids = [self.tokenizer.bos_id, *self.text_ids(record)[: self.max_length], self.tokenizer.eos_id]
        path = resolve_inside(self.source(index).images, image_paths(record)[0])
        pixels = image_pixels(open_image(path), self.config.vision_config.image_size, self.image_mode)
        labels = [IGNORE] * (len(ids) - 1) + ids[-1:]  # one label: the loss is divided by the number of pairs
        return {"ids": ids, "labels": labels, "pixel_values": [pixels]}


# ---------------------------------------------------------------------------------------------------------------------
# samples become a batch


def collate(samples: list[dict], pad_id: int) -> dict:
    """Pad samples on the right to the longest, and put the images of all samples in one tensor, in order.

        samples              input_ids (B, T)        labels (B, T)
        7 8 9                7 8 9 0 0               . 8 9 . .        0 is pad_id, a dot is IGNORE
        4 5 6 7 8            4 5 6 7 8               . . . 7 8

    "pixel_values" or "vision_features" is (N, ...) and the other None; both are None if no sample has an image.
    "image_sizes" holds (height, width) of each image if images are cut into tiles; else it is empty.
    """
    longest = max(len(sample["ids"]) for sample in samples)

    def pad(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([sample[key] + [fill] * (longest - len(sample[key])) for sample in samples])

    batch = {"input_ids": pad("ids", pad_id), "labels": pad("labels", IGNORE)}
    for kind in ("pixel_values", "vision_features"):
        images = [image for sample in samples for image in sample.get(kind, [])]
        batch[kind] = torch.stack(images) if images else None
    batch["image_sizes"] = [size for sample in samples for size in sample.get("image_sizes", [])]
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# commands


def show(args: argparse.Namespace):
    """Print one record as the model reads it, trained tokens in green."""
    tokenizer, records = Tokenizer.load(args.model), read_records(args.data)
    if not 0 <= args.record < len(records):
        raise ValueError(f"--record {args.record}: {args.data} has records 0 to {len(records) - 1}")
    record, template = records[args.record], args.template or read_config(args.model).template
    ids, labels = render_dialogue(turns_of(record), tokenizer, record.get("template", template), image_tokens=1)
    names = {i: name for name, i in tokenizer.specials.items()}
    for i, label in zip(ids, labels):
        text = names.get(i) or tokenizer.decode([i])
        print(f"\033[32m{text}\033[0m" if label != IGNORE else text, end="|")
    print()


def check(args: argparse.Namespace):
    """Count bad records; with --model print the lengths of the good ones and what is cut. Exit status 1 on a fault."""
    sources = open_sources(args.data, args.images, args.follow_links)
    bad, total = report_faults(sources, args.decode), sum(len(source.file) for source in sources)
    print(f"{bad:,} of {total:,} records are bad" if bad else f"all {total:,} records are good")
    if args.model and bad < total:
        config = read_config(args.model)
        if args.max_length is not None and args.max_length < 1:
            raise ValueError("--max-length must be at least 1")
        most = args.max_length or config.text_config.max_position_embeddings
        dataset = Records(sources, Tokenizer.load(args.model), config, most, template=args.template)
        if config.vision_config is None and any(source.file.distinct_images for source in sources):
            print("the model has no vision tower: images are not counted")
        print_lengths(dataset.whole_lengths())
        counts, text = count_cut(dataset)
        print(text or f"all fit into {most:,} tokens")
        bad += counts["unanswered"]
    sys.exit(1 if bad else 0)


def main():
    """Show a record, or check files of records."""
    parser = cli.make_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("show", help="print one record, trained tokens in green")
    add.set_defaults(run=show)
    add.add_argument("data", help="LLaVA's JSON")
    add.add_argument("--model", type=Path, required=True, help="folder of a model")
    add.add_argument("--record", type=int, default=0, help="number of the record")
    add.add_argument("--template", choices=TEMPLATES, help="default: the model's")
    add = commands.add_parser("check", help="count bad records by kind")
    add.set_defaults(run=check)
    add.add_argument("data", nargs="+", help="LLaVA's JSON, as in train.py --data")
    add.add_argument("--images", nargs="+", help="folder that image paths start from, or one for each file")
    add.add_argument("--model", type=Path, help="folder of a model: also count tokens with its tokenizer")
    add.add_argument("--template", choices=TEMPLATES, help="for the tokens; default: the model's")
    add.add_argument("--follow-links", action="store_true", help="as in train.py: links may lead out of the folder")
    add.add_argument("--max-length", type=int, help="as in train.py; default: the model's context")
    add.add_argument("--decode", action="store_true", help="also decode every image, to find broken files")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli.run(main, "data.py")
