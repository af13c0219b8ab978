"""The maps of insight/ against transformers' own attention, autograd on it, and captum's ablation."""

import pytest
import torch
from test_llava import IMAGE, SHAPE, VISION, close, make, random_ids, random_images, randomized

from data import PreparedImage
from formats.saving import save_model
from insight.maps import (
    NEWLINE,
    Answer,
    Word,
    all_patches,
    attention_map,
    gradient_map,
    image_features,
    layer_attention,
    log_probabilities,
    logit_lens,
    occlusion_map,
    patch_numbers,
)
from llava import IGNORE, Llava, LlavaConfig, TextConfig
from lora import add_lora, merge

WORDS = [Word("one", [12]), Word("three", [14, 15, 16]), Word("last", [19])]


def make_answer(images=2):
    """20 ids with the placeholders of two images (4 tokens each) among the first ten."""
    ids = random_ids(20, seed=3).tolist()
    ids[1:5] = ids[6:10] = [IMAGE] * 4
    pixels = random_images(images)
    return Answer(ids, WORDS, [PreparedImage(pixels[i : i + 1], (8, 8), 4) for i in range(images)])


IMAGE_AT = [1, 2, 3, 4, 6, 7, 8, 9]


class Reference:
    """What transformers computes for an answer: attention weights in the graph, logits, and hidden states."""

    def __init__(self, model, answer, folder):
        transformers = pytest.importorskip("transformers")
        save_model(model, folder)
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
        pixels = torch.cat([image.pixels for image in answer.images])
        ids = torch.tensor([answer.ids])
        out = theirs(ids, pixel_values=pixels, output_attentions=True, output_hidden_states=True)
        self.attentions, self.logits, self.states = out.attentions, out.logits[0], out.hidden_states
        self.head, self.norm = theirs.lm_head, theirs.model.language_model.norm


class ReferenceGPT2(Reference):
    """GPT-2 inside a LLaVA is ours alone: transformers' GPT-2 reads the embeddings that our projector made."""

    def __init__(self, model, answer, folder):
        transformers = pytest.importorskip("transformers")
        decoder = Llava(LlavaConfig(model.config.text_config))
        decoder.language_model.load_state_dict(model.language_model.state_dict())
        save_model(decoder, folder)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            features = model.vision_features(torch.cat([image.pixels for image in answer.images]))
            x = model.embed(torch.tensor([answer.ids]), features)
        out = theirs(inputs_embeds=x.requires_grad_(), output_attentions=True, output_hidden_states=True)
        self.attentions, self.logits, self.states = out.attentions, out.logits[0], out.hidden_states
        self.head, self.norm = theirs.lm_head, theirs.transformer.ln_f


@pytest.fixture(params=["llama_gqa", "qwen2", "gpt2"], scope="module")
def pair(request, tmp_path_factory):
    """A random model, an answer, and transformers' computation on it."""
    model, answer = make(request.param, scale=0.4), make_answer()
    reference = ReferenceGPT2 if request.param == "gpt2" else Reference
    return model, answer, reference(model, answer, tmp_path_factory.mktemp("theirs"))


def test_attention_equals_transformers(pair):
    model, answer, theirs = pair
    layers, wanted = layer_attention(model, answer), torch.zeros(3, len(WORDS), len(IMAGE_AT))
    for layer, a in enumerate(theirs.attentions):
        for i, word in enumerate(WORDS):
            rows = [a[0, head, at - 1, IMAGE_AT].detach() for head in range(4) for at in word.positions]
            wanted[layer, i] = sum(rows) / len(rows)
    close(layers, wanted)
    close(attention_map(model, answer), wanted.mean(0))


def test_gradient_equals_autograd_on_transformers_attention(pair):
    """The whole matrix R, layer by layer as in the paper; ours multiplies one row of it."""
    model, answer, theirs = pair
    for row, word in zip(gradient_map(model, answer), WORDS):
        y = sum(theirs.logits[at - 1, answer.ids[at]] for at in word.positions)
        relevance = torch.eye(20)
        for a, gradient in zip(theirs.attentions, torch.autograd.grad(y, theirs.attentions, retain_graph=True)):
            relevance = relevance + (a * gradient).clamp(min=0)[0].mean(dim=0) @ relevance
        want = torch.stack([relevance[at - 1, IMAGE_AT] for at in word.positions]).mean(0).detach()
        assert want.max() > 1e-3
        close(row, want)


def test_lens_equals_transformers_hidden_states(pair):
    model, answer, theirs = pair
    ids, chances = logit_lens(model, answer)
    assert len(theirs.states) == len(ids) == 4
    for layer, state in enumerate(theirs.states):  # the last one is normalized already
        x = state[0, IMAGE_AT]
        want = theirs.head(x if layer == 3 else theirs.norm(x)).softmax(-1).max(-1)
        close(chances[layer], want.values.detach())
        assert torch.equal(ids[layer], want.indices)
    assert len(ids.unique()) > 4


def test_the_model_is_left_as_it_was(pair):
    model, answer, _ = pair
    features = image_features(model, answer)
    before = log_probabilities(model, answer, [features])
    gradient_map(model, answer)
    logit_lens(model, answer)
    assert (
        all(p.grad is None for p in model.parameters()) and not model.language_model.model.layers[0]._forward_pre_hooks
    )
    assert torch.equal(before, log_probabilities(model, answer, [features]))


# ---------------------------------------------------------------------------------------------------------------------
# occlusion


def ablate(model, answer, word, numbers):
    """captum's drop for each image token. What is ablated: minus the training loss on the word's tokens."""
    captum = pytest.importorskip("captum.attr")
    ids, sizes = torch.tensor([answer.ids]), [image.size for image in answer.images]
    labels = torch.tensor([[i if at in word.positions else IGNORE for at, i in enumerate(answer.ids)]])
    features = model.vision_features(torch.cat([image.pixels for image in answer.images])).detach()

    def log_probability(flat):
        return -model(ids, labels, vision_features=flat.view_as(features), image_sizes=sizes).detach()[None]

    mask = torch.arange(features[..., 0].numel()).view(1, *features.shape[:2], 1).expand(1, *features.shape)
    baseline = features.flatten(0, 1).mean(0).expand(1, *features.shape)
    drops = captum.FeatureAblation(log_probability).attribute(features[None], baseline, feature_mask=mask)
    return torch.tensor([0.0 if n == NEWLINE else drops[..., 0].flatten()[n] for n in numbers])


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_occlusion_equals_captum(kind):
    model, answer = make(kind, scale=0.4), make_answer()
    for row, word in zip(occlusion_map(model, answer), WORDS):
        want = ablate(model, answer, word, range(8))
        assert want.abs().max() > 0.01
        close(row, want)


# ---------------------------------------------------------------------------------------------------------------------
# tiles, adapters


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """A model with tiles of 8 x 8 pixels and two patches a side, and a wide image of two tiles under black bars."""
    pinpoints = [[8, 16], [16, 8], [16, 16]]
    config = LlavaConfig(TextConfig(**SHAPE), VISION, IMAGE, image_mode="anyres", image_grid_pinpoints=pinpoints)
    model = randomized(Llava(config), 0.4)
    pixels, size = random_images(5), (20, 40)
    model.config.image_grid_pinpoints = [[16, 16]]
    count = len(patch_numbers(size, model.config))
    ids = [5, *[IMAGE] * count, *random_ids(6).tolist()]
    return model, Answer(ids, [Word("a", [count + 3]), Word("b", [count + 5])], [PreparedImage(pixels, size, count)])


def test_tokens_of_tiles(tiled):
    """4 patches of the whole, then the two middle rows of the 4 x 4 patches, each with its newline token."""
    model, answer = tiled
    assert all_patches(answer, model.config) == [
        0, 1, 2, 3, 4 + 2, 4 + 3, 8 + 2, 8 + 3, NEWLINE, 12 + 0, 12 + 1, 16 + 0, 16 + 1, NEWLINE,
    ]  # fmt: skip


def test_occlusion_of_tiles_equals_captum(tiled):
    model, answer = tiled
    for row, word in zip(occlusion_map(model, answer), answer.words):
        close(row, ablate(model, answer, word, all_patches(answer, model.config)))


def test_attention_on_tiles_equals_transformers(tiled, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, answer = tiled
    save_model(model, tmp_path)
    theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    image = answer.images[0]
    inputs = {"pixel_values": image.pixels[None], "image_sizes": torch.tensor([image.size]), "output_attentions": True}
    with torch.no_grad():
        attentions = theirs(torch.tensor([answer.ids]), **inputs).attentions
    for row, word in zip(attention_map(model, answer), answer.words):
        close(row, torch.cat(attentions).mean((0, 1))[word.positions[0] - 1, 1 : 1 + image.tokens])


def test_an_adapter_counts_as_if_it_were_merged():
    model, answer = make(scale=0.4), make_answer()
    plain = attention_map(model, answer)
    add_lora(model, {"llm": 2, "vision": 2}, None, 0.1)
    randomized(model, 0.4)
    maps = [make_map(model, answer) for make_map in (attention_map, gradient_map, occlusion_map)]
    merge(model)
    for one, make_map in zip(maps, (attention_map, gradient_map, occlusion_map)):
        torch.testing.assert_close(one, make_map(model, answer), rtol=1e-4, atol=1e-5)
    assert (maps[0] - plain).abs().max() > 0.01
