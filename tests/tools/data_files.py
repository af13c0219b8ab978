"""Records, JSON files and a small tokenizer and config, for the tests of the data layer."""

import json

from clip import CLIPVisionConfig
from inputs.tokenizer import train_bpe
from llava import LlavaConfig, TextConfig

TOKENIZER = train_bpe(["USER: What is this? ASSISTANT: a cat on a mat."] * 3, 50)
CONFIG = LlavaConfig(TextConfig(), CLIPVisionConfig(image_size=4, patch_size=2), template="llava_hf")


def record(question, answer, image=None, number="x"):
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": number} | ({"image": image} if image else {}) | {"conversations": messages}


def with_image(name, count=1):
    """Return records that ask about image `name`, with answers of different lengths."""
    return [record("<image>\nWhat?", "a cat " * (1 + i % 7), name, i) for i in range(count)]


def without_image(count=1):
    """Return records of text, with answers of different lengths."""
    return [record("What?", "a cat " * (1 + i % 9), number=i) for i in range(count)]


def write_json(path, content):
    """Write a JSON file; returns its path."""
    path.write_text(json.dumps(content))
    return path
