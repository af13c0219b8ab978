"""eval.py: metrics of own questions, equal answers in any batch and after any stop, manifests, ranks, error lines."""

import json
import multiprocessing
import pickle
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
from evaluation import answering, manifest, metrics, scores
from formats.weights import load_model
from inputs.records import DataError
from inputs.tokenizer import Tokenizer
from world import probes
from world.language import FAMILIES

STAR = "a large red star in the top left"
make_row = partial(answering.llava_row, "model", evaluation.answer_metadata)
KEYS = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}


@pytest.fixture(scope="module")
def llava(babbler):
    return load_model(babbler), Tokenizer.load(babbler)


@pytest.fixture(scope="module")
def questions(tiny):
    return evaluation.read_questions(tiny.world / "questions.jsonl")


@pytest.fixture
def answers(monkeypatch):
    """Questions are answered at once, with letters beyond ASCII; returns the texts asked, batch by batch."""
    asked = []

    def answer_batch(model, tokenizer, batch, *_):
        asked.append([question["text"] for question in batch])
        return [f"réponse à {question['text']} ☃" for question in batch]

    monkeypatch.setattr(answering, "answer_batch", answer_batch)
    return asked


class Rank:
    """One of several ranks that share a folder, one after another."""

    def __init__(self, rank, world):
        self.rank, self.world_size = rank, world

    def all_reduce_sum(self, value):
        return [value * self.world_size]


def evaluate(out, questions, batch_size=4):
    def ask(batch):
        return answering.answer_batch(None, None, batch)

    return answering.answer_all(questions, out, batch_size, "model", ask, make_row, Rank(0, 1))


def answer(model, tokenizer, questions, images, longest):
    return answering.answer_batch(model, tokenizer, questions, images, longest, answering.Cost())


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(command, *argv):
    with pytest.raises(SystemExit) as caught:
        command(evaluation, *argv)
    line = caught.value.code
    assert isinstance(line, str) and line.startswith("eval.py: ") and len(line.splitlines()) == 1, line
    return line


# ---------------------------------------------------------------------------------------------------------------------
# questions of your own: their metrics


@pytest.mark.parametrize("answer, truth, points", [
    ("red", "red", 1), ("Red.", "red", 1), (" red ", "red", 1), ("top left", "top left", 1), ("yes!", "Yes", 1),
    ("reddish", "red", 0), ("red star", "red", 0), ("", "red", 0), ("left top", "top left", 0), ("11", "1", 0),
])  # fmt: skip
def test_short_answers_match_or_not(answer, truth, points):
    assert metrics.exact_match(answer, truth) == points


def read_one(path, **more):
    write_lines(path, [{"question_id": 1, "text": "What?", "answer": "a red star"} | more])
    return evaluation.read_questions(path)[0]


@pytest.mark.parametrize("metric, answer, points", [
    ("exact", "A red star.", 1), ("exact", "It is a red star.", 0), ("contains", "It is a red star.", 1),
    ("contains", "a star", 0), ("anls", "a red stat", 0.9), ("relaxed", "A red star", 1), ("objects_f1", "red star", 0),
])  # fmt: skip
def test_a_question_names_its_metric(tmp_path, metric, answer, points):
    question = read_one(tmp_path / "q.jsonl", metric=metric)
    assert evaluation.answer_metadata(question, answer) == {"category": "all", "score": pytest.approx(points)}


@pytest.mark.parametrize("category", ["description", "existence", "color"])
def test_a_category_named_as_one_of_the_world_is_scored_by_exact_match(tmp_path, category):
    question = read_one(tmp_path / "q.jsonl", category=category)
    assert evaluation.answer_metadata(question, "A red star.")["score"] == 1
    assert evaluation.answer_metadata(question, f"{STAR}.")["score"] == 0


def test_descriptions_of_a_world_that_names_no_metrics_are_scored_by_their_objects(tiny, tmp_path):
    assert {q["category"]: q["metric"] for q in evaluation.read_questions(tiny.world / "questions.jsonl")} == {
        family: "objects_f1" if family == "description" else "exact" for family in FAMILIES
    }
    (tmp_path / "scenes.jsonl").touch()
    assert read_one(tmp_path / "questions.jsonl", category="description")["metric"] == "objects_f1"
    assert read_one(tmp_path / "questions.jsonl", category="color")["metric"] == "exact"
    assert read_one(tmp_path / "questions.jsonl", category="description", metric="exact")["metric"] == "exact"
    assert read_one(tmp_path / "mine.jsonl", category="description")["metric"] == "exact"


def test_a_metric_that_is_guessed_is_said_once(tmp_path, capsys):
    (tmp_path / "scenes.jsonl").touch()
    read_one(tmp_path / "questions.jsonl", category="description")
    assert capsys.readouterr().err.count("1 descriptions of a world name no metric: scored by objects_f1") == 1
    read_one(tmp_path / "questions.jsonl", category="existence")
    assert capsys.readouterr().err == ""


def test_a_category_that_is_named_as_the_mean_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"line 1 .1.: category 'overall' is the name"):
        read_one(tmp_path / "q.jsonl", category="overall")


def test_an_unknown_metric_is_named(tmp_path):
    with pytest.raises(DataError, match=r"q\.jsonl: line 1 .1.: metric 'bleu' is none of exact, contains"):
        read_one(tmp_path / "q.jsonl", metric="bleu")


def test_overall_is_the_mean_over_questions():
    points = [("color", 1.0), ("shape", 0.0), ("shape", 0.0), ("shape", 1.0), ("description", 0.5)]
    rows = [{"metadata": {"category": category, "score": score}} for category, score in points]
    result = scores.accuracy_by_category(rows)
    assert result == pytest.approx({"overall": 50, "color": 100, "description": 50, "shape": 100 / 3})
    assert list(result) == ["overall", "color", "description", "shape"]


# ---------------------------------------------------------------------------------------------------------------------
# the file of answers


def test_rows_have_the_keys_of_llava(tiny, babbler, command, tmp_path, capsys, questions):
    argv = ["--model", babbler, "--questions", tiny.world / "questions.jsonl", "--device", "cpu", "--limit", 10]
    command(evaluation, *argv, "--max-new-tokens", 4, "--out", tmp_path / "answers.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert all(set(row) == KEYS and row["model_id"] == "babbler" for row in rows)
    assert sorted(row["question_id"] for row in rows) == list(range(10))
    assert len({row["answer_id"] for row in rows}) == 10
    for row in rows:
        question = questions[row["question_id"]]
        assert row["prompt"] == question["text"] and row["metadata"]["category"] == question["category"]
        assert row["metadata"]["score"] == probes.METRICS[question["metric"]](row["text"], question["answer"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["overall", f"{scores.accuracy_by_category(rows)['overall']:.1f}", "%"]
    assert len(printed) == 12 and printed[-1] == f"10 scored answers in {tmp_path / 'answers.jsonl'}"


def test_rows_come_back_in_the_order_of_the_questions(tmp_path, answers, questions):
    asked = random.Random(0).sample(questions, len(questions))
    rows = evaluate(tmp_path / "a.jsonl", asked)
    assert [row["question_id"] for row in rows] == [question["question_id"] for question in asked]
    assert all(len(batch) <= 4 for batch in answers)


def where_to_cut(whole):
    """Byte offsets: nothing, a line's end, and inside the first, a later and the last line, one inside a letter."""
    lines, letter = whole.splitlines(keepends=True), "☃".encode()
    second = len(lines[0]) + len(lines[1])
    inside = whole.index(letter, second) + 1
    return {"nothing": 0, "first": 20, "line": second, "no end": second - 1, "letter": inside, "last": len(whole) - 1}


@pytest.mark.parametrize("cut", ["nothing", "first", "line", "no end", "letter", "last"])
def test_a_stopped_run_goes_on_where_it_was(tmp_path, answers, questions, cut):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    want = evaluate(whole, questions)
    kept = whole.read_bytes()[: where_to_cut(whole.read_bytes())[cut]]
    stopped.write_bytes(kept)
    answers.clear()
    assert evaluate(stopped, questions) == want
    assert stopped.read_bytes() == whole.read_bytes()
    assert sum(map(len, answers)) <= len(questions) - kept.count(b"\n") + 3  # but for the rest of a batch


@pytest.mark.parametrize("char", ["\u2028", "\x85", "\x0c", "\r"])
def test_an_answer_may_hold_any_character(tmp_path, monkeypatch, char):
    monkeypatch.setattr(answering, "answer_batch", lambda model, tokenizer, batch, *_: [f"a{char}b"] * len(batch))
    questions = [{"question_id": i, "text": f"one{char}two"} for i in range(3)]
    rows = evaluate(tmp_path / "a.jsonl", questions)
    before = (tmp_path / "a.jsonl").read_bytes()
    assert evaluate(tmp_path / "a.jsonl", questions) == rows and (tmp_path / "a.jsonl").read_bytes() == before


def test_a_question_may_hold_any_character(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question_id": 1, "text": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert evaluation.read_questions(path) == [{"question_id": 1, "text": "one\u2028two"}]


@pytest.mark.parametrize("other", [
    [{"question_id": 0, "text": "Another question?"}],
    [{"question_id": "zero", "text": "Is it red?"}],
])  # fmt: skip
def test_answers_to_other_questions_are_left_alone(tmp_path, answers, other):
    out = tmp_path / "a.jsonl"
    evaluate(out, [{"question_id": 0, "text": "Is it red?"}])
    before = out.read_bytes()
    with pytest.raises(DataError, match=r"a\.jsonl"):
        evaluate(out, other)
    assert out.read_bytes() == before


def test_a_file_that_holds_no_answers_is_left_alone(tiny, command, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "Is it red?"}\n{"question_id": 2, "text"')
    before = (tmp_path / "q.jsonl").read_bytes()
    argv = ["--model", tiny.stage2, "--questions", tiny.world / "questions.jsonl", "--device", "cpu"]
    assert "q.jsonl" in refusal(command, *argv, "--out", tmp_path / "q.jsonl")
    assert (tmp_path / "q.jsonl").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# answers


def test_alone_or_in_a_batch_the_answers_are_the_same(tiny, llava, questions):
    asked = [*questions[:12], *({"question_id": i, "text": "Is it red?" * i} for i in range(4))]
    together = answer(*llava, asked, tiny.world, 12)
    alone = [answer(*llava, [question], tiny.world, 12)[0] for question in asked]
    assert together == alone and len(set(together)) == len(asked)


def test_blank_images_change_nothing_but_the_pixels(tiny, llava, questions, monkeypatch):
    shown, prompts = [], []

    def generate(model, rows, features, sizes, **_):
        prompts.append(rows)
        shown.append(features)
        yield from ()

    monkeypatch.setattr(answering, "generate", generate)
    for blank in (False, True):
        answer(*llava, [question | {"blank": blank} for question in questions[:4]], tiny.world, 4)
    assert prompts[0] == prompts[1] and shown[0].shape == shown[1].shape
    gray = llava[0].vision_features(torch.zeros(1, 3, 72, 72))  # zero after normalization: the mean color
    assert torch.allclose(shown[1], gray.expand_as(shown[1]), atol=1e-5)
    assert not any(torch.allclose(seen, gray[0], atol=1e-2) for seen in shown[0])


def test_blank_and_seen_answers_go_to_different_files(tiny, command, monkeypatch):
    outs = []
    monkeypatch.setattr(evaluation, "answer_all", lambda questions, out, *_: outs.append(out) or [])
    argv = ["--model", tiny.stage2, "--questions", tiny.world / "questions.jsonl", "--device", "cpu"]
    command(evaluation, *argv)
    command(evaluation, *argv, "--blank")
    assert outs == [tiny.stage2 / "answers.jsonl", tiny.stage2 / "answers-blank.jsonl"]
    for out in outs:
        out.with_name(f"{out.stem}-manifest.json").unlink()


@pytest.mark.parametrize("form", ["<image>\n{}", "{}\n<image>", "<image>{}", "{} <image>"])
def test_a_marker_in_a_question_is_the_one_of_its_image(tiny, llava, questions, monkeypatch, form):
    prompts = []
    monkeypatch.setattr(answering, "generate", lambda model, rows, *_, **__: prompts.append(rows) or iter(()))
    for text in ("{}", form):
        asked = [question | {"text": text.format(question["text"])} for question in questions[:3]]
        answer(*llava, asked, tiny.world, 4)
    assert prompts[0] == prompts[1]


def test_two_markers_for_one_image_are_refused(command, tiny, tmp_path):
    path = write_lines(tmp_path / "q.jsonl", [{"question_id": 7, "text": "<image> and <image>?", "image": "a.png"}])
    argv = ["--model", tiny.stage2, "--questions", path, "--device", "cpu", "--out", tmp_path / "a.jsonl"]
    assert "question 7: 2 <image> markers for one image" in refusal(command, *argv)


@pytest.mark.parametrize("text, noticed", [
    ("USER: <image>\nRed? ASSISTANT:", 1), ("<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n", 1),
    ("[INST] Red? [/INST]", 1), ("###Human: Red?###Assistant:", 1), ("Who says 'USER:' and 'ASSISTANT:' here?", 0),
])  # fmt: skip
def test_a_whole_prompt_as_a_question_is_noticed(command, tiny, tmp_path, capsys, text, noticed):
    image = evaluation.read_questions(tiny.world / "questions.jsonl")[0]["image"]
    path = write_lines(tmp_path / "q.jsonl", [{"question_id": 7, "text": text, "image": image}])
    argv = ["--model", tiny.stage2, "--questions", path, "--images", tiny.world, "--out", tmp_path / "a.jsonl"]
    command(evaluation, *argv, "--device", "cpu", "--max-new-tokens", 1)
    assert capsys.readouterr().err.count("1 of 1 questions end like whole prompts") == noticed


def test_questions_without_a_image_are_answered(tiny, llava):
    assert len(answer(*llava, [{"question_id": 1, "text": "Red?"}], tiny.world, 4)) == 1


def test_a_prompt_that_is_too_long_is_named_by_its_question(tiny, llava, questions):
    asked = [questions[0], {"question_id": "k7", "text": "Is it red? " * 3000}]
    with pytest.raises(DataError, match=r"question k7: its prompt is .* tokens long"):
        answer(*llava, asked, tiny.world, 4)


def test_a_decoder_refuses_a_question_with_a_image(tiny, questions):
    decoder, tokenizer = load_model(tiny.decoder), Tokenizer.load(tiny.decoder)
    with pytest.raises(DataError, match=r"question 0 .*vision tower"):
        answer(decoder, tokenizer, questions[:1], tiny.world, 4)
    assert answer(decoder, tokenizer, [{"question_id": 1, "text": "Red?"}], tiny.world, 4)


# ---------------------------------------------------------------------------------------------------------------------
# errors that a user can fix are one line


@pytest.mark.parametrize("line", [
    '\n{"question_id": 2, "text": "?"}',
    "{", "[]", "7", '{"text": "Is it red?"}', '{"question_id": 2}', '{"question_id": 2, "text": 7}',
    '{"question_id": [2], "text": "Is it red?"}', '{"question_id": 2, "text": "Is it red?", "image": 7}',
    '{"question_id": 2, "text": "Is it red?", "answer": 7}', '{"question_id": 1, "text": "The same again?"}',
])  # fmt: skip
def test_a_question_that_is_none_is_named_by_file_and_line(tiny, command, tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"question_id": 1, "text": "Is it red?"}}\n{line}\n')
    argv = ["--model", tiny.stage2, "--questions", path, "--device", "cpu", "--out", tmp_path / "a.jsonl"]
    message = refusal(command, *argv, "--max-new-tokens", 2)
    assert f"{path}: line 2" in message
    assert not (tmp_path / "a.jsonl").exists()


def test_blank_lines_at_the_end_are_none_and_no_questions_are_named(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 1, "text": "Red?"}\n\n \n')
    assert evaluation.read_questions(path) == [{"question_id": 1, "text": "Red?"}]
    (tmp_path / "q.json").write_text("[]")
    with pytest.raises(DataError, match=r"q\.json: no questions"):
        evaluation.read_questions(tmp_path / "q.json")


@pytest.mark.parametrize("row, why", [
    ({"image_path": "a.png"}, "'image_path' looks like one"), ({"images": ["a.png"]}, "'images' looks like one"),
    ({"image": None, "img": "a.png"}, "'img' looks like one"),
    ({"text": "<image>\nRed?"}, "<image> stands in a question"),
])  # fmt: skip
def test_an_image_that_would_not_be_shown_is_named(tmp_path, row, why):
    path = write_lines(tmp_path / "q.jsonl", [{"question_id": 1, "text": "Red?"} | row])
    for read in (evaluation.read_questions, lambda path: evaluation.read_items("vizwiz", [path])):
        with pytest.raises(DataError, match=rf"q\.jsonl: line 1 .1.: .*{why}"):
            read(path)


def test_missing_questions_are_named(tiny, command, tmp_path):
    assert "nowhere.jsonl" in refusal(command, "--model", tiny.stage2, "--questions", tmp_path / "nowhere.jsonl")


def test_a_missing_image_and_its_question_are_named(tiny, command, tmp_path):
    path = write_lines(tmp_path / "q.jsonl", [{"question_id": "k7", "text": "Red?", "image": "nowhere.png"}])
    argv = ["--model", tiny.stage2, "--questions", path, "--device", "cpu", "--out", tmp_path / "a.jsonl"]
    line = refusal(command, *argv)
    assert "nowhere.png" in line and "k7" in line


@pytest.mark.parametrize("name", ["empty", "nowhere", "file"])
def test_a_folder_without_a_model_is_told_what_belongs_in_it(command, tiny, tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    line = refusal(command, "--model", tmp_path / name, "--questions", tiny.world / "questions.jsonl")
    assert f"{tmp_path / name}/config.json: no such file; a model's folder has it, weights and a tokenizer" in line


def test_the_model_that_was_not_named_is_said(command, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation.runs, "newest_run", lambda *_: tiny.stage2)
    path = write_lines(tmp_path / "q.jsonl", [{"question_id": 1, "text": "Red?"}])
    argv = ["--questions", path, "--out", tmp_path / "a.jsonl", "--device", "cpu", "--max-new-tokens", 2]
    command(evaluation, *argv)
    assert f"--model {tiny.stage2}, the newest" in capsys.readouterr().err
    command(evaluation, "--model", tiny.stage2, *argv)
    assert "--model" not in capsys.readouterr().err


def test_answers_that_are_cut_and_questions_that_are_not_scored_are_counted(command, babbler, tmp_path, capsys):
    rows = [{"question_id": 1, "text": "Red?", "answer": "yes"}, {"question_id": 2, "text": "Blue?"}]
    path, out = write_lines(tmp_path / "q.jsonl", rows), tmp_path / "a.jsonl"
    command(evaluation, "--model", babbler, "--questions", path, "--out", out, "--device", "cpu", "--max-new-tokens", 2)
    said = capsys.readouterr()
    assert "2 of the 2 answers given now were cut at --max-new-tokens 2" in said.err
    assert said.out.splitlines()[-1] == f"1 scored answers, 1 without a true answer, in {out}"


def test_without_a_model_both_ways_to_one_are_named(command, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal(command, "--questions", tiny.world / "questions.jsonl")
    assert "train.py" in line and "name a folder" in line


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks: runs that stop, manifests, ranks


@pytest.fixture
def pope(tiny, tmp_path):
    """POPE's form of questions about the tiny world's images."""
    asked = evaluation.read_questions(tiny.world / "questions.jsonl")
    rows = [
        {"question_id": i, "image": q["image"], "text": "Is there a red star?", "label": ("yes", "no")[i % 2]}
        for i, q in enumerate(asked[:12])
    ]
    return write_lines(tmp_path / "coco_pope_random.json", rows)


def run_pope(command, model, pope, tiny, out, *more):
    argv = ["--model", model, "--task", "pope", "--questions", pope, "--images", tiny.world, "--out", out]
    command(evaluation, *argv, "--device", "cpu", "--batch-size", 4, "--max-new-tokens", 4, *more)
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "cost.json"}


def test_a_benchmark_is_answered_scored_and_described(tiny, babbler, command, pope, tmp_path, capsys):
    files = run_pope(command, babbler, pope, tiny, tmp_path / "run")
    assert sorted(files) == ["answers.jsonl", "manifest.json", "scores.json"]
    manifest, figures = json.loads(files["manifest.json"]), json.loads(files["scores.json"])
    end = "Is there a red star?\nAnswer the question using a single word or phrase."
    assert end in manifest["prompt"] and manifest["image_mode"] == "pad" and manifest["decoding"] == "greedy"
    assert len(json.loads(files["answers.jsonl"].splitlines()[0])["prompt"]) == len(end)
    printed = capsys.readouterr().out.splitlines()
    assert f"random accuracy {figures['random accuracy']:.4f}" in printed
    cost = json.loads((tmp_path / "run/cost.json").read_text())
    assert cost["questions"] == 12 and cost["visual tokens"] == 9 and cost["prompt tokens"] > 9
    command(evaluation, "--score", "pope", "--predictions", tmp_path / "run/answers.jsonl", "--references", pope)
    again = capsys.readouterr().out.splitlines()
    assert again == printed[1:]


def test_two_runs_write_the_same_bytes(tiny, babbler, command, pope, tmp_path):
    assert run_pope(command, babbler, pope, tiny, tmp_path / "a") == run_pope(
        command, babbler, pope, tiny, tmp_path / "b"
    )


def test_a_run_is_not_gone_on_with_in_another_way(tiny, babbler, command, pope, tmp_path):
    run_pope(command, babbler, pope, tiny, tmp_path / "a")
    with pytest.raises(SystemExit, match="started with another max_new_tokens"):
        run_pope(command, babbler, pope, tiny, tmp_path / "a", "--max-new-tokens", 5)
    (tmp_path / "a/manifest.json").unlink()
    with pytest.raises(SystemExit, match=r"no manifest\.json says how"):
        run_pope(command, babbler, pope, tiny, tmp_path / "a")


def test_a_missing_image_is_named_before_anything_is_answered(tiny, babbler, command, pope, tmp_path):
    rows = [json.loads(line) for line in pope.read_text().splitlines()]
    write_lines(pope, [*rows[:-2], rows[-2] | {"image": "nowhere.jpg"}, rows[-1] | {"image": "../x.jpg"}])
    with pytest.raises(SystemExit, match=r"random/10: .*nowhere\.jpg: no such file \(and 1 more images"):
        run_pope(command, babbler, pope, tiny, tmp_path / "a")
    assert not (tmp_path / "a/answers.jsonl").exists()


def test_a_run_is_not_gone_on_with_other_images_or_code(tiny, babbler, command, tmp_path, monkeypatch):
    path, image = tmp_path / "q.jsonl", tmp_path / "a.png"
    asked = evaluation.read_questions(tiny.world / "questions.jsonl")[0]
    image.write_bytes((tiny.world / asked["image"]).read_bytes())
    write_lines(path, [{"question_id": 1, "text": "Red?", "image": "a.png"}])
    argv = ["--model", babbler, "--questions", path, "--out", tmp_path / "r[1].jsonl", "--device", "cpu"]
    argv += ["--max-new-tokens", 2]
    command(evaluation, *argv)  # whose name is a pattern
    image.write_bytes(image.read_bytes() + b"\0")
    assert "another pictures_sha256" in refusal(command, *argv)
    image.write_bytes(image.read_bytes()[:-1])
    monkeypatch.setattr(manifest, "hash_code", lambda: "another")
    assert "another code_sha256" in refusal(command, *argv)


def test_every_file_of_a_model_that_changes_answers_is_in_the_manifest(tmp_path):
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]
    names += ["vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "adapter_config.json"]
    names.append("model.gguf")
    for name in [*names, "answers.jsonl", "answers-manifest.json", "run.json"]:
        (tmp_path / name).touch()
    assert {path.name for pattern in manifest.MODEL_FILES for path in tmp_path.glob(pattern)} == set(names)


def test_the_hash_of_the_code_changes_with_any_module_that_answers_pass_through(tmp_path):
    source = Path(manifest.__file__).parents[1]
    for path in [*source.glob("*.py"), *source.glob("[a-z]*/*.py")]:
        (tmp_path / path.relative_to(source)).parent.mkdir(exist_ok=True)
        (tmp_path / path.relative_to(source)).write_bytes(path.read_bytes())
    assert manifest.hash_code(tmp_path) == manifest.hash_code()
    for name in ("train.py", "eval.py", "scratch.py", "evaluation/scores.py", "training/flags.py", "world/probes.py"):
        (tmp_path / name).write_text("# another\n")
        assert manifest.hash_code(tmp_path) == manifest.hash_code(), name
    for name in ("llava.py", "data.py", "lora.py", "evaluation/answering.py", "inputs/new.py", "variants/anyres.py"):
        before = manifest.hash_code(tmp_path)
        (tmp_path / name).write_text("# another\n")
        assert manifest.hash_code(tmp_path) != before, name


def test_every_module_that_answers_pass_through_is_hashed():
    """Imported by answering.py and by the loader, directly or not; training/ has only Distributed and peak_memory."""
    script = "import sys, evaluation.answering, formats.adapters, fast.accelerate; print(*(getattr(m, '__file__', '')"
    script += " or '' for m in list(sys.modules.values())), sep=chr(10))"
    root = Path(manifest.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    imported = {Path(line).relative_to(root) for line in run.stdout.splitlines() if line.startswith(str(root))}
    imported = {path.as_posix() for path in imported if ".venv" not in path.parts}
    hashed = {path.relative_to(root).as_posix() for pattern in manifest.CODE_FILES for path in root.glob(pattern)}
    assert {name for name in imported - hashed if not name.startswith("training/")} <= {"evaluation/__init__.py"}


def test_ranks_share_the_batches_and_the_file_is_the_same(tmp_path, answers, questions):
    def ask(batch):
        return answering.answer_batch(None, None, batch)

    evaluate(tmp_path / "one/a.jsonl", questions)
    answers.clear()
    for rank in (2, 1, 0):
        rows = answering.answer_all(questions, tmp_path / "a.jsonl", 4, "model", ask, make_row, Rank(rank, 3))
    assert [row["question_id"] for row in rows] == [question["question_id"] for question in questions]
    assert sum(map(len, answers)) == len(questions)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "one/a.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.jsonl"]


def test_stopped_anywhere_on_any_number_of_ranks_the_file_is_the_same(tmp_path, monkeypatch, questions):
    class Stop(Exception):
        pass

    calls, rng = [], random.Random(0)

    def ask(batch):
        calls.append(len(batch))
        if rng.random() < 0.3:
            raise Stop
        return [f"{question['text']} ☃" for question in batch]

    whole, out = tmp_path / "whole/a.jsonl", tmp_path / "a.jsonl"
    answering.answer_all(questions, whole, 4, "model", lambda b: [f"{q['text']} ☃" for q in b], make_row, Rank(0, 1))
    while not out.exists():
        world = rng.randint(1, 3)
        try:
            for rank in reversed(range(world)):
                answering.answer_all(questions, out, 4, "model", ask, make_row, Rank(rank, world))
        except (Stop, KeyError):  # KeyError: rank 0 is done, but a rank of a larger world was stopped before
            for part in answering.part_files(out):
                part.write_bytes(part.read_bytes()[: -rng.randint(1, 9)] if rng.random() < 0.5 else part.read_bytes())
    assert out.read_bytes() == whole.read_bytes() and not answering.part_files(out)


def test_two_processes_do_not_answer_into_one_file(tmp_path, answers, questions):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold():
        with answering.open_part(tmp_path / "a.jsonl", 0):
            ready.set()
            done.wait(20)

    other = context.Process(target=hold)
    other.start()
    ready.wait(20)
    with pytest.raises(DataError, match="another process"):
        evaluate(tmp_path / "a.jsonl", questions)
    done.set()
    other.join()


@pytest.mark.parametrize("argv, why", [
    (["--score", "pope"], "--predictions"), ([], "--questions"), (["--task", "nothing"], "invalid choice"),
    (["--task", "vqav2", "--questions", "q", "--submission", "s", "--limit", "5"], "no --limit"),
    (["--questions", "q", "--batch-size", "0"], "above 0"), (["--questions", "q", "--limit", "0"], "above 0"),
    (["--questions", "q", "--max-new-tokens", "0"], "above 0"), (["--questions", "q", "--suffix", ""], "--suffix"),
    (["--task", "mme", "--questions", "q", "--limit", "5"], "even"),
    (["--task", "llavabench", "--questions", "q", "--submission", "s", "--rule", "r"], "no --rule"),
    (["--score", "pope", "--predictions", "p", "--references", "r", "--limit", "5"], "--limit"),
    (["--score", "mmvet", "--predictions", "p", "--references", "r", "--grader", "http://x"], "--grades"),
    (["--predictions", "p", "--references", "r"], "--predictions needs --score"),
    (["--task", "probes", "--images", "i"], "no --images"),
])  # fmt: skip
def test_a_command_that_makes_no_sense_ends_with_status_2(command, capsys, argv, why):
    with pytest.raises(SystemExit) as caught:
        command(evaluation, *argv)
    assert caught.value.code == 2 and why in capsys.readouterr().err


def test_probes_are_asked_and_told(tiny, babbler, command, tmp_path, capsys):
    argv = ["--model", babbler, "--task", "probes", "--out", tmp_path / "p", "--limit", 2, "--device", "cpu"]
    command(evaluation, *argv, "--max-new-tokens", 3)
    found = json.loads((tmp_path / "p/probes.json").read_text())
    assert list(found) == ["existence", "counting", "relations", "reading", "language prior"]
    assert list(found["existence"]) == ["random", "popular", "adversarial", "near miss"] or len(found["existence"]) == 3
    assert list(found["counting"]) == list("1234567") and list(found["relations"]) == list("1234")
    assert set(found["language prior"]) == {"own image", "blank", "another image"}
    assert "## Reading" in capsys.readouterr().out and "| 1 | 2 |" in (tmp_path / "p/probes.md").read_text()


def test_the_plan_of_the_probes_reaches_other_ranks(tiny, tmp_path):
    """torchrun sends it by pickle."""
    args = SimpleNamespace(out=tmp_path, limit=1)
    plan = evaluation.plan_probes(args, tiny.stage2, load_model(tiny.stage2).config)
    assert pickle.loads(pickle.dumps(plan)).questions == plan.questions
