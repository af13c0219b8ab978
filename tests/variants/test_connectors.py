"""Connectors against transformers and against independent computations; a LLaVA with each, from training to answers."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_llava import IMAGE, SHAPE, answer, random_ids, randomized
from torch import nn

import eval as evaluation
import sample
import train
from clip import CLIPVisionConfig
from data import Records, count_image_tokens, prepare_image
from formats.__main__ import merge_folder
from formats.adapters import load_with_adapter
from formats.configs import read_config
from formats.connectors import OURS_ONLY, TABLES, read_connector, write_connector
from formats.saving import save_model
from formats.weights import load_model
from inputs.index import read_records
from inputs.mixture import Source
from insight.maps import patch_numbers
from llava import PROJECTORS, Llava, LlavaConfig, Projector, TextConfig
from serve.prompts import draw_maps
from serve.requests import Refusal
from training.towers import assemble, whiten_projector
from variants.connectors import CONNECTORS, ONE_TOKEN, READ_PROMPT, check_tokens

WIDTH, HEADS, TOKENS = 24, 4, 4
VISION = CLIPVisionConfig(WIDTH, 48, 4, HEADS, image_size=24, patch_size=4)  # 6 x 6 patches
KINDS = [kind for kind in CONNECTORS if kind not in READ_PROMPT]  # those that read no prompt
BERT = {"hidden_size": WIDTH, "num_hidden_layers": 12, "num_attention_heads": HEADS, "intermediate_size": 96}


def usual_tokens(kind):
    return 72 if kind == "expand" else TOKENS


def configure(kind, tokens="usual", vision=VISION, **values):
    tokens = usual_tokens(kind) if tokens == "usual" else tokens
    text = TextConfig(**SHAPE | {"num_key_value_heads": 2})
    return LlavaConfig(text, vision, IMAGE, projector_type=kind, visual_tokens=tokens, **values)


def build(kind, tokens="usual"):
    return randomized(CONNECTORS[kind](configure(kind, tokens)))


def make_features(count=3, patches=36, seed=0):
    return torch.randn(count, patches, WIDTH, generator=torch.Generator().manual_seed(seed))


def tokens_and_gradients(compute, features, *parameters):
    """Tokens, and the gradients of a random weighting of them: for the features, then for each parameter."""
    features = features.clone().requires_grad_()
    tokens = compute(features)
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    return [tokens, *torch.autograd.grad((tokens * weights).sum(), [features, *parameters])]


def assert_close(ours, theirs):
    """Each within 1e-5 of the largest number of its tensor."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        assert mine.shape == other.shape and other.abs().max() > 0
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


class Whole(nn.Module):
    """A module under the path that it has in a model of transformers, so that names are those of its files."""

    def __init__(self, **parts):
        super().__init__()
        for path, part in parts.items():
            owner, *names = self, *path.split("__")
            for name in names[:-1]:
                owner.add_module(name, nn.Module())
                owner = getattr(owner, name)
            setattr(owner, names[-1], part)


def assert_same_function(kind, ours, theirs, extra, compute_ours, compute_theirs):
    """Give `theirs`, a Whole, the weights of our connector, and compare tokens and all gradients, then the weights
    that are read back. Args: extra: names of theirs that have no place in ours."""
    state = write_connector(kind, ours.state_dict())
    left = theirs.load_state_dict(state, strict=False)
    assert sorted(left.missing_keys) == sorted(extra) and not left.unexpected_keys
    theirs.double(), ours.double()
    mine, other, features = dict(ours.named_parameters()), dict(theirs.named_parameters()), make_features().double()
    renamed = {key: name for key, p in mine.items() for name in write_connector(kind, {key: p})}
    assert len(renamed) == len(state)
    # A key's bias moves all scores of a query alike, so its gradient is 0 but for rounding.
    renamed = {key: name for key, name in renamed.items() if not key.endswith("k_proj.bias")}
    chosen, matching = [mine[key] for key in renamed], [other[name] for name in renamed.values()]
    one, two = (
        tokens_and_gradients(compute, features, *parameters)
        for compute, parameters in ((compute_ours, chosen), (compute_theirs, matching))
    )
    assert_close([a.flatten() for a in one], [b.flatten() for b in two])
    again = read_connector(kind, theirs.state_dict())
    assert again.keys() == mine.keys() - set(OURS_ONLY.get(kind, ()))
    assert all(torch.equal(tensor, mine[name]) for name, tensor in again.items())


# ---------------------------------------------------------------------------------------------------------------------
# against transformers


def test_qformer_equals_blip2():
    transformers = pytest.importorskip("transformers")
    config = transformers.Blip2QFormerConfig(**BERT, encoder_hidden_size=WIDTH)
    model, ours = transformers.Blip2QFormerModel(config).eval(), build("qformer")
    queries, last = nn.Parameter(torch.zeros(1, TOKENS, WIDTH)), nn.Linear(WIDTH, SHAPE["hidden_size"])
    theirs = Whole(query_tokens=queries, qformer=model, language_projection=last)

    def compute(features):
        states = model(query_embeds=theirs.query_tokens.expand(len(features), -1, -1), encoder_hidden_states=features)
        return theirs.language_projection(states.last_hidden_state)

    assert_same_function("qformer", ours, theirs, [], ours, compute)


def test_qformer_with_text_equals_instructblip():
    """Three questions of different lengths, one of them empty, whose embeddings are the same vectors in both."""
    transformers = pytest.importorskip("transformers")
    config = transformers.InstructBlipQFormerConfig(**BERT, encoder_hidden_size=WIDTH, vocab_size=50)
    model, ours = transformers.InstructBlipQFormerModel(config).eval(), build("qformer_text")
    queries, last = nn.Parameter(torch.zeros(1, TOKENS, WIDTH)), nn.Linear(WIDTH, SHAPE["hidden_size"])
    theirs = Whole(query_tokens=queries, qformer=model, language_projection=last)
    ids, real = random_ids(3, 5) % 50, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])

    def compute_ours(features):
        text = model.embeddings.word_embeddings(ids)  # ours gets the decoder's embeddings, of its width
        return ours.projection(ours.compute(features, text, real.bool()))

    def compute(features):
        mask = torch.cat([torch.ones(3, TOKENS, dtype=torch.long), real], dim=1)
        start = theirs.query_tokens.expand(len(features), -1, -1)
        states = model(ids, mask, query_embeds=start, encoder_hidden_states=features)
        return theirs.language_projection(states.last_hidden_state[:, :TOKENS])

    unread = [f"qformer.encoder.layer.11.{part}" for part in ("intermediate.dense", "output.dense", "output.LayerNorm")]
    extra = [f"{name}.{kind}" for name in unread for kind in ("weight", "bias")]
    extra += ["qformer.embeddings.word_embeddings.weight"]
    assert_same_function("qformer_text", ours, theirs, extra, compute_ours, compute)
    words = model.embeddings.word_embeddings.weight
    one, two = (tokens_and_gradients(part, make_features().double(), words)[-1] for part in (compute_ours, compute))
    assert_close([one], [two])


def test_resampler_equals_idefics():
    transformers = pytest.importorskip("transformers")
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = transformers.IdeficsConfig(vision_config={"embed_dim": WIDTH})
    model, ours = IdeficsPerceiverResampler(config, WIDTH, 6, HEADS, WIDTH // HEADS, TOKENS), build("resampler")
    theirs = Whole(model__perceiver_resampler=model)
    assert_same_function("resampler", ours, theirs, [], ours, lambda features: ours.projection(model(features)))


@pytest.mark.parametrize("tokens", [4, 9, 36])  # blocks of 3 x 3, of 2 x 2 and of one patch
def test_pixel_shuffle_equals_idefics3(tokens):
    transformers = pytest.importorskip("transformers")
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    text = transformers.LlamaConfig(hidden_size=SHAPE["hidden_size"])
    scale = round((36 / tokens) ** 0.5)
    config = transformers.Idefics3Config(vision_config={"hidden_size": WIDTH}, text_config=text, scale_factor=scale)
    model, ours = Idefics3Connector(config), build("pixel_shuffle", tokens)
    assert_same_function("pixel_shuffle", ours, Whole(model__connector=model), [], ours, model)


@pytest.mark.parametrize("kind", TABLES)
def test_a_model_without_the_connector_is_refused(kind):
    with pytest.raises(ValueError, match=f"no tensor is one of a {kind}: .* is missing"):
        read_connector(kind, {"model.embed_tokens.weight": torch.zeros(2, 2)})


# ---------------------------------------------------------------------------------------------------------------------
# against computations written in another way


def pool_by_hand(x, side):
    """x (B, n, n, C) to (B, side, side, C), cell by cell: rows floor(i n / m) up to ceil((i + 1) n / m)."""
    rows = x.shape[1]
    edges = [(i * rows // side, -(-(i + 1) * rows // side)) for i in range(side)]
    lines = [torch.stack([x[:, a:b, c:d].mean((1, 2)) for c, d in edges], dim=1) for a, b in edges]
    return torch.stack(lines, dim=1)


@pytest.mark.parametrize("side", [1, 2, 4, 6])  # 4 does not divide 6: cells overlap
def test_average_pool_equals_means_of_cells(side):
    connector = build("avg_pool", side**2)

    def compute(features):
        cells = pool_by_hand(features.view(-1, 6, 6, WIDTH), side).flatten(1, 2)
        x = cells @ connector.linear_1.weight.T + connector.linear_1.bias
        x = x * (1 + torch.erf(x / 2**0.5)) / 2
        return x @ connector.linear_2.weight.T + connector.linear_2.bias

    parameters = list(connector.parameters())
    features = make_features()
    assert_close(
        tokens_and_gradients(connector, features, *parameters), tokens_and_gradients(compute, features, *parameters)
    )


@pytest.mark.parametrize("count", [2, 5])
def test_expand_equals_projectors_side_by_side(count):
    """Token j of a patch is that of a projector with rows j d to (j + 1) d of the second layer; patches in order."""
    connector, width = build("expand", 36 * count), SHAPE["hidden_size"]

    def compute(features):
        tokens = []
        for j in range(count):
            projector, rows = Projector(configure("mlp2x_gelu", None)), slice(j * width, (j + 1) * width)
            second = {"weight": connector.linear_2.weight[rows], "bias": connector.linear_2.bias[rows]}
            state = {f"linear_1.{name}": p for name, p in connector.linear_1.named_parameters()}
            state |= {f"linear_2.{name}": p for name, p in second.items()}
            tokens.append(torch.func.functional_call(projector, state, features))
        return torch.cat([one[:, i : i + 1] for i in range(36) for one in tokens], dim=1)

    parameters, features = list(connector.parameters()), make_features()
    assert_close(
        tokens_and_gradients(connector, features, *parameters), tokens_and_gradients(compute, features, *parameters)
    )


def regnet_by_hand(block, x):
    """RegNet's block on x (B, C, n, n) with channels first: convolutions as such, the 3 x 3 one as nine shifts."""

    def norm(layer, x):
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-6).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]

    def silu(x):
        return x / (1 + (-x).exp())

    y = silu(norm(block.norm1, F.conv2d(x, block.conv1.weight[:, :, None, None])))
    padded = torch.zeros(*y.shape[:2], y.shape[2] + 2, y.shape[3] + 2)
    padded[:, :, 1:-1, 1:-1] = y
    kernel = block.conv2.weight[:, 0]  # (C, 3, 3)
    shifts = [(i, j) for i in range(3) for j in range(3)]
    height, width = y.shape[2:]
    y = sum(padded[:, :, i : i + height, j : j + width] * kernel[:, i, j, None, None] for i, j in shifts)
    y = silu(norm(block.norm2, y))
    mean = y.flatten(2).sum(2) / (height * width)  # (B, C)
    hidden = silu(mean @ block.squeeze.weight.T + block.squeeze.bias)
    y = y / (1 + (-(hidden @ block.excite.weight.T + block.excite.bias)).exp())[:, :, None, None]
    return silu(x + norm(block.norm3, F.conv2d(y, block.conv3.weight[:, :, None, None])))


@pytest.mark.parametrize("side", [1, 2, 4])
def test_c_abstractor_equals_its_convolutions(side):
    connector = build("c_abstractor", side**2)

    def compute(features):
        x = (features + connector.positions).transpose(1, 2).unflatten(2, (6, 6))  # (B, C, n, n)
        for block in connector.before:
            x = regnet_by_hand(block, x)
        x = pool_by_hand(x.permute(0, 2, 3, 1), side).permute(0, 3, 1, 2)
        for block in connector.after:
            x = regnet_by_hand(block, x)
        x = torch.einsum("bcij,dc->bijd", x, connector.readout_1.weight) + connector.readout_1.bias
        x = x * torch.sigmoid(x)
        return (x @ connector.readout_2.weight.T + connector.readout_2.bias).flatten(1, 2)

    parameters, features = list(connector.parameters()), make_features()
    assert_close(
        tokens_and_gradients(connector, features, *parameters), tokens_and_gradients(compute, features, *parameters)
    )


# ---------------------------------------------------------------------------------------------------------------------
# what holds for each connector


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_depend_on_the_batch(kind):
    connector, features = build(kind), make_features(5)
    together = connector(features)
    assert together.shape == (5, usual_tokens(kind), SHAPE["hidden_size"])
    changed = connector(torch.cat([features[:2], make_features(3, seed=9)]))
    assert torch.equal(together[:2], changed[:2])  # same shape: equal to the bit
    alone = torch.cat([connector(row[None]) for row in features])
    assert_close([together], [alone])
    assert (together[0] - together[1]).abs().max() > 1e-3  # and they do depend on their own image


def fill_queries(connector, start):
    queries = connector.latents if hasattr(connector, "latents") else connector.queries
    if start is not None:
        queries.data.fill_(start)
    return queries


def ranks(connector):
    """Numerical rank of the 8 tokens of each of three images."""
    tokens = connector(make_features()).detach()
    return {int(torch.linalg.matrix_rank(matrix, rtol=1e-4)) for matrix in tokens}


def ranks_after_training(kind, start):
    """Ranks after three steps on a loss that treats all tokens alike, as BLIP-2's first stage does."""
    torch.manual_seed(0)
    connector = CONNECTORS[kind](configure(kind, tokens=8))
    before = fill_queries(connector, start).detach().clone()
    optimizer = torch.optim.AdamW(connector.parameters(), lr=1e-3)
    target = torch.randn(3, SHAPE["hidden_size"])
    for _ in range(3):
        F.mse_loss(connector(make_features()).mean(1), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(fill_queries(connector, None), before)  # they did train
    return ranks(connector)


@pytest.mark.parametrize("kind", ["qformer", "resampler"])
def test_queries_that_start_equal_stay_equal(kind):
    assert ranks_after_training(kind, start=0.0) == {1}
    assert ranks_after_training(kind, start=1.0) == {1}
    assert ranks_after_training(kind, start=None) == {8}


@pytest.mark.parametrize("kind", ["qformer", "resampler"])
def test_a_decoder_parts_equal_queries(kind):
    """Behind a decoder each token has its own position, so its own gradient: one step ends the equality."""
    torch.manual_seed(0)
    model = Llava(configure(kind, tokens=8))
    fill_queries(model.multi_modal_projector, 0.0)
    assert ranks(model.multi_modal_projector) == {1}
    ids = torch.cat([random_ids(3, 2), torch.full((3, 8), IMAGE), random_ids(3, 6, seed=3)], dim=1)
    optimizer = torch.optim.AdamW(model.multi_modal_projector.parameters(), lr=1e-3)
    model(ids, ids.masked_fill(ids == IMAGE, -100), vision_features=make_features()).backward()
    optimizer.step()
    assert min(ranks(model.multi_modal_projector)) > 1


def test_transformers_starts_queries_equal():
    """Where docs/connectors.md says that a reference starts from equal queries. Loaded checkpoints are not affected."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.OPTConfig(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    text.word_embed_proj_dim = 16
    config = transformers.Blip2Config(vision_config=small, qformer_config=small, text_config=text)
    assert not transformers.Blip2ForConditionalGeneration(config).query_tokens.any()
    config = transformers.Idefics2Config(perceiver_config={"hidden_size": 16, "resampler_n_latents": 3})
    assert bool((Idefics2PerceiverResampler(config.perceiver_config).latents == 1).all())


@pytest.mark.parametrize("kind", CONNECTORS)
def test_a_model_is_saved_loaded_and_answers(kind, tmp_path):
    tokens, start = (1, []) if kind in ONE_TOKEN else (TOKENS, [8] if kind == "qformer_text" else [])
    tokens, vision = (18, replace(VISION, patch_size=8)) if kind == "expand" else (tokens, VISION)
    given = None if kind in ONE_TOKEN else tokens
    model = randomized(Llava(configure(kind, given, vision, answer_start_ids=start)), 0.6)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config and again.config.tokens_per_image == tokens
    prompt = [5, *[IMAGE] * tokens, 7, 8]
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    one, other = (again.vision_features(images[i : i + 1]) for i in range(2))
    assert answer(again, [prompt], one) == answer(model, [prompt], model.vision_features(images[:1]))
    ids, decode = torch.tensor([prompt]), again.language_model.model
    assert (decode(again.embed(ids, one)) - decode(again.embed(ids, other))).abs().max() > 1e-3
    with pytest.raises(ValueError, match=f"{tokens - 1} image tokens for {tokens} visual features"):
        model.embed(torch.tensor([prompt[:1] + prompt[2:]]), one)


def test_transformers_refuses_a_connector(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(Llava(configure("resampler")), tmp_path)
    with pytest.raises(ValueError, match="llava_with_connector"):
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)


DOCS = Path(__file__).parents[2] / "docs/connectors.md"
ROW = re.compile(r"^\| `(\w+)` \| (\d+) \| ([\d,]+) \|", re.MULTILINE)  # connector, tokens, parameters


def test_the_sizes_in_the_docs_are_those_of_the_code():
    """With the tower and the decoder of LLaVA-1.5-7B."""
    rows = ROW.findall(DOCS.read_text())
    assert {kind for kind, *_ in rows} == {*PROJECTORS, *CONNECTORS}
    vision = CLIPVisionConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)
    for kind, tokens, parameters in rows:
        count = None if kind in (*PROJECTORS, *ONE_TOKEN) else int(tokens)
        config = LlavaConfig(TextConfig(hidden_size=4096), vision, projector_type=kind, visual_tokens=count)
        with torch.device("meta"):
            connector = CONNECTORS.get(kind, Projector)(config)
            shape = (1, int(tokens), 4096) if kind in READ_PROMPT else connector(torch.empty(1, 576, 1024)).shape
        assert shape == (1, int(tokens), 4096) and config.tokens_per_image == int(tokens)
        assert f"{sum(p.numel() for p in connector.parameters()):,}" == parameters, kind


def test_the_docs_name_every_weight():
    parts = [build(kind, None if kind in ONE_TOKEN else "usual") for kind in CONNECTORS]
    names = {re.sub(r"\.\d+\.", ".i.", name) for part in parts for name, _ in part.named_parameters()}
    text = DOCS.read_text()
    for name in names:
        module = name.removesuffix(".weight").removesuffix(".bias")
        assert module.split(".")[-1] in text, name


def test_whitening_before_a_connector(tiny, tmp_path):
    """The layer maps features as --whiten does before a projector, and is saved and loaded."""
    models, pooled = {}, "avg_pool"
    for kind, tokens in (("qformer_text", 4), (pooled, 9)):
        models[kind], tokenizer = assemble(tiny.clip, tiny.decoder, kind, 0, tokens)
        if kind == pooled:
            models[kind].multi_modal_projector.linear_1.weight.data = torch.eye(64)
        source = Source(read_records(tiny.world / "captions.json"), tiny.world)
        whiten_projector(models[kind], Records([source], tokenizer, models[kind].config, 1024))
    model, features = models["qformer_text"], torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    want = models[pooled].multi_modal_projector.linear_1(features)
    torch.testing.assert_close(model.multi_modal_projector.whitening(features), want)
    save_model(model, tmp_path)
    again, ids = load_model(tmp_path), torch.full((1, 4), model.config.image_token_index)
    tokens = model.embed(ids, features)
    assert again.config == model.config and torch.equal(again.embed(ids, features), tokens)
    again.multi_modal_projector.whitening.bias.data += 1
    assert not torch.equal(again.embed(ids, features), tokens)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"projector_type": "linear", "visual_tokens": None}))
    with pytest.raises(ValueError, match="whitening is a layer before a connector, and linear is none"):
        load_model(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# from training to answers

# Tokens for the 3 x 3 patches of the tiny tower; default 4.
MOST = {"pixel_shuffle": 1, "gated_cross_attention": 1, "expand": 27}


# The others differ in the connector's class only.
@pytest.mark.parametrize("kind", ["expand", "pixel_shuffle", "qformer_text", "gated_cross_attention"])
def test_stages_1_and_2_then_an_answer_and_a_score(kind, tiny, command, tmp_path, capsys):
    tokens, short = MOST.get(kind, 4), ["--steps", 2, "--batch-size", 2]
    first, second = tmp_path / "stage1", tmp_path / "stage2"
    new = ["--projector", kind, *([] if kind in ONE_TOKEN else ["--visual-tokens", tokens])]
    command(train, *tiny.flags["stage1"], *short, *new, "--out", first)
    command(train, *tiny.flags["stage2"], *short, "--model", first, "--out", second)
    values = json.loads((second / "config.json").read_text())
    assert (values["projector_type"], values["image_seq_length"]) == (kind, tokens)
    assert values["visual_tokens"] == (None if kind in ONE_TOKEN else tokens)
    states = [load_model(folder).multi_modal_projector.state_dict() for folder in (first, second)]
    names = [name for name in states[0] if not name.endswith("k_proj.bias")]  # it moves all scores of a query alike
    assert all(not torch.equal(states[0][name], states[1][name]) for name in names)  # every weight trains
    capsys.readouterr()
    image = next(tiny.world.rglob("*.png"))
    options = ["--device", "cpu", "--max-new-tokens", 3]
    command(sample, "--model", second, "--image", image, "--prompt", "What is this?", "--json", *options)
    said = json.loads(capsys.readouterr().out)
    assert said["prompt_ids"].count(read_config(second).image_token_index) == tokens
    questions = ["--questions", tiny.world / "questions.jsonl", "--limit", 3, "--out", tmp_path / "answers.jsonl"]
    command(evaluation, "--model", second, *questions, *options)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3


def test_lora_on_a_connector_and_its_merge(tiny, command, tmp_path):
    short = ["--steps", 2, "--batch-size", 2]
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    command(train, *tiny.flags["stage1"], *short, "--projector", "gated_cross_attention", "--out", base)
    command(train, *tiny.flags["stage2"], *short, "--model", base, "--lora", "llm", "--out", adapter)
    model, _ = load_with_adapter(base, adapter, "cpu", torch.float32)
    trained, old = model.multi_modal_projector.state_dict(), load_model(base).multi_modal_projector.state_dict()
    assert all(not torch.equal(trained[name], old[name]) for name in old)  # the connector is in the adapter
    merge_folder(base, adapter, merged)
    again = load_model(merged).multi_modal_projector.state_dict()
    assert all(torch.equal(again[name], trained[name]) for name in trained)


# ---------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize("kind, tokens, words", [
    ("avg_pool", 5, "5 is no square number"), ("c_abstractor", 8, "8 is no square number"),
    ("pixel_shuffle", 2, "2 is no square number"), ("pixel_shuffle", 16, "6 x 6 patches into 4 x 4 equal blocks"),
    ("resampler", 37, "from 1 to the number of patches, 36; it is 37"), ("qformer", 0, "it is 0"),
    ("avg_pool", -4, "it is -4"), ("resampler", None, "it is None"),
    ("mlp2x_gelu", 4, "mlp2x_gelu makes one token of each patch"), ("linear", 36, "one token of each patch"),
    ("expand", 36, "2, 3, ... times the number of patches, 36"), ("expand", 73, "times the number of patches, 36"),
    ("expand", None, "expand needs visual_tokens"),
])  # fmt: skip
def test_impossible_numbers_of_tokens_are_refused(kind, tokens, words):
    with pytest.raises(ValueError, match=words):
        check_tokens(kind, tokens, 36)
    with pytest.raises(ValueError, match=words):
        Llava(configure(kind, tokens))


@pytest.mark.parametrize("change, words", [
    ({"projector_type": "perceiver"}, "projector_type 'perceiver' is none of linear, mlp2x_gelu, expand, avg_pool"),
    ({"visual_tokens": 37}, "config.json: resampler needs visual_tokens"),
    ({"visual_tokens": "4"}, "visual_tokens is '4', not int"),
    ({"visual_tokens": 4.5}, "visual_tokens is 4.5, not int"),
    ({"visual_tokens": None}, "config.json: resampler needs visual_tokens"),
    ({"visual_tokens": 5}, r"latents is \(4, 24\), should be \(5, 24\)$"),
    ({"projector_type": "qformer"}, "multi_modal_projector.queries missing.* Its connector is not the one that config"),
    ({"projector_type": "mlp2x_gelu", "visual_tokens": None}, "multi_modal_projector.linear_1.weight missing"),
    ({"image_mode": "anyres", "image_grid_pinpoints": [[24, 48]]}, "resampler does not go with anyres"),
])  # fmt: skip
def test_a_folder_that_contradicts_itself_is_refused(change, words, tmp_path):
    save_model(Llava(configure("resampler")), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=words) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argv, words", [
    (["--projector", "resampler"], "resampler needs visual_tokens from 1 to the number of patches, 9"),
    (["--visual-tokens", 4], "mlp2x_gelu makes one token of each patch"),
    (["--projector", "avg_pool", "--visual-tokens", 0], "--visual-tokens must be at least 1"),
    (["--projector", "perceiver", "--visual-tokens", 4], "invalid choice: 'perceiver'"),
])  # fmt: skip
def test_wrong_flags_are_refused(argv, words, tiny, command, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        command(train, *tiny.flags["stage1"], *argv, "--out", tmp_path / "run")
    assert words in f"{capsys.readouterr().err}\n{caught.value.code}"


def test_a_connector_cannot_change_after_stage_1(tiny, command, tmp_path):
    with pytest.raises(SystemExit, match="--visual-tokens 4, but the model's is None"):
        command(train, *tiny.flags["stage2"], "--visual-tokens", 4, "--out", tmp_path / "run")


def test_maps_on_the_image_are_refused():
    model = Llava(configure("resampler"))
    with pytest.raises(ValueError, match="one token for each patch, which resampler does not make"):
        patch_numbers((24, 24), model.config)
    asked = SimpleNamespace(messages=[None])
    with pytest.raises(Refusal, match="no map: this model's resampler does not make"):
        draw_maps(asked, SimpleNamespace(model=model, tokenizer=None))


def test_all_counts_of_tokens_are_one():
    config = configure("resampler")
    assert count_image_tokens("folder", "image.png", config) == 4
    assert prepare_image(Image.new("RGB", (30, 20)), config).tokens == 4
    assert configure("mlp2x_gelu", None).tokens_per_image == 36
    assert LlavaConfig(TextConfig()).tokens_per_image == 0
