"""What k-means should have found, in float64, as many rows at a time as fit."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import rsfast
from benchmarks.kmeans_peers import Found, means, summed
from rsfast.testing import assert_within_budget

AT_ONCE = 2**27  # numbers of a float64 matrix
REPEATS = 10


def scores(x: Tensor, centers: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, ||c||^2 - 2 x c of them, how far rounding may take a difference of two) in float64."""
    centers = centers.double()
    norms, largest = centers.square().sum(1), centers.norm(dim=1).max()
    rows = max(AT_ONCE // max(len(centers), x.shape[1]), 1)
    for start in range(0, len(x), rows):
        part = x[start : start + rows].double()
        slack = 8 * x.shape[1] * 2.0**-53 * largest * (part.norm(dim=1) + largest)
        yield slice(start, start + rows), norms - 2 * part @ centers.T, slack


def wrong(x: Tensor, centers: Tensor, labels: Tensor) -> float:
    """Share of the rows whose label is not that of a nearest centre."""
    count = torch.zeros((), dtype=torch.long, device=x.device)
    for rows, score, slack in scores(x, centers):
        count += (score.gather(1, labels[rows, None])[:, 0] > score.min(1).values + slack).sum()
    return count.item() / len(x)


def inertia(x: Tensor, centers: Tensor) -> float:
    """Sum of squared distances to the nearest centre."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows, score, _ in scores(x, centers):
        total += (score.min(1).values + x[rows].double().square().sum(1)).sum()
    return total.item()


def _means(x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    sums = torch.zeros(centers.shape, dtype=torch.float64, device=x.device)
    classes, rows = torch.arange(len(centers), device=x.device), max(AT_ONCE // max(x.shape[1], len(centers)), 1)
    for part, mine in zip(x.split(rows), labels.split(rows), strict=True):
        sums += (mine[:, None] == classes).double().T @ part.double()
    return means(sums, torch.bincount(labels, minlength=len(centers)).double(), centers.double())


def _difference(actual: Tensor, gold: Tensor) -> float:
    return ((actual.double() - gold).norm() / gold.norm()).item()


def of_assign(given, found: Found, own: bool, fast: bool) -> dict[str, float]:
    """``error_labels``: share of wrong ones, none of them ours."""
    errors = {"error_labels": wrong(given.x, given.centers, found.labels)}
    assert fast or not own or errors["error_labels"] == 0, f"{errors} of exact labels"
    return errors


def of_step(given, found: Found, own: bool, fast: bool) -> dict[str, float]:
    """Also ``error_centers``, against the means of its own labels; ours within the budget."""
    errors, gold = of_assign(given, found, own, fast), _means(given.x, found.labels, given.centers)
    if own:
        eager = means(*summed(given.x, found.labels, len(given.centers), False), given.centers)
        assert_within_budget(found.centers, gold, eager, terms=len(given.x), name="centres")
    return errors | {"error_centers": _difference(found.centers, gold)}


def of_fit(given, found: Found, own: bool, fast: bool) -> dict[str, float]:
    """``error_labels``: of those that do not belong to the centres returned; ``error_inertia``: beside ours."""
    centers = found.centers.to(given.x.device)
    x, start, (iterations,) = given
    ours = rsfast.KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0).fit(x).cluster_centers_
    errors = {"error_inertia": abs(inertia(x, centers) / inertia(x, ours) - 1)}
    if found.labels is not None:
        errors["error_labels"] = wrong(x, centers, found.labels.to(x.device))
        assert fast or not own or errors["error_labels"] == 0, f"{errors} of labels of the centres returned"
    return errors


def of_minibatch(given, found: Found, own: bool, fast: bool) -> dict[str, float]:
    """``error_inertia`` beside the same algorithm in float64 on batches drawn beforehand; ours draws others."""
    x, start, (batches,) = given
    now, seen = start.double(), torch.zeros(len(start), dtype=torch.float64, device=x.device)
    for rows in batches:
        batch = x[rows].double()
        labels = torch.cat([score.argmin(1) for _, score, _ in scores(batch, now)])
        counts = torch.bincount(labels, minlength=len(now)).double()
        gain = (counts / (seen + counts).clamp(min=1))[:, None]
        now, seen = now + gain * (_means(batch, labels, now) - now), seen + counts
    centers = found.centers.to(x.device)
    assert centers.isfinite().all(), "centres are not finite"
    return {"error_inertia": abs(inertia(x, centers) / inertia(x, now) - 1)}


def of_plusplus(given, found: Found, own: bool, fast: bool) -> dict[str, float]:
    """``potential``: inertia of the rows chosen, over that of as many taken at random."""
    x, start = given.x, given.centers
    assert len(found.labels.unique()) == len(start), "a row was chosen twice"
    random = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[: len(start)].to(x.device)
    return {"potential": inertia(x, x[found.labels]) / inertia(x, x[random])}


def of_constrained(given, found: Found, own: bool, fast: bool) -> dict[str, float]:
    """``error_cost``: above the least; ours is the least because its subsidies prove it, which is checked."""
    x, centers, (least,) = given
    costs, labels = rsfast.kmeans_distances(x, centers).double(), found.labels.to(x.device)
    counts = torch.bincount(labels, minlength=len(centers))
    assert counts.min() >= least, f"a cluster has {counts.min()} rows, and {least} are wanted"
    if not own:
        best = rsfast.kmeans.constrained_assign(rsfast.kmeans_distances(x, centers), least).labels
        total, lowest = (costs.gather(1, one[:, None]).sum().item() for one in (labels, best))
        return {"error_cost": total / lowest - 1}
    reduced = costs - found.subsidies
    slack = 4 * 2.0**-50 * (costs.max(1).values - costs.min(1).values).max()
    assert (reduced.gather(1, labels[:, None])[:, 0] <= reduced.min(1).values + slack).all(), "not of least cost"
    assert ((found.subsidies <= 0) | (counts == least)).all(), "a subsidy without need"
    return {"error_cost": 0.0}


def assert_repeats(run: Callable[[], Found], found: Found) -> None:
    """Every result again, bit for bit."""
    for _ in range(REPEATS - 1):
        for again, once in zip(run(), found, strict=True):
            assert again is None or torch.equal(again, once), "a second run has another result"
