"""What the tiles need to know of the batch, in O(N D): operands in 16 bits, scores of the positives, norms, ids."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast._tiles import cast

PART_BITS = 14  # the largest element of an fp32 operand's high part lies just below 2^14: fp16 ends at 2^16
STEP = 64  # both parts are padded to this, so that no step over the width reads from two of them


@triton.jit
def _part(x_ptr, out_ptr, scale_ptr, rows, cols, n, D, width):
    """The rows times a power of two as high and low fp16 parts: 22 bits of every fp32 element."""
    mask = rows[:, None] < n
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * D + cols[None, :], mask=mask & (cols[None, :] < D), other=0.0)
    x *= tl.load(scale_ptr)
    high = cast(x, tl.float16)
    out = out_ptr + rows[:, None].to(tl.int64) * width + cols[None, :]
    mask = mask & (cols[None, :] < width // 2)
    tl.store(out, high, mask=mask)
    tl.store(out + width // 2, cast(x - high.to(tl.float32), tl.float16), mask=mask)


@triton.jit
def _rows(x_ptr, rows, cols, n, D):
    mask = ((rows >= 0) & (rows < n))[:, None] & (cols[None, :] < D)
    return tl.load(x_ptr + rows[:, None].to(tl.int64) * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def prepare_kernel(a_ptr, b_ptr, a_parts_ptr, b_parts_ptr, scales_ptr, d_ptr, norms_ptr, N, M, D, width, offset,
                   DIAGONAL: tl.constexpr, PARTS: tl.constexpr,
                   BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Scores of the positives, largest squared norms of a block of rows, and the two parts of fp32 operands."""
    pid = tl.program_id(0)
    rows = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    aa = bb = ab = tl.zeros([BLOCK_R], tl.float32)
    for k in range(0, width // PARTS, BLOCK_D):
        cols = k + tl.arange(0, BLOCK_D)
        a, b = _rows(a_ptr, rows, cols, N, D), _rows(b_ptr, rows, cols, M, D)
        aa += tl.sum(a * a, 1)
        bb += tl.sum(b * b, 1)
        if DIAGONAL:
            ab += tl.sum(a * _rows(b_ptr, rows + offset, cols, M, D), 1)
        if PARTS == 2:
            _part(a_ptr, a_parts_ptr, scales_ptr, rows, cols, N, D, width)
            _part(b_ptr, b_parts_ptr, scales_ptr + 1, rows, cols, M, D, width)
    tl.store(norms_ptr + 2 * pid, tl.max(aa, 0))
    tl.store(norms_ptr + 2 * pid + 1, tl.max(bb, 0))
    if DIAGONAL:
        tl.store(d_ptr + rows, ab, mask=rows < N)
