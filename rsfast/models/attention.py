"""What ``nn.MultiheadAttention`` computes between its projections, for projections that are not a weight alone."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def multihead_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    project: Callable[[Tensor, slice], Tensor],
    output: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor | None]:
    """``module(query, key, value, ...)``, with ``module``'s layout, masks, dropout and extra keys.

    ``project(x, columns)`` gives these of the 3 D columns of the in-projection, of which all are asked for at once
    where query, key and value are one tensor; ``output`` is the out-projection.
    """
    width, batched = module.embed_dim, query.ndim == 3
    if key.shape != value.shape or key.ndim != query.ndim or not 2 <= query.ndim <= 3 or query.shape[-1] != width:
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ValueError(f"query, key and value must be of width {width}, the last two of one shape, got {shapes}")
    if is_causal and attn_mask is None:
        raise ValueError("is_causal says what attn_mask is, so attn_mask must be given with it")
    if query is key and key is value:
        q, k, v = project(query, slice(0, 3 * width)).chunk(3, -1)
    elif key is value:
        q, (k, v) = project(query, slice(0, width)), project(key, slice(width, 3 * width)).chunk(2, -1)
    else:
        inputs = (query, key, value)
        q, k, v = (project(t, slice(j * width, (j + 1) * width)) for j, t in enumerate(inputs))
    if not batched:
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    elif not module.batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    q, k, v = (t.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2) for t in (q, k, v))
    causal = is_causal and key_padding_mask is None and not need_weights  # then the hint serves, without a mask
    mask = None if causal else _merged_mask(q, attn_mask, key_padding_mask)
    k, v, mask = _with_extra_keys(module, k, v, mask)

    dropout_p, weights = module.dropout if module.training else 0.0, None
    if need_weights:
        scores = q * module.head_dim**-0.5 @ k.mT
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout_p)
        o = weights.to(v.dtype) @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        o = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal)
    o = o.transpose(1, 2).flatten(2)
    if not batched:
        o, weights = o.squeeze(0), None if weights is None else weights.squeeze(0)
    elif not module.batch_first:
        o = o.transpose(0, 1)
    return output(o), weights


def _merged_mask(q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """What is added to the scores ``(B, heads, L, S)``; where a mask of bools is True, minus infinity."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, q.shape[:2]))
    if key_padding_mask is not None:
        masks.append(torch.atleast_2d(key_padding_mask)[:, None, None])
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
