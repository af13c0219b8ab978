"""Relevance: the estimators against enumeration, hidden patches against dropped ones, and the scripts."""

from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from test_llava import IMAGE, KINDS, SHAPE, random_ids, randomized
from test_token_budget import PATCHES, SIDE, images, prompt

import sample
import train
from clip import CLIPVisionConfig
from formats.adapters import load_with_adapter
from formats.weights import load_model
from llava import KVCache, Llava, LlavaConfig, TextConfig, generate
from training.machine import dry_run
from variants.estimators import Toy, choose, compare, draw, expected_count, log_probability, noisy_scores, reinforce
from variants.relevance import train_relevance

# ---------------------------------------------------------------------------------------------------------------------
# the distribution and the estimators


@pytest.mark.parametrize("bounds", [(2, 2), (1, 3), (5, 5), (1, 5)])
def test_the_distribution_equals_enumeration(bounds):
    """Probability, mean number, draws and the likeliest choice of 5 patches."""
    torch.manual_seed(0)
    logits, sizes = torch.randn(5, dtype=torch.float64), range(bounds[0], bounds[1] + 1)
    subsets = [subset for size in sizes for subset in combinations(range(5), size)]
    kept = torch.tensor([[float(i in subset) for i in range(5)] for subset in subsets], dtype=torch.float64)
    want = (kept @ logits).softmax(0)
    rows = logits.expand(len(subsets), 5)
    torch.testing.assert_close(log_probability(kept, rows, bounds).exp(), want)
    torch.testing.assert_close(expected_count(logits[None], bounds)[0], want @ kept.sum(1))
    assert choose(logits[None], bounds)[0].tolist() == kept[want.argmax()].bool().tolist()
    drawn = draw(logits.expand(20_000, 5), bounds)
    shares = (drawn[:, None] == kept).all(2).double().mean(0)
    assert abs(shares.sum() - 1) < 1e-9 and ((shares - want).abs() < 4 * (want / 20_000).sqrt()).all()


def test_noise_follows_the_logits_and_the_bounds():
    torch.manual_seed(0)
    logits = torch.tensor([-2.0, 0.0, 1.0]).expand(20_000, 3)
    free = (noisy_scores(logits, (0, 3)) > 0).float().mean(0)
    torch.testing.assert_close(free, logits[0].sigmoid(), rtol=0, atol=0.015)
    for bounds in [(1, 1), (1, 2), (3, 3)]:
        counts = (noisy_scores(logits, bounds) > 0).sum(1)
        assert counts.min() >= bounds[0] and counts.max() <= bounds[1]


def biased_reinforce(logits, bounds, loss_of, rows):
    """The mean over all samples as baseline, the own one included: three quarters of the gradient."""
    value = reinforce(logits, bounds, loss_of, rows)
    return 0.75 * value


@pytest.mark.parametrize("estimator, holds", [(reinforce, True), (biased_reinforce, False)])
def test_reinforce_is_the_exact_gradient(estimator, holds):
    """Within two standard errors of enumeration over 495 subsets; a wrong baseline is not."""
    torch.manual_seed(0)
    found = compare(Toy(), estimator, 20_000)
    assert found["standard error"] < 0.02
    assert (found["bias"] < 2 * found["standard error"]) == holds


# ---------------------------------------------------------------------------------------------------------------------
# the choice


def make(kind="llama_gqa", bounds=(0.1, 0.9), scale=0.6, **values):
    text = TextConfig(**SHAPE | {"max_position_embeddings": 128, "num_hidden_layers": 3} | KINDS[kind])
    vision = CLIPVisionConfig(24, 48, 4, 4, image_size=SIDE, patch_size=4)
    model = randomized(Llava(LlavaConfig(text, vision, IMAGE, relevance_bounds=bounds, **values)), scale)
    model.relevance.score.bias.data.zero_()
    model.config.eos_token_ids = []
    return model


def batch(answers=(3, 5, 2), device=None):
    """Right-padded rows with an image, without one and with two; the last tokens of each are its answer."""
    text = [random_ids(length, seed=length).tolist() for length in (9, 14, 7)]
    rows = [text[0][:2] + [IMAGE] * PATCHES + text[0][2:], text[1], [IMAGE] * PATCHES + text[2][:1]]
    rows[2] += [IMAGE] * PATCHES + text[2][1:]
    longest, ids, labels = max(map(len, rows)), [], []
    for row, answer in zip(rows, answers):
        ids.append(row + [0] * (longest - len(row)))
        labels.append([-100] * (len(row) - answer) + row[-answer:] + [-100] * (longest - len(row)))
    return rows, torch.tensor(ids), torch.tensor(labels)


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
@torch.no_grad()
def test_hidden_patches_equal_dropped_patches(kind):
    """The loss of a padded batch with masks is that of each prompt, read alone with its patches dropped."""
    model = make(kind).double()
    rows, ids, labels = batch()
    features = model.vision_features(images(3))
    want = model(ids, labels, vision_features=features)  # not training: the likeliest choice, no price
    total, decoder, head = 0, model.language_model.model, model.language_model.lm_head
    for row, answer, own in zip(rows, (3, 5, 2), (features[:1], None, features[1:])):
        cache = KVCache(model.config.text_config, 1, len(row), like=head.weight)
        prompt, rest = torch.tensor([row[:-answer]]), torch.tensor([row[-answer:]])
        states = [decoder(model.embed(prompt, own), None, cache)[:, -1:]]
        states.append(decoder(model.embed(rest), None, cache)[:, :-1])
        total -= head(torch.cat(states, 1)).log_softmax(-1)[0].gather(1, rest.T).sum()
        kept = int(model.kept_patches.sum()) if own is not None else 0
        patches = 0 if own is None else len(own) * PATCHES
        assert {keys.shape[2] for keys in cache.keys} == {len(row) - patches + kept}
        assert own is None or 0 < kept < patches
    torch.testing.assert_close(total, want, check_dtype=False, rtol=1e-5, atol=1e-5)
    model.allocator.bounds = (PATCHES, PATCHES)
    assert abs(model(ids, labels, vision_features=features) - want) > 1e-3  # hidden patches matter


@torch.no_grad()
def test_rows_do_not_depend_on_their_batch():
    """Choices to the bit, and answers; the questions differ in length, and rows in the number of kept patches."""
    model = make()
    prompts, pixels = [prompt(length, PATCHES, length) for length in (5, 9, 14, 9)], images(3)[[0, 1, 2, 0]]
    features = model.vision_features(pixels)

    def answer(prompts, features):
        return [list(row) for row in zip(*generate(model, prompts, features, max_new_tokens=8))]

    together, kept = answer(prompts, features), model.kept_patches
    for row in range(4):
        assert answer([prompts[row]], features[row : row + 1]) == [together[row]]
        assert torch.equal(model.kept_patches[0], kept[row])
    assert len(set(kept.sum(1).tolist())) > 1
    other = answer([prompt(9, PATCHES, 33)], features[:1])  # another question about the first image
    assert other and not torch.equal(model.kept_patches[0], kept[0])


def test_the_answer_is_not_read_by_the_scorer():
    model, (_, ids, labels) = make(), batch()
    features, seen = model.vision_features(images(3)).detach(), []
    model.relevance.register_forward_hook(lambda module, inputs, scores: seen.append(scores.detach()))
    model(ids, labels, vision_features=features)
    model(ids.where(labels == -100, 7), labels, vision_features=features)
    model(ids.where(ids != ids[0, 20], 7), labels, vision_features=features)  # a word of the first question
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0][0], seen[2][0])


@pytest.mark.parametrize("estimator", ["gumbel", "concrete", "reinforce"])
def test_every_estimator_reaches_every_weight_of_the_scorer(estimator):
    model, (_, ids, labels) = make(), batch()
    train_relevance(model, estimator, 0.1)
    model.train()
    features = model.vision_features(images(3)).detach()
    torch.manual_seed(0)
    loss = model(ids, labels, vision_features=features)
    loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.relevance.parameters())
    model.zero_grad()
    model.allocator.price = 0.2
    torch.manual_seed(0)
    counts = (model(ids, labels, vision_features=features) - loss) / 0.1
    assert 3 < counts < 3 * PATCHES  # the price is paid for each patch
    dry_run(model, torch.float32, {"input_ids": ids, "labels": labels, "vision_features": features}, False, False)
    text_only = model(ids[1:2], labels[1:2])
    text_only.backward()
    assert all(p.grad is not None for p in model.relevance.parameters())  # DDP waits for each


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints and scripts


def test_models_that_cannot_choose():
    with pytest.raises(ValueError, match="without a vision tower"):
        train_relevance(Llava(LlavaConfig(TextConfig(**SHAPE), None, IMAGE)), "gumbel", 0)
    for values, reason in [
        ({"projector_type": "avg_pool", "visual_tokens": 4}, "avg_pool does not map each patch"),
        ({"image_mode": "anyres", "image_grid_pinpoints": [[16, 32]]}, "tiles"),
        ({"bounds": [0.5, 0.2]}, "relevance_bounds is"),
        ({"bounds": [0, 1]}, "relevance_bounds is"),
        ({"bounds": [0.1]}, "relevance_bounds is"),
    ]:
        with pytest.raises(ValueError, match=reason):
            make(**values)
    with pytest.raises(ValueError, match="needs a KV cache"):
        model = make()
        model.language_model.model(model.embed(torch.tensor([prompt(4, PATCHES, 1)]), images(1).new_zeros(1, 16, 24)))


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--token-price", "0.1"], "--token-price needs --relevance"),
        (["--relevance", "gumbel", "--token-price=-1"], "at least 0"),
        (["--relevance", "gumbel", "--questions", "2"], "--questions 1"),
        (["--relevance", "gumbel", "--train", "llm"], "add relevance to --train"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, reason, command, capsys):
    with pytest.raises(SystemExit) as end:
        command(train, "--stage", 2, *flags)
    assert end.value.code == 2 and reason in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory, command):
    """Folders of a scorer's run and of the LoRA on top, both trained for a few steps."""
    root = tmp_path_factory.mktemp("relevance")
    flags = ["--stage", 2, "--world", tiny.world, "--steps", 3, "--batch-size", 8, "--device", "cpu"]
    flags += ["--token-price", 0.05, "--relevance"]
    command(train, *flags, "gumbel", "--model", tiny.stage2, "--out", root / "scorer")
    command(train, *flags, "reinforce", "--model", root / "scorer", "--lora", "llm", "--out", root / "lora")
    return root


def test_two_steps_of_training_save_what_they_train(tiny, trained):
    """First the scorer alone; then the scorer and a LoRA on the decoder; the vision tower and the projector never."""
    base, scorer = load_model(tiny.stage2), load_model(trained / "scorer")
    assert scorer.config.relevance_bounds == [64 / 576, 400 / 576] and scorer.allocator.bounds == (1, 6)
    for name, p in base.named_parameters():
        assert torch.equal(p, scorer.get_parameter(name))
    new = make_scorer(base)
    assert all(not torch.equal(p, q) for p, q in zip(new.parameters(), scorer.relevance.parameters()))
    whole, _ = load_with_adapter(trained / "lora", None, "cpu", torch.float32)
    changed = {name.split(".")[0] for name, p in scorer.named_parameters() if not same(whole, name, p)}
    assert changed == {"relevance", "language_model"}


def make_scorer(model):
    torch.manual_seed(0)
    train_relevance(model, "gumbel", 0)
    return model.relevance


def same(model, name, p):
    """False where a LoRA stands beside the parameter, or where it has changed."""
    found = dict(model.named_parameters())
    return name in found and torch.equal(found[name], p)


def test_sample_shows_which_patches_were_kept(tiny, trained, tmp_path, command):
    picture = next(tiny.world.glob("heldout-0/*/*.png"))
    flags = ["--image", picture, "--prompt", "What color?", "--device", "cpu", "--max-new-tokens", 2, "--show-tokens"]
    command(sample, "--model", trained / "scorer", *flags, tmp_path / "page.png")
    command(sample, "--model", tiny.stage2, "--visual-tokens", "4:cls", *flags, tmp_path / "cls.png")
    page = np.asarray(Image.open(tmp_path / "cls.png"))[100:320, 252:472].astype(float)  # the second panel of 220 x 220
    picture = np.asarray(Image.open(picture).convert("RGB").resize((220, 220), Image.Resampling.LANCZOS))
    bright = (page.reshape(-1, 220, 3).mean(2) / picture.mean(2) > 0.9).reshape(220, 220)
    cells = [bright[y : y + 60, x : x + 60].mean() for y in (5, 80, 155) for x in (5, 80, 155)]
    assert sum(share > 0.95 for share in cells) == 4 and sum(share < 0.05 for share in cells) == 5
    with pytest.raises(SystemExit, match="this model reads all patches"):
        command(sample, "--model", tiny.stage2, *flags, tmp_path / "none.png")
    with pytest.raises(SystemExit, match="this model's question chooses the patches"):
        command(sample, "--model", trained / "scorer", "--visual-tokens", "4", *flags, tmp_path / "none.png")


def test_a_conversation_chooses_again(tiny, trained):
    model, tokenizer = load_with_adapter(trained / "scorer", None, "cpu", torch.float32)
    chat, lengths = sample.Chat(model, tokenizer, [next(tiny.world.glob("heldout-0/*/*.png"))], max_new_tokens=2), []
    model.relevance.register_forward_hook(lambda module, inputs, scores: lengths.append(inputs[1].shape[1]))
    for question in ("What color is the star?", "Where is the sign?"):
        assert list(chat.ask(question)) is not None
    assert len(lengths) == 2 and lengths[1] > lengths[0]  # the second time with both questions


def test_the_measurement_prints_its_tables(tiny, trained, command, capsys, tmp_path):
    from insight import relevance as measurement

    flags = ["--model", trained / "scorer", "--base", tiny.stage2, "--world", tiny.world, "--questions", 20]
    command(measurement, *flags, "--methods", "random", "pool", "--device", "cpu")
    out = capsys.readouterr().out
    assert "| about one object |" in out and "| base, pool |" in out and "asked alone: 20 of 20" in out
    assert "| all of these |" in out
    lines, asked = (tiny.world / "questions.jsonl").read_text().splitlines(True), tmp_path / "asked.jsonl"
    asked.write_text("".join(line for line in lines if '"color"' in line))
    flags[-1] = 2
    command(measurement, *flags, "--methods", "random", "--device", "cpu", "--asked", asked)
    out = capsys.readouterr().out
    assert "| color |" in out and "| shape |" not in out
