"""Attention with LoRA in its projections: the classes that a model's attentions are swapped to, and their layers."""

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention
from torch import Tensor, nn

from rsfast import BatchedLoRALinear, LoRALinear, batched_lora_linear, lora_linear
from rsfast.models.attention import attend, project


class _Projection:
    """A projection whose weight and bias stay bare parameters of its attention; the factors are its own."""

    def __init__(self, attention: nn.Module, name: str, rows: slice, *args, **options):
        weight = getattr(attention, name)
        base = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        base.weight = weight
        super().__init__(base, *args, **options)
        del self.weight, self.bias  # of the base; from here on the properties below find the attention's
        self._attention, self._name, self._rows = (attention,), name, rows  # in a tuple it is no submodule
        if attention.in_proj_bias is not None:
            attention.in_proj_bias.requires_grad_(False)

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self._attention[0], self._name)

    @property
    def bias(self) -> Tensor | None:
        bias = self._attention[0].in_proj_bias
        return None if bias is None else bias[self._rows]

    def columns(self, x: Tensor, first: int, last: int) -> Tensor:
        """Columns ``first`` to ``last`` of the layer's output, at the price of these alone."""
        if last - first == self.out_features:
            return self(x)
        weight, bias = self.weight[first:last], None if self.bias is None else self.bias[first:last]
        A, B, slices, row = [], [], [], 0
        for number, (start, end) in enumerate(self.slices or ((0, self.out_features),)):
            low, high = max(start, first), min(end, last)
            if low < high:
                A.append(self.lora_A[..., number * self.r : (number + 1) * self.r, :])
                B.append(self.lora_B[..., row + low - start : row + high - start, :])
                slices.append((low - first, high - first))
            row += end - start
        if not slices:
            return F.linear(x, weight, bias)
        return self._adapted(x, weight, bias, torch.cat(A, -2), torch.cat(B, -2), tuple(slices))


class Projection(_Projection, LoRALinear):
    """:class:`rsfast.LoRALinear` for a projection that its attention keeps as a bare parameter."""

    def _adapted(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, slices
    ) -> Tensor:
        if self.merged:
            return F.linear(x, weight, bias)
        options = {**self._options(x), "slices": slices}
        return lora_linear(x, weight, bias, lora_A, lora_B, self.scaling, **options)


class BatchedProjection(_Projection, BatchedLoRALinear):
    """:class:`rsfast.BatchedLoRALinear` for a projection that its attention keeps as a bare parameter."""

    def _adapted(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, slices
    ) -> Tensor:
        if self.adapter_ids is None:
            return self(x)  # refuses
        options = {**self._options(x), "slices": slices}
        return batched_lora_linear(x, weight, bias, lora_A, lora_B, self.scaling, self.adapter_ids, **options)


def _project(attention: nn.Module, q_x: Tensor, k_x: Tensor, v_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v; what shares an input shares a product."""
    if attention.in_proj_weight is None:
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        named = zip(("q_proj", "k_proj", "v_proj"), (q_x, k_x, v_x), biases, strict=True)
        return tuple(
            getattr(attention, name)(x)
            if hasattr(attention, name)
            else F.linear(x, getattr(attention, f"{name}_weight"), bias)
            for name, x, bias in named
        )
    width = attention.in_proj_weight.shape[0] // 3
    columns = attention.in_proj.columns if hasattr(attention, "in_proj") else lambda *args: _columns(attention, *args)
    return project(q_x, k_x, v_x, width, columns)


def _columns(attention: nn.Module, x: Tensor, first: int, last: int) -> Tensor:
    bias = attention.in_proj_bias
    return F.linear(x, attention.in_proj_weight[first:last], None if bias is None else bias[first:last])


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, L, D) as (N, heads, L, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _added(mask: Tensor | None, dtype: torch.dtype, *, true_is_masked: bool) -> Tensor | None:
    """A mask as what is added to the scores."""
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask.to(dtype)
    masked = mask if true_is_masked else ~mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(masked, float("-inf"))


class LoRAMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that calls its projections as layers, so that their LoRA takes part.

    Its in-projection is the child ``in_proj`` (``q_proj``, ``k_proj``, ``v_proj`` where keys or values have a width of
    their own); ``in_proj_weight`` and ``out_proj.weight`` keep their names. Arguments, masks, results are PyTorch's.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        q, k, v = _project(self, query, key, value)
        x, weights = attend(self, q, k, v, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return self.out_proj(x), weights


class LoRAAttention(Attention):
    """open_clip 3's own attention, that of its custom blocks, calling its in-projection as the layer ``in_proj``."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return _attend(self, x, x, x, attn_mask, true_is_masked=True)


class LoRACrossAttention(Attention):
    """The attention of open_clip's main branch, calling its projections as layers; a bool mask says what to keep."""

    def forward(
        self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        k_x, v_x = (x if other is None else other for other in (k_x, v_x))
        return _attend(self, x, k_x, v_x, attn_mask, true_is_masked=False)


def _attend(attention: nn.Module, q_x: Tensor, k_x: Tensor, v_x: Tensor, mask: Tensor | None, **meaning) -> Tensor:
    q, k, v = (_heads(x, attention.num_heads) for x in _project(attention, q_x, k_x, v_x))
    mask, scale = _added(mask, q.dtype, **meaning), None
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, attention.num_heads))
    if attention.logit_scale is not None:  # scaled cosine: unit vectors, and a learned scale a head
        scale = 1.0
        q = F.normalize(q, dim=-1) * attention.logit_scale.clamp(max=attention.logit_scale_max).exp().to(q.dtype)
        k = F.normalize(k, dim=-1)
    else:
        q, k = attention.ln_q(q), attention.ln_k(k)
    dropout_p = attention.attn_drop.p if attention.training else 0.0
    x = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)
    if attention.head_scale is not None:
        x = x * attention.head_scale
    x = attention.ln_inner(x.transpose(1, 2).flatten(2))
    return attention.out_drop(attention.out_proj(x))
