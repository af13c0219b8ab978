"""A request of OpenAI's chat completions: its fields, checked by pydantic, and its dialogue as turns and images.

{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
                                           {"type": "text", "text": "What is this?"}]}],
 "temperature": 0.7, "max_tokens": 64, "stream": true}
"""

import base64
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from inputs.records import Turn

MAX_MESSAGES, MAX_CHARACTERS, MAX_IMAGES, MAX_TOKENS = 100, 100_000, 8, 4096  # of one request
HARMLESS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "name"}  # change no answer
HARMLESS |= {"tool_choice", "parallel_tool_calls"}  # nor do these without tools, which are refused
NEUTRAL = {"response_format": {"type": "text"}, "modalities": ["text"]}  # these values ask for what is done anyway
DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


class Refusal(Exception):
    """A request that is answered with an error: one line, the field at fault, HTTP status and OpenAI's code."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(" ".join(message.split()))
        self.param, self.status, self.code = param, status, code


class Fields(BaseModel):
    """An object in a request. Null stands for a field's default; fields that are not listed are refused by name, unless
    they ask for nothing."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, values):
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def refuse_others(self):
        for name, value in self.model_extra.items():
            if value and name not in HARMLESS and value != NEUTRAL.get(name):
                raise ValueError(f"{name!r:.60} is not supported here: leave it out")
        return self


def decode_url(url: str) -> bytes:
    """The image file in a data URL. Raises ValueError for any other address: none is ever fetched."""
    if not (start := DATA_URL.match(url)):
        raise ValueError("it must begin with data:image/...;base64, because no address is fetched")
    return base64.b64decode("".join(url[start.end() :].split()), validate=True)


class Text(Fields):
    type: Literal["text"]
    text: str


class Address(Fields):
    url: Annotated[str, AfterValidator(decode_url)]  # then the bytes of an image file
    detail: Literal["auto", "low", "high"] = "auto"  # without effect: a model has one size of images


class Image(Fields):
    type: Literal["image_url"]
    image_url: Address


Parts = list[Annotated[Text | Image, Field(discriminator="type")]]


class Message(Fields):
    role: Literal["system", "user", "assistant"]
    content: Annotated[Parts, BeforeValidator(lambda c: [{"type": "text", "text": c}] if isinstance(c, str) else c)]


class StreamOptions(Fields):
    include_usage: bool = False


class ChatRequest(Fields):
    """The defaults are sample.py's, but for the seed, which is random without one."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str = ""
    temperature: float = Field(0, ge=0, le=2)
    top_p: float = Field(1, ge=0, le=1)
    top_k: int = Field(0, ge=0)  # 0: draw from all tokens; not one of OpenAI's fields
    max_tokens: int = Field(256, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)  # OpenAI's newer name, which wins
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        Field(max_length=4),
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    ] = []
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class LookRequest(ChatRequest):
    """A dialogue that ends with an answer, and the number of one of its words."""

    word: int = Field(ge=0)


def read_request(body: bytes, kind: type[ChatRequest], model: str) -> ChatRequest:
    """The request of this kind in a body of JSON. Raises Refusal with its first fault. Args: model: the one served."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where, reason = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
        raise Refusal(f"{where}: {reason:.300}" if where else f"{reason:.300}", where or None) from None
    if asked.model not in ("", model):
        raise Refusal(f"there is no model {asked.model!r:.60}, only {model!r}", "model", 404, "model_not_found")
    return asked


def read_dialogue(messages: list[Message]) -> tuple[list[Turn], list[bytes]]:
    """The turns, of which the last waits for its answer, and all image files in order. Raises Refusal."""
    system, turns, images, characters = "", [], [], 0
    for i, message in enumerate(messages):
        texts = [""]  # those of the message, with an image between two of them
        for part in message.content:
            if part.type == "text":
                texts[-1] += part.text
            elif message.role == "user":
                images.append(part.image_url.url)
                texts.append("")
            else:
                raise Refusal(f"messages.{i}: only the user may show images", f"messages.{i}.content")
        text, waits = "".join(texts), bool(turns) and turns[-1].answer is None
        characters += len(text)
        if message.role == "system" and i == 0:
            system = text
        elif message.role == "user" and not waits:
            turns.append(make_turn(text, texts))
        elif message.role == "assistant" and waits:
            turns[-1].answer = text
        else:
            reason = "a system message may come first; then user and assistant take turns, user first"
            raise Refusal(f"messages.{i} is from {message.role}: {reason}", f"messages.{i}.role")
    if not turns or turns[-1].answer is not None:
        raise Refusal("the last message must be the user's", "messages")
    if len(images) > MAX_IMAGES or characters > MAX_CHARACTERS:
        reason = f"a request may have {MAX_IMAGES} and {MAX_CHARACTERS:,}"
        raise Refusal(f"{len(images)} images and {characters:,} characters: {reason}", "messages")
    turns[0].system = system
    return turns, images


def make_turn(question: str, texts: list[str]) -> Turn:
    """A question with an image between two of `texts`.

    Images before or after all of the text are set off by a line break, as in training; others stand where they are.
    """
    images, image_last = len(texts) - 1, question == texts[0]
    if question == texts[-1]:
        return Turn(question, None, images)
    return Turn(question, None, images, image_last, parts=() if image_last else tuple(texts))
