"""Backward kernels of the gated adapter: gradients of the activations, and what the weights' GEMMs need.

With x1 the input of the second attention, x2 its output and a, o, lse saved, everything else is computed again:

    dm = s_b dy W_u,  dx2 = (1 - s) dm,  dx1 = MHA'(dx2),  [dx1 = Share'(dx1)],  dh = s dm + MHA'(dx1),
    da = dh GELU'(a),  dx = dy + da W_d

Up to 64 tokens a sample: ``up_grad_kernel``, ``resident_grad_kernel``, [``shared_out_grad_kernel``,
``resident_grad_kernel``,] ``resident_grad_kernel``. Longer: ``up_grad_kernel``, ``streamed_grad_kernel``,
[``shared_out_grad_kernel``, ``streamed_grad_kernel``,] ``middle_grad_kernel``, ``streamed_grad_kernel``,
``down_grad_kernel``. Gradients of the gates (the mixing gate, the block's, the sub-adapter's) and of b_u leave each
program as one partial sum. Of tensors with two halves, the first attention has the first.
"""

import triton
import triton.language as tl

from rsfast._tiles import cast, dot
from rsfast.adapter.kernels.attention import resident_grad
from rsfast.adapter.kernels.forward import shared_mix
from rsfast.adapter.kernels.tiles import (
    gelu,
    gelu_grad,
    linear,
    linear_from,
    linear_grad,
    linear_grad_from,
    linear_grad_to,
    linear_to,
    load,
    sample_and_tile,
    sigmoid_at,
    store,
    vector,
)


@triton.jit
def _up_grad(dy_ptr, wu_ptr, bu_ptr, a_ptr, o2_ptr, wo_ptr, bo_ptr, gate_ptr, rgate_ptr, h_ptr, m_ptr, gates_ptr,
             dbu_ptr, rows, valid, end, D, stride_dyl, R: tl.constexpr, HAS_RGATE: tl.constexpr,
             BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """dm of one tile. Writes h, s_b m, and this tile's share of the gradients of both gates and of b_u."""
    ins = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    bias_terms = tl.zeros([1, BLOCK_D], tl.float32)
    s_b = 1.0
    if HAS_RGATE:
        s_b = sigmoid_at(rgate_ptr)
    for d in range(0, D, BLOCK_D):
        ds = d + tl.arange(0, BLOCK_D)
        w = load(wu_ptr, ds, ins, R, D, R)  # [BLOCK_D, BLOCK_R]
        dy = load(dy_ptr, rows, ds, stride_dyl, valid, D)
        acc = dot(dy, w, acc)
        total = tl.sum(dy.to(tl.float32), 0)
        tl.store(dbu_ptr + ds, s_b * total, mask=ds < D)
        bias_terms += total[None, :] * vector(bu_ptr, ds, D)
    h = gelu(load(a_ptr, rows, ins, R, valid, R))
    store(h_ptr, h, rows, ins, R, valid, end, R)
    x2 = linear_from(o2_ptr, R, wo_ptr, bo_ptr, rows, valid, R, R, BLOCK_L, BLOCK_R, BLOCK_K)
    s = sigmoid_at(gate_ptr)
    m = s * h + (1 - s) * x2
    store(m_ptr, s_b * m, rows, ins, R, valid, end, R)
    tl.store(gates_ptr, tl.sum(s_b * acc * (h - x2)) * s * (1 - s))
    tl.store(gates_ptr + 1, (tl.sum(acc * m) + tl.sum(bias_terms)) * s_b * (1 - s_b))
    return s_b * acc


@triton.jit
def _down_grad(dh, a_ptr, wd_ptr, dy_ptr, da_ptr, dx_ptr, rows, valid, end, D, stride_dyl, stride_dxl,
               R: tl.constexpr, NEED_DX: tl.constexpr,
               BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """da = dh GELU'(a) and dx = dy + da W_d of one tile."""
    ins = tl.arange(0, BLOCK_R)
    da = cast(dh * gelu_grad(load(a_ptr, rows, ins, R, valid, R)), da_ptr.dtype.element_ty)
    store(da_ptr, da, rows, ins, R, valid, end, R)
    if NEED_DX:
        for d in range(0, D, BLOCK_D):
            ds = d + tl.arange(0, BLOCK_D)
            w = load(wd_ptr, ins, ds, D, R, D)  # [BLOCK_R, BLOCK_D]
            dx = dot(da, w, tl.zeros([BLOCK_L, BLOCK_D], tl.float32))
            dx = tl.where(rows[:, None] < valid, dx, 0.0)
            dx += load(dy_ptr, rows, ds, stride_dyl, end, D).to(tl.float32)
            store(dx_ptr, dx, rows, ds, stride_dxl, end, end, D)


@triton.jit
def _shared_out_grad(dx1, q, p, gate_ptr, su_ptr, gates_ptr, R: tl.constexpr, S: tl.constexpr,
                     BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """dz = dx1 W_2 and this tile's share of the gradient of the sub-adapter's gate."""
    dz = linear_grad(dx1, su_ptr, S, R, BLOCK_L, BLOCK_S, BLOCK_R)
    s = sigmoid_at(gate_ptr)
    tl.store(gates_ptr + 2, tl.sum(dz * (q - p)) * s * (1 - s))
    return dz


@triton.jit
def resident_grad_kernel(
    x_ptr, dy_ptr, wi_ptr, bi_ptr, wo_ptr, lengths_ptr, dqkv_ptr, dx_ptr,
    dz_ptr, dp_ptr, sd_ptr, sgate_ptr, dx1_ptr,
    dm_ptr, a_ptr, gate_ptr, wd_ptr, dout_ptr, da_ptr, din_ptr,
    L, D, stride_dyb, stride_dyl, stride_dxb, stride_dxl,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr,
    SHARED: tl.constexpr, DOWN: tl.constexpr, HAS_LENGTHS: tl.constexpr, NEED_DX: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of an attention in its input, one sample a program; then of what stands before it.

    SHARED: of the sub-adapter's down-projection and residual. DOWN: of the GELU, the down-projection and the residual.
    """
    sample, _, valid = sample_and_tile(lengths_ptr, L, 1, HAS_LENGTHS)
    rows = tl.arange(0, BLOCK_L)
    cols = tl.arange(0, BLOCK_W)
    outs = tl.arange(0, BLOCK_R)
    at, atr = sample * L * WIDTH, sample * L * R
    dx = tl.zeros([BLOCK_L, BLOCK_W], tl.float32)
    if SHARED:
        dx += (1 - sigmoid_at(sgate_ptr)) * load(dz_ptr + at, rows, cols, WIDTH, valid, WIDTH).to(tl.float32)
    if DOWN:
        dx += sigmoid_at(gate_ptr) * load(dm_ptr + at, rows, cols, WIDTH, valid, WIDTH).to(tl.float32)
    dx = resident_grad(dx, x_ptr + at, dy_ptr + at, wi_ptr, bi_ptr, wo_ptr,
                       dqkv_ptr + 3 * at, rows, valid, L, WIDTH, HEADS, BLOCK_L, BLOCK_W, BLOCK_H)  # fmt: skip
    if SHARED:
        store(dp_ptr + at, dx, rows, cols, WIDTH, valid, L, WIDTH)
        dx = linear_grad(dx, sd_ptr, R, WIDTH, BLOCK_L, BLOCK_R, BLOCK_W)
        dx += load(dx1_ptr + atr, rows, outs, R, valid, R).to(tl.float32)
    if DOWN:
        _down_grad(dx, a_ptr + at, wd_ptr, dout_ptr + sample * stride_dyb, da_ptr + at, din_ptr + sample * stride_dxb,
                   rows, valid, L, D, stride_dyl, stride_dxl, R, NEED_DX, BLOCK_L, BLOCK_R, BLOCK_D)  # fmt: skip
    else:
        store(dx_ptr + atr, dx, rows, outs, R, valid, L, R)


@triton.jit
def up_grad_kernel(
    dy_ptr, a_ptr, o_ptr, os_ptr, wi_ptr, bi_ptr, wo_ptr, bo_ptr, wu_ptr, bu_ptr, gate_ptr, rgate_ptr,
    sd_ptr, sdb_ptr, so_ptr, sob_ptr, su_ptr, sub_ptr, sgate_ptr, lengths_ptr,
    m_ptr, dm_ptr, dxo_ptr, do_ptr, in_ptr, qkv_ptr, gates_ptr, dbu_ptr,
    B, L, D, tiles, stride_dyb, stride_dyl,
    R: tl.constexpr, S: tl.constexpr,
    SHARED: tl.constexpr, STREAMED: tl.constexpr, HAS_RGATE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From dy to dx2, the gradient of the second attention's output, and the inputs h and x1 of both once more.

    STREAMED: also the gradient of the second attention's o, and its q, k and v once more.
    """
    sample, tile, valid = sample_and_tile(lengths_ptr, L, tiles, HAS_LENGTHS)
    rows = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    outs = tl.arange(0, BLOCK_R)
    program = tl.program_id(0).to(tl.int64)
    at = sample * L * R
    second = (B + sample) * L * R
    dm = _up_grad(dy_ptr + sample * stride_dyb, wu_ptr, bu_ptr, a_ptr + at, o_ptr + second, wo_ptr, bo_ptr, gate_ptr,
                  rgate_ptr, in_ptr + at, m_ptr + at, gates_ptr + 3 * program, dbu_ptr + program * D, rows, valid, L, D,
                  stride_dyl, R, HAS_RGATE, BLOCK_L, BLOCK_R, BLOCK_D, BLOCK_K)  # fmt: skip
    store(dm_ptr + at, dm, rows, outs, R, valid, L, R)
    dx2 = cast((1 - sigmoid_at(gate_ptr)) * dm, dxo_ptr.dtype.element_ty)
    store(dxo_ptr + second, dx2, rows, outs, R, valid, L, R)
    if STREAMED:
        linear_grad_to(dx2, wo_ptr, do_ptr + at, rows, valid, L, R, R, BLOCK_L, BLOCK_R, BLOCK_N)
    if SHARED:
        q = linear_from(os_ptr + sample * L * S, S, so_ptr, sob_ptr, rows, valid, S, S, BLOCK_L, BLOCK_S, 16)
        x1, _, z = shared_mix(o_ptr + at, q, wo_ptr, bo_ptr, sd_ptr, sdb_ptr, sgate_ptr,
                              rows, valid, R, S, BLOCK_L, BLOCK_R, BLOCK_S)  # fmt: skip
        x1 += linear(z, su_ptr, sub_ptr, S, R, BLOCK_L, BLOCK_S, BLOCK_R)
    else:
        x1 = linear_from(o_ptr + at, R, wo_ptr, bo_ptr, rows, valid, R, R, BLOCK_L, BLOCK_R, BLOCK_K)
    store(in_ptr + second, x1, rows, outs, R, valid, L, R)
    if STREAMED:
        linear_to(x1, wi_ptr, bi_ptr, qkv_ptr + 3 * at, rows, valid, L, R, 3 * R, BLOCK_L, BLOCK_R, BLOCK_N)


@triton.jit
def middle_grad_kernel(
    dqkv_ptr, dx1_ptr, dp_ptr, wi_ptr, bi_ptr, wo_ptr, sd_ptr, lengths_ptr, dxo_ptr, do_ptr, in_ptr, qkv_ptr,
    dqkvs_ptr, dz_ptr, si_ptr, sgate_ptr, L, tiles,
    R: tl.constexpr, S: tl.constexpr, SHARED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """To the gradient of the first attention's o, from the attention after it; q, k and v of the first once more."""
    sample, tile, valid = sample_and_tile(lengths_ptr, L, tiles, HAS_LENGTHS)
    rows = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    outs = tl.arange(0, BLOCK_R)
    at, ats = sample * L * R, sample * L * S
    if SHARED:
        inner = tl.arange(0, BLOCK_S)
        dp = linear_grad_from(dqkvs_ptr + 3 * ats, si_ptr, rows, valid, S, 3 * S, BLOCK_L, BLOCK_S, BLOCK_K)
        dz = load(dz_ptr + ats, rows, inner, S, valid, S).to(tl.float32)
        dp += (1 - sigmoid_at(sgate_ptr)) * dz
        store(dp_ptr + ats, dp, rows, inner, S, valid, L, S)
        dx = linear_grad(dp, sd_ptr, R, S, BLOCK_L, BLOCK_R, BLOCK_S)
        dx += load(dx1_ptr + at, rows, outs, R, valid, R).to(tl.float32)
    else:
        dx = linear_grad_from(dqkv_ptr + 3 * at, wi_ptr, rows, valid, R, 3 * R, BLOCK_L, BLOCK_R, BLOCK_K)
    dx = cast(dx, dxo_ptr.dtype.element_ty)
    store(dxo_ptr + at, dx, rows, outs, R, valid, L, R)
    linear_grad_to(dx, wo_ptr, do_ptr + at, rows, valid, L, R, R, BLOCK_L, BLOCK_R, BLOCK_N)
    h = load(in_ptr + at, rows, outs, R, valid, R)
    linear_to(h, wi_ptr, bi_ptr, qkv_ptr + 3 * at, rows, valid, L, R, 3 * R, BLOCK_L, BLOCK_R, BLOCK_N)


@triton.jit
def shared_out_grad_kernel(
    dqkv_ptr, o_ptr, os_ptr, wi_ptr, wo_ptr, bo_ptr, sd_ptr, sdb_ptr, si_ptr, sib_ptr, so_ptr, sob_ptr, su_ptr,
    sgate_ptr, lengths_ptr, dx1_ptr, x1_ptr, p_ptr, z_ptr, dz_ptr, dqo_ptr, dos_ptr, qkvs_ptr, gates_ptr, L, tiles,
    R: tl.constexpr, S: tl.constexpr, STREAMED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """To the gradient of the shared attention's output; what the sub-adapter's weights need, once more.

    STREAMED: from dq, dk and dv of the second attention, to the gradient of the shared one's o; its q, k and v.
    """
    sample, tile, valid = sample_and_tile(lengths_ptr, L, tiles, HAS_LENGTHS)
    rows = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    outs = tl.arange(0, BLOCK_R)
    inner = tl.arange(0, BLOCK_S)
    at, ats = sample * L * R, sample * L * S
    q = linear_from(os_ptr + ats, S, so_ptr, sob_ptr, rows, valid, S, S, BLOCK_L, BLOCK_S, 16)
    x1, p, z = shared_mix(o_ptr + at, q, wo_ptr, bo_ptr, sd_ptr, sdb_ptr, sgate_ptr,
                          rows, valid, R, S, BLOCK_L, BLOCK_R, BLOCK_S)  # fmt: skip
    store(x1_ptr + at, x1, rows, outs, R, valid, L, R)
    store(p_ptr + ats, p, rows, inner, S, valid, L, S)
    store(z_ptr + ats, z, rows, inner, S, valid, L, S)
    if STREAMED:
        linear_to(p, si_ptr, sib_ptr, qkvs_ptr + 3 * ats, rows, valid, L, S, 3 * S, BLOCK_L, BLOCK_S, BLOCK_N)
        dx1 = linear_grad_from(dqkv_ptr + 3 * at, wi_ptr, rows, valid, R, 3 * R, BLOCK_L, BLOCK_R, BLOCK_K)
        dx1 = cast(dx1, dx1_ptr.dtype.element_ty)
        store(dx1_ptr + at, dx1, rows, outs, R, valid, L, R)
    else:
        dx1 = load(dx1_ptr + at, rows, outs, R, valid, R)
    dz = _shared_out_grad(dx1, q, p, sgate_ptr, su_ptr, gates_ptr + 3 * tl.program_id(0).to(tl.int64),
                          R, S, BLOCK_L, BLOCK_R, BLOCK_S)  # fmt: skip
    store(dz_ptr + ats, dz, rows, inner, S, valid, L, S)
    dq = cast(sigmoid_at(sgate_ptr) * dz, dqo_ptr.dtype.element_ty)
    store(dqo_ptr + ats, dq, rows, inner, S, valid, L, S)
    if STREAMED:
        linear_grad_to(dq, so_ptr, dos_ptr + ats, rows, valid, L, S, S, BLOCK_L, BLOCK_S, BLOCK_N)


@triton.jit
def down_grad_kernel(
    dqkv_ptr, dm_ptr, a_ptr, dy_ptr, wd_ptr, wi_ptr, gate_ptr, lengths_ptr, da_ptr, dx_ptr,
    L, D, tiles, stride_dyb, stride_dyl, stride_dxb, stride_dxl,
    R: tl.constexpr, HAS_LENGTHS: tl.constexpr, NEED_DX: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From the first attention's dq, dk and dv to dx."""
    sample, tile, valid = sample_and_tile(lengths_ptr, L, tiles, HAS_LENGTHS)
    rows = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    at = sample * L * R
    dh = linear_grad_from(dqkv_ptr + 3 * at, wi_ptr, rows, valid, R, 3 * R, BLOCK_L, BLOCK_R, BLOCK_K)
    dh += sigmoid_at(gate_ptr) * load(dm_ptr + at, rows, tl.arange(0, BLOCK_R), R, valid, R).to(tl.float32)
    _down_grad(dh, a_ptr + at, wd_ptr, dy_ptr + sample * stride_dyb, da_ptr + at, dx_ptr + sample * stride_dxb,
               rows, valid, L, D, stride_dyl, stride_dxl, R, NEED_DX, BLOCK_L, BLOCK_R, BLOCK_D)  # fmt: skip
