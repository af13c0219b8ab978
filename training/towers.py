"""New models: towers small enough to train from scratch on a laptop, and a LLaVA assembled from a CLIP and a decoder.

Two initializations are not LLaVA's. Both were found on the embedded world: `whiten_patches`, `whiten_projector`.
"""

from pathlib import Path

import torch
from torch import nn

from clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, clip_loss
from data import CaptionPairs, Records
from formats.configs import read_vision_config
from formats.weights import grow_vocabulary, load_checkpoint, load_tower
from inputs.tokenizer import Tokenizer
from llava import IGNORE, Llava, LlavaConfig, TextConfig
from variants.connectors import add_whitening

# Shapes of towers trained from scratch; pretrained ones bring their own.
SIZES = {
    "tiny": {"width": 64, "heads": 2, "vision_layers": 2, "text_layers": 1, "decoder_layers": 2},
    "small": {"width": 128, "heads": 4, "vision_layers": 3, "text_layers": 1, "decoder_layers": 4},
    "medium": {"width": 192, "heads": 6, "vision_layers": 5, "text_layers": 2, "decoder_layers": 5},
}
POSITION_GAIN = 2  # scale of the feature directions that tell a patch's position, see whiten_projector


def new_clip(size: str, patch_size: int, vocab_size: int) -> CLIPModel:
    """Return a new CLIP for images of 72 x 72 pixels, in one of SIZES."""
    shape, width = SIZES[size], SIZES[size]["width"]
    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": shape["heads"]}
    shared["projection_dim"] = width
    vision = CLIPVisionConfig(image_size=72, patch_size=patch_size, num_hidden_layers=shape["vision_layers"], **shared)
    text = CLIPTextConfig(vocab_size=vocab_size, num_hidden_layers=shape["text_layers"], **shared)
    return CLIPModel(CLIPConfig(vision, text, projection_dim=width))


def new_decoder(size: str, tokenizer: Tokenizer, template: str) -> Llava:
    """Return a new LLaMA-style decoder in one of SIZES."""
    shape, width = SIZES[size], SIZES[size]["width"]
    inner = 8 * width // 3 // 16 * 16  # SwiGLU's three matrices: as many parameters as two of 4 * width
    options = {"max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    text = TextConfig(tokenizer.vocab_size, width, inner, shape["decoder_layers"], shape["heads"], **options)
    ids = {"image_token_index": tokenizer.image_id, "eos_token_ids": [tokenizer.eos_id]}
    return Llava(LlavaConfig(text, template=template, pad_token_id=tokenizer.pad_id, **ids))


class Contrastive(nn.Module):
    """CLIP with the interface of the training loop: forward returns the summed loss, one label for each pair."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip

    def forward(self, input_ids, labels, pixel_values, vision_features=None, image_sizes=None) -> torch.Tensor:
        return clip_loss(*self.clip(input_ids, pixel_values), self.clip.logit_scale) * (labels[:, 1:] != IGNORE).sum()


def half_whitening(variance: torch.Tensor) -> torch.Tensor:
    """Return the scale of each principal direction that turns its standard deviation into the square root of it."""
    return (variance + 1e-3 * variance.mean()) ** -0.25  # the floor: almost no variance must not be amplified


@torch.no_grad()
def whiten_patches(model: CLIPModel, dataset: CaptionPairs):
    """Initialize the patch embedding with half-whitened principal directions of patches, and larger positions.

    A random filter sees little more than a patch's mean color: after 300 steps a linear probe of the features reads
    43 % of the signs. With these filters it reads 73 % after 150 steps, both at a learning rate of 2e-3. Under full
    whitening, colors are learned too slowly.
    """
    embeddings, config = model.vision_model.embeddings, model.config.vision_config
    pixels = torch.stack([dataset[i]["pixel_values"][0] for i in range(min(len(dataset), 512))])
    patches = nn.functional.unfold(pixels, config.patch_size, stride=config.patch_size).transpose(1, 2)
    patches = patches.flatten(0, 1).double()  # (N, 3 * patch * patch)
    variance, directions = torch.linalg.eigh(torch.cov(patches.T))
    width = min(config.hidden_size, patches.shape[1])
    variance, directions = variance[-width:].clamp(min=0), directions[:, -width:]
    filters = (directions * half_whitening(variance)).T  # (width, 3 * patch * patch)
    embeddings.patch_embedding.weight[:width] = filters.view(width, 3, config.patch_size, config.patch_size).float()
    # Position embeddings on the scale of the patches: with the usual 0.02 a linear probe of the features reads an
    # object's position among nine in 33 % of the cases, with 0.5 in 98 %; 1.0 gives CLIP a lower loss.
    nn.init.normal_(embeddings.position_embedding.weight, std=1.0)
    bias = -filters @ patches.mean(0)  # centers the patches; the embedding itself has no bias
    embeddings.position_embedding.weight[1:, :width] += bias.float()


def assemble(vision: Path, llm: Path, projector: str, seed: int, tokens: int | None = None) -> tuple[Llava, Tokenizer]:
    """Return a new LLaVA from the folders of a CLIP and a decoder, and its tokenizer. Only its projector is untrained.

    The template is the decoder's own, or LLaVA-1.5's for a decoder without one. The vocabulary gets an image token if
    it has none, and is padded to a multiple of 64 as in transformers' converter.
    Args: projector, tokens: projector_type and visual_tokens of the LlavaConfig.
    """
    decoder, tokenizer = load_checkpoint(llm, "cpu", torch.float32)
    config = decoder.config
    config.vision_config = read_vision_config(vision)
    config.projector_type, config.visual_tokens = projector, tokens
    config.template = "vicuna_v1" if config.template == "raw" else config.template
    tokenizer.roles["image"], config.image_token_index = "<image>", tokenizer.add_special("<image>")
    config.pad_token_id = tokenizer.pad_id
    grow_vocabulary(decoder, tokenizer.vocab_size)
    torch.manual_seed(seed)
    model = Llava(config)
    model.language_model.load_state_dict(decoder.language_model.state_dict())
    load_tower(model, vision)
    return model, tokenizer


@torch.no_grad()
def whiten_projector(model: Llava, dataset: Records):
    """Put a linear map of the tower's features before the new projector: half whitening, with positions scaled up.

    In a small, young tower, colors hold 66 % of the variance between objects and positions 1.5 %, so stage 1 hardly
    learns positions. The map turns each direction's standard deviation into its square root. Then it scales the
    directions in which the patches' mean features (over all images) differ by POSITION_GAIN: they tell a patch's
    position. Colors then hold 32 %, positions 15 %. LLaVA does without. Measured on the first 512 images.

    The map becomes part of the projector's first matrix. A connector that does more than that with the features gets it
    as a layer of its own.
    """
    images, projector = dataset.load(dataset.images(512)), model.multi_modal_projector
    pixels = torch.cat([image.pixels for image in images.values()]).to(model.device)
    features = torch.cat([model.vision_features(part) for part in pixels.split(64)]).double()  # (N, P, C)
    mean = features.mean((0, 1))
    variance, directions = torch.linalg.eigh(torch.cov(features.flatten(0, 1).T))
    whitening = directions * half_whitening(variance) @ directions.T  # (C, C), symmetric
    positions = torch.linalg.svd((features.mean(0) - mean) @ whitening, full_matrices=False).Vh[:-1]  # (P - 1, C)
    lifted = whitening + (POSITION_GAIN - 1) * whitening @ positions.T @ positions  # row features @ lifted
    if not hasattr(projector, "linear_1"):
        model.config.whitening = True
        add_whitening(projector, model.config)
        projector.whitening.weight.copy_(torch.eye(len(mean)))
    layer = projector.linear_1 if hasattr(projector, "linear_1") else projector.whitening
    layer.weight.copy_(layer.weight.double() @ lifted.T)
    layer.bias.copy_(-layer.weight.double() @ mean)
