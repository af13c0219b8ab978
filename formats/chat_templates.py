"""Chat templates in Jinja, as transformers keeps them in a folder: recognize ours in them, and write ours as one."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from inputs.files import read_json, write_atomic
from inputs.gguf_files import find_gguf, read_gguf
from inputs.templates import MARKUP, TEMPLATES, Template
from llava import LlavaConfig

FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
TAG = re.compile(r"(\{#.*?#\}|\{\{.*?\}\}|\{%.*?%\})", re.DOTALL)  # split() gives text, tag, text, tag, ..., text
STRING = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""", re.DOTALL)
WORD = re.compile(r"<[^<>\s]+>|\[/?\w+\]|\n+|\w+|[^\w\s]+")
# Not compared: images, tokens that begin or end a text, and names of roles.
DROPPED = re.compile(r"<image>\n?|</?s>|<\|begin_of_text\|>|\b(bos|eos|user|assistant|system)\b")
# Differences between templates of the same words: a line break after a message, a begin token before every question, a
# space after it.
FEATURES = (r"<\|im_end\|>['\" +~]*(\\n|\n)", r"bos(_token)?[^{}%]*\[INST\]", r" \[/INST\]")

# ---------------------------------------------------------------------------------------------------------------------
# reading


def guess_template(folder: Path, default: str) -> str:
    """The name of our template that renders as a folder's chat template does; `default` if it has none.

    If none of ours does, "unknown (...)" with the file and its first texts: choose_template then asks for one.
    """
    name, source = read_chat_template(folder)
    if not source:
        return default
    if found := recognize(source):
        return found
    texts = dict.fromkeys(text.strip() for text in written_texts(source) if DROPPED.sub("", text).strip())
    ours = "\0".join(part for form in TEMPLATES.values() for part in parts_of(form))
    unknown_first = sorted(texts, key=lambda text: text in ours)
    return f"unknown ({name}: {', '.join(repr(text[:40]) for text in unknown_first[:3])})"


def read_chat_template(folder: Path) -> tuple[str, str]:
    """The file with a folder's chat template, in transformers' order, and its text; two empty texts without one."""
    if gguf := find_gguf(folder):
        return gguf.name, str(read_gguf(gguf).metadata.get("tokenizer.chat_template", ""))
    for name in FILES:
        if (path := folder / name).exists():
            is_jinja = name.endswith("jinja")
            text = path.read_text("utf-8", errors="replace") if is_jinja else read_json(path).get("chat_template")
            if isinstance(text, list):  # several, by name
                text = next((entry["template"] for entry in text if entry.get("name") == "default"), "")
            if text:
                return name, str(text)
    return "", ""


def recognize(source: str) -> str | None:
    """The name of our template that writes the same words as a chat template may; None if there is none.

    A system prompt in it must be ours. If it leaves the system prompt to the caller, ours is added. So ChatML is
    chatml_bare only if it refuses system prompts.
    """
    texts = list(written_texts(source))
    certain_texts = [text for text in texts if text.strip("\n")]  # a line break alone may follow an image

    def adds_system(name: str) -> bool:
        system = TEMPLATES[name].system
        return bool(system) and not any(system.rstrip(".") in text for text in texts)

    for name in sorted(TEMPLATES, key=adds_system):
        form, parts = TEMPLATES[name], parts_of(TEMPLATES[name])
        if form.plain or any(bool(re.search(f, source)) != bool(re.search(f, "\0".join(parts))) for f in FEATURES):
            continue
        if name == "chatml_bare" and "raise_exception" not in source:
            continue
        if words_of(certain_texts, form) <= words_of(parts, form) <= words_of(texts, form):
            return name
    return None


def parts_of(form: Template) -> list[str]:
    """The texts of a template without braces: special tokens by their names, the tokenizer's own as bos and eos."""
    return [MARKUP.sub(r"\1", part) for part in (form.first, form.user, form.assistant, form.end)]


def words_of(texts: list[str], form: Template) -> set[str]:
    """The words and signs in texts, without the system prompt of `form` and without what is not compared."""
    system = f"({re.escape(form.system.rstrip('.'))})\\.?" if form.system else r"\s*<</?SYS>>\s*"  # or a caller's place
    return {word for text in texts for word in WORD.findall(DROPPED.sub("", re.sub(system, " ", text)))}


def written_texts(source: str) -> Iterator[str]:
    """All texts that a chat template may write, outside of its branches about tools."""
    blocks = []  # of the open if and for: whether they are about tools
    for piece in TAG.split(source):
        word = re.match(r"\{%[-+]?\s*(if|elif|else|for|endif|endfor)\b", piece)
        if word and word[1] not in ("if", "for") and blocks:
            blocks.pop()
        if word and not word[1].startswith("end"):
            blocks.append("tool" in piece)
        if word or any(blocks) or piece.startswith("{#") or "raise_exception" in piece:
            continue
        if not piece.startswith(("{{", "{%")):
            yield from [] if piece.isspace() else [piece.removeprefix("\n")]
            continue
        if re.search(r"\bupper\b", piece):
            yield "USER ASSISTANT"
        for single, double in STRING.findall(piece):
            text = re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), single or double)
            if not re.fullmatch("[a-z_]*", text):  # keys and names of roles
                yield text


# ---------------------------------------------------------------------------------------------------------------------
# writing

JINJA = """{%- macro text_of(content) -%}
{%- set images = [] if content is string else content | selectattr('type', 'equalto', 'image') | list -%}
{%- if content is string -%}
{{ content }}
{%- elif images | length < 2 or content[:images | length] == images -%}
{{ '<image>' * (images | length) ~ ('\\n' if images else '') }}
{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- else -%}
{%- for part in content -%}{{ part.text if part.type == 'text' else '<image>' }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set has_system = messages[0].role == 'system' -%}
{%- if has_system and not SYSTEM -%}{{ raise_exception('no place for a system prompt') }}{%- endif -%}
{{ BEFORE ~ ((text_of(messages[0].content) if has_system else '') or SYSTEM) ~ AFTER }}
{%- for message in messages[1 if has_system else 0:] -%}
{%- if message.role == 'user' -%}
{{ ('' if loop.first else USER) ~ text_of(message.content) }}
{%- else -%}
{%- set answer = text_of(message.content) -%}
{{ ASSISTANT ~ (SPACE if answer else '') ~ answer ~ END }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ASSISTANT }}{%- endif -%}
"""


def to_jinja(form: Template, begins: bool) -> str:
    """One of our templates in Jinja. Images come before their question; several stay among texts where they stand.

    Args: begins: write the begin token, as for a decoder alone; with a processor, the tokenizer adds it.
    """
    before, _, after = form.first.partition(form.system) if form.system else (form.first, "", "")
    texts = {"BEFORE": before, "SYSTEM": form.system, "AFTER": after, "USER": form.user, "ASSISTANT": form.assistant}
    texts |= {"SPACE": form.space, "END": form.end}
    constants = "".join(f"{{%- set {name} = {expression(text)} -%}}\n" for name, text in texts.items())
    return constants + ("{{ bos_token }}\n" if begins else "") + JINJA


def expression(text: str) -> str:
    """A text with markup as an expression of Jinja: {bos}[INST] as bos_token ~ "[INST] "."""
    pieces = re.split(r"\{(bos|eos)\}", text)  # text, role, text, role, ..., text
    parts = [f"{piece}_token" if i % 2 else json.dumps(MARKUP.sub(r"\1", piece)) for i, piece in enumerate(pieces)]
    return " ~ ".join(part for part in parts if part != '""') or "''"


def write_chat_template(config: LlavaConfig, folder: Path, source: Path | None = None):
    """Write chat_template.jinja for the template in a config: that of the folder `source`, if it is the same one."""
    theirs = read_chat_template(source)[1] if source and guess_template(source, "") == config.template else ""
    form = TEMPLATES.get(config.template)
    if theirs or (form and form.assistant):
        write_atomic(folder / FILES[0], (theirs or to_jinja(form, config.vision_config is None)).encode())
