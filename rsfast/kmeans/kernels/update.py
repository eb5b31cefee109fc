"""Sums by label. Of few labels they are products with the labels' indicators, which tensor cores multiply exactly.

16-bit rows are such products as they are. fp32 numbers, and rows times their weights in fp32, are three bf16 parts of 8
bits each, cut off and not rounded, so that the parts add up to the number and none overflows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast._tiles import cast, cdiv, dot
from rsfast.kmeans.kernels.plan import CHUNK, sums_by_product, sums_tiles
from rsfast.kmeans.kernels.segments import segments
from rsfast.kmeans.reference import Update


@triton.jit
def _cut(x):
    """The upper 8 bits of fp32 numbers, in bf16, and the rest."""
    upper = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return upper.to(tl.bfloat16), x - upper


@triton.jit
def sums_kernel(
    x_ptr, labels_ptr, weights_ptr, part_ptr, rows, width, pitch, clusters, chunk,
    WEIGHTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """part[chunk] = indicators^T x over a chunk of rows; BLOCK_M rows at a time leave the tensor cores."""
    split = tl.program_id(1)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = split.to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, rows)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in tl.range(begin, end, BLOCK_M):
        r = first + tl.arange(0, BLOCK_M)
        labels = tl.load(labels_ptr + r, mask=r < end, other=-1).to(tl.int32)
        mask = (r < end)[:, None] & (d < width)[None, :]
        x = tl.load(x_ptr + r[:, None] * pitch + d[None, :], mask=mask, other=0.0)
        members = k[:, None] == labels[None, :]
        part = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        if WEIGHTED or x.dtype == tl.float32:
            x = x.to(tl.float32)
            if WEIGHTED:
                x *= tl.load(weights_ptr + r, mask=r < end, other=0.0).to(tl.float32)[:, None]
            one = cast(members.to(tl.float32), tl.bfloat16)
            a, rest = _cut(x)
            b, rest = _cut(rest)
            c, _ = _cut(rest)
            acc += dot(one, a, dot(one, b, dot(one, c, part)))
        else:
            acc += dot(cast(members.to(tl.float32), x.dtype), x, part)
    at = (split.to(tl.int64) * clusters + k[:, None]) * width + d[None, :]
    tl.store(part_ptr + at, acc, mask=(k < clusters)[:, None] & (d < width)[None, :])


@triton.jit
def counts_kernel(
    labels_ptr, weights_ptr, part_ptr, rows, clusters, chunk,
    WEIGHTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """part[chunk] = sums of the weights of a chunk of rows by label, in float64."""
    split = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin = split.to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, rows)
    acc = tl.zeros([BLOCK_K], tl.float64)
    for first in tl.range(begin, end, BLOCK_M):
        r = first + tl.arange(0, BLOCK_M)
        members = k[None, :] == tl.load(labels_ptr + r, mask=r < end, other=-1).to(tl.int32)[:, None]
        if WEIGHTED:
            weights = tl.load(weights_ptr + r, mask=r < end, other=0.0).to(tl.float64)
            acc += tl.sum(tl.where(members, weights[:, None], 0.0), 0)
        else:
            acc += tl.sum(members.to(tl.int32), 0).to(tl.float64)
    tl.store(part_ptr + split.to(tl.int64) * clusters + k, acc, mask=k < clusters)


def update(x: Tensor, labels: Tensor, clusters: int, weights: Tensor | None) -> Update:
    """In either way; what decides is only how many clusters there are, and the dtype."""
    rows, width = x.shape
    if not rows:
        return Update(x.new_zeros(clusters, width, dtype=torch.float32), x.new_zeros(clusters, dtype=torch.float64))
    weights = None if weights is None else weights.contiguous()
    if not sums_by_product(x, clusters, weights is not None):
        return segments(x, labels.contiguous(), clusters, weights)
    return _products(x, labels.contiguous(), clusters, weights)


def _products(x, labels, clusters, weights) -> Update:
    rows, width = x.shape
    plan, splits = sums_tiles(x, clusters)
    chunk = cdiv(cdiv(rows, splits), plan.BLOCK_M) * plan.BLOCK_M
    splits = cdiv(rows, chunk)
    part = x.new_empty(splits, clusters, width, dtype=torch.float32)
    sums_kernel[(cdiv(width, plan.BLOCK_D), splits, cdiv(clusters, plan.BLOCK_K))](
        x, labels, weights, part, rows, width, x.stride(0), clusters, chunk,
        WEIGHTED=weights is not None, **plan.options(),
    )  # fmt: skip
    each = x.new_empty(cdiv(rows, CHUNK), clusters, dtype=torch.float64)
    counts_kernel[(len(each), cdiv(clusters, plan.BLOCK_K))](
        labels, weights, each, rows, clusters, CHUNK,
        WEIGHTED=weights is not None, BLOCK_M=64, BLOCK_K=plan.BLOCK_K, num_warps=4,
    )  # fmt: skip
    return Update(part.sum(0), each.sum(0))
