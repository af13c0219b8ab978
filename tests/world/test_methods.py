"""The table of tuning methods: its counts of parameters are those of built models; a tiny table from end to end."""

import pytest

from formats.weights import load_model
from inputs.files import read_json
from lora import add_lora
from variants.tuning import METHODS as TUNED
from variants.tuning import TRAINED, add_tuning
from world import methods
from world.methods import METHODS, choose_size


@pytest.mark.parametrize("name", METHODS)
def test_the_count_is_that_of_a_built_model(tiny, name):
    model = load_model(tiny.stage2)
    method = METHODS[name]
    size = choose_size(method, model.config.text_config, 2000) if method.size else 0
    decoder = model.language_model
    if name in TUNED:
        key = {"--prefix-length": "length", "--tune-width": "width", "": None}[method.size]
        add_tuning(model, name, **({key: size} if key else {}))
        trained = [p for key, p in model.named_parameters() if TRAINED.search(key)]
    elif name == "full":
        trained = list(decoder.parameters())
    else:
        add_lora(model, {"llm": size}, None, 0.0, dora=name == "DoRA")
        trained = [p for key, p in model.named_parameters() if "lora_" in key]
    assert method.count(model.config.text_config, size) == sum(p.numel() for p in trained)


def test_a_tiny_table(tiny, tmp_path, command, in_process, monkeypatch, capsys):
    monkeypatch.setattr(methods, "BEST", 1)
    few, old = tmp_path / "few.jsonl", tiny.world / "questions.jsonl"
    few.write_bytes(old.read_bytes())
    same = ["--model", tiny.stage2, "--old", tiny.world, "--data", tiny.world / "instruct.json", "--images", tiny.world]
    same += ["--steps", 2, "--questions", 10]
    argv = [*same, "--test", few, "--seeds", 0, 1, "--only", "LoRA", "ia3", "prompt", "--text", methods.__file__]
    argv += ["--out", tmp_path / "out"]
    command(methods, *argv)
    text = (tmp_path / "out/methods.md").read_text()
    assert text in capsys.readouterr().out and "| ia3 |" in text and "perplexity" in text
    found = read_json(tmp_path / "out/methods.json")
    assert sorted(map(len, found["seeds"].values())) == [1, 1, 2]
    assert set(found["methods"]["LoRA"][0]) == {"new", "old", "perplexity", "right", "seconds", "gigabytes"}
    count = len(in_process)
    command(methods, *argv)
    assert len(in_process) == count  # nothing runs twice
    assert "old task" in text
    command(methods, *same, "--test", old, "--seeds", 0, "--only", "ia3", "--out", tmp_path / "same")
    assert "old task" not in (tmp_path / "same/methods.md").read_text()  # it is the new task
    few.write_bytes(old.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="was begun with"):  # other questions under the same name
        command(methods, *argv)
    few.write_text('{"question_id": 1, "image": "a.png", "text": "What?"}\n')
    with pytest.raises(SystemExit, match="a question has no answer"):
        command(methods, *argv)


def test_a_missing_file_ends_with_one_line(tiny, command, tmp_path):
    argv = ["--model", tiny.stage2, "--old", tiny.root, "--data", "x", "--images", ".", "--test", "y"]
    with pytest.raises(SystemExit) as caught:
        command(methods, *argv, "--out", tmp_path / "out")
    assert "not found" in caught.value.code and not (tmp_path / "out").exists()
