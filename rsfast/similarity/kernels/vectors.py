"""Kernels over rows and columns, between the passes over pairs: sums, losses, factors of the gradients.

They stand for some two hundred small operations of PyTorch, which would take longer than the pairs of a middling batch.
What cancels is in float64: at a row a time it costs nothing. ``scalars``, one buffer a call:

====  ==============================================================================================
0     factor from products to logits in base 2
1     m, the constant in the exponent
2     factor from products to scores
3     the logits' bias in base 2
4, 5  first pass: smoothing's share of a pair in its row and its column;
      second pass: their sum, and the weight of the triplet's or sigmoid's part, both in units of G
6     what a unit of the stored G stands for
7, 8  factors of G b and of G^T a
9     gradient by the contrastive loss times the scale
10    gradient by the triplet or sigmoid loss times its weight
====  ==============================================================================================
"""

import triton
import triton.language as tl

from rsfast._tiles import LN2, LOG2E, cast
from rsfast.similarity.kernels.forward import sigmoid

SCALARS = 11
HIGHEST = tl.constexpr(122.6)  # base-2 logarithm that no sum of exponentials reaches: fp32 ends at 2^128
SPAN = tl.constexpr(100.0)  # exponents down to minus this leave sums of them exact
LOWEST = tl.constexpr(-126.0)  # exponentials below are flushed to zero
SMALLEST = tl.constexpr(2.0**-100)  # share of a row that is the unit of G: less, and factors of it overflow
LEAST = tl.constexpr(-110.0)  # exponent of the smallest unit, which FULL must not take below fp32's normal numbers
SHARP = tl.constexpr(60.0)  # scores above may overflow exp(-S), which the triplet's two directions share


@triton.jit
def _unit(bound, FULL: tl.constexpr):
    """A power of two near the largest entry of G, so that stored in units of it G ends near FULL."""
    return tl.where(bound > 0, tl.exp2(tl.maximum(tl.ceil(tl.log2(bound)), LEAST)), 1.0) / FULL


@triton.jit
def _largest(ptr, n, stride, BLOCK: tl.constexpr):
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(ptr + at * stride, mask=at < n, other=0.0).to(tl.float32))
    return tl.max(largest, 0)


@triton.jit
def scalars_kernel(
    scalars_ptr, wide_ptr, norms_ptr, blocks, scales_ptr, scale_ptr, bias_ptr, pairs, smooth_row, smooth_column, weight,
    steepest, FULL: tl.constexpr, PARTS: tl.constexpr, SHARED_EXP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a call's kernels need to know of the whole batch; ``weight`` and ``steepest`` are for one-pass losses.

    ``pairs``: logarithm of the terms in a sum. ``steepest``: bound on a pair's derivative. ``SHARED_EXP``: the triplet
    shares exp(-S), unless the norms are too large for it.
    """
    bound = tl.sqrt(_largest(norms_ptr, blocks, 2, BLOCK) * _largest(norms_ptr + 1, blocks, 2, BLOCK))
    to_score, by_a, by_b = 1.0, 1.0, 1.0
    if PARTS == 2:
        by_b = 1 / tl.load(scales_ptr)
        by_a = 1 / tl.load(scales_ptr + 1)
        to_score = by_a * by_b
    scale, bias = 1.0, 0.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr).to(tl.float32)
    size = weight * tl.abs(scale)
    unit = _unit(size * steepest, FULL)
    tl.store(scalars_ptr, to_score * (scale * LOG2E))
    top = tl.abs(scale) * bound * LOG2E
    # the largest exponent at 0, where fp32 is finest, unless the smallest would be flushed to zero or a sum overflow
    tl.store(scalars_ptr + 1, tl.maximum(top + pairs - HIGHEST, tl.minimum(top, SPAN - top)))
    tl.store(scalars_ptr + 2, to_score)
    tl.store(scalars_ptr + 3, bias * LOG2E)
    tl.store(scalars_ptr + 4, smooth_row)
    tl.store(scalars_ptr + 5, tl.where(weight > 0, weight * scale / unit, smooth_column))
    tl.store(scalars_ptr + 6, unit)
    tl.store(scalars_ptr + 7, unit * by_a)
    tl.store(scalars_ptr + 8, unit * by_b)
    tl.store(scalars_ptr + 9, 0.0)
    tl.store(scalars_ptr + 10, weight * scale)
    if SHARED_EXP:
        tl.store(wide_ptr, (bound > SHARP).to(tl.int32))
    else:
        tl.store(wide_ptr, 0)


@triton.jit
def _share(gap):
    """Probability of everything but the positive, from the base-2 logarithm of its odds."""
    return 1 / (1 + tl.exp2(-gap))


@triton.jit
def _softplus(gap):
    """ln(1 + 2^gap), to the last bits of a small one."""
    p = tl.exp2(-tl.abs(gap))
    series = p * (1 - p * (0.5 - p * (1 / 3 - p * 0.25)))
    return tl.maximum(gap, 0.0) * LN2 + tl.where(p < 0.001, series, tl.log2(1 + p) * LN2)


@triton.jit
def sums_kernel(
    parts_ptr, logs_ptr, found_ptr, scalars_ptr, wide_ptr, scale_ptr, d_ptr, share_ptr, n_parts, n, hard, soft, least,
    DIAGONAL: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Logarithms of the sums of rows (or columns), and of a block of them: loss, largest share, whether one was lost.

    A row weighs ``hard`` for its targets, if it has one, and ``soft`` for its smoothing. ``least``: a sum below may
    lack what was flushed to zero.
    """
    if tl.load(wide_ptr) != EXACT:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    shift = tl.load(scalars_ptr + 1).to(tl.float64)
    top = tl.zeros([BLOCK], tl.float32)
    if EXACT:
        top += float("-inf")
        for t in range(0, n_parts, BLOCK_T):
            ts = t + tl.arange(0, BLOCK_T)
            mask = (ts[:, None] < n_parts) & inside[None, :]
            part = tl.load(parts_ptr + ts[:, None].to(tl.int64) * n + at[None, :], mask=mask, other=float("-inf"))
            top = tl.maximum(top, tl.max(part, 0))
        top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK], tl.float32)
    for t in range(0, n_parts, BLOCK_T):
        ts = t + tl.arange(0, BLOCK_T)
        mask = (ts[:, None] < n_parts) & inside[None, :]
        pointers = parts_ptr + ts[:, None].to(tl.int64) * n + at[None, :]
        if EXACT:
            total += tl.sum(tl.exp2(tl.load(pointers, mask=mask, other=float("-inf")) - top[None, :]), 0)
        else:
            total += tl.sum(tl.load(pointers, mask=mask, other=0.0), 0)
    logs = tl.log2(tl.where(inside, total, 1.0).to(tl.float64)) + top.to(tl.float64)
    lost = total < least
    if not EXACT:
        logs += shift
    weight = tl.zeros([BLOCK], tl.float64) + (hard + soft)
    if DIAGONAL:
        own = tl.load(scale_ptr).to(tl.float64) / LN2 * tl.load(d_ptr + at, mask=inside, other=0.0).to(tl.float64)
        gap = logs - own
        loss, share = _softplus(gap), _share(gap)
        lost = lost & (own - shift < tl.log2(least + 0.0) - LOWEST)
    else:
        loss, share = LN2 * logs, tl.zeros([BLOCK], tl.float64)
        if share_ptr is not None:
            weight = soft + hard * (tl.load(share_ptr + at, mask=inside, other=0.0) > 0)
    out = found_ptr + 3 * tl.program_id(0)
    tl.store(logs_ptr + at, logs, mask=inside)
    tl.store(out, tl.sum(tl.where(inside & (weight > 0), weight * loss, 0.0), 0))
    tl.store(out + 1, tl.max(tl.where(inside, share, 0.0), 0))
    tl.store(out + 2, tl.max((lost & inside).to(tl.float64), 0))


@triton.jit
def _sum(ptr, n, stride, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + at * stride, mask=at < n, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def losses_kernel(
    contrastive_ptr, triplet_ptr, found_ptr, totals_ptr, scale_ptr, wide_ptr, next_ptr, n_found, n_totals, weight,
    EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both losses; after the pass without maxima also whether the one with them has to run."""
    if tl.load(wide_ptr) != EXACT:
        if not EXACT:
            tl.store(next_ptr, 1)
        return
    scale = tl.load(scale_ptr).to(tl.float64)
    aligned = _sum(totals_ptr, n_totals, 2, BLOCK)
    tl.store(contrastive_ptr, (_sum(found_ptr, n_found, 3, BLOCK) - scale * aligned).to(tl.float32))
    tl.store(triplet_ptr, (weight * _sum(totals_ptr + 1, n_totals, 2, BLOCK)).to(tl.float32))
    if not EXACT:
        tl.store(next_ptr, (_sum(found_ptr + 2, n_found, 3, BLOCK) > 0).to(tl.int32))


@triton.jit
def grad_scalars_kernel(
    scalars_ptr, dcontrastive_ptr, dtriplet_ptr, scale_ptr, found_ptr, row_blocks, column_blocks, row, column, smooth,
    weight, steepest,
    FULL: tl.constexpr, TIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second pass's scalars from the first one's. ``TIGHT``: the largest shares bound G, else the rows' weights."""
    steep = tl.load(dcontrastive_ptr) * tl.load(scale_ptr).to(tl.float32)
    other = 0.0
    if dtriplet_ptr is not None:
        other += tl.load(dtriplet_ptr) * weight
    bound = row + column
    if TIGHT:
        columns = found_ptr + 3 * row_blocks + 1
        bound = row * _largest(found_ptr + 1, row_blocks, 3, BLOCK) + column * _largest(
            columns, column_blocks, 3, BLOCK
        )
        bound = tl.maximum(bound, (row + column) * SMALLEST)
    old = tl.load(scalars_ptr + 6)
    unit = _unit((tl.abs(steep) * bound + tl.abs(other) * steepest).to(tl.float32), FULL)
    tl.store(scalars_ptr + 4, steep * smooth / unit)
    tl.store(scalars_ptr + 5, other / unit)
    tl.store(scalars_ptr + 6, unit)
    tl.store(scalars_ptr + 7, tl.load(scalars_ptr + 7) / old * unit)
    tl.store(scalars_ptr + 8, tl.load(scalars_ptr + 8) / old * unit)
    tl.store(scalars_ptr + 9, steep)
    tl.store(scalars_ptr + 10, other)


@triton.jit
def factors_kernel(
    logs_ptr, other_ptr, lse_ptr, coef_ptr, own_ptr, share_ptr, other_share_ptr, scalars_ptr, wide_ptr, scale_ptr,
    d_ptr, n, hard, soft, other_hard, other_soft, apart,
    DIAGONAL: tl.constexpr, OWN: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's (or column's) factor in G, the logarithm of its whole sum, and with ``OWN`` its positive's gradient.

    ``apart``: the part of smoothing that a row's and a column's other pairs have.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    steep, shift = tl.load(scalars_ptr + 9).to(tl.float64), tl.load(scalars_ptr + 1).to(tl.float64)
    logs = tl.load(logs_ptr + at, mask=inside, other=0.0)
    weight = tl.zeros([BLOCK], tl.float64) + (hard + soft)
    if DIAGONAL:
        own = tl.load(scale_ptr).to(tl.float64) / LN2 * tl.load(d_ptr + at, mask=inside, other=0.0).to(tl.float64)
        gap = logs - own
        logs = tl.maximum(logs, own) + tl.log2(1 + tl.exp2(-tl.abs(gap)))
        if OWN:
            slope = apart - (hard + soft) * _share(gap)
            if share_ptr is not None:
                slope += hard - tl.load(share_ptr + at, mask=inside, other=0.0)
            if BOTH:
                slope -= (other_hard + other_soft) * _share(tl.load(other_ptr + at, mask=inside, other=0.0) - own)
                if share_ptr is not None:
                    slope += other_hard - tl.load(other_share_ptr + at, mask=inside, other=0.0)
            tl.store(own_ptr + at, (steep * slope).to(tl.float32), mask=inside)
    elif share_ptr is not None:
        weight = soft + hard * (tl.load(share_ptr + at, mask=inside, other=0.0) > 0)
    factor = weight * steep / tl.load(scalars_ptr + 6)
    if tl.load(wide_ptr) == 0:
        factor *= tl.exp2(shift - logs)
    tl.store(coef_ptr + at, factor.to(tl.float32), mask=inside)
    tl.store(lse_ptr + at, logs.to(tl.float32), mask=inside)


@triton.jit
def finish_kernel(
    acc_ptr, out_ptr, other_ptr, own_ptr, rows_by_ptr, columns_by_ptr, factor_ptr, weight_ptr, n, first, n_own, D,
    pitch, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acc * factor + own * other: a gradient with its positives; ``own`` is of the rows from ``first`` on."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = row - first
    mine = (i >= 0) & (i < n_own)
    own = tl.zeros([BLOCK_R], tl.float32)
    if own_ptr is not None:
        own += tl.load(own_ptr + i, mask=mine, other=0.0)
    if rows_by_ptr is not None:  # the triplet's positives
        by = tl.load(rows_by_ptr + i, mask=mine, other=0.0) + tl.load(columns_by_ptr + i, mask=mine, other=0.0)
        own -= tl.load(weight_ptr) * by
    mask = (row < n)[:, None] & (column < D)[None, :]
    at = row[:, None].to(tl.int64) * D + column[None, :]
    other = other_ptr + i[:, None].to(tl.int64) * pitch + column[None, :]
    other = tl.load(other, mask=mine[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    out = tl.load(acc_ptr + at, mask=mask, other=0.0) * tl.load(factor_ptr) + own[:, None] * other
    tl.store(out_ptr + at, cast(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_grad_kernel(dscale_ptr, totals_ptr, scalars_ptr, scale_ptr, own_ptr, d_ptr, n_totals, n, BLOCK: tl.constexpr):
    """Gradient of the scale: all of G times S, over the scale."""
    by_pairs = _sum(totals_ptr, n_totals, 3, BLOCK) * tl.load(scalars_ptr + 6) * tl.load(scalars_ptr + 2)
    by_own = tl.zeros([BLOCK], tl.float64)
    if own_ptr is not None:
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            own = tl.load(own_ptr + at, mask=at < n, other=0.0).to(tl.float64)
            by_own += own * tl.load(d_ptr + at, mask=at < n, other=0.0)
    grad = (by_pairs + tl.sum(by_own, 0)) / tl.load(scale_ptr).to(tl.float64)
    tl.store(dscale_ptr, cast(grad.to(tl.float32), dscale_ptr.dtype.element_ty))


@triton.jit
def pairwise_kernel(
    out_ptr, own_ptr, totals_ptr, scalars_ptr, scale_ptr, bias_ptr, d_ptr, n_totals, n, weight,
    LOSS_AT: tl.constexpr, STRIDE: tl.constexpr, SIGMOID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of a sum over pairs and its gradients by scale and bias, with the positives of the sigmoid loss."""
    loss = _sum(totals_ptr + LOSS_AT, n_totals, STRIDE, BLOCK)
    tl.store(out_ptr + 1, 0.0)
    tl.store(out_ptr + 2, 0.0)
    if SIGMOID:
        scale, bias = tl.load(scale_ptr).to(tl.float32), 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr).to(tl.float32)
        positives = tl.zeros([BLOCK], tl.float64)
        by_scale = tl.zeros([BLOCK], tl.float64)
        by_bias = tl.zeros([BLOCK], tl.float64)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            d = tl.load(d_ptr + at, mask=at < n, other=0.0)
            f, slope = sigmoid(-(scale * d + bias) * LOG2E)
            positives += tl.where(at < n, f, 0.0)
            own = tl.where(at < n, -weight * scale * slope, 0.0)
            by_scale += own * d
            by_bias += own
            tl.store(own_ptr + at, own, mask=at < n)
        loss += tl.sum(positives, 0)
        if STRIDE == 3:
            unit, to_score = tl.load(scalars_ptr + 6), tl.load(scalars_ptr + 2)
            dscale = tl.sum(by_scale, 0) + _sum(totals_ptr, n_totals, STRIDE, BLOCK) * unit * to_score
            dbias = tl.sum(by_bias, 0) + _sum(totals_ptr + 1, n_totals, STRIDE, BLOCK) * unit
            tl.store(out_ptr + 1, (dscale / scale).to(tl.float32))
            tl.store(out_ptr + 2, (dbias / scale).to(tl.float32))
    tl.store(out_ptr, (weight * loss).to(tl.float32))
