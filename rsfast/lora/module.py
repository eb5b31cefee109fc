"""Linear layers with LoRA: drop-in for ``nn.Linear``, whose parameters they take over and freeze."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast._dispatch import Impl, use_fused
from rsfast.lora.functional import AdapterBatch, Source, batched_lora_linear, lora_linear
from rsfast.lora.functional.checks import check_slices


class _Adapted(nn.Linear):
    """An ``nn.Linear`` that shares the parameters of ``base``, frozen, and has factors beside them."""

    def __init__(self, base: nn.Linear, r: int, dropout: float, slices, impl: Impl):
        if not isinstance(base, nn.Linear) or isinstance(base, _Adapted):
            raise TypeError(f"base must be an nn.Linear without LoRA, got {type(base).__name__}")
        if type(r) is not int or r < 1:
            raise ValueError(f"r must be a positive integer, got {r!r}")
        if not isinstance(dropout, Real) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")
        if not isinstance(base._parameters.get("weight"), nn.Parameter) or nn.parameter.is_lazy(base.weight):
            raise TypeError(f"base must hold its weight as a parameter, but a {type(base).__name__} makes it otherwise")
        use_fused(impl, [])  # refuses an unknown impl
        nn.Module.__init__(self)  # nn.Linear's own would draw weights
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.r, self.dropout, self.impl = r, float(dropout), impl
        self.slices = check_slices(slices, base.out_features)
        self.train(base.training)

    def _make_factors(self, *adapters: int) -> None:
        """Last of all: what is refused leaves the base as it was."""
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        parts = 1 if self.slices is None else len(self.slices)
        outputs = self.out_features if self.slices is None else sum(end - start for start, end in self.slices)
        like = dict(device=self.weight.device, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(*adapters, parts * self.r, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(*adapters, outputs, self.r, **like))
        self.reset_lora()

    def reset_lora(self) -> None:
        """Start again: ``lora_A`` as PEFT draws it, ``lora_B`` zero, so that the layer computes what its base does."""
        nn.init.uniform_(self.lora_A, *(sign / math.sqrt(self.in_features) for sign in (-1, 1)))
        nn.init.zeros_(self.lora_B)

    def _options(self, x: Tensor) -> dict:
        dropout_p = self.dropout if self.training else 0.0
        return dict(dropout_p=dropout_p, slices=self.slices, source=Source.of(x), impl=self.impl)

    def extra_repr(self) -> str:
        slices = "" if self.slices is None else f", slices={self.slices}"
        return f"{super().extra_repr()}, r={self.r}, dropout={self.dropout}{slices}"


def _scalings(alphas: Sequence[float], ranks: Sequence[int]) -> list[float]:
    if not all(isinstance(alpha, Real) and math.isfinite(alpha) for alpha in alphas):
        raise ValueError(f"alpha must be finite numbers, got {', '.join(map(repr, alphas))}")
    return [float(alpha) / rank for alpha, rank in zip(alphas, ranks, strict=True)]


class LoRALinear(_Adapted):
    """Linear layer with low-rank adaptation, in place of ``base``, whose parameters it shares and freezes.

    Layer form of :func:`rsfast.lora_linear`, where the maths, precision and determinism are stated. It is an
    ``nn.Linear`` with ``weight`` and ``bias`` under their own names, so ``state_dict`` keys stay; ``lora_A`` and
    ``lora_B`` come beside them, in fp32 whatever 16-bit dtype the layer is in.

    Args:
        base: Layer of K inputs and N outputs.
        r: Rank; the kernels take 1 to 256.
        alpha: The adaptation is scaled by ``alpha / r``.
        dropout: Probability of dropping an element of the input of ``lora_A`` while training.
        slices: As in :func:`rsfast.lora_linear`.
        impl: As in :func:`rsfast.lora_linear`.

    Raises:
        TypeError: ``base`` is no ``nn.Linear``, or has LoRA already.
        ValueError: ``r``, ``dropout`` or ``slices`` does not fit.

    Example:
        >>> import torch, rsfast
        >>> layer = rsfast.LoRALinear(torch.nn.Linear(6, 4), r=2)
        >>> layer.lora_A.shape, layer.lora_B.shape, layer.weight.requires_grad
        (torch.Size([2, 6]), torch.Size([4, 2]), False)
    """

    def __init__(
        self, base: nn.Linear, r: int = 8, alpha: float = 8, dropout: float = 0.0, *,
        slices: Sequence[tuple[int, int]] | None = None, impl: Impl = "auto",
    ):  # fmt: skip
        super().__init__(base, r, dropout, slices, impl)
        (self.scaling,) = _scalings([alpha], [r])
        self._make_factors()
        self._unmerged: Tensor | None = None

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        return lora_linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, **self._options(x)
        )  # fmt: skip

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adaptation to ``weight``, for inference; a copy of the weight is kept until :meth:`unmerge`.

        In between ``state_dict`` holds the merged weight, and a weight that is loaded is gone after :meth:`unmerge`.

        Raises:
            ValueError: It is merged already.
        """
        if self.merged:
            raise ValueError("the layer is merged already")
        delta = lora_linear(
            torch.eye(self.in_features, dtype=self.lora_A.dtype, device=self.lora_A.device),
            self.lora_A.new_zeros(self.out_features, self.in_features), None, self.lora_A, self.lora_B, self.scaling,
            slices=self.slices, impl="reference",
        )  # fmt: skip
        merged = (self.weight + delta.T).to(self.weight.dtype)
        if not merged.isfinite().all():
            raise ValueError("the merged weight is not finite; nothing is merged")
        self._unmerged = self.weight.clone()
        self.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight back as it was, bit for bit.

        Raises:
            ValueError: It is not merged.
        """
        if not self.merged:
            raise ValueError("the layer is not merged")
        self.weight.copy_(self._unmerged)
        self._unmerged = None


class BatchedLoRALinear(_Adapted):
    """Linear layer with several LoRAs, of which each sample or token uses one; all train at once.

    Layer form of :func:`rsfast.batched_lora_linear`. The ids come with the call or, where the caller of the layer knows
    nothing of them, from ``adapter_ids``, which stays until it is set anew.

    Args:
        base: Layer of K inputs and N outputs, whose parameters are shared and frozen.
        num_adapters: How many, G.
        r: Rank of ``lora_A (G, r, K)`` and ``lora_B (G, N, r)``.
        alpha: One number, or one for each adapter; adapter g is scaled by ``alpha[g] / ranks[g]``.
        dropout: As in :class:`LoRALinear`.
        ranks: Of each adapter, at most ``r``, which is the default. The rows beyond are zero and stay zero.
        slices: As in :func:`rsfast.lora_linear`.
        impl: As in :func:`rsfast.lora_linear`.

    Raises:
        TypeError: As :class:`LoRALinear`.
        ValueError: A number does not fit, a rank is above ``r``, or an alpha or rank is missing.

    Example:
        >>> import torch, rsfast
        >>> layer = rsfast.BatchedLoRALinear(torch.nn.Linear(6, 4), num_adapters=3, r=4, ranks=(4, 2, 1))
        >>> layer(torch.randn(2, 5, 6), torch.tensor([2, -1])).shape
        torch.Size([2, 5, 4])
    """

    def __init__(
        self, base: nn.Linear, num_adapters: int, r: int = 8, alpha: float | Sequence[float] = 8,
        dropout: float = 0.0, *, ranks: Sequence[int] | None = None,
        slices: Sequence[tuple[int, int]] | None = None, impl: Impl = "auto",
    ):  # fmt: skip
        super().__init__(base, r, dropout, slices, impl)
        if type(num_adapters) is not int or num_adapters < 1:
            raise ValueError(f"num_adapters must be a positive integer, got {num_adapters!r}")
        self.num_adapters = num_adapters
        self.ranks = (r,) * num_adapters if ranks is None else tuple(ranks)
        alphas = tuple(alpha) if isinstance(alpha, Sequence) else (alpha,) * num_adapters
        for name, values in (("ranks", self.ranks), ("alpha", alphas)):
            if len(values) != num_adapters:
                raise ValueError(f"{name} must have {num_adapters} entries, one a adapter, got {len(values)}")
        if not all(type(rank) is int and 1 <= rank <= r for rank in self.ranks):
            raise ValueError(f"ranks must be integers from 1 to {r}, the rank of the bank, got {self.ranks}")
        scaling = _scalings(alphas, self.ranks)
        self.register_buffer("scaling", torch.tensor(scaling, dtype=torch.float32, device=self.weight.device), False)
        self.adapter_ids: AdapterBatch | None = None
        self._make_factors(num_adapters)

    def _apply(self, fn, recurse=True):
        scaling = self.scaling
        super()._apply(fn, recurse)
        if not scaling.is_meta:  # 16 bits would round it for good
            self.scaling = scaling.to(self.scaling.device)
        return self

    @torch.no_grad()
    def reset_lora(self) -> None:
        super().reset_lora()
        for A, rank in zip(self.lora_A, self.ranks, strict=True):
            A.view(-1, self.r, self.in_features)[:, rank:] = 0

    def forward(self, x: Tensor, adapter_ids: Tensor | AdapterBatch | None = None) -> Tensor:
        adapter_ids = self.adapter_ids if adapter_ids is None else adapter_ids
        if adapter_ids is None:
            raise ValueError("adapter_ids must be given with the call, or set beforehand: which adapter has a sample?")
        return batched_lora_linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, adapter_ids, **self._options(x)
        )

    def merge(self) -> None:
        """Raises:
        ValueError: Always: samples of other adapters share the weight.
        """
        raise ValueError(f"{self.num_adapters} adapters share the weight, so none of them can be merged into it")

    unmerge = merge
