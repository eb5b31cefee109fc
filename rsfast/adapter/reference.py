"""HarMA's multimodal gated adapter (arXiv 2404.18253; upstream ``MMadapter``, ``BiShareAdapter``) in plain PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SharedWeights(NamedTuple):
    """Parameters of the sub-adapter that two towers may own together; S = R // 2."""

    down_weight: Tensor  # (S, R)
    down_bias: Tensor  # (S,)
    in_proj_weight: Tensor  # (3S, S)
    in_proj_bias: Tensor  # (3S,)
    out_proj_weight: Tensor  # (S, S)
    out_proj_bias: Tensor  # (S,)
    up_weight: Tensor  # (R, S)
    up_bias: Tensor  # (R,)
    gate: Tensor  # ()


def _attention(x, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, num_heads, mask):
    """Self-attention over the tokens of each sample, as ``nn.MultiheadAttention`` without dropout."""
    qkv = F.linear(x, in_proj_weight, in_proj_bias).unflatten(-1, (3, num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, R / H)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.linear(o.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)


def _shared_adapter(x, weights, num_heads, mask):
    """x + W_2 (a MHA(p) + (1 - a) p) + b_2,  p = W_1 x + b_1,  a = sigmoid(gate)."""
    p = F.linear(x, weights.down_weight, weights.down_bias)
    a = torch.sigmoid(weights.gate)
    z = a * _attention(p, *weights[2:6], num_heads, mask) + (1 - a) * p
    return x + F.linear(z, weights.up_weight, weights.up_bias)


def gated_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    gate: Tensor,
    residual_gate: Tensor | None = None,
    *,
    shared: SharedWeights | None = None,
    lengths: Tensor | None = None,
    num_heads: int = 8,
    shared_heads: int | None = None,
) -> Tensor:
    """The maths of :func:`rsfast.gated_adapter`; products are taken in the dtype of the weights."""
    mask = valid = None
    if lengths is not None:
        position = torch.arange(x.shape[1], device=x.device)
        valid = position < lengths[:, None]  # (B, L)
        mask = (position < lengths.clamp(min=1)[:, None])[:, None, None]  # one key at least, so no row is empty
    attention = (in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, num_heads, mask)

    h = F.gelu(F.linear(x.to(down_weight.dtype), down_weight, down_bias))
    z = _attention(h, *attention)
    if shared is not None:
        z = _shared_adapter(z, shared, shared_heads or num_heads, mask)
    z = _attention(z, *attention)  # the same weights again
    a = torch.sigmoid(gate)
    y = F.linear(a * h + (1 - a) * z, up_weight, up_bias)
    if residual_gate is not None:
        y = torch.sigmoid(residual_gate) * y
    y = (x + y).to(x.dtype)
    return y if valid is None else torch.where(valid[..., None], y, x)
