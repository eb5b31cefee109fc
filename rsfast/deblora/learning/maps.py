"""Maps of stored features: what stands for LoRA in a backbone where only its features are at hand."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast import lora_expand, lora_shrink
from rsfast._dispatch import Impl, use_fused


class LowRankMap(nn.Module):
    r"""Low-rank residual map of features, :math:`g(z) = z + \frac{\alpha}{r} B A z`.

    What a LoRA does to a linear layer's output, done to the features of a frozen backbone; trained by
    :func:`rsfast.deblora.learn_towards` or :func:`rsfast.deblora.learn_classes`. ``lora_A`` starts as PEFT draws it,
    from PyTorch's global random state, and ``lora_B`` at zero, so that the map starts as the identity, bit for bit.

    Args:
        dim: Width D of the features.
        r: Rank.
        alpha: The adaptation is scaled by ``alpha / r``.
        num_adapters: With G above 1 there are G maps in one, ``lora_A (G, r, D)`` and ``lora_B (G, D, r)``, and the
            call takes ``adapter_ids``, as :func:`rsfast.batched_lora_linear` does; -1 leaves a row as it is.
        impl: As in :func:`rsfast.lora_linear`.

    Raises:
        ValueError: A number does not fit. In the call: features are not D wide, or ids are missing or out of range.

    Precision: parameters are fp32; features may be fp32, fp16 or bf16 and come back in their dtype. Under autocast the
    two products are in its dtype and the sum with ``z`` is in that of ``z``. Deterministic: yes.

    Example:
        >>> import torch
        >>> from rsfast.deblora import LowRankMap
        >>> z = torch.randn(5, 16)
        >>> torch.equal(LowRankMap(16, r=4)(z), z)
        True
    """

    def __init__(self, dim: int, r: int = 8, alpha: float = 8.0, *, num_adapters: int = 1, impl: Impl = "auto"):
        super().__init__()
        _check_sizes(dim=dim, r=r, num_adapters=num_adapters)
        _check_alpha(alpha)
        use_fused(impl, [])  # refuses an unknown impl
        self.dim, self.r, self.num_adapters, self.scaling, self.impl = dim, r, num_adapters, alpha / r, impl
        several = (num_adapters,) if num_adapters > 1 else ()
        self.lora_A, self.lora_B = _factors(dim, r, *several)

    def forward(self, z: Tensor, adapter_ids: Tensor | None = None) -> Tensor:
        _check_width(z, self.dim)
        if (adapter_ids is None) == (self.num_adapters > 1):
            raise ValueError(f"adapter_ids must be given if, and only if, there are several maps; {self.extra_repr()}")
        scaling = self.scaling
        if adapter_ids is not None:
            scaling = torch.full((self.num_adapters,), scaling, device=z.device)
        s = lora_shrink(z, self.lora_A, scaling, adapter_ids, impl=self.impl)
        return _plus(z, s, self.lora_B, adapter_ids, self.impl)

    def extra_repr(self) -> str:
        several = f", num_adapters={self.num_adapters}" if self.num_adapters > 1 else ""
        return f"dim={self.dim}, r={self.r}, scaling={self.scaling}{several}"


class FullMap(nn.Module):
    r"""Full-rank residual map of features, :math:`g(z) = z + W z + b`: what fine-tuning is to :class:`LowRankMap`.

    ``weight`` and ``bias`` start at zero, so that the map starts as the identity, and weight decay draws it there.

    Args:
        dim: Width D of the features.

    Raises:
        ValueError: ``dim`` does not fit, or in the call the width of the features.

    Example:
        >>> import torch
        >>> from rsfast.deblora import FullMap
        >>> z = torch.randn(5, 16)
        >>> torch.equal(FullMap(16)(z), z)
        True
    """

    def __init__(self, dim: int):
        super().__init__()
        _check_sizes(dim=dim)
        self.dim = dim
        self.weight = nn.Parameter(torch.zeros(dim, dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, z: Tensor) -> Tensor:
        _check_width(z, self.dim)
        return z + F.linear(z.to(self.weight.dtype), self.weight, self.bias).to(z.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class ClassMaps(nn.Module):
    r"""Class-wise LoRA (cLoRA) on features: a low-rank map :math:`g_c` for each class, and a head that weighs them.

    Every row goes through the maps of all classes, in training as in use: :math:`\mathrm{logit}_c = w_c \cdot g_c(z) +
    b_c`. To give a row the map of its true class in training would leak the label: a map could then mark its rows,
    and at test time, where there is no label, nothing would. For the same reason the feature that is probed or compared
    is a mean over the maps, by what the head believes: :math:`\sum_c p_c(z)\, g_c(z)`, ``p`` the softmax of the logits.

    Neither needs the C adapted copies of a row: with :math:`s_c = \frac{\alpha}{r} A_c z`, which for all classes is one
    product, the logits are :math:`w_c \cdot z + (B_c^\top w_c) \cdot s_c + b_c` and the feature :math:`z + \sum_c p_c
    B_c s_c`. :meth:`forward_all` makes the copies, through the batched kernel.

    Args:
        dim: Width D of the features.
        n_classes: C.
        r: Rank of each map.
        alpha: Each map is scaled by ``alpha / r``.
        impl: As in :func:`rsfast.lora_linear`; the kernels take a C r up to 256 for the logits and the feature.

    Raises:
        ValueError: A number does not fit, or in the call the width of the features.

    Precision: as :class:`LowRankMap`; the logits of 16-bit features are fp32. Deterministic: yes.

    Example:
        >>> import torch
        >>> from rsfast.deblora import ClassMaps
        >>> maps, z = ClassMaps(16, n_classes=3, r=4), torch.randn(5, 16)
        >>> maps(z).shape, maps.logits(z).shape, maps.forward_all(z).shape
        (torch.Size([5, 16]), torch.Size([5, 3]), torch.Size([5, 3, 16]))
    """

    def __init__(self, dim: int, n_classes: int, r: int = 8, alpha: float = 8.0, *, impl: Impl = "auto"):
        super().__init__()
        _check_sizes(dim=dim, n_classes=n_classes, r=r)
        _check_alpha(alpha)
        use_fused(impl, [])  # refuses an unknown impl
        self.dim, self.n_classes, self.r, self.scaling, self.impl = dim, n_classes, r, alpha / r, impl
        self.lora_A, self.lora_B = _factors(dim, r, n_classes)
        self.head = nn.Linear(dim, n_classes)

    def forward(self, z: Tensor) -> Tensor:
        """The feature of each row, ``(B, D)``."""
        s = self._shrink(z)
        belief = self._logits(z, s).softmax(-1)
        mixed = (belief[..., None].to(s.dtype) * s).flatten(-2)
        return _plus(z, mixed, self.lora_B.transpose(0, 1).flatten(1), None, self.impl)

    def logits(self, z: Tensor) -> Tensor:
        """What the head gives each class for its own map's feature, ``(B, C)``."""
        return self._logits(z, self._shrink(z))

    def forward_all(self, z: Tensor) -> Tensor:
        """Each row through the map of every class, ``(B, C, D)``, by the batched kernel."""
        _check_width(z, self.dim)
        every = z.unsqueeze(-2).expand(*z.shape[:-1], self.n_classes, self.dim)
        ids = torch.arange(self.n_classes, device=z.device).expand(every.shape[:-1]).contiguous()
        scaling = torch.full((self.n_classes,), self.scaling, device=z.device)
        s = lora_shrink(every, self.lora_A, scaling, ids, impl=self.impl)
        return _plus(every, s, self.lora_B, ids, self.impl)

    def _shrink(self, z: Tensor) -> Tensor:
        """``s (B, C, r)``: all maps take the same row, so that their factors are one of rank C r."""
        _check_width(z, self.dim)
        s = lora_shrink(z, self.lora_A.flatten(0, 1), self.scaling, impl=self.impl)
        return s.unflatten(-1, (self.n_classes, self.r))

    def _logits(self, z: Tensor, s: Tensor) -> Tensor:
        seen = torch.einsum("cd,cdr->cr", self.head.weight, self.lora_B)
        return self.head(z.to(self.head.weight.dtype)) + (s.to(seen.dtype) * seen).sum(-1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_classes={self.n_classes}, r={self.r}, scaling={self.scaling}"


def _factors(dim: int, r: int, *adapters: int) -> tuple[nn.Parameter, nn.Parameter]:
    A = nn.Parameter(torch.empty(*adapters, r, dim))
    nn.init.uniform_(A, -1 / math.sqrt(dim), 1 / math.sqrt(dim))
    return A, nn.Parameter(torch.zeros(*adapters, dim, r))


def _plus(z: Tensor, s: Tensor, lora_B: Tensor, adapter_ids: Tensor | None, impl: Impl) -> Tensor:
    """``z + B s`` in the dtype of ``z``, which autocast's ``s`` does not have."""
    if s.dtype == z.dtype:
        return lora_expand(s, lora_B, z, adapter_ids, impl=impl)
    return z + lora_expand(s, lora_B, None, adapter_ids, impl=impl)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def _check_alpha(alpha: float) -> None:
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a positive number, got {alpha!r}")


def _check_width(z: Tensor, dim: int) -> None:
    if z.shape[-1:] != (dim,) or not z.is_floating_point():
        raise ValueError(f"features must be floating point and {dim} wide, got {z.dtype} of shape {tuple(z.shape)}")
