"""The records of several sources as one dataset; a subclass turns a record into a sample."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from inputs.images import BadImage
from inputs.mixture import Source
from inputs.records import DataError, cut_dialogue


class Samples(Dataset):
    """The records of several sources, numbered consecutively. Subclasses define `sample`.

    Args: numbers: for each source, the records to use. questions: the most in a sample, longer dialogues are cut; None
    keeps them whole. Attributes: skips: an inputs.check.Skips that replaces bad samples, or None; max_length: tokens of
    a sample, set by subclasses; left_out: good records that are no samples.
    """

    max_length: int
    left_out = 0
    remedy = "raise --max-length, or cut dialogues with --questions"  # against samples that are too long

    def __init__(self, sources: list[Source], numbers: list[np.ndarray], questions: int | None = None):
        self.sources, self.questions, self.skips = sources, questions, None
        if questions:
            cuts = [-(-source.file.rounds[part] // questions) for source, part in zip(sources, numbers)]
            numbers = [np.repeat(part, cut) for part, cut in zip(numbers, cuts)]
            self.pieces = np.concatenate([np.arange(count, dtype=np.int32) for count in np.concatenate(cuts)])
        self.sizes = [len(part) for part in numbers]
        self.numbers, self.ends = np.concatenate(numbers), np.cumsum(self.sizes)

    def __len__(self) -> int:
        return len(self.numbers)

    def source(self, index: int) -> Source:
        return self.sources[int(np.searchsorted(self.ends, index, side="right"))]

    def record(self, index: int) -> dict:
        """The record of sample `index`, or its piece of the record."""
        record = self.source(index).file[self.numbers[index]]
        return cut_dialogue(record, self.questions)[self.pieces[index]] if self.questions else record

    def where(self, index: int) -> str:
        return self.source(index).file.where(int(self.numbers[index]))

    def sample(self, index: int) -> dict:
        """{"ids", "labels", "pixel_values" or "vision_features"}; raises DataError or BadImage."""
        raise NotImplementedError

    def long_samples(self) -> Sequence[int]:
        """Numbers of the samples that may be longer than `max_length`."""
        raise NotImplementedError

    def answer_tokens(self, index: int) -> tuple[int, int]:
        """Trained tokens of a sample, and how many of them stay within `max_length`; 0 if it cannot be used."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.skips:
            return self.skips.load(self, index)
        try:
            return self.sample(index)
        except (DataError, BadImage) as error:
            raise DataError(f"{self.where(index)}: {error}") from None
