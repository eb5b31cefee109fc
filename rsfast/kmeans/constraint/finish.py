"""The exact finish of the size constraint: points near a border travel to the host, and move along shortest paths."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rsfast.kmeans.constraint import ascent, paths
from rsfast.kmeans.constraint.fixed import FAR

NEAR = 1 << 14  # moves that travel to the host at first; if they run out, it is 8 times as many
GROWTH = 8
FEW = 1 << 22  # numbers of the rows that hold what some paths may need


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
    while wrong := _wrong(counts := torch.bincount(labels, minlength=len(gaps)), subsidies, lower, upper):
        if moves > NEAR and _few(len(gaps), wrong):
            rows = ascent.nearest(gaps, subsidies, labels, wrong + 1).nonzero()[:, 0]
            return _moved(gaps, subsidies, bounds, counts, labels, rows, FAR, way)[1:]
        totals = way.widths(gaps, subsidies, labels).cpu().cumsum(0)
        if totals[0] > moves and not settled:
            labels, settled = ascent.settle(gaps, subsidies, lower, upper, labels), True
            continue
        width = max(width + 1, int((totals <= moves).sum()) - 1)
        reach = FAR if totals[width] == totals[-1] else (1 << width) - 1
        rows = way.near(gaps, subsidies, labels, reach).nonzero()[:, 0]
        done, labels, subsidies = _moved(gaps, subsidies, bounds, counts, labels, rows, reach, way)
        if done:
            break
        moves *= GROWTH
    return labels, subsidies


def _few(clusters: int, wrong: int) -> bool:
    """Whether so many paths need few rows: of every pair of clusters one more than there are paths."""
    return clusters**3 * (wrong + 1) <= FEW


def _moved(gaps, subsidies, bounds, counts, labels, rows, reach, way) -> tuple[bool, Tensor, Tensor]:
    """Whether every size fits when these rows have moved along shortest paths; labels and subsidies then."""
    here = [t.contiguous().cpu().numpy() for t in (counts, subsidies, gaps[:, rows].T, labels[rows])]
    done = way.shortest_paths(*bounds, *here, reach)
    _, paid, _, ours = (torch.from_numpy(each).to(gaps) for each in here)
    return done, labels.index_copy(0, rows, ours), paid


def _wrong(counts: Tensor, subsidies: Tensor, lower: Tensor, upper: Tensor) -> int:
    """How many paths there will be, each from where there are too many points to where there are too few.

    0 where every size is one that its cluster's subsidy allows.
    """
    least, most = ascent.sizes_wanted(subsidies, lower, upper)
    few, many = (least - counts).clamp(min=0).sum(), (counts - most).clamp(min=0).sum()
    return int(torch.maximum(few, many))
