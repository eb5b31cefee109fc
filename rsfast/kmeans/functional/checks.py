"""What the operations of this family accept, said once."""

import math
from typing import Literal

import torch
from torch import Tensor

from rsfast._dispatch import why_not_triton

Precision = Literal["exact", "fast"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_rows(x: Tensor, name: str = "x") -> None:
    if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype not in DTYPES:
        got = f"{x.dtype} of {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be an (N, D) tensor of fp32, fp16, bf16 or fp64, got {got}")
    if not x.shape[1]:
        raise ValueError(f"{name} must have at least one feature, got shape {tuple(x.shape)}")


def check_centers(x: Tensor, centers: Tensor) -> None:
    check_rows(centers, "centers")
    if centers.shape[1] != x.shape[1] or not len(centers):
        raise ValueError(f"centers must have shape (K, {x.shape[1]}) with K >= 1, got {tuple(centers.shape)}")
    _check_beside(x, "centers", centers)


def check_numbers(x: Tensor, name: str, numbers: Tensor | None, count: int, least: float = -math.inf) -> None:
    """``numbers`` is None or ``count`` numbers on x's device; values are looked at where that makes nobody wait."""
    if numbers is None:
        return
    if not isinstance(numbers, Tensor) or numbers.shape != (count,) or not numbers.is_floating_point():
        got = f"{numbers.dtype} of {tuple(numbers.shape)}" if isinstance(numbers, Tensor) else type(numbers).__name__
        raise ValueError(f"{name} must be a floating point tensor of shape ({count},), got {got}")
    _check_beside(x, name, numbers)
    if _at_hand(numbers) and count:
        wrong = ~(numbers.isfinite() & (numbers >= least))
        if wrong.any():
            at = int(wrong.nonzero()[0])
            need = "finite" if least == -math.inf else f"finite and at least {least:g}"
            raise ValueError(f"{name} must be {need}, got {numbers[at].item()} at index {at}")


def check_count(name: str, count: int, at_most: float = math.inf) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= at_most:
        limit = "of at least 1" if at_most == math.inf else f"in 1..{at_most}"
        raise ValueError(f"{name} must be an int {limit}, got {count!r}")


def check_labels(x: Tensor, labels: Tensor, n_clusters: int) -> None:
    check_count("n_clusters", n_clusters)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (len(x),):
        got = f"{labels.dtype} of {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be an int64 tensor of shape ({len(x)},), got {got}")
    _check_beside(x, "labels", labels)
    if _at_hand(labels) and len(x) and (labels.min() < -1 or labels.max() >= n_clusters):
        raise ValueError(f"labels must lie in -1..{n_clusters - 1}, got {labels.min().item()}..{labels.max().item()}")


def check_precision(precision: Precision) -> bool:
    """Whether labels are to be certain."""
    if precision not in ("exact", "fast"):
        raise ValueError(f"precision must be 'exact' or 'fast', got {precision!r}")
    return precision == "exact"


def check_finite(x: Tensor, name: str = "x") -> None:
    """Refuse NaN and infinities by the index of their first row; a GPU is waited for."""
    rows = 2**26 // x.shape[1] if x.is_cuda else 2**20 // x.shape[1]
    for start in range(0, len(x), max(rows, 1)):
        part = x[start : start + max(rows, 1)]
        if not part.sum(dtype=torch.float64).isfinite():  # one pass; a sum of finite numbers is finite in float64
            bad = (~part.isfinite()).any(1).nonzero()
            if len(bad):
                raise ValueError(f"{name} must be finite, got NaN or infinity in row {start + int(bad[0])}")


def why_not_fused(x: Tensor) -> list[str]:
    """Reasons that no kernel of this family can run on ``x``."""
    reasons = why_not_triton(x)
    if x.dtype == torch.float64:
        reasons.append("x is float64, which has no kernel")
    return reasons


def _at_hand(t: Tensor) -> bool:
    """Whether values can be looked at: not those of a graph, nor on a GPU, which would have to be waited for."""
    return not (t.is_cuda or torch.compiler.is_compiling())


def _check_beside(x: Tensor, name: str, other: Tensor) -> None:
    if other.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, where x is, got {other.device}")
