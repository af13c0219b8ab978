"""Attention whose kernel calls are faster on a CPU."""

import torch
import torch.nn.functional as F

from clip import CLIPAttention
from fast.linear import compute_dtype
from llava import Attention, apply_rope

SHORT = 320  # positions below which float32 is faster in training


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
    """scaled_dot_product_attention of q (B, H, T, D), k and v (B, KV, L, D): (B, H, T, D).

    In training, short rows are computed in float32 on a CPU: the backward pass of the 16-bit kernel takes longer.
    """
    dtype = compute_dtype(q)
    short = dtype.itemsize == 2 and k.shape[2] < SHORT and torch.is_grad_enabled()
    if q.device.type != "cpu" or not short:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(dtype)


class FastAttention(Attention):
    """llava.Attention, which calls attend()."""

    def forward(self, x, rope, mask, cache, slots):
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or KV, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = (stored.index_copy_(2, slots, new) for stored, new in zip(cache, (k, v)))
        y = attend(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class FastCLIPAttention(CLIPAttention):
    """clip.CLIPAttention, which calls attend()."""

    def forward(self, x, causal):
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = attend(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)
