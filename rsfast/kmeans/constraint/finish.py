"""The exact finish of the size constraint: points near a border travel to the host, and move along shortest paths."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rsfast.kmeans.constraint.ascent import settle, sizes_wanted
from rsfast.kmeans.constraint.fixed import FAR, chunks

NEAR = 1 << 14  # moves that travel to the host at first; if they run out, it is 8 times as many
GROWTH = 8


def finish(
    gaps: Tensor, subsidies: Tensor, lower: Tensor, upper: Tensor, labels: Tensor, shortest_paths: Callable
) -> tuple[Tensor, Tensor]:
    """Optimal labels (N,) and the subsidies (K,) that prove it; ``labels`` are the choice under any subsidies."""
    bounds, moves, width = (lower.cpu().numpy(), upper.cpu().numpy()), NEAR, -1
    while not fits(labels, subsidies, lower, upper):
        totals = widths(gaps, subsidies, labels).cumsum(0)
        if width < 0 and totals[0] > moves:
            labels = settle(gaps, subsidies, lower, upper, labels)
        width = max(width + 1, int((totals <= moves).sum()) - 1)
        reach = FAR if totals[width] == totals[-1] else (1 << width) - 1
        rows = _near(gaps, subsidies, labels, reach)
        counts = torch.bincount(labels, minlength=len(gaps)).cpu().numpy()
        near, ours, paid = (
            gaps[:, rows].T.cpu().contiguous().numpy(),
            labels[rows].cpu().numpy(),
            subsidies.cpu().numpy(),
        )
        done = shortest_paths(*bounds, counts, paid, near, ours, reach)
        labels = labels.index_copy(0, rows, torch.from_numpy(ours).to(labels))
        subsidies = torch.from_numpy(paid).to(subsidies)
        if done:
            break
        moves *= GROWTH
    return labels, subsidies


def fits(labels: Tensor, subsidies: Tensor, lower: Tensor, upper: Tensor) -> bool:
    """Whether every size is one that its cluster's subsidy allows."""
    counts = torch.bincount(labels, minlength=len(lower))
    least, most = sizes_wanted(subsidies, lower, upper)
    return bool(((least <= counts) & (counts <= most)).all())


def widths(gaps: Tensor, subsidies: Tensor, labels: Tensor) -> Tensor:
    """How many moves cost how many bits: (64,) int64 on the host."""
    counts = torch.zeros(64, dtype=torch.int64, device=gaps.device)
    for _, slack in _slacks(gaps, subsidies, labels):
        wide = slack.double().frexp().exponent.flatten()  # of more than 53 bits perhaps one too many, which is no harm
        counts += torch.bincount(wide, minlength=64)
    counts[63] = 0  # to stay is no move
    return counts.cpu()


def _near(gaps: Tensor, subsidies: Tensor, labels: Tensor, reach: int) -> Tensor:
    """Points that could move for at most ``reach``, in order."""
    near = [(slack <= min(reach, FAR - 1)).any(0) for _, slack in _slacks(gaps, subsidies, labels)]
    return torch.cat(near).nonzero()[:, 0]


def _slacks(gaps: Tensor, subsidies: Tensor, labels: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """What each place costs more than a point's own, subsidies counted; FAR for its own."""
    for points in chunks(*gaps.shape):
        scores, ours = gaps[:, points] - subsidies[:, None], labels[None, points]
        slack = scores - scores.gather(0, ours)
        yield points, slack.scatter_(0, ours, FAR)
