"""Forward kernels of the gated adapter.

    a = W_d x + b_d,  h = GELU(a),  x1 = MHA(h),  [x1 = Share(x1)],  x2 = MHA(x1),
    y = x + s_b (W_u (s h + (1 - s) x2) + b_u)

Up to 64 tokens a sample is one program of ``resident_kernel`` (with a shared sub-adapter, of two launches: everything
before the second attention, then the rest). Longer samples go through ``down_kernel``, ``first_kernel``,
[``shared_kernel``], ``second_kernel``, 64 tokens a program, q, k and v passing through memory.
"""

import triton
import triton.language as tl

from rsfast._tiles import cast, dot
from rsfast.adapter.kernels.attention import resident, streamed
from rsfast.adapter.kernels.tiles import (
    gelu,
    linear,
    linear_from,
    linear_to,
    load,
    sample_and_tile,
    sigmoid_at,
    store,
    vector,
)


@triton.jit
def _down(x_ptr, wd_ptr, bd_ptr, a_ptr, rows, valid, end, D, stride_xl, R: tl.constexpr,
          BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """h = GELU(W_d x + b_d) of one tile; the pre-activation is written, and rounded before the GELU as it is saved."""
    a = linear_from(x_ptr, stride_xl, wd_ptr, bd_ptr, rows, valid, D, R, BLOCK_L, BLOCK_R, BLOCK_D)
    a = cast(a, a_ptr.dtype.element_ty)
    store(a_ptr, a, rows, tl.arange(0, BLOCK_R), R, valid, end, R)
    return cast(gelu(a), a.dtype)


@triton.jit
def _mix_up(h, x2, gate_ptr, wu_ptr, bu_ptr, rgate_ptr, x_ptr, y_ptr, rows, valid, end, D, stride_xl, stride_yl,
            R: tl.constexpr, HAS_RGATE: tl.constexpr,
            BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """y = x + s_b (W_u (s h + (1 - s) x2) + b_u) of one tile; tokens beyond ``valid`` pass through."""
    s = sigmoid_at(gate_ptr)
    m = cast(s * h + (1 - s) * x2, wu_ptr.dtype.element_ty)
    ins = tl.arange(0, BLOCK_R)
    for d in range(0, D, BLOCK_D):
        ds = d + tl.arange(0, BLOCK_D)
        w = load(wu_ptr, ds, ins, R, D, R)  # [BLOCK_D, BLOCK_R]
        u = dot(m, w.T, tl.zeros([BLOCK_L, BLOCK_D], tl.float32)) + vector(bu_ptr, ds, D)
        if HAS_RGATE:
            u = sigmoid_at(rgate_ptr) * u
        x = load(x_ptr, rows, ds, stride_xl, end, D).to(tl.float32)
        y = x + tl.where(rows[:, None] < valid, u, 0.0)
        store(y_ptr, y, rows, ds, stride_yl, end, end, D)


@triton.jit
def resident_kernel(
    x_ptr, wd_ptr, bd_ptr, wi_ptr, bi_ptr, wo_ptr, bo_ptr, wu_ptr, bu_ptr, gate_ptr, rgate_ptr,
    sd_ptr, sdb_ptr, si_ptr, sib_ptr, so_ptr, sob_ptr, su_ptr, sub_ptr, sgate_ptr,
    lengths_ptr, y_ptr, a_ptr, o_ptr, lse_ptr, os_ptr, lses_ptr, x1_ptr,
    B, L, D, stride_xb, stride_xl, stride_yb, stride_yl,
    R: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, SHARED_HEADS: tl.constexpr,
    FIRST: tl.constexpr, SHARED: tl.constexpr, SECOND: tl.constexpr,
    HAS_RGATE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A whole sample in one program: the first half (FIRST, with SHARED), the second (SECOND), or both."""
    sample, _, valid = sample_and_tile(lengths_ptr, L, 1, HAS_LENGTHS)
    rows = tl.arange(0, BLOCK_L)
    outs = tl.arange(0, BLOCK_R)
    x_ptr += sample * stride_xb
    a_ptr += sample * L * R
    if FIRST:
        h = _down(x_ptr, wd_ptr, bd_ptr, a_ptr, rows, valid, L, D, stride_xl, R, BLOCK_L, BLOCK_R, BLOCK_D)
        x1 = resident(h, wi_ptr, bi_ptr, wo_ptr, bo_ptr, o_ptr + sample * L * R, lse_ptr + sample * HEADS * L,
                      rows, valid, L, R, HEADS, BLOCK_L, BLOCK_R, BLOCK_H)  # fmt: skip
    if SHARED:
        p = linear(x1, sd_ptr, sdb_ptr, R, S, BLOCK_L, BLOCK_R, BLOCK_S)
        q = resident(p, si_ptr, sib_ptr, so_ptr, sob_ptr, os_ptr + sample * L * S, lses_ptr + sample * SHARED_HEADS * L,
                     rows, valid, L, S, SHARED_HEADS, BLOCK_L, BLOCK_S, BLOCK_HS)  # fmt: skip
        s = sigmoid_at(sgate_ptr)
        x1 += linear(s * q + (1 - s) * p, su_ptr, sub_ptr, S, R, BLOCK_L, BLOCK_S, BLOCK_R)
        store(x1_ptr + sample * L * R, x1, rows, outs, R, valid, L, R)
    if SECOND:
        if not FIRST:
            x1 = load(x1_ptr + sample * L * R, rows, outs, R, valid, R)
        o_ptr += (B + sample) * L * R
        lse_ptr += (B + sample) * HEADS * L
        x2 = resident(x1, wi_ptr, bi_ptr, wo_ptr, bo_ptr, o_ptr, lse_ptr,
                      rows, valid, L, R, HEADS, BLOCK_L, BLOCK_R, BLOCK_H)  # fmt: skip
        if not FIRST:
            h = cast(gelu(load(a_ptr, rows, outs, R, valid, R)), a_ptr.dtype.element_ty)
        _mix_up(h, x2, gate_ptr, wu_ptr, bu_ptr, rgate_ptr, x_ptr, y_ptr + sample * stride_yb,
                rows, valid, L, D, stride_xl, stride_yl, R, HAS_RGATE, BLOCK_L, BLOCK_R, BLOCK_D)  # fmt: skip


@triton.jit
def down_kernel(
    x_ptr, wd_ptr, bd_ptr, wi_ptr, bi_ptr, lengths_ptr, a_ptr, qkv_ptr,
    L, D, tiles, stride_xb, stride_xl,
    R: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """a, and q, k, v of the first attention."""
    sample, tile, valid = sample_and_tile(lengths_ptr, L, tiles, HAS_LENGTHS)
    rows = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    h = _down(x_ptr + sample * stride_xb, wd_ptr, bd_ptr, a_ptr + sample * L * R, rows, valid, L, D, stride_xl,
              R, BLOCK_L, BLOCK_R, BLOCK_D)  # fmt: skip
    linear_to(h, wi_ptr, bi_ptr, qkv_ptr + sample * L * 3 * R, rows, valid, L, R, 3 * R, BLOCK_L, BLOCK_R, BLOCK_N)


@triton.jit
def first_kernel(
    qkv_ptr, wi_ptr, bi_ptr, wo_ptr, bo_ptr, sd_ptr, sdb_ptr, si_ptr, sib_ptr,
    lengths_ptr, o_ptr, lse_ptr, next_ptr, L, tiles,
    R: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """First attention, then q, k, v of whichever attention comes next: the shared one or the second."""
    sample, tile, valid = sample_and_tile(lengths_ptr, L, tiles, HAS_LENGTHS)
    rows = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    x1 = streamed(qkv_ptr + sample * L * 3 * R, wo_ptr, bo_ptr, o_ptr + sample * L * R, lse_ptr + sample * HEADS * L,
                  rows, valid, L, R, HEADS, BLOCK_L, BLOCK_R, BLOCK_H, BLOCK_K)  # fmt: skip
    if SHARED:
        p = linear(x1, sd_ptr, sdb_ptr, R, S, BLOCK_L, BLOCK_R, BLOCK_S)
        next_ptr += sample * L * 3 * S
        linear_to(p, si_ptr, sib_ptr, next_ptr, rows, valid, L, S, 3 * S, BLOCK_L, BLOCK_S, BLOCK_N)
    else:
        next_ptr += sample * L * 3 * R
        linear_to(x1, wi_ptr, bi_ptr, next_ptr, rows, valid, L, R, 3 * R, BLOCK_L, BLOCK_R, BLOCK_N)


@triton.jit
def shared_kernel(
    qkvs_ptr, o_ptr, wi_ptr, bi_ptr, wo_ptr, bo_ptr, sd_ptr, sdb_ptr, so_ptr, sob_ptr, su_ptr, sub_ptr, sgate_ptr,
    lengths_ptr, os_ptr, lses_ptr, qkv_ptr, L, tiles,
    R: tl.constexpr, S: tl.constexpr, SHARED_HEADS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_HS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Shared attention, its mix and up-projection, then q, k, v of the second attention."""
    sample, tile, valid = sample_and_tile(lengths_ptr, L, tiles, HAS_LENGTHS)
    rows = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    q = streamed(qkvs_ptr + sample * L * 3 * S, so_ptr, sob_ptr, os_ptr + sample * L * S,
                 lses_ptr + sample * SHARED_HEADS * L, rows, valid, L,
                 S, SHARED_HEADS, BLOCK_L, BLOCK_S, BLOCK_HS, BLOCK_K)  # fmt: skip
    x1, p, z = shared_mix(o_ptr + sample * L * R, q, wo_ptr, bo_ptr, sd_ptr, sdb_ptr, sgate_ptr,
                          rows, valid, R, S, BLOCK_L, BLOCK_R, BLOCK_S)  # fmt: skip
    x1 += linear(z, su_ptr, sub_ptr, S, R, BLOCK_L, BLOCK_S, BLOCK_R)
    qkv_ptr += sample * L * 3 * R
    linear_to(x1, wi_ptr, bi_ptr, qkv_ptr, rows, valid, L, R, 3 * R, BLOCK_L, BLOCK_R, BLOCK_N)


@triton.jit
def shared_mix(o_ptr, q, wo_ptr, bo_ptr, sd_ptr, sdb_ptr, sgate_ptr, rows, valid,
               R: tl.constexpr, S: tl.constexpr,
               BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """x1 = W_o o + b_o, p = W_1 x1 + b_1 and z = s q + (1 - s) p, computed again from the first attention's o."""
    x1 = linear_from(o_ptr, R, wo_ptr, bo_ptr, rows, valid, R, R, BLOCK_L, BLOCK_R, 32)
    p = linear(x1, sd_ptr, sdb_ptr, R, S, BLOCK_L, BLOCK_R, BLOCK_S)
    s = sigmoid_at(sgate_ptr)
    return x1, p, s * q + (1 - s) * p


@triton.jit
def second_kernel(
    qkv_ptr, a_ptr, x_ptr, wo_ptr, bo_ptr, wu_ptr, bu_ptr, gate_ptr, rgate_ptr, lengths_ptr, y_ptr, o_ptr, lse_ptr,
    L, D, tiles, stride_xb, stride_xl, stride_yb, stride_yl,
    R: tl.constexpr, HEADS: tl.constexpr, HAS_RGATE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Second attention, both gates, up-projection and residual."""
    sample, tile, valid = sample_and_tile(lengths_ptr, L, tiles, HAS_LENGTHS)
    rows = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    x2 = streamed(qkv_ptr + sample * L * 3 * R, wo_ptr, bo_ptr, o_ptr + sample * L * R, lse_ptr + sample * HEADS * L,
                  rows, valid, L, R, HEADS, BLOCK_L, BLOCK_R, BLOCK_H, BLOCK_K)  # fmt: skip
    h = gelu(load(a_ptr + sample * L * R, rows, tl.arange(0, BLOCK_R), R, valid, R))
    _mix_up(h, x2, gate_ptr, wu_ptr, bu_ptr, rgate_ptr, x_ptr + sample * stride_xb, y_ptr + sample * stride_yb,
            rows, valid, L, D, stride_xl, stride_yl, R, HAS_RGATE, BLOCK_L, BLOCK_R, BLOCK_D)  # fmt: skip
