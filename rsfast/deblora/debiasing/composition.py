"""Which cluster holds how many rows of which class."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsfast.deblora.arrays import as_integers


def class_cluster_counts(
    labels: Any,  # (N,)
    assignments: Any,  # (N,)
    n_classes: int | None = None,
    n_clusters: int | None = None,
) -> Any:  # (C, K)
    """Rows of every class in every cluster: :math:`n_{kc}` of debLoRA, (C, K) int64.

    Args:
        labels: Classes, integers of at least 0.
        assignments: Clusters, -1 for noise, which counts nowhere.
        n_classes: C. None: the greatest label and one.
        n_clusters: K. None: the greatest assignment and one.

    Returns:
        A tensor if ``assignments`` are one, else NumPy.

    Raises:
        ValueError: Lengths differ, or a value lies outside; the message names the argument and the index.

    Example:
        >>> from rsfast.deblora import class_cluster_counts
        >>> class_cluster_counts([0, 0, 1, 1], [0, 1, 1, -1])
        array([[1, 1],
               [0, 1]])
    """
    found = counts_of(*checked(labels, assignments, n_classes, n_clusters))
    return found if isinstance(assignments, Tensor) else found.numpy(force=True)


def classes_of_noise(labels: Any, assignments: Any, n_classes: int | None = None) -> list[int]:
    """Classes that have rows, all of them noise: no cluster says anything of these.

    Arguments and errors are those of :func:`class_cluster_counts`.

    Example:
        >>> from rsfast.deblora import classes_of_noise
        >>> classes_of_noise([0, 0, 1, 1, 3], [0, -1, -1, -1, -1])
        [1, 3]
    """
    labels, assignments, n_classes, k = checked(labels, assignments, n_classes, None)
    rows = torch.bincount(labels, minlength=n_classes)
    return ((rows > 0) & (counts_of(labels, assignments, n_classes, k).sum(1) == 0)).nonzero()[:, 0].tolist()


def checked(labels, assignments, n_classes, n_clusters) -> tuple[Tensor, Tensor, int, int]:
    """Labels and assignments as int64 on the assignments' device, C and K."""
    count = len(assignments) if hasattr(assignments, "__len__") else np.size(assignments)
    assignments = as_integers(assignments, "assignments", count, least=-1, most=_last(n_clusters))
    labels = as_integers(labels, "labels", count, most=_last(n_classes)).to(assignments.device)
    n_classes = _number(labels) if n_classes is None else n_classes
    return labels, assignments, n_classes, _number(assignments) if n_clusters is None else n_clusters


def counts_of(labels: Tensor, assignments: Tensor, n_classes: int, n_clusters: int) -> Tensor:
    known = assignments >= 0
    cells = labels[known] * n_clusters + assignments[known]
    return torch.bincount(cells, minlength=n_classes * n_clusters).view(n_classes, n_clusters)


def _last(count: int | None) -> int | None:
    return None if count is None else count - 1


def _number(values: Tensor) -> int:
    return int(values.max()) + 1 if len(values) else 0
