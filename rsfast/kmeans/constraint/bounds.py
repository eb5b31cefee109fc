"""Bounds on cluster sizes: as they are asked for, and as two vectors that can be met."""

import math
from fractions import Fraction

import torch
from torch import Tensor

Size = int | Tensor | None


def size_bounds(
    n: int, n_clusters: int, *, size_min: Size = None, size_max: Size = None, rho: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Least and greatest number of points of every cluster.

    Args:
        n: Number of points N.
        n_clusters: Number of clusters K.
        size_min: At least so many points: one integer for all, or (K,) integers. None: 0.
        size_max: At most so many; None: N.
        rho: Balance: :math:`n_k \ge N / (K \rho)`, so at least the smallest integer that is no less. Read as the
            decimal that it prints as: 1.15 is 23/20. With ``size_min`` the greater of the two holds.

    Returns:
        ``(lower, upper)``, both (K,) int64 on the CPU, with ``0 <= lower <= upper <= N`` and
        ``sum(lower) <= N <= sum(upper)``, so that they can be met.

    Raises:
        ValueError: They cannot be met, or are no sizes; the message names the argument and states the bound.

    Source: the constraint on cluster sizes of debLoRA (arXiv 2410.04546).

    Example:
        >>> from rsfast.kmeans import size_bounds
        >>> size_bounds(10, 3, rho=1.25)
        (tensor([3, 3, 3]), tensor([10, 10, 10]))
    """
    if n < 0 or n_clusters < 1:
        raise ValueError(f"there must be at least 0 points and 1 cluster, got n={n} and n_clusters={n_clusters}")
    lower = _sizes("size_min", size_min, 0, n_clusters)
    upper = _sizes("size_max", size_max, n, n_clusters).clamp(max=n)
    if rho is not None:
        lower = lower.clamp(min=_share(n, n_clusters, rho))
    if (lower > upper).any():
        k = int((lower > upper).nonzero()[0])
        raise ValueError(
            f"size_min must be at most size_max and at most the number of points, {n}: cluster {k} is to have at least "
            f"{int(lower[k])} points and at most {int(upper[k])}"
        )
    if lower.sum() > n:
        raise ValueError(f"size_min asks for {int(lower.sum())} points in {n_clusters} clusters, but there are {n}")
    if upper.sum() < n:
        raise ValueError(f"size_max leaves room for {int(upper.sum())} points in {n_clusters} clusters; there are {n}")
    return lower, upper


def scaled_bounds(lower: Tensor, upper: Tensor, n: int, batch: int) -> tuple[Tensor, Tensor]:
    """Bounds for ``batch`` of the ``n`` points that ``lower`` and ``upper`` are for; they can be met if those can."""
    return lower * batch // n, -(-upper * batch // n)


def _share(n: int, n_clusters: int, rho: float) -> int:
    """The smallest integer of at least ``n / (n_clusters rho)``, if all clusters can have it."""
    if isinstance(rho, bool) or not isinstance(rho, int | float | Fraction) or not 0 < rho < math.inf:
        raise ValueError(f"rho must be a finite number above 0, got {rho!r}")
    exact = rho if isinstance(rho, Fraction) else Fraction(repr(rho))
    least = math.ceil(Fraction(n) / (n_clusters * exact))
    if least * n_clusters > n:
        most = n // n_clusters
        remedy = f"rho must be at least {Fraction(n, n_clusters * most)} here" if most else "no rho is possible here"
        raise ValueError(
            f"rho={rho} asks for at least N / (K rho) = {n} / ({n_clusters} * {rho}), so {least} points in each of "
            f"{n_clusters} clusters, {least * n_clusters} in all, but there are {n}: {remedy}"
        )
    return least


def _sizes(name: str, size: Size, default: int, n_clusters: int) -> Tensor:
    """(K,) int64 on the CPU."""
    if size is None:
        size = default
    if isinstance(size, int) and not isinstance(size, bool):
        sizes = torch.full((n_clusters,), size)
    elif isinstance(size, Tensor) and size.shape in ((), (n_clusters,)) and size.dtype in (torch.int32, torch.int64):
        sizes = size.cpu().long().expand(n_clusters)
    else:
        got = f"{size.dtype} of {tuple(size.shape)}" if isinstance(size, Tensor) else repr(size)
        raise ValueError(f"{name} must be an int or an integer tensor of shape ({n_clusters},), got {got}")
    if (sizes < 0).any():
        raise ValueError(f"{name} must be at least 0, got {int(sizes.min())}")
    return sizes
