"""What k-means computes, in plain PyTorch: a few rows at a time, so that nothing as large as the data is made."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CANCELLED = 2.0**-6  # of the terms, below which a difference of them is computed another way
_AT_ONCE = 2**23  # numbers of a chunk of rows on a CPU
_ROWS = 2**11  # of a chunk there: what is added up in float32, before float64 goes on


class Assignment(NamedTuple):
    """Nearest centre of every row, and how far it is."""

    labels: Tensor  # (N,) int64
    distances: Tensor  # (N,) squared


class Update(NamedTuple):
    """What the rows of every label add up to."""

    sums: Tensor  # (K, D)
    counts: Tensor  # (K,) float64


class Step(NamedTuple):
    """One pass over the data: labels for the centres given, and the sums that make the next ones."""

    labels: Tensor  # (N,) int64
    sums: Tensor  # (K, D)
    counts: Tensor  # (K,) float64
    inertia: Tensor  # () float64


def kmeans_assign(x: Tensor, centers: Tensor, subsidies: Tensor | None = None, exact: bool = True) -> Assignment:
    """``argmin_k ||x_i - c_k||^2 - s_k`` and ``||x_i - c||^2`` of the centre found."""
    nearest, parts = _Nearest(x, centers, subsidies, exact), []
    for rows in _chunks(x, centers):
        labels = nearest(rows, torch.linalg.vector_norm(rows, dim=1))
        parts.append((labels, (rows - centers.to(rows)[labels]).square().sum(1)))
    labels, distances = _joined(parts, x)
    for i, rows in _in_doubt(x, centers, labels):
        labels[i] = nearest.certain(rows)
        distances[i] = (rows - centers.to(rows)[labels[i]]).square().sum(1).to(distances)
    return Assignment(labels, distances)


def kmeans_update(x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None = None) -> Update:
    """``sum_i [l_i = k] w_i x_i`` and ``sum_i [l_i = k] w_i``."""
    sums = _Sums(x, n_clusters)
    for start, rows in _numbered(_chunks(x, x[:n_clusters])):
        ours = slice(start, start + len(rows))
        sums.add(rows, labels[ours], None if weights is None else weights[ours])
    return Update(sums.sums.to(_result(x)), sums.counts)


def kmeans_step(
    x: Tensor,
    centers: Tensor,
    weights: Tensor | None = None,
    subsidies: Tensor | None = None,
    exact: bool = True,
    norms: Tensor | None = None,
) -> Step:
    """Both in one pass; ``inertia = sum_i w_i ||x_i||^2 - 2 sum_k c_k . sums_k + sum_k counts_k ||c_k||^2``.

    ``norms`` are those of the rows, for who takes many steps (:func:`row_norms`).
    """
    nearest, sums, parts = _Nearest(x, centers, subsidies, exact), _Sums(x, len(centers)), []
    for start, rows in _numbered(_chunks(x, centers)):
        ours = slice(start, start + len(rows))
        w = None if weights is None else weights[ours]
        lengths = torch.linalg.vector_norm(rows, dim=1) if norms is None else norms[ours]
        labels = nearest(rows, lengths)
        sums.add(rows, labels, w)
        parts.append((labels, lengths))
    labels, lengths = _joined(parts, x)
    for i, rows in _in_doubt(x, centers, labels):
        labels[i] = nearest.certain(rows)
        sums.add(rows, labels[i], None if weights is None else weights[i])
    squares, c = lengths.double().square(), centers.double()
    energy = squares.sum() if weights is None else squares @ weights.double()
    inertia = energy - 2 * (c * sums.sums.double()).sum() + sums.counts @ c.square().sum(1)
    return Step(labels, sums.sums.to(_result(x)), sums.counts, inertia.clamp(min=0))


def row_norms(x: Tensor) -> Tensor:
    """Lengths of the rows, (N,), fp32 (fp64 of fp64)."""
    parts = [torch.linalg.vector_norm(rows, dim=1) for rows in _chunks(x, x[:1])]
    return torch.cat(parts) if parts else x.new_empty(0, dtype=_working(x))


def kmeans_distances(x: Tensor, centers: Tensor) -> Tensor:
    """``||x_i - c_k||^2`` about the mean centre, which keeps what a common offset would round away.

    What is left of much larger numbers has lost their digits: such pairs are taken from differences.
    """
    middle, parts = centers.double().mean(0), []
    offsets = centers.double() - middle
    for rows in _chunks(x, centers):
        near, c, own = rows - middle.to(rows), offsets.to(rows), centers.to(rows)
        sizes = near.square().sum(1, keepdim=True) + c.square().sum(1)
        squares = torch.addmm(sizes, near, c.T, alpha=-2).clamp(min=0)
        for pairs in (squares < CANCELLED * sizes).nonzero().split(max(1, _AT_ONCE // x.shape[1])):
            i, k = pairs.T
            squares[i, k] = (rows[i] - own[k]).square().sum(1)
        parts.append(squares.to(_result(x)))
    return torch.cat(parts) if parts else x.new_empty((0, len(centers)), dtype=_result(x))


def direct_scores(x: Tensor, centers: Tensor, subsidies: Tensor) -> Tensor:
    """``||x_i - c_k||^2 - s_k`` as it is written, (N, K): the same centre twice gives the same number twice."""
    rows = max(1, 2**22 // max(centers.numel(), 1))
    return torch.cat([(part[:, None] - centers).square().sum(-1) - subsidies for part in x.split(rows)])


class _Nearest:
    """Finds the centre of each row in the rows' own precision, or in float64 where that leaves a doubt."""

    def __init__(self, x, centers, subsidies, exact):
        dtype = _working(x)
        self.centers = centers.double()
        self.subsidies = self.centers.new_zeros(len(centers)) if subsidies is None else subsidies.double()
        offsets = self.centers - self.centers.mean(0)  # a term common to all centres changes no argmin
        squares = self.centers.square().sum(1)
        bias = squares - squares.min() - self.subsidies
        self.factors, self.bias = (-2 * offsets).to(dtype), bias.to(dtype)
        # |error| of one score, at most: D products of factors rounded once, and bias; a quarter for what is squared
        unit = torch.finfo(dtype).eps
        self.by_norm = 1.25 * unit * (centers.shape[1] + 2) * offsets.norm(dim=1).max().to(dtype)
        self.always = 2 * unit * bias.abs().max().to(dtype)
        self.squares, self.exact = squares, exact
        ones = self.bias.new_ones(len(centers))
        self.numbered = torch.stack([ones.cumsum(0) - 1, ones], 1)

    def __call__(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """Labels of a chunk whose rows have these norms, -1 where they are in doubt."""
        scores = _affine(rows, self.factors, self.bias)
        if not self.exact:
            return scores.min(1).indices
        near = scores <= (scores.amin(1) + 2 * (self.by_norm * lengths + self.always))[:, None]
        index, count = (near.to(scores) @ self.numbered).unbind(1)  # faster than an argmin, and as exact for one
        return index.long().masked_fill_(count != 1, -1)  # no number is near nothing

    def certain(self, rows: Tensor) -> Tensor:
        """Labels as float64 has them."""
        rows = rows.double()
        scores = torch.addmm(self.squares - self.subsidies, rows, self.centers.T, alpha=-2)
        best, labels = scores.min(1)
        size = rows.norm(dim=1) * self.squares.max().sqrt() + self.squares.max()
        slack = 8 * torch.finfo(rows.dtype).eps * (rows.shape[1] + 2) * size + self.subsidies.abs().max() * 1e-15
        tied = ((scores <= (best + slack)[:, None]).sum(1) != 1).nonzero()[:, 0]
        if len(tied):
            labels[tied] = direct_scores(rows[tied], self.centers, self.subsidies).argmin(1)
        return labels


class _Sums:
    """Sums by label, each in one order of addition, whatever the device."""

    def __init__(self, x, n_clusters):
        self.classes = torch.arange(n_clusters, device=x.device)
        self.sums = torch.zeros(n_clusters, x.shape[1], dtype=torch.float64, device=x.device)
        self.counts = torch.zeros(n_clusters, dtype=torch.float64, device=x.device)

    def add(self, rows: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        if not rows.is_cuda:
            return self._add_bags(rows, labels, weights)
        members = (labels[:, None] == self.classes).to(rows)  # a product with the labels' indicators
        if weights is None:
            self.counts += members.sum(0).double()
        else:
            self.counts += weights.double() @ members.double()
            members *= weights.to(rows)[:, None]
        self.sums += members.T @ rows

    def _add_bags(self, rows: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        """On a CPU adding up what is there costs less than a product with all that is not."""
        labels, order = labels.sort(stable=True)
        first = torch.searchsorted(labels, self.classes)  # rows before it have a lower label; -1 is no class
        order, labels = order[first[0] :], labels[first[0] :]
        each = None if weights is None else weights[order]
        self.counts += torch.bincount(labels, None if each is None else each.double(), len(self.classes))
        share = None if each is None else each.to(rows)
        self.sums += embedding_bag(order, rows, first - first[0], mode="sum", per_sample_weights=share)


def _affine(rows: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    """``rows @ factors.T + bias``."""
    if rows.dtype == torch.float32 and not rows.is_cuda and (product := _onednn()):
        return product(rows, factors, bias, "none", [], "")
    return torch.addmm(bias, rows, factors.T)


@functools.cache
def _onednn() -> Callable | None:
    """oneDNN's product, which beats addmm's for few columns. PyTorch has it for its compiler only: so it is tried."""
    try:
        product = torch.ops.mkldnn._linear_pointwise
        one = torch.ones(1, 1)
        return product if product(one, one, one[0], "none", [], "").item() == 2 else None
    except (AttributeError, RuntimeError, TypeError):
        return None


def _working(x: Tensor) -> torch.dtype:
    """float32, unless products of float32 are set to be rounded further."""
    backend = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    plain = backend.matmul.fp32_precision in ("none", "ieee")
    return torch.float32 if x.dtype != torch.float64 and plain else torch.float64


def _result(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(x: Tensor, centers: Tensor) -> Iterator[Tensor]:
    """Rows in the working precision, some at a time."""
    return (part.to(_working(x)) for part in x.split(_rows(x, centers)) if len(part))


def _rows(x: Tensor, centers: Tensor) -> int:
    """Of a chunk."""
    size = max(x.shape[1], len(centers), 1)
    return max(64, 2**26 // size if x.is_cuda else min(_AT_ONCE // size, _ROWS))


def _in_doubt(x: Tensor, centers: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows whose label is -1, put aside for the end: a product with few rows at a time would take most of the time."""
    left = (labels == -1).nonzero()[:, 0]
    return ((i, x[i].to(_working(x))) for i in left.split(_rows(x, centers)) if len(i))


def _numbered(chunks: Iterator[Tensor]) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for rows in chunks:
        yield start, rows
        start += len(rows)


def _joined(parts: list[tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
    if not parts:
        return x.new_zeros(0, dtype=torch.long), x.new_zeros(0, dtype=_result(x))
    labels, numbers = zip(*parts, strict=True)
    return torch.cat(labels), torch.cat(numbers).to(_result(x))
