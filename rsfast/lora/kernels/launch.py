"""One layer's forward and backward, stage by stage, each in the implementation chosen for these sizes."""

import torch
from torch import Tensor

from rsfast._tiles import cdiv
from rsfast.lora.kernels.expand import expand
from rsfast.lora.kernels.linear import linear
from rsfast.lora.kernels.once import MAX_RANK, once
from rsfast.lora.kernels.outer import outer
from rsfast.lora.kernels.plan import Batch, Facts, Made, Slices, choose
from rsfast.lora.kernels.shrink import shrink
from rsfast.lora.kernels.sums import AT_ONCE, Sums
from rsfast.lora.reference import LEVELS, levels, made_again


def batch_of(tables: list[Tensor], scales: Tensor | None) -> Batch:
    """The tables of ``AdapterBatch.plan``, or none."""
    if not tables:
        return Batch()
    ids, counts, listed, order, fine, fine_last, coarse, coarse_last = tables
    return Batch(ids, counts, listed, order, fine, fine_last, coarse, coarse_last, scales)


def facts_of(
    x: Tensor, dtype: torch.dtype, weight: Tensor, lora_A: Tensor, lora_B: Tensor, slices: Slices, dropout_p: float
) -> Facts:  # fmt: skip
    adapters = len(lora_A) if lora_A.ndim == 3 else 0
    return Facts(
        len(x), x.shape[1], len(weight), lora_B.shape[-1], max(len(slices) // 3, 1), adapters, dropout_p > 0, dtype
    )


def fwd(x, weight, bias, lora_A, lora_B, scale, scales, tables, slices, dropout_p, seed, insist, save):
    """y, and for backward s and dropout's bits (empty without ``save``)."""
    batch, slices = batch_of(tables, scales), tuple(slices)
    facts = facts_of(x, x.dtype, weight, lora_A, lora_B, slices, dropout_p)
    choice = choose("forward", facts, x.device, insist)
    bits = x.new_empty(len(x), 0, dtype=torch.uint8)
    if choice.arm == "inside":
        s = x.new_empty(len(x), len(lora_A))
        y = linear(x, weight, bias, s, lora_B, batch, choice, transposed=True, down=lora_A, scale=scale)
    elif choice.arm == "augmented":
        y, s, bits = _augmented_fwd(x, weight, bias, lora_A, lora_B, scale, batch, slices, dropout_p, seed)
    elif choice.arm == "composed" and not (batch.several or dropout_p):
        y, s = _composed_fwd(x, weight, bias, lora_A, lora_B, scale, slices)
    else:
        s, bits = shrink(x, lora_A, scale, batch, dropout_p=dropout_p, seed=seed)
        if choice.arm == "composed":
            y = torch.nn.functional.linear(x, weight, bias)
            expand(y, y, s, lora_B, batch, slices=slices)
        else:
            y = linear(x, weight, bias, s, lora_B, batch, choice, transposed=True, slices=slices)
    return (y, s, bits) if save else (y, s.new_empty(0, s.shape[1]), bits.new_empty(0, bits.shape[1]))


def _composed_fwd(x, weight, bias, lora_A, lora_B, scale, slices):
    y = torch.nn.functional.linear(x, weight, bias)
    s = _scaled(x, lora_A.to(x.dtype).T, scale)
    if not slices:
        return y.addmm_(s, lora_B.to(x.dtype).T), s
    rank = lora_B.shape[1]
    for i, (start, end, first) in enumerate(_triples(slices)):
        up = lora_B[first : first + end - start].to(x.dtype)
        y[:, start:end].addmm_(s[:, i * rank : (i + 1) * rank], up.T)
    return y, s


def _augmented_fwd(x, weight, bias, lora_A, lora_B, scale, batch, slices, dropout_p, seed):
    """[x | s] [W | B]^T, one product of cuBLAS."""
    (rows, width), ranks, rank = x.shape, len(lora_A), lora_B.shape[1]
    room = _room(ranks)
    both = x.new_empty(rows, width + room)
    s, bits = shrink(x, lora_A, scale, batch, dropout_p=dropout_p, seed=seed, buffer=both)
    wide = torch.cat([weight, weight.new_zeros(len(weight), room)], 1)
    for i, (start, end, first) in enumerate(_triples(slices) or [(0, len(weight), 0)]):
        at = width + i * rank
        wide[start:end, at : at + rank] = lora_B[first : first + end - start].to(x.dtype)
    return torch.nn.functional.linear(both, wide, bias), s.clone(), bits


def bwd(
    dy, x, s, bits, weight, lora_A, lora_B, scale, scales, tables, slices, dropout_p, insist,
    need_x, need_A, need_B, need_weight, need_bias, function, made,
    sums_A: Sums = AT_ONCE, sums_B: Sums = AT_ONCE,
):  # fmt: skip
    """dx, dA, dB, dW and db; what is not needed is empty and costs nothing.

    With a ``function``, ``x`` is its input, and ``made`` what else it takes. dA and dB may come later, see ``Sums``.
    """
    batch, slices = batch_of(tables, scales), tuple(slices)
    facts = facts_of(x, dy.dtype, weight, lora_A, lora_B, slices, dropout_p)
    kept = bits if dropout_p else None
    factor = LEVELS / (LEVELS - levels(dropout_p)) if dropout_p else 1.0
    made = Made(function, *made) if function else None
    dx, dA, dB = (t.new_empty(0) for t in (dy, lora_A, lora_B))
    if need_x or need_A or need_B:
        dgrad = choose("dgrad", facts, x.device, insist)
        buffer = None
        if need_x and dgrad.arm == "augmented":
            buffer = dy.new_empty(len(x), len(weight) + _room(len(lora_A)))
        low = choose("low", facts, x.device, insist).arm
        ds, dB = low_stage(dy, lora_B, s, scale, batch, slices, low, need_B, buffer, sums_B)
        if need_x:
            dx = _dgrad(dy, ds, weight, lora_A, batch, dgrad, kept, factor, buffer)
        if need_A:
            arm = choose("factor", facts, x.device, insist).arm
            dA = _factor(ds, x, lora_A, batch, kept, factor, made, arm, sums_A)
    dW = dy.T @ x if need_weight else weight.new_empty(0)
    db = dy.sum(0) if need_bias else weight.new_empty(0)
    return dx, dA, dB, dW, db


def low_stage(dy, lora_B, s, scale, batch, slices, arm, need_B, buffer=None, sums=AT_ONCE):
    """ds of all slices, and dB (empty unless needed). ``buffer`` takes dy and ds side by side."""
    rank, width = lora_B.shape[-1], dy.shape[1]
    if arm == "once" and rank <= MAX_RANK:
        one_slice = None if slices else buffer
        ds, dB = once(dy, lora_B, s, scale, batch, slices, one_slice, sums if need_B else None)
        if buffer is not None and one_slice is None:
            ds = _beside(dy, ds, buffer)
        return ds, dB if need_B else lora_B.new_empty(0)
    parts = []
    ds = dy.new_empty(len(dy), max(len(slices) // 3, 1) * rank)
    for i, (start, end, first) in enumerate(_triples(slices) or [(0, width, 0)]):
        part, B = dy[:, start:end], lora_B[..., first : first + end - start, :]
        ranks = slice(i * rank, (i + 1) * rank)
        if batch.several:
            shrink(part, B.mT, scale, batch, out=ds[:, ranks])
            parts += [outer(s[:, ranks], part, B, batch, transposed=True)] if need_B else []
        else:
            ds[:, ranks] = _scaled(part, B.to(dy.dtype), scale)
            parts += [product(part.T, s[:, ranks], B.dtype)] if need_B else []
    dB = torch.cat(parts, -2) if len(parts) > 1 else parts[0] if parts else lora_B.new_empty(0)
    return ds if buffer is None else _beside(dy, ds, buffer), dB


def _beside(dy, ds, buffer):
    buffer[:, : dy.shape[1]] = dy
    buffer[:, dy.shape[1] : dy.shape[1] + ds.shape[1]] = ds
    return buffer[:, dy.shape[1] : dy.shape[1] + ds.shape[1]]


def _dgrad(dy, ds, weight, lora_A, batch, choice, kept, factor, buffer):
    if choice.arm == "augmented":
        ranks, room = len(lora_A), buffer.shape[1] - dy.shape[1]
        buffer[:, dy.shape[1] + ranks :] = 0
        tall = torch.cat([weight, lora_A.to(dy.dtype), weight.new_zeros(room - ranks, weight.shape[1])])
        return buffer @ tall
    if choice.arm != "composed":
        return linear(
            dy, weight, None, ds, lora_A.mT, batch, choice, transposed=False, bits=kept, factor=factor
        )  # fmt: skip
    dx = dy @ weight
    if kept is None and not batch.several:
        return dx.addmm_(ds, lora_A.to(dy.dtype))
    return expand(dx, dx, ds, lora_A.mT, batch, bits=kept, factor=factor)


def _factor(ds, x, lora_A, batch, kept, factor, made, arm, sums):
    if arm == "composed" and kept is None and not batch.several:
        if made is not None:
            x = made_again(made.function, x, made.mean, made.rstd, made.weight, made.bias, ds.dtype)
        return product(ds.T, x, lora_A.dtype)
    return outer(ds, x, lora_A, batch, transposed=False, bits=kept, factor=factor, made=made, sums=sums)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in ``dtype``, which may be wider than theirs."""
    if a.dtype == dtype or dtype != torch.float32:  # cuBLAS writes the operands' dtype, or fp32
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)


def _room(ranks: int) -> int:
    """Columns for s beside x or dy, so that rows stay multiples of 16 bytes."""
    return cdiv(ranks, 8) * 8


def _scaled(a, b, scale):
    return torch.addmm(a.new_zeros(1, b.shape[1]), a, b, beta=0, alpha=scale)


def _triples(slices: Slices) -> list[tuple[int, int, int]]:
    return list(zip(slices[::3], slices[1::3], slices[2::3], strict=True))
