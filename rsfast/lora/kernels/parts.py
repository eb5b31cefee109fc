"""The two halves of a LoRA as operations of their own."""

import torch
from torch import Tensor

from rsfast._dispatch import once_differentiable, register
from rsfast._tiles import rows_apart
from rsfast.lora.kernels.expand import expand
from rsfast.lora.kernels.launch import batch_of, low_stage
from rsfast.lora.kernels.outer import outer
from rsfast.lora.kernels.plan import flat
from rsfast.lora.kernels.shrink import shrink


def _shrink_fwd(x, lora_A, scale, scales, tables):
    return shrink(x, lora_A, scale, batch_of(tables, scales))[0]


def _shrink_bwd(ds, x, lora_A, scale, scales, tables, need_x, need_A):
    batch = batch_of(tables, scales)
    if batch.several:
        ds = ds * torch.cat([scales.new_zeros(1), scales]).to(ds.dtype)[batch.ids + 1, None]
    else:
        ds = ds * scale
    dx = expand(torch.empty_like(x), None, ds, lora_A.mT, batch) if need_x else x.new_empty(0)
    return dx, outer(ds, x, lora_A, batch, transposed=False) if need_A else lora_A.new_empty(0)


def _expand_fwd(s, lora_B, base, tables, slices, outputs):
    return expand(s.new_empty(len(s), outputs), base, s, lora_B, batch_of(tables, None), slices=tuple(slices))


def _expand_bwd(dy, s, lora_B, tables, slices, need_B):
    scales = lora_B.new_ones(len(lora_B)) if tables else None
    return low_stage(dy, lora_B, s, 1.0, batch_of(tables, scales), tuple(slices), "once", need_B)


def _fake_shrink_bwd(ds, x, lora_A, scale, scales, tables, need_x, need_A):
    return x.new_empty(x.shape if need_x else 0), lora_A.new_empty(lora_A.shape if need_A else 0)


def _fake_expand_bwd(dy, s, lora_B, tables, slices, need_B):
    return s.new_empty(s.shape), lora_B.new_empty(lora_B.shape if need_B else 0)


_shrink = register(
    "lora_shrink_fwd(Tensor x, Tensor lora_A, float scale, Tensor? scales, Tensor[] tables) -> Tensor",
    _shrink_fwd,
    lambda x, lora_A, scale, scales, tables: x.new_empty(len(x), lora_A.shape[-2]),
)
_shrink_grad = register(
    "lora_shrink_bwd(Tensor ds, Tensor x, Tensor lora_A, float scale, Tensor? scales, Tensor[] tables, bool need_x, "
    "bool need_A) -> (Tensor, Tensor)",
    _shrink_bwd,
    _fake_shrink_bwd,
)
_expand = register(
    "lora_expand_fwd(Tensor s, Tensor lora_B, Tensor? base, Tensor[] tables, int[] slices, SymInt outputs) -> Tensor",
    _expand_fwd,
    lambda s, lora_B, base, tables, slices, outputs: s.new_empty(len(s), outputs),
)
_expand_grad = register(
    "lora_expand_bwd(Tensor dy, Tensor s, Tensor lora_B, Tensor[] tables, int[] slices, bool need_B) "
    "-> (Tensor, Tensor)",
    _expand_bwd,
    _fake_expand_bwd,
)


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lora_A, scales, scale, tables):
        ctx.save_for_backward(x, lora_A, scales, *tables)
        ctx.scale = scale
        return _shrink(x, lora_A, scale, scales, tables)

    @staticmethod
    @once_differentiable
    def backward(ctx, ds):
        x, lora_A, scales, *tables = ctx.saved_tensors
        need_x, need_A = ctx.needs_input_grad[:2]
        dx, dA = _shrink_grad(ds.contiguous(), x, lora_A, ctx.scale, scales, tables, need_x, need_A)
        return dx if need_x else None, dA if need_A else None, None, None, None


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, lora_B, base, tables, slices, outputs):
        ctx.save_for_backward(s, lora_B, *tables)
        ctx.slices = slices
        return _expand(s, lora_B, base, tables, slices, outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        s, lora_B, *tables = ctx.saved_tensors
        need_s, need_B, need_base = ctx.needs_input_grad[:3]
        ds = dB = None
        if need_s or need_B:
            ds, dB = _expand_grad(rows_apart(dy), s, lora_B, tables, ctx.slices, need_B)
        return ds if need_s else None, dB if need_B else None, dy if need_base else None, None, None, None


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def lora_shrink(x: Tensor, lora_A: Tensor, scaling: float | Tensor, tables: list[Tensor] | None) -> Tensor:
    """``tables`` are those of ``AdapterBatch.plan``, or None for one adapter."""
    rows = rows_apart(x.reshape(-1, x.shape[-1]))
    scale, scales = (scaling, None) if tables is None else (1.0, scaling.contiguous())
    tables = tables or []
    if _learns(x, lora_A):
        s = _Shrink.apply(rows, lora_A, scales, scale, tables)
    else:
        s = _shrink(rows, lora_A, scale, scales, tables)
    return s.view(*x.shape[:-1], lora_A.shape[-2])


def lora_expand(
    s: Tensor, lora_B: Tensor, base: Tensor | None, tables: list[Tensor] | None, slices, outputs: int
) -> Tensor:
    """``tables`` as in :func:`lora_shrink`; the result has ``outputs`` columns."""
    low = rows_apart(s.reshape(-1, s.shape[-1]))
    tables, slices = tables or [], flat(slices)
    below = None if base is None else rows_apart(base.reshape(-1, outputs))
    run = _Expand.apply if _learns(s, lora_B, base) else _expand
    return run(low, lora_B, below, tables, slices, outputs).view(*s.shape[:-1], outputs)
