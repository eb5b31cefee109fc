"""Whether a proof of least cost holds, looked at without what found it."""

import torch
from torch import Tensor

from rsfast.kmeans.constraint.fixed import chunks


def certify(
    costs: Tensor,  # (N, K)
    labels: Tensor,  # (N,)
    subsidies: Tensor,  # (K,)
    counts: Tensor,  # (K,)
    lower: Tensor,  # (K,)
    upper: Tensor,  # (K,)
) -> bool:
    r"""Whether ``subsidies`` prove ``labels`` to be of least cost among those within the bounds.

    Takes what :func:`constrained_assign` took and returned, and computes anew: sizes are those of the labels and lie
    within the bounds, every label is an :math:`\arg\min_k c_{ik} - s_k` but for rounding (:math:`2^{-40}` of the
    widest difference), and a subsidy is positive only at the lower bound, negative only at the upper one.

    Example:
        >>> import torch
        >>> from rsfast.kmeans import certify, constrained_assign, size_bounds
        >>> costs, bounds = torch.tensor([[0.0, 3.0], [0.0, 1.0]]), size_bounds(2, 2, rho=1.0)
        >>> certify(costs, *constrained_assign(costs, *bounds), *bounds)
        True
    """
    if not counts.equal(torch.bincount(labels, minlength=len(counts))):
        return False
    lower, upper = lower.to(counts.device), upper.to(counts.device)
    gap, most, least = subsidies.new_zeros(3).double().unbind()
    for number, points in enumerate(chunks(costs.shape[1], len(costs))):
        reduced = costs[points].double() - subsidies
        low, high = reduced.aminmax()
        least, most = (torch.minimum(least, low), torch.maximum(most, high)) if number else (low, high)
        gap = torch.maximum(gap, (reduced.gather(1, labels[points, None])[:, 0] - reduced.amin(1)).max())
    slack = ((subsidies <= 0) | (counts == lower)) & ((subsidies >= 0) | (counts == upper))
    within = (counts >= lower) & (counts <= upper)
    return bool((gap <= 2.0**-40 * (most - least)) & (slack & within).all())
