"""The size-constrained assignment: contract, checks, choice of implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from rsfast import _extension
from rsfast._dispatch import Impl, use_fused
from rsfast.kmeans.constraint import library
from rsfast.kmeans.constraint.ascent import of_use
from rsfast.kmeans.constraint.bounds import Size, size_bounds
from rsfast.kmeans.constraint.finish import PLAIN, Way, finish
from rsfast.kmeans.constraint.fixed import as_gaps, spread_of
from rsfast.kmeans.functional.checks import check_numbers
from rsfast.kmeans.functional.plain import plain

ROUNDS = 16  # of the ascent; past these the few points that are left are moved one by one
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Constrained(NamedTuple):
    """Labels of least total cost among those whose cluster sizes lie within the bounds, and what proves it."""

    labels: Tensor  # (N,) int64
    subsidies: Tensor  # (K,) float64
    counts: Tensor  # (K,) int64


@plain
def constrained_assign(
    costs: Tensor,  # (N, K)
    size_min: Size,
    size_max: Size = None,
    *,
    subsidies: Tensor | None = None,  # (K,)
    impl: Impl = "auto",
) -> Constrained:
    r"""Labels of least total cost with every cluster's size within bounds: exact, not a heuristic.

    .. math:: \min_\ell \sum_i c_{i \ell_i} \quad \text{with} \quad m_k \le \#\{i : \ell_i = k\} \le u_k

    A transportation problem. Where the cheapest labels fit already, that is all. Elsewhere its dual is climbed by
    :func:`ascend`, and what is left moves along shortest paths between the K clusters.

    Args:
        costs: Finite fp32, fp64, fp16 or bf16, lower is better; any constant may be added to a row. Squared distances
            for k-means: :func:`rsfast.kmeans_distances`.
        size_min: Bounds m, an integer or (K,) integers; see :func:`size_bounds` for a balance ``rho``.
        size_max: Bounds u; None: no upper bound.
        subsidies: Where to start, such as those of the previous iteration: fewer rounds, the same cost.
        impl: ``auto`` takes the CUDA library for costs on a GPU where it can be had, and PyTorch and NumPy elsewhere,
            with the shortest paths of a library that was built at installation, which need no GPU; ``fused`` insists;
            ``reference`` is PyTorch and NumPy. They return the same, bit for bit.

    Returns:
        ``labels`` (N,) int64, ``subsidies`` (K,) float64 in the unit of the costs, ``counts`` (K,) int64. The subsidies
        prove the labels: every label is an :math:`\arg\min_k c_{ik} - s_k`, :math:`s_k > 0` only where
        :math:`n_k = m_k`, and :math:`s_k < 0` only where :math:`n_k = u_k`. All 0 where no bound was in the way.

    Raises:
        ValueError: A shape, dtype, device or value does not fit, or the bounds cannot be met; the message names the
            argument. Nothing is computed then.
        NotImplementedError: ``impl="fused"`` and the library cannot be had; every reason is listed.

    Precision: a cost's gap to the least of its row is rounded to :math:`2^{-50}` of the widest such gap (fewer bits
    above 511 clusters), after which every sum is exact. Deterministic: yes, bit for bit; among labels of equal cost a
    rule decides, by the lowest index of cluster, then of row. Waits for a GPU: once where nothing is in the way.
    Source: Bradley, Bennett, Demiriz, "Constrained k-means clustering", MSR-TR-2000-65.

    Example:
        >>> import torch
        >>> from rsfast.kmeans import constrained_assign
        >>> constrained_assign(torch.tensor([[0.0, 3.0], [0.0, 1.0], [0.0, 2.0]]), size_min=1).labels
        tensor([0, 1, 0])
    """
    _check_costs(costs)
    lower, upper = size_bounds(*costs.shape, size_min=size_min, size_max=size_max)
    check_numbers(costs, "subsidies", subsidies, costs.shape[1])
    fused = use_fused(impl, library.why_not(costs))
    labels = costs.argmin(1)
    counts, zeros = torch.bincount(labels, minlength=costs.shape[1]), costs.new_zeros(costs.shape[1]).double()
    if not len(costs):
        return Constrained(labels, zeros, counts)
    spread = spread_of(costs)
    *sizes, width = torch.cat([counts, spread.view(torch.int64)[None]]).cpu()
    _check_finite(costs, width.view(torch.float64))
    sizes = torch.stack(sizes)
    if ((lower <= sizes) & (sizes <= upper)).all():
        return Constrained(labels, zeros, counts)
    lower, upper = lower.to(costs.device), upper.to(costs.device)
    gaps = as_gaps(costs, spread)
    units = of_use(gaps.to_units(zeros if subsidies is None else subsidies), lower, upper, len(costs))
    way = _way(impl, fused, costs)
    units, labels = way.climb(gaps.units, units, lower, upper, ROUNDS)
    labels, units = finish(gaps.units, units, lower, upper, labels, way)
    return Constrained(labels, gaps.from_units(units), torch.bincount(labels, minlength=len(lower)))


@plain
def ascend(
    costs: Tensor,  # (N, K)
    subsidies: Tensor,  # (K,)
    lower: Tensor,  # (K,)
    upper: Tensor,  # (K,)
    *,
    rounds: int = 1,
    impl: Impl = "auto",
) -> Tensor:  # (K,)
    """Subsidies that bring sizes nearer to their bounds: some rounds of the dual of :func:`constrained_assign`.

    For a mini-batch: subsidies that persist from batch to batch, and are a bias of ``kmeans_step(..., subsidies=)``,
    steer sizes towards the bounds; the last labelling of all rows makes them exact.

    A round raises the subsidy of each cluster that is too small until the lower bound's worth of points prefer it, and
    lowers that of each cluster that is too large until the excess does not; neither goes past 0.

    Args:
        costs: As in :func:`constrained_assign`: those of the batch.
        subsidies: Where to start, in the unit of the costs.
        lower: Integers, bounds for this batch: :func:`scaled_bounds` of those for all rows.
        upper: As ``lower``.
        rounds: At most so many.
        impl: As in :func:`constrained_assign`.

    Returns:
        New subsidies, float64.

    Raises:
        ValueError: A shape, dtype, device or value does not fit, or the bounds cannot be met.
        NotImplementedError: ``impl="fused"`` and the library cannot be had; every reason is listed.

    Deterministic: yes, bit for bit.

    Example:
        >>> import torch
        >>> from rsfast.kmeans import ascend
        >>> ascend(torch.tensor([[0.0, 3.0], [0.0, 1.0]]), torch.zeros(2), torch.tensor([0, 1]), torch.tensor([2, 2]))
        tensor([0., 1.], dtype=torch.float64)
    """
    _check_costs(costs)
    check_numbers(costs, "subsidies", subsidies, costs.shape[1])
    lower, upper = size_bounds(*costs.shape, size_min=lower, size_max=upper)
    if not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"rounds must be an int of at least 0, got {rounds!r}")
    fused = use_fused(impl, library.why_not(costs))
    if not len(costs):
        return subsidies.double()
    spread = spread_of(costs)
    _check_finite(costs, spread)
    lower, upper = lower.to(costs.device), upper.to(costs.device)
    gaps = as_gaps(costs, spread)
    units = of_use(gaps.to_units(subsidies), lower, upper, len(costs))
    return gaps.from_units(_way(impl, fused, costs).climb(gaps.units, units, lower, upper, rounds)[0])


def _way(impl: Impl, fused: bool, costs: Tensor) -> Way:
    """Asked for right before its use, as that may build the library; where that fails, ``auto`` has another way."""
    if impl == "reference":
        return PLAIN
    return library.way(fused and (impl == "fused" or _extension.ready(costs.device)))


def _check_costs(costs: Tensor) -> None:
    if not isinstance(costs, Tensor) or costs.dim() != 2 or costs.dtype not in DTYPES or not costs.shape[1]:
        got = f"{costs.dtype} of {tuple(costs.shape)}" if isinstance(costs, Tensor) else type(costs).__name__
        raise ValueError(f"costs must be an (N, K) tensor of fp32, fp64, fp16 or bf16 with K >= 1, got {got}")


def _check_finite(costs: Tensor, spread: Tensor) -> None:
    """By the width of the widest row."""
    if spread < 2.0**1000:
        return
    bad = (~costs.isfinite()).any(1).nonzero()
    if len(bad):
        raise ValueError(f"costs must be finite, got NaN or infinity in row {int(bad[0])}")
    raise ValueError(f"costs must differ by less than 2^1000 within a row, got a difference of {spread.item()}")
