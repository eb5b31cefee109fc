"""The operations of k-means as rows of a table: they have no gradients, and what they return is not one tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import rsfast

ONE_PASS = {f"rsfast::kmeans_{name}" for name in ("onepass", "lloyd", "minibatch")}  # see test_kmeans_onepass.py


class Data(NamedTuple):
    x: Tensor  # (N, D)
    centers: Tensor  # (K, D)
    labels: Tensor  # (N,), a fifth of them -1
    weights: Tensor  # (N,), a fifth of them 0
    subsidies: Tensor  # (K,)


def data(shape, dtype, device, spread=1.0, offset=0.0) -> Data:
    """Rows around some of the centres, of which the second is the first again; ``shape`` is (N, D, K)."""
    n, d, k = shape
    g = torch.Generator().manual_seed(n + d + k)
    centers = spread * torch.randn(k, d, generator=g)
    x = torch.randn(n, d, generator=g) + centers[torch.randint(k, (n,), generator=g)]
    centers = centers + 0.5 * torch.randn(k, d, generator=g)
    centers[1:2] = centers[0]
    labels, weights = torch.randint(k, (n,), generator=g), torch.rand(n, generator=g)
    labels[::5], weights[1::5] = -1, 0
    moved = ((t + offset).to(device, kind) for t, kind in ((x, dtype), (centers, torch.float32)))
    return Data(*moved, labels.to(device), weights.to(device), torch.randn(k, generator=g).to(device))


@dataclass(frozen=True)
class KMeansCase:
    name: str
    public: Callable
    pack: Callable  # Data -> (args, kwargs)
    small: tuple  # shapes for tests: both sides of a choice of kernels, ragged, one centre, as many as rows
    ahead: tuple  # for compiling ahead of time; larger ones run the same kernels
    tiny: tuple = (9, 5, 3)
    large = ()  # timed elsewhere
    enough = 2**40

    def __str__(self):
        return self.name

    def call(self, given: Data, **options):
        args, kwargs = self.pack(given)
        return self.public(*args, **kwargs, **options)

    def has_kernel(self) -> bool:
        return True


NEAR = ((40, 20, 5), (33, 130, 1), (70, 70, 70), (1, 8, 1), (0, 5, 3), (19, 66, 300))
SUMS = ((40, 20, 5), (33, 130, 1), (100, 70, 129), (0, 5, 3), (0, 5, 300), (1100, 24, 257))
CASES = (
    KMeansCase("assign", rsfast.kmeans_assign, lambda d: ((d.x, d.centers), {}), NEAR, ((512, 1024, 1024),)),
    KMeansCase(
        "assign_subsidies", rsfast.kmeans_assign, lambda d: ((d.x, d.centers), {"subsidies": d.subsidies}),
        NEAR[2:3] + NEAR[-1:], (),
    ),
    KMeansCase(
        "update", rsfast.kmeans_update, lambda d: ((d.x, d.labels, len(d.centers)), {}),
        SUMS, ((4096, 1024, 1024),),
    ),
    KMeansCase(
        "update_weights", rsfast.kmeans_update, lambda d: ((d.x, d.labels, len(d.centers)), {"weights": d.weights}),
        SUMS, (),
    ),
    KMeansCase("step", rsfast.kmeans_step, lambda d: ((d.x, d.centers), {}), NEAR[:3], ()),
    KMeansCase(
        "step_all", rsfast.kmeans_step,
        lambda d: ((d.x, d.centers), {"weights": d.weights, "subsidies": d.subsidies}),
        NEAR[:3], ((4096, 1024, 32),),
    ),
    KMeansCase("distances", rsfast.kmeans_distances, lambda d: ((d.x, d.centers), {}), NEAR, ((512, 1024, 64),)),
)  # fmt: skip
