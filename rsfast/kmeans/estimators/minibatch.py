"""k-means on a few rows at a time: drawn from data at hand, or as they come."""

from typing import Any

import torch
from torch import Tensor

from rsfast._dispatch import Impl
from rsfast.kmeans.estimators.base import Estimator, plain
from rsfast.kmeans.estimators.inputs import rows, sample_weights, taken
from rsfast.kmeans.estimators.start import Start, check_int, check_real, tolerance
from rsfast.kmeans.functional import minibatch, minibatch_step
from rsfast.kmeans.functional.checks import Precision, check_precision
from rsfast.kmeans.functional.draws import child, seed_of, shuffled
from rsfast.kmeans.functional.loop import total


class MiniBatchKMeans(Estimator):
    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: Any = "auto",
        max_iter: int = 100,
        batch_size: int = 1024,
        tol: float = 0.0,
        max_no_improvement: int | None = 10,
        init_size: int | None = None,
        reassignment_ratio: float = 0.01,
        random_state: Any = None,
        size_min: Any = None,
        size_max: Any = None,
        rho: float | None = None,
        precision: Precision = "exact",
        impl: Impl = "auto",
    ):
        self.n_clusters, self.init, self.n_init, self.max_iter, self.tol = n_clusters, init, n_init, max_iter, tol
        self.batch_size, self.max_no_improvement, self.init_size = batch_size, max_no_improvement, init_size
        self.reassignment_ratio, self.random_state = reassignment_ratio, random_state
        self.size_min, self.size_max, self.rho = size_min, size_max, rho
        self.precision, self.impl = precision, impl

    @plain
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "MiniBatchKMeans":
        given = rows(X)
        x = given.tensor
        weights = sample_weights(sample_weight, x)
        self._check_parameters(x)
        batch_size, patience = min(self.batch_size, len(x)), self.max_no_improvement
        seed = seed_of(self.random_state)
        found = minibatch(
            x,
            self._start(x, weights, seed),
            batch_size=batch_size,
            max_steps=max(1, int(self.max_iter) * len(x) // batch_size),
            tol=tolerance(x, self.tol),
            max_no_improvement=None if patience is None else int(patience),
            reassignment_ratio=float(self.reassignment_ratio),
            weights=weights,
            seed=child(seed, 1),
            precision=self.precision,
            impl=self.impl,
        )
        steps = int(found.n_steps)
        self._finish(given, weights, found.centers, found.counts, steps)
        self.n_iter_, self._seed, self._since = -(-steps * batch_size // len(x)), seed, 0
        return self

    @plain
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "MiniBatchKMeans":
        given = rows(X)
        x = given.tensor
        weights = sample_weights(sample_weight, x)
        if hasattr(self, "cluster_centers_"):
            centers, counts = (taken(getattr(self, n), n).tensor.to(x.device) for n in ("cluster_centers_", "counts_"))
            self._check_width(x, centers.shape[1])
            seed, steps, since = self._seed, self.n_steps_, self._since
        else:
            self._check_parameters(x)
            seed, steps, since = seed_of(self.random_state), 0, 0
            centers = self._start(x, weights, seed).to(torch.promote_types(x.dtype, torch.float32))
            counts = torch.zeros(len(centers), dtype=torch.float64, device=x.device)
        since += len(x)
        due = since >= 10 * len(centers) or bool((counts == 0).any())
        step = minibatch_step(
            x,
            centers,
            counts,
            weights=weights,
            reassignment_ratio=due * check_real("reassignment_ratio", self.reassignment_ratio, 1),
            order=shuffled(child(seed, 2), steps, len(x), x.device) if due else None,
            precision=self.precision,
            impl=self.impl,
        )
        self._finish(given, weights, step.centers, step.counts, steps + 1)
        self._seed, self._since = seed, 0 if due else since
        return self

    def _check_parameters(self, x: Tensor) -> None:
        for name in ("n_clusters", "max_iter", "batch_size"):
            check_int(name, getattr(self, name))
        if self.max_no_improvement is not None:
            check_int("max_no_improvement", self.max_no_improvement, 0)
        if self.init_size is not None:
            check_int("init_size", self.init_size, self.n_clusters)
        check_real("tol", self.tol)
        check_real("reassignment_ratio", self.reassignment_ratio, 1)
        check_precision(self.precision)
        if len(x) < self.n_clusters:
            raise ValueError(f"n_samples={len(x)} should be >= n_clusters={self.n_clusters}.")

    def _start(self, x: Tensor, weights: Tensor | None, seed: int) -> Tensor:
        """The best of ``n_init`` starts from a part of the rows, measured on another part."""
        k, start, known = int(self.n_clusters), Start(self.init, self.n_clusters, x), None
        size = self.init_size or max(3 * self.batch_size, 3 * k)
        used = None if weights is None else weights > 0
        times = start.times(self.n_init, for_random=3)
        for number in range(times):
            some = shuffled(child(seed, 3), number, len(x), x.device, used)[:size]
            w = None if weights is None else weights[some]
            centers = start.draw(x[some], k, w, child(child(seed, 4), number), self.impl)
            if times == 1:
                return centers
            test = shuffled(child(seed, 5), 0, len(x), x.device, used)[:size]
            inertia = total(self._nearest(x[test], centers).distances, None if weights is None else weights[test])
            if known is None or inertia < known[0]:
                known = inertia, centers
        return known[1]

    def _finish(self, given, weights: Tensor | None, centers: Tensor, counts: Tensor, steps: int) -> None:
        labels, distances = self._nearest(given.tensor, centers)
        self.cluster_centers_, self.labels_, self.counts_ = map(given.back, (centers, labels, counts))
        self.inertia_ = float(total(distances, weights))
        self.n_steps_, self.n_features_in_ = steps, centers.shape[1]
