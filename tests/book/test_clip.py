"""CLIP against transformers, where it is installed, and against numbers computed by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from clip import (
    CLIPMLP,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    clip_loss,
    normalize,
    preprocess,
    save_clip,
)
from data import image_pixels
from formats.configs import clip_config_from_dict

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 24,
    "patch_size": 8, "projection_dim": 16,
}  # fmt: skip
TEXT = {
    "vocab_size": 99, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 12, "projection_dim": 16,
}  # fmt: skip
CONFIG = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 16}


def noisy_image(width, height, seed=0):
    """A gradient with noise, so that the resize filter has to round, and to clamp at 0 and 255."""
    rng = np.random.default_rng([seed, width, height])
    ramp = np.linspace(0, 255, width)[None, :, None] * np.linspace(0, 1, height)[:, None, None]
    noise = rng.integers(-255, 256, (height, width, 3)) * rng.integers(0, 2, (height, 1, 1))
    return Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8))


def randomized(model):
    """Give every parameter a random value, norms and biases too: a forgotten bias of zero would go unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise if "norm" in name and "weight" in name else 0.2 * noise)
    return model.eval()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# against transformers


RANDOM_SIZES = [tuple(map(int, size)) for size in np.random.default_rng(1).integers(1, 500, (12, 2))]
SIZES = [
    (1, 1), (3, 2), (71, 73), (72, 72), (335, 337), (336, 336), (640, 427), (427, 640), (333, 1001), (200, 1),
    *RANDOM_SIZES,
]  # fmt: skip


@pytest.mark.parametrize("size", [72, 224, 336])
def test_preprocess_is_bit_equal(size):
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    for width, height in SIZES:
        image = noisy_image(width, height)
        want = processor(image, return_tensors="pt")["pixel_values"][0]
        got = preprocess(image, size)
        assert got.dtype == want.dtype and torch.equal(got, want), (width, height)


@pytest.mark.parametrize("size", [72, 336])
def test_padding_is_bit_equal(size):
    transformers = pytest.importorskip("transformers")
    square = {"height": size, "width": size}
    processor = transformers.LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": size}, crop_size=square)
    for width, height in SIZES:
        image = noisy_image(width, height)
        want = processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(image_pixels(image, size, "pad"), want), (width, height)


def test_every_byte_of_every_channel_is_bit_equal():
    """All 256 values in each channel, in a different order in each."""
    transformers = pytest.importorskip("transformers")
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([ramp, ramp.T, ramp[::-1]], axis=2))
    want = transformers.CLIPImageProcessorPil(do_resize=False, do_center_crop=False)(image, return_tensors="pt")
    assert torch.equal(normalize(image), want["pixel_values"][0])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our model, and transformers' model loaded from a file of our parameters."""
    transformers = pytest.importorskip("transformers")
    ours, folder = randomized(CLIPModel(clip_config_from_dict(CONFIG))), tmp_path_factory.mktemp("clip")
    # The end token has the highest id, as in CLIP's own vocabulary; transformers looks for the id, we for the maximum.
    text = TEXT | {"eos_token_id": TEXT["vocab_size"] - 1, "bos_token_id": 1, "pad_token_id": 0}
    transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=16).save_pretrained(folder)
    save_file(ours.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    theirs, report = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return ours, theirs.eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, 98, (5, 12), generator=generator)
    for row, end in enumerate((3, 11, 5, 7, 1)):
        input_ids[row, end] = 98
        input_ids[row, end + 1 :] = 98 if row == 2 else 0  # CLIP's own tokenizer pads with the end token
    return input_ids, torch.randn(5, 3, 24, 24, generator=generator)


@torch.no_grad()
def test_embeddings_logits_and_loss(both, batch):
    (ours, theirs), (input_ids, pixel_values) = both, batch
    want = theirs(input_ids=input_ids, pixel_values=pixel_values, return_loss=True)
    images, texts = ours(input_ids, pixel_values)
    close(images, want.image_embeds)
    close(texts, want.text_embeds)
    close(ours.logit_scale.exp() * images @ texts.T, want.logits_per_image)
    close(clip_loss(images, texts, ours.logit_scale), want.loss)


@torch.no_grad()
def test_saved_folder_loads_in_transformers(tmp_path, batch):
    """The end token's id is not CLIP's 49407 here, so config.json must tell transformers how to find it."""
    transformers = pytest.importorskip("transformers")
    ours = randomized(CLIPModel(clip_config_from_dict(CONFIG)))
    save_clip(ours, tmp_path)
    theirs, report = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    input_ids, pixel_values = batch
    want = theirs.eval()(input_ids=input_ids, pixel_values=pixel_values)
    images, texts = ours(input_ids, pixel_values)
    close(images, want.image_embeds)
    close(texts, want.text_embeds)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -1, 0, 1, 4])
def test_features_are_the_hidden_state(both, batch, layer):
    ours, theirs = both
    tower = CLIPVisionModel(ours.config.vision_config)
    tower.vision_model = ours.vision_model
    want = theirs.vision_model(pixel_values=batch[1], output_hidden_states=True).hidden_states[layer]
    close(tower(batch[1], layer), want[:, 1:])
    close(ours.vision_model.hidden_state(batch[1], layer), want)


# ---------------------------------------------------------------------------------------------------------------------
# the tower


@pytest.mark.parametrize("size, patches, parameters", [(336, 576, 303_507_456), (224, 256, 303_179_776)])
def test_parameter_count_of_vit_l_14(size, patches, parameters):
    config = CLIPVisionConfig(1024, 4096, 24, 16, size, 14, projection_dim=768)
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    assert config.num_patches == patches and sum(p.numel() for p in model.parameters()) == parameters


def test_parameter_count_of_both_towers():
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(CLIPVisionConfig(1024, 4096, 24, 16, 336, 14), text, projection_dim=768))
    count = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    want = {
        "text_model": 123_060_480,
        "text_projection": 589_824,
        "visual_projection": 786_432,
        "vision_model": 303_507_456,
    }
    assert count == want


@pytest.mark.parametrize("shape", [(1, 3, 24, 16), (1, 3, 32, 32), (1, 3, 16, 16)])
def test_a_wrong_image_size_is_refused(shape):
    with pytest.raises(ValueError, match="24x24"):
        CLIPVisionModel(CLIPVisionConfig(**VISION))(torch.zeros(shape))


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="quick_gelu"):
        CLIPVisionConfig(hidden_act="gelu")


def test_blocks_that_are_not_needed_are_not_run():
    tower = randomized(CLIPVisionModel(CLIPVisionConfig(**VISION)))
    want = tower(torch.ones(1, 3, 24, 24))
    tower.vision_model.encoder.layers[-1] = None
    assert torch.equal(tower(torch.ones(1, 3, 24, 24)), want) and want.shape == (1, 9, 32)


def test_quick_gelu_is_not_gelu():
    """They differ by 0.0203 at most, at +-2.27. With identity matrices the MLP computes the activation alone."""
    config = CLIPVisionConfig(hidden_size=1, intermediate_size=1, num_attention_heads=1)
    mlp = CLIPMLP(config)
    for linear in (mlp.fc1, mlp.fc2):
        torch.nn.init.ones_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    x = torch.linspace(-6, 6, 10_001)[:, None]
    difference = (mlp(x) - F.gelu(x)).abs().max().item()
    assert difference == pytest.approx(0.0203, abs=5e-5)


def test_tokens_after_the_end_token_change_nothing(batch):
    model = randomized(CLIPModel(clip_config_from_dict(CONFIG)))
    ids = batch[0][:1].clone()  # the end token is at position 3
    changed = ids.clone()
    changed[0, 4:] = 50
    assert torch.equal(model.text_model(ids), model.text_model(changed))


# ---------------------------------------------------------------------------------------------------------------------
# the loss


def test_loss_of_matched_pairs_goes_to_zero():
    vectors = torch.eye(6, 8)
    assert clip_loss(vectors, vectors, torch.tensor(math.log(100))).item() < 1e-6
    assert clip_loss(vectors, vectors.roll(1, 0), torch.tensor(math.log(100))).item() > 99  # and the reverse of it


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_loss_of_a_uniform_guess_is_log_of_the_batch(size):
    vectors = F.normalize(torch.ones(size, 4), dim=-1)
    assert clip_loss(vectors, vectors, torch.tensor(2.0)).item() == pytest.approx(math.log(size), abs=1e-6)


def test_loss_is_symmetric_and_equals_a_hand_computed_value():
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # scale 1; logits [[1, .6], [0, .8]]; the mean of -log softmax at the diagonal, over rows and over columns
    rows = (math.log(1 + math.exp(-0.4)) + math.log(1 + math.exp(-0.8))) / 2
    columns = (math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(-0.2))) / 2
    scale = torch.tensor(0.0)
    assert clip_loss(images, texts, scale).item() == pytest.approx((rows + columns) / 2, abs=1e-6)
    assert torch.equal(clip_loss(images, texts, scale), clip_loss(texts, images, scale))


def test_temperature_is_at_least_a_hundredth():
    images, texts = F.normalize(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    at_limit = clip_loss(images, texts, torch.tensor(math.log(100)))
    assert clip_loss(images, texts, torch.tensor(20.0)).item() == pytest.approx(at_limit.item(), rel=1e-6)
