"""Subsidy ascent: the dual of the size constraint, all clusters at once, in plain PyTorch."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rsfast.kmeans.constraint.fixed import FAR, chunks


class Choice(NamedTuple):
    """What every point takes under some subsidies."""

    labels: Tensor  # (N,) int64
    best: Tensor  # (N,) int64


def choose(gaps: Tensor, subsidies: Tensor) -> Choice:
    """Least ``gaps[k, i] - subsidies[k]`` of (K, N) integers, and the lowest k that has it."""
    labels, best = torch.empty_like(gaps[0]), torch.empty_like(gaps[0])
    for points in chunks(*gaps.shape):
        scores = gaps[:, points] - subsidies[:, None]
        labels[points] = scores.argmin(0)
        best[points] = scores.amin(0)
    return Choice(labels, best)


def sizes_wanted(subsidies: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest size that fits a subsidy: a paid cluster has its lower bound, a taxed one its upper."""
    return torch.where(subsidies < 0, upper, lower), torch.where(subsidies > 0, lower, upper)


def climb(gaps: Tensor, subsidies: Tensor, lower: Tensor, upper: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Subsidies (K,) nearer to optimal ones, and the labels (N,) chosen under them.

    All are int64 on one device, ``gaps`` (K, N), the others (K,).

    A round raises the subsidy of every cluster that is too small, by as much as makes the size wanted prefer it, ties
    included, and lowers that of every cluster that is too large by as much as makes the excess not prefer it. Neither
    goes past 0, where what is wanted of the cluster changes. From 0 and with lower bounds alone no subsidy ever exceeds
    the least optimal one: clusters are substitutes, so that raising one makes no other larger.
    """
    for _ in range(rounds):
        choice = choose(gaps, subsidies)
        counts = torch.bincount(choice.labels, minlength=len(gaps))
        counts, paid, *bounds = torch.stack([counts, subsidies, lower, upper]).cpu()  # the one wait of a round
        least, most = sizes_wanted(paid, *bounds)
        small, large = (counts < least).nonzero()[:, 0].tolist(), (counts > most).nonzero()[:, 0].tolist()
        margin, after = _margin(gaps, subsidies, choice) if large else None, subsidies.clone()
        for k in small:
            raised = subsidies[k] + _nth(gaps[k] - subsidies[k] - choice.best, int(least[k]))
            after[k] = raised if paid[k] >= 0 else raised.clamp(max=0)
        for k in large:
            lowered = subsidies[k] - _nth(margin[choice.labels == k], int(counts[k] - most[k]))
            after[k] = lowered if paid[k] <= 0 else lowered.clamp(min=0)
        if after.equal(subsidies):
            return subsidies, choice.labels
        subsidies = after
    return subsidies, choose(gaps, subsidies).labels


def of_use(subsidies: Tensor, lower: Tensor, upper: Tensor, n: int) -> Tensor:
    """No subsidy where nothing is asked for, and no tax where everything is allowed."""
    subsidies = torch.where(lower > 0, subsidies, subsidies.clamp(max=0))
    return torch.where(upper < n, subsidies, subsidies.clamp(min=0))


def settle(gaps: Tensor, subsidies: Tensor, lower: Tensor, upper: Tensor, labels: Tensor) -> Tensor:
    """Tied points moved to where they are wanted, the lowest rows first: of equal costs there may be very many."""
    best = gaps.gather(0, labels[None])[0] - subsidies[labels]
    labels, counts = labels.clone(), torch.bincount(labels, minlength=len(gaps)).tolist()
    least, most = (wanted.tolist() for wanted in sizes_wanted(subsidies, lower, upper))

    def move(a: int, b: int, many: int) -> None:
        rows = ((gaps[b] - subsidies[b] == best) & (labels == a)).nonzero()[:many, 0]
        labels[rows] = b
        counts[a] -= len(rows)
        counts[b] += len(rows)

    pairs = list(itertools.permutations(range(len(gaps)), 2))
    for b, a in pairs:
        if counts[b] < least[b] and counts[a] > least[a]:
            move(a, b, min(least[b] - counts[b], counts[a] - least[a]))
    for a, b in pairs:
        if counts[a] > most[a] and counts[b] < most[b]:
            move(a, b, min(counts[a] - most[a], most[b] - counts[b]))
    return labels


def widths(gaps: Tensor, subsidies: Tensor, labels: Tensor) -> Tensor:
    """How many moves cost how many bits: (64,) int64."""
    counts = torch.zeros(64, dtype=torch.int64, device=gaps.device)
    for _, slack in _slacks(gaps, subsidies, labels):
        counts += torch.bincount(_width(slack).flatten(), minlength=64)
    counts[63] = 0  # to stay is no move
    return counts


def near(gaps: Tensor, subsidies: Tensor, labels: Tensor, reach: int) -> Tensor:
    """Whether a point could move for at most ``reach``: (N,) bool."""
    return torch.cat([(slack <= min(reach, FAR - 1)).any(0) for _, slack in _slacks(gaps, subsidies, labels)])


def nearest(gaps: Tensor, subsidies: Tensor, labels: Tensor, moves: int) -> Tensor:
    """Whether a point is among those that move most cheaply from its cluster to some other: (N,) bool.

    Of every ordered pair at least ``moves``, or all. Fewer paths than that find in these rows what they would find in
    all of them: each takes one point at most out of a cluster.
    """
    clusters, counts = len(gaps), torch.zeros(len(gaps) ** 2 * 64, dtype=torch.int64, device=gaps.device)
    others = torch.arange(clusters, device=gaps.device)[:, None]
    for points, slack in _slacks(gaps, subsidies, labels):
        pairs = others + clusters * labels[points]
        counts += torch.bincount(pairs.mul_(64).add_(_width(slack)).flatten(), minlength=len(counts))
    counts = counts.view(clusters, clusters, 64)
    counts[..., 63] = 0
    width = (counts.cumsum(-1) < moves).sum(-1)
    reach = torch.where(width < 62, (1 << width.clamp(max=61)) - 1, FAR - 1)
    found = (slack <= reach[labels[points]].T for points, slack in _slacks(gaps, subsidies, labels))
    return torch.cat([one.any(0) for one in found])


def _margin(gaps: Tensor, subsidies: Tensor, choice: Choice) -> Tensor:
    """How much more the second choice costs."""
    second = torch.empty_like(choice.best)
    for points in chunks(*gaps.shape):
        scores = gaps[:, points] - subsidies[:, None]
        second[points] = scores.scatter(0, choice.labels[None, points], FAR).amin(0)
    return second - choice.best


def _nth(values: Tensor, n: int) -> Tensor:
    """The n-th smallest; a GPU sorts, for its kthvalue is refused under deterministic algorithms."""
    return values.sort().values[n - 1] if values.is_cuda else values.kthvalue(n).values


def _width(slack: Tensor) -> Tensor:
    """Bits of each number; of more than 53 perhaps one too many, which is no harm."""
    return slack.double().frexp().exponent


def _slacks(gaps: Tensor, subsidies: Tensor, labels: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Points, and what each place costs more than their own, subsidies counted; FAR for their own."""
    for points in chunks(*gaps.shape):
        scores, ours = gaps[:, points] - subsidies[:, None], labels[None, points]
        slack = scores - scores.gather(0, ours)
        yield points, slack.scatter_(0, ours, FAR)
