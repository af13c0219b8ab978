"""The models in lmms-eval: found by their entry points, answers and scores of eval.py, errors that are raised.

The base class, registry and requests are lmms-eval's own. A whole run needs all of its dependencies.
"""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

import eval as evaluation
from data import render_dialogue
from evaluation import answering
from evaluation.lmms import LlavaFromScratch
from evaluation.lmms_chat import LlavaFromScratchChat, turns_of_messages
from inputs.images import BadImage, open_image

ROOT = Path(evaluation.__file__).parent
GROUP = "lmms_eval.models"
OPTIONS = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": []}


@pytest.fixture(scope="module")
def lm(babbler):
    return LlavaFromScratch(str(babbler), device="cpu", batch_size="4")


@pytest.fixture(scope="module")
def docs(tiny):
    return evaluation.read_questions(tiny.world / "questions.jsonl")[:12]


@pytest.fixture(scope="module")
def doc_to_visual(tiny):
    return lambda doc: [open_image(tiny.world / doc["image"])] if doc.get("image") else []


def requests(lm, docs, arguments):
    """A request for each doc, as lmms-eval makes them. Args: arguments: those before doc_id, from a doc."""
    lm.task_dict = {"task": {"test": docs}}
    found = ((*arguments(doc), number, "task", "test") for number, doc in enumerate(docs))
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    return [Instance("generate_until", values, number, metadata=metadata) for number, values in enumerate(found)]


def generate(lm, docs, doc_to_visual, options=lambda doc: OPTIONS):
    return lm.generate_until(requests(lm, docs, lambda doc: (doc["text"], options(doc), doc_to_visual)))


# ---------------------------------------------------------------------------------------------------------------------
# registration


def test_the_entry_points_lead_to_classes_that_lmms_eval_accepts(tmp_path, monkeypatch):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    for name, value in declared.items():
        assert EntryPoint(name, value, GROUP).load().model_id == name
    folder = tmp_path / "planted-1.0.dist-info"  # as pip writes it
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in declared.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("llava_from_scratch") is LlavaFromScratch
    assert registry.get_model_class("llava_from_scratch_chat") is LlavaFromScratchChat


# ---------------------------------------------------------------------------------------------------------------------
# answers


def test_answers_are_those_of_eval(lm, docs, doc_to_visual, tiny):
    """In the order of the requests, also where they differ in their options."""
    mixed = generate(lm, docs, doc_to_visual, lambda doc: OPTIONS | {"max_new_tokens": 5 + doc["question_id"] % 3})
    for doc, text in zip(docs, mixed):
        length = 5 + doc["question_id"] % 3
        want = answering.answer_batch(lm.model, lm.tokenizer, [doc], tiny.world, length, answering.Cost())
        assert [text] == want
    assert len(set(mixed)) > 6


def test_an_answer_ends_where_a_text_of_until_begins(lm, docs, doc_to_visual):
    whole = generate(lm, docs, doc_to_visual)
    letters = [text[len(text) // 2] for text in whole]
    for until in (letters[0], letters[:3], None):
        cut = generate(lm, docs, doc_to_visual, lambda doc, until=until: OPTIONS | {"until": until})
        ends = [min((text.find(stop) for stop in until or [] if stop in text), default=len(text)) for text in whole]
        assert cut == [text[:end] for text, end in zip(whole, ends)]
    assert cut == whole


def test_several_images_stand_at_their_markers_or_first(lm, docs, doc_to_visual, tiny):
    images = [doc["image"] for doc in docs[:2]]
    opened = [open_image(tiny.world / name) for name in images]
    for text in ("Which is larger?", "Is <image> larger than <image>?"):
        question = {"question_id": 1, "text": text, "image": images}
        want = answering.answer_batch(lm.model, lm.tokenizer, [question], tiny.world, 8, answering.Cost())
        assert generate(lm, [question], lambda _: opened) == want


def test_sampling_follows_temperature_unless_it_is_switched_off(lm, docs, doc_to_visual):
    warm = OPTIONS | {"temperature": 2.0}
    greedy = generate(lm, docs, doc_to_visual)
    assert generate(lm, docs, doc_to_visual, lambda doc: warm) == greedy
    assert generate(lm, docs, doc_to_visual, lambda doc: warm | {"do_sample": True}) != greedy
    assert generate(lm, docs, doc_to_visual, lambda doc: warm | {"do_sample": True, "top_p": 1e-9}) == greedy


def test_each_round_is_asked_with_the_answers_before_it(lm, docs, doc_to_visual, tiny):
    def doc_to_text(doc, previous_output, round_idx, previous_round_info):
        assert len(previous_output) == round_idx and previous_round_info == (None if round_idx == 1 else round_idx - 1)
        asked.append(previous_output[-1])
        return doc_to_visual(doc), f"{doc['text']} {round_idx}", round_idx == 3, previous_output, round_idx

    asked, doc = [], docs[0]
    made = requests(lm, [doc], lambda doc: (doc["text"], OPTIONS, doc_to_visual, doc_to_text))
    (rounds,) = lm.generate_until_multi_round(made)
    texts = [doc["text"], f"{doc['text']} 1", f"{doc['text']} 2"]
    questions = [doc | {"text": text} for text in texts]
    assert rounds == asked == answering.answer_batch(lm.model, lm.tokenizer, questions, tiny.world, 8, answering.Cost())


def test_of_the_choices_the_likeliest_has_the_smallest_value(lm, docs, doc_to_visual):
    """lmms-eval takes np.argmin of a multiple_choice task's values; other tasks get the log-probability itself."""
    choices = ["red", "blue", "a circle"]
    values = [
        lm.loglikelihood(requests(lm, docs[:1], lambda doc, c=c: (doc["text"], f" {c}", doc_to_visual)))
        for c in choices
    ]
    for choice, ((value, is_greedy),) in zip(choices, values):
        ((log, again),) = lm.loglikelihood(
            requests(lm, docs[:1], lambda doc, c=choice: (doc["text"], lambda _: c, doc_to_visual))
        )
        assert log == -value < 0 and is_greedy is again is False


# ---------------------------------------------------------------------------------------------------------------------
# chat


def test_a_chat_task_gives_the_answers_of_a_simple_one(lm, babbler, docs, doc_to_visual):
    def doc_to_messages(doc):
        content = [{"type": "image", "url": image} for image in doc_to_visual(doc)]
        return [{"role": "user", "content": [*content, {"type": "text", "text": doc["text"]}]}]

    chat = LlavaFromScratchChat(str(babbler), device="cpu", batch_size=4)
    made = requests(chat, docs, lambda doc: (doc["text"], doc_to_messages, OPTIONS))
    assert chat.generate_until(made) == generate(lm, docs, doc_to_visual)


IMAGE = {"type": "image", "url": Image.new("RGB", (72, 72), "red")}


def say(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


@pytest.mark.parametrize("messages", [
    [say("user", IMAGE, "Red?")], [say("user", "Red?", IMAGE)], [say("user", IMAGE, IMAGE, "Same?")],
    [say("user", "Hi")], [say("user", "Is ", IMAGE, " like ", IMAGE, "?")],
    [say("user", IMAGE, "Red?"), say("assistant", "yes"), say("user", "And ", IMAGE, " or ", IMAGE)],
])  # fmt: skip
def test_a_dialogue_is_rendered_as_the_chat_template_of_the_folder_says(lm, babbler, messages):
    transformers = pytest.importorskip("transformers")
    from lmms_eval.protocol import ChatMessages

    turns, images = turns_of_messages(ChatMessages(messages=messages))
    ids, _ = render_dialogue(turns, lm.tokenizer, lm.model.config.template, 9)
    processor = transformers.AutoProcessor.from_pretrained(babbler)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    theirs = processor(text=text, images=images or None)["input_ids"]
    assert ids == (theirs[0] if isinstance(theirs[0], list) else theirs)


@pytest.mark.parametrize("messages", [
    [], [say("assistant", "yes")], [say("user", "a"), say("user", "b")], [say("user", "a"), say("assistant", "b")],
    [say("system", IMAGE), say("user", "a")], [say("user", "a"), say("assistant", IMAGE), say("user", "b")],
])  # fmt: skip
def test_a_dialogue_out_of_order_is_refused(messages):
    from lmms_eval.protocol import ChatMessages

    with pytest.raises(ValueError, match="user"):
        turns_of_messages(ChatMessages(messages=messages))


# ---------------------------------------------------------------------------------------------------------------------
# errors are raised, and never become wrong answers


@pytest.mark.parametrize("text, images, options, why", [
    ("Red?", ["video.mp4"], {}, "reads images, not 'video.mp4'"), ("Red?", None, {"num_beams": 3}, "beam search"),
    ("<image> or <image>?", None, {}, "2 <image> markers for 1 images"), ("<image>?", [], {}, "no image for it"),
    ("Red? " * 1000, None, {}, "tokens long"), ("Red?", [Image.new("F", (9, 9))], {}, "32 bits a channel"),
])  # fmt: skip
def test_what_cannot_be_answered_is_raised(lm, docs, doc_to_visual, text, images, options, why):
    doc = docs[0] | {"text": text}
    with pytest.raises((ValueError, BadImage), match=why):
        generate(lm, [doc], doc_to_visual if images is None else lambda _: images, lambda doc: OPTIONS | options)


def test_a_decoder_refuses_images_and_unread_options_are_named(tiny, docs, doc_to_visual, capsys):
    decoder = LlavaFromScratch(str(tiny.decoder), device="cpu")
    with pytest.raises(ValueError, match="without a vision tower"):
        generate(decoder, docs[:1], doc_to_visual)
    generate(decoder, docs[:2], lambda _: None, lambda doc: OPTIONS | {"image_aspect_ratio": "pad"})
    assert capsys.readouterr().err.count("gen_kwargs that are not read: image_aspect_ratio") == 1


# ---------------------------------------------------------------------------------------------------------------------
# a whole run


@pytest.mark.skipif(not find_spec("datasets") or not find_spec("evaluate"), reason="lmms-eval's own dependencies")
def test_the_score_of_a_world_is_that_of_eval(tiny, babbler, command, tmp_path, monkeypatch):
    world = tiny.world
    (tmp_path / "task.yaml").write_text(
        (ROOT / "world/lmms_world.yaml").read_text().replace("out/speedrun/world", str(world))
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = [
        "--model",
        "llava_from_scratch",
        "--model_args",
        f"pretrained={babbler}",
        "--device",
        "cpu",
        "--batch_size",
        "8",
    ]
    argv += ["--include_path", str(tmp_path), "--tasks", "llava_world", "--gen_kwargs", "max_new_tokens=24"]
    argv += ["--output_path", str(tmp_path / "run"), "--log_samples"]
    run = subprocess.run([sys.executable, "-m", "lmms_eval", *argv], cwd=ROOT, capture_output=True, text=True)
    found = list((tmp_path / "run").rglob("*_samples_*.jsonl"))
    assert found, run.stdout + run.stderr
    samples = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, found[0].read_text().splitlines())}
    questions = ["--questions", world / "questions.jsonl", "--out", tmp_path / "answers.jsonl"]
    command(evaluation, "--model", babbler, "--device", "cpu", "--max-new-tokens", 24, *questions)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [samples[number] for number in range(len(rows))] == [row["text"] for row in rows]
    (results,) = (tmp_path / "run").rglob("*_results.json")
    score = json.loads(results.read_text())["results"]["llava_world"]["overall,none"]
    assert score == pytest.approx(sum(row["metadata"]["score"] for row in rows) / len(rows), abs=1e-12)
