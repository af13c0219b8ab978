"""Chat templates in Jinja: which ones are ours, against transformers' own rendering, and ours written for others."""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_data import TOKENIZER

import data
import eval as evaluation
import sample
import train
from clip import CLIPVisionConfig
from data import render_dialogue
from formats import __main__ as formats_cli
from formats.chat_templates import FILES, guess_template, recognize, to_jinja, write_chat_template
from formats.configs import config_to_json
from formats.processors import write_processor
from inputs.files import read_json, write_json
from inputs.records import Turn, marked_turn
from inputs.templates import TEMPLATES
from inputs.tokenizer import Tokenizer
from llava import LlavaConfig, TextConfig

DATA = Path(os.environ.get("LLAVA_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
ROLED = [name for name, form in TEMPLATES.items() if form.assistant]


def each(user, assistant="", prompt="", first="", content="m.content"):
    """A chat template with these texts around the content of each message, and `prompt` before an answer."""
    text = f"{first}{{% for m in messages %}}{{% if m.role == 'user' %}}{user}"
    text += "{% else %}" + (assistant or user) + "{% endif %}{% endfor %}"
    text += "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}" if prompt else ""
    return text.replace("TEXT", content)


def chatml(first="", newline="\\n"):
    head = f"{{% if messages[0].role != 'system' %}}{{{{ '<|im_start|>system\\n{first}<|im_end|>\\n' }}}}{{% endif %}}"
    message = "{{ '<|im_start|>' + m.role + '\\n' + TEXT + '<|im_end|>" + newline + "' }}"
    return each(message, prompt="<|im_start|>assistant\\n", first=head if first else "")


TOOLS = "{%- if tools %}{{- '# Tools\\n\\nCall one of <tools>' }}{%- for tool in tools %}{{- tool | tojson }}"
TOOLS += "{%- endfor %}{%- else %}{{- '' }}{%- endif %}"
USER = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
USER += "and polite answers to the user\\'s questions."
LIST = "{% for p in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
LIST += "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}"
SYS = "{% set head = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' "
SYS += "if messages[0].role == 'system' else '' %}"
HEADER = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + TEXT + '<|eot_id|>' }}"
ROBOT = "You are a robot that answers questions."
CHAT_TEMPLATES = {  # as these families publish them, shortened: the chat template and our name for it
    "LLaVA-1.5": (each("{{ m.role.upper() + ': ' }}" + LIST + "{{ ' ' }}", prompt="ASSISTANT:"), "llava_hf"),
    "LLaVA-1.6-Mistral": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ '<<SYS>>\\n' + m.content[0].text + '\\n<</SYS>>\\n\\n' }}"
        "{% elif m.role == 'user' %}{{ '[INST] ' }}" + LIST + "{{ ' [/INST]' }}{% else %}{{ ' ' + m.content[0].text + "
        "'</s> ' }}{% endif %}{% endfor %}",
        "mistral_instruct",
    ),
    "LLaVA-1.6-34B": (chatml(newline=""), "chatml"),
    "Vicuna": (
        each("{{ ' USER: ' + TEXT }}", "{{ ' ASSISTANT: ' + TEXT + eos_token }}", " ASSISTANT:", f"{{{{ '{USER}' }}}}"),
        "vicuna_v1",
    ),
    "LLaMA-2": (
        SYS + "{% for m in messages if m.role != 'system' %}{% set text = head + m.content if loop.first else m.content"
        " %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{% else %}{{ ' ' + text + "
        "' ' + eos_token }}{% endif %}{% endfor %}",
        "llava_llama_2",
    ),
    "Mistral": (
        each("{{ '[INST] ' + TEXT + ' [/INST]' }}", "{{ ' ' + TEXT + eos_token }}", first="{{ bos_token }}"),
        "mistral_instruct",
    ),
    "LLaMA-3": (each(HEADER, prompt="<|start_header_id|>assistant<|end_header_id|>\\n\\n"), "llava_llama_3"),
    "Qwen2": (chatml("You are a helpful assistant."), "qwen_1_5"),
    "Qwen2.5": (TOOLS + chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), "qwen_2_5"),
    "SmolLM2": (chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"), "smollm_2"),
    "contents only": ("{% for m in messages %}{{ m.content }}{% endfor %}", "raw"),
    # None of ours.
    "Zephyr": (each("{{ '<|' + m.role + '|>\\n' + TEXT + eos_token }}", prompt="<|assistant|>\\n"), None),
    "TinyLlama": (each("{{ '<|user|>\\n' + TEXT + eos_token }}", "{{ '<|assistant|>\\n' + TEXT }}"), None),
    "Alpaca": (each("{{ '### Instruction:\\n' + TEXT }}", "{{ '### Response:\\n' + TEXT }}", "### Response:\\n"), None),
    "Gemma": (each("{{ '<start_of_turn>user\\n' + TEXT + '<end_of_turn>\\n' }}", "{{ TEXT }}"), None),
    "own system": (
        each("{{ 'USER: ' + TEXT }}", "{{ ' ASSISTANT: ' + TEXT }}", " ASSISTANT:", f"{{{{ '{ROBOT} ' }}}}"),
        None,
    ),
    "own ChatML": (chatml(ROBOT), None),
    "thinking": (each("{{ '<|im_start|>' + m.role + '\\n' + TEXT + '<|im_end|>\\n' }}", prompt="<think>\\n"), None),
    "line breaks": (each("{{ 'USER:\\n' + TEXT }}", "{{ ' ASSISTANT:\\n' + TEXT }}", " ASSISTANT:\\n"), None),
    "Mistral 0.3": (each("{{ '[INST] ' + TEXT + '[/INST]' }}", "{{ ' ' + TEXT + eos_token }}"), None),
}


def put(folder, source, file="chat_template.jinja"):
    text = source if file.endswith("jinja") else json.dumps({"chat_template": source})
    (folder / file).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("file", FILES)
def test_a_chat_template_is_one_of_ours_or_unknown(file, tmp_path):
    for source, template in CHAT_TEMPLATES.values():
        put(tmp_path, source, file)
        found = guess_template(tmp_path, "absent")
        assert found == template if template else found.startswith(f"unknown ({file}: "), (source, found)
    if file.endswith("jinja"):
        return
    put(tmp_path, [{"name": "tool_use", "template": "{{ '<|x|>' }}"}, {"name": "default", "template": chatml()}], file)
    assert guess_template(tmp_path, "absent") == "qwen_1_5"
    (tmp_path / file).unlink()
    assert guess_template(tmp_path, "absent") == "absent"


def test_an_unknown_one_is_named_by_what_is_not_ours(tmp_path):
    put(tmp_path, CHAT_TEMPLATES["own system"][0])
    assert guess_template(tmp_path, "raw").startswith(f"unknown (chat_template.jinja: '{ROBOT}', ")


def as_transformers(source, messages):
    """Return transformers' rendering, with the tokens that begin and end a text as spaces and all spaces as one."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    if ".text" in source:
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    (text,), _ = utils.render_jinja_template(
        [messages], chat_template=source, bos_token="<s>", eos_token="</s>", add_generation_prompt=True
    )
    return without_ends(text)


def without_ends(text):
    return re.sub(" +", " ", re.sub(r"</?s>", " ", text)).strip()


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES.keys() - {"contents only"}))
def test_recognized_are_those_that_transformers_renders_alike(name):
    """Of a template that leaves the system prompt to the caller, the caller gives ours."""
    source, template = CHAT_TEMPLATES[name]
    turns = [Turn("Q1", "A1"), Turn("Q2", "A2"), Turn("Q3", None)]
    messages = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"), ("user", "Q3")]
    messages, alike = [{"role": role, "content": text} for role, text in messages], []
    names = {i: name for name, i in TOKENIZER.specials.items()}
    for ours, form in TEMPLATES.items():
        leaves_it = form.system and not re.search("You are|A chat", source)
        given = [{"role": "system", "content": form.system}] if leaves_it else []
        ids, _ = render_dialogue(turns, TOKENIZER, ours, 1)
        want = without_ends("".join(names.get(i) or TOKENIZER.decode([i]) for i in ids))
        if not form.plain and want in (as_transformers(source, messages), as_transformers(source, given + messages)):
            alike.append(ours)
    assert template in alike if template else not alike


# ---------------------------------------------------------------------------------------------------------------------
# ours, written for others


def test_what_we_write_is_recognized():
    for name in ROLED:
        assert recognize(to_jinja(TEMPLATES[name], True)) == recognize(to_jinja(TEMPLATES[name], False)) == name


def folder_with(template, tokenizer, folder, decoder=False):
    """The files that transformers needs to render and encode a dialogue."""
    config = LlavaConfig(
        TextConfig(), None if decoder else CLIPVisionConfig(image_size=28, patch_size=14), template=template
    )
    write_json(folder / "config.json", config_to_json(config))
    write_chat_template(config, folder)
    tokenizer.save(folder)
    if not decoder:
        write_processor(config, folder)


def message(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


CASES = [("byte-level BPE", name) for name in ROLED]
CASES += [("SentencePiece", name) for name in ROLED if "<|" not in TEMPLATES[name].first]


@pytest.fixture(scope="module")
def tokenizer(request):
    if request.param == "byte-level BPE":
        return copy.deepcopy(TOKENIZER)
    if not (DATA / "tokenizers/llama2").exists():
        pytest.skip(f"no LLaMA-2 tokenizer in {DATA}")
    found = Tokenizer.load(DATA / "tokenizers/llama2")
    found.add_special("<image>")
    found.roles["image"] = "<image>"
    return found


@pytest.mark.parametrize("tokenizer, template", CASES, indirect=["tokenizer"])
def test_processor_of_transformers_gives_our_ids(template, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder_with(template, tokenizer, tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path, backend="pil")
    image = {"type": "image", "image": Image.new("RGB", (28, 28))}

    def check(turns, *messages):
        theirs = processor.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, add_generation_prompt=turns[-1].answer is None
        )
        assert theirs["input_ids"][0] == render_dialogue(turns, tokenizer, template, 4)[0]

    first, last = Turn("What is this?", "a cat", 1), Turn("Is it red?", None)
    dialogue = [message("user", image, "What is this?"), message("assistant", "a cat"), message("user", "Is it red?")]
    check([first, last], *dialogue)
    check([first, Turn("Is it red?", "yes")], *dialogue, message("assistant", "yes"))
    check([first], message("user", "What is this?", image), message("assistant", "a cat"))  # the image comes first
    check([Turn("Which?", None, 2)], message("user", image, image, "Which?"))
    check([marked_turn("Is <image> or <image> red?", None)], message("user", "Is ", image, " or ", image, " red?"))
    if TEMPLATES[template].system:
        first.system = "Be brief."
        check([first, last], message("system", "Be brief."), *dialogue)
    else:
        with pytest.raises(Exception, match="no place for a system prompt"):
            check([first, last], message("system", "Be brief."), *dialogue)


@pytest.mark.parametrize("tokenizer, template", CASES, indirect=["tokenizer"])
def test_tokenizer_of_a_decoder_gives_our_ids(template, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder_with(template, tokenizer, tmp_path, decoder=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [("user", "What is this?"), ("assistant", "a cat"), ("user", "Is it red?")]
    messages = [{"role": role, "content": text} for role, text in messages]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == render_dialogue([Turn("What is this?", "a cat"), Turn("Is it red?", None)], tokenizer, template, 4)[0]


def test_pipeline_of_transformers_asks_a_model_of_ours(babbler, tiny, command, capsys):
    transformers = pytest.importorskip("transformers")
    path = next((tiny.world / "heldout-0/0000").iterdir())
    command(sample, "--model", babbler, "--device", "cpu", "--max-new-tokens", 8, "--image", path, "--prompt", "What?")
    content = [{"type": "image", "path": str(path)}, {"type": "text", "text": "What?"}]
    processor = transformers.AutoProcessor.from_pretrained(babbler, backend="pil")  # the default needs torchvision
    ask = transformers.pipeline("image-text-to-text", str(babbler), processor=processor, device="cpu")
    (answer,) = ask(text=[{"role": "user", "content": content}], max_new_tokens=8, return_full_text=False)
    ours = capsys.readouterr().out  # without a last character that is cut
    assert answer["generated_text"].strip(" \ufffd") == ours.strip(" \ufffd\n") != ""


def test_plain_and_raw_have_no_roles_to_write(tmp_path):
    for template in ("plain", "raw", "unknown (chat_template.jinja: '<|user|>')"):
        write_chat_template(LlavaConfig(TextConfig(), template=template), tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# commands


@pytest.fixture
def changed(tiny, tmp_path):
    """A function that copies the tiny model and gives it another chat template, as another program would."""

    def change(source, file="chat_template.json"):
        folder = tmp_path / "changed"
        shutil.copytree(tiny.stage2, folder, symlinks=True)
        values = read_json(folder / "config.json")
        del values["template"]
        write_json(folder / "config.json", values)
        (folder / "chat_template.jinja").unlink()
        put(folder, source, file)
        return folder

    return change


def test_every_model_that_we_write_has_a_chat_template(tiny, tmp_path, command):
    for source, name in ((tiny.stage2, "convert"), (tiny.stage2, "quantize")):
        command(formats_cli, name, source, tmp_path / name)
    for folder in (tiny.decoder, tiny.stage1, tiny.stage2, tmp_path / "convert", tmp_path / "quantize"):
        assert (folder / "chat_template.jinja").read_text() == to_jinja(TEMPLATES["llava_hf"], folder == tiny.decoder)


def test_a_copy_keeps_the_chat_template_of_its_base(changed, tmp_path, command):
    source, template = CHAT_TEMPLATES["LLaVA-1.5"]
    folder = changed(source)
    command(formats_cli, "convert", folder, tmp_path / "same")
    command(formats_cli, "quantize", folder, tmp_path / "nf4")
    command(formats_cli, "convert", folder, tmp_path / "other", "--template", "vicuna_v1")
    for name in ("same", "nf4"):
        assert (tmp_path / name / "chat_template.jinja").read_text() == source
        assert read_json(tmp_path / name / "config.json")["template"] == template
    assert (tmp_path / "other/chat_template.jinja").read_text() == to_jinja(TEMPLATES["vicuna_v1"], False)


def test_an_unknown_chat_template_asks_for_one(changed, tiny, tmp_path, command, capsys):
    """Commands that render a dialogue refuse in one line, until --template names one; the others go on."""
    folder = changed(CHAT_TEMPLATES["Zephyr"][0])
    command(formats_cli, "inspect", folder)
    assert "chat template unknown (chat_template.json: '<|assistant|>', " in capsys.readouterr().out
    command(formats_cli, "convert", folder, tmp_path / "copy")
    assert (tmp_path / "copy/chat_template.jinja").read_text() == CHAT_TEMPLATES["Zephyr"][0]
    instruct, out = tiny.world / "instruct.json", tmp_path / "out"
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "text": "Is it red?"}))
    steps = ["--steps", 1, "--batch-size", 2, "--data", instruct, "--images", tiny.world, "--out", out]
    commands = [
        (sample, "--prompt", "Is it red?", "--device", "cpu", "--max-new-tokens", 2),
        (evaluation, "--questions", tmp_path / "q.jsonl", "--device", "cpu", "--out", tmp_path / "a.jsonl"),
        (data, "show", instruct),
        (data, "check", instruct, "--images", tiny.world),
        (train, "--stage", 2, "--device", "cpu", *steps),
    ]
    for model in (folder, tmp_path / "copy"):
        for script, *argv in commands:
            with pytest.raises(SystemExit) as caught:
                command(script, *argv, "--model", model)
            line = str(caught.value)
            assert len(line.splitlines()) == 1 and "its chat template is unknown (" in line and "--template" in line
    for script, *argv in commands:
        argv += ["--resume"] * (script is train and out.exists())
        try:
            command(script, *argv, "--model", folder, "--template", "llava_hf")
        except SystemExit as end:
            assert not end.code
    assert read_json(out / "config.json")["template"] == "llava_hf"
