"""First pass over the pairs: what the losses need of all scores, without their gradients.

The softmax of rows and columns shares one exponential: exp2(x - m), x the logits and m a constant of the whole batch.
Its sums leave out the positives. Where such a sum could underflow a device flag is set, and the same kernel runs again
with ``EXACT``, a maximum for each tile's rows and columns; whichever does not apply returns at once.
"""

import triton
import triton.language as tl

from rsfast._tiles import LN2, LOG2E, pieces, place
from rsfast.similarity.kernels.tiles import at_edge, inside, scores, violation, weighed


@triton.jit
def _log_sum(x, AXIS: tl.constexpr):
    """log2 of the sum of exp2, -inf of nothing."""
    top = tl.max(x, AXIS)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log2(tl.sum(tl.exp2(x - tl.expand_dims(top, AXIS)), AXIS))


@triton.jit
def sigmoid(z):
    """ln(1 + exp(z)), to the last bits of a small one, and its derivative; ``z`` in base 2."""
    p = tl.exp2(-tl.abs(z))
    series = p * (1 - p * (0.5 - p * (0.3333333333 - p * (0.25 - p * 0.2))))
    rest = tl.where(p < 0.0625, series, tl.log2(1 + p) * LN2)
    return tl.maximum(z, 0.0) * LN2 + rest, tl.where(z > 0, 1.0, p) / (1 + p)


@triton.jit
def stats_kernel(
    a, b, scalars_ptr, wide_ptr, da_ptr, db_ptr, ids_a_ptr, ids_b_ptr, share_a_ptr, share_b_ptr,
    row_sums_ptr, column_sums_ptr, totals_ptr, n_rows, n_columns, width, diagonal, margin,
    SOFTMAX: tl.constexpr, TRIPLET: tl.constexpr, SIGMOID: tl.constexpr, COLUMNS: tl.constexpr,
    DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, SMOOTH: tl.constexpr, MASK_SAME: tl.constexpr,
    EXACT: tl.constexpr, GAMMA: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
    GROUP: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of exponentials for each row and column of a tile; totals of what else is summed over all pairs.

    ``scalars``: factor from products to base-2 logits, m, factor from products to scores, the logits' bias in base 2,
    smoothing's share of a pair in its row and in its column. ``totals``, for each program: targets times scores, loss
    of triplets or sigmoids.
    """
    if tl.load(wide_ptr) != EXACT:
        return
    to_logit, shift, to_score, bias = (
        tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2), tl.load(scalars_ptr + 3),
    )  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_columns, BLOCK_N)
    PIECE: tl.constexpr = BLOCK_N // PIECES
    aligned, lost = 0.0, 0.0
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pm, pn = place(tile, tiles_m, tiles_n, GROUP)
        row, column = pm * BLOCK_M, pn * BLOCK_N
        acc = scores(
            a, b, row, column, n_rows, n_columns, width, PARTS, TMA, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
        edge = at_edge(row, column, n_rows, n_columns, diagonal, DIAGONAL, BLOCK_M, BLOCK_N)
        rows = row + tl.arange(0, BLOCK_M)
        in_rows = rows < n_rows
        parts = pieces(acc, BLOCK_M, BLOCK_N, PIECES)
        for i in tl.static_range(PIECES):
            x = parts[i]
            columns = column + i * PIECE + tl.arange(0, PIECE)
            in_columns = columns < n_columns
            if SOFTMAX:
                if EXACT:
                    keep = inside(rows, columns, n_rows, n_columns, diagonal, DIAGONAL)
                    z = tl.where(keep, x * to_logit, float("-inf"))
                    row_sum = _log_sum(z, 1)
                    if COLUMNS:
                        column_sum = _log_sum(z, 0)
                else:
                    e = tl.exp2(x * to_logit - shift)
                    if edge:
                        e = tl.where(inside(rows, columns, n_rows, n_columns, diagonal, DIAGONAL), e, 0.0)
                    row_sum = tl.sum(e, 1)
                    if COLUMNS:
                        column_sum = tl.sum(e, 0)
                at = (pn * PIECES + i).to(tl.int64) * n_rows
                tl.store(row_sums_ptr + at + rows, row_sum, mask=in_rows)
                if COLUMNS:
                    tl.store(column_sums_ptr + pm.to(tl.int64) * n_columns + columns, column_sum, mask=in_columns)
            if TRIPLET or HAS_IDS or SMOOTH:
                s = x * to_score
                da = tl.zeros([BLOCK_M, 1], tl.float32)
                db = tl.zeros([1, PIECE], tl.float32)
                if DIAGONAL:
                    da = tl.load(da_ptr + rows, mask=in_rows, other=0.0)[:, None]
                    db = tl.load(db_ptr + columns, mask=in_columns, other=0.0)[None, :]
            if HAS_IDS:
                same = (
                    tl.load(ids_a_ptr + rows, mask=in_rows, other=-1)[:, None]
                    == tl.load(ids_b_ptr + columns, mask=in_columns, other=-2)[None, :]
                )
            if SOFTMAX and (HAS_IDS or SMOOTH):
                ya = tl.zeros([BLOCK_M, PIECE], tl.float32)
                yb = tl.zeros([BLOCK_M, PIECE], tl.float32)
                if HAS_IDS:
                    ya = tl.where(same, tl.load(share_a_ptr + rows, mask=in_rows, other=0.0)[:, None], 0.0)
                    yb = tl.where(same, tl.load(share_b_ptr + columns, mask=in_columns, other=0.0)[None, :], 0.0)
                if SMOOTH:
                    ya += tl.load(scalars_ptr + 4)
                    yb += tl.load(scalars_ptr + 5)
                y = ya * (s - da) + yb * (s - db)
                if edge:
                    y = tl.where(inside(rows, columns, n_rows, n_columns, diagonal, DIAGONAL), y, 0.0)
                aligned += tl.sum(y)
            if TRIPLET:
                e = tl.exp2(s * -LOG2E)
                ca, ua = violation(s, da, e, margin, EXACT, GAMMA == 0)
                cb, ub = violation(s, db, e, margin, EXACT, GAMMA == 0)
                f = weighed(ca, ua, GAMMA) + weighed(cb, ub, GAMMA)
                if MASK_SAME:
                    f = tl.where(same, 0.0, f)
                if edge:
                    f = tl.where(inside(rows, columns, n_rows, n_columns, diagonal, DIAGONAL), f, 0.0)
                lost += tl.sum(f)
            if SIGMOID:
                z = x * to_logit + bias
                if edge:  # a pair that does not count has no loss
                    z = tl.where(inside(rows, columns, n_rows, n_columns, diagonal, DIAGONAL), z, -1e4)
                f, _ = sigmoid(z)
                lost += tl.sum(f)
    out = totals_ptr + tl.program_id(0) * 2
    tl.store(out, aligned)
    tl.store(out + 1, lost)
