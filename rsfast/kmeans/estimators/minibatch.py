"""k-means on a few rows at a time: drawn from data at hand, or as they come."""

from typing import Any

import torch
from torch import Tensor

from rsfast._dispatch import Impl
from rsfast.kmeans.estimators.base import Estimator
from rsfast.kmeans.estimators.inputs import Given, rows, sample_weights, taken
from rsfast.kmeans.estimators.sizes import Sizes
from rsfast.kmeans.estimators.start import Start, check_int, check_real, tolerance
from rsfast.kmeans.functional import minibatch, minibatch_step
from rsfast.kmeans.functional.checks import Precision, check_precision
from rsfast.kmeans.functional.draws import child, seed_of, shuffled
from rsfast.kmeans.functional.loop import distances_to, total
from rsfast.kmeans.functional.plain import plain

STATE = {  # of a stream
    "centers": "cluster_centers_", "counts": "counts_", "subsidies": "subsidies_", "n_steps": "n_steps_",
    "seed": "_seed", "since": "_since",
}  # fmt: skip


class MiniBatchKMeans(Estimator):
    r"""k-means a batch at a time, with scikit-learn's interface: ``fit`` draws batches, ``partial_fit`` is given them.

    Each centre is the mean of all rows that were ever nearest to it, as it then was; see
    :func:`rsfast.kmeans.functional.minibatch_step` for a step and :func:`rsfast.kmeans.functional.minibatch` for when
    ``fit`` ends.

    Args:
        n_clusters: K.
        init: As in :class:`rsfast.KMeans`.
        n_init: Starts, compared on ``init_size`` rows; the best is gone on with. ``"auto"``: 3 for "random", else 1.
        max_iter: ``fit`` draws at most ``max_iter * N`` rows.
        batch_size: Rows of a batch of ``fit``.
        tol: As in :class:`rsfast.KMeans`; 0: not looked at.
        max_no_improvement: ``fit`` ends after so many batches without a new least smoothed inertia. None: it does not.
        init_size: Rows that a start is found from, at least K. None: ``3 * batch_size``, or ``3 * K`` if that is more.
        reassignment_ratio: Centres that count less than this share of the most, 0 to 1, become rows now and then.
        random_state: As in :class:`rsfast.KMeans`.
        size_min: As in :class:`rsfast.KMeans`. Batches of ``fit`` are steered towards the bounds by subsidies that
            persist; the last labelling of all rows keeps them exactly, at the least cost for the centres found.
        size_max: As ``size_min``.
        rho: As ``size_min``, and for ``partial_fit`` too: of each batch a cluster is to have ``B / (K rho)`` rows, less
            a fraction of a row.
        precision: As in :func:`rsfast.kmeans_assign`.
        impl: As in :func:`rsfast.kmeans_assign`.

    Attributes:
        cluster_centers_: (K, D) fp32 (fp64 from fp64 rows).
        labels_: Labels of the rows of ``fit``, or of the last batch, for these centres.
        inertia_: Their weighted sum of squared distances, a float summed in float64.
        counts_: (K,) float64: weight of the rows that made each centre; the next batches go on from it.
        n_steps_: Batches so far.
        n_iter_: Batches of ``fit`` in passes over its rows, rounded up.
        n_features_in_: D.
        subsidies_: (K,) float64, under a constraint: what proves the labels.
        certified_: Under a constraint: whether that proof was found to hold.

    X and errors are as in :class:`rsfast.KMeans`. In ``fit`` rows are drawn in proportion to their weight and count as
    one; in ``partial_fit`` they count as they weigh.

    Deterministic: yes, bit for bit for one seed, and the same for a model that was pickled in between. Source: Sculley
    2010; scikit-learn's MiniBatchKMeans, whose ``partial_fit`` it equals from the same centres where nothing is
    reassigned; other random numbers are drawn.

    Example:
        >>> import torch, rsfast
        >>> kmeans = rsfast.MiniBatchKMeans(2, init=torch.tensor([[0.0], [9.0]]), reassignment_ratio=0)
        >>> for batch in torch.tensor([[[1.0], [8.0]], [[3.0], [7.0]]]):
        ...     kmeans = kmeans.partial_fit(batch)
        >>> kmeans.cluster_centers_.flatten(), kmeans.counts_
        (tensor([2.0000, 7.5000]), tensor([2., 2.], dtype=torch.float64))
    """

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
        """Find centres for ``X`` anew; ``sample_weight`` (N,) weighs its rows, ``y`` is not used."""
        given = rows(X)
        x = given.tensor
        weights = sample_weights(sample_weight, x)
        self._check_parameters(x)
        sizes = Sizes.of(self, len(x))
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
            subsidise=None if sizes is None else sizes.subsidise,
            precision=self.precision,
            impl=self.impl,
        )
        steps = int(found.n_steps)
        self._finish(given, weights, found.centers, found.counts, steps, sizes)
        self.n_iter_, self._seed, self._since = -(-steps * batch_size // len(x)), seed, 0
        return self

    @plain
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, label: bool = True) -> "MiniBatchKMeans":
        """Go on with a batch, from where the last one left off; ``sample_weight`` (B,) weighs it, ``y`` is not used.

        ``label=False`` leaves out the labels of the batch for the new centres, which under a constraint take longer
        than all the rest: ``labels_`` and ``certified_`` are not there then, ``inertia_`` is that of the step, to the
        centres before, and ``subsidies_`` are those of the step, as between the batches of ``fit``.
        """
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
        sizes, subsidies = Sizes.of_stream(self, len(x)), None
        if sizes is not None:
            before = torch.zeros_like(counts)
            if hasattr(self, "subsidies_"):
                before = taken(self.subsidies_, "subsidies_").tensor.to(x.device)
            subsidies = sizes.subsidise(x, centers, before)
        since += len(x)
        due = since >= 10 * len(centers) or bool((counts == 0).any())
        step = minibatch_step(
            x,
            centers,
            counts,
            weights=weights,
            subsidies=subsidies,
            reassignment_ratio=due * check_real("reassignment_ratio", self.reassignment_ratio, 1),
            order=shuffled(child(seed, 2), steps, len(x), x.device) if due else None,
            precision=self.precision,
            impl=self.impl,
        )
        if label:
            self._finish(given, weights, step.centers, step.counts, steps + 1, sizes)
        else:
            self._keep(given, step.centers, None, step.counts, sizes)
            self.inertia_, self.n_steps_ = float(step.inertia), steps + 1
        self._seed, self._since = seed, 0 if due else since
        return self

    def state(self) -> dict[str, Any]:
        """All that the next ``partial_fit`` goes on from: arrays in the kind of X, and ints."""
        self._centers()
        return {name: getattr(self, attribute, None) for name, attribute in STATE.items()}

    def resume(self, state: dict[str, Any]) -> "MiniBatchKMeans":
        """Go on from ``state()`` of a model of the same parameters: the next batches give the same bits."""
        if state.keys() != STATE.keys():
            raise ValueError(f"state must hold {', '.join(STATE)}, got {', '.join(map(str, state))}")
        centers, counts = (taken(state[name], name).tensor for name in ("centers", "counts"))
        if centers.dim() != 2 or len(centers) != self.n_clusters or counts.shape != (self.n_clusters,):
            got = f"{tuple(centers.shape)} and {tuple(counts.shape)}"
            raise ValueError(f"centers and counts of state must be of {self.n_clusters} clusters, got shapes {got}")
        for name, attribute in STATE.items():
            self.__dict__.pop(attribute, None)
            if state[name] is not None:
                setattr(self, attribute, state[name])
        self.n_features_in_ = centers.shape[1]
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

    def _finish(self, given: Given, weights, centers: Tensor, counts: Tensor, steps: int, sizes: Sizes | None) -> None:
        x = given.tensor
        if sizes is None:
            labels, distances = self._nearest(x, centers)
        else:
            labels = sizes.label(x, weights, centers)
            distances = distances_to(x, centers, labels)
        self._keep(given, centers, labels, counts, sizes)
        self.inertia_, self.n_steps_ = float(total(distances, weights)), steps
