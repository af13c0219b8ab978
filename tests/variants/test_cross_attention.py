"""Gated cross-attention against a rule written token by token and against transformers; what a token may see."""

import copy
import itertools
import queue

import pytest
import torch
from test_connectors import WIDTH, assert_close, configure, make_features
from test_llava import IMAGE, SHAPE, answer, randomized

from data import PreparedImage
from fast.compile import compile_layers
from llava import Decoder, KVCache, Llava, rope_angles
from serve.engine import Engine, Job
from variants.token_budget import METHODS, Budget, limit_visual_tokens
from variants.tuning import add_tuning

# Rows with two images, with none, with one at the end, with one at once, with neighbors.
ROWS = [[5, 6, IMAGE, 7, 8, IMAGE, 9], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, IMAGE], [IMAGE, 3, 4, 5, 6, 7, 8]]
ROWS += [[1, IMAGE, IMAGE, 2, 3, 4, 5]]
IDS, IMAGES = torch.tensor(ROWS), sum(row.count(IMAGE) for row in ROWS)


def build(scale=0.3):
    return randomized(Llava(configure("gated_cross_attention", None)), scale)


def rms_norm(norm, x):
    return x / (x.square().mean(-1, keepdim=True) + SHAPE["rms_norm_eps"]).sqrt() * norm.weight


def gated_by_hand(layer, x, patches):
    """A gated layer for one token x (C,) that sees patches (P, C), head by head."""
    q, k, v = layer.q_proj.weight @ rms_norm(layer.attention_norm, x), patches @ layer.k_proj.weight.T, None
    v, heads, D = patches @ layer.v_proj.weight.T, [], layer.head_dim
    for h in range(0, len(q), D):
        weights = (k[:, h : h + D] @ q[h : h + D] / D**0.5).exp()
        heads.append((weights[:, None] * v[:, h : h + D]).sum(0) / weights.sum())
    x = x + layer.attention_gate.tanh() * (layer.o_proj.weight @ torch.cat(heads))
    y = rms_norm(layer.mlp_norm, x)
    gate = layer.gate_proj.weight @ y
    return x + layer.mlp_gate.tanh() * (layer.down_proj.weight @ (gate * gate.sigmoid() * (layer.up_proj.weight @ y)))


def decode_by_hand(model, ids, features):
    """States (B, T, C): row by row, layer by layer, a token sees the last image up to itself, if there is one."""
    connector, decoder, images = model.multi_modal_projector, model.language_model.model, iter(features)
    states = []
    for row in ids.tolist():
        x = torch.stack([connector.marker if i == IMAGE else decoder.embed_tokens.weight[i] for i in row])
        seen, patches = [], None
        for i in row:
            if i == IMAGE:
                image = next(images)
                centered = image - image.mean(-1, keepdim=True)
                patches = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
                patches = patches * connector.norm.weight + connector.norm.bias
            seen.append(patches)
        rope = rope_angles(torch.arange(len(row))[None], decoder.config)
        for gated, layer in zip(connector.layers, decoder.layers):
            x = torch.stack([t if own is None else gated_by_hand(gated, t, own) for t, own in zip(x, seen)])
            x = layer.forward(x[None], rope, None, None, None)[0]  # forward: without the hooks
        states.append(decoder.norm(x))
    return torch.stack(states)


def test_equals_the_rule_written_out():
    model, unused = build().double(), ("vision_tower", "language_model.lm")  # double: a gate's gradient nearly cancels
    parameters = [p for name, p in model.named_parameters() if not name.startswith(unused)]
    results = []
    for compute in (lambda x: model.language_model.model(model.embed(IDS, x)), lambda x: decode_by_hand(model, IDS, x)):
        features = make_features(IMAGES).double().requires_grad_()
        states = compute(features)
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
        results.append([states, *torch.autograd.grad((states * weights).sum(), [features, *parameters])])
    assert_close(*results)


def test_a_gated_layer_equals_idefics():
    transformers = pytest.importorskip("transformers")
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

    ours, shape = build().multi_modal_projector.layers[0], SHAPE | {"vision_config": {"embed_dim": WIDTH}}
    config = transformers.IdeficsConfig(**shape, alpha_type="float", alpha_initializer="ones")
    theirs = IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {"attention_gate": "alpha_cross_attn", "mlp_gate": "alpha_dense"}
    names |= {f"{name}_proj": f"cross_attn.{name}_proj" for name in "qkvo"}
    names |= {f"{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    mine = {f"{names[name.split('.')[0]]}{name[len(name.split('.')[0]) :]}": p for name, p in ours.named_parameters()}
    theirs.load_state_dict(mine)
    x, patches = torch.randn(2, 5, SHAPE["hidden_size"], requires_grad=True), make_features(2).requires_grad_()
    everyone = torch.ones(2, 5), torch.zeros(2, 1, 5, patches.shape[1])  # every token sees the image
    outputs = [ours(x, *ours.keys_and_values(patches))]
    outputs += [theirs(x, None, patches, everyone[1], everyone[0])]
    weights = [[mine[name] for name, _ in theirs.named_parameters()], list(theirs.parameters())]
    assert_close(*([y, *torch.autograd.grad(y.square().sum(), [x, patches, *p])] for y, p in zip(outputs, weights)))


def test_idefics_changes_text_before_an_image():
    """Where docs/connectors.md says that a reference deviates: its gated MLP runs for tokens that see no image."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

    config = transformers.IdeficsConfig(**SHAPE, vision_config={"embed_dim": WIDTH}, alpha_type="float")
    layer = randomized(IdeficsGatedCrossAttentionLayer(config, layer_idx=0))
    x, blind = torch.randn(1, 3, SHAPE["hidden_size"]), torch.zeros(1, 3)
    one, other = (layer(x, None, make_features(1, seed=seed), torch.zeros(1, 1, 3, 36), blind) for seed in (0, 9))
    assert torch.equal(one, other) and (one - x).abs().max() > 1e-3


def test_a_prompt_is_refused_and_a_prefix_is_not():
    with pytest.raises(ValueError, match="which a prompt moves: use a prefix"):
        add_tuning(build(), "prompt", 2)
    add_tuning(build(), "prefix", 2)


def test_a_new_model_is_its_decoder():
    torch.manual_seed(0)
    model = Llava(configure("gated_cross_attention", None))
    alone = Decoder(model.config.text_config)
    alone.load_state_dict(model.language_model.model.state_dict())
    x = model.embed(IDS, make_features(IMAGES))
    assert torch.equal(model.language_model.model(x), alone(x))
    assert model.multi_modal_projector.plan is not None  # the gated layers did run


# ---------------------------------------------------------------------------------------------------------------------
# what a token sees


def test_text_before_an_image_keeps_every_bit():
    """Text before the first image of a row, and rows without one: nothing changes, whatever the image is."""
    model = build()

    def read(seed):
        return model.language_model.model(model.embed(IDS, make_features(IMAGES, seed=seed)))

    one, other = read(0), read(9)
    blind = torch.tensor([[IMAGE not in row[: t + 1] for t in range(len(row))] for row in ROWS])
    assert torch.equal(one[blind], other[blind])
    assert ((one - other).abs().amax(-1)[~blind] > 1e-3).all()
    # Nor do the added layers change them at all: without any image they are the same bits.
    model.embed(IDS[1:2])
    without = model.language_model.model(model.language_model.model.embed_tokens(IDS.clamp(max=96)))
    assert torch.equal(one[blind], without[blind])


def test_a_token_sees_the_image_before_it_only():
    """Without self-attention, of which the decoder has its own, a gated layer gives each token its last image."""
    model, features = build(), make_features(IMAGES)
    reads = []
    model.language_model.model.layers[0].register_forward_pre_hook(lambda layer, inputs: reads.append(inputs[0]))
    for changed in (None, 0, 1):  # the images of the first row
        model.language_model.model(model.embed(IDS, features if changed is None else swap(features, changed)))
    moved = [(reads[0] - other)[0].abs().amax(-1) > 1e-4 for other in reads[1:]]
    assert moved[0].tolist() == [False, False, True, True, True, False, False]
    assert moved[1].tolist() == [False, False, False, False, False, True, True]


def swap(features, number):
    features = features.clone()
    features[number] = make_features(1, seed=9)[0]
    return features


def test_transformers_mllama_lets_text_before_an_image_see_it():
    """Where docs/connectors.md says that a reference deviates."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mllama import modeling_mllama as mllama

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.models.mllama.MllamaTextConfig(**shape)
    config._attn_implementation = "sdpa"
    layer = randomized(mllama.MllamaCrossAttentionDecoderLayer(config, layer_idx=3))
    sees = torch.zeros(1, 6, 1, 1)
    sees[:, 3:] = 1  # tokens 3 to 5 see the image, tokens 0 to 2 do not
    mask, rows = mllama._prepare_cross_attention_mask(sees, num_vision_tokens=7, dtype=torch.float32)
    x, images = torch.randn(1, 6, 32), torch.randn(2, 1, 7, 32)
    one, other = (layer(x, image, mask, None, rows) for image in images)
    assert (one - other)[:, :3].abs().max() > 1e-3  # ours: 0, in the test above


# ---------------------------------------------------------------------------------------------------------------------
# answers


def answer_without_cache(model, prompt, features, steps):
    ids = list(prompt)
    for _ in range(steps):
        x = model.embed(torch.tensor([ids]), features)
        logits = model.language_model.lm_head(model.language_model.model(x)[:, -1])
        logits[:, IMAGE] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


PROMPTS = [[5, IMAGE, 7, 8], [5, 6], [IMAGE, IMAGE, 8, 9, 9], [3, 4, IMAGE]]
FEATURES = make_features(4)
OWN = [FEATURES[:1], None, FEATURES[1:3], FEATURES[3:]]


@torch.inference_mode()
def test_answers_with_a_cache_in_batches_and_after_a_first_turn():
    model = build(0.5)
    model.config.eos_token_ids = []
    expected = [answer_without_cache(model, prompt, own, 6) for prompt, own in zip(PROMPTS, OWN)]
    assert len({tuple(ids) for ids in expected}) == 4
    assert answer(model, PROMPTS, FEATURES, max_new_tokens=6) == expected
    # A second question goes on where the cache ends; the image is not read again.
    cache = KVCache(model.config.text_config, 1, 0, like=model.language_model.lm_head.weight)
    first = answer(model, PROMPTS[:1], FEATURES[:1], max_new_tokens=6, cache=cache)[0]
    second = [*PROMPTS[0], *first, 11, 12]
    assert cache.used == len(second) - 3
    assert answer(model, [second], max_new_tokens=5, cache=cache)[0] == answer_without_cache(model, second, OWN[0], 5)
    cache.used = len(second)
    with pytest.raises(ValueError, match="reads all images with the first tokens"):
        answer(model, [[*second, IMAGE, 5]], FEATURES[:1], cache=cache)
    cache.used = 1  # before the image, which the next prompt does not have
    with pytest.raises(ValueError, match="reads all images with the first tokens"):
        answer(model, [[5, 7, 7]], cache=cache)
    cache.used = 0
    assert answer(model, [[5, 6]], max_new_tokens=6, cache=cache)[0] == expected[1]


class Words:
    def decode(self, ids):
        return " ".join(map(str, ids))


def test_the_server_gives_the_same_answers():
    model = build(0.5)
    model.config.eos_token_ids, finished = [], queue.Queue()
    images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = model.vision_features(images)
        own = [features[:1], None, features[1:3], features[3:]]
        steps = [6, 9, 12, 15]
        expected = [answer_without_cache(model, *case) for case in zip(PROMPTS, own, steps)]
    pixels = iter(images)
    engine, jobs = Engine(model, Words(), rows=3), []
    for i, prompt in enumerate(PROMPTS):  # rows join and leave at different steps
        prepared = [PreparedImage(next(pixels)[None], (24, 24), 1) for _ in range(prompt.count(IMAGE))]
        jobs.append(Job(prompt, prepared, steps[i]))
        jobs[-1].send = lambda piece, reason: reason and finished.put(reason)
        engine.submit(jobs[-1])
    assert [finished.get(timeout=60) for _ in jobs] == ["length"] * 4
    engine.close()
    assert [job.ids for job in jobs] == expected


# ---------------------------------------------------------------------------------------------------------------------
# training


def gradients(model, **batch):
    model.train()
    model(IDS, IDS.masked_fill(IDS == IMAGE, -100), **batch).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_gradients_of_a_copy_and_with_recomputed_layers():
    """The hooks of a copy lead to its own layers, and layers that run again in backward see the same images."""
    model, features = build(), make_features(IMAGES)
    expected = gradients(model, vision_features=features)
    connector = {f"multi_modal_projector.{name}" for name, _ in model.multi_modal_projector.named_parameters()}
    assert connector < expected.keys() and all(expected[name].abs().max() > 0 for name in connector)
    twin = copy.deepcopy(model)
    for p in model.multi_modal_projector.parameters():
        p.data.zero_()
    twin.language_model.model.recompute = True
    assert_close(list(gradients(twin, vision_features=features).values()), list(expected.values()))
    for p in twin.language_model.parameters():
        p.requires_grad_(False)
    text_only = IDS[1:2]  # DDP waits for the gradient of every trained parameter
    twin(text_only, text_only).backward()
    assert all(p.grad is not None for p in twin.multi_modal_projector.parameters())


def two_questions(rows, prototypes, seed):
    """Rows of two images of 4 kinds, each followed by a token that asks for its kind, and the answer."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 4, (rows, 2), generator=generator)
    noise = torch.randn(2 * rows, *prototypes.shape[1:], generator=generator)
    ids = [[part for kind in row for part in (IMAGE, 10, 60 + kind, 2)] for row in kinds.tolist()]
    labels = [[i if i >= 60 and i != IMAGE else -100 for i in row] for row in ids]
    return torch.tensor(ids), torch.tensor(labels), prototypes[kinds.flatten()] + 0.3 * noise


def test_gated_layers_alone_learn_which_image_stands_before_a_question():
    """As stage 1 trains them: the decoder is frozen, here at random weights."""
    torch.manual_seed(0)
    model, prototypes = Llava(configure("gated_cross_attention", None)), torch.randn(4, 36, WIDTH)
    optimizer = torch.optim.AdamW(model.multi_modal_projector.parameters(), lr=3e-3)
    for step in range(80):
        ids, labels, features = two_questions(16, prototypes, seed=step)
        model(ids, labels, vision_features=features).div(32).backward()
        optimizer.step()
        optimizer.zero_grad()
    ids, labels, features = two_questions(32, prototypes, seed=1000)

    @torch.no_grad()
    def accuracy(features):
        logits = model.language_model.lm_head(model.language_model.model(model.embed(ids, features)))
        asked = labels[:, 1:] >= 0
        return float((logits.argmax(-1)[:, :-1][asked] == labels[:, 1:][asked]).float().mean())

    assert accuracy(features) > 0.95 and accuracy(features.roll(1, 0)) < 0.5  # other images: a guess among 4


def test_a_decoder_in_16_bits_below_layers_in_32(recwarn):
    model, features = build(), make_features(IMAGES)
    model.language_model.to(torch.bfloat16).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, vision_features=features)
    assert all(p.dtype == torch.float32 and p.isfinite().all() and p.any() for p in found.values())
    assert len(found) == len(list(model.multi_modal_projector.parameters())) and not recwarn


# ---------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_of_image_tokens_is_refused(method):
    with pytest.raises(ValueError, match="never sees image tokens") as caught:
        limit_visual_tokens(build(), Budget(4, method, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_number_of_tokens_is_refused(tokens):
    words = f"visual_tokens is {tokens}, but gated_cross_attention makes one token of each image"
    with pytest.raises(ValueError, match=words):
        Llava(configure("gated_cross_attention", tokens))


def test_features_without_a_place_are_refused():
    model = build()
    for ids, count in itertools.product(([[5, 6]], [[IMAGE, 5]], [[IMAGE, IMAGE]]), (1, 2)):
        if ids[0].count(IMAGE) != count:
            with pytest.raises(ValueError, match="image tokens for"):
                model.embed(torch.tensor(ids), make_features(count))
    model.embed(torch.tensor([[IMAGE, 5]]), make_features(1))  # a prompt that the decoder never reads is forgotten
    x = model.embed(torch.tensor([[5, 6]]))
    assert torch.equal(model.language_model.model(x), build().language_model.model(x))


def test_training_is_not_compiled():
    with pytest.raises(ValueError, match="--compile does not go with gated cross-attention"):
        compile_layers(build())
