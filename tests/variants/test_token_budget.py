"""Token budgets: against transformers and slow computations, row by row, and through the scripts."""

import json

import pytest
import torch
from PIL import Image
from test_llava import IMAGE, KINDS, SHAPE, close, random_ids, randomized

import eval as evaluation
import sample
from clip import CLIPVisionConfig
from data import prepare_image
from formats.configs import config_to_json
from insight.maps import RecordAttention
from llava import KVCache, Llava, LlavaConfig, TextConfig, generate, rope_angles
from variants.token_budget import (
    Budget,
    class_attention,
    even_patches,
    limit_visual_tokens,
    pool_tokens,
    random_patches,
    read_budget,
)

SIDE, PATCHES = 16, 16  # 4 x 4 patches of 4 pixels
SHORTER = ["random", "uniform", "cls", "pool"]  # methods that shorten the prompt
METHODS = [*SHORTER, "fastv", "fastv:3"]


def make(budget=None, kind="llama_gqa", scale=0.2, **values):
    text = TextConfig(**SHAPE | {"max_position_embeddings": 128, "num_hidden_layers": 4} | KINDS[kind])
    vision = CLIPVisionConfig(24, 48, 4, 4, image_size=SIDE, patch_size=4)
    model = randomized(Llava(LlavaConfig(text, vision, IMAGE, **values)), scale)
    limit_visual_tokens(model, budget and read_budget(budget))
    return model


def images(count):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def prompt(length, tokens, seed):
    ids = random_ids(length, seed=seed).tolist()
    return ids[:2] + [IMAGE] * tokens + ids[2:]


def answers(model, prompts, pixels, steps=8):
    model.config.eos_token_ids = []
    features = model.vision_features(pixels)
    return [list(row) for row in zip(*generate(model, prompts, features, max_new_tokens=steps))]


def logits(model, prompts, features):
    """Of the last token of equally long prompts, and the cache."""
    decoder = model.language_model.model
    cache = KVCache(model.config.text_config, len(prompts), len(prompts[0]), like=decoder.embed_tokens.weight)
    states = decoder(model.embed(torch.tensor(prompts), features), None, cache)
    return model.language_model.lm_head(states[:, -1]), cache


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_all_patches_change_nothing(method):
    plain, limited = make(), make(f"{PATCHES}:{method}")
    prompts = [prompt(9, PATCHES, seed) for seed in (1, 2)]
    features = limited.vision_features(images(2))
    assert torch.equal(features, plain.vision_features(images(2)))
    want, got = logits(plain, prompts, features)[0], logits(limited, prompts, features)[0]
    assert torch.equal(want, got)
    assert answers(plain, prompts, images(2)) == answers(limited, prompts, images(2))


@torch.no_grad()
def test_each_method_by_itself_keeps_all_patches_in_order():
    everything, tokens = list(range(PATCHES)), torch.randn(2, PATCHES, 5)
    assert even_patches(4, PATCHES) == random_patches(images(1)[0], PATCHES, PATCHES, 0).tolist() == everything
    assert torch.equal(pool_tokens(tokens, PATCHES), tokens)


@pytest.mark.parametrize("method", SHORTER)
@torch.no_grad()
def test_rows_do_not_depend_on_their_batch(method):
    """Features of chosen patches and answers are those of the image alone; the prompts have different lengths."""
    model = make(f"4:{method}", scale=0.6)
    pixels, prompts = images(3), [prompt(length, 4, length) for length in (5, 9, 14)]
    together, alone = model.vision_features(pixels), [model.vision_features(one[None]) for one in pixels]
    close(together, torch.cat(alone))  # the same patches; matmuls of other sizes may round the last bit differently
    got = answers(model, prompts, pixels)
    assert got == [answers(model, [ids], one[None])[0] for ids, one in zip(prompts, pixels)]
    assert len({tuple(row) for row in got}) == 3


@pytest.mark.parametrize("method", SHORTER)
@torch.no_grad()
def test_prompt_and_cache_are_as_short_as_the_budget_says(method):
    model = make(f"4:{method}")
    prepared = prepare_image(Image.new("RGB", (30, 20), "red"), model.config)
    assert prepared.tokens == 4
    features = model.vision_features(prepared.pixels)
    _, cache = logits(model, [prompt(9, prepared.tokens, 1)], features)
    assert cache.used == 9 + 4 and {keys.shape[2] for keys in cache.keys} == {9 + 4}
    with pytest.raises(ValueError, match="16 image tokens for 4 visual features"):
        logits(model, [prompt(9, PATCHES, 1)], features)
    assert "visual_tokens" not in config_to_json(model.config)  # a saved model has all patches again


@torch.no_grad()
def test_class_attention_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make()
    shape = dict(vars(model.config.vision_config)) | {"attn_implementation": "eager"}
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape)).eval()
    state = model.vision_tower.state_dict()
    own = theirs.state_dict().keys()
    theirs.load_state_dict(state if state.keys() == own else {k.removeprefix("vision_model."): state[k] for k in state})
    pixels = images(3)
    want = theirs(pixels, output_attentions=True).attentions[-2][:, :, 0, 1:].mean(dim=1)  # (3, P)
    inputs, block = [], model.vision_tower.vision_model.blocks(-2)[-1]
    block.self_attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    features = model.vision_features(pixels)
    close(class_attention(block.self_attn, inputs[0]), want)
    kept = make("5:cls").vision_features(pixels)
    for row, weights in enumerate(want):
        chosen = sorted(weights.topk(5).indices.tolist())
        assert torch.equal(kept[row], features[row, chosen])
    assert len({tuple(weights.topk(5).indices.tolist()) for weights in want}) > 1  # images differ in what is kept


@torch.no_grad()
def test_pooling_equals_avg_pool2d():
    grid = torch.randn(2, 6, 6, 5, generator=torch.Generator().manual_seed(0))  # row, column, channel
    for m, width in ((3, 2), (2, 3), (1, 6)):
        want = torch.nn.functional.avg_pool2d(grid.permute(0, 3, 1, 2), width).permute(0, 2, 3, 1).flatten(1, 2)
        torch.testing.assert_close(pool_tokens(grid.flatten(1, 2), m * m), want)
    overlapping = torch.stack([grid[:, y : y + 2, x : x + 2].mean((1, 2)) for y in (0, 1, 3, 4) for x in (0, 1, 3, 4)])
    torch.testing.assert_close(pool_tokens(grid.flatten(1, 2), 16), overlapping.transpose(0, 1))
    model, whole = make("4:pool"), make()
    features = model.vision_features(images(2))
    tokens = whole.image_tokens(features, None).view(2, 4, 4, -1)
    want = torch.stack([tokens[:, y : y + 2, x : x + 2].mean((1, 2)) for y in (0, 2) for x in (0, 2)], dim=1)
    close(model.image_tokens(features, None), want.flatten(0, 1))


def test_the_even_grid():
    assert even_patches(3, 9) == list(range(9))
    assert even_patches(3, 6) == [0, 1, 2, 6, 7, 8] and even_patches(3, 4) == [0, 2, 6, 8] and even_patches(3, 1) == [4]
    assert even_patches(4, 4) == [5, 7, 13, 15]
    for side in (3, 7, 24):
        for tokens in range(1, side * side + 1):
            chosen = even_patches(side, tokens)
            assert len(set(chosen)) == tokens and chosen == sorted(chosen) and 0 <= chosen[0] <= chosen[-1] < side**2


def test_random_patches_are_even_and_follow_seed_and_image():
    pixels = images(200)
    drawn = torch.stack([random_patches(one, PATCHES, 4, 0) for one in pixels])
    counts = drawn.flatten().bincount(minlength=PATCHES)  # 50 expected each, standard deviation 6
    assert counts.sum() == 800 and counts.min() > 25 and counts.max() < 75
    assert torch.equal(drawn[0], random_patches(pixels[0].to(torch.bfloat16), PATCHES, 4, 0))
    other = torch.stack([random_patches(one, PATCHES, 4, 1) for one in pixels])
    assert (drawn != other).any(dim=1).sum() > 150


# ---------------------------------------------------------------------------------------------------------------------
# FastV


def full_states(model, ids, features, first_full=0, dropped=()):
    """States (1, T, C) of all tokens in one pass without a cache; layers from `first_full` on cannot see `dropped`.

    Returns them and the attention weights (1, H, T, T) of each layer below `first_full`.
    """
    decoder, weights = model.language_model.model, []
    x = model.embed(torch.tensor([ids]), features)
    positions = torch.arange(len(ids))[None]
    rope = None if decoder.config.gpt2 else rope_angles(positions, decoder.config)
    x = x + decoder.embed_positions(positions) if decoder.config.gpt2 else x
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    seen[:, list(dropped)] = False
    seen |= torch.eye(len(ids), dtype=torch.bool)  # only a dropped token itself; nobody reads its state
    for i, layer in enumerate(decoder.layers):
        if i < first_full:
            with RecordAttention() as record:
                x = layer(x, rope, None, None, None)
            weights += record.weights
        else:
            x = layer(x, rope, seen[None, None], None, None)
    return decoder.norm(x), weights


def slow_fastv(model, prompt, later, features, layer, kept):
    """Logits (1 + later, V) after a prompt and after each further token, computed anew; and what was dropped."""
    weights = full_states(model, prompt, features, layer)[1][layer - 1][0].mean(0)[-1]  # of the last token, (T,)
    image = [i for i, token in enumerate(prompt) if token == IMAGE]
    dropped = sorted(image, key=lambda i: -weights[i])[kept * len(image) // PATCHES :]
    states, _ = full_states(model, prompt + later, features, layer, dropped)
    return model.language_model.lm_head(states[0, len(prompt) - 1 :]), dropped


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("kind", ["llama", "llama_gqa", "gpt2"])
@torch.no_grad()
def test_fastv_equals_full_attention_that_cannot_see_the_dropped_tokens(kind, layer):
    """Rows with no image, one and two, padded; then two tokens, one at a time, and three more in one pass."""
    plain, model = make(kind=kind), make(f"5:fastv:{layer}", kind)
    features = plain.vision_features(images(3))
    text = [random_ids(length, seed=length).tolist() for length in (17, 9, 4)]
    prompts = [text[0], text[1][:3] + [IMAGE] * PATCHES + text[1][3:], [IMAGE] * PATCHES + text[2] + [IMAGE] * PATCHES]
    prompts[2] += [5, 6]
    own, later = [None, features[:1], features[1:]], random_ids(3, 5, seed=8)
    decoder, head, longest = model.language_model.model, model.language_model.lm_head, max(map(len, prompts))
    padding = torch.tensor([longest - len(ids) for ids in prompts])
    rows = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    cache = KVCache(model.config.text_config, 3, longest + 5, like=decoder.embed_tokens.weight)
    states = [decoder(model.embed(rows, features), padding, cache)[:, -1:]]
    for ids in (later[:, :1], later[:, 1:2], later[:, 2:]):
        states.append(decoder(model.embed(ids), padding, cache))
    got = head(torch.cat(states, dim=1))
    removed = set()
    for row, (ids, seen) in enumerate(zip(prompts, own)):
        want, dropped = slow_fastv(plain, ids, later[row].tolist(), seen, layer, 5)
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-5)
        removed.add(len(dropped))
    assert removed == {0, 11, 22}
    assert not torch.allclose(got[1], slow_fastv(plain, prompts[1], later[1].tolist(), own[1], layer, 16)[0], atol=1e-3)
    # The longest row in later layers has 6 words and 2 x 5 image tokens, or 17 words: 17 of 38 columns are left.
    assert [keys.shape[2] for keys in cache.keys] == [longest + 5] * layer + [17 + 5] * (4 - layer)
    assert [values.shape[2] for values in cache.values] == [longest + 5] * layer + [17 + 5] * (4 - layer)


@torch.no_grad()
def test_fastv_rows_do_not_depend_on_their_batch():
    model = make("3:fastv", scale=0.6)
    pixels, prompts = images(3), [prompt(length, PATCHES, length) for length in (5, 9, 14)]
    got = answers(model, prompts, pixels)
    assert got == [answers(model, [ids], one[None])[0] for ids, one in zip(prompts, pixels)]
    assert got != answers(make(scale=0.6), prompts, pixels)


@torch.no_grad()
def test_fastv_goes_on_with_a_cache_and_reads_images_first():
    """A second question about the image reads only its own tokens, as sample.Chat asks it."""
    plain, model = make(), make("5:fastv:2")
    model.config.eos_token_ids, features, first = [], plain.vision_features(images(1)), prompt(9, PATCHES, 1)
    cache = KVCache(model.config.text_config, 1, 0, like=model.language_model.lm_head.weight)
    answer = [i for (i,) in generate(model, [first], features, max_new_tokens=3, cache=cache)]
    second = first + answer + [7, 8, 9]
    again = [i for (i,) in generate(model, [second], None, max_new_tokens=4, cache=cache)]
    want = slow_fastv(plain, first, [*answer, 7, 8, 9, *again], features, 2, 5)[0]
    want[:, IMAGE] = -torch.inf
    assert want.argmax(1)[:3].tolist() == answer and want.argmax(1)[6:-1].tolist() == again
    cache.used = len(second)
    with pytest.raises(ValueError, match="reads all images with the first tokens"):
        list(generate(model, [second + [IMAGE] * PATCHES + [4]], features, cache=cache))
    with pytest.raises(ValueError, match="needs a KV cache"):
        model(torch.tensor([first]), torch.tensor([first]), vision_features=features)


# ---------------------------------------------------------------------------------------------------------------------
# refusals and scripts


@pytest.mark.parametrize(
    "budget, reason",
    [
        ("17", "an image has only 16 patches"),
        ("5:pool", "pool needs a square number of tokens, such as 4 or 9"),
        ("4:fastv:0", "the decoder has 4 layers, so K is from 1 to 3"),
        ("4:fastv:4", "the decoder has 4 layers, so K is from 1 to 3"),
    ],
)
def test_budgets_that_a_model_cannot_have(budget, reason):
    with pytest.raises(ValueError, match=reason):
        make(budget)


def test_models_that_cannot_have_a_budget():
    decoder = Llava(LlavaConfig(TextConfig(**SHAPE), None, IMAGE))
    with pytest.raises(ValueError, match="a decoder without a vision tower"):
        limit_visual_tokens(decoder, Budget(4))
    with pytest.raises(ValueError, match="tiles"):
        make("4", image_mode="anyres", image_grid_pinpoints=[[16, 32]])
    with pytest.raises(ValueError, match="before the first"):
        make("4:cls", vision_feature_layer=0)


@pytest.mark.parametrize(
    "flag, reason",
    [
        ("0", "'0' is not a number of tokens from 1"),
        ("-3", "'-3' is not a number of tokens from 1"),
        ("many:pool", "'many' is not a number"),
        ("4:best", "method 'best' is none of random, uniform, cls, pool, fastv"),
        ("4:pool:2", "'4:pool:2': only random and fastv take a number"),
        ("4:random:x", "only random"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flag, reason, command, capsys):
    with pytest.raises(SystemExit) as end:
        command(sample, "--prompt", "Hello", f"--visual-tokens={flag}")
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and reason in message and "--visual-tokens" in message


def test_eval_prints_the_number_and_keeps_runs_apart(tiny, tmp_path, command, capsys):
    flags = ["--questions", tiny.world / "questions.jsonl", "--limit", 12, "--max-new-tokens", 4, "--device", "cpu"]
    flags += ["--model", tiny.stage2, "--out", tmp_path / "answers.jsonl"]
    command(evaluation, *flags, "--visual-tokens", "4:random:3")
    assert "visual tokens 4 " in capsys.readouterr().err
    assert json.loads((tmp_path / "cost.json").read_text())["visual tokens"] == 4
    assert json.loads((tmp_path / "manifest.json").read_text())["visual_tokens"] == "4:random:3"
    command(evaluation, *flags[:-1], tmp_path / "fastv.jsonl", "--visual-tokens", "3:fastv:1")
    assert "visual tokens 6 " in capsys.readouterr().err  # 9 in the first of two layers, 3 in the second
    for other in (["--visual-tokens", "4:pool"], []):
        with pytest.raises(SystemExit, match="another visual_tokens"):
            command(evaluation, *flags, *other)


def test_sample_answers_with_a_shorter_prompt(tiny, babbler, command, capsys):
    image = next(tiny.world.glob("heldout-0/*/*.png"))
    flags = ["--model", babbler, "--image", image, "--prompt", "What is this?", "--json", "--max-new-tokens", 4]
    lengths = []
    for extra in ([], ["--visual-tokens", "9:cls"], ["--visual-tokens", "4:cls"]):
        command(sample, *flags, "--device", "cpu", *extra)
        lengths.append(len(json.loads(capsys.readouterr().out)["prompt_ids"]))
    assert lengths[0] == lengths[1] == lengths[2] + 5
    with pytest.raises(SystemExit):
        command(sample, *flags[:-3], "--look", "page.png", "--visual-tokens", "4")
    assert "--look draws all patches" in capsys.readouterr().err
