"""Torchvision's window attention with LoRA in its projections: the classes that such attentions are swapped to."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

APART = -100.0  # what torchvision adds to scores of tokens that only the cyclic shift brought into one window


class LoRAWindowAttention(ShiftedWindowAttention):
    """Torchvision's attention of Swin, calling ``qkv`` and ``proj`` as layers; the original reads their weights."""

    def forward(self, x: Tensor) -> Tensor:
        return _attend(self, x)


class LoRAWindowAttentionV2(ShiftedWindowAttentionV2):
    """Torchvision's attention of Swin 2, scaled cosine without a bias of keys, calling both layers."""

    def forward(self, x: Tensor) -> Tensor:
        return _attend(self, x, self.logit_scale)


SWAPS = {ShiftedWindowAttention: LoRAWindowAttention, ShiftedWindowAttentionV2: LoRAWindowAttentionV2}


def _attend(attention: nn.Module, x: Tensor, logit_scale: Tensor | None = None) -> Tensor:
    """On (B, H, W, C). Both layers see whole images, where samples are the first axis, not windows."""
    (_, H, W, _), window, heads = x.shape, attention.window_size, attention.num_heads
    below, right = -H % window[0], -W % window[1]
    if below or right:  # before the projection: keys of padding are the bias
        x = F.pad(x, (0, 0, 0, right, 0, below))
    size = x.shape[1:3]
    shift = [0 if w >= n else s for w, n, s in zip(window, size, attention.shift_size, strict=True)]

    qkv = attention.qkv(x)
    q, k, v = _windows(_rolled(qkv, shift, -1).unflatten(-1, (3, heads, -1)), window).permute(2, 0, 3, 1, 4)
    mask, scale = attention.get_relative_position_bias(), None
    if logit_scale is not None:
        if attention.qkv.bias is not None:
            k = k - attention.qkv.bias.chunk(3)[1].view(heads, 1, -1).to(k.dtype)
        factor, scale = logit_scale.clamp(max=math.log(100.0)).exp(), 1.0
        q, k = F.normalize(q, dim=-1) * factor.to(q.dtype), F.normalize(k, dim=-1)
    if any(shift):
        mask = (mask + _apart(size, window, shift, x.device).to(mask.dtype)).repeat(len(x), 1, 1, 1)
    dropout_p = attention.attention_dropout if attention.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), dropout_p, scale=scale)

    rows, columns = (n // w for n, w in zip(size, window, strict=True))
    y = y.unflatten(0, (-1, rows, columns)).unflatten(4, tuple(window)).permute(0, 1, 4, 2, 5, 3, 6)
    y = _rolled(y.reshape(len(x), *size, -1), shift, 1)[:, :H, :W]
    return F.dropout(attention.proj(y.contiguous()), attention.dropout, attention.training)


def _rolled(x: Tensor, shift: list[int], sign: int) -> Tensor:
    return x.roll([sign * s for s in shift], (1, 2)) if any(shift) else x


def _windows(x: Tensor, window: list[int]) -> Tensor:
    """(B, H, W, ...) as (B times windows, tokens of a window, ...)."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)


def _apart(size: list[int], window: list[int], shift: list[int], device: torch.device) -> Tensor:
    """(windows, 1, tokens, tokens): what keeps tokens apart that were not neighbours before the shift."""
    regions = []
    for n, w, s in zip(size, window, shift, strict=True):
        at = torch.arange(n, device=device)
        regions.append((at >= n - w).long() + (at >= n - s).long())
    region = _windows((3 * regions[0][:, None] + regions[1])[None, ..., None], window)[..., 0]
    return APART * (region[:, None, :, None] != region[:, None, None, :])
