"""Triton forward and backward of :func:`rsfast.gated_adapter`."""

import torch
from torch import Tensor

from rsfast._dispatch import once_differentiable, register
from rsfast.adapter.kernels.launch import bwd, fwd
from rsfast.adapter.reference import SharedWeights

WEIGHTS = 9  # of the adapter, and of the shared sub-adapter


def _fake_fwd(x, weights, residual_gate, shared, lengths, num_heads, shared_heads, dtype, save):
    B, L, _ = x.shape
    R = weights[0].shape[0]
    y = torch.empty_like(x)
    if not save:
        return y, *(x.new_empty(0, dtype=d) for d in (dtype, dtype, torch.float32, dtype, torch.float32))
    Bs = B if shared else 0
    return (
        y,
        x.new_empty(B, L, R, dtype=dtype),
        x.new_empty(2, B, L, R, dtype=dtype),
        x.new_empty(2, B, num_heads, L, dtype=torch.float32),
        x.new_empty(Bs, L, R // 2, dtype=dtype),
        x.new_empty(Bs, shared_heads, L, dtype=torch.float32),
    )


def _fake_bwd(
    dy, x, a, o, lse, os, lses, weights, residual_gate, shared, lengths, num_heads, shared_heads, need_dx
):  # fmt: skip
    owners = [*weights, *([] if residual_gate is None else [residual_gate]), *shared]
    return [torch.empty_like(x) if need_dx else x.new_empty(0), *(w.new_empty(w.shape) for w in owners)]


_fwd = register(
    "gated_adapter_fwd(Tensor x, Tensor[] weights, Tensor? residual_gate, Tensor[] shared, Tensor? lengths, "
    "int num_heads, int shared_heads, ScalarType dtype, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fwd,
    _fake_fwd,
)
_bwd = register(
    "gated_adapter_bwd(Tensor dy, Tensor x, Tensor a, Tensor o, Tensor lse, Tensor os, Tensor lses, Tensor[] weights, "
    "Tensor? residual_gate, Tensor[] shared, Tensor? lengths, int num_heads, int shared_heads, bool need_dx) "
    "-> Tensor[]",
    bwd,
    _fake_bwd,
)


class _GatedAdapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lengths, num_heads, shared_heads, dtype, residual_gate, *weights):
        own, shared = list(weights[:WEIGHTS]), list(weights[WEIGHTS:])
        y, *kept = _fwd(x, own, residual_gate, shared, lengths, num_heads, shared_heads, dtype, True)
        ctx.save_for_backward(x, lengths, residual_gate, *kept, *weights)
        ctx.heads = num_heads, shared_heads
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, lengths, residual_gate, *rest = ctx.saved_tensors
        kept, weights = rest[:5], rest[5:]
        dx, *grads = _bwd(
            _rows(dy), x, *kept, weights[:WEIGHTS], residual_gate, weights[WEIGHTS:], lengths,
            *ctx.heads, ctx.needs_input_grad[0],
        )  # fmt: skip
        own, gated = grads[:WEIGHTS], residual_gate is not None
        drgate = grads[WEIGHTS] if gated else None
        shared = grads[WEIGHTS + gated :]
        return dx if ctx.needs_input_grad[0] else None, None, None, None, None, drgate, *own, *shared


def _rows(x: Tensor) -> Tensor:
    """``x`` with contiguous features and a sample within reach of 32-bit offsets; any other strides are fine."""
    return x if x.stride(2) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def gated_adapter(
    x: Tensor, *tensors: Tensor | None, shared: SharedWeights | None, lengths: Tensor | None,
    num_heads: int, shared_heads: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``tensors`` are the nine weights and the residual gate (or None)."""
    *own, residual_gate = tensors
    x, shared = _rows(x), list(shared or ())
    learned = [t for t in (x, residual_gate, *own, *shared) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in learned):
        return _GatedAdapter.apply(x, lengths, num_heads, shared_heads, dtype, residual_gate, *own, *shared)
    return _fwd(x, own, residual_gate, shared, lengths, num_heads, shared_heads, dtype, False)[0]
