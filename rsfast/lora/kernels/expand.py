"""Up from the rank, onto what is there: y += B s, or dx += mask * (A^T ds)."""

import triton
import triton.language as tl
from torch import Tensor

from rsfast._tiles import cast, cdiv, pad
from rsfast.lora.kernels.plan import Batch, Slices
from rsfast.lora.kernels.tiles import add_low_rank, load_kept


@triton.jit
def expand_kernel(
    base_ptr, y_ptr, low_ptr, up_ptr, bits_ptr, slices_ptr, ids_ptr, counts_ptr, listed_ptr,
    rows, columns, rank, parts, listed, stride_base, stride_low, stride_ug, stride_un, stride_ur, factor,
    HAS_BASE: tl.constexpr, MASKED: tl.constexpr, SEVERAL: tl.constexpr, SLICED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = base + low up^T; ``MASKED``: the product counts where dropout kept the element, times ``factor``."""
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = add_low_rank(
        acc, low_ptr, up_ptr, slices_ptr, ids_ptr, counts_ptr, listed_ptr, row, column, rows, columns, rank, parts,
        listed, stride_low, stride_ug, stride_un, stride_ur, SEVERAL, SLICED, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    r, n = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    mask = (r[:, None] < rows) & (n[None, :] < columns)
    if MASKED:
        acc = tl.where(load_kept(bits_ptr, r, r < rows, column, columns, BLOCK_M, BLOCK_N), acc * factor, 0.0)
    at = r[:, None].to(tl.int64)
    if HAS_BASE:
        acc += tl.load(base_ptr + at * stride_base + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at * columns + n[None, :], cast(acc, y_ptr.dtype.element_ty), mask=mask)


def expand(
    y: Tensor, base: Tensor | None, low: Tensor, up: Tensor, batch: Batch, *, slices: Slices = (),
    bits: Tensor | None = None, factor: float = 1.0,
) -> Tensor:  # fmt: skip
    """y (rows, columns), contiguous, = base + low up^T; ``base`` may be ``y`` itself.

    Args:
        up: (columns, rank) of any strides, with an axis of adapters in front if the batch has several.
        slices: Start, end and first row of ``up`` of each slice, flat; empty for one over everything.
        bits: Of dropout, over y's elements.
    """
    rows, columns = y.shape
    rank = up.shape[-1]
    if not rows:
        return y
    most = 128 if y.element_size() == 2 else 64  # operands of fp32 products take registers
    block_m, block_n = min(most, pad(rows)), min(most, pad(columns))
    grid = cdiv(rows, block_m), cdiv(columns, block_n)
    expand_kernel[grid](
        base, y, low, up, bits, batch.slices_on(y, slices), batch.ids, batch.counts, batch.listed,
        rows, columns, rank, len(slices) // 3, batch.most, 0 if base is None else base.stride(0), low.stride(0),
        up.stride(0) if batch.several else 0, up.stride(-2), up.stride(-1), factor,
        HAS_BASE=base is not None, MASKED=bits is not None, SEVERAL=batch.several, SLICED=bool(slices),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=min(64, pad(rank)), num_warps=8 if block_m * block_n > 8192 else 4,
    )  # fmt: skip
    return y
