"""The exact finish of the size constraint: points near a border travel to the host, and move along shortest paths."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rsfast.kmeans.constraint import ascent, paths
from rsfast.kmeans.constraint.fixed import FAR

NEAR = 1 << 14  # moves that travel to the host at first; if they run out, it is 8 times as many
GROWTH = 8


class Way(NamedTuple):
    """Who computes: the functions of these names in ``ascent`` and ``paths``, or others that return the same."""

    climb: Callable
    widths: Callable
    near: Callable
    shortest_paths: Callable


PLAIN = Way(ascent.climb, ascent.widths, ascent.near, paths.shortest_paths)


def finish(
    gaps: Tensor, subsidies: Tensor, lower: Tensor, upper: Tensor, labels: Tensor, way: Way
) -> tuple[Tensor, Tensor]:
    """Optimal labels (N,) and the subsidies (K,) that prove it; ``labels`` are a choice under any subsidies."""
    bounds, moves, width, settled = (lower.cpu().numpy(), upper.cpu().numpy()), NEAR, -1, False
    while not _fit(labels, subsidies, lower, upper):
        totals = way.widths(gaps, subsidies, labels).cpu().cumsum(0)
        if totals[0] > moves and not settled:
            labels, settled = ascent.settle(gaps, subsidies, lower, upper, labels), True
            continue
        width = max(width + 1, int((totals <= moves).sum()) - 1)
        reach = FAR if totals[width] == totals[-1] else (1 << width) - 1
        rows = way.near(gaps, subsidies, labels, reach).nonzero()[:, 0]
        counts = torch.bincount(labels, minlength=len(gaps))
        here = [t.contiguous().cpu().numpy() for t in (counts, subsidies, gaps[:, rows].T, labels[rows])]
        done = way.shortest_paths(*bounds, *here, reach)
        _, paid, _, ours = (torch.from_numpy(each).to(gaps) for each in here)
        subsidies, labels = paid, labels.index_copy(0, rows, ours)
        if done:
            break
        moves *= GROWTH
    return labels, subsidies


def _fit(labels: Tensor, subsidies: Tensor, lower: Tensor, upper: Tensor) -> bool:
    """Whether every size is one that its cluster's subsidy allows."""
    counts = torch.bincount(labels, minlength=len(lower))
    least, most = ascent.sizes_wanted(subsidies, lower, upper)
    return bool(((least <= counts) & (counts <= most)).all())
