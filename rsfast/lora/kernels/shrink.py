"""Down to the rank, one read of the input: s = alpha A x, or ds = alpha B^T dy."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast._dispatch import capability
from rsfast._tiles import cast, cdiv, dot, pad, roomy
from rsfast.lora.kernels.plan import Batch
from rsfast.lora.kernels.tables import FINE
from rsfast.lora.kernels.tiles import draw_kept, rows_of, spread
from rsfast.lora.reference import LEVELS, ROUNDS, levels


@triton.jit
def shrink_kernel(
    x_ptr, a_ptr, s_ptr, copy_ptr, bits_ptr, seed_ptr, scales_ptr, table_ptr, order_ptr,
    rows, width, ranks, room, stride_x, stride_ag, stride_ar, stride_ak, stride_s, scale, dropped,
    SEVERAL: tl.constexpr, COPY: tl.constexpr, DROPOUT: tl.constexpr, ROUNDS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s = scale * x a^T for all ranks of a block of rows; ``COPY`` writes x again, in front of s in wider rows.

    ``DROPOUT`` draws which elements of x take part, and stores one bit for each.
    """
    adapter, r, in_rows = rows_of(tl.program_id(0), table_ptr, order_ptr, rows, SEVERAL, CHUNK, BLOCK_M)
    first = tl.program_id(1) * BLOCK_R
    j = first + tl.arange(0, BLOCK_R)
    at = r[:, None].to(tl.int64)
    a_ptr += tl.maximum(adapter, 0).to(tl.int64) * stride_ag if SEVERAL else 0
    if SEVERAL:  # rows of no adapter have s = 0
        scale = tl.where(adapter < 0, 0.0, tl.load(scales_ptr + tl.maximum(adapter, 0)).to(tl.float32) * scale)
    kept = tl.where(first == 0, width, 0)  # the first programs store what all of them have
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in tl.range(0, width, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = in_rows[:, None] & (columns[None, :] < width)
        x = tl.load(x_ptr + at * stride_x + columns[None, :], mask=inside, other=0.0)
        if COPY:
            tl.store(copy_ptr + at * stride_s + columns[None, :], x, mask=inside & (columns[None, :] < kept))
        a = tl.load(
            a_ptr + j[:, None] * stride_ar + columns[None, :].to(tl.int64) * stride_ak,
            mask=(j[:, None] < ranks) & (columns[None, :] < width), other=0.0,
        )  # fmt: skip
        if DROPOUT:
            bits = draw_kept(tl.load(seed_ptr), r, k, dropped, BLOCK_K, ROUNDS)
            pitch = (width + 7) // 8
            groups = k // 8 + tl.arange(0, BLOCK_K // 8)
            stored = in_rows[:, None] & (groups[None, :] < tl.minimum(pitch, kept))
            tl.store(bits_ptr + at * pitch + groups[None, :], bits, mask=stored)
            x = tl.where(spread(bits, BLOCK_M, BLOCK_K), x, 0.0)
        acc = dot(x, a.T, acc)
    tl.store(s_ptr + at * stride_s + j[None, :], cast(acc * scale, s_ptr.dtype.element_ty),
             mask=in_rows[:, None] & (j[None, :] < room))  # fmt: skip


def tiling(x: Tensor, columns: int, several: bool) -> tuple[int, int, int, int]:
    """The three blocks of a program that writes ``columns`` of s, and the stages of its loop."""
    block_r = min(pad(columns), 128)
    block_m = 64 if len(x) >= 1024 or several else 16
    block_k = min((128 if x.element_size() == 2 else 64) // (2 if block_r > 64 else 1), pad(x.shape[1]))
    return block_m, block_k, block_r, 3 if block_r <= 32 or roomy(capability(x.device)) else 2


def shrink(
    x: Tensor, factor: Tensor, scale: float, batch: Batch, *, dropout_p: float = 0.0, seed: Tensor | None = None,
    buffer: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s (rows, ranks), and dropout's bits, empty without dropout.

    Args:
        x: (rows, width), contiguous features.
        factor: (ranks, width) of any strides, with an axis of adapters in front if the batch has several.
        scale: Times the adapter's own, if there are several.
        buffer: (rows, width + ranks or more) that gets x, and s behind it; s is a view into it then.
        out: Where s goes if there is no buffer; a view of contiguous ranks.
    """
    rows, width = x.shape
    ranks = factor.shape[-2]
    bits = x.new_empty(rows, (width + 7) // 8 if dropout_p else 0, dtype=torch.uint8)
    if buffer is not None:
        out = buffer[:, width:]
    elif out is None:
        out = x.new_empty(rows, ranks)
    if not rows:
        return out[:, :ranks], bits
    block_m, block_k, block_r, stages = tiling(x, out.shape[1], batch.several)
    programs = len(batch.fine) * (FINE // block_m) if batch.several else cdiv(rows, block_m)
    shrink_kernel[programs, cdiv(out.shape[1], block_r)](
        x, factor, out, buffer, bits, seed, batch.scales, batch.fine, batch.order,
        rows, width, ranks, out.shape[1], x.stride(0), factor.stride(0) if batch.several else 0, factor.stride(-2),
        factor.stride(-1), out.stride(0), scale * (LEVELS / (LEVELS - levels(dropout_p)) if dropout_p else 1.0),
        levels(dropout_p) if dropout_p else 0,
        SEVERAL=batch.several, COPY=buffer is not None, DROPOUT=bool(dropout_p), ROUNDS=ROUNDS, CHUNK=FINE,
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r,
        num_warps=8 if block_r > 32 and block_m > 16 else 4, num_stages=stages,
    )  # fmt: skip
    return out[:, :ranks], bits
