"""Second pass over the pairs: a block of G, the losses' gradient in the scores, for two matrix products.

Positives are kept out of it: their gradient nearly cancels, so it is added in fp32 afterwards. G is divided by a power
of two near its largest entry (and, in fp16, multiplied by 2^14), so that nothing is lost to the range of 16 bits.
"""

import triton
import triton.language as tl

from rsfast._tiles import LOG2E, cast, pieces, place
from rsfast.similarity.kernels.forward import sigmoid
from rsfast.similarity.kernels.tiles import at_edge, inside, scores, violation, weighed, weighed_grad


@triton.jit
def _store(g, value, row, column, n_rows, n_columns, pitch, TMA: tl.constexpr,
           BLOCK_M: tl.constexpr, PIECE: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    if TMA:
        g.store([row, column], cast(value, dtype))
    else:
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, PIECE)
        out = g + rows[:, None].to(tl.int64) * pitch + columns[None, :]
        tl.store(out, cast(value, dtype), mask=(rows[:, None] < n_rows) & (columns[None, :] < n_columns))


@triton.jit
def grad_kernel(
    a, b, g, g_low, scalars_ptr, wide_ptr, da_ptr, db_ptr, ids_a_ptr, ids_b_ptr, share_a_ptr, share_b_ptr,
    lse_a_ptr, lse_b_ptr, coef_a_ptr, coef_b_ptr, row_sums_ptr, column_sums_ptr, totals_ptr,
    n_rows, n_columns, width, pitch, diagonal, margin,
    SOFTMAX: tl.constexpr, TRIPLET: tl.constexpr, SIGMOID: tl.constexpr, LOSS: tl.constexpr,
    DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, SMOOTH: tl.constexpr, MASK_SAME: tl.constexpr,
    EXACT: tl.constexpr, GAMMA: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
    STORE: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G of every pair but the positives, in ``DTYPE``, for fp32 in two parts.

    ``scalars``: factor from products to base-2 logits, m, factor from products to scores, the logits' bias in base 2,
    smoothing's share of a pair, weight of the triplet's or sigmoid's part. ``coef``: the softmax's factors of a row and
    a column; ``lse`` (``EXACT``): their logarithms of sums. ``row_sums``, ``column_sums``: the triplet's derivative by
    the positive's score. ``totals``, for each program: G times products, G (sigmoid), loss.
    """
    if tl.load(wide_ptr) != EXACT:
        return
    to_logit, shift, to_score, bias, smoothing, weight = (
        tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2), tl.load(scalars_ptr + 3),
        tl.load(scalars_ptr + 4), tl.load(scalars_ptr + 5),
    )  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_columns, BLOCK_N)
    PIECE: tl.constexpr = BLOCK_N // PIECES
    by_scale, by_bias, lost = 0.0, 0.0, 0.0
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
            start = column + i * PIECE
            columns = start + tl.arange(0, PIECE)
            in_columns = columns < n_columns
            if HAS_IDS:
                same = (
                    tl.load(ids_a_ptr + rows, mask=in_rows, other=-1)[:, None]
                    == tl.load(ids_b_ptr + columns, mask=in_columns, other=-2)[None, :]
                )
            if SOFTMAX:
                pa = tl.load(coef_a_ptr + rows, mask=in_rows, other=0.0)[:, None]
                pb = tl.load(coef_b_ptr + columns, mask=in_columns, other=0.0)[None, :]
                if EXACT:
                    z = x * to_logit
                    out = tl.exp2(z - tl.load(lse_a_ptr + rows, mask=in_rows, other=0.0)[:, None]) * pa
                    out += tl.exp2(z - tl.load(lse_b_ptr + columns, mask=in_columns, other=0.0)[None, :]) * pb
                else:
                    out = tl.exp2(x * to_logit - shift) * (pa + pb)
                if SMOOTH:
                    out -= smoothing
                if HAS_IDS:
                    ya = tl.load(share_a_ptr + rows, mask=in_rows, other=0.0)[:, None]
                    yb = tl.load(share_b_ptr + columns, mask=in_columns, other=0.0)[None, :]
                    out -= tl.where(same, ya + yb, 0.0)
                if edge:
                    out = tl.where(inside(rows, columns, n_rows, n_columns, diagonal, DIAGONAL), out, 0.0)
                by_scale += tl.sum(out * x)
            if TRIPLET:
                s = x * to_score
                e = tl.exp2(s * -LOG2E)
                da = tl.load(da_ptr + rows, mask=in_rows, other=0.0)[:, None]
                ca, ua = violation(s, da, e, margin, EXACT, GAMMA == 0)
                fa = weighed_grad(ca, ua, GAMMA)
                db = tl.load(db_ptr + columns, mask=in_columns, other=0.0)[None, :]
                cb, ub = violation(s, db, e, margin, EXACT, GAMMA == 0)
                fb = weighed_grad(cb, ub, GAMMA)
                if LOSS:
                    f = weighed(ca, ua, GAMMA) + weighed(cb, ub, GAMMA)
                if MASK_SAME:
                    fa, fb = tl.where(same, 0.0, fa), tl.where(same, 0.0, fb)
                    if LOSS:
                        f = tl.where(same, 0.0, f)
                if edge:
                    keep = inside(rows, columns, n_rows, n_columns, diagonal, DIAGONAL)
                    fa, fb = tl.where(keep, fa, 0.0), tl.where(keep, fb, 0.0)
                    if LOSS:
                        f = tl.where(keep, f, 0.0)
                if LOSS:
                    lost += tl.sum(f)
                at = (pn * PIECES + i).to(tl.int64) * n_rows
                tl.store(row_sums_ptr + at + rows, tl.sum(fa, 1), mask=in_rows)
                tl.store(column_sums_ptr + pm.to(tl.int64) * n_columns + columns, tl.sum(fb, 0), mask=in_columns)
                f = (fa + fb) * weight
                out = out + f if SOFTMAX else f
            if SIGMOID:
                z = x * to_logit + bias
                if edge:  # a pair that does not count has neither loss nor gradient
                    z = tl.where(inside(rows, columns, n_rows, n_columns, diagonal, DIAGONAL), z, -1e4)
                f, out = sigmoid(z)
                out *= weight
                by_bias += tl.sum(out)
                by_scale += tl.sum(out * x)
                if LOSS:
                    lost += tl.sum(f)
            if STORE:
                _store(g, out, row, start, n_rows, n_columns, pitch, TMA, BLOCK_M, PIECE, DTYPE)
                if PARTS == 2:
                    rest = out - cast(out, DTYPE).to(tl.float32)
                    _store(g_low, rest, row, start, n_rows, n_columns, pitch, TMA, BLOCK_M, PIECE, DTYPE)
    out_ptr = totals_ptr + tl.program_id(0) * 3
    tl.store(out_ptr, by_scale)
    tl.store(out_ptr + 1, by_bias)
    tl.store(out_ptr + 2, lost)
