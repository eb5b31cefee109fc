"""k-means on all rows at once."""

from typing import Any

from rsfast._dispatch import Impl
from rsfast.kmeans.estimators.base import Estimator, plain
from rsfast.kmeans.estimators.inputs import rows, sample_weights
from rsfast.kmeans.estimators.start import Start, check_int, check_real, tolerance
from rsfast.kmeans.functional import lloyd
from rsfast.kmeans.functional.checks import Precision, check_precision
from rsfast.kmeans.functional.draws import child, seed_of


class KMeans(Estimator):
    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: Any = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: Any = None,
        size_min: Any = None,
        size_max: Any = None,
        rho: float | None = None,
        precision: Precision = "exact",
        impl: Impl = "auto",
    ):
        self.n_clusters, self.init, self.n_init, self.max_iter, self.tol = n_clusters, init, n_init, max_iter, tol
        self.random_state, self.size_min, self.size_max, self.rho = random_state, size_min, size_max, rho
        self.precision, self.impl = precision, impl

    @plain
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "KMeans":
        given = rows(X)
        x = given.tensor
        weights = sample_weights(sample_weight, x)
        k, max_iter = check_int("n_clusters", self.n_clusters), check_int("max_iter", self.max_iter)
        if len(x) < k:
            raise ValueError(f"n_samples={len(x)} should be >= n_clusters={k}.")
        check_precision(self.precision)
        tol = tolerance(x, check_real("tol", self.tol))
        start, seed = Start(self.init, k, x), seed_of(self.random_state)
        best = None
        for number in range(start.times(self.n_init, for_random=10)):
            centers = start.draw(x, k, weights, child(seed, number), self.impl)
            found = lloyd(
                x, centers, max_iter=max_iter, tol=tol, weights=weights, precision=self.precision, impl=self.impl
            )
            if best is None or found.inertia < best.inertia:
                best = found
        self._warn_of_missing(best.labels)
        self.cluster_centers_, self.labels_, self.counts_ = map(given.back, (best.centers, best.labels, best.counts))
        self.inertia_, self.n_iter_, self.n_features_in_ = float(best.inertia), int(best.n_iter), x.shape[1]
        return self
