"""From LLaVA's JSON to batches: pictures, samples, and a look at both.

python data.py show a.json --model DIR                print a record, what is trained on in color
python data.py check a.json b.json:2 --images DIR     everything that is wrong with a mixture; status 1 if anything is
"""

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clip import normalize, preprocess
from formats.configs import read_config
from inputs.files import fsync
from inputs.images import BadImage, check_file, open_image, pad_to_square, resolve_inside, size_of
from inputs.mixture import Source, open_sources
from inputs.records import DataError, Fault, alone, cut_dialogue, image_paths, read_records, turns_of
from inputs.templates import TEMPLATES, render_dialogue
from inputs.tokenizer import Tokenizer
from llava import IGNORE
from variants.anyres import Size, count_tokens, cut_tiles

# ---------------------------------------------------------------------------------------------------------------------
# pictures


@dataclass
class PreparedImage:
    """An image ready for the tower. pixels (N, 3, S, S): one square, or with anyres the whole and its tiles."""

    pixels: torch.Tensor
    size: Size  # height and width as it came
    tokens: int  # placeholders it takes in a prompt


def load_image(root: str | Path, name: str, config) -> PreparedImage:
    """One picture below the folder `root`, as the LlavaConfig `config` wants it. Raises BadImage."""
    return prepare_image(open_image(resolve_inside(root, name)), config)


def prepare_image(image: Image.Image, config) -> PreparedImage:
    vision, size, pinpoints = config.vision_config, (image.height, image.width), config.image_grid_pinpoints
    if not pinpoints:
        pixels = image_pixels(image, vision.image_size, config.image_mode)
        return PreparedImage(pixels[None], size, vision.num_patches)
    tiles = cut_tiles(image, pinpoints, vision.image_size)
    pixels = torch.stack([normalize(tile) for tile in tiles])
    return PreparedImage(pixels, size, count_tokens(size, pinpoints, vision.image_size, vision.patch_size))


def image_pixels(image: Image.Image, size: int, mode: str) -> torch.Tensor:
    """An RGB picture made square, `size` pixels a side: "pad" keeps all of it, "square" cuts out the center."""
    if mode not in ("pad", "square"):
        raise ValueError(f"image mode {mode!r} is neither pad nor square")
    return normalize(pad_to_square(image, size)) if mode == "pad" else preprocess(image, size)


# ---------------------------------------------------------------------------------------------------------------------
# samples


class Samples(Dataset):
    """What the records of some sources become, numbered through, each read and built when it is asked for.

    Args: numbers: of each source, the records that are used. questions: the most that a sample asks, longer dialogues
    are cut into several; None: dialogues stay whole. `skips`: set where bad samples may be replaced, see Skips.
    """

    def __init__(self, sources: list[Source], numbers: list[np.ndarray], questions: int | None = None):
        self.sources, self.questions, self.skips = sources, questions, None
        if questions:
            cuts = [-(-source.file.rounds[part] // questions) for source, part in zip(sources, numbers)]
            numbers = [np.repeat(part, cut) for part, cut in zip(numbers, cuts)]
            cuts = np.concatenate(cuts)
            firsts = np.repeat(np.cumsum(cuts) - cuts, cuts)  # of each sample, the first one of its record
            self.pieces = (np.arange(len(firsts)) - firsts).astype(np.int32)
        self.sizes = [len(part) for part in numbers]
        self.numbers, self.ends = np.concatenate(numbers), np.cumsum(self.sizes)

    def __len__(self) -> int:
        return len(self.numbers)

    def source(self, index: int) -> Source:
        return self.sources[int(np.searchsorted(self.ends, index, side="right"))]

    def record(self, index: int) -> dict:
        """The record of a sample, or the piece of it that the sample is."""
        record = self.source(index).file[self.numbers[index]]
        return cut_dialogue(record, self.questions)[self.pieces[index]] if self.questions else record

    def where(self, index: int) -> str:
        return self.source(index).file.where(int(self.numbers[index]))

    def sample(self, index: int) -> dict:
        """{"ids", "labels", "pixel_values" or "vision_features"}; raises DataError, BadImage."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        """Sample `index`; with `skips`, in place of a bad one the next good one, whoever asks and whenever."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        for number in chain(range(index, len(self)), range(index)):
            try:
                sample = self.sample(number)
            except (DataError, BadImage) as error:
                reason = " ".join(str(error).split())
                if not self.skips:
                    raise DataError(f"{self.where(number)}: {reason}") from None
                self.skips.bad(number, Fault(self.where(number), reason))
            else:
                if self.skips:
                    self.skips.state[number] |= Skips.DRAWN
                return sample
        raise DataError("no sample is good")


class Skips:
    """How much of the data may turn out bad while it is used; shared by the processes that load it for a rank.

    Args: percent: of the samples that were drawn. count: of all samples. path: jsonl that names each once.
    """

    DRAWN, BAD = 1, 2

    def __init__(self, percent: float, count: int, path: Path):
        self.percent, self.path = percent, path
        self.state = torch.zeros(count, dtype=torch.uint8).share_memory_()

    def bad(self, index: int, fault: Fault):
        """Note a bad sample. Raises DataError if that makes too many; the first hundreds are given some room."""
        known = bool(self.state[index] & self.BAD)
        self.state[index] |= self.DRAWN | self.BAD
        if not known:
            name_skipped(self.path, [fault])
        drawn, bad = int((self.state > 0).sum()), int((self.state & self.BAD > 0).sum())
        if bad > self.percent / 100 * max(drawn, min(1000, len(self.state))):
            more = f"bad sample {bad} of {drawn} drawn, over the {self.percent:g} % of --skip-bad"
            raise DataError(f"{fault.record}: {fault.reason} ({more}; {self.path} names all)")


def name_skipped(path: Path, faults: list[Fault]):
    """Add one line of JSON for each record that is left out, unless it is there from before a resume."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = set(path.read_text().splitlines()) if path.exists() else set()
    lines = [json.dumps(fault._asdict()) for fault in faults]
    with path.open("a") as file:
        file.write("".join(line + "\n" for line in lines if line not in known))


def refuse_bad(sources: list[Source], percent: float):
    """Raise DataError if more than so many per cent of the records are bad, or all of one file."""
    faults = [fault for source in sources for fault in source.faults.values()]
    total = sum(len(source.file) for source in sources)
    if len(faults) > percent / 100 * total:
        more = f" ({len(faults):,} of {total:,} records are bad, over the {percent:g} % of --skip-bad)"
        raise DataError(f"{faults[0].record}: {faults[0].reason}{more if percent else ''}")
    for source in sources:
        if len(source.faults) == len(source.file):
            raise DataError(f"{source.file.path}: no record can be used")


class Records(Samples):
    """Training samples: {"ids", "labels", "pixel_values" or "vision_features"}.

    Args: max_length: tokens, placeholders counted; a longer dialogue loses its end, never a part of a picture.
    image_order "either" puts the first picture before or after its question, by a coin that depends only on (seed,
    sample): LLaVA-1.0's paper; the released code, and the default, put it "first". text_only leaves the pictures out:
    what a decoder learns from before it can see. template: of records that name none; default: the model's.
    """

    def __init__(
        self,
        sources,
        tokenizer,
        config,
        max_length,
        image_order="first",
        seed=0,
        text_only=False,
        template=None,
        questions=None,
    ):
        super().__init__(sources, [source.usable() for source in sources], questions)
        self.tokenizer, self.config = tokenizer, config
        self.max_length, self.image_order, self.seed, self.text_only = max_length, image_order, seed, text_only
        self.template = template or config.template
        self.features: dict[tuple[str, str], PreparedImage] = {}  # of a frozen tower: used instead of pixels

    def image_names(self, index: int, record: dict) -> list[tuple[str, str]]:
        """Folder and name of each picture that a sample shows."""
        return [] if self.text_only else [(str(self.source(index).images), name) for name in image_paths(record)]

    def render_record(self, record: dict, tokens: list[int], image_last: bool) -> tuple[list[int], list[int]]:
        """Ids and labels, whole. Args: tokens: of each picture."""
        turns = turns_of(record, image_last)
        if self.text_only:
            turns = [replace(turn, images=0) for turn in turns]
        return render_dialogue(turns, self.tokenizer, record.get("template", self.template), tokens)

    def sample(self, index: int) -> dict:
        record = self.record(index)
        names = self.image_names(index, record)
        if names and self.config.vision_config is None:
            raise DataError("has a picture, but the model has no vision tower")
        image_last = self.image_order == "either" and np.random.default_rng([self.seed, index]).random() < 0.5
        pictures = [self.features.get(name) or load_image(*name, self.config) for name in names]
        tokens = [picture.tokens for picture in pictures]
        ids, labels = self.render_record(record, tokens, image_last)
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if ids.count(self.tokenizer.image_id) != sum(tokens) or labels.count(IGNORE) == len(labels):
            raise DataError(f"its picture and question leave no room for an answer in {self.max_length} tokens")
        kind = "vision_features" if self.features else "pixel_values"
        tiles = [tile for picture in pictures for tile in picture.pixels]
        sizes = [picture.size for picture in pictures] if self.config.image_grid_pinpoints else []
        return {"ids": ids, "labels": labels, kind: tiles, "image_sizes": sizes}

    def images(self, most: int | None = None) -> dict[tuple[str, str], int]:
        """Every picture once (or the first so many), by folder and name, with the sample it is first seen in."""
        found = {}
        for index in range(len(self)):
            if most and len(found) >= most:
                break
            for name in self.image_names(index, self.record(index)):
                found.setdefault(name, index)
        return found

    def load(self, pictures: dict[tuple[str, str], int]) -> dict[tuple[str, str], PreparedImage]:
        """Some of `images()`, ready for the tower. One that is broken is left out where samples may be skipped."""
        found = {}
        for name, index in pictures.items():
            try:
                found[name] = load_image(*name, self.config)
            except BadImage as error:
                if not self.skips:
                    raise DataError(f"{self.where(index)}: {error}") from None
        return found

    def lengths(self) -> np.ndarray:
        """Tokens of each sample as they come to the model, negative without a picture: (N,) int32.

        Counted once and kept beside the index of each file; pictures count as where they come before their question.
        """
        parts = [self.lengths_of(source) for source in range(len(self.sources))]
        return np.clip(np.concatenate(parts), -self.max_length, self.max_length)

    def lengths_of(self, number: int) -> np.ndarray:
        """The same of one source, not cut to max_length."""
        source, first = self.sources[number], int(self.ends[number]) - self.sizes[number]

        def measure() -> np.ndarray:
            title = f"tokens of {source.file.path.name}"
            return np.array(each(partial(self.length, first), self.sizes[number], title), np.int32)

        if not source.file.folder:
            return measure()
        vision, pinpoints = self.config.vision_config, self.config.image_grid_pinpoints
        pictures = [vision.num_patches, pinpoints, pinpoints and str(source.images.resolve())] if vision else None
        what = [self.tokenizer.fingerprint(), self.template, self.questions, self.text_only, pictures]
        key = sha256(repr([*what, sorted(source.faults)]).encode()).hexdigest()[:16]
        path = source.file.folder / f"lengths-{key}.npy"
        with alone(path.with_suffix(".lock")):
            if not path.exists():
                unfinished = path.with_suffix(".partial.npy")
                np.save(unfinished, measure())
                fsync(unfinished)
                os.replace(unfinished, path)
        return np.load(path, mmap_mode="r")

    def length(self, first: int, index: int) -> int:
        """Tokens of sample `first` + `index`, negative without a picture."""
        record = self.record(first + index)
        tokens = [self.tokens_of(*name) for name in self.image_names(first + index, record)]
        ids, _ = self.render_record(record, tokens, image_last=False)
        return len(ids) if tokens else -len(ids)

    def tokens_of(self, folder: str, name: str) -> int:
        """Placeholders of a picture; of one in tiles, whose number goes with its shape, its header is read."""
        vision, pinpoints = self.config.vision_config, self.config.image_grid_pinpoints
        if not vision or not pinpoints:
            return vision.num_patches if vision else 0
        try:
            sizes = [size_of(resolve_inside(folder, name))]
        except BadImage:  # whoever draws it will say so
            sizes = pinpoints
        return max(count_tokens(size, pinpoints, vision.image_size, vision.patch_size) for size in sizes)


BUSY = 20_000  # things to do from which on processes are started for it; they take a second to start


class Each(Dataset):
    def __init__(self, function: Callable, count: int):
        self.function, self.count = function, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return self.function(index)


def each(function: Callable, count: int, title: str) -> list:
    """function(0) to function(count - 1), by many processes where that is a lot, with a bar if it takes a second."""
    workers = min(os.cpu_count(), 32) if count >= BUSY else 0
    rng = torch.Generator()  # or the loader would draw from that of the model's dropout
    loader = DataLoader(Each(function, count), batch_size=256, num_workers=workers, collate_fn=list, generator=rng)
    found = []
    with tqdm(total=count, desc=title, unit="record", unit_scale=True, delay=1) as bar:
        for part in loader:
            found += part
            bar.update(len(part))
    return found


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


class CaptionPairs(Samples):
    """Pictures with a text each, for CLIP: of every record that has one picture.

    The text is cut to the text tower's length, between a begin and an end token.
    """

    def __init__(self, sources: list[Source], tokenizer, config, image_mode: str):
        usable = [(source, source.usable()) for source in sources]
        seen = [(source, part[source.file.image_counts[part] == 1]) for source, part in usable]
        seen = [(source, part) for source, part in seen if len(part)]
        if not seen:
            raise DataError(f"{sources[0].file.path}: no record has a picture")
        super().__init__(*map(list, zip(*seen)))
        self.tokenizer, self.config, self.image_mode = tokenizer, config, image_mode

    def sample(self, index: int) -> dict:
        record = self.record(index)
        room = self.config.text_config.max_position_embeddings - 2
        text = self.tokenizer.encode(text_about(record))[:room]
        ids = [self.tokenizer.bos_id, *text, self.tokenizer.eos_id]
        path = resolve_inside(self.source(index).images, image_paths(record)[0])
        pixels = image_pixels(open_image(path), self.config.vision_config.image_size, self.image_mode)
        labels = [IGNORE] * (len(ids) - 1) + ids[-1:]  # one for each pair: what the loss is divided by
        return {"ids": ids, "labels": labels, "pixel_values": [pixels]}


# ---------------------------------------------------------------------------------------------------------------------
# what is wrong with it


def image_faults(source: Source, decode: bool = False) -> dict[int, Fault]:
    """The usable records whose pictures are not there (or, with decode, cannot be decoded), by number."""
    numbers = source.usable()
    numbers = numbers[source.file.image_counts[numbers] > 0]
    shown = each(partial(shown_by, source.file, numbers), len(numbers), f"pictures named in {source.file.path.name}")
    names = list(dict.fromkeys(chain.from_iterable(shown)))
    look = partial(picture_fault, source.images, names, decode)
    reasons = dict(zip(names, each(look, len(names), f"pictures in {source.images}")))
    found = {}
    for number, own in zip(numbers.tolist(), shown):
        if wrong := [reasons[name] for name in own if reasons[name]]:
            found[number] = Fault(source.file.where(number), wrong[0])
    return found


def shown_by(file, numbers: np.ndarray, i: int) -> list[str]:
    return image_paths(file[numbers[i]])


def picture_fault(root: Path, names: list[str], decode: bool, i: int) -> str:
    try:
        path = resolve_inside(root, names[i])
        open_image(path) if decode else check_file(path)
    except BadImage as error:
        return str(error)
    return ""


def kind_of(reason: str) -> str:
    """A reason without what is particular to one record: its numbers, its names, the path of its picture."""
    reason = re.sub(r"^/.*?: ", "picture: ", reason)
    return re.sub(r"""'(\\.|[^'])*'|"(\\.|[^"])*"|\d+|/\S+""", "…", reason)


def check(sources: list[Source], decode: bool) -> int:
    """Print what is wrong with each source, by kind, with the first records of each; returns how many are bad."""
    bad = 0
    for source in sources:
        source.faults |= image_faults(source, decode)
        images = source.file.image_counts
        print(f"{source.file.path}: {len(images):,} records, {int((images > 0).sum()):,} with pictures", end="")
        print(f" ({source.file.distinct_images:,} different), weight {source.weight:g}; {len(source.faults):,} bad")
        kinds = defaultdict(list)
        for fault in source.faults.values():
            kinds[kind_of(fault.reason)].append(fault)
        for kind, faults in sorted(kinds.items(), key=lambda item: -len(item[1])):
            print(f"  {len(faults):>9,}  {kind}")
            for fault in faults[:3]:
                print(f"             {fault.record}: {fault.reason}".encode(errors="backslashreplace").decode())
        bad += len(source.faults)
    return bad


def print_lengths(lengths: np.ndarray, bars: int = 16):
    """A histogram in text. Args: lengths: in tokens, negative without a picture."""
    sizes, width = np.abs(lengths), 64
    while width * bars <= sizes.max():
        width *= 2
    counts = np.bincount(sizes // width)
    print(f"tokens: {sizes.sum():,} in all, {sizes.mean():.0f} a sample, {sizes.max():,} at most")
    for i, count in enumerate(counts):
        print(f"  {i * width:>7,} - {(i + 1) * width - 1:>7,}  {count:>9,}  {'#' * -(-40 * count // counts.max())}")


def check_files(args: argparse.Namespace):
    """`data.py check`: ends with status 1 if any record is bad."""
    sources = open_sources(args.data, args.images)
    bad, total = check(sources, args.decode), sum(len(source.file) for source in sources)
    print(f"{bad:,} of {total:,} records are bad" if bad else f"all {total:,} records are good")
    if args.model and bad < total:
        config = read_config(args.model)
        dataset = Records(sources, Tokenizer.load(args.model), config, sys.maxsize, template=args.template)
        if config.vision_config is None and any(source.file.distinct_images for source in sources):
            print("the model has no vision tower: its pictures are not counted in")
        print_lengths(np.concatenate([dataset.lengths_of(i) for i in range(len(sources))]))
    sys.exit(1 if bad else 0)


def show(args: argparse.Namespace):
    """`data.py show`: one record as the model reads it, what is trained on in green."""
    tokenizer = Tokenizer.load(args.model)
    turns = turns_of(read_records(args.data)[args.record])
    ids, labels = render_dialogue(turns, tokenizer, args.template or read_config(args.model).template, features=1)
    names = {i: name for name, i in tokenizer.specials.items()}
    for i, label in zip(ids, labels):
        text = names.get(i) or tokenizer.decode([i])
        print(f"\033[32m{text}\033[0m" if label != IGNORE else text, end="|")
    print()


def main():
    """Show a record, or check a mixture; what a user can mend ends in one line and status 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("show", help="print one record with what is trained on in color")
    add.set_defaults(run=show)
    add.add_argument("data", help="LLaVA's JSON")
    add.add_argument("--model", type=Path, required=True, help="folder of a model")
    add.add_argument("--record", type=int, default=0, help="which record to print")
    add.add_argument("--template", choices=TEMPLATES, help="default: the model's")
    add = commands.add_parser("check", help="count what is wrong, by kind")
    add.set_defaults(run=check_files)
    add.add_argument("data", nargs="+", help="LLaVA's JSON, as in train.py --data")
    add.add_argument("--images", nargs="+", help="folder the paths start from, or one for each file")
    add.add_argument("--model", type=Path, help="folder of a model: also count tokens, with its tokenizer")
    add.add_argument("--template", choices=TEMPLATES, help="for the tokens; default: the model's")
    add.add_argument("--decode", action="store_true", help="decode every picture, not only look whether it is there")
    args = parser.parse_args()
    try:
        args.run(args)
    except (ValueError, IndexError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
