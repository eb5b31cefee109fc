"""The layer's own product with the low-rank sum in its accumulator: y = x W^T + b + s B^T, dx = dy W + mask * ds A."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rsfast._dispatch import capability
from rsfast._tiles import cast, cdiv, dot, multiprocessors, operand, pad, pieces, place, roomy
from rsfast.lora.kernels.plan import Batch, Choice, Slices
from rsfast.lora.kernels.tiles import add_low_rank, load_kept


@triton.jit
def linear_kernel(
    x, w, y, bias_ptr, low_ptr, up_ptr, down_ptr, bits_ptr, slices_ptr, ids_ptr, counts_ptr, listed_ptr,
    rows, columns, width, rank, parts, listed, stride_x, stride_w, stride_low, stride_ug, stride_un, stride_ur,
    stride_dr, stride_dk, scale, factor,
    BY_COLUMN: tl.constexpr, HAS_BIAS: tl.constexpr, INSIDE: tl.constexpr, MASKED: tl.constexpr,
    SEVERAL: tl.constexpr, SLICED: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Tiles of x w^T (``BY_COLUMN``) or x w, plus the low-rank sum, plus the bias.

    ``INSIDE`` computes low = scale * x down^T with the same tiles of x, and stores it once; else it is read.
    ``MASKED``: the low-rank sum counts where dropout kept the element, times ``factor``.
    """
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    PIECE: tl.constexpr = BLOCK_N // PIECES
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pm, pn = place(tile, tiles_m, tiles_n, GROUP)
        row, column = pm * BLOCK_M, pn * BLOCK_N
        r, j = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if MASKED:  # first, while there are registers for the mask
            acc = add_low_rank(
                acc, low_ptr, up_ptr, slices_ptr, ids_ptr, counts_ptr, listed_ptr, row, column, rows, columns, rank,
                parts, listed, stride_low, stride_ug, stride_un, stride_ur, SEVERAL, SLICED, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
            acc = tl.where(load_kept(bits_ptr, r, r < rows, column, columns, BLOCK_M, BLOCK_N), acc * factor, 0.0)
        if INSIDE:
            low = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for k in tl.range(0, width, BLOCK_K):
            a = operand(x, row, k, rows, width, stride_x, TMA, BLOCK_M, BLOCK_K)
            if BY_COLUMN:
                b = operand(w, column, k, columns, width, stride_w, TMA, BLOCK_N, BLOCK_K).T
            else:
                b = operand(w, k, column, width, columns, stride_w, TMA, BLOCK_K, BLOCK_N)
            acc = dot(a, b, acc)
            if INSIDE:
                c = k + tl.arange(0, BLOCK_K)
                down = tl.load(
                    down_ptr + j[:, None] * stride_dr + c[None, :] * stride_dk,
                    mask=(j[:, None] < rank) & (c[None, :] < width), other=0.0,
                )  # fmt: skip
                low = dot(a, down.T, low)
        n = column + tl.arange(0, BLOCK_N)
        if INSIDE:
            s = cast(low * scale, low_ptr.dtype.element_ty)
            kept = (r[:, None] < rows) & (j[None, :] < tl.where(pn == 0, rank, 0))
            tl.store(low_ptr + r[:, None].to(tl.int64) * stride_low + j[None, :], s, mask=kept)
            up = tl.load(
                up_ptr + n[:, None].to(tl.int64) * stride_un + j[None, :] * stride_ur,
                mask=(n[:, None] < columns) & (j[None, :] < rank), other=0.0,
            )  # fmt: skip
            acc = dot(s, up.T, acc)
        elif not MASKED:
            acc = add_low_rank(
                acc, low_ptr, up_ptr, slices_ptr, ids_ptr, counts_ptr, listed_ptr, row, column, rows, columns, rank,
                parts, listed, stride_low, stride_ug, stride_un, stride_ur, SEVERAL, SLICED, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        out = pieces(acc, BLOCK_M, BLOCK_N, PIECES)
        for i in tl.static_range(PIECES):
            start = column + i * PIECE
            m = start + tl.arange(0, PIECE)
            value = out[i]
            if HAS_BIAS:
                value += tl.load(bias_ptr + m, mask=m < columns, other=0.0).to(tl.float32)[None, :]
            if TMA:
                y.store([row, start], cast(value, y.dtype))
            else:
                to = y + r[:, None].to(tl.int64) * columns + m[None, :]
                tl.store(to, cast(value, y.dtype.element_ty), mask=(r[:, None] < rows) & (m[None, :] < columns))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, up: Tensor, batch: Batch, choice: Choice, *,
    transposed: bool, slices: Slices = (), down: Tensor | None = None, scale: float = 1.0, bits: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:  # fmt: skip
    """x weight^T (``transposed``) or x weight, plus the bias, plus low up^T.

    Args:
        low: (rows, ranks); written, as scale * x down^T, if ``down`` is given.
        up: (columns, rank) of any strides, with an axis of adapters in front if the batch has several.
        slices: As in ``expand``.
        bits: Of dropout, over the result's elements.
    """
    (rows, width), columns, rank = x.shape, weight.shape[0 if transposed else 1], up.shape[-1]
    y = x.new_empty(rows, columns)
    if not rows:
        return y
    block_m, block_n = min(choice.BLOCK_M, pad(rows)), min(choice.BLOCK_N, pad(columns))
    block_k = min(choice.BLOCK_K, pad(width))
    pieces = max(1, block_n // 64)
    blocks = dict(x=[block_m, block_k], w=[block_n, block_k] if transposed else [block_k, block_n])
    blocks["y"] = [block_m, block_n // pieces]
    operands = dict(x=x, w=weight, y=y)
    sm = capability(x.device)
    tma = sm >= 90 and roomy(sm) and all(map(_described, operands.values()))
    if tma:
        operands = {
            name: TensorDescriptor(t, list(t.shape), list(t.stride()), blocks[name]) for name, t in operands.items()
        }
    block_r = pad(rank) if down is not None else min(64 if x.element_size() == 2 else 16, pad(rank))
    tiles = cdiv(rows, block_m) * cdiv(columns, block_n)
    linear_kernel[(min(tiles, multiprocessors(x.device)),)](
        *operands.values(), bias, low, up, down, bits, batch.slices_on(x, slices), batch.ids, batch.counts,
        batch.listed, rows, columns, width, rank, len(slices) // 3, batch.most,
        x.stride(0), weight.stride(0), low.stride(0), up.stride(0) if batch.several else 0, up.stride(-2),
        up.stride(-1), *((0, 0) if down is None else down.stride()), scale, factor,
        BY_COLUMN=transposed, HAS_BIAS=bias is not None, INSIDE=down is not None, MASKED=bits is not None,
        SEVERAL=batch.several, SLICED=bool(slices), TMA=tma, GROUP=8, PIECES=pieces,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=block_r,
        num_warps=choice.num_warps, num_stages=choice.num_stages,
    )  # fmt: skip
    return y


def _described(t: Tensor) -> bool:
    """Whether a tensor descriptor can hold it: contiguous features, and rows that start at multiples of 16 bytes."""
    return t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0
