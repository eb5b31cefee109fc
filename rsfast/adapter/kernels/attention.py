"""Multi-head attention of one tile, forward and backward, with its projections fused on.

``resident``: a sample fits one tile, so keys and values never leave the registers (up to 64 tokens).
``streamed``: queries of one tile, keys and values of the whole sample from memory, online softmax.

The logarithm of the softmax's denominator is kept in base 2. Heads are walked by a loop that is not unrolled:
unrolled, the resident kernels spill kilobytes.
"""

import triton
import triton.language as tl

from rsfast._tiles import LOG2E, cast, dot
from rsfast.adapter.kernels.tiles import load, store, vector


@triton.jit
def _project(x, w_ptr, b_ptr, row0, WIDTH: tl.constexpr, HEAD: tl.constexpr,
             BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """One head's slice of a projection: x @ w[row0 : row0 + HEAD].T + b, rounded as the weights are."""
    cols = tl.arange(0, BLOCK_H)
    w = load(w_ptr + row0 * WIDTH, cols, tl.arange(0, BLOCK_R), WIDTH, HEAD, WIDTH)  # [BLOCK_H, BLOCK_R]
    y = dot(x, w.T, tl.zeros([BLOCK_L, BLOCK_H], tl.float32)) + vector(b_ptr + row0, cols, HEAD)
    return cast(y, w.dtype)


@triton.jit
def _finish_head(acc, o, lse, o_ptr, lse_ptr, wo_ptr, head, rows, valid, end, WIDTH: tl.constexpr, HEAD: tl.constexpr,
                 BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """Save one head's output and lse, and add its share of the output projection."""
    cols = tl.arange(0, BLOCK_H)
    store(o_ptr + head * HEAD, o, rows, cols, WIDTH, valid, end, HEAD)
    tl.store(lse_ptr + head * end + rows, tl.where(rows < valid, lse, 0.0), mask=rows < end)
    wo = load(wo_ptr + head * HEAD, tl.arange(0, BLOCK_R), cols, WIDTH, WIDTH, HEAD)  # [BLOCK_R, BLOCK_H]
    return dot(o, wo.T, acc)


@triton.jit
def resident(x, wi_ptr, bi_ptr, wo_ptr, bo_ptr, o_ptr, lse_ptr, rows, valid, end,
             WIDTH: tl.constexpr, HEADS: tl.constexpr,
             BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """MHA(x) of a whole sample in registers."""
    HEAD: tl.constexpr = WIDTH // HEADS
    x = cast(x, wi_ptr.dtype.element_ty)
    acc = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    for head in tl.range(0, HEADS, num_stages=1, disable_licm=True):
        first = head * HEAD
        q = _project(x, wi_ptr, bi_ptr, first, WIDTH, HEAD, BLOCK_L, BLOCK_R, BLOCK_H)
        k = _project(x, wi_ptr, bi_ptr, WIDTH + first, WIDTH, HEAD, BLOCK_L, BLOCK_R, BLOCK_H)
        s = dot(q, k.T, tl.zeros([BLOCK_L, BLOCK_L], tl.float32)) * (LOG2E / HEAD**0.5)
        s = tl.where(rows[None, :] < tl.maximum(valid, 1), s, float("-inf"))  # one key at least: no empty row
        top = tl.max(s, 1)
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        v = _project(x, wi_ptr, bi_ptr, 2 * WIDTH + first, WIDTH, HEAD, BLOCK_L, BLOCK_R, BLOCK_H)
        o = dot(p, v, tl.zeros([BLOCK_L, BLOCK_H], tl.float32))
        lse = top + tl.log2(total)
        acc = _finish_head(acc, o / total[:, None], lse, o_ptr, lse_ptr, wo_ptr, head, rows, valid, end,
                           WIDTH, HEAD, BLOCK_R, BLOCK_H)  # fmt: skip
    return acc + vector(bo_ptr, tl.arange(0, BLOCK_R), WIDTH)


@triton.jit
def streamed(qkv_ptr, wo_ptr, bo_ptr, o_ptr, lse_ptr, rows, valid, end,
             WIDTH: tl.constexpr, HEADS: tl.constexpr,
             BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """MHA of one tile's queries over the sample's keys; q, k and v of all heads are in memory."""
    HEAD: tl.constexpr = WIDTH // HEADS
    cols = tl.arange(0, BLOCK_H)
    acc = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    for head in tl.range(0, HEADS, num_stages=1, disable_licm=True):
        first = head * HEAD
        q = load(qkv_ptr + first, rows, cols, 3 * WIDTH, valid, HEAD)
        o = tl.zeros([BLOCK_L, BLOCK_H], tl.float32)
        top = tl.full([BLOCK_L], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_L], tl.float32)
        for key in range(0, tl.maximum(valid, 1), BLOCK_K):
            keys = key + tl.arange(0, BLOCK_K)
            k = load(qkv_ptr + WIDTH + first, keys, cols, 3 * WIDTH, valid, HEAD)
            s = dot(q, k.T, tl.zeros([BLOCK_L, BLOCK_K], tl.float32)) * (LOG2E / HEAD**0.5)
            s = tl.where(keys[None, :] < tl.maximum(valid, 1), s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(p, 1)
            v = load(qkv_ptr + 2 * WIDTH + first, keys, cols, 3 * WIDTH, valid, HEAD)
            o = dot(p, v, o * fade[:, None])
            top = higher
        lse = top + tl.log2(total)
        acc = _finish_head(acc, o / total[:, None], lse, o_ptr, lse_ptr, wo_ptr, head, rows, valid, end,
                           WIDTH, HEAD, BLOCK_R, BLOCK_H)  # fmt: skip
    return acc + vector(bo_ptr, tl.arange(0, BLOCK_R), WIDTH)


@triton.jit
def _pair(q, k, v, do, lse, rows, keys, valid, HEAD: tl.constexpr,
          BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Transposed P = 2^(S - lse) and dP = dO V^T of a block of queries and keys, (keys, rows)."""
    s = dot(k, q.T, tl.zeros([BLOCK_K, BLOCK_L], tl.float32)) * (LOG2E / HEAD**0.5)
    inside = (keys[:, None] < valid) & (rows[None, :] < valid)
    p = tl.where(inside, tl.exp2(s - lse[None, :]), 0.0)
    return p, dot(v, do.T, tl.zeros([BLOCK_K, BLOCK_L], tl.float32))


@triton.jit
def resident_grad(dx, x_ptr, dy_ptr, wi_ptr, bi_ptr, wo_ptr, dqkv_ptr, rows, valid, end,
                  WIDTH: tl.constexpr, HEADS: tl.constexpr,
                  BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """dx plus the gradient of ``resident`` in its input; q, k and v are projected again, their gradients written out.

    x and dy are read again for each head: held in registers next to dx, they spill.
    """
    HEAD: tl.constexpr = WIDTH // HEADS
    cols = tl.arange(0, BLOCK_H)
    outs = tl.arange(0, BLOCK_R)
    zero = tl.zeros([BLOCK_L, BLOCK_H], tl.float32)
    for head in tl.range(0, HEADS, num_stages=1, disable_licm=True):
        first = head * HEAD
        wo = load(wo_ptr + first, outs, cols, WIDTH, WIDTH, HEAD)  # [BLOCK_R, BLOCK_H]
        do = cast(dot(load(dy_ptr, rows, outs, WIDTH, valid, WIDTH), wo, zero), wo.dtype)
        x = load(x_ptr, rows, outs, WIDTH, valid, WIDTH)
        q = _project(x, wi_ptr, bi_ptr, first, WIDTH, HEAD, BLOCK_L, BLOCK_R, BLOCK_H)
        k = _project(x, wi_ptr, bi_ptr, WIDTH + first, WIDTH, HEAD, BLOCK_L, BLOCK_R, BLOCK_H)
        v = _project(x, wi_ptr, bi_ptr, 2 * WIDTH + first, WIDTH, HEAD, BLOCK_L, BLOCK_R, BLOCK_H)
        s = dot(k, q.T, tl.zeros([BLOCK_L, BLOCK_L], tl.float32)) * (LOG2E / HEAD**0.5)  # (keys, rows)
        s = tl.where(rows[:, None] < tl.maximum(valid, 1), s, float("-inf"))
        p = tl.exp2(s - tl.max(s, 0)[None, :])
        p = p / tl.sum(p, 0)[None, :]
        dp = dot(v, do.T, tl.zeros([BLOCK_L, BLOCK_L], tl.float32))
        delta = tl.sum(p * dp, 0)  # all keys are here; from the rounded o it would cancel less well
        ds = cast(p * (dp - delta[None, :]), wo.dtype)
        dv = cast(dot(p, do, zero), wo.dtype)
        store(dqkv_ptr + 2 * WIDTH + first, dv, rows, cols, 3 * WIDTH, valid, end, HEAD)
        dx = dot(dv, load(wi_ptr + (2 * WIDTH + first) * WIDTH, cols, outs, WIDTH, HEAD, WIDTH), dx)
        dq = cast(dot(ds.T, k, zero) * (1 / HEAD**0.5), wo.dtype)
        store(dqkv_ptr + first, dq, rows, cols, 3 * WIDTH, valid, end, HEAD)
        dx = dot(dq, load(wi_ptr + first * WIDTH, cols, outs, WIDTH, HEAD, WIDTH), dx)
        dk = cast(dot(ds, q, zero) * (1 / HEAD**0.5), wo.dtype)
        store(dqkv_ptr + WIDTH + first, dk, rows, cols, 3 * WIDTH, valid, end, HEAD)
        dx = dot(dk, load(wi_ptr + (WIDTH + first) * WIDTH, cols, outs, WIDTH, HEAD, WIDTH), dx)
    return dx


@triton.jit
def streamed_grad_kernel(qkv_ptr, do_ptr, o_ptr, lse_ptr, dqkv_ptr, lengths_ptr, L, tiles,
                         WIDTH: tl.constexpr, HEADS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
                         BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """dq, dk and dv of one block of tokens and one head: first as keys over all queries, then as queries."""
    HEAD: tl.constexpr = WIDTH // HEADS
    pid = tl.program_id(0)
    head = pid % HEADS
    sample = (pid // HEADS // tiles).to(tl.int64)
    mine = (pid // HEADS) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = L
    if HAS_LENGTHS:
        valid = tl.minimum(tl.load(lengths_ptr + sample).to(tl.int32), L)
    first = head * HEAD
    cols = tl.arange(0, BLOCK_H)
    q_ptr = qkv_ptr + sample * L * 3 * WIDTH + first
    k_ptr = q_ptr + WIDTH
    v_ptr = k_ptr + WIDTH
    do_ptr += sample * L * WIDTH + first
    o_ptr += sample * L * WIDTH + first
    lse_ptr += (sample * HEADS + head) * L
    k = load(k_ptr, mine, cols, 3 * WIDTH, valid, HEAD)
    v = load(v_ptr, mine, cols, 3 * WIDTH, valid, HEAD)
    dq = tl.zeros([BLOCK_L, BLOCK_H], tl.float32)
    dk = tl.zeros([BLOCK_L, BLOCK_H], tl.float32)
    dv = tl.zeros([BLOCK_L, BLOCK_H], tl.float32)
    for row in range(0, valid, BLOCK_L):
        rows = row + tl.arange(0, BLOCK_L)
        q = load(q_ptr, rows, cols, 3 * WIDTH, valid, HEAD)
        do = load(do_ptr, rows, cols, WIDTH, valid, HEAD)
        o = load(o_ptr, rows, cols, WIDTH, valid, HEAD)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        lse = tl.load(lse_ptr + rows, mask=rows < valid, other=0.0)
        p, dp = _pair(q, k, v, do, lse, rows, mine, valid, HEAD, BLOCK_L, BLOCK_L)
        dv = dot(p, do, dv)
        dk = dot(p * (dp - delta[None, :]), q, dk)
    q = load(q_ptr, mine, cols, 3 * WIDTH, valid, HEAD)
    do = load(do_ptr, mine, cols, WIDTH, valid, HEAD)
    o = load(o_ptr, mine, cols, WIDTH, valid, HEAD)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(lse_ptr + mine, mask=mine < valid, other=0.0)
    for key in range(0, valid, BLOCK_L):
        keys = key + tl.arange(0, BLOCK_L)
        k = load(k_ptr, keys, cols, 3 * WIDTH, valid, HEAD)
        v = load(v_ptr, keys, cols, 3 * WIDTH, valid, HEAD)
        p, dp = _pair(q, k, v, do, lse, mine, keys, valid, HEAD, BLOCK_L, BLOCK_L)
        dq = dot((p * (dp - delta[None, :])).T, k, dq)
    dqkv_ptr += sample * L * 3 * WIDTH + first
    store(dqkv_ptr, dq * (1 / HEAD**0.5), mine, cols, 3 * WIDTH, valid, L, HEAD)
    store(dqkv_ptr + WIDTH, dk * (1 / HEAD**0.5), mine, cols, 3 * WIDTH, valid, L, HEAD)
    store(dqkv_ptr + 2 * WIDTH, dv, mine, cols, 3 * WIDTH, valid, L, HEAD)
