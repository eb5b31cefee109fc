"""What the kernels of this family share: which rows a program takes, dropout's bits, and the low-rank sum of a tile."""

import triton
import triton.language as tl

from rsfast._tiles import dot
from rsfast.lora.kernels import tables

TILE = tl.constexpr(tables.TILE)


@triton.jit
def rows_of(program, table_ptr, order_ptr, rows, SEVERAL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Adapter, row numbers and their mask of a program that takes ``BLOCK`` rows.

    Of ``SEVERAL`` adapters, the program takes a piece of a chunk, which holds rows of one adapter only.
    """
    if SEVERAL:
        entry = table_ptr + program // (CHUNK // BLOCK) * 3
        adapter = tl.load(entry)
        at = tl.load(entry + 1) + program % (CHUNK // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        mask = at < tl.load(entry + 2)
        return adapter, tl.load(order_ptr + at, mask=mask, other=0), mask
    else:
        at = program * BLOCK + tl.arange(0, BLOCK)
        return 0, at, at < rows


@triton.jit
def spread(bits, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bytes ``[BLOCK_M, BLOCK_K // 8]`` as a truth value for each of their bits, ``[BLOCK_M, BLOCK_K]``."""
    each = (bits[:, :, None].to(tl.int32) >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(each, (BLOCK_M, BLOCK_K)) != 0


@triton.jit
def load_kept(bits_ptr, r, in_rows, column, width, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which elements of a block dropout kept."""
    k = column // 8 + tl.arange(0, BLOCK_K // 8)
    pitch = (width + 7) // 8
    mask = in_rows[:, None] & (k[None, :] < pitch)
    return spread(
        tl.load(bits_ptr + r[:, None].to(tl.int64) * pitch + k[None, :], mask=mask, other=0), BLOCK_M, BLOCK_K
    )


@triton.jit
def draw_kept(seed, r, column, dropped, BLOCK_K: tl.constexpr, ROUNDS: tl.constexpr):
    """Dropout's bits of a block as bytes, by Philox of (column // 8, row): see ``keep_mask`` of the reference."""
    group = column // 8 + tl.arange(0, BLOCK_K // 8)
    c0 = group[None, :] + tl.zeros_like(r)[:, None]
    c1 = r[:, None] + tl.zeros_like(group)[None, :]
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero, ROUNDS)
    low = _kept(w0, dropped) | _kept(w1, dropped) << 1 | _kept(w2, dropped) << 2 | _kept(w3, dropped) << 3
    high = _kept(w0 >> 16, dropped) | _kept(w1 >> 16, dropped) << 1
    high = high | _kept(w2 >> 16, dropped) << 2 | _kept(w3 >> 16, dropped) << 3
    return (low | high << 4).to(tl.uint8)


@triton.jit
def _kept(word, dropped):
    return ((word & 0xFFFF).to(tl.int32) >= dropped).to(tl.int32)


@triton.jit
def _ranks(acc, low_ptr, up_ptr, r, mine, n, in_columns, rank, pitch, stride_un, stride_ur,
           BLOCK_R: tl.constexpr):  # fmt: skip
    """acc + low up^T, over all ranks of one adapter and slice."""
    for at in tl.range(0, rank, BLOCK_R):
        j = at + tl.arange(0, BLOCK_R)
        inside = j[None, :] < rank
        low = tl.load(low_ptr + r[:, None].to(tl.int64) * pitch + j[None, :], mask=mine[:, None] & inside, other=0.0)
        up = tl.load(
            up_ptr + n[:, None].to(tl.int64) * stride_un + j[None, :] * stride_ur,
            mask=in_columns[:, None] & inside, other=0.0,
        )  # fmt: skip
        acc = dot(low, up.T, acc)
    return acc


@triton.jit
def _slices(acc, low_ptr, up_ptr, slices_ptr, r, mine, row, column, columns, rank, parts, pitch, stride_un, stride_ur,
            SLICED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """acc + low up^T of one adapter; columns of a slice have ranks, and rows of ``up``, of their own."""
    n = column + tl.arange(0, BLOCK_N)
    if SLICED:
        for part in tl.range(0, parts):
            start, end = tl.load(slices_ptr + 3 * part), tl.load(slices_ptr + 3 * part + 1)
            if (start < column + BLOCK_N) & (end > column):
                m = n - start + tl.load(slices_ptr + 3 * part + 2)
                acc = _ranks(
                    acc, low_ptr + part * rank, up_ptr, r, mine, m, (n >= start) & (n < end), rank, pitch,
                    stride_un, stride_ur, BLOCK_R,
                )  # fmt: skip
        return acc
    else:
        return _ranks(acc, low_ptr, up_ptr, r, mine, n, n < columns, rank, pitch, stride_un, stride_ur, BLOCK_R)


@triton.jit
def add_low_rank(
    acc, low_ptr, up_ptr, slices_ptr, ids_ptr, counts_ptr, listed_ptr, row, column, rows, columns, rank, parts,
    listed, pitch, stride_ug, stride_un, stride_ur,
    SEVERAL: tl.constexpr, SLICED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + low up^T for a tile: of each adapter that one of its rows has, for its rows."""
    r = row + tl.arange(0, BLOCK_M)
    if SEVERAL:
        ids = tl.load(ids_ptr + r, mask=r < rows, other=-1)
        tile = row // TILE
        for i in tl.range(0, tl.load(counts_ptr + tile)):
            adapter = tl.load(listed_ptr + tile * listed + i)
            acc = _slices(
                acc, low_ptr, up_ptr + adapter.to(tl.int64) * stride_ug, slices_ptr, r, ids == adapter, row, column,
                columns, rank, parts, pitch, stride_un, stride_ur, SLICED, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        return acc
    else:
        return _slices(
            acc, low_ptr, up_ptr, slices_ptr, r, r < rows, row, column, columns, rank, parts, pitch,
            stride_un, stride_ur, SLICED, BLOCK_N, BLOCK_R,
        )  # fmt: skip
