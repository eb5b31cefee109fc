"""The seed repository's own rule for small clusters."""

import torch
from torch import Tensor

from rsfast.kmeans.functional.checks import check_finite, check_labels, check_rows


def dissolve(
    costs: Tensor,  # (N, K)
    labels: Tensor,  # (N,)
    *,
    size_min: int,
) -> Tensor:  # (N,)
    """Labels without small clusters: each of their points goes to its nearest large one.

    A heuristic, of the authors of debLoRA (``feat_cluster_nopca_cmin.py``, with 15 points); dissolved clusters are left
    empty. :func:`constrained_assign` keeps all K clusters at the least cost instead. Upstream counts a moved point out
    of the wrong cluster; here sizes are those of ``labels``, and a cluster that is large stays so.

    Args:
        costs: Squared distances, as in :func:`constrained_assign`.
        labels: int64 in 0..K-1.
        size_min: A cluster of so many points is large, one of fewer is dissolved.

    Returns:
        New labels, int64. Ties go to the lowest index.

    Raises:
        ValueError: A shape, dtype or device does not fit, or no cluster is large.

    Deterministic: yes.

    Example:
        >>> import torch
        >>> from rsfast.kmeans import dissolve
        >>> costs = torch.tensor([[0.0, 5.0, 9.0], [0.0, 5.0, 9.0], [4.0, 0.0, 3.0], [9.0, 5.0, 0.0], [9.0, 4.0, 1.0]])
        >>> dissolve(costs, torch.tensor([0, 0, 1, 2, 2]), size_min=2)
        tensor([0, 0, 2, 2, 2])
    """
    check_rows(costs, "costs")
    check_finite(costs, "costs")
    check_labels(costs, labels, costs.shape[1])
    if (labels < 0).any():
        raise ValueError(f"labels must lie in 0..{costs.shape[1] - 1}, got {labels.min().item()}")
    if not isinstance(size_min, int) or size_min < 0:
        raise ValueError(f"size_min must be an int of at least 0, got {size_min!r}")
    counts = torch.bincount(labels, minlength=costs.shape[1])
    small = counts < size_min
    if len(labels) and small.all():
        raise ValueError(
            f"size_min must be at most the size of the largest cluster, {int(counts.max())}, got {size_min}"
        )
    nearest = costs.masked_fill(small, torch.inf).argmin(1)
    return torch.where(small[labels], nearest, labels)
