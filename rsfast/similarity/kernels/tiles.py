"""Tile maths that the kernels of the in-batch losses share.

A program takes tiles of S = I T^T, BLOCK_M images by BLOCK_N texts, one after another, and keeps none of them. Operands
are (rows, width) in 16 bits; an fp32 matrix comes as two fp16 parts side by side, see ``prepare.py``. On GPUs that have
them, operands are read through tensor descriptors (TMA).
"""

import triton
import triton.language as tl

from rsfast._tiles import INTERPRET, LOG2E, dot, operand


@triton.jit
def scores(a, b, row, column, rows, columns, width, PARTS: tl.constexpr, TMA: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """One tile of a @ b.T in fp32."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if PARTS == 1:
        for k in tl.range(0, width, BLOCK_K):
            x = operand(a, row, k, rows, width, width, TMA, BLOCK_M, BLOCK_K)
            acc = dot(x, operand(b, column, k, columns, width, width, TMA, BLOCK_N, BLOCK_K).T, acc)
    else:
        half = width // 2
        for k in tl.range(0, 3 * half, BLOCK_K):  # high low + low high + high high: the small first, to round less
            ka = tl.where(k < 2 * half, k, k - 2 * half)
            kb = tl.where(k < half, k + half, k - half - tl.where(k < 2 * half, 0, half))
            x = operand(a, row, ka, rows, width, width, TMA, BLOCK_M, BLOCK_K)
            acc = dot(x, operand(b, column, kb, columns, width, width, TMA, BLOCK_N, BLOCK_K).T, acc)
    return acc


@triton.jit
def inside(rows, columns, n_rows, n_columns, diagonal, DIAGONAL: tl.constexpr):
    """Which pairs count: within the batch, and not the positive, which is kept apart in fp32."""
    keep = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    if DIAGONAL:
        keep = keep & (columns[None, :] != rows[:, None] + diagonal)
    return keep


@triton.jit
def at_edge(row, column, n_rows, n_columns, diagonal, DIAGONAL: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Whether a tile holds anything but negatives; most do not, and skip the masks."""
    edge = (row + BLOCK_M > n_rows) | (column + BLOCK_N > n_columns)
    if DIAGONAL:
        first = row + diagonal  # column of the first row's positive
        edge = edge | ((column < first + BLOCK_M) & (first < column + BLOCK_N))
    return edge


@triton.jit
def _one_minus(e, own):
    """max(1 - e * own, 0), in one instruction where there is one."""
    if INTERPRET:
        return tl.maximum(1 - e * own, 0.0)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; neg.f32 t, $1; fma.rn.sat.f32 $0, t, $2, 0f3F800000; }", "=f,f,f", [e, own],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def violation(s, own, e, margin, EXACT: tl.constexpr, HINGE: tl.constexpr):
    """How far a negative is within the margin, c (meaningless where u is 0), and u = 1 - exp(-max(c, 0)).

    ``e`` is exp(-s), which both directions share. ``EXACT`` does without it, since it can overflow, and is right to the
    last bits of a tiny violation.
    """
    if HINGE:
        c = s + (margin - own)
        return c, tl.where(c > 0, 1.0, 0.0)
    elif EXACT:
        c = tl.maximum((s - own) + margin, 0.0, propagate_nan=tl.PropagateNan.ALL)  # compiled, it would take 0 for NaN
        series = c * (1 - c / 2 * (1 - c / 3 * (1 - c / 4 * (1 - c / 5 * (1 - c / 6)))))
        return c, tl.where(c < 0.25, series, 1 - tl.exp2(c * -LOG2E))
    else:
        return s + (margin - own), _one_minus(e, tl.broadcast_to(tl.exp2((own - margin) * LOG2E), s.shape))


@triton.jit
def weighed(c, u, GAMMA: tl.constexpr):
    """u^gamma c."""
    if GAMMA == 0 or GAMMA == 1:
        return u * c
    elif GAMMA == 2:
        return u * u * c
    else:
        return tl.where(u > 0, tl.exp2(GAMMA * tl.log2(u)), u) * c  # of NaN, u may be 0


@triton.jit
def weighed_grad(c, u, GAMMA: tl.constexpr):
    """Derivative of (1 - e^-c)^gamma c: u^gamma + gamma c (1 - u) u^(gamma - 1)."""
    if GAMMA == 0:
        return u
    elif GAMMA == 1:
        return u + (1 - u) * tl.maximum(c, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif GAMMA == 2:
        t = u * u
        return t + (u - t) * (c + c)
    else:
        power = tl.exp2((GAMMA - 1) * tl.log2(u))
        return tl.where(u > 0, power * (u + GAMMA * c * (1 - u)), u * c)
