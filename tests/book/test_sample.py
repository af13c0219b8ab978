"""sample.py: what it prints, what the model is given, and errors of one line."""

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
from data import Records
from formats.weights import load_model
from inputs.mixture import open_sources
from inputs.tokenizer import Tokenizer

REPOSITORY = Path(sample.__file__).parent


@pytest.fixture(scope="module")
def llava(babbler):
    return load_model(babbler), Tokenizer.load(babbler)


@pytest.fixture(scope="module")
def record(tiny):
    return json.loads((tiny.world / "instruct.json").read_text())[0]


@pytest.fixture(scope="module")
def image_path(tiny, record):
    return tiny.world / record["image"]


@pytest.fixture
def ask(command, babbler, capsys):
    """Run sample.py; returns what it prints on standard output."""

    def call(*argv, model=babbler, length=12):
        flags = ["--model", model, "--device", "cpu", "--max-new-tokens", length]
        command(sample, *flags, *argv)
        return capsys.readouterr().out

    return call


def refusal(ask, *argv, **more):
    with pytest.raises(SystemExit) as caught:
        ask(*argv, **more)
    line = caught.value.code
    assert isinstance(line, str) and line.startswith("sample.py: ") and len(line.splitlines()) == 1, line
    return line


def fake_answers(monkeypatch, *answers):
    """Let the model answer with these ids, one list for each question; returns the prompts that it is given."""
    prompts, left = [], list(answers)

    def generate(model, batch, *_, **__):
        prompts.extend(batch)
        yield from ([i] for i in left.pop(0))

    monkeypatch.setattr(sample, "generate", generate)
    return prompts


def ids_of_bytes(tokenizer, text):
    """One id for each byte, so that a character beyond ASCII takes several tokens."""
    return [tokenizer.codec.ranks[bytes([byte])] for byte in text.encode()]


# ---------------------------------------------------------------------------------------------------------------------
# what is printed


def test_json_is_one_line_with_all_fields(ask, image_path, llava):
    out = ask("--image", image_path, "--prompt", "What is this?", "--json")
    result = json.loads(out)
    assert out.endswith("\n") and len(out.splitlines()) == 1
    assert set(result) == {"text", "ids", "prompt_ids", "stop", "tokens_per_s"}
    assert result["ids"] and result["tokens_per_s"] > 0
    assert llava[1].decode(result["ids"]).lstrip().startswith(result["text"])
    assert result["stop"] == ("eos" if result["ids"][-1] == llava[1].eos_id else "length")


def test_standard_output_holds_only_the_answer(ask, babbler, image_path):
    text = json.loads(ask("--image", image_path, "--prompt", "What is this?", "--json"))["text"]
    assert text
    assert ask("--image", image_path, "--prompt", "What is this?") == text + "\n"
    argv = ["--model", babbler, "--device", "cpu", "--max-new-tokens", "12", "--image", image_path]
    command = [sys.executable, REPOSITORY / "sample.py", *argv, "--prompt", "What is this?"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    assert (result.returncode, result.stdout.decode(), result.stderr) == (0, text + "\n", b"")


def test_an_answer_stops_at_its_longest(ask, image_path):
    result = json.loads(ask("--image", image_path, "--prompt", "What is this?", "--json", length=1))
    assert len(result["ids"]) == 1 and result["stop"] in ("length", "eos")


@pytest.mark.parametrize("ends", [True, False])
def test_the_reason_for_stopping(ask, llava, monkeypatch, ends):
    tokenizer = llava[1]
    fake_answers(monkeypatch, ids_of_bytes(tokenizer, " a cat") + [tokenizer.eos_id] * ends)
    result = json.loads(ask("--prompt", "What is this?", "--json"))
    assert (result["text"], result["stop"]) == ("a cat", "eos" if ends else "length")
    assert (result["ids"][-1] == tokenizer.eos_id) == ends


@pytest.mark.parametrize("text", ["né ☃ 🙂 end", " 🙂", "plain", "  two  spaces "])
def test_pieces_join_to_the_text_and_no_character_is_cut(llava, monkeypatch, text):
    model, tokenizer = llava
    fake_answers(monkeypatch, [*ids_of_bytes(tokenizer, text), tokenizer.eos_id])
    chat = sample.Chat(model, tokenizer, [])
    pieces = list(chat.ask("Well?"))
    assert "".join(pieces) == chat.last["text"] == text.lstrip()
    assert len(pieces) > 1 or len(text.strip()) == 1
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_answer_that_ends_inside_a_character(ask, llava, monkeypatch):
    ids = ids_of_bytes(llava[1], "a 🙂")[:-1]
    fake_answers(monkeypatch, ids, ids)
    assert ask("--prompt", "Well?") == json.loads(ask("--prompt", "Well?", "--json"))["text"] + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# what the model is given


def test_the_prompt_equals_that_of_training(ask, tiny, record, image_path, llava):
    model, tokenizer = llava
    question = record["conversations"][0]["value"].removeprefix("<image>\n")
    prompt = json.loads(ask("--image", image_path, "--prompt", question, "--json", length=1))["prompt_ids"]
    sources = open_sources([str(tiny.world / "instruct.json")], None)
    trained = Records(sources, tokenizer, model.config, 1024)[0]["ids"]
    assert prompt == trained[: len(prompt)]
    assert prompt.count(tokenizer.image_id) == model.config.vision_config.num_patches == 9


def test_the_image_matters_and_is_encoded_once(llava, image_path, tiny, monkeypatch):
    model, tokenizer = llava
    seen, encode = [], model.vision_features
    monkeypatch.setattr(model, "vision_features", lambda pixels: seen.append(pixels) or encode(pixels))
    chat = sample.Chat(model, tokenizer, [image_path], max_new_tokens=12)
    answers = ["".join(chat.ask(question)) for question in ("What is this?", "What is this?")]
    other = sample.Chat(model, tokenizer, [next((tiny.world / "heldout-0/0000").iterdir())], max_new_tokens=12)
    assert len({*answers, "".join(other.ask("What is this?"))}) == 3 and len(seen) == 2


@pytest.mark.parametrize("text", ["An <image>x</image>?", "</s>", "<s><pad> end", "USER: ASSISTANT: yes</s>"])
def test_special_tokens_in_a_question_are_text(ask, llava, image_path, text):
    tokenizer = llava[1]
    specials = set(tokenizer.specials.values())
    prompt = json.loads(ask("--prompt", text, "--json", length=1))["prompt_ids"]
    assert [i for i in prompt if i in specials] == [tokenizer.bos_id]
    assert text in tokenizer.decode(prompt)
    prompt = json.loads(ask("--image", image_path, "--prompt", text, "--json", length=1))["prompt_ids"]
    assert [i for i in prompt if i in specials] == [tokenizer.bos_id] + [tokenizer.image_id] * 9


# ---------------------------------------------------------------------------------------------------------------------
# several images, and where they stand


@pytest.fixture
def prompt_of(ask, tiny, llava):
    """The prompt of a question about `count` images, as text, each run of placeholders as one <image>."""
    paths, tokenizer = sorted((tiny.world / "heldout-0/0000").iterdir()), llava[1]
    names = {i: name for name, i in tokenizer.specials.items()}

    def call(question, count, *more):
        argv = ["--image", *paths[:count]] if count else []
        ids = json.loads(ask(*argv, *more, "--prompt", question, "--json", length=1))["prompt_ids"]
        text = "".join(names.get(i) or tokenizer.decode([i]) for i in ids)
        return text.replace("<image>" * 9, "<image>")

    return call


@pytest.mark.parametrize("question", ["What?", "<image>\nWhat?", "What?\n<image>"])
def test_the_marker_of_an_image_is_no_text(prompt_of, question):
    assert prompt_of(question, 1) == "<s>USER: <image>\nWhat? ASSISTANT:"


def test_several_images_stand_first_or_at_their_markers(prompt_of, tiny):
    assert prompt_of("Which?", 3) == "<s>USER: <image><image><image>\nWhich? ASSISTANT:"
    other = next((tiny.world / "heldout-0/0000").iterdir())
    assert prompt_of("Which?", 1, "--image", other) == "<s>USER: <image><image>\nWhich? ASSISTANT:"
    marked = "<s>USER: Is <image> or <image> red? ASSISTANT:"
    assert prompt_of("Is <image> or <image> red?", 2) == marked


def test_markers_that_are_not_the_images_are_refused(ask, image_path):
    images = ["--image", image_path, image_path]
    assert "1 <image> markers for 2 images" in refusal(ask, *images, "--prompt", "<image> What?")
    assert "3 <image> markers for 2 images" in refusal(ask, *images, "--prompt", "<image><image><image>")
    assert "no image" in refusal(ask, "--prompt", "<image>\nWhat?")


def test_the_order_of_images_matters(llava, tiny):
    one, two, *_ = sorted((tiny.world / "heldout-0/0000").iterdir())
    chats = [sample.Chat(*llava, images, max_new_tokens=12) for images in ([one, two], [two, one], [one, two])]
    first, second, third = ("".join(chat.ask("What is this?")) for chat in chats)
    assert first == third != second


def test_images_in_tiles(llava, tiny, monkeypatch):
    """Two images of different shapes, in tiles: as many placeholders as features, in order, for both."""
    model, tokenizer = llava
    side = model.config.vision_config.image_size
    monkeypatch.setattr(model.config, "image_mode", "anyres")
    monkeypatch.setattr(model.config, "image_grid_pinpoints", [[side, 2 * side], [2 * side, side]])
    model.image_newline = torch.nn.Parameter(torch.zeros(model.config.text_config.hidden_size))
    paths = [tiny.root / "wide.png", tiny.root / "high.png"]
    for path, size in zip(paths, [(90, 40), (40, 90)]):
        Image.linear_gradient("L").resize(size).convert("RGB").save(path)
    try:
        chat = sample.Chat(model, tokenizer, paths, max_new_tokens=2)
        list(chat.ask("Is <image> or <image> red?"))
    finally:
        del model.image_newline
    assert chat.last["prompt_ids"].count(tokenizer.image_id) == sum(chat.image_tokens)
    assert chat.image_sizes == [(40, 90), (90, 40)]


@pytest.mark.parametrize("question, told", [("USER: <image>\nWhat? ASSISTANT:", 1), ("<image>\nWhat?", 0)])
def test_a_whole_prompt_is_told(command, babbler, image_path, capsys, question, told):
    command(sample, "--model", babbler, "--device", "cpu", "--image", image_path, "--prompt", question)
    err = capsys.readouterr().err
    assert err.count("whole prompt") == len(err.splitlines()) == told


def test_a_conversation_includes_earlier_turns(llava, image_path, monkeypatch):
    model, tokenizer = llava
    prompts = fake_answers(
        monkeypatch, [*ids_of_bytes(tokenizer, " a cat"), tokenizer.eos_id], ids_of_bytes(tokenizer, " no")
    )
    chat = sample.Chat(model, tokenizer, [image_path])
    assert "".join(chat.ask("What is this?")) == "a cat" and "".join(chat.ask("Is it red?")) == "no"
    first, second = prompts
    before = [*first, *tokenizer.encode(" a cat"), tokenizer.eos_id]
    assert second[: len(before)] == before
    assert second[len(before) :] == tokenizer.encode("USER: Is it red? ASSISTANT:")


def test_a_conversation_on_a_terminal(llava, monkeypatch, capsys):
    model, tokenizer = llava
    prompts = fake_answers(monkeypatch, ids_of_bytes(tokenizer, " yes"), ids_of_bytes(tokenizer, " no"))
    lines = iter(["Is it?", "Sure?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    sample.converse(sample.Chat(model, tokenizer, []))
    assert capsys.readouterr().out == "yes\nno\n" and len(prompts) == 2


def test_a_marker_in_a_later_question_is_refused_and_the_conversation_goes_on(llava, image_path, monkeypatch, capsys):
    prompts = fake_answers(monkeypatch, ids_of_bytes(llava[1], " yes"), ids_of_bytes(llava[1], " no"))
    lines = iter(["<image>\nIs it?", "And <image>?", "Sure?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    sample.converse(sample.Chat(*llava, [image_path]))
    out, err = capsys.readouterr()
    assert out == "yes\nno\n" and len(prompts) == 2
    assert "sample.py: <image> stands in the question, but there is no image for it" in err.splitlines()


def test_earlier_questions_come_back_with_the_arrow_key(babbler, monkeypatch):
    """On a terminal, an arrow up and Enter ask the last question again."""
    pytest.importorskip("readline")
    argv = [sys.executable, str(REPOSITORY / "sample.py"), "--model", str(babbler), "--device", "cpu"]
    monkeypatch.setenv("TERM", "xterm")
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [*argv, "--max-new-tokens", "2"])
    seen = ""
    for keys in ("Is it red?\n", "\x1b[A\n", "\n"):
        while not seen.endswith("> "):
            seen += os.read(terminal, 4096).decode(errors="replace")
        os.write(terminal, keys.encode())
        seen += "."
    with suppress(OSError):  # the end of the program closes the terminal
        while data := os.read(terminal, 4096):
            seen += data.decode(errors="replace")
    assert os.waitpid(child, 0)[1] == 0 and seen.count("Is it red?") == 2, seen


def test_the_model_that_is_chosen_is_named(command, babbler, monkeypatch, capsys):
    monkeypatch.setattr(sample.runs, "newest_run", lambda *_: babbler)
    command(sample, "--device", "cpu", "--prompt", "Is it red?", "--max-new-tokens", 2)
    assert capsys.readouterr().err == f"sample.py: --model {babbler}, the newest\n"


def test_what_is_no_image_or_no_model_is_told(ask, tiny, image_path, tmp_path):
    assert refusal(ask, "--image", tiny.world).endswith(f"{tiny.world}: a folder, not an image")
    for model in (tmp_path, image_path):
        assert "config.json: no such file; a model's folder has it" in refusal(ask, "--prompt", "a", model=model)


def test_a_llava_answers_without_an_image(ask, llava):
    result = json.loads(ask("--prompt", "Is the cat red?", "--json"))
    assert result["ids"] and llava[1].image_id not in result["prompt_ids"]


def test_a_decoder_alone_answers_and_refuses_images(ask, tiny, image_path):
    assert json.loads(ask("--prompt", "Is the cat red?", "--json", model=tiny.decoder))["ids"]
    assert "vision tower" in refusal(ask, "--image", image_path, "--prompt", "Is it red?", model=tiny.decoder)


# ---------------------------------------------------------------------------------------------------------------------
# sampling


def test_greedy_answers_repeat(ask, image_path):
    argv = ["--image", image_path, "--prompt", "What is this?"]
    assert ask(*argv) == ask(*argv) == ask(*argv, "--seed", 5) != "\n"


def test_a_seed_repeats_its_answer(ask):
    drawn = [
        json.loads(ask("--prompt", "What?", "--temperature", 1.5, "--seed", seed, "--json"))["ids"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    narrow = ["--prompt", "What?", "--temperature", 1.5, "--seed", 1]
    assert ask(*narrow, "--top-k", 1) == ask(*narrow, "--top-p", 1e-9) == ask("--prompt", "What?")


# ---------------------------------------------------------------------------------------------------------------------
# errors that a user can fix, in one line


def test_a_prompt_longer_than_the_context_is_refused(ask, image_path, llava):
    text = "red cat " * 600
    tokens = len(llava[1].encode("\n" + text + " ASSISTANT:")) + len(llava[1].encode("USER: ")) + 9 + 1
    line = refusal(ask, "--image", image_path, "--prompt", text)
    assert tokens > 1024 and str(tokens) in line and "1024" in line


def test_an_unreadable_image_is_named(ask, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    for name in ("nowhere.jpg", "page.jpg"):
        assert name in refusal(ask, "--image", tmp_path / name, "--prompt", "What is this?")


def test_without_a_model_the_error_says_how_to_get_one(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command(sample, "--prompt", "Hello")
    line = caught.value.code
    assert line.startswith("sample.py: ") and len(line.splitlines()) == 1
    assert "train.py" in line and "speedrun.sh" in line and "name a folder" in line


def test_a_folder_without_a_model_is_named(command, tmp_path):
    with pytest.raises(SystemExit) as caught:
        command(sample, "--model", tmp_path, "--prompt", "Hello")
    assert str(tmp_path / "config.json") in caught.value.code and len(caught.value.code.splitlines()) == 1


def test_a_missing_tokenizer_is_named_before_the_weights_are_read(command, tiny, tmp_path):
    data = (tiny.stage2 / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-4] + b"\xff" * 4)  # a NaN, which would be refused
    (tmp_path / "config.json").write_bytes((tiny.stage2 / "config.json").read_bytes())
    with pytest.raises(SystemExit) as caught:
        command(sample, "--model", tmp_path, "--prompt", "Hello")
    assert "tokenizer.json" in caught.value.code and len(caught.value.code.splitlines()) == 1


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", "CUDA"])
def test_an_unknown_device_is_named(command, tiny, device):
    with pytest.raises(SystemExit) as caught:
        command(sample, "--model", tiny.stage2, "--prompt", "Hello", "--device", device)
    assert f"--device {device}" in caught.value.code and len(caught.value.code.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--temperature=nan", "--temperature=inf", "--seed=-1", f"--seed={2**64}"])
def test_an_invalid_number_is_named(command, tiny, capsys, flag):
    with pytest.raises(SystemExit) as caught:
        command(sample, "--model", tiny.stage2, "--prompt", "Hello", flag)
    assert caught.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "flag",
    ["--temperature=-1", "--top-p=0", "--top-p=1.1", "--top-k=-1", "--max-new-tokens=0", "--top-k=5", "--top-p=0.9"],
)
def test_a_number_out_of_range_is_named(command, tiny, capsys, flag):
    with pytest.raises(SystemExit) as caught:
        command(sample, "--model", tiny.stage2, "--prompt", "Hello", flag)
    assert caught.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]
