"""Turn a request into a job for the engine, or into a map of where one word of an answer comes from."""

import base64
import secrets
from collections.abc import Iterator
from io import BytesIO

from PIL import Image

from data import PreparedImage, prepare_image, render_dialogue
from inputs.images import open_image
from inputs.records import DataError, Turn
from inputs.templates import stop_text
from inputs.tokenizer import Tokenizer
from insight.look import paint_map, shade, token_boxes
from insight.maps import MAPS, Answer, find_words
from serve.engine import Engine, Job
from serve.requests import ChatRequest, LookRequest, Refusal, read_dialogue
from variants.connectors import CONNECTORS

LOOK_BY, SIDE = "attention", 448  # the map, one that needs a single pass; its longer side in pixels


def open_images(files: list[bytes], config) -> Iterator[tuple[Image.Image, PreparedImage]]:
    """Each image of a dialogue, at most SIDE pixels large, and for the vision tower; one at a time, since an image may
    take 150 MB. Raises Refusal."""
    if files and config.vision_config is None:
        raise Refusal("this model is a decoder without a vision tower: ask it without images", "messages")
    for i, file in enumerate(files, 1):
        try:
            image = open_image(f"image {i}", file)
        except ValueError as error:
            raise Refusal(str(error), "messages") from None
        prepared = prepare_image(image, config)
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        yield image, prepared


def render(turns: list[Turn], tokenizer: Tokenizer, config, images: list[PreparedImage]) -> list[int]:
    """The ids of a dialogue. Raises Refusal if they leave no room for another token in the context."""
    try:
        ids, _ = render_dialogue(turns, tokenizer, config.template, [image.tokens for image in images])
    except DataError as error:
        raise Refusal(f"the dialogue {error}", "messages") from None
    if len(ids) >= (limit := config.text_config.max_position_embeddings):
        reason = f"the prompt is {len(ids):,} tokens long, images included; the context holds {limit:,}"
        raise Refusal(reason, "messages", code="context_length_exceeded")
    return ids


def prepare_job(asked: ChatRequest, engine: Engine) -> Job:
    """The job that answers a request. Raises Refusal."""
    config, tokenizer = engine.model.config, engine.tokenizer
    turns, files = read_dialogue(asked.messages)
    images = [image for _, image in open_images(files, config)]
    prompt = render(turns, tokenizer, config, images)
    room = config.text_config.max_position_embeddings - len(prompt)
    most = min(asked.max_completion_tokens or asked.max_tokens, room)
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    stops = tuple(filter(None, [*asked.stop, stop_text(config.template)]))
    return Job(prompt, images, most, asked.temperature, asked.top_k, asked.top_p, seed, stops)


def draw_maps(asked: LookRequest, engine: Engine) -> dict:
    """The images of a dialogue as data URLs, darkened where a word of its last answer does not come from.

    The answer's ids are those that its text has in training. Raises Refusal.
    """
    model, tokenizer, last = engine.model, engine.tokenizer, asked.messages[-1]
    config = model.config
    if hasattr(model.language_model.model, "virtual"):
        raise Refusal("no map: a prompt or prefix stands before the image", "word")
    if config.projector_type in CONNECTORS:
        raise Refusal(f"no map: this model's {config.projector_type} does not make one token of each patch", "word")
    text = "".join(part.text for part in last.content if part.type == "text").strip()
    turns, files = read_dialogue(asked.messages[:-1])
    opened = list(open_images(files, config))
    images, prepared = [image for image, _ in opened], [image for _, image in opened]
    prompt = render(turns, tokenizer, config, prepared)
    turns[-1].answer = text
    ids = render(turns, tokenizer, config, prepared)
    words = find_words(prompt, ids[len(prompt) :], text, tokenizer)
    if last.role != "assistant" or not images or asked.word >= len(words):
        raise Refusal("the last message must be an answer about an image that has this word", "word")
    word = words[asked.word]
    values = engine.call(lambda: MAPS[LOOK_BY](model, Answer(ids, [word], prepared)))[0]
    values, sizes = values.split([image.tokens for image in prepared]), [image.size for image in prepared]
    scales = [SIDE / max(size) for size in sizes]
    heats = [paint_map(v.numpy(), token_boxes(s, config), s, scale) for v, s, scale in zip(values, sizes, scales)]
    peak = max(heat.max() for heat in heats) or 1
    return {"word": word.text, "by": LOOK_BY, "images": [to_url(shade(i, h / peak)) for i, h in zip(images, heats)]}


def to_url(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
