"""Triton kernels of k-means for any number of clusters and features: two passes over the data, or the second in L2."""

import torch
from torch import Tensor

from rsfast._dispatch import register
from rsfast._tiles import rows_apart
from rsfast.kmeans.kernels import onepass
from rsfast.kmeans.kernels.assign import nearest
from rsfast.kmeans.kernels.pairwise import distances
from rsfast.kmeans.kernels.update import update
from rsfast.kmeans.reference import Assignment, Step, Update

__all__ = ["kmeans_assign", "kmeans_distances", "kmeans_step", "kmeans_update"]


def _assign(x, centers, subsidies, exact):
    labels, distances, _ = nearest(x, centers, subsidies, exact, distances=True)
    return labels, distances


def _step(x, centers, weights, subsidies, exact):
    """In one pass where that kernel serves, else in two, with
    ``inertia = sum w ||x - m||^2 - 2 sum_k (c_k - m) . (S_k - n_k m) + sum_k n_k ||c_k - m||^2``."""
    if weights is None and onepass.serves(x, len(centers)):
        labels, sums, counts, energy = onepass.step(x, centers, subsidies, exact)
        c = centers.double()
        inertia = energy - 2 * (c * sums.double()).sum() + counts @ c.square().sum(1)
        return labels, sums, counts, inertia.clamp(min=0)
    labels, squares, ready = nearest(x, centers, subsidies, exact, distances=False)
    sums, counts = update(x, labels, len(centers), weights)
    squares = squares.double()
    energy = squares.sum() if weights is None else (squares * weights).sum()
    middle = ready.middle[: x.shape[1]].double()
    offsets = ready.given.double() - middle
    apart = sums.double() - counts[:, None] * middle
    inertia = energy / ready.scale.double().square() + (offsets * (counts[:, None] * offsets - 2 * apart)).sum()
    return labels, sums, counts, inertia.clamp(min=0)


def _fake_assign(x, centers, subsidies, exact):
    return x.new_empty(len(x), dtype=torch.int64), x.new_empty(len(x), dtype=torch.float32)


def _fake_update(x, labels, n_clusters, weights):
    return x.new_empty(n_clusters, x.shape[1], dtype=torch.float32), x.new_empty(n_clusters, dtype=torch.float64)


def _fake_step(x, centers, weights, subsidies, exact):
    labels = x.new_empty(len(x), dtype=torch.int64)
    return labels, *_fake_update(x, labels, len(centers), weights), x.new_empty((), dtype=torch.float64)


def _fake_distances(x, centers):
    return x.new_empty(len(x), len(centers), dtype=torch.float32)


_ASSIGN = register(
    "kmeans_assign(Tensor x, Tensor centers, Tensor? subsidies, bool exact) -> (Tensor, Tensor)", _assign, _fake_assign
)
_UPDATE = register(
    "kmeans_update(Tensor x, Tensor labels, int n_clusters, Tensor? weights) -> (Tensor, Tensor)", update, _fake_update
)
_STEP = register(
    "kmeans_step(Tensor x, Tensor centers, Tensor? weights, Tensor? subsidies, bool exact) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _step,
    _fake_step,
)
_DISTANCES = register("kmeans_distances(Tensor x, Tensor centers) -> Tensor", distances, _fake_distances)


def kmeans_assign(x: Tensor, centers: Tensor, subsidies: Tensor | None, exact: bool) -> Assignment:
    return Assignment(*_ASSIGN(rows_apart(x), centers, subsidies, exact))


def kmeans_update(x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None) -> Update:
    return Update(*_UPDATE(rows_apart(x), labels, n_clusters, weights))


def kmeans_step(x: Tensor, centers: Tensor, weights: Tensor | None, subsidies: Tensor | None, exact: bool) -> Step:
    return Step(*_STEP(rows_apart(x), centers, weights, subsidies, exact))


def kmeans_distances(x: Tensor, centers: Tensor) -> Tensor:
    return _DISTANCES(rows_apart(x), centers)
