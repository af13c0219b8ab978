"""Prompts for tests, without the markers of images."""

from data import render_dialogue
from inputs.records import Turn


def prompt_ids(questions: list[str], answers: list[str], images: int, tokenizer, template, image_tokens) -> list[int]:
    """Ids of a dialogue up to the answer to its last question; all images come before the first question."""
    turns = [Turn(question, answer) for question, answer in zip(questions, [*answers, None], strict=True)]
    turns[0].images = images
    return render_dialogue(turns, tokenizer, template, image_tokens)[0]
