"""Launchers of the gated adapter's kernels: memory, grids, and the GEMMs of the weights' gradients."""

import torch
from torch import Tensor

from rsfast._dispatch import capability
from rsfast._tiles import cdiv
from rsfast.adapter.kernels import backward, forward
from rsfast.adapter.kernels.attention import streamed_grad_kernel
from rsfast.adapter.kernels.plan import Plan, plan
from rsfast.adapter.reference import SharedWeights


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Contiguous copies in ``dtype`` of those that are not so already, in one launch."""
    if all(t.dtype == dtype and t.is_contiguous() for t in tensors):
        return tensors
    copies = [torch.empty(t.shape, dtype=dtype, device=t.device) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


class _Call:
    """What every launch of one call needs: sizes, plan, weights in the dtype of the products."""

    def __init__(self, x, weights, residual_gate, shared, lengths, heads, shared_heads, dtype):
        self.x, self.lengths, self.heads, self.shared_heads, self.dtype = x, lengths, heads, shared_heads, dtype
        (self.B, self.L, self.D), self.R = x.shape, weights[0].shape[0]
        self.S = self.R // 2
        *matrices, self.gate = weights  # gates stay as they are: the kernels read them in fp32
        *shared_matrices, self.shared_gate = shared or [None]
        cast = _cast([*matrices, *shared_matrices], dtype)
        self.wd, self.bd, self.wi, self.bi, self.wo, self.bo, self.wu, self.bu = cast[:8]
        self.shared = SharedWeights(*cast[8:], self.shared_gate) if shared else SharedWeights(*[None] * 9)
        self.has_shared = bool(shared)
        self.residual_gate = residual_gate
        self.plan: Plan = plan(self.L, self.R, heads, shared_heads, dtype, capability(x.device))
        self.tiles = cdiv(self.L, self.plan.BLOCK_L)

    def new(self, *shape, dtype=None) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype or self.dtype)

    def options(self, blocks: str, warps: int | None = None) -> dict:
        crowded = self.plan.resident or (self.has_shared and self.dtype == torch.float32)
        limit = dict(maxnreg=255) if crowded else {}  # without it the compiler spills, to use fewer registers
        warps = warps or self.plan.num_warps
        return dict(HAS_LENGTHS=self.lengths is not None, num_warps=warps, **limit, **self.plan.blocks(blocks))


def fwd(
    x: Tensor, weights: list[Tensor], residual_gate: Tensor | None, shared: list[Tensor], lengths: Tensor | None,
    heads: int, shared_heads: int, dtype: torch.dtype, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and what backward needs: a, o and lse of both attentions, o and lse of the shared one (empty if not saved)."""
    c = _Call(x, weights, residual_gate, shared, lengths, heads, shared_heads, dtype)
    B, L, R, S = c.B, c.L, c.R, c.S
    y = torch.empty_like(x)
    a, o, lse = c.new(B, L, R), c.new(2, B, L, R), c.new(2, B, heads, L, dtype=torch.float32)
    Bs = B if c.has_shared else 0
    os, lses = c.new(Bs, L, S), c.new(Bs, shared_heads, L, dtype=torch.float32)
    if x.numel():
        (_resident_forward if c.plan.resident else _streamed_forward)(c, y, a, o, lse, os, lses)
    if save:
        return y, a, o, lse, os, lses
    return (y, *(c.new(0) for _ in range(2)), c.new(0, dtype=torch.float32), c.new(0), c.new(0, dtype=torch.float32))


def _resident_forward(c: _Call, y, a, o, lse, os, lses):
    x1 = c.new(c.B, c.L, c.R) if c.has_shared else a
    halves = [(True, False), (False, True)] if c.has_shared else [(True, True)]
    for first, second in halves:
        forward.resident_kernel[(c.B,)](
            c.x, c.wd, c.bd, c.wi, c.bi, c.wo, c.bo, c.wu, c.bu, c.gate, c.residual_gate, *c.shared,
            c.lengths, y, a, o, lse, os, lses, x1,
            c.B, c.L, c.D, c.x.stride(0), c.x.stride(1), y.stride(0), y.stride(1),
            R=c.R, S=c.S, HEADS=c.heads, SHARED_HEADS=c.shared_heads,
            FIRST=first, SHARED=first and c.has_shared, SECOND=second,
            HAS_RGATE=c.residual_gate is not None, **c.options("L R S H HS D"),
        )  # fmt: skip


def _streamed_forward(c: _Call, y, a, o, lse, os, lses):
    B, L, D, R, S, x, sh = c.B, c.L, c.D, c.R, c.S, c.x, c.shared
    grid = (B * c.tiles,)
    qkv, qkv2 = c.new(B, L, 3 * R), c.new(B, L, 3 * R)
    forward.down_kernel[grid](
        x, c.wd, c.bd, c.wi, c.bi, c.lengths, a, qkv, L, D, c.tiles, x.stride(0), x.stride(1),
        R=R, **c.options("L R D N"),
    )  # fmt: skip
    qkvs = c.new(B, L, 3 * S) if c.has_shared else qkv2
    forward.first_kernel[grid](
        qkv, c.wi, c.bi, c.wo, c.bo, *sh[:4], c.lengths, o, lse, qkvs, L, c.tiles,
        R=R, S=S, HEADS=c.heads, SHARED=c.has_shared, **c.options("L R S H K N"),
    )  # fmt: skip
    if c.has_shared:
        forward.shared_kernel[grid](
            qkvs, o, c.wi, c.bi, c.wo, c.bo, *sh[:2], *sh[4:], c.lengths, os, lses, qkv2, L, c.tiles,
            R=R, S=S, SHARED_HEADS=c.shared_heads, **c.options("L R S HS K N"),
        )  # fmt: skip
    forward.second_kernel[grid](
        qkv2, a, x, c.wo, c.bo, c.wu, c.bu, c.gate, c.residual_gate, c.lengths, y, o[1], lse[1],
        L, D, c.tiles, x.stride(0), x.stride(1), y.stride(0), y.stride(1),
        R=R, HEADS=c.heads, HAS_RGATE=c.residual_gate is not None, **c.options("L R H K D"),
    )  # fmt: skip


def bwd(
    dy: Tensor, x: Tensor, a: Tensor, o: Tensor, lse: Tensor, os: Tensor, lses: Tensor,
    weights: list[Tensor], residual_gate: Tensor | None, shared: list[Tensor], lengths: Tensor | None,
    heads: int, shared_heads: int, need_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x (empty if not needed), the nine weights, the residual gate if any, the shared nine if any."""
    c = _Call(x, weights, residual_gate, shared, lengths, heads, shared_heads, a.dtype)
    B, L, D, R = c.B, c.L, c.D, c.R
    programs = B * c.tiles
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    m, dm, da = (c.new(B, L, R) for _ in range(3))
    dxo, inputs, dqkv = c.new(2, B, L, R), c.new(2, B, L, R), c.new(2, B, L, 3 * R)
    gates = c.new(programs, 3, dtype=torch.float32)
    dbu = c.new(programs, D, dtype=torch.float32)
    share = _SharedGrads(c) if c.has_shared else None
    if x.numel():
        _backward(c, dy, a, o, lse, os, lses, m, dm, dxo, inputs, dqkv, gates, dbu, da, dx, share)
    dgate, drgate, dsgate = (g.clone() for g in gates.sum(0))  # outputs of an operator may not share memory
    grads = [
        _outer(da, x.to(c.dtype)), _sum(da), _outer(dqkv, inputs), _sum(dqkv), _outer(dxo, o), _sum(dxo),
        _outer(dy.to(c.dtype), m), dbu.sum(0), dgate,
    ]  # fmt: skip
    if residual_gate is not None:
        grads.append(drgate)
    if c.has_shared:
        grads += [*share.weights(os), dsgate]
    owners = [*weights, *([] if residual_gate is None else [residual_gate]), *shared]
    return [dx, *(g.to(w.dtype) for g, w in zip(grads, owners, strict=True))]


def _backward(c: _Call, dy, a, o, lse, os, lses, m, dm, dxo, inputs, dqkv, gates, dbu, da, dx, share):
    B, L, D, R, S, sh, resident = c.B, c.L, c.D, c.R, c.S, c.shared, c.plan.resident
    grid = (B * c.tiles,)
    do = qkv = dos = qkvs = dx1 = dp = dz = dqkvs = dqs = p = None
    if not resident:
        do, qkv = c.new(B, L, R), c.new(B, L, 3 * R)
    if share:
        dx1, dp, dqkvs, dqs, p, dz = share.dx1, share.dp, share.dqkv, share.dq, share.p, c.new(B, L, S)
        if not resident:
            dos, qkvs = c.new(B, L, S), c.new(B, L, 3 * S)

    def streamed(qkv, do, o, lse, dqkv, width, heads, head_block):
        streamed_grad_kernel[(B * c.tiles * heads,)](
            qkv, do, o, lse, dqkv, c.lengths, L, c.tiles,
            WIDTH=width, HEADS=heads, BLOCK_H=head_block, **c.options("L"),
        )  # fmt: skip

    def whole(x, dy_, wi, bi, wo, dqkv, dx_, width, heads, blocks, shared=False, down=False):
        backward.resident_grad_kernel[(B,)](
            x, dy_, wi, bi, wo, c.lengths, dqkv, dx_, dz, dp, sh.down_weight, sh.gate, dx1,
            dm, a, c.gate, c.wd, dy, da, dx, L, D, dy.stride(0), dy.stride(1), *_strides(dx),
            WIDTH=width, HEADS=heads, R=R, SHARED=shared, DOWN=down, NEED_DX=dx.numel() > 0,
            BLOCK_W=blocks[0], BLOCK_H=blocks[1], **c.options("L R D", c.plan.grad_warps),
        )  # fmt: skip

    backward.up_grad_kernel[grid](
        dy, a, o, os, c.wi, c.bi, c.wo, c.bo, c.wu, c.bu, c.gate, c.residual_gate,
        *sh[:2], *sh[4:], c.lengths, m, dm, dxo, do, inputs, qkv, gates, dbu,
        B, L, D, c.tiles, dy.stride(0), dy.stride(1),
        R=R, S=S, SHARED=c.has_shared, STREAMED=not resident, HAS_RGATE=c.residual_gate is not None,
        **c.options("L R S D K N"),
    )  # fmt: skip
    own = R, c.heads, (c.plan.BLOCK_R, c.plan.BLOCK_H)
    inner = S, c.shared_heads, (c.plan.BLOCK_S, c.plan.BLOCK_HS)
    if resident:
        whole(inputs[1], dxo[1], c.wi, c.bi, c.wo, dqkv[1], dx1 if share else dxo[0], *own)
    else:
        streamed(qkv, do, o[1], lse[1], dqkv[1], R, c.heads, c.plan.BLOCK_H)
    if share:
        backward.shared_out_grad_kernel[grid](
            dqkv[1], o, os, c.wi, c.wo, c.bo, *sh[:7], sh.gate, c.lengths,
            dx1, share.x1, p, share.z, dz, dqs, dos, qkvs, gates, L, c.tiles,
            R=R, S=S, STREAMED=not resident, **c.options("L R S K N"),
        )  # fmt: skip
        if resident:
            whole(p, dqs, *sh[2:5], dqkvs, dxo[0], *inner, shared=True)
        else:
            streamed(qkvs, dos, os, lses, dqkvs, S, c.shared_heads, c.plan.BLOCK_HS)
    if resident:
        return whole(inputs[0], dxo[0], c.wi, c.bi, c.wo, dqkv[0], None, *own, down=True)
    backward.middle_grad_kernel[grid](
        dqkv[1], dx1, dp, c.wi, c.bi, c.wo, sh.down_weight, c.lengths, dxo, do, inputs, qkv,
        dqkvs, dz, sh.in_proj_weight, sh.gate, L, c.tiles,
        R=R, S=S, SHARED=c.has_shared, **c.options("L R S K N"),
    )  # fmt: skip
    streamed(qkv, do, o, lse, dqkv, R, c.heads, c.plan.BLOCK_H)
    backward.down_grad_kernel[grid](
        dqkv, dm, a, dy, c.wd, c.wi, c.gate, c.lengths, da, dx,
        L, D, c.tiles, dy.stride(0), dy.stride(1), *_strides(dx),
        R=R, NEED_DX=dx.numel() > 0, **c.options("L R D K"),
    )  # fmt: skip


def _strides(dx: Tensor) -> tuple[int, int]:
    return (dx.stride(0), dx.stride(1)) if dx.ndim == 3 else (0, 0)


class _SharedGrads:
    """Activations and gradients of the shared sub-adapter that its weights' gradients are made of."""

    def __init__(self, c: _Call):
        B, L, R, S = c.B, c.L, c.R, c.S
        self.dx1, self.x1 = c.new(B, L, R), c.new(B, L, R)
        self.p, self.z, self.dq, self.dp = (c.new(B, L, S) for _ in range(4))
        self.dqkv = c.new(B, L, 3 * S)

    def weights(self, os: Tensor) -> list[Tensor]:
        pairs = ((self.dp, self.x1), (self.dqkv, self.p), (self.dq, os), (self.dx1, self.z))
        return [g for dy, x in pairs for g in (_outer(dy, x), _sum(dy))]


def _outer(dy: Tensor, x: Tensor) -> Tensor:
    """Sum over tokens of dy x^T: the gradient of a weight."""
    return dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1])


def _sum(dy: Tensor) -> Tensor:
    """Sum over tokens: the gradient of a bias."""
    return dy.reshape(-1, dy.shape[-1]).sum(0)
