"""How a dialogue is written down: the conversation templates, and the one pass that makes ids and labels of it.

`render_dialogue` is the only place where a conversation becomes tokens; training, sampling and evaluation share it.
Nothing is ever searched for in text afterwards, so no answer can be mistaken for structure.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, repeat

from inputs.tokenizer import Tokenizer

IGNORE = -100  # the label of a token that is not trained on; F.cross_entropy's ignore_index


@dataclass(frozen=True)
class Template:
    """How a dialogue is written down: `first` + question + `assistant` + `space` + answer + `end`, then `user` + ...

    What is trained: every answer and its end. In these strings, and nowhere in a user's text, {bos} and {eos} are the
    tokenizer's own tokens, and a name like <|im_end|> is the special token of that name.
    """

    first: str = ""  # what opens the dialogue, system prompt included
    user: str = ""  # what opens every later question
    assistant: str = ""
    space: str = " "  # before an answer
    end: str = "{eos}"
    plain: bool = False  # stage 1: a picture and its caption, no roles, and no question when there is only one


def chatml(system: str, between: str = "") -> Template:
    """OpenAI's markup, as Qwen and Yi speak it; `between` stands before every later turn."""
    user, assistant = "<|im_start|>user\n", f"<|im_end|>{between}<|im_start|>assistant\n"
    system = f"<|im_start|>system\n{system}<|im_end|>{between}" if system else ""
    return Template(system + user, between + user, assistant, "", "<|im_end|>")


CHAT = "A chat between a curious {0} and an artificial intelligence assistant. "
CHAT += "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
USER, HUMAN = CHAT.format("user"), CHAT.format("human")
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
TEMPLATES = {  # from LLaVA's conversation.py, LLaVA-NeXT's, and the chat templates of the llava-hf repositories
    "plain": Template(space="", end="\n", plain=True),
    "raw": Template(space=""),  # no roles: a decoder that was never taught any goes on with the text
    "vicuna_v1": Template(f"{USER} USER: ", "USER: ", " ASSISTANT:"),  # LLaVA-1.5 and -1.6
    "llava_v1": Template(f"{HUMAN} USER: ", "USER: ", " ASSISTANT:"),  # LLaVA-1.0's demo
    "llava_v0": Template(f"{HUMAN}###Human: ", "Human: ", "###Assistant:", end="###"),
    "llava_hf": Template("USER: ", "USER: ", " ASSISTANT:"),  # vicuna_v1 without a system prompt
    "llava_llama_2": Template(f"[INST] <<SYS>>\n{VISION}\n<</SYS>>\n\n", "{bos}[INST] ", " [/INST]", end=" {eos}"),
    "mistral_instruct": Template("[INST] ", "[INST] ", " [/INST]", end=" {eos}"),  # LLaVA-1.6-Mistral
    "llava_llama_3": Template(
        f"{HEADER.format('system')}{VISION}<|eot_id|>{HEADER.format('user')}",
        HEADER.format("user"),
        f"<|eot_id|>{HEADER.format('assistant')}",
        "",
        "<|eot_id|>",
    ),
    "chatml": chatml("Answer the questions."),  # LLaVA-1.6-34B
    "qwen_1_5": chatml("You are a helpful assistant.", "\n"),  # LLaVA-NeXT with Qwen
}
MARKUP = re.compile(r"(\{bos\}|\{eos\}|<\|\w+\|>)")


@dataclass
class Turn:
    """One question (with `images` pictures before or after it) and its answer; None: to be generated."""

    question: str
    answer: str | None
    images: int = 0
    image_last: bool = False


class Transcript:
    """Ids and labels of a dialogue as it is written down, from left to right.

    Text that follows text is one chunk for the tokenizer, until a picture, a special token or an answer begins. So a
    prompt gets the same ids whether its answer is known (training) or not (sampling).
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.labels, self.text = tokenizer, [], [], ""
        self.starts = True  # is the next chunk a beginning, or does it go on from other text?
        if tokenizer.bos_id is not None:
            self.token(tokenizer.bos_id)
            self.starts = True

    def markup(self, text: str, learn: bool = False):
        """Text of a template, in which special tokens are written by name. Raises ValueError on one that is unknown."""
        for piece in MARKUP.split(text):
            if not MARKUP.fullmatch(piece):
                self.text += piece
                continue
            self.flush(learn)
            name = self.tokenizer.roles.get(piece[1:-1], piece)
            if name not in self.tokenizer.specials:
                raise ValueError(f"the template needs {piece}, a special token that this tokenizer does not have")
            self.token(self.tokenizer.specials[name], learn)

    def token(self, i: int, learn: bool = False, count: int = 1):
        self.ids += [i] * count
        self.labels += [i if learn else IGNORE] * count
        self.starts = self.tokenizer.legacy

    def pictures(self, count: int, features: Iterator[int]):
        """Placeholders of so many pictures, as many for each as `features` says next."""
        self.flush()
        self.token(self.tokenizer.image_id, count=sum(islice(features, count)))
        self.starts = True  # LLaVA's tokenizer_image_token encodes what follows on its own

    def flush(self, learn: bool = False):
        """Encode the text gathered so far; the next chunk goes on from it."""
        if self.text:
            new = self.tokenizer.encode(self.text, self.starts)
            self.ids += new
            self.labels += new if learn else [IGNORE] * len(new)
            self.text, self.starts = "", False


def render_dialogue(
    turns: list[Turn], tokenizer: Tokenizer, template: str, features: int | list[int]
) -> tuple[list[int], list[int]]:
    """Ids and labels of a dialogue, in one pass. This is a picture, two placeholders long, in stage 2:

        ids      <s>  USER :  <image> <image>  \\n What is this ?  ASSISTANT :   a cat  </s>
        labels    .    .   .     .       .      .   .   .   .  .      .      .   a cat  </s>

    Args: features: placeholders per picture, 576 for CLIP-L/14-336; a list where they differ. Returns two lists of
    equal length; labels hold IGNORE where nothing is learned.
    """
    form, transcript = TEMPLATES[template], Transcript(tokenizer)
    features = repeat(features) if isinstance(features, int) else iter(features)
    for i, turn in enumerate(turns):
        transcript.markup(form.user if i else form.first)
        question, break_line = turn.question, "" if form.plain else "\n"
        if form.plain and turn.images and not turn.image_last and len(turns) == 1:
            question = ""  # the released stage-1 code drops it: the caption alone follows the picture
        if turn.images and turn.image_last:
            transcript.text += question + "\n"
            transcript.pictures(turn.images, features)
        else:
            if turn.images:
                transcript.pictures(turn.images, features)
                transcript.text += break_line
            transcript.text += question + ("\n" if form.plain and question else "")
        transcript.markup(form.assistant)
        transcript.flush()
        if turn.answer is not None:
            transcript.text += (form.space if turn.answer else "") + turn.answer  # of an empty one, the end is learned
            transcript.markup(form.end, learn=True)
            transcript.flush(learn=True)
    return transcript.ids, transcript.labels


def prompt_ids(
    questions: list[str],
    answers: list[str],
    images: int,
    tokenizer: Tokenizer,
    template: str,
    features: int | list[int],
) -> list[int]:
    """Ids of a dialogue up to where the model speaks: every question but the last is answered; pictures come first."""
    turns = [
        Turn(question, answer, images if i == 0 else 0)
        for i, (question, answer) in enumerate(zip(questions, [*answers, None], strict=True))
    ]
    return render_dialogue(turns, tokenizer, template, features)[0]


def stop_text(template: str) -> str:
    """The text that ends an answer where no special token does: "###" of llava_v0, a line's end of captions."""
    end = TEMPLATES[template].end
    return "" if MARKUP.search(end) else end


def end_ids(template: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of the special tokens that end an answer in this template."""
    names = (tokenizer.roles.get(name[1:-1], name) for name in MARKUP.findall(TEMPLATES[template].end))
    return [tokenizer.specials[name] for name in names if name in tokenizer.specials]
