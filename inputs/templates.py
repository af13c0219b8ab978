"""Conversation templates: the text around questions and answers that each family of models was trained with.

`data.render_dialogue` turns a dialogue into token ids with one of TEMPLATES.
"""

import re
from dataclasses import dataclass

from inputs.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """The text of a dialogue: `first` question `assistant` `space` answer `end`, then `user` question `assistant` ...

    Special tokens stand in braces: {<|im_end|>} is the token of that name, {bos} and {eos} are the tokenizer's own.
    Everything outside braces is ordinary text. A user's text is always ordinary, even with braces.
    """

    first: str = ""  # opens the dialogue, with the system prompt
    user: str = ""  # opens every later question
    assistant: str = ""  # closes a question
    space: str = " "  # before an answer
    end: str = "{eos}"  # closes an answer; trained on, like the answer
    plain: bool = False  # stage 1: an image and its caption without roles; a question before one answer is dropped
    system: str = ""  # the system prompt in `first`, which a record's own replaces; "": there is no place for one


def chatml(system: str, newline: str = "") -> Template:
    """OpenAI's ChatML, used by Qwen and Yi. Args: newline: text between the end of a turn and the next one."""
    user, assistant = "{<|im_start|>}user\n", "{<|im_end|>}" + newline + "{<|im_start|>}assistant\n"
    first = "{<|im_start|>}system\n" + system + "{<|im_end|>}" + newline + user
    return Template(first, newline + user, assistant, "", "{<|im_end|>}", system=system)


def llama_3(system: str) -> Template:
    header, end = "{<|start_header_id|>}%s{<|end_header_id|>}\n\n", "{<|eot_id|>}"
    user, assistant = header % "user", header % "assistant"
    return Template(header % "system" + system + end + user, user, end + assistant, "", end, system=system)


CHATML_USER, CHATML_ASSISTANT = "{<|im_start|>}user\n", "{<|im_end|>}\n{<|im_start|>}assistant\n"
CHAT = "A chat between a curious {0} and an artificial intelligence assistant. "
CHAT += "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
USER, HUMAN = CHAT.format("user"), CHAT.format("human")
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# From LLaVA's conversation.py, LLaVA-NeXT's, and the chat templates of the llava-hf repositories and of decoders.
TEMPLATES = {
    "plain": Template(space="", end="\n", plain=True),
    "raw": Template(space=""),  # no roles: a decoder that was trained on none continues the text
    "vicuna_v1": Template(f"{USER} USER: ", "USER: ", " ASSISTANT:", system=USER),  # LLaVA-1.5 and -1.6
    "llava_v1": Template(f"{HUMAN} USER: ", "USER: ", " ASSISTANT:", system=HUMAN),  # LLaVA-1.0's demo
    "llava_v0": Template(f"{HUMAN}###Human: ", "Human: ", "###Assistant:", end="###", system=HUMAN),
    "llava_hf": Template("USER: ", "USER: ", " ASSISTANT:"),  # vicuna_v1 without a system prompt
    "llava_llama_2": Template(
        f"[INST] <<SYS>>\n{VISION}\n<</SYS>>\n\n", "{bos}[INST] ", " [/INST]", end=" {eos}", system=VISION
    ),
    "mistral_instruct": Template("[INST] ", "[INST] ", " [/INST]", end=" {eos}"),  # LLaVA-1.6-Mistral
    "llava_llama_3": llama_3(VISION),
    "chatml": chatml("Answer the questions."),  # LLaVA-1.6-34B
    "qwen_1_5": chatml("You are a helpful assistant.", "\n"),  # LLaVA-NeXT with Qwen; Qwen2
    "qwen_2_5": chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "\n"),
    "chatml_bare": Template(CHATML_USER, "\n" + CHATML_USER, CHATML_ASSISTANT, "", "{<|im_end|>}"),  # no system prompt
    "smollm_2": chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face", "\n"),
}
MARKUP = re.compile(r"\{(.+?)\}")  # split() gives text, name, text, name, ..., text


def find_template(name: str) -> Template:
    """The template of this name. Raises ValueError for a checkpoint's whose chat template is none of ours."""
    if name not in TEMPLATES:
        raise ValueError(f"its chat template is {name}, not one of ours: --template takes {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def special_id(name: str, tokenizer: Tokenizer) -> int | None:
    """Id of a special token from its name or its role ("bos", "eos"); None if the tokenizer does not have it."""
    return tokenizer.specials.get(tokenizer.roles.get(name, name))


def end_ids(template: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of the special tokens that end an answer in this template."""
    ids = [special_id(name, tokenizer) for name in MARKUP.findall(find_template(template).end)]
    return [i for i in ids if i is not None]


def answer_start_ids(template: str, tokenizer: Tokenizer) -> list[int]:
    """Ids before every answer in this template, whatever the question: those of " ASSISTANT:", say.

    A question's last characters may join the first ids, so the ids are those that different questions have in common.
    [] if the template has no such text, or the tokenizer lacks one of its special tokens.
    """
    text, *rest = MARKUP.split(find_template(template).assistant)  # text, name, text, name, ..., text
    fixed = []
    for name, after in zip(rest[::2], rest[1::2]):
        fixed += [special_id(name, tokenizer), *(tokenizer.encode(after, tokenizer.legacy) if after else [])]
    common, *others = ([*tokenizer.encode(question + text), *fixed] for question in ("a", "7", "?", ".", ": ", "\n"))
    for ids in others:
        same = [a == b for a, b in zip(reversed(ids), reversed(common))]
        common = common[len(common) - (same.index(False) if False in same else len(same)) :]
    return [] if None in fixed or not find_template(template).assistant else common


def stop_text(template: str) -> str:
    """The text that ends an answer if no special token does: "###" in llava_v0, a line break in captions; else ""."""
    end = TEMPLATES[template].end
    return "" if MARKUP.search(end) else end


def is_whole_prompt(question: str) -> bool:
    """Whether a question ends as a prompt does, with the text before an answer in some template, such as ASSISTANT:"""
    ends = {MARKUP.sub(r"\1", form.assistant).strip() for form in TEMPLATES.values()} - {""}
    return question.rstrip().endswith(tuple(ends))


def template_words(template: str) -> list[str]:
    """The text of the roles without special tokens, for training a tokenizer: ["USER: ", " ASSISTANT:"]."""
    form = TEMPLATES[template]
    return [text for part in (form.user, form.assistant) for text in MARKUP.split(part)[::2] if text]
