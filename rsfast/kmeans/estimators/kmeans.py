"""k-means on all rows at once."""

import functools
from typing import Any

from rsfast._dispatch import Impl
from rsfast.kmeans.estimators.base import Estimator
from rsfast.kmeans.estimators.inputs import rows, sample_weights
from rsfast.kmeans.estimators.sizes import Sizes
from rsfast.kmeans.estimators.start import Start, check_int, check_real, tolerance
from rsfast.kmeans.functional import lloyd
from rsfast.kmeans.functional.checks import Precision, check_precision
from rsfast.kmeans.functional.draws import child, seed_of
from rsfast.kmeans.functional.plain import plain


class KMeans(Estimator):
    r"""k-means with scikit-learn's interface, for rows that stay where they are: on a GPU, in 16 bits, or in NumPy.

    Lloyd's algorithm from the best of ``n_init`` starts; see :func:`rsfast.kmeans.functional.lloyd` for when a run ends
    and what becomes of empty clusters. The labels returned belong to the centres returned.

    Args:
        n_clusters: K.
        init: ``"k-means++"``, :func:`rsfast.kmeans_plusplus`; ``"random"``, K different rows; both by the weights of
            rows; or a (K, D) array.
        n_init: Starts, of which the one of least inertia counts. ``"auto"``: 10 for ``"random"``, else 1. An array is
            started from once.
        max_iter: Iterations of one run, at most.
        tol: A run ends when the squared movement of all centres is at most ``tol`` times the mean of the features'
            variances.
        random_state: None (PyTorch's global generator gives a seed), an int, or a generator of PyTorch or NumPy.
        size_min: Each cluster is to have at least so many rows: an int or (K,) ints.
        size_max: At most so many.
        rho: Balance: :math:`n_k \ge N / (K \rho)`. With any of the three, every labelling of a run is of least cost
            among those that keep the bounds, exactly (:func:`rsfast.kmeans.constrained_assign`). Sizes count rows,
            whatever their weight; a row without weight costs nothing in any cluster.
        precision: As in :func:`rsfast.kmeans_assign`.
        impl: As in :func:`rsfast.kmeans_assign`.

    Attributes:
        cluster_centers_: (K, D) fp32 (fp64 from fp64 rows).
        labels_: (N,) int64: nearest centres, or the constraint's labels.
        inertia_: Weighted sum of squared distances to the labels' centres, a float summed in float64.
        n_iter_: Iterations of the best run.
        counts_: (K,) float64: weight of each cluster's rows.
        n_features_in_: D.
        subsidies_: (K,) float64, under a constraint: what proves the labels.
        certified_: Under a constraint: whether that proof was found to hold.

    X is (N, D) data of PyTorch (fp32, fp16, bf16, fp64; any device; strided rows are not copied), NumPy (integers are
    taken as float64), a sequence, or whatever has ``__dlpack__``. Arrays come back as what went in, on its device.

    Raises (by ``fit``):
        ValueError: A parameter, or X (NaN and infinity by the first such row), or ``sample_weight`` does not fit; the
            message names it. What an earlier ``fit`` found is kept then.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Precision: labels are those of float64 distances to the centres; centres are means summed in fp32.
    Deterministic: yes, bit for bit for one seed. Source: scikit-learn's KMeans, whose results it has from the same
    start (labels, and centres to rounding); other random numbers are drawn.

    Example:
        >>> import torch, rsfast
        >>> features = torch.tensor([[0.0], [0.2], [4.0], [4.2], [4.4], [4.6]])
        >>> rsfast.KMeans(2, rho=1.0, random_state=0).fit(features).labels_.bincount()
        tensor([3, 3])
    """

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
        """Find centres for ``X``; ``sample_weight`` (N,) weighs its rows, ``y`` is not used."""
        given = rows(X)
        x = given.tensor
        weights = sample_weights(sample_weight, x)
        k, max_iter = check_int("n_clusters", self.n_clusters), check_int("max_iter", self.max_iter)
        if len(x) < k:
            raise ValueError(f"n_samples={len(x)} should be >= n_clusters={k}.")
        check_precision(self.precision)
        Sizes.of(self, len(x))  # refuses what cannot be met
        tol = tolerance(x, check_real("tol", self.tol))
        start, seed = Start(self.init, k, x), seed_of(self.random_state)
        best = None
        for number in range(start.times(self.n_init, for_random=10)):
            centers, sizes = start.draw(x, k, weights, child(seed, number), self.impl), Sizes.of(self, len(x))
            label = None if sizes is None else functools.partial(sizes.label, x, weights)
            options = dict(max_iter=max_iter, tol=tol, weights=weights, precision=self.precision, impl=self.impl)
            found = lloyd(x, centers, label=label, **options)
            if best is None or found.inertia < best[0].inertia:
                best = found, sizes
        found, sizes = best
        self._warn_of_missing(found.labels)
        self._keep(given, found.centers, found.labels, found.counts, sizes)
        self.inertia_, self.n_iter_ = float(found.inertia), int(found.n_iter)
        return self
