"""Chat templates in Jinja, as transformers keeps them in a folder: recognize ours in them, and write ours as one."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from inputs.files import read_json, write_atomic
from inputs.templates import MARKUP, TEMPLATES, Template
from llava import LlavaConfig

FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
TAG = re.compile(r"(\{#.*?#\}|\{\{.*?\}\}|\{%.*?%\})", re.DOTALL)  # split() gives text, tag, text, tag, ..., text
STRING = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""", re.DOTALL)
WORD = re.compile(r"<[^<>\s]+>|\[/?\w+\]|\n+|\w+|[^\w\s]+")
# Images, tokens that begin or end a text, and names of roles.
DROPPED = re.compile(r"<image>\n?|</?s>|<\|begin_of_text\|>|\b(user|assistant|system)\b")
# What words do not show: a line break after a message, a begin token before every question, a space after it.
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
    ours = MARKUP.sub(r"\1", "\0".join(f"{form.first}\0{form.assistant}\0{form.end}" for form in TEMPLATES.values()))
    strange_first = sorted(texts, key=lambda text: text in ours)
    return f"unknown ({name}: {', '.join(repr(text[:40]) for text in strange_first[:3])})"


def read_chat_template(folder: Path) -> tuple[str, str]:
    """The file with a folder's chat template, in transformers' order, and its text; two empty texts without one."""
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
    """The name of our template that a chat template equals, by all texts that it may write; None if there is none.

    A system prompt of its own must be ours. If it leaves the system prompt to the caller, ours is added.
    """
    texts = list(written_texts(source))

    def adds_system(item: tuple[str, Template]) -> bool:
        return bool(item[1].system) and not any(item[1].system.rstrip(".") in text for text in texts)

    for name, form in sorted(TEMPLATES.items(), key=adds_system):
        ours = MARKUP.sub(r"\1", f"{form.first}{form.user}{form.assistant}{form.end}")
        if form.plain or any(bool(re.search(f, source)) != bool(re.search(f, ours)) for f in FEATURES):
            continue
        parts = [MARKUP.sub(special_text, part) for part in (form.first, form.user, form.assistant, form.end)]
        want, found = words_of(parts, form), words_of(texts, form)
        certain = words_of([text for text in texts if text.strip("\n")], form)  # a line break alone may follow an image
        if certain <= want <= found:
            return name
    return None


def special_text(match: re.Match) -> str:
    return "" if match[1] in ("bos", "eos") else match[1]


def words_of(texts: list[str], form: Template) -> set[str]:
    """The words and signs in texts, without the form's system prompt, names of roles, and tokens of begin and end."""
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
{%- set system = (text_of(messages[0].content) if has_system else '') or SYSTEM -%}
{{ FIRST }}
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
NO_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{{ raise_exception('no place for a system prompt') }}{%- endif -%}\n"
)


def to_jinja(form: Template, begins: bool) -> str:
    """One of our templates in Jinja. Images come before their question; several stay among texts where they stand.

    Args: begins: write the begin token, as for a decoder alone; with a processor, the tokenizer adds it.
    """
    before, _, after = form.first.partition(form.system) if form.system else (form.first, "", "")
    values = {"SYSTEM": form.system, "USER": form.user, "ASSISTANT": form.assistant, "SPACE": form.space}
    values = {name: expression(text) for name, text in (values | {"END": form.end}).items()}
    values["FIRST"] = f"{expression(before)} ~ system ~ {expression(after)}"
    body = re.sub(r"\b(SYSTEM|USER|ASSISTANT|SPACE|END|FIRST)\b", lambda match: values[match[0]], JINJA)
    return ("" if form.system else NO_SYSTEM) + ("{{ bos_token }}\n" if begins else "") + body


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
