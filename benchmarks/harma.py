"""HarMA's adapter as its authors' code computes it, written again from its definition: the baseline to beat.

Source: arXiv 2404.18253; upstream ``MMadapter``, ``BiShareAdapter`` and the blend that ends ``ResidualAttentionBlock``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rsfast


class _Attention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` over rows of the same tensor; with its defaults it also returns the weights."""

    def __init__(self, width: int, num_heads: int, need_weights: bool, batch_first: bool):
        super().__init__(width, num_heads, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=self.need_weights)[0]


class _Bottleneck(nn.Module):
    """Parameters of both adapters, filled from the tensors that :func:`rsfast.gated_adapter` takes."""

    def __init__(self, weights, num_heads: int, need_weights: bool, batch_first: bool):
        super().__init__()
        bottleneck, width = weights[0].shape
        self.down = nn.Linear(width, bottleneck)
        self.attention = _Attention(bottleneck, num_heads, need_weights, batch_first)
        self.up = nn.Linear(bottleneck, width)
        slots = (
            (self.down, "weight"), (self.down, "bias"),
            (self.attention, "in_proj_weight"), (self.attention, "in_proj_bias"),
            (self.attention.out_proj, "weight"), (self.attention.out_proj, "bias"),
            (self.up, "weight"), (self.up, "bias"), (self, "gate"),
        )  # fmt: skip
        for (module, name), weight in zip(slots, weights, strict=True):
            setattr(module, name, nn.Parameter(weight.detach().clone()))
        self.leaves = [getattr(module, name) for module, name in slots]


class _BiShare(_Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        p = self.down(x)
        attended = self.attention(p)
        F.gelu(p)  # upstream computes it and never uses it
        alpha = torch.sigmoid(self.gate)
        return self.up(alpha * attended + (1 - alpha) * p) + x


class HarmaAdapter(_Bottleneck):
    """The adapter and its block's gate, on ``(L, B, D)`` as upstream, or on ``(B, L, D)`` with ``batch_first``.

    Args:
        weights: Nine tensors as :func:`rsfast.gated_adapter` takes them; copied.
        residual_gate: Gate of the block.
        shared: Sub-adapter's tensors, or None.
        num_heads: Heads of the attention.
        shared_heads: Heads of the sub-adapter's attention.
        need_weights: True is upstream: ``nn.MultiheadAttention`` then writes out its softmax. False lets it use
            ``F.scaled_dot_product_attention``.
        batch_first: Order of the first two axes.
    """

    def __init__(
        self, weights, residual_gate, shared=None, *, num_heads=8, shared_heads=8, need_weights=True, batch_first=False
    ):
        super().__init__(weights, num_heads, need_weights, batch_first)
        self.share = None if shared is None else _BiShare(shared, shared_heads, need_weights, batch_first)
        self.residual_gate = nn.Parameter(residual_gate.detach().clone())
        self.leaves += [self.residual_gate, *([] if shared is None else self.share.leaves)]

    @classmethod
    def like(cls, adapter: "rsfast.GatedAdapter", **options) -> "HarmaAdapter":
        """Copy the weights of one of ours; a shared sub-adapter is copied too, so it is shared no more."""
        heads = {} if adapter.shared is None else {"shared_heads": adapter.shared.num_heads}
        shared = None if adapter.shared is None else adapter.shared.weights()
        return cls(adapter.weights(), adapter.residual_gate, shared, num_heads=adapter.num_heads, **heads, **options)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.down(x))
        z = self.attention(h)
        if self.share is not None:
            z = self.share(z)
        z = self.attention(z)
        alpha = torch.sigmoid(self.gate)
        adapted = x + self.up(alpha * h + (1 - alpha) * z)
        beta = torch.sigmoid(self.residual_gate)
        return beta * adapted + (1 - beta) * x
