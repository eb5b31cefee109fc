"""What ``nn.MultiheadAttention`` computes between its projections, for projections that are not a weight alone."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project(
    query: Tensor, key: Tensor, value: Tensor, width: int, columns: Callable[[Tensor, int, int], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, of which what shares an input shares a product.

    ``columns(x, first, last)`` gives these of the 3 ``width`` columns of the in-projection of ``x``.
    """
    if query is key and key is value:
        return columns(query, 0, 3 * width).chunk(3, -1)
    if key is value:
        return columns(query, 0, width), *columns(key, width, 3 * width).chunk(2, -1)
    return tuple(columns(x, j * width, (j + 1) * width) for j, x in enumerate((query, key, value)))


def attend(
    module: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What goes into ``module.out_proj``, and the weights of attention; layout, masks and results are PyTorch's."""
    single, heads = q.ndim == 2, (module.num_heads, module.head_dim)
    if is_causal and attn_mask is None:
        raise ValueError("attn_mask must be given with is_causal=True, which only says what kind of mask it is")
    if k.shape != v.shape or k.ndim != q.ndim:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"query, key and value must go together, the last two of one shape, got {shapes} projected")
    if single:
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    elif not module.batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    q, k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in (q, k, v))
    causal = is_causal and key_padding_mask is None and not need_weights  # then the hint serves, without a mask
    mask = None if causal else _merged(q, k, attn_mask, key_padding_mask)
    k, v, mask = _with_extra_keys(module, k, v, mask)

    dropout_p, weights = module.dropout if module.training else 0.0, None
    if need_weights:
        scores = q * module.head_dim**-0.5 @ k.mT
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout_p)
        x = weights.to(v.dtype) @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights[0] if single else weights
    else:
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal)
    x = x.transpose(1, 2).flatten(2)
    return x[0] if single else x if module.batch_first else x.transpose(0, 1), weights


def _merged(q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """Both masks together, to be added to the scores (N, heads, L, S); where one of bools is True, minus infinity."""
    (N, heads, L, _), S, masks = q.shape, k.shape[2], []
    if attn_mask is not None:
        if attn_mask.shape not in ((L, S), (N * heads, L, S)):
            expected = f"({L}, {S}) or ({N * heads}, {L}, {S})"
            raise ValueError(f"attn_mask must have shape {expected}, got {tuple(attn_mask.shape)}")
        masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (N, heads)))
    if key_padding_mask is not None:
        if key_padding_mask.shape not in ((N, S), (S,) if N == 1 else (N, S)):
            raise ValueError(f"key_padding_mask must have shape ({N}, {S}), got {tuple(key_padding_mask.shape)}")
        masks.append(key_padding_mask.view(N, 1, 1, S))
    for j, mask in enumerate(masks):
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
        masks[j] = mask.to(q.dtype)
    return sum(masks[1:], masks[0]) if masks else None


def _with_extra_keys(module: nn.MultiheadAttention, k: Tensor, v: Tensor, mask: Tensor | None):
    """The learned key and value (``add_bias_kv``) and the zero ones (``add_zero_attn``), which no mask hides."""
    if module.bias_k is not None:
        heads = (module.num_heads, module.head_dim)
        k, v = (
            torch.cat([t, b.to(t.dtype).view(1, *heads, 1).mT.expand(len(t), -1, -1, -1)], 2)
            for t, b in ((k, module.bias_k), (v, module.bias_v))
        )
        mask = None if mask is None else F.pad(mask, (0, 1))
    if module.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        mask = None if mask is None else F.pad(mask, (0, 1))
    return k, v, mask
