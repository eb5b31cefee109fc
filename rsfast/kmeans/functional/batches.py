"""Mini-batch k-means: centres that are the means of all rows they were ever given."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rsfast._dispatch import Impl, use_fused
from rsfast.kmeans.functional import checks
from rsfast.kmeans.functional.checks import Precision
from rsfast.kmeans.functional.draws import Weighted, rows_of, uniforms
from rsfast.kmeans.functional.loop import one_launch, patience, total
from rsfast.kmeans.functional.plain import plain
from rsfast.kmeans.functional.steps import kmeans_assign, kmeans_update

STEPS_AT_ONCE = 64  # of one launch, after which it is asked whether they were enough


class MiniBatch(NamedTuple):
    """Centres after some steps, and what the next ones need."""

    centers: Tensor  # (K, D)
    counts: Tensor  # (K,) float64
    n_steps: Tensor  # () int64
    subsidies: Tensor | None  # (K,) float64


class BatchStep(NamedTuple):
    """One mini-batch: labels for the centres given, and the next centres."""

    centers: Tensor  # (K, D)
    counts: Tensor  # (K,) float64
    inertia: Tensor  # () float64


@plain
def minibatch_step(
    batch: Tensor,  # (B, D)
    centers: Tensor,  # (K, D)
    counts: Tensor,  # (K,)
    *,
    weights: Tensor | None = None,  # (B,)
    subsidies: Tensor | None = None,  # (K,)
    reassignment_ratio: float | Tensor = 0.0,
    order: Tensor | None = None,  # (B,)
    precision: Precision = "exact",
    impl: Impl = "auto",
) -> BatchStep:
    r"""Update centres by one batch: :math:`c_k \leftarrow (n_k c_k + \sum_i w_i x_i) / (n_k + \sum_i w_i)`.

    Sums are over the rows nearest to centre k; ``counts`` become :math:`n_k + \sum_i w_i`. A centre without weight, new
    or old, stays. After that, centres whose count is below ``reassignment_ratio`` times the largest (at most B // 2 of
    them, the smallest counts first, ties to the lowest index) become rows of the batch, the first in ``order`` for the
    lowest index, and their count becomes the smallest of the others.

    Args:
        batch: As ``x`` in :func:`rsfast.kmeans_assign`.
        centers: fp32 (fp64 with fp64 rows).
        counts: float64: the weight of all rows that made the centres.
        weights: As in :func:`rsfast.kmeans_update`.
        subsidies: As in :func:`rsfast.kmeans_assign`.
        reassignment_ratio: 0 to 1; may be a number on the device.
        order: Row numbers. None: as they stand, which is random enough for a batch drawn at random.
        precision: As in :func:`rsfast.kmeans_assign`.
        impl: As in :func:`rsfast.kmeans_assign`.

    Returns:
        The next ``centers`` and ``counts``; ``inertia``, the weighted sum of squared distances to the centres given.

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Deterministic: yes, bit for bit. Source: Sculley 2010, Algorithm 1 for a batch at a time; reassignment is that of
    scikit-learn's MiniBatchKMeans.

    Example:
        >>> import torch
        >>> from rsfast.kmeans.functional import minibatch_step
        >>> counts = torch.tensor([2.0, 2.0]).double()
        >>> minibatch_step(torch.tensor([[3.0]]), torch.tensor([[0.0], [9.0]]), counts).centers
        tensor([[1.],
                [9.]])
    """
    labels, distances = kmeans_assign(batch, centers, subsidies=subsidies, precision=precision, impl=impl)
    sums, added = kmeans_update(batch, labels, len(centers), weights=weights, impl=impl)
    counts = counts + added
    means = (centers.double() * (counts - added)[:, None] + sums.double()) / torch.where(counts > 0, counts, 1)[:, None]
    centers = torch.where((added > 0)[:, None], means.to(centers), centers)
    if not isinstance(reassignment_ratio, Tensor) and not reassignment_ratio:
        return BatchStep(centers, counts, total(distances, weights))
    by_count = counts.sort(stable=True).indices
    poor = counts < reassignment_ratio * counts.max()
    poor[by_count[len(batch) // 2 :]] = False
    turn = (poor.cumsum(0) - 1).clamp(min=0, max=len(batch) - 1)
    rows = batch[turn if order is None else order[turn]]
    least = torch.where(poor, torch.inf, counts).min()
    centers = torch.where(poor[:, None], rows.to(centers), centers)
    return BatchStep(centers, torch.where(poor, least, counts), total(distances, weights))


@plain
def minibatch(
    x: Tensor,  # (N, D)
    centers: Tensor,  # (K, D)
    *,
    batch_size: int = 1024,
    max_steps: int,
    tol: float = 0.0,
    max_no_improvement: int | None = 10,
    reassignment_ratio: float = 0.01,
    weights: Tensor | None = None,  # (N,)
    seed: int = 0,
    subsidise: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    precision: Precision = "exact",
    impl: Impl = "auto",
) -> MiniBatch:
    r"""Run :func:`minibatch_step` on batches drawn at random, until it no longer pays.

    Rows are drawn independently, with probability in proportion to ``weights``, and count as one each. Counts start
    at 0. Centres may be reassigned at a step before which some count is 0, or 10 K rows have gone by since the last.
    It ends after ``max_steps``, or after a step but the first at which
    :math:`\sum_k \lVert c_k' - c_k \rVert^2` is at
    most ``tol`` (unless that is 0), or when the batches' mean inertia, averaged exponentially at a rate of
    2 B / (N + 1), has made no new minimum for ``max_no_improvement`` steps.

    Args:
        x: As in :func:`rsfast.kmeans_assign`.
        centers: To start from, as in :func:`rsfast.kmeans_assign`.
        batch_size: B.
        max_steps: At least 1.
        tol: In the units of x squared.
        max_no_improvement: None: goes on.
        reassignment_ratio: As in :func:`minibatch_step`.
        weights: Of the rows, not all 0, as in :func:`rsfast.kmeans_update`.
        seed: What draws the batches: the same on CPU and GPU.
        subsidise: Subsidies (K,) for a batch, from the batch, the centres and the last batch's subsidies, 0 at first:
            what makes small clusters grow under a size constraint.
        precision: As in :func:`rsfast.kmeans_assign`.
        impl: As in :func:`rsfast.kmeans_assign`.

    Returns:
        ``centers`` fp32 (fp64 of fp64 rows), ``counts``, ``n_steps`` and the last ``subsidies``, on x's device.

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Deterministic: yes, bit for bit. Batches are drawn where ``x`` is, and a GPU is waited for every few steps, not at
    each. Source: Sculley 2010; when it stops and what it reassigns as in scikit-learn's MiniBatchKMeans.

    Example:
        >>> import torch
        >>> from rsfast.kmeans.functional import minibatch
        >>> x = torch.tensor([[0.0], [2.0], [9.0]])
        >>> minibatch(x, x[[0, 2]], batch_size=2, max_steps=3, seed=1).n_steps
        tensor(3)
    """
    checks.check_rows(x)
    checks.check_centers(x, centers)
    checks.check_count("batch_size", batch_size)
    checks.check_count("max_steps", max_steps)
    checks.check_numbers(x, "weights", weights, len(x), least=0)
    options = dict(precision=precision, impl=impl)
    draw = (lambda u: rows_of(u, len(x))) if weights is None else Weighted(weights).rows
    loop = _Loop(x, centers, batch_size, tol, max_no_improvement)
    subsidies = None if subsidise is None else torch.zeros_like(loop.counts)
    exact = checks.check_precision(precision)
    at_once = STEPS_AT_ONCE if subsidise is None and use_fused(impl, checks.why_not_fused(x)) else 0
    if at_once and one_launch(x, centers, batch_size):
        for first in range(0, max_steps, at_once):
            numbers = range(first, min(first + at_once, max_steps))
            order = torch.stack([draw(uniforms(seed, number, batch_size, x.device)) for number in numbers])
            if loop.run(x, order, exact, reassignment_ratio):
                break
        return MiniBatch(loop.centers, loop.counts, loop.n_steps, subsidies)
    for number in range(max_steps):
        batch = x[draw(uniforms(seed, number, batch_size, x.device))]
        if subsidise is not None:
            subsidies = subsidise(batch, loop.centers, subsidies)
        ratio = loop.ratio(reassignment_ratio)
        state = loop.centers, loop.counts
        loop.advance(minibatch_step(batch, *state, subsidies=subsidies, reassignment_ratio=ratio, **options))
        if number % patience(x) == patience(x) - 1 and loop.done:
            break
    return MiniBatch(loop.centers, loop.counts, loop.n_steps, subsidies)


class _Loop:
    """State on the device: steps after the loop has ended change nothing."""

    def __init__(self, x, centers, batch_size, tol, max_no_improvement):
        self.centers = centers.to(torch.promote_types(x.dtype, torch.float32))
        self.counts = torch.zeros(len(centers), dtype=torch.float64, device=x.device)
        self.n_steps, self.idle, self.since = torch.zeros(3, dtype=torch.long, device=x.device)
        self.average, self.least = torch.full((2,), torch.inf, dtype=torch.float64, device=x.device)
        self.done = torch.zeros((), dtype=torch.bool, device=x.device)
        self.batch_size, self.tol, self.patience = batch_size, tol, max_no_improvement
        self.rate = min(1.0, 2.0 * batch_size / (len(x) + 1))
        self.ended = None  # the kernel's own state

    def run(self, x: Tensor, order: Tensor, exact: bool, ratio: float) -> bool:
        """The batches that ``order`` names, (steps, B), in one launch; whether the loop has ended: a wait."""
        from rsfast.kmeans.kernels import onepass

        if self.ended is None:
            self.ended = onepass.fresh_status(x)
        self.centers, self.counts, self.ended = onepass.minibatch(
            x, self.centers, self.counts, order, exact, self.tol, self.rate, self.patience or 0, ratio, self.ended
        )
        self.n_steps, outcome = onepass.counts_of(self.ended)
        return bool(outcome != onepass.RAN_OUT)

    def ratio(self, ratio: float) -> Tensor:
        """``ratio`` where centres are to be looked at this time, else 0."""
        self.since = self.since + self.batch_size
        due = (self.counts == 0).any() | (self.since >= 10 * len(self.centers))
        self.since = torch.where(due, 0, self.since)
        return due * ratio

    def advance(self, step: BatchStep) -> None:
        moved = (step.centers - self.centers).double().square().sum()
        inertia, first = step.inertia / self.batch_size, self.n_steps == 0  # the first tells of the start alone
        average = torch.where(self.average.isinf(), inertia, self.average + self.rate * (inertia - self.average))
        better = average < self.least
        idle = torch.where(better | first, 0, self.idle + 1)
        done = (moved <= self.tol) if self.tol > 0 else torch.zeros_like(self.done)
        if self.patience is not None:
            done = done | (idle >= self.patience)
        running = ~self.done
        self.n_steps = self.n_steps + running
        self.centers = torch.where(running, step.centers, self.centers)
        self.counts = torch.where(running, step.counts, self.counts)
        self.average = torch.where(running & ~first, average, self.average)
        self.least = torch.where(running & ~first, torch.minimum(average, self.least), self.least)
        self.idle = torch.where(running, idle, self.idle)
        self.done = self.done | (done & ~first)
