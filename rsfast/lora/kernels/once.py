"""One read of dY for all that the LoRA needs of it: ds = alpha B^T dy, and the gradient of B."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast._tiles import cast, cdiv, dot, pad
from rsfast.lora.kernels.plan import Batch, Slices
from rsfast.lora.kernels.sums import AT_ONCE, Sums
from rsfast.lora.kernels.tables import FINE
from rsfast.lora.kernels.tiles import rows_of

MAX_RANK = 64  # above it the partial sums would be as large as dY


@triton.jit
def once_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, copy_ptr, part_ptr, scales_ptr, slices_ptr, table_ptr, order_ptr,
    rows, columns, rank, size, stride_dy, stride_s, stride_ds, stride_bg, stride_bn, stride_br, scale,
    SEVERAL: tl.constexpr, SLICED: tl.constexpr, COPY: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """ds of a block of rows and a slice; its part of dB, ``(columns of all slices, rank)`` for each program.

    ``COPY`` writes dy again, in front of ds in wider rows. ``SLICED``, if not 0, divides where slices start and end.
    """
    program, piece = tl.program_id(0), tl.program_id(1)
    adapter, r, in_rows = rows_of(program, table_ptr, order_ptr, rows, SEVERAL, CHUNK, BLOCK_M)
    start, end, first = 0, columns, 0
    if SLICED:
        start = tl.multiple_of(tl.load(slices_ptr + 3 * piece), SLICED)
        end = tl.load(slices_ptr + 3 * piece + 1)
        first = tl.multiple_of(tl.load(slices_ptr + 3 * piece + 2), SLICED)
    if SEVERAL:
        b_ptr += tl.maximum(adapter, 0).to(tl.int64) * stride_bg
        scale = tl.where(adapter < 0, 0.0, tl.load(scales_ptr + tl.maximum(adapter, 0)).to(tl.float32))
    j = tl.arange(0, BLOCK_R)
    at, ranks = r[:, None].to(tl.int64), j[None, :] < rank
    s = tl.load(s_ptr + at * stride_s + piece * rank + j[None, :], mask=in_rows[:, None] & ranks, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n in tl.range(start, end, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        in_columns = column < end
        dy = tl.load(
            dy_ptr + at * stride_dy + column[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0
        )  # fmt: skip
        if COPY:
            tl.store(copy_ptr + at * stride_ds + column[None, :], dy, mask=in_rows[:, None] & in_columns[None, :])
        m = first + column - start
        b = tl.load(
            b_ptr + m[:, None].to(tl.int64) * stride_bn + j[None, :] * stride_br,
            mask=in_columns[:, None] & ranks, other=0.0,
        )  # fmt: skip
        acc = dot(dy, b, acc)
        d = dot(dy.T, s, tl.zeros([BLOCK_N, BLOCK_R], tl.float32))
        out = part_ptr + program.to(tl.int64) * size + m[:, None] * rank + j[None, :]
        tl.store(out, d, mask=in_columns[:, None] & ranks)
    tl.store(ds_ptr + at * stride_ds + piece * rank + j[None, :], cast(acc * scale, ds_ptr.dtype.element_ty),
             mask=in_rows[:, None] & ranks)  # fmt: skip


def tiling(rows: int, rank: int, wide: bool, batch: Batch) -> tuple[int, int]:
    """Rows of a program, and how many programs a slice has; operands of fp32 (``wide``) products take registers."""
    block_m = min(32 if wide else min(FINE, 8192 // pad(rank)), pad(rows))
    return block_m, len(batch.fine) * (FINE // block_m) if batch.several else cdiv(rows, block_m)


def once(
    dy: Tensor, lora_B: Tensor, s: Tensor, scale: float, batch: Batch, slices: Slices, buffer: Tensor | None = None,
    sums: Sums | None = AT_ONCE,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """ds (rows, ranks) and the gradient of ``lora_B``, without ``sums`` None; s holds the scale already.

    ``buffer`` (rows, columns + ranks or more) gets dy, and ds behind it; it is for one slice over everything.
    """
    (rows, columns), rank = dy.shape, lora_B.shape[-1]
    parts = max(len(slices) // 3, 1)
    ds = dy.new_empty(rows, parts * rank) if buffer is None else buffer[:, columns : columns + rank]
    if not rows:
        return ds, torch.zeros_like(lora_B, memory_format=torch.contiguous_format)
    block_r = pad(rank)
    wide = dy.element_size() == 4
    block_m, programs = tiling(rows, rank, wide, batch)
    size = lora_B.shape[-2] * rank
    part = (sums or AT_ONCE).room(dy, programs, size)
    once_kernel[programs, parts](
        dy, lora_B, s, ds, buffer, part, batch.scales, batch.slices_on(dy, slices), batch.fine, batch.order,
        rows, columns, rank, size, dy.stride(0), s.stride(0), ds.stride(0), lora_B.stride(0) if batch.several else 0,
        lora_B.stride(-2), lora_B.stride(-1), scale,
        SEVERAL=batch.several, SLICED=math.gcd(16, *slices) if slices else 0, COPY=buffer is not None, CHUNK=FINE,
        BLOCK_M=block_m, BLOCK_N=min(32 if wide else 64, pad(columns)), BLOCK_R=block_r,
        num_warps=8 if wide or block_m >= 128 else 4, num_stages=2 if wide else 3,
    )  # fmt: skip
    return ds, sums and sums.add_up(part, lora_B, batch, batch.fine_last, times=FINE // block_m)
