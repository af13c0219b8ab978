"""LLaVA against transformers, where it is installed, against itself, and against numbers computed by hand."""

import json
import math
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import llava
from clip import CLIPVisionConfig
from formats.configs import read_text_config
from formats.saving import save_model
from formats.weights import load_model
from llava import (
    IGNORE,
    KVCache,
    Llava,
    LlavaConfig,
    Projector,
    TextConfig,
    generate,
    sample_token,
    summed_cross_entropy,
)

VOCAB, IMAGE, PAD = 99, 97, 0
VISION = CLIPVisionConfig(24, 48, 4, 4, image_size=8, patch_size=4)  # 4 features an image
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rope_theta": 500_000.0,  # not the default, so that a value that is not read shows
    "rms_norm_eps": 1e-4,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32  # so short that all three kinds of frequencies occur
KINDS = {
    "llama": {},
    "llama_gqa": {"num_key_value_heads": 2},
    "llama_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama_head_dim": {"head_dim": 12},
    "llama3": {"num_key_value_heads": 2, "rope_scaling": LLAMA3},
    "llama_linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "qkv_bias": True},
    "gpt2": {"model_type": "gpt2", "attention_bias": True, "tie_word_embeddings": True},
}


def make(kind="llama_gqa", decoder_only=False, scale=0.2, **values):
    config = LlavaConfig(TextConfig(**SHAPE, **KINDS[kind]), None if decoder_only else VISION, IMAGE, **values)
    return randomized(Llava(config), scale)


def randomized(model, scale=0.2):
    """Give every parameter a random value, norms and biases too: a forgotten bias of zero would go unnoticed.

    A scale of 0.2 keeps rounding errors small; from about 0.6 on, greedy answers no longer repeat one token.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if norm else scale * noise)
    return model.eval()


def random_ids(*shape, seed=0):
    return torch.randint(1, 90, shape, generator=torch.Generator().manual_seed(seed))


def random_images(count, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def prompt(length, seed=0, image=True):
    """`length` ids, four of them the placeholders of one image."""
    ids = random_ids(length, seed=seed).tolist()
    return ids[:2] + [IMAGE] * 4 + ids[6:] if image else ids


@torch.no_grad()
def logits_of(model, input_ids, pixel_values=None):
    features = None if pixel_values is None else model.vision_features(pixel_values)
    return model.language_model.lm_head(model.language_model.model(model.embed(input_ids, features)))


def answer(model, prompts, features=None, **options):
    """The ids that generate() yields for each row, up to its end."""
    steps = list(generate(model, prompts, features, **options))
    return [[i for i in row if i is not None] for row in zip(*steps)]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# against transformers


@pytest.mark.parametrize(
    "kind", ["llama", "llama_gqa", "llama_tied", "llama_head_dim", "llama3", "llama_linear", "mistral", "qwen2"]
)
def test_decoder_equals_transformers(kind):
    """Our config is read from transformers' own, in the form of its version 5 (rope_parameters and the like)."""
    transformers = pytest.importorskip("transformers")
    family = {"qwen2": "Qwen2", "mistral": "Mistral"}.get(kind, "Llama")
    config = getattr(transformers, f"{family}Config")(**SHAPE | KINDS[kind])
    theirs = randomized(getattr(transformers, f"{family}ForCausalLM")(config))
    ours = Llava(LlavaConfig(read_text_config(config.to_dict()))).eval()
    ours.language_model.load_state_dict(theirs.state_dict())
    input_ids = random_ids(2, 17)
    with torch.no_grad():
        close(logits_of(ours, input_ids), theirs(input_ids).logits)


def test_gpt2_equals_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    theirs = randomized(transformers.GPT2LMHeadModel(config))
    ours = Llava(LlavaConfig(read_text_config(config.to_dict()))).eval()
    names = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    outer = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
    state = {}
    for key, value in theirs.state_dict().items():
        name, kind = key.removeprefix("transformer.").rsplit(".", 1)
        if name == "lm_head":
            state["lm_head.weight"] = value
        elif name in outer:
            state[f"model.{outer[name]}.{kind}"] = value
        else:
            _, layer, part = name.split(".", 2)
            if "c_" in part and kind == "weight":  # Conv1D keeps (in, out), Linear (out, in)
                value = value.T
            if part == "attn.c_attn":
                for projection, third in zip("qkv", value.chunk(3)):
                    state[f"model.layers.{layer}.self_attn.{projection}_proj.{kind}"] = third
            else:
                state[f"model.layers.{layer}.{names[part]}.{kind}"] = value
    ours.language_model.load_state_dict(state)
    input_ids = random_ids(2, 17)
    with torch.no_grad():
        close(logits_of(ours, input_ids), theirs(input_ids).logits)


def from_folder(ours, folder, name):
    """Load a folder that we saved with transformers' class `name`; no tensor may be missing or unused."""
    transformers = pytest.importorskip("transformers")
    save_model(ours, folder)
    theirs, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return theirs.eval()


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied", "mistral", "qwen2"])
def test_folder_loads_in_transformers(tmp_path, kind):
    ours = make(kind)
    theirs = from_folder(ours, tmp_path, "LlavaForConditionalGeneration")
    input_ids = torch.tensor([prompt(15, 1), prompt(15, 2)])
    with torch.no_grad():
        want = theirs(input_ids=input_ids, pixel_values=random_images(2)).logits
    close(logits_of(ours, input_ids, random_images(2)), want)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2"])
def test_decoder_folder_loads_in_transformers(tmp_path, kind):
    ours = make(kind, decoder_only=True)
    theirs = from_folder(ours, tmp_path, "AutoModelForCausalLM")
    with torch.no_grad():
        close(logits_of(ours, random_ids(2, 9)), theirs(random_ids(2, 9)).logits)


def test_greedy_answer_equals_transformers(tmp_path):
    ours = make(scale=0.6)
    theirs = from_folder(ours, tmp_path, "LlavaForConditionalGeneration")
    seen = set()
    for seed in range(4):
        ids, pixel_values = prompt(11 + seed, seed), random_images(1, seed)
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixel_values}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            limits = {"max_new_tokens": 20, "eos_token_id": [2], "pad_token_id": PAD, "suppress_tokens": [IMAGE]}
            want = theirs.generate(**inputs, do_sample=False, **limits)[0, len(ids) :].tolist()
        got = answer(ours, [ids], ours.vision_features(pixel_values), max_new_tokens=20)
        assert got == [want]
        seen |= set(want)
    assert len(seen) > 20  # one token over and over would prove little


# ---------------------------------------------------------------------------------------------------------------------
# the cache and the batch


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
@pytest.mark.parametrize("chunks", [[10] + [1] * 6, [7, 3, 6], [1] * 16, [1, 15]])
@pytest.mark.parametrize("padding", [None, torch.tensor([3, 0])])
def test_reading_in_chunks_with_a_cache_changes_nothing(kind, chunks, padding):
    model = make(kind)
    input_ids = torch.tensor([prompt(16, 1), prompt(16, 2)])
    x = model.embed(input_ids, model.vision_features(random_images(2)))
    decoder = model.language_model.model
    cache, parts = KVCache(model.config.text_config, 2, 16, like=x), []
    for chunk in x.split(chunks, dim=1):
        parts.append(model.language_model.lm_head(decoder(chunk, padding, cache)))
        end = cache.used
        want = model.language_model.lm_head(decoder(x[:, :end], padding))[:, end - chunk.shape[1] :]
        torch.testing.assert_close(parts[-1], want, rtol=1e-4, atol=1e-5)
    assert cache.used == 16


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied", "gpt2"])
def test_a_batch_answers_as_each_row_alone(kind):
    model = make(kind, scale=0.6, eos_token_ids=[])
    lengths = [9, 23, 6, 12, 1]
    prompts = [prompt(n, seed=n, image=n > 5) for n in lengths]
    prompts[1][10:14] = [IMAGE] * 4  # two images in one row, none in the last
    rows = [[0], [1, 2], [3], [4], []]
    features = model.vision_features(random_images(5))
    parts = [features[row] if row else None for row in rows]
    free = [answer(model, [p], part, max_new_tokens=12)[0] for p, part in zip(prompts, parts)]
    seen = {i for row in free for i in row}
    assert all(len(row) == 12 for row in free) and len(seen) > 5

    def different_lengths(ends):
        return len({min(row.index(end) if end in row else 12 for end in ends) for row in free})

    model.config.eos_token_ids = max(combinations(sorted(seen), 2), key=different_lengths)
    alone = [answer(model, [p], part, max_new_tokens=12)[0] for p, part in zip(prompts, parts)]
    assert len({len(row) for row in alone}) > 2  # rows stop at different steps
    assert answer(model, prompts, features, max_new_tokens=12) == alone


def test_padding_is_never_attended_to():
    """Answers must not depend on which token is used as padding."""
    model = make(scale=0.6)
    prompts = [prompt(8, 1), prompt(20, 2)]
    features = model.vision_features(random_images(2))
    want = answer(model, prompts, features, max_new_tokens=8)
    model.config.pad_token_id = 55
    assert answer(model, prompts, features, max_new_tokens=8) == want


# ---------------------------------------------------------------------------------------------------------------------
# sampling and stopping


def draws(probabilities, temperature=1.0, top_k=0, top_p=1.0, count=4000):
    """How often each id is drawn, given its probability."""
    logits = torch.tensor(probabilities).log().expand(count, -1)
    ids = sample_token(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    return [round(n / count, 1) for n in ids.bincount(minlength=len(probabilities)).tolist()]


def test_temperature():
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_token(logits, 0, 0, 1.0), logits.argmax(-1))
    assert torch.equal(sample_token(logits, 1e-4, 0, 1.0), logits.argmax(-1))
    assert draws([0.6, 0.3, 0.1]) == [0.6, 0.3, 0.1]
    assert draws([0.6, 0.3, 0.1], temperature=0.5) == [0.8, 0.2, 0.0]  # squares: .36 .09 .01 of .46
    assert draws([0.6, 0.1, 0.1, 0.1, 0.1], temperature=1e6) == [0.2] * 5


def test_top_k():
    assert draws([0.1, 0.4, 0.2, 0.3], top_k=1) == [0.0, 1.0, 0.0, 0.0]
    assert draws([0.1, 0.4, 0.2, 0.3], top_k=2) == [0.0, 0.6, 0.0, 0.4]
    for k in (0, 4, 9):  # 0 is off, and there are only four ids
        assert draws([0.1, 0.4, 0.2, 0.3], top_k=k) == [0.1, 0.4, 0.2, 0.3]


@pytest.mark.parametrize("top_p, want", [
    (0.3, [0.0, 1.0, 0.0, 0.0]),  # .49 alone reaches .3
    (0.6, [0.0, 0.6, 0.0, 0.4]),  # .49 does not reach .6, .49 + .3 does; shares .62 and .38
    (0.9, [0.1, 0.5, 0.0, 0.3]),  # .49 + .3 + .14; shares .15 .53 .32
    (1.0, [0.1, 0.5, 0.1, 0.3]),
    (0.0, [0.0, 1.0, 0.0, 0.0]),  # the likeliest always stays
])  # fmt: skip
def test_top_p_keeps_the_smallest_set(top_p, want):
    got = draws([0.14, 0.49, 0.07, 0.3], top_p=top_p)
    assert [n > 0 for n in got] == [n > 0 for n in want]
    assert got == pytest.approx(want, abs=0.11)
    assert sum(n > 0 for n in draws([0.25] * 4, top_p=0.5)) == 2  # two reach it exactly; a third is not needed


def test_order_of_the_filters():
    # Of the two that top-k leaves, .57 and .43, the first reaches .5; the other way round, .4 would not, and two stay.
    assert draws([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.5) == [1.0, 0.0, 0.0, 0.0]
    # At temperature 1/2 the first has .66 of the mass and reaches .6; before the temperature .5 would not.
    assert draws([0.5, 0.3, 0.2], temperature=0.5, top_p=0.6) == [1.0, 0.0, 0.0]


def test_sampling_repeats_with_its_seed():
    model, prompts = make(scale=0.6, eos_token_ids=[]), [prompt(7, image=False)] * 2
    once, again, other = (
        answer(model, prompts, temperature=1.0, max_new_tokens=20, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert once == again != other


def test_the_end_token_is_yielded_and_ends_the_answer():
    model, ids = make(scale=0.6, eos_token_ids=[]), prompt(9, image=False)
    free = answer(model, [ids], max_new_tokens=10)[0]
    model.config.eos_token_ids = [free[4]]
    stop = free.index(free[4])
    assert list(generate(model, [ids], max_new_tokens=10)) == [[i] for i in free[: stop + 1]]
    assert answer(model, [ids], max_new_tokens=stop)[0] == free[:stop]  # "length": the end token is not among them


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_placeholder_is_never_generated(temperature):
    model = make(eos_token_ids=[])
    hook = model.language_model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([IMAGE]), 1e4)
    )
    assert logits_of(model, random_ids(1, 5)).argmax(-1).tolist() == [[IMAGE] * 5]
    generated = answer(model, [prompt(9, image=False)], temperature=temperature, max_new_tokens=20)[0]
    hook.remove()
    assert len(generated) == 20 and IMAGE not in generated


def test_a_prompt_that_fills_the_context_is_refused():
    model = make(eos_token_ids=[])
    assert len(answer(model, [prompt(63, image=False)], max_new_tokens=9)[0]) == 1  # one token of 64 is left
    for length in (64, 70):
        with pytest.raises(ValueError, match=rf"\b{length}\b.*\b64\b"):
            answer(model, [prompt(3, image=False), prompt(length, image=False)])


# ---------------------------------------------------------------------------------------------------------------------
# image tokens in the sequence


def test_image_tokens_replace_the_placeholders():
    model = make()
    input_ids = torch.tensor([prompt(12, 1), prompt(12, 2)])
    features = model.vision_features(random_images(2))
    x = model.embed(input_ids, features)
    text_tokens = model.language_model.model.embed_tokens(input_ids)
    assert torch.equal(x[:, 2:6], model.multi_modal_projector(features))
    assert torch.equal(x[:, :2], text_tokens[:, :2]) and torch.equal(x[:, 6:], text_tokens[:, 6:])


@pytest.mark.parametrize("placeholders, count", [(4, 2), (4, 0), (8, 1), (3, 1), (0, 1)])
def test_a_wrong_number_of_placeholders_is_refused(placeholders, count):
    model = make()
    input_ids = torch.tensor([[1] + [IMAGE] * placeholders + [5] * 4])
    features = model.vision_features(random_images(count)) if count else None
    with pytest.raises(ValueError, match=f"{placeholders} image tokens for {4 * count} "):
        model.embed(input_ids, features)


def test_a_wrong_image_size_is_refused():
    with pytest.raises(ValueError, match="8x8"):
        make().vision_features(torch.zeros(1, 3, 12, 12))


# ---------------------------------------------------------------------------------------------------------------------
# the loss


def test_loss_of_three_tokens():
    """An example from an article about LLaVA, which adds rounded terms: .51 + 1.20 + .69 = 2.40; exactly, 2.4079."""
    head = nn.Linear(2, 2, bias=False)
    nn.init.eye_(head.weight)
    p = torch.tensor([0.6, 0.3, 0.5])
    loss = summed_cross_entropy(head, torch.stack([p, 1 - p], dim=1).log(), torch.tensor([0, 0, 0])).item()
    assert loss == pytest.approx(-math.log(0.6 * 0.3 * 0.5), abs=1e-6)
    assert sum(round(-math.log(q), 2) for q in (0.6, 0.3, 0.5)) == pytest.approx(2.40)
    assert loss == pytest.approx(2.40, abs=0.01)


def batch_with_loss(model):
    input_ids = torch.tensor([prompt(14, 1), prompt(14, 2)])
    labels = input_ids.masked_fill(input_ids == IMAGE, IGNORE)
    labels[:, :7] = IGNORE
    labels[1, 11:] = IGNORE  # 7 and 4 supervised tokens
    return input_ids, labels, random_images(2)


def test_loss_is_the_sum_over_supervised_tokens():
    model = make()
    input_ids, labels, pixel_values = batch_with_loss(model)
    log_p = logits_of(model, input_ids, pixel_values).log_softmax(-1)
    want = -sum(log_p[row, t - 1, labels[row, t]] for row in range(2) for t in range(14) if labels[row, t] != IGNORE)
    loss = model(input_ids, labels, pixel_values)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert model(input_ids, labels, vision_features=model.vision_features(pixel_values)).item() == loss.item()
    alone = model(input_ids[:1], labels[:1], pixel_values[:1]) + model(
        input_ids[1:, :11], labels[1:, :11], pixel_values[1:]
    )
    assert alone.item() == pytest.approx(loss.item(), rel=1e-5)  # padding at the right changes nothing


@pytest.mark.parametrize("chunk", [1, 3, 10, 11])
def test_chunks_change_neither_loss_nor_gradients(monkeypatch, chunk):
    model = make("llama_tied")
    inputs = batch_with_loss(model)
    whole = model(*inputs)
    whole.backward()
    want = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(llava, "LOSS_CHUNK", chunk)
    loss = model(*inputs)
    loss.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert "multi_modal_projector.linear_1.weight" in want
    for name, parameter in model.named_parameters():
        if name in want:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-4)


def test_loss_without_supervised_tokens_is_zero_not_nan():
    model = make()
    input_ids, labels, pixel_values = batch_with_loss(model)
    loss = model(input_ids, torch.full_like(labels, IGNORE), pixel_values)
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        if "vision_tower" not in name:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_text_only_batch_gives_the_projector_gradients():
    model, ids = make(), random_ids(2, 9)
    want = logits_of(model, ids)
    model.train()
    assert torch.equal(logits_of(model, ids), want)
    model(ids, ids).backward()
    for parameter in model.multi_modal_projector.parameters():  # for a gradient of None, DDP would wait forever
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("image", [True, False])
def test_half_precision_arithmetic(image):
    """As in train.py: float32 weights, and bfloat16 arithmetic under autocast."""
    model = make().train()
    input_ids, labels, pixel_values = batch_with_loss(model)
    if not image:
        input_ids, pixel_values = input_ids.masked_fill(input_ids == IMAGE, 5), None
    want = model(input_ids, labels, pixel_values)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids, labels, pixel_values)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item(), rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def count(build):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


CLIP_L = CLIPVisionConfig(1024, 4096, 24, 16, 336, 14)


def test_tokens_of_an_image():
    assert CLIP_L.num_patches == (336 // 14) ** 2 == 576
    assert 5 * CLIP_L.num_patches == 2880  # LLaVA-1.6's whole image and its four tiles, without newlines


@pytest.mark.parametrize("width, linear, mlp", [
    (768, 787_200, 1_377_792), (896, 918_400, 1_722_112), (1024, 1_049_600, 2_099_200), (2048, 2_099_200, 6_295_552),
    (3584, 3_673_600, 16_522_240), (4096, 4_198_400, 20_979_712), (5120, 5_248_000, 31_467_520),
    (7168, 7_347_200, 58_734_592),
])  # fmt: skip
def test_projector_parameters(width, linear, mlp):
    for kind, parameters in (("linear", linear), ("mlp2x_gelu", mlp)):
        assert (
            count(lambda k=kind: Projector(LlavaConfig(TextConfig(hidden_size=width), CLIP_L, projector_type=k)))
            == parameters
        )


@pytest.mark.parametrize("values, parameters", [
    ({}, 6_738_415_616),
    ({"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
     13_015_864_320),
    ({"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}, 8_030_261_248),
    ({"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
      "vocab_size": 151936, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
     494_032_768),
    ({"model_type": "gpt2"}, 124_439_808),
    ({"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
], ids=["7b", "13b", "llama3_8b", "qwen2_0.5b", "gpt2", "gpt2_xl"])  # fmt: skip
def test_decoder_parameters(values, parameters):
    assert count(lambda: Llava(LlavaConfig(read_text_config(values)))) == parameters


def test_llava_parameters():
    assert count(lambda: Llava(LlavaConfig(TextConfig(), CLIP_L))) == 7_062_902_784


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("decoder_only", [False, True])
@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied", "qwen2", "gpt2"])
def test_save_and_load_is_bitwise(tmp_path, kind, decoder_only):
    model = make(kind, decoder_only, projector_type="linear", template="plain", eos_token_ids=[3, 4], pad_token_id=7)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config.text_config == model.config.text_config and again.config.eos_token_ids == [3, 4]
    assert (again.config.template, again.config.pad_token_id) == ("plain", 7) and not again.training
    if not decoder_only:
        assert again.config == model.config
    want, got = model.state_dict(), again.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    tied = again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight
    assert tied == model.config.text_config.tie_word_embeddings
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind, key", [
    ("llama", "multi_modal_projector.linear_1.bias"), ("llama", "language_model.lm_head.weight"),
    ("llama_tied", "language_model.model.embed_tokens.weight"),
])  # fmt: skip
@pytest.mark.parametrize("damage", ["missing", "expected", "should be"])
def test_tensors_that_differ_are_named(tmp_path, kind, key, damage):
    save_model(make(kind), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    if damage == "missing":
        del state[key]
    elif damage == "expected":
        key = f"{key}_2"
        state[key] = torch.zeros(2)
    else:
        state[key] = torch.zeros(2, 3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert key in message and damage in message and str(tmp_path) in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("keep", [0, 4, 100, -7])
def test_a_truncated_tensor_file_is_named(tmp_path, keep):
    save_model(make(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    save_model(make(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path)
    assert name in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"vision_config": {}}'])
def test_an_invalid_config_is_named(tmp_path, text):
    save_model(make(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path)
    assert "config.json" in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("change, word", [
    ({"model_type": "mamba"}, "mamba"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 5e5}}, "RoPE"),
    ({"hidden_act": "gelu"}, "gelu"),
])  # fmt: skip
def test_unsupported_settings_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        read_text_config(json.loads(json.dumps(SHAPE | change)))


def test_both_spellings_of_rope_theta():
    assert read_text_config({"rope_theta": 5e5}).rope_theta == 5e5
    assert read_text_config({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}).rope_theta == 5e5
    assert read_text_config({}).rope_theta == 1e4
