"""Recipes: every published value written out again by hand, what a flag changes, and what is refused."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import BATCH
from test_train import flags, log_of, losses, refusal, same_weights, weights

import train
from formats.saving import save_model
from formats.weights import load_model
from inputs.tokenizer import Tokenizer
from llava import Llava
from training import recipes
from training.flags import PARSER

# From the authors' papers and scripts, and for the world from train.py as it was before there were recipes.
SHORT = {"warmup": 0.03, "weight_decay": 0.0, "beta2": 0.99, "clip_grad": 1.0, "loss_mean": "token"}
LONG = {"warmup": 0.03, "weight_decay": 0.0, "beta2": 0.999, "clip_grad": 0.0, "loss_mean": "token"}
FIRST = LONG | {"projector": "linear", "image_mode": "square", "max_length": 2048, "clip_grad": 1.0}
SECOND = LONG | {"projector": "mlp2x_gelu", "max_length": 2048}
NEXT = LONG | {"projector": "mlp2x_gelu", "max_length": 4096, "image_mode": "anyres"}
PUBLISHED = {
    ("world", 0): SHORT | {"steps": 1000, "batch_size": 64, "lr": 5e-4, "train": ""},
    ("world", 1): SHORT | {"steps": 300, "batch_size": 16, "lr": 1e-3, "train": "projector", "template": "plain"},
    ("world", 2): SHORT | {"steps": 2000, "batch_size": 16, "lr": 5e-4, "train": "projector,llm"},
    ("llava-1.0", 1): FIRST | {"epochs": 1, "batch_size": 128, "lr": 0.002, "train": "projector", "template": "plain"},
    ("llava-1.0", 2): FIRST | {"epochs": 3, "batch_size": 32, "lr": 0.00002, "train": "projector,llm"},
    ("llava-1.5", 1): SECOND
    | {"epochs": 1, "batch_size": 256, "lr": 0.001, "train": "projector", "template": "plain", "image_mode": "square"},
    ("llava-1.5", 2): SECOND
    | {"epochs": 1, "batch_size": 128, "lr": 0.00002, "train": "projector,llm", "image_mode": "pad"},
    ("llava-1.5-lora", 2): SECOND
    | {"epochs": 1, "batch_size": 128, "lr": 0.0002, "lr_projector": 0.00002, "train": "projector", "image_mode": "pad"}
    | {"lora": "llm", "lora_rank": 128, "lora_alpha": 256, "lora_dropout": 0.05},
    ("llava-next", 2): NEXT
    | {"epochs": 1, "batch_size": 128, "lr": 0.00002, "lr_vision": 0.000002, "train": "vision,projector,llm"},
}


def resolved(args):
    values = {key: value for key in recipes.KNOBS if (value := getattr(args, key)) is not None}
    return values | {"train": ",".join(args.train)}


@pytest.mark.parametrize("name, stage", PUBLISHED)
def test_a_recipe_sets_everything(name, stage):
    args = flags("--recipe", name, "--stage", stage)
    assert resolved(args) == PUBLISHED[name, stage]
    assert args.recipe == name and args.differs == {}


def test_every_recipe_is_written_out_above():
    assert {(name, stage) for name, recipe in recipes.RECIPES.items() for stage in recipe.stages} == set(PUBLISHED)


def test_lora_leaves_the_towers_of_any_recipe_alone():
    args = flags("--recipe", "llava-1.5", "--stage", 2, "--lora", "both")
    assert (args.train, args.lora_rank, args.lora_rank_vision, args.lora_dropout) == (("projector",), 16, 32, 0.05)
    assert args.differs["train"] == {"recipe": "projector,llm", "here": "projector"}


def test_every_knob_is_a_flag_that_goes_before_the_recipe():
    other = {"epochs": 2.0, "template": "chatml", "train": "llm", "projector": "linear", "image_mode": "square"}
    other |= {"loss_mean": "micro-batch", "warmup": 0.5}
    for key in (key for key in recipes.KNOBS if not key.startswith(("lora", "lr_vision"))):  # those need others
        value = other.get(key, 7)
        args = flags("--recipe", "llava-1.5", "--stage", 2, f"--{key.replace('_', '-')}", value)
        wanted = PUBLISHED["llava-1.5", 2] | {key: value}
        differs = {key: {"recipe": PUBLISHED["llava-1.5", 2].get(key), "here": value}}
        if key == "steps":
            del wanted["epochs"]
            differs["epochs"] = {"recipe": 1, "here": None}
        assert resolved(args) == wanted and args.differs == differs and key in args.flags


def test_a_flag_that_says_what_the_recipe_says_is_no_difference():
    args = flags("--recipe", "llava-1.5", "--stage", 2, "--lr", "2e-5")
    assert args.differs == {} and "lr" in args.flags


def test_what_differs_is_marked():
    args = flags("--recipe", "llava-1.5", "--stage", 2, "--lr", 1e-5, "--batch-size", 128, "--data", "mine.json")
    heading, *lines = (line.split() for line in recipes.configuration_table(args).splitlines())
    assert heading == ["recipe", "llava-1.5,", "stage", "2", "value", "from"]
    assert [line for line in lines if line[0] == "*"] == [["*", "lr", "1e-05", "flag;", "recipe:", "2e-05"]]
    assert ["batch_size", "128", "flag"] in lines and ["data", "mine.json", "flag"] in lines
    assert ["image_mode", "pad", "recipe"] in lines and not any(line[0] == "lr_vision" for line in lines)


@pytest.mark.parametrize("epochs, records, batch_size, steps", [
    (1, 665_298, 128, 5198),  # LLaVA-1.5's own numbers
    (1, 558_128, 256, 2181),
    (3, 64, 32, 6),
    (0.5, 10, 4, 2),
    (0.1, 30, 3, 1),  # 0.1 * 30 is a little more than 3
    (1e-9, 10, 4, 1),
])  # fmt: skip
def test_steps_of_epochs(epochs, records, batch_size, steps):
    assert recipes.count_steps(epochs, records, batch_size) == steps


@pytest.mark.parametrize("argv, words", [
    (["--recipe", "llava-2"], ["llava-2", "llava-1.5"]),
    (["--recipe", "llava-next", "--stage", "1"], ["llava-next", "no stage 1", "2"]),
    (["--recipe", "llava-1.5", "--stage", "0"], ["llava-1.5", "no stage 0", "1, 2"]),
    (["--steps", "3", "--epochs", "1"], ["--steps", "--epochs"]),
    (["--epochs", "0"], ["--epochs"]),
    (["--epochs", "nan"], ["--epochs"]),
    (["--loss-mean", "median"], ["--loss-mean"]),
    (["--clip-grad", "-1"], ["--clip-grad", "at least 0"]), (["--warmup", "100"], ["--warmup", "from 0 to 1"]),
    (["--weight-decay", "nan"], ["--weight-decay"]), (["--cache-gb", "nan"], ["--cache-gb"]),
    (["--max-length", "0"], ["--max-length", "at least 1"]), (["--workers", "-1"], ["--workers"]),
    (["--train", "relevance,projector"], ["--train relevance needs --relevance"]),
    (["--lr-vision", "2e-6", "--train", "llm"], ["--lr-vision", "does not train"]),
    (["--stage", "0", "--recompute"], ["--recompute does nothing in stage 0"]),
    (["--stage", "0", "--batch-size", "4", "--accumulate", "4"], ["CLIP compares"]),
    (["--stage", "0", "--patch-size", "0"], ["--patch-size"]),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(capsys, argv, words):
    with pytest.raises(SystemExit) as caught:
        flags("--stage", "2", *argv)
    assert caught.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(word in line for word in words), line


def test_help_lists_every_recipe(capsys):
    with pytest.raises(SystemExit):
        flags("--help")
    said = capsys.readouterr().out
    for name, recipe in recipes.RECIPES.items():
        assert all(text in said for text in (name, recipe.source, recipe.cost, recipe.expect))


def test_every_flag_is_in_a_named_group_and_shows_its_default():
    actions = [action for action in PARSER._actions if action.dest != "help"]
    assert len(actions) < 78  # 67 before flags nobody needs were deleted, and those of new capabilities
    for action in actions:
        said = re.search(r"\(default: (.+)\)$", PARSER._get_formatter()._expand_help(action))
        assert said, action.dest
        if action.default not in (None, False, "", []):
            assert said[1] == str(action.default), action.dest
    grouped = [action.dest for group in PARSER._action_groups[2:] for action in group._group_actions]
    assert sorted(grouped) == sorted(action.dest for action in actions)


def test_every_part_has_the_rate_its_recipe_says(tiny):
    model, args = load_model(tiny.stage1), flags("--recipe", "llava-next", "--stage", 2)
    train.choose_trainable(model, args.train)
    groups = train.make_optimizer(model, args, train.Distributed("cpu")).param_groups
    rates = {"vision_tower": 2e-6, "multi_modal_projector": 2e-5, "language_model": 2e-5}
    assert {group["component"]: group["peak"] for group in groups} == rates
    assert all(group["betas"] == (0.9, 0.999) for group in groups)


# ---------------------------------------------------------------------------------------------------------------------
# runs


def test_both_stages_by_the_recipe(tiny, command, tmp_path, capsys):
    here = ["--max-length", 1024, "--batch-size", BATCH, "--world", tiny.world, "--device", "cpu"]
    towers = ["--vision", tiny.clip, "--llm", tiny.decoder]
    command(train, "--recipe", "llava-1.5", "--stage", 1, *towers, *here, "--out", tmp_path / "1")
    command(train, "--recipe", "llava-1.5", "--stage", 2, "--model", tmp_path / "1", *here, "--out", tmp_path / "2")
    said = capsys.readouterr().err
    for stage, mode in ((1, "square"), (2, "pad")):
        folder = tmp_path / str(stage)
        values, config = json.loads((folder / "run.json").read_text()), load_model(folder).config
        assert config.image_mode == mode and config.projector_type == "mlp2x_gelu"
        records = len(json.loads((tiny.world / ("captions.json", "instruct.json")[stage - 1]).read_text()))
        assert len(log_of(folder)) == values["steps"] == -(-records // BATCH)
        assert values["recipe"] == "llava-1.5" and values["epochs"] == 1 and values["beta2"] == 0.999
        assert values["differs"] == {
            "image_size": {"recipe": 336, "here": 72},
            "max_length": {"recipe": 2048, "here": 1024},
            "batch_size": {"recipe": 256 // stage, "here": BATCH},
        }
        assert f"recipe llava-1.5, stage {stage}" in said and f" epochs of {records} records" in said
    assert "* image_size" in said and "recipe: 336" in said


def test_next_trains_all_of_a_model_with_tiles(tiny, command, tmp_path):
    config = load_model(tiny.stage1).config
    config.image_grid_pinpoints, config.image_mode = [(72, 144), (144, 72), (144, 144)], "anyres"
    start, out = tmp_path / "start", tmp_path / "run"
    start.mkdir()
    save_model(Llava(config), start)
    Tokenizer.load(tiny.stage1).save(start)
    here = ["--max-length", 1024, "--batch-size", 4, "--steps", 2, "--device", "cpu"]
    here += ["--lr-vision", 1e-3, "--world", tiny.world]  # 2e-6 in two steps is less than a float32 may hold
    command(train, "--recipe", "llava-next", "--stage", 2, "--model", start, *here, "--out", out)
    before, after = weights(start), weights(out)
    changed = {key.split(".")[0] for key in after if not torch.equal(before[key], after[key])}
    assert changed == {"vision_tower", "multi_modal_projector", "language_model", "image_newline"}
    assert load_model(out).config.image_mode == "anyres"


def test_epochs_are_steps(tiny, command, tmp_path):
    argv = [str(value) for value in tiny.flags["stage1"]]
    at = argv.index("--steps")
    del argv[at : at + 2]
    records = len(json.loads((tiny.world / "captions.json").read_text()))
    assert records > 6 * BATCH
    command(train, *argv, "--epochs", (6 * BATCH - 1) / records, "--out", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tiny.stage1) and same_weights(tmp_path / "run", tiny.stage1)


@pytest.mark.parametrize("own, words", [
    ({}, ["--max-length 2048", "1024"]),
    ({"--projector": "linear"}, ["--projector linear,", "mlp2x_gelu"]),
    ({"--image-mode": "anyres"}, ["--image-mode anyres,", "pad"]),
])  # fmt: skip
def test_a_model_of_another_shape_is_refused(tiny, command, tmp_path, own, words):
    argv = ["--recipe", "llava-1.5", "--stage", 2, "--model", tiny.stage1, "--world", tiny.world, "--device", "cpu"]
    line = refusal(command, *argv, *(text for pair in own.items() for text in pair), "--out", tmp_path / "run")
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_tiles_are_part_of_the_shape():
    vision, text = SimpleNamespace(image_size=336), SimpleNamespace(max_position_embeddings=4096)
    config = SimpleNamespace(vision_config=vision, text_config=text, projector_type="mlp2x_gelu", image_mode="anyres")
    config.image_grid_pinpoints = [(672, 672)]
    recipes.check_model(flags("--recipe", "llava-next", "--stage", 2), config)
    recipes.check_model(flags("--stage", 2), config)
    with pytest.raises(ValueError, match=r"--image-mode pad \(recipe llava-1.5\).*anyres"):
        recipes.check_model(flags("--recipe", "llava-1.5", "--stage", 2), config)
    config.image_grid_pinpoints, config.image_mode = [], "pad"
    with pytest.raises(ValueError, match=r"--image-mode anyres \(recipe llava-next\).*pad"):
        recipes.check_model(flags("--recipe", "llava-next", "--stage", 2), config)
    recipes.check_model(flags("--recipe", "llava-1.5", "--stage", 2), config)


def test_a_run_goes_on_with_its_own_recipe(tiny, command, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_step", interrupted)
        command(train, *tiny.flags["stage2"], "--out", tmp_path / "run")
    argv = [*tiny.flags["stage2"], "--out", tmp_path / "run", "--resume"]
    line = refusal(command, *argv, "--recipe", "llava-1.5", "--max-length", 1024)
    assert "--recipe world" in line
    command(train, *argv)
    assert same_weights(tmp_path / "run", tiny.stage2)
