"""Tile maths that the kernels of k-means share.

A score is ``bias_k - 2 x . c'_k``: a row's squared distance to a centre without what all centres have in common, with
c' = (c - m) times a power of two, in one or two 16-bit parts. fp32 rows are read as (x - m) times that power, in as
many bf16 parts; 16-bit rows are operands as they are. ``prepare.py`` makes c', the biases and what bounds the errors.
"""

import triton
import triton.language as tl

from rsfast._tiles import cast, dot, operand


@triton.jit
def rows_at(x, row, r, inside, column, width, pitch, TMA: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``r`` (int64) from ``column`` on, zero outside; of a descriptor, those from ``row`` on."""
    if TMA:
        return x.load([row, column])
    else:
        d = column + tl.arange(0, BLOCK_D)
        return tl.load(x + r[:, None] * pitch + d[None, :], mask=inside[:, None] & (d[None, :] < width), other=0.0)


@triton.jit
def products(
    x, high, low, middle_ptr, scale, row, r, inside, first, width, pitch, centers, padded, NORMS: tl.constexpr,
    SPLIT: tl.constexpr, CENTRED: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products of rows ``r`` with the centres from ``first`` on, and with ``NORMS`` the rows' ||(x - m) scale||^2.

    ``SPLIT``: with both parts of the centres (and of fp32 rows, their two parts), added up in fp32 outside of the
    tensor cores, which cut sums off.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for d in tl.range(0, width, BLOCK_D):
        tile = rows_at(x, row, r, inside, d, width, pitch, TMA, BLOCK_D)
        b = operand(high, first, d, centers, padded, padded, TMA, BLOCK_K, BLOCK_D).T
        if NORMS or CENTRED:
            middle = tl.load(middle_ptr + d + tl.arange(0, BLOCK_D))
            near = tile.to(tl.float32) * scale - (middle * scale)[None, :]
        if NORMS:
            squares += tl.sum(near * near, 1)
        if CENTRED:  # noqa: SIM108 -- of two dtypes, which a ternary of Triton's may not have
            a = cast(near, tl.bfloat16)
        else:
            a = tile
        if SPLIT:
            part = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            part = dot(a, operand(low, first, d, centers, padded, padded, TMA, BLOCK_K, BLOCK_D).T, part)
            if CENTRED:
                part = dot(cast(near - a.to(tl.float32), tl.bfloat16), b, part)
            acc += dot(a, b, part)  # the large products last, so that the small ones are not cut off
        else:
            acc = dot(a, b, acc)
    return acc, squares


@triton.jit
def error_of(squares, limits_ptr):
    """At most |error| of a row's scores; infinite where numbers may have left the range of fp32."""
    bound = tl.load(limits_ptr) + tl.load(limits_ptr + 1) * tl.sqrt(squares)
    return tl.where(bound < 1e30, bound, float("inf"))  # an infinite norm makes it NaN where centres are all alike


@triton.jit
def put_down(mask, r, listed_ptr, count_ptr, first, STEP: tl.constexpr):
    """The rows of ``mask`` in a list that grows from ``first`` on; their order is of no account."""
    ones = mask.to(tl.int32)
    at = tl.atomic_add(count_ptr, tl.sum(ones, 0), sem="relaxed") + tl.cumsum(ones, 0) - 1
    tl.store(listed_ptr + (first + STEP * at), r.to(tl.int32), mask=mask)


@triton.jit
def squared_distance(x_ptr, centers_ptr, r, inside, labels, width, pitch, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """||x - c||^2 of rows and the centres of their labels, from differences."""
    total = tl.zeros([BLOCK_M], tl.float32)
    for d in tl.range(0, width, BLOCK_D):
        at = d + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (at[None, :] < width)
        x = tl.load(x_ptr + r[:, None] * pitch + at[None, :], mask=mask, other=0.0).to(tl.float32)
        c = tl.load(centers_ptr + labels[:, None] * width + at[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum((x - c) * (x - c), 1)
    return total
