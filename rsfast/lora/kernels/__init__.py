"""Triton kernels of linear layers with LoRA, and the choice among them and cuBLAS."""

import functools

import torch
from torch import Tensor

from rsfast._dispatch import once_differentiable, register
from rsfast._tiles import rows_apart
from rsfast.lora.kernels import launch, together
from rsfast.lora.kernels.parts import lora_expand, lora_shrink
from rsfast.lora.kernels.plan import flat


def _fake_fwd(x, weight, bias, lora_A, lora_B, scale, scales, tables, slices, dropout_p, seed, insist, save):
    rows, ranks = len(x) if save else 0, lora_A.shape[-2]
    bits = rows, (x.shape[1] + 7) // 8 if dropout_p else 0
    return x.new_empty(len(x), len(weight)), x.new_empty(rows, ranks), x.new_empty(bits, dtype=torch.uint8)


def _fake_bwd(
    dy, x, s, bits, weight, lora_A, lora_B, scale, scales, tables, slices, dropout_p, insist,
    need_x, need_A, need_B, need_weight, need_bias, function, made,
):  # fmt: skip
    owners = (lora_A, need_A), (lora_B, need_B), (weight, need_weight)
    dx, db = dy.new_empty(x.shape if need_x else 0), weight.new_empty(len(weight) if need_bias else 0)
    return dx, *(t.new_empty(t.shape if need else 0) for t, need in owners), db


__all__ = ["lora_expand", "lora_linear", "lora_shrink"]
_LAYER = (
    "Tensor weight, {bias}Tensor lora_A, Tensor lora_B, float scale, Tensor? scales, Tensor[] tables, int[] slices, "
    "float dropout_p, "
)
_fwd = register(
    f"lora_linear_fwd(Tensor x, {_LAYER.format(bias='Tensor? bias, ')}Tensor? seed, bool insist, bool save) "
    "-> (Tensor, Tensor, Tensor)",
    launch.fwd,
    _fake_fwd,
)
_bwd = register(
    f"lora_linear_bwd(Tensor dy, Tensor x, Tensor s, Tensor bits, {_LAYER.format(bias='')}bool insist, "
    "bool need_x, bool need_A, bool need_B, bool need_weight, bool need_bias, str? function, Tensor?[] made) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launch.bwd,
    _fake_bwd,
)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, lora_A, lora_B, scales, seed, scale, tables, slices, dropout_p, insist, source, shares
    ):  # fmt: skip
        y, s, bits = _fwd(
            x, weight, bias, lora_A, lora_B, scale, scales, tables, slices, dropout_p, seed, insist, True
        )  # fmt: skip
        function, kept, *made = (None, x, *[None] * 4) if source is None else source
        ctx.save_for_backward(kept, s, bits, weight, lora_A, lora_B, scales, *made, *tables)
        ctx.options, ctx.shares = (scale, slices, dropout_p, insist, function), shares
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        kept, s, bits, weight, lora_A, lora_B, scales, *rest = ctx.saved_tensors
        scale, slices, dropout_p, insist, function = ctx.options
        need_x, need_weight, need_bias, need_A, need_B = needs = ctx.needs_input_grad[:5]
        run = _bwd if ctx.shares is None else functools.partial(together.bwd_later, ctx.shares)
        dx, dA, dB, dW, db = run(
            rows_apart(dy), kept, s, bits, weight, lora_A, lora_B, scale, scales, rest[4:], slices, dropout_p, insist,
            need_x, need_A, need_B, need_weight, need_bias, function, rest[:4],
        )  # fmt: skip
        grads = (grad if need else None for grad, need in zip((dx, dW, db, dA, dB), needs, strict=True))
        return *grads, *[None] * 9


def _by_rows(source, weight: Tensor):
    """A source as the operation takes it, by rows; None where x has to be kept all the same."""
    if source is None or weight.requires_grad or not source.input.is_contiguous():
        return None
    mean, rstd = (None if t is None else t.detach().reshape(-1) for t in (source.mean, source.rstd))
    learned = (None if t is None else t.detach().contiguous() for t in (source.weight, source.bias))
    return source.function, source.input.detach().view(-1, source.input.shape[-1]), mean, rstd, *learned


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor,
    tables: list[Tensor] | None, dropout_p: float, seed: Tensor | None, slices, source, insist: bool,
) -> Tensor:  # fmt: skip
    """``tables`` are those of ``AdapterBatch.plan``, or None for one adapter."""
    if x.ndim == 3 and tables is None and not dropout_p and x.stride(0) < x.stride(1):  # tokens first in memory
        y = lora_linear(
            x.transpose(0, 1), weight, bias, lora_A, lora_B, scaling, tables, dropout_p, seed, slices, None, insist
        )  # fmt: skip
        return y.transpose(0, 1)
    rows = rows_apart(x.reshape(-1, x.shape[-1]))
    scale, scales = (scaling, None) if tables is None else (1.0, scaling)
    weight, bias = rows_apart(weight), None if bias is None else bias.contiguous()
    scales = None if scales is None else scales.contiguous()
    tables, slices = tables or [], flat(slices)
    learned = [t for t in (x, weight, bias, lora_A, lora_B) if t is not None and t.requires_grad]
    if torch.is_grad_enabled() and learned:
        source = _by_rows(source, weight)
        lora_A, lora_B, shares = together.take(rows, weight, lora_A, lora_B, tables, slices, dropout_p, insist, source)
        y = _LoRALinear.apply(
            rows, weight, bias, lora_A, lora_B, scales, seed, scale, tables, slices, dropout_p, insist, source, shares
        )  # fmt: skip
    else:
        y, _, _ = _fwd(
            rows, weight, bias, lora_A, lora_B, scale, scales, tables, slices, dropout_p, seed, insist, False
        )  # fmt: skip
    return y.view(*x.shape[:-1], len(weight))
