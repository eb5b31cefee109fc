"""The gated adapter and the sub-adapter that two towers may own together, as layers."""

import torch
from torch import Tensor, nn

from rsfast._dispatch import Impl
from rsfast.adapter.functional import SharedWeights, gated_adapter


class _Bottleneck(nn.Module):
    """Parameters that both adapters have: down, attention, up, gate."""

    def __init__(self, width: int, bottleneck: int, num_heads: int, gate_init: float):
        super().__init__()
        if bottleneck < 1 or num_heads < 1 or bottleneck % num_heads:
            raise ValueError(f"num_heads must divide the bottleneck of {bottleneck}, got {num_heads}")
        self.width, self.bottleneck, self.num_heads = width, bottleneck, num_heads
        self.down = nn.Linear(width, bottleneck)
        self.in_proj = nn.Linear(bottleneck, 3 * bottleneck)
        self.out_proj = nn.Linear(bottleneck, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.gate = nn.Parameter(torch.tensor(float(gate_init)))
        self._gate_init = float(gate_init)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: ``down`` as ``nn.Linear``, attention as ``nn.MultiheadAttention``, ``up`` zero."""
        self.down.reset_parameters()
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        self.out_proj.reset_parameters()
        nn.init.zeros_(self.out_proj.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        nn.init.constant_(self.gate, self._gate_init)

    def weights(self) -> tuple[Tensor, ...]:
        """The parameters in the order in which :func:`rsfast.gated_adapter` takes them."""
        layers = (self.down, self.in_proj, self.out_proj, self.up)
        return (*(t for layer in layers for t in (layer.weight, layer.bias)), self.gate)

    def extra_repr(self) -> str:
        return f"width={self.width}, bottleneck={self.bottleneck}, num_heads={self.num_heads}"


class SharedAdapter(_Bottleneck):
    """Sub-adapter between the two attentions of a :class:`GatedAdapter`; one may serve several adapters.

    It holds parameters and is computed inside the adapters that own it, so it has no ``forward``.

    Args:
        bottleneck: Bottleneck R of the adapters it serves; even. Its own hidden width is R // 2.
        num_heads: Heads of its attention; divides R // 2.

    Raises:
        ValueError: ``bottleneck`` is odd, or ``num_heads`` does not divide its half.

    Source: HarMA, arXiv 2404.18253; upstream ``BiShareAdapter``, whose GELU is overwritten before use and left out.

    Example:
        >>> import rsfast
        >>> shared = rsfast.SharedAdapter(64)
        >>> image, text = (rsfast.GatedAdapter(width, 64, shared=shared) for width in (96, 48))
        >>> image.shared is text.shared
        True
    """

    def __init__(self, bottleneck: int = 128, num_heads: int = 8):
        if bottleneck % 2:
            raise ValueError(f"bottleneck must be even, got {bottleneck}")
        super().__init__(bottleneck, bottleneck // 2, num_heads, gate_init=0.6)

    def weights(self) -> SharedWeights:
        return SharedWeights(*super().weights())


class GatedAdapter(_Bottleneck):
    """HarMA's multimodal gated adapter: ``y = x + sigmoid(residual_gate) * (W_u h + b_u)``.

    Layer form of :func:`rsfast.gated_adapter`, where the maths, precision and determinism are stated.

    Args:
        width: Features D of a token.
        bottleneck: Inner width R; even with ``shared``. The kernels take 32 to 256.
        num_heads: Heads of the attention; divides ``bottleneck``.
        shared: Sub-adapter of the same bottleneck, or None. The same object may be given to several adapters.
        gate_init: Start of both gates, before the sigmoid.
        residual_gate: Whether the contribution is scaled by a learned gate of the block.
        impl: As in :func:`rsfast.gated_adapter`.

    Raises:
        ValueError: ``num_heads`` does not divide ``bottleneck``, or ``shared`` has another bottleneck.

    Example:
        >>> import torch, rsfast
        >>> adapter = rsfast.GatedAdapter(96, bottleneck=64)
        >>> adapter(torch.randn(2, 7, 96), lengths=torch.tensor([7, 3])).shape
        torch.Size([2, 7, 96])
    """

    def __init__(
        self,
        width: int,
        bottleneck: int = 128,
        num_heads: int = 8,
        *,
        shared: SharedAdapter | None = None,
        gate_init: float = 0.6,
        residual_gate: bool = True,
        impl: Impl = "auto",
    ):
        if shared is not None and shared.width != bottleneck:
            raise ValueError(f"shared must have a bottleneck of {bottleneck}, as the adapter, got {shared.width}")
        super().__init__(width, bottleneck, num_heads, gate_init)
        self.residual_gate = nn.Parameter(torch.tensor(float(gate_init))) if residual_gate else None
        self.shared = shared
        self.impl = impl

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if getattr(self, "residual_gate", None) is not None:
            nn.init.constant_(self.residual_gate, self._gate_init)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Adapt ``x (B, L, D)``; tokens at or after ``lengths (B,)`` take no part and pass through."""
        shared = self.shared
        return gated_adapter(
            x,
            *self.weights(),
            self.residual_gate,
            shared=None if shared is None else shared.weights(),
            lengths=lengths,
            num_heads=self.num_heads,
            shared_heads=None if shared is None else shared.num_heads,
            impl=self.impl,
        )
