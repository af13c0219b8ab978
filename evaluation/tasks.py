"""The table of benchmarks: the reader of each one's files, the suffix of its questions, and its scorer."""

import operator
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from evaluation import choice_readers, grader, metrics, readers, scores
from evaluation.predictions import Item, short
from evaluation.readers import refuse
from inputs.records import SURROGATE, DataError
from llava import LlavaConfig

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'.\n" + SHORT


class Task(NamedTuple):
    """One benchmark. Args: score: (items, answers; None for a missing one) to scores by name; suffix: text after each
    question, as LLaVA-1.5 asked it."""

    read: Callable[[list[Path]], list[Item]]
    score: Callable[[list[Item], list[str | None]], dict[str, float]]
    suffix: str = SHORT
    max_new_tokens: int = 128


science_accuracy = partial(scores.accuracy, lambda answer, truth: metrics.science_letter(answer) == truth)
TASKS = {
    "vqav2": Task(readers.read_vqav2, scores.vqa),
    "okvqa": Task(readers.read_vqav2, scores.vqa),
    "gqa": Task(readers.read_gqa, scores.gqa),
    "textvqa": Task(readers.read_textvqa, scores.textvqa),
    "vizwiz": Task(readers.read_vizwiz, partial(scores.accuracy, metrics.m4c_accuracy), UNSURE),
    "pope": Task(choice_readers.read_pope, scores.pope),
    "scienceqa": Task(choice_readers.read_scienceqa, science_accuracy, LETTER, 1024),
    "mme": Task(choice_readers.read_mme, scores.mme),
    "mmbench": Task(choice_readers.read_mmbench, scores.mmbench, LETTER, 1024),
    "seed": Task(choice_readers.read_seed, partial(scores.accuracy, operator.eq), LETTER),
    "mmvet": Task(readers.read_mmvet, grader.require_grades, "", 1024),
    "llavabench": Task(readers.read_llavabench, grader.require_grades, "", 1024),
    "coco": Task(readers.read_captions, scores.captions, CAPTION),
    "textcaps": Task(readers.read_captions, scores.captions, CAPTION),
    "docvqa": Task(readers.read_docvqa, scores.docvqa),
    "chartqa": Task(readers.read_chartqa, scores.chartqa, "Answer the question with a single word."),
    "vqa-rad": Task(readers.read_medical, scores.medical, ""),
    "pathvqa": Task(readers.read_medical, scores.medical, ""),
    "slake": Task(readers.read_medical, scores.medical, ""),
}
NO_OPTION = "answers name no option, or several, which counts as wrong"
# What to report of answers that the scorer cannot read, and whether one is: (item, answer as it is scored) to bool.
VAGUE = {
    "pope": (
        "answers do not say yes; LLaVA's rule counts them as yes, as it does NO and no!",
        lambda _, answer: metrics.yes_no_llava(answer) == "yes" and not re.search(r"\byes\b", answer.lower()),
    ),
    "mme": ("answers begin with neither yes nor no: wrong", lambda _, answer: metrics.yes_no_mme(answer) == "other"),
    "scienceqa": (NO_OPTION, lambda _, answer: not metrics.science_letter(answer)),
    "mmbench": (NO_OPTION, lambda item, answer: not metrics.option_letter(answer, item.options)),
    "seed": (f"{NO_OPTION}: a letter alone is read", lambda _, answer: answer not in tuple("ABCD")),
}


def read_items(task: str, paths: list[Path]) -> list[Item]:
    """The questions of a task. Raises DataError if there are none, if two have one id, or if a question or the name of
    an image is not text."""
    items, seen = TASKS[task].read(paths), set()
    if not items:
        refuse(paths, f"no questions of {task}")
    for item in items:
        if str(item.id) in seen:
            refuse(paths, f"question {short(item.id)} comes twice")
        if not isinstance(item.image, (str, type(None))):
            refuse(paths, f"question {short(item.id)}: its image is {short(item.image)}, not a name")
        if SURROGATE.search(item.text):
            refuse(paths, f"question {short(item.id)} holds half a surrogate pair, which is not text")
        seen.add(str(item.id))
    return items


def build_prompt(item: Item, suffix: str) -> str:
    """The item's text, then the suffix on a line of its own unless the text ends with it already."""
    return item.text if not suffix or item.text.rstrip().endswith(suffix) else f"{item.text}\n{suffix}".lstrip("\n")


def choose_image_mode(task: str | None, mode: str | None, config: LlavaConfig):
    """Set how images are made square: by `mode` if given; else padded for benchmarks, as in LLaVA-1.5's results, and as
    in training for other questions. Raises DataError if `mode` is given and the model cuts images into tiles."""
    if config.vision_config is None or (config.image_grid_pinpoints and mode is None):
        return
    if config.image_grid_pinpoints:
        raise DataError(f"--image-mode {mode}: this model cuts images into tiles")
    mode = mode or ("pad" if task in TASKS else config.image_mode)
    if mode != config.image_mode:
        print(f"images are made square by {mode!r}; the model was trained with {config.image_mode!r}", file=sys.stderr)
    config.image_mode = mode
