"""The size constraint of an estimator."""

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsfast.kmeans.constraint import ascend, certify, constrained_assign, scaled_bounds, size_bounds
from rsfast.kmeans.functional import kmeans_distances

KEPT = 0.9  # of the subsidies from batch to batch: one batch's chance shortage is forgotten
ROUNDS = 2  # of the ascent for a batch
MANY = 2**20  # rows of a cluster of a stream whose end is not known


class Sizes:
    """Bounds on the numbers of rows of each cluster, and the subsidies that last met them."""

    def __init__(self, n: int, n_clusters: int, size_min: Any, size_max: Any, rho: float | None, impl: str):
        bounds = size_bounds(n, n_clusters, size_min=_size(size_min), size_max=_size(size_max), rho=rho)
        (self.lower, self.upper), self.n, self.impl = bounds, n, impl
        self.subsidies, self.certified = None, False

    @classmethod
    def of(cls, estimator: Any, n: int) -> "Sizes | None":
        """What an estimator asks for ``n`` rows; None if nothing."""
        asked = estimator.size_min, estimator.size_max, estimator.rho
        if all(size is None for size in asked):
            return None
        return cls(n, int(estimator.n_clusters), *asked, estimator.impl)

    @classmethod
    def of_stream(cls, estimator: Any, batch: int) -> "Sizes | None":
        """The share ``rho`` asks of a batch; sizes of a whole that has no end yet are refused."""
        if estimator.size_min is not None or estimator.size_max is not None:
            raise ValueError("size_min and size_max are for fit, which knows all rows; partial_fit takes rho")
        whole = cls.of(estimator, MANY * int(estimator.n_clusters))
        return whole and whole.scaled(batch)

    def scaled(self, batch: int) -> "Sizes":
        lower, upper = scaled_bounds(self.lower, self.upper, self.n, batch)
        return Sizes(batch, len(lower), lower, upper, None, self.impl)

    def label(self, x: Tensor, weights: Tensor | None, centers: Tensor) -> Tensor:
        """Labels of least weighted cost within the bounds; sizes count rows, whatever their weight."""
        costs = self._costs(x, centers, weights)
        found = constrained_assign(costs, self.lower, self.upper, subsidies=self.subsidies, impl=self.impl)
        self.subsidies = found.subsidies
        self.certified = certify(costs, *found, self.lower, self.upper)
        return found.labels

    def subsidise(self, batch: Tensor, centers: Tensor, subsidies: Tensor) -> Tensor:
        """For a mini-batch: towards the bounds, from what the last batches needed."""
        costs = self._costs(batch, centers, None)
        bounds = scaled_bounds(self.lower, self.upper, self.n, len(batch))
        self.subsidies = ascend(costs, KEPT * subsidies, *bounds, rounds=ROUNDS, impl=self.impl)
        return self.subsidies

    def _costs(self, x: Tensor, centers: Tensor, weights: Tensor | None) -> Tensor:
        costs = kmeans_distances(x, centers, impl=self.impl)
        return costs if weights is None else costs * weights[:, None]


def _size(size: Any) -> Any:
    """An int or a tensor, from NumPy too."""
    if size is None or isinstance(size, int | Tensor):
        return size
    try:
        return operator.index(size)
    except TypeError:
        return torch.as_tensor(np.asarray(size))
