"""Gradients of the factors, sums over all rows: partial sums of chunks of rows, added afterwards in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast._tiles import LOG2E, cast, cdiv, dot, multiprocessors, pad
from rsfast.lora.kernels.plan import Batch, Made
from rsfast.lora.kernels.sums import AT_ONCE, Sums
from rsfast.lora.kernels.tiles import load_kept


@triton.jit
def _applied(x, r, in_rows, k, width, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, FUNCTION: tl.constexpr):
    """The function of a source, in fp32: see ``made_again`` of the reference."""
    if FUNCTION == "layer_norm":
        mean = tl.load(mean_ptr + r, mask=in_rows, other=0.0).to(tl.float32)
        x = (x - mean[:, None]) * tl.load(rstd_ptr + r, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        if weight_ptr is not None:
            x = x * tl.load(weight_ptr + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
        if bias_ptr is not None:
            x = x + tl.load(bias_ptr + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
        return x
    elif FUNCTION == "quick_gelu":
        return x / (1 + tl.exp2(x * (-1.702 * LOG2E)))
    elif FUNCTION == "gelu_tanh":
        return x / (1 + tl.exp2((x + 0.044715 * x * x * x) * (-2 * LOG2E * 0.7978845608028654)))
    else:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def outer_kernel(
    low_ptr, wide_ptr, part_ptr, bits_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, table_ptr, order_ptr,
    rows, width, ranks, chunk, stride_low, stride_wide, stride_pr, stride_pk,
    SEVERAL: tl.constexpr, MASKED: tl.constexpr, FUNCTION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """part[chunk] = low^T wide over a chunk of rows; ``MASKED``: over what dropout kept of ``wide``.

    ``FUNCTION`` is applied to what ``wide_ptr`` holds, the result rounded to the dtype of ``low``.
    """
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_K
    if SEVERAL:
        begin, end = tl.load(table_ptr + 3 * program + 1), tl.load(table_ptr + 3 * program + 2)
    else:
        begin = program * chunk
        end = tl.minimum(begin + chunk, rows)
    k, j = column + tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    for m in tl.range(begin, end, BLOCK_M):
        r = m + tl.arange(0, BLOCK_M)
        in_rows = r < end
        if SEVERAL:
            r = tl.load(order_ptr + r, mask=in_rows, other=0)
        at = r[:, None].to(tl.int64)
        wide = tl.load(
            wide_ptr + at * stride_wide + k[None, :], mask=in_rows[:, None] & (k[None, :] < width), other=0.0
        )
        if FUNCTION is not None:
            wide = cast(
                _applied(wide.to(tl.float32), r, in_rows, k, width, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, FUNCTION),
                low_ptr.dtype.element_ty,
            )  # fmt: skip
        if MASKED:
            wide = tl.where(load_kept(bits_ptr, r, in_rows, column, width, BLOCK_M, BLOCK_K), wide, 0.0)
        low = tl.load(low_ptr + at * stride_low + j[None, :], mask=in_rows[:, None] & (j[None, :] < ranks), other=0.0)
        acc = dot(wide.T, low, acc)
    out = part_ptr + program.to(tl.int64) * width * ranks + j[None, :] * stride_pr + k[:, None].to(tl.int64) * stride_pk
    tl.store(out, acc, mask=(k[:, None] < width) & (j[None, :] < ranks))


def tiling(wide: Tensor, ranks: int, batch: Batch) -> tuple[int, int, int, int, int]:
    """The three blocks of a program, rows of a chunk, and how many chunks."""
    rows, width = wide.shape
    block_m = 64 if wide.element_size() == 2 else 32
    block_k, block_r = min(128, pad(width)), min(64, pad(ranks))
    tiles = cdiv(width, block_k) * cdiv(ranks, block_r)
    # two waves of programs are enough to fill the GPU, and fewer chunks are less to add up
    chunk = block_m * max(1, cdiv(rows * tiles, 2 * multiprocessors(wide.device) * block_m))
    return block_m, block_k, block_r, chunk, len(batch.coarse) if batch.several else cdiv(rows, chunk)


def outer(
    low: Tensor, wide: Tensor, like: Tensor, batch: Batch, *, transposed: bool, bits: Tensor | None = None,
    factor: float = 1.0, made: Made | None = None, sums: Sums = AT_ONCE,
) -> Tensor | None:  # fmt: skip
    """Gradient of shape and dtype of ``like``: low^T wide ``(ranks, width)`` of each adapter, or its transpose.

    With ``made``, ``wide`` is what it is made from.
    """
    made = made or Made(None)
    (rows, width), ranks = wide.shape, low.shape[1]
    if not rows:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    block_m, block_k, block_r, chunk, chunks = tiling(wide, ranks, batch)
    part = sums.room(wide, chunks, ranks * width)
    outer_kernel[chunks, cdiv(width, block_k), cdiv(ranks, block_r)](
        low, wide, part, bits, made.mean, made.rstd, made.weight, made.bias, batch.coarse, batch.order,
        rows, width, ranks, chunk, low.stride(0), wide.stride(0), *((1, ranks) if transposed else (width, 1)),
        SEVERAL=batch.several, MASKED=bits is not None, FUNCTION=made.function,
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=4, num_stages=3,
    )  # fmt: skip
    return sums.add_up(part, like, batch, batch.coarse_last, factor=factor)
