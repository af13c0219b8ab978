"""CLIP, written out: an image and a text become two vectors, which are similar if the two belong together.

LLaVA uses only the vision transformer (ViT): the output of its block before the last, one feature for each patch. The
text tower and the contrastive loss are here because they train a vision tower (train.py --stage 0).

    image (3, 336, 336) --14 x 14 pixels a patch--> 576 patches --ViT, 23 of 24 blocks--> 576 features of width 1024

Sources: Radford et al. 2021 (arXiv 2103.00020), Dosovitskiy et al. 2020 (arXiv 2010.11929). Parameter names are those
of Hugging Face's CLIPModel files, including its spelling of `pre_layrnorm`. Shapes at the end of a line: B rows, T
tokens, P patches, C width, H heads, D width of a head, S pixels a side, E width of the vectors that are compared.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed.nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)  # of CLIP's training images, RGB in 0..1
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


@dataclass
class CLIPVisionConfig:
    """Shape of the vision tower. Defaults, for files that omit a field, are those of transformers' CLIPVisionConfig."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    model_type: str = "clip_vision_model"

    def __post_init__(self):
        if self.hidden_act != "quick_gelu":  # the exact GELU differs by up to 0.0203
            raise ValueError(f"hidden_act {self.hidden_act!r}: this is OpenAI's CLIP, whose activation is quick_gelu")
        if self.model_type != "clip_vision_model":
            raise ValueError(f"the vision tower is {self.model_type!r:.99}, not a clip_vision_model")
        if self.hidden_size % self.num_attention_heads or self.patch_size > self.image_size:
            raise ValueError("the vision tower's heads do not divide its width, or its patches exceed the image")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass
class CLIPTextConfig:
    """Shape of the text tower. Defaults are those of transformers' CLIPTextConfig."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    model_type: str = "clip_text_model"


@dataclass
class CLIPConfig:
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = math.log(1 / 0.07)  # the loss starts at a temperature of 0.07
    model_type: str = "clip"


# ---------------------------------------------------------------------------------------------------------------------
# the transformer that both towers share


class CLIPAttention(nn.Module):
    """Multi-head self-attention, every projection with a bias."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class CLIPMLP(nn.Module):
    """Two linear layers with quick_gelu between them: x * sigmoid(1.702 x), OpenAI's fast GELU."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class CLIPEncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """Holds the blocks, under the parameter names of the published files; the towers run them."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))


# ---------------------------------------------------------------------------------------------------------------------
# the vision tower


class CLIPVisionEmbeddings(nn.Module):
    """Embeds the patches, puts a class token in front of them and adds a learned position to each."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)  # a linear map of each patch
        self.position_embedding = nn.Embedding(config.num_patches + 1, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (B, P, C), row by row
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight  # (B, 1 + P, C)


class CLIPVisionTransformer(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.recompute = False  # in training, store each block's input only and run the block again in backward

    def blocks(self, layer: int) -> nn.ModuleList:
        """The blocks that compute hidden state `layer`, in Hugging Face's count.

        0 is the input of the first block, i the output of the i-th; -1 is the output of the last, -2 of the one before.
        """
        return self.encoder.layers[: layer if layer >= 0 else len(self.encoder.layers) + 1 + layer]

    def hidden_state(self, pixel_values: Tensor, layer: int = -1) -> Tensor:
        """Hidden state `layer`, (B, 1 + P, C): class token first, not normalized. Later blocks are not run.

        Args: pixel_values (B, 3, S, S), normalized by CLIP's mean and std; S must be the configured image size.
        """
        side = self.config.image_size
        if pixel_values.shape[-2:] != (side, side):
            raise ValueError(f"images are {tuple(pixel_values.shape[-2:])}, this tower takes {side}x{side}")
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        recompute = self.recompute and torch.is_grad_enabled()
        for block in self.blocks(layer):
            x = checkpoint(block, x, causal=False, use_reentrant=False) if recompute else block(x, causal=False)
        return x

    def forward(self, pixel_values: Tensor) -> Tensor:
        """One vector (B, C) for each image: the last block's class token, normalized."""
        return self.post_layernorm(self.hidden_state(pixel_values)[:, 0])


class CLIPVisionModel(nn.Module):
    """The vision tower inside a LLaVA; the extra level keeps the parameter names of the published files."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.vision_model = CLIPVisionTransformer(config)

    def forward(self, pixel_values: Tensor, layer: int = -2) -> Tensor:
        """Features of the patches (B, P, C): hidden state `layer` without its class token."""
        return self.vision_model.hidden_state(pixel_values, layer)[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# the text tower and the loss


class CLIPTextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]  # (B, T, C)


class CLIPTextTransformer(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """One vector (B, C) for each text: the state at its end token, which in CLIP's vocabulary has the highest id.

        Attention is causal, so the padding after the end token does not change its state.
        """
        x = self.embeddings(input_ids)
        for block in self.encoder.layers:
            x = block(x, causal=True)
        end = input_ids.argmax(dim=-1)
        return self.final_layer_norm(x)[torch.arange(len(x), device=x.device), end]


class CLIPModel(nn.Module):
    """Both towers, each followed by a linear map into the space where images and texts are compared."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.vision_model = CLIPVisionTransformer(config.vision_config)
        self.text_model = CLIPTextTransformer(config.text_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))  # log of 1 / temperature
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module):
        """OpenAI's initialization, simplified. The last matrix of each residual branch is smaller in deeper models."""
        branches = 2 * self.config.vision_config.num_hidden_layers
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, CLIPEncoderLayer):  # apply() visits children first, so this overwrites them
            for last in (module.self_attn.out_proj, module.mlp.fc2):
                nn.init.normal_(last.weight, std=(last.in_features * branches) ** -0.5)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, E) of the images and of the texts."""
        images = self.visual_projection(self.vision_model(pixel_values))
        texts = self.text_projection(self.text_model(input_ids))
        return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def clip_loss(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric contrastive loss (figure 3 of the paper): find the text of each image, and the image of each text.

    Under torch.distributed each rank compares its own rows with the rows of all ranks.

    Args: images, texts: unit vectors (B, E), which belong together row by row; logit_scale: log of 1 / temperature; a
    temperature below 0.01 counts as 0.01, as in the paper.
    """
    target = torch.arange(len(images), device=images.device)  # the text of image i is in column i
    all_images, all_texts = images, texts
    if torch.distributed.is_initialized():
        target = target + len(images) * torch.distributed.get_rank()
        all_images = torch.cat(torch.distributed.nn.all_gather(images))
        all_texts = torch.cat(torch.distributed.nn.all_gather(texts))
    scale = logit_scale.clamp(max=math.log(100)).exp()
    find_text = F.cross_entropy(scale * images @ all_texts.T, target)  # logits (B, B of all ranks)
    find_image = F.cross_entropy(scale * texts @ all_images.T, target)
    return (find_text + find_image) / 2


def save_clip(model: CLIPModel, folder: str | Path):
    """Write config.json and model.safetensors as transformers' CLIPModel loads them."""
    save_file(model.state_dict(), Path(folder, "model.safetensors"), metadata={"format": "pt"})
    values = {"architectures": ["CLIPModel"], **asdict(model.config)}
    values["text_config"]["eos_token_id"] = 2  # tells transformers to look for the highest id, as we do
    Path(folder, "config.json").write_text(json.dumps(values, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# preprocessing


def preprocess(image: Image.Image, size: int) -> Tensor:
    """CLIP's preprocessing of an RGB image: (3, size, size) float32, bit-equal to CLIPImageProcessor (PIL backend).

    Resize the shorter side to `size` (bicubic, in bytes), cut out the center, normalize.
    """
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    width, height = (size, longer) if width <= height else (longer, size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return normalize(resized.crop((left, top, left + size, top + size)))


def normalize(image: Image.Image) -> Tensor:
    """(value / 255 - MEAN) / STD of each byte of an RGB image: (3, H, W) float32."""
    pixels = (np.asarray(image) * (1 / 255)).astype(np.float32)  # via float64, as transformers does, for equal bits
    return torch.from_numpy(np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1)))
