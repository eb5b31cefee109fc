"""Lloyd's algorithm to its end, without waiting for the device at every step."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rsfast._dispatch import Impl, use_fused
from rsfast.kmeans import reference
from rsfast.kmeans.functional import checks
from rsfast.kmeans.functional.checks import Precision
from rsfast.kmeans.functional.plain import plain
from rsfast.kmeans.functional.steps import kmeans_assign, kmeans_step, kmeans_update

_RUNNING, _DONE, _EMPTY = range(3)


def patience(x: Tensor) -> int:
    """Steps between two looks at a device: looking at a GPU takes it time."""
    return 16 if x.is_cuda else 1


class Lloyd(NamedTuple):
    """Centres that Lloyd's algorithm ends with, and the labels that belong to them."""

    centers: Tensor  # (K, D)
    labels: Tensor  # (N,) int64
    counts: Tensor  # (K,) float64
    inertia: Tensor  # () float64
    n_iter: Tensor  # () int64


@plain
def lloyd(
    x: Tensor,  # (N, D)
    centers: Tensor,  # (K, D)
    *,
    max_iter: int = 300,
    tol: float = 0.0,
    weights: Tensor | None = None,  # (N,)
    label: Callable[[Tensor], Tensor] | None = None,
    precision: Precision = "exact",
    impl: Impl = "auto",
) -> Lloyd:
    r"""Repeat :func:`rsfast.kmeans_step` until labels repeat or centres stay, then label once more.

    A step ends the loop if its labels equal the last step's, or if :math:`\sum_k \lVert c_k' - c_k \rVert^2` is at most
    ``tol``. A step that leaves clusters without weight does not: of the rows that have a weight and are not on their
    centre, the farthest from its centre is given to the first such cluster, the next to the second, and so on (ties to
    the lowest row), and the step's means are taken after that. Where such rows run out, centres stay where they are.

    Args:
        x: As in :func:`rsfast.kmeans_assign`.
        centers: To start from, as in :func:`rsfast.kmeans_assign`.
        max_iter: Steps at most, at least 1.
        tol: In the units of x squared.
        weights: As in :func:`rsfast.kmeans_update`.
        label: Labels for centres where these are not those of :func:`rsfast.kmeans_assign`: under a constraint.
        precision: As in :func:`rsfast.kmeans_assign`.
        impl: As in :func:`rsfast.kmeans_assign`.

    Returns:
        ``centers`` fp32 (fp64 of fp64 rows); the ``labels`` of the rows for these centres, and what they weigh,
        ``counts``; ``inertia``, the weighted sum of squared distances, summed in float64; ``n_iter``, the number of
        steps. All on x's device.

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Deterministic: yes, bit for bit. A GPU is waited for every few steps, not at each. Source: Lloyd 1982; when it stops
    and what becomes of empty clusters as in scikit-learn's KMeans.

    Example:
        >>> import torch
        >>> from rsfast.kmeans.functional import lloyd
        >>> lloyd(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.0], [1.0]])).centers
        tensor([[0.5000],
                [5.0000]])
    """
    checks.check_rows(x)
    checks.check_centers(x, centers)
    checks.check_count("max_iter", max_iter)
    checks.check_numbers(x, "weights", weights, len(x), least=0)
    options = dict(precision=precision, impl=impl)

    def labelled():
        if label is None:
            return kmeans_assign(x, loop.centers, **options)
        labels = label(loop.centers)
        return labels, distances_to(x, loop.centers, labels)

    loop = _Loop(x, centers, tol)
    look, steps = 1, 0
    exact = checks.check_precision(precision)
    fused = use_fused(impl, checks.why_not_fused(x))
    whole = label is None and weights is None and fused and one_launch(x, centers)
    norms = None if fused or label is not None else reference.row_norms(x)
    while steps < max_iter:
        if whole:
            loop.run(x, max_iter - steps, exact)
        for _ in range(0 if whole else min(look, max_iter - steps)):
            if label is None:
                if fused:
                    step = kmeans_step(x, loop.centers, weights=weights, **options)
                else:
                    step = reference.kmeans_step(x, loop.centers, weights, None, exact, norms)
                loop.advance(step.labels, step.sums, step.counts)
            else:
                labels = label(loop.centers)
                loop.advance(labels, *kmeans_update(x, labels, len(centers), weights=weights, impl=impl))
        status, steps = (int(number) for number in torch.stack([loop.status, loop.n_iter]).cpu())
        if status == _EMPTY:
            loop.reseed(x, *labelled(), weights, impl)
            status, steps = int(loop.status), steps + 1
        if status == _DONE:
            break
        look = min(2 * look, patience(x))
    labels, distances = labelled()
    return Lloyd(loop.centers, labels, weigh(x, labels, len(centers), weights), total(distances, weights), loop.n_iter)


def one_launch(x: Tensor, centers: Tensor, batch_size: int | None = None) -> bool:
    """Whether a kernel takes all steps; asked only where kernels run."""
    from rsfast.kmeans.kernels import onepass

    return onepass.serves(x, len(centers), batch_size)


class _Loop:
    """State on the device: what comes after the loop has ended or met an empty cluster changes nothing."""

    def __init__(self, x: Tensor, centers: Tensor, tol: float):
        self.centers, self.tol = centers.to(torch.promote_types(x.dtype, torch.float32)), tol
        self.labels = torch.full((len(x),), -1, device=x.device)
        self.n_iter, self.status = torch.zeros(2, dtype=torch.long, device=x.device)

    def advance(self, labels: Tensor, sums: Tensor, counts: Tensor) -> None:
        """Take the means of ``labels`` as centres, unless a cluster is empty."""
        means = self._means(sums, counts)
        empty = (counts == 0).any()
        same = (labels == self.labels).all()
        still = (means - self.centers).double().square().sum() <= self.tol
        took = (self.status == _RUNNING) & ~empty
        status = torch.where(empty, _EMPTY, torch.where(same | still, _DONE, _RUNNING))
        self.status = torch.where(self.status == _RUNNING, status, self.status)
        self.centers = torch.where(took, means, self.centers)
        self.n_iter = self.n_iter + took
        self.labels = labels

    def run(self, x: Tensor, steps: int, exact: bool) -> None:
        """All steps until one ends the loop or leaves a cluster empty, in one launch."""
        from rsfast.kmeans.kernels import onepass

        self.centers, self.labels, ended = onepass.lloyd(x, self.centers, self.labels, exact, steps, self.tol)
        taken, outcome = onepass.counts_of(ended)
        self.n_iter = self.n_iter + taken
        empty, ran_out = outcome == onepass.EMPTY_CLUSTER, outcome == onepass.RAN_OUT
        self.status = torch.where(empty, _EMPTY, torch.where(ran_out, _RUNNING, _DONE))

    def reseed(self, x: Tensor, labels: Tensor, distances: Tensor, weights: Tensor | None, impl: Impl) -> None:
        """The step that ``advance`` did not take: far rows go to the empty clusters first."""
        k = len(self.centers)
        far = distances if weights is None else torch.where(weights > 0, distances, 0)
        far, rows = far.sort(descending=True, stable=True)
        empty = (weigh(x, labels, k, weights) == 0).nonzero()[:, 0]
        rows = rows[: len(empty)][far[: len(empty)] > 0]
        moved = labels.clone()
        moved[rows] = empty[: len(rows)]
        sums, counts = kmeans_update(x, moved, k, weights=weights, impl=impl)
        means = self._means(sums, counts)
        still = (means - self.centers).double().square().sum() <= self.tol
        self.status = torch.where(still, _DONE, _RUNNING) if len(rows) else torch.full_like(self.status, _DONE)
        self.centers, self.labels, self.n_iter = means, labels, self.n_iter + 1

    def _means(self, sums: Tensor, counts: Tensor) -> Tensor:
        counts = counts[:, None]
        means = sums.double() / torch.where(counts == 0, 1, counts)
        return torch.where(counts == 0, self.centers, means.to(self.centers))


def distances_to(x: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of every row to its label's centre, from differences, (N,)."""
    rows = max(1, (2**26 if x.is_cuda else 2**20) // x.shape[1])
    parts = zip(x.split(rows), labels.split(rows), strict=True)
    return torch.cat([(part - centers[own]).square().sum(1) for part, own in parts])


def weigh(x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None) -> Tensor:
    """Weight of the rows of every label, (K,) float64, added in one order."""
    return kmeans_update(x[:, :1], labels, n_clusters, weights=weights).counts


def total(distances: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted sum in float64."""
    return distances.double().sum() if weights is None else (distances.double() * weights).sum()
