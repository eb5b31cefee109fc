"""Nearest centres. Few: all in one tile, a row is read once. Many: tile after tile, with one part of the centres.

Rows whose label the scores leave in doubt go to a list on the device, which ``recheck.py`` works off. Of many centres
the three best are known, and those rows whose fourth may be the nearest too are listed from the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast._tiles import cdiv
from rsfast.kmeans.kernels.plan import FEW, Tiles, few_tiles, many_tiles, tma_reads
from rsfast.kmeans.kernels.prepare import Centers, described, prepare
from rsfast.kmeans.kernels.recheck import recheck
from rsfast.kmeans.kernels.tiles import error_of, products, put_down, squared_distance

FAR = tl.constexpr(3e38)  # further than any score, and its lowest bits do no harm
KEPT = 3  # best centres of a row that many_kernel knows


@triton.jit
def few_kernel(
    x, x_ptr, high, low, middle_ptr, bias_ptr, limits_ptr, scale_ptr, centers_ptr, labels_ptr, distances_ptr,
    squares_ptr, listed_ptr, counts_ptr, rows, width, pitch, centers, padded,
    EXACT: tl.constexpr, DISTANCES: tl.constexpr, SQUARES: tl.constexpr, CENTRED: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Labels of BLOCK_M rows and what is asked for beside them; all centres fit one tile."""
    row = tl.program_id(0) * BLOCK_M
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k, inside = tl.arange(0, BLOCK_K), r < rows
    acc, squares = products(
        x, high, low, middle_ptr, tl.load(scale_ptr), row, r, inside, 0, width, pitch, centers, padded,
        EXACT or SQUARES, True, CENTRED, TMA, BLOCK_M, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    bias = tl.load(bias_ptr + centers + k, mask=k < centers, other=0.0)
    score = tl.where(k[None, :] < centers, bias[None, :] - 2 * acc, float("inf"))
    best = tl.min(score, 1)
    labels = tl.min(tl.where(score == best[:, None], k[None, :], BLOCK_K), 1)
    second = tl.min(tl.where(k[None, :] == labels[:, None], float("inf"), score), 1)
    labels = tl.minimum(labels, centers - 1).to(tl.int64)  # of a row that is all NaN
    tl.store(labels_ptr + r, labels, mask=inside)
    if SQUARES:
        tl.store(squares_ptr + r, squares, mask=inside)
    if EXACT:
        certain = second - best > 2 * error_of(squares, limits_ptr + 2)
        put_down(inside & ~certain, r, listed_ptr, counts_ptr + 1, rows - 1, -1)
    if DISTANCES:
        distances = squared_distance(x_ptr, centers_ptr, r, inside, labels, width, pitch, BLOCK_M, BLOCK_D)
        tl.store(distances_ptr + r, distances, mask=inside)


@triton.jit
def _keys(acc, bias_ptr, first, centers, BLOCK_K: tl.constexpr):
    """Scores whose last bits hold their column, so that one comparison finds both."""
    k = tl.arange(0, BLOCK_K)
    bias = tl.load(bias_ptr + first + k, mask=first + k < centers, other=0.0)
    score = tl.where((first + k)[None, :] < centers, bias[None, :] - 2 * acc, FAR)
    bits = score.to(tl.int32, bitcast=True)
    return ((bits & -BLOCK_K) | k[None, :]).to(tl.float32, bitcast=True)


@triton.jit
def _merge(acc, bias_ptr, first, centers, v0, v1, v2, v3, k0, k1, k2, BLOCK_K: tl.constexpr):
    """The four best keys so far and the centres of three, with those of one more tile."""
    keys = _keys(acc, bias_ptr, first, centers, BLOCK_K)
    for i in tl.static_range(4):
        v = tl.min(keys, 1)
        if i < 3:
            keys = tl.where(keys == v[:, None], FAR, keys)
        k = first + (v.to(tl.int32, bitcast=True) & (BLOCK_K - 1))
        below0, below1, below2 = v < v0, v < v1, v < v2
        v3 = tl.where(below2, v2, tl.minimum(v, v3))
        v2, k2 = tl.where(below1, v1, tl.where(below2, v, v2)), tl.where(below1, k1, tl.where(below2, k, k2))
        v1, k1 = tl.where(below0, v0, tl.where(below1, v, v1)), tl.where(below0, k0, tl.where(below1, k, k1))
        v0, k0 = tl.where(below0, v, v0), tl.where(below0, k, k0)
    return v0, v1, v2, v3, k0, k1, k2


@triton.jit
def many_kernel(
    x, x_ptr, high, low, middle_ptr, bias_ptr, limits_ptr, scale_ptr, centers_ptr, labels_ptr, distances_ptr,
    squares_ptr, nearest_ptr, listed_ptr, counts_ptr, rows, width, pitch, centers, padded,
    EXACT: tl.constexpr, DISTANCES: tl.constexpr, SQUARES: tl.constexpr, CENTRED: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Labels of BLOCK_M rows, and of those in doubt up to three centres to choose from (-1: none)."""
    row = tl.program_id(0) * BLOCK_M
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = r < rows
    v0 = tl.full([BLOCK_M], FAR, tl.float32)
    v1, v2, v3 = v0, v0, v0
    k0 = tl.zeros([BLOCK_M], tl.int32)
    k1, k2 = k0, k0
    acc, squares = products(
        x, high, low, middle_ptr, tl.load(scale_ptr), row, r, inside, 0, width, pitch, centers, padded,
        EXACT or SQUARES, False, CENTRED, TMA, BLOCK_M, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    v0, v1, v2, v3, k0, k1, k2 = _merge(acc, bias_ptr, 0, centers, v0, v1, v2, v3, k0, k1, k2, BLOCK_K)
    for first in tl.range(BLOCK_K, centers, BLOCK_K):
        acc, _ = products(
            x, high, low, middle_ptr, tl.load(scale_ptr), row, r, inside, first, width, pitch, centers, padded,
            False, False, CENTRED, TMA, BLOCK_M, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        v0, v1, v2, v3, k0, k1, k2 = _merge(acc, bias_ptr, first, centers, v0, v1, v2, v3, k0, k1, k2, BLOCK_K)
    labels = tl.minimum(k0, centers - 1).to(tl.int64)
    tl.store(labels_ptr + r, labels, mask=inside)
    if SQUARES:
        tl.store(squares_ptr + r, squares, mask=inside)
    if EXACT:
        limit = v0 + 2 * error_of(squares, limits_ptr)
        certain, few = v1 > limit, v3 > limit
        put_down(inside & few & ~certain, r, listed_ptr, counts_ptr, 0, 1)
        put_down(inside & ~few, r, listed_ptr, counts_ptr + 1, rows - 1, -1)
        chosen = nearest_ptr + 3 * r
        tl.store(chosen, k0, mask=inside)
        tl.store(chosen + 1, tl.where(v1 > limit, -1, k1), mask=inside)
        tl.store(chosen + 2, tl.where(v2 > limit, -1, k2), mask=inside)
    if DISTANCES:
        distances = squared_distance(x_ptr, centers_ptr, r, inside, labels, width, pitch, BLOCK_M, 64)
        tl.store(distances_ptr + r, distances, mask=inside)


def nearest(
    x: Tensor, centers: Tensor, subsidies: Tensor | None, exact: bool, *, distances: bool
) -> tuple[Tensor, Tensor, Centers]:
    """Labels; squared distances, or else ||x - m||^2 in the units of the centres' scale, squared; the centres."""
    few = len(centers) <= FEW
    plan = (few_tiles if few else many_tiles)(x, len(centers))
    ready = prepare(x, centers, None if subsidies is None else subsidies.contiguous(), few_tiles(x, FEW).BLOCK_D)
    labels = x.new_empty(len(x), dtype=torch.int64)
    numbers = x.new_empty(len(x), dtype=torch.float32)
    if not len(x):
        return labels, numbers, ready
    listed = x.new_empty(len(x) if exact else 0, dtype=torch.int32)
    counts = torch.zeros(2, dtype=torch.int32, device=x.device)
    chosen = x.new_empty(len(x) if exact and not few else 0, KEPT, dtype=torch.int32)
    _launch(x, ready, plan, few, labels, numbers, chosen, listed, counts, exact, distances)
    if exact:
        recheck(x, ready, labels, numbers if distances else None, chosen, listed, counts)
    return labels, numbers, ready


def _launch(
    x: Tensor, ready: Centers, plan: Tiles, few: bool, labels, numbers, chosen, listed, counts, exact, distances
) -> None:
    tma = tma_reads(x)
    source = described(x, plan.BLOCK_M, plan.BLOCK_D) if tma else x
    operands = ready.parts(plan.BLOCK_K, plan.BLOCK_D, tma)
    outputs = (labels, numbers, numbers) if few else (labels, numbers, numbers, chosen)
    kernel = few_kernel if few else many_kernel
    kernel[(cdiv(len(x), plan.BLOCK_M),)](
        source, x, *operands, ready.middle, ready.bias, ready.limits, ready.scale, ready.given, *outputs, listed,
        counts, len(x), x.shape[1], x.stride(0), len(ready.high), ready.high.shape[1],
        EXACT=exact, DISTANCES=distances, SQUARES=not distances, CENTRED=x.dtype == torch.float32, TMA=tma,
        **plan.options(),
    )  # fmt: skip
