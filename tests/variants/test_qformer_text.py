"""The question that a Q-Former with text reads: the same in training and sampling, and never a token of an answer."""

import pytest
import torch
from test_connectors import TOKENS, configure, make_features
from test_llava import IMAGE, answer, randomized

from data import render_dialogue
from inputs.records import Turn
from inputs.templates import TEMPLATES, answer_start_ids, end_ids
from inputs.tokenizer import train_bpe
from llava import IGNORE, Llava
from variants.connectors import INSTRUCTION, find_questions

TEXTS = ["USER: What is this? ASSISTANT: a cat on a mat.", "USER: Is it red? ASSISTANT: yes, a chat."] * 3
TOKENIZER = train_bpe(TEXTS, 50)
for word in ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
    TOKENIZER.add_special(word)
SILENT = ("plain", "raw")  # templates without a text before an answer, so without a question

# Questions that could hide where the answer begins: blanks, the role's own words, nothing at all.
QUESTIONS = ["What is this?", "say: ", "yes  ", "\n", "", "Is it red\n\n", " ASSISTANT", "a ASSISTANT: b", "ü", "7"]
ANSWERS = ["a cat", "yes ASSISTANT: no", "USER: what", "", "</s>"]


def config_of(template):
    config = configure("qformer_text")
    config.image_token_index, config.pad_token_id = TOKENIZER.image_id, TOKENIZER.pad_id
    config.eos_token_ids = sorted({TOKENIZER.eos_id, *end_ids(template, TOKENIZER)})
    config.answer_start_ids = answer_start_ids(template, TOKENIZER)
    return config


def dialogue(question, reply, later, place):
    """Two turns: the image is in the first or second, before or after its question."""
    turns = [Turn(question, reply), Turn("What is that?", later)]
    turns[place // 2].images, turns[place // 2].image_last = 1, place % 2 == 1
    return turns


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_answer_reaches_the_connector(template):
    config, found = config_of(template), 0
    for number, question in enumerate(QUESTIONS * 4):
        reply, place = ANSWERS[number % len(ANSWERS)], number // len(QUESTIONS)
        turns = dialogue(question, reply, "later", place)
        ids, labels = render_dialogue(turns, TOKENIZER, template, TOKENS)
        ((row, columns),) = find_questions(torch.tensor([ids]), config)
        image = ids.index(TOKENIZER.image_id)
        after = [column for column, label in enumerate(labels) if label != IGNORE and column > image]
        # Nothing of the answer that follows the image, nor of later turns. Earlier turns may be read: they are known.
        assert row == 0 and all(column < after[0] for column in columns)
        turns[place // 2].answer = None
        prompt, _ = render_dialogue(turns[: place // 2 + 1], TOKENIZER, template, TOKENS)
        ((_, asked),) = find_questions(torch.tensor([prompt]), config)
        assert [ids[column] for column in columns] == [prompt[column] for column in asked]  # as in sampling
        found += bool(columns)
        if columns and "ASSISTANT" not in question:
            text = TOKENIZER.decode([ids[column] for column in columns])
            assert turns[place // 2].question.strip() in text
    assert found == 0 if template in SILENT else found >= len(QUESTIONS) * 4 - 2


def test_long_questions_keep_their_end():
    config = config_of("llava_hf")
    ids, _ = render_dialogue([Turn("a cat. " * 600, None, 1)], TOKENIZER, "llava_hf", TOKENS)
    ((_, columns),) = find_questions(torch.tensor([ids]), config)
    assert len(columns) == INSTRUCTION and columns[-1] == len(ids) - len(config.answer_start_ids) - 1


START, PAD = [50, 51], 0


def build():
    return randomized(Llava(configure("qformer_text", answer_start_ids=START)), 0.6)


def row(*words, before=()):
    return [*before, *[IMAGE] * TOKENS, *words]


@torch.inference_mode()
def test_tokens_follow_the_question_only():
    """Not one bit changes with answers and later turns; another question changes all tokens."""
    model, features = build(), make_features(1)

    def tokens(*words, before=()):
        ids = row(*words, before=before)
        return model.embed(torch.tensor([ids]), features)[0, len(before) : len(before) + TOKENS]

    asked = tokens(7, 8, *START)
    assert torch.equal(asked, tokens(7, 8, *START, 9, 11, 2))
    assert torch.equal(asked, tokens(7, 8, *START, 9, 11, 2, 13, *START, 14))
    assert ((asked - tokens(8, 7, *START)).abs().amax(-1) > 1e-3).all()  # the order counts
    assert ((asked - tokens(7, 8, *START, before=[6])).abs().amax(-1) > 1e-3).all()
    torch.testing.assert_close(asked, tokens(7, 8, *START, before=[PAD, PAD]))  # padding does not
    silent = tokens(7, 8, 9)  # a caption: no question
    assert torch.equal(silent, tokens(11, 2, *START)) and not torch.equal(silent, asked)


@torch.inference_mode()
def test_answers_do_not_depend_on_the_batch():
    model, features = build(), make_features(4)
    model.config.eos_token_ids = []
    prompts = [row(7, 8, *START), [5, 6], row(9, *row(7, *START), before=[3]), row(7, 8, 9, 11, 12, 13, *START)]
    own = [features[:1], None, features[1:3], features[3:]]
    expected = [answer(model, [prompt], mine, max_new_tokens=6)[0] for prompt, mine in zip(prompts, own)]
    assert answer(model, prompts, features, max_new_tokens=6) == expected
