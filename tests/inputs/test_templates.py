"""Templates, written out by hand as their models were trained, and LLaVA's own ids with LLaMA-2's tokenizer."""

import os
from pathlib import Path

import pytest
from test_data import TOKENIZER

from data import render_dialogue
from inputs.records import Turn
from inputs.templates import TEMPLATES, Template, end_ids, stop_text, template_words
from inputs.tokenizer import Tokenizer, train_bpe
from llava import IGNORE

DATA = Path(os.environ.get("LLAVA_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
LLAMA2 = DATA / "tokenizers/llama2"
here = pytest.mark.skipif(not LLAMA2.exists(), reason=f"{LLAMA2} is not here (LLAVA_DATA names the folder)")

TURNS = [Turn("Q1", "A1", 1), Turn("Q2", "A2")]
USER = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
USER += "and polite answers to the user's questions."
HUMAN = USER.replace("curious user", "curious human").replace("user's", "human's")
SEES = "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
SEES += "provides, and assist the user with a variety of tasks using natural language."
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
WRITTEN = {  # two turns, an image in the first; <s> and </s> stand for each tokenizer's own
    "plain": "<s><image>Q1\nA1\nQ2\nA2\n",
    "raw": "<s><image>\nQ1A1</s>Q2A2</s>",
    "vicuna_v1": f"<s>{USER} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "llava_v1": f"<s>{HUMAN} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "llava_v0": f"<s>{HUMAN}###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant: A2###",
    "llava_hf": "<s>USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "llava_llama_2": f"<s>[INST] <<SYS>>\n{SEES}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>",
    "mistral_instruct": "<s>[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST] A2 </s>",
    "llava_llama_3": f"<s>{HEAD.format('system')}{SEES}<|eot_id|>{HEAD.format('user')}<image>\nQ1<|eot_id|>"
    f"{HEAD.format('assistant')}A1<|eot_id|>{HEAD.format('user')}Q2<|eot_id|>{HEAD.format('assistant')}A2<|eot_id|>",
    "chatml": "<s><|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|>"
    "<|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\nA2<|im_end|>",
    "qwen_1_5": "<s><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>",
}
for name, system in (
    ("qwen_2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    ("smollm_2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
):
    WRITTEN[name] = WRITTEN["qwen_1_5"].replace("You are a helpful assistant.", system)
bare = WRITTEN["qwen_1_5"].split("<|im_end|>\n", 1)[1]
WRITTEN["chatml_bare"] = f"<s>{bare}"


def written(ids):
    names = {i: name for name, i in TOKENIZER.specials.items()}
    return "".join(names.get(i) or TOKENIZER.decode([i]) for i in ids)


@pytest.mark.parametrize("template", TEMPLATES)
def test_written_out_by_hand(template):
    ids, labels = render_dialogue(TURNS, TOKENIZER, template, image_tokens=1)
    assert written(ids) == WRITTEN[template]
    learned = written([label for label in labels if label != IGNORE])
    form = TEMPLATES[template]
    end = form.end.replace("{eos}", "</s>").replace("{<", "<").replace(">}", ">")
    assert learned == f"{form.space}A1{end}{form.space}A2{end}"
    assert [written([i]) for i in end_ids(template, TOKENIZER)] == [
        name for name in ("</s>", "<|eot_id|>", "<|im_end|>") if end.endswith(name)
    ]


def test_a_special_token_that_the_tokenizer_lacks_is_named():
    plain = train_bpe(["abc"], 0)
    with pytest.raises(ValueError, match="start_header_id"):
        render_dialogue(TURNS, plain, "llava_llama_3", 1)


def test_only_what_stands_in_braces_is_a_special_token(monkeypatch):
    """So a template can name any special token, and can also hold text that looks like one."""
    tokenizer = train_bpe(["<|im_end|> a cat"], 0)
    turn = tokenizer.add_special("<turn>")
    tokenizer.add_special("<|im_end|>")
    monkeypatch.setitem(TEMPLATES, "own", Template("{<turn>}user ", end="<|im_end|>{<turn>}"))
    ids, labels = render_dialogue([Turn("{<turn>}", "a")], tokenizer, "own", image_tokens=1)
    end = [*tokenizer.encode(" a<|im_end|>"), turn]
    assert ids == [tokenizer.bos_id, turn, *tokenizer.encode("user {<turn>}"), *end]
    assert [label for label in labels if label != IGNORE] == end
    assert end_ids("own", tokenizer) == [turn] and stop_text("own") == ""


def test_the_words_of_a_template_hold_no_special_tokens():
    assert template_words("llava_hf") == ["USER: ", " ASSISTANT:"] and template_words("plain") == []
    assert template_words("llava_llama_2") == ["[INST] ", " [/INST]"]
    assert template_words("qwen_1_5") == ["\n", "user\n", "\n", "assistant\n"]


@pytest.fixture(scope="module")
def llama2():
    """LLaMA-2's tokenizer with LLaVA's own number for an image."""
    tokenizer = Tokenizer.load(LLAMA2)
    tokenizer.specials["<image>"], tokenizer.roles["image"] = -200, "<image>"
    return tokenizer


@here
def test_llavas_own_ids_of_stage_1(llama2):
    ids, labels = render_dialogue([Turn("Describe it.", "a cat on a mat", 1)], llama2, "plain", 1)
    assert ids == [1, -200, 263, 6635, 373, 263, 1775, 13]
    assert labels == [IGNORE, IGNORE, *ids[2:]]


@here
def test_llavas_own_ids_of_stage_2(llama2):
    """The ids of LLaVA's preprocess_v1 for this sample, 60 of them, the last two trained."""
    question = "What is this?\nAnswer the question using a single word or phrase."
    ids, labels = render_dialogue([Turn(question, "Cat", 1)], llama2, "vicuna_v1", 1)
    tail = [322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901, 29871, -200, 29871, 13]
    tail += [5618, 338, 445, 29973, 13, 22550, 278, 1139, 773, 263, 2323, 1734, 470, 16549, 29889]
    tail += [319, 1799, 9047, 13566, 29901, 10459, 2]
    assert len(ids) == 60 and ids[-len(tail) :] == tail
    assert [label for label in labels if label != IGNORE] == [10459, 2] and labels[-2:] == [10459, 2]


@here
@pytest.mark.parametrize("legacy, user", [(True, [3148, 1001]), (False, [11889])])
def test_text_after_an_end_token(llama2, legacy, user):
    """After </s> the old tokenizers put a space in front of USER and the newer do not; LLaVA trained with both."""
    llama2.legacy = legacy
    ids, _ = render_dialogue(TURNS, llama2, "vicuna_v1", 1)
    end = ids.index(2)
    assert ids[end + 1 : end + 1 + len(user)] == user
    llama2.legacy = True
