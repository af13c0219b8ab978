"""Weights of tasks, EWC, distillation, averaged weights: against closed forms and brute force, and resumed bitwise."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from faults import kill_at
from safetensors.torch import load_file
from test_train import flags, log_of, losses, refusal, same_weights, sources, weights
from torch import nn

import formats.__main__ as formats_command
import train
from data import Records, collate
from formats.weights import load_model
from inputs.tokenizer import Tokenizer
from llava import IGNORE
from training import fisher, objectives
from training.sharding import trainable_parameters

RANKS = train.Distributed("cpu")


@pytest.fixture(scope="module")
def before(tiny, command, tmp_path_factory):
    """A copy of the model of stage 2 with its Fisher information, and what the command printed."""
    folder = tmp_path_factory.mktemp("before") / "stage2"
    shutil.copytree(tiny.stage2, folder)
    data = ["--data", tiny.world / "instruct.json", "--samples", 32]
    command(fisher, "--model", folder, *data, "--labels", "data")
    return folder


def samples_of(tiny, count):
    model, tokenizer = load_model(tiny.stage2).train(), Tokenizer.load(tiny.stage2)
    model.vision_tower.requires_grad_(False)
    dataset = Records(sources(tiny.world / "instruct.json", tiny.world), tokenizer, model.config, 1024)
    return model, [dataset[i] for i in range(count)], tokenizer.pad_id


# ---------------------------------------------------------------------------------------------------------------------
# the Fisher information


def test_the_fisher_information_is_that_of_brute_force(tiny, monkeypatch, capsys):
    """Brute force: the log-likelihood of each row of one padded batch, from the whole logits. All of it in float64."""
    model, samples, pad = samples_of(tiny, 16)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model.double()
    batches = (collate([sample], pad) for sample in samples)
    found, ratio = fisher.estimate_fisher(model, batches, "data")

    batch, trained = collate(samples, pad), trainable_parameters(model)
    x = model.embed(batch["input_ids"], model.vision_features(batch["pixel_values"]))
    logits = model.language_model.lm_head(model.language_model.model(x))[:, :-1]
    target = batch["labels"][:, 1:]
    chosen = logits.log_softmax(-1).gather(2, target.clamp(min=0)[..., None])[..., 0]
    rows = (chosen * (target != IGNORE)).sum(1)
    exact = {name: torch.zeros_like(p) for name, p in trained.items()}
    for row in rows:
        for name, gradient in zip(trained, torch.autograd.grad(row, list(trained.values()), retain_graph=True)):
            exact[name] += gradient.square() / int((target != IGNORE).sum())
    apart = max(float((found[name] - exact[name]).abs().max() / exact[name].max()) for name in exact)
    print(f"\nlargest difference from brute force {apart:.1e}; the squares of batches are {ratio:.1f} times smaller")
    assert found.keys() == exact.keys() and apart < 1e-6
    of_means = 16 * sum(float(g.square().sum()) for g in torch.autograd.grad(rows.mean(), list(trained.values())))
    whole = sum(float(f.sum()) for f in exact.values()) * int((target != IGNORE).sum())
    assert ratio == pytest.approx(whole / of_means, rel=1e-6) and ratio > 1.05


class Toy(nn.Module):
    """One matrix W (5, 2) as head over fixed states of three tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.language_model = SimpleNamespace(lm_head=nn.Linear(2, 5, bias=False))
        self.weight, self.device = self.language_model.lm_head.weight, "cpu"
        self.states = torch.randn(3, 2)

    def supervised_states(self, labels):
        return self.states, None


def test_answers_drawn_from_the_model_give_the_true_fisher_information():
    """The expectation over all answers, enumerated: the sum over tokens and ids of p (d log p / d W)^2."""
    toy = Toy()
    p = toy.language_model.lm_head(toy.states).softmax(-1)
    exact = torch.zeros(5, 2)
    for state, chances in zip(toy.states, p):
        for i, chance in enumerate(chances):
            exact += chance * ((torch.eye(5)[i] - chances)[:, None] * state).square()
    labels = torch.tensor([[IGNORE, 0, 0, 0]])
    found, _ = fisher.estimate_fisher(toy, ({"labels": labels} for _ in range(2000)), "model")
    assert torch.allclose(found["weight"], exact / 3, rtol=0.15, atol=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# the terms


def test_the_learned_weight_ends_at_the_closed_form():
    loss, count = torch.tensor([70.0, 3.0, 60.0]), torch.tensor([7, 6, 25])
    s = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([s], lr=objectives.LOG_VARIANCE_RATE, weight_decay=0, betas=(0.9, 0.99))
    for _ in range(700):
        optimizer.zero_grad()
        objectives.uncertainty_loss(loss, count, s).sum().backward()
        optimizer.step()
    assert torch.allclose(s, (loss / count).log(), atol=1e-2)
    at_best = nn.Parameter((loss / count).log())
    objectives.uncertainty_loss(loss, count, at_best).sum().backward()
    assert at_best.grad.abs().max() < 1e-5


def test_the_gradient_of_distillation():
    torch.manual_seed(0)
    student = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: objectives.divergence(logits, teacher, 3.0), student)
    objectives.divergence(student, teacher, 3.0).backward()
    closed = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1))
    assert torch.allclose(student.grad, closed, rtol=0, atol=1e-12)
    assert float(objectives.divergence(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-12)


def make(tiny, model, *argv):
    args = flags("--stage", 2, "--model", tiny.stage2, *argv)
    dataset = Records(
        [*sources(tiny.world / "instruct.json", tiny.world), *sources(tiny.world / "captions.json", tiny.world)],
        Tokenizer.load(tiny.stage2), model.config, 1024,
    )  # fmt: skip
    run = SimpleNamespace(values={}, check_unchanged=lambda *_: None)
    return objectives.Objective(args, RANKS, run, model, dataset)


def test_weights_by_hand_multiply_the_loss_of_their_rows(tiny):
    model, samples, pad = samples_of(tiny, 4)
    samples[1]["task"] = samples[3]["task"] = "captions"
    objective = make(tiny, model, "--task-weights", "captions=3,instruct=0.5")
    total = objective(**objectives.collate_with_tasks(samples, pad))
    parts = [model(**collate(samples[i::2], pad)).item() for i in (0, 1)]
    assert total.item() == pytest.approx(0.5 * parts[0] + 3 * parts[1], rel=1e-6)
    tokens = [sum(label != IGNORE for sample in samples[i::2] for label in sample["labels"][1:]) for i in (0, 1)]
    means = {"captions": parts[1] / tokens[1], "instruct": parts[0] / tokens[0]}
    assert objective.report(RANKS)["task_losses"] == pytest.approx(means, rel=1e-6)
    assert objective.report(RANKS)["task_losses"] == {}  # each step starts anew


def test_the_penalty_is_the_quadratic_form(tiny, before):
    model, samples, pad = samples_of(tiny, 4)
    objective = make(tiny, model, "--ewc", 8, "--model", before)
    batch = collate(samples, pad)
    plain, start = float(model(**batch)), float(objective(**batch))
    assert start == plain  # nothing has moved
    moved, saved = 0.0, load_file(before / objectives.FISHER)
    for i, (name, p) in enumerate(trainable_parameters(model).items()):
        p.data += 0.01 * (i % 3)
        moved += 0.5 * 8 * float((saved[name] * (0.01 * (i % 3)) ** 2).sum())
    tokens = int((batch["labels"][:, 1:] != IGNORE).sum())
    assert moved > 1e-6 and float(objective.penalty()) == pytest.approx(moved, rel=1e-3)
    assert float(objective(**batch)) == pytest.approx(float(model(**batch)) + tokens * moved, rel=1e-5)


def test_a_student_equal_to_its_teacher_has_only_the_plain_loss(tiny):
    model, samples, pad = samples_of(tiny, 4)
    objective, batch = make(tiny, model, "--distill", "0.25:3"), collate(samples, pad)
    assert float(objective(**batch)) == pytest.approx(0.75 * float(model(**batch)), rel=1e-5)
    model.language_model.lm_head.weight.data *= 2
    assert objective.report(RANKS)["distillation"] == pytest.approx(0, abs=1e-6)
    objective(**batch)
    assert objective.report(RANKS)["distillation"] > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# whole runs


@pytest.mark.parametrize(
    "extra", [["--ewc", "1000"], ["--distill", "0.5", "--task-weights", "uncertainty", "--diagnose", 3]]
)
def test_killed_and_resumed_is_bitwise_uninterrupted(tiny, before, command, tmp_path, extra):
    argv = [*tiny.flags["stage2"], "--model", before, *extra]
    command(train, *argv, "--out", tmp_path / "whole")
    kill_at([*argv, "--out", tmp_path / "run"], ("train.train_step", "", 6, tmp_path / "here"))
    assert (tmp_path / "run/checkpoint-000004").exists()
    command(train, *argv, "--out", tmp_path / "run", "--resume")
    assert same_weights(tmp_path / "run", tmp_path / "whole") and losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert weights(tmp_path / "whole").keys() == weights(tiny.stage2).keys()  # no tensor of the objective is saved
    plain = losses_of_plain_run(tiny, before, command, tmp_path)
    assert losses(tmp_path / "whole")[-1] != plain[-1]  # it is not the plain run
    row = log_of(tmp_path / "whole")[-1]
    if "--ewc" in extra:
        assert row["ewc"] > 0 and losses(tmp_path / "whole")[0] == plain[0]
    else:
        assert row["distillation"] > 0 and row["task_weights"]["instruct"] != 0.5


def losses_of_plain_run(tiny, before, command, tmp_path):
    command(train, *tiny.flags["stage2"], "--model", before, "--out", tmp_path / "plain")
    return losses(tmp_path / "plain")


def test_what_cannot_be_is_refused_in_one_line(tiny, before, command, tmp_path):
    argv = [*tiny.flags["stage2"], "--model", tiny.stage2, "--out", tmp_path / "run"]
    line = refusal(command, *argv, "--ewc", 1)
    assert f"{tiny.stage2 / 'fisher.safetensors'} does not exist" in line and "python -m training.fisher" in line
    line = refusal(command, *argv, "--task-weights", "vqa=2")
    assert "no record has the task 'vqa', only instruct" in line
    assert "every task has weight 0" in refusal(command, *argv, "--task-weights", "instruct=0")
    new = [*tiny.flags["stage1"], "--out", tmp_path / "run"]
    assert "a new LLaVA knows nothing yet" in refusal(command, *new, "--distill", 0.5)
    with pytest.raises(SystemExit, match="the files have no weights here"):
        command(fisher, "--model", before, "--data", f"{tiny.world / 'instruct.json'}:2")
    line = refusal(command, *argv, "--model", before, "--ewc", 1, "--train", "vision,projector")
    assert "fisher.safetensors" in line and "vision_tower" in line
    same = tmp_path / "other" / "instruct.json"
    same.parent.mkdir()
    shutil.copy(tiny.world / "instruct.json", same)
    data = ["--data", tiny.world / "instruct.json", same, "--images", tiny.world]
    assert "both task 'instruct'" in refusal(command, *argv, *data, "--task-weights", "instruct=1")


@pytest.mark.parametrize("argv, word", [
    (["--ewc", "0"], "--ewc"), (["--ewc", "1", "--lora", "llm"], "--lora"), (["--ewc", "1", "--shard", "fsdp"], "fsdp"),
    (["--distill", "2"], "ALPHA"), (["--distill", "0.5:0"], "ALPHA"), (["--task-weights", "a"], "NAME=WEIGHT"),
    (["--ewc", "1", "--tune", "ia3"], "--tune"), (["--distill", "1"], "below 1"),
    (["--distill", "0.5", "--tune", "prefix"], "no --distill"),
    (["--task-weights", "a=1,a=2"], "NAME=WEIGHT"), (["--task-weights", "a=1", "--loss-mean", "micro-batch"], "token"),
])  # fmt: skip
def test_flags_that_make_no_sense(argv, word, capsys):
    with pytest.raises(SystemExit):
        flags("--stage", 2, *argv)
    assert word in capsys.readouterr().err.splitlines()[-1]


def test_only_a_model_and_what_was_trained_from_it_are_averaged(tiny, command, tmp_path):
    other = shutil.copytree(tiny.stage2, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["rope_theta"] = 1e6
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="differ in text_config"):
        command(formats_command, "average", tiny.stage1, other, tmp_path / "no")


def test_averaged_weights(tiny, command, tmp_path, capsys):
    command(formats_command, "average", tiny.stage1, tiny.stage2, tmp_path / "mean", "--share", 0.25)
    one, two, mean = (
        load_file(folder / "model.safetensors") for folder in (tiny.stage1, tiny.stage2, tmp_path / "mean")
    )
    assert all(torch.allclose(mean[name], 0.75 * one[name] + 0.25 * two[name], atol=1e-6) for name in two)
    assert load_model(tmp_path / "mean").config.template == load_model(tiny.stage2).config.template
    for argv, word in (([tiny.decoder], "B was not trained from A"), ([tiny.stage2, "--share", 2], "between 0 and 1")):
        with pytest.raises(SystemExit) as caught:
            command(formats_command, "average", tiny.stage1, argv[0], tmp_path / "no", *argv[1:])
        assert word in caught.value.code and not (tmp_path / "no").exists()
