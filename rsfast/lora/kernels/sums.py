"""Partial sums of chunks of rows, added up in an order that sizes alone decide: those of one factor, or of many."""

import functools
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast._tiles import cast, cdiv
from rsfast.lora.kernels.plan import Batch

CHUNKS, ELEMENTS = 32, 128  # a program's block of partial sums
ALIGN = 64  # numbers; partial sums and gradients start at a multiple of it
FIELDS = tl.constexpr(8)


@triton.jit
def add_chunks(part_ptr, e, size, first, last, CHUNKS: tl.constexpr, ELEMENTS: tl.constexpr):
    """Elements ``e`` of the sum of partial sums ``first`` to ``last``; no layout of registers changes its bits."""
    acc = tl.zeros([CHUNKS, ELEMENTS], tl.float32)
    for c in tl.range(first, last, CHUNKS):
        chunk = c + tl.arange(0, CHUNKS)
        mask = (chunk[:, None] < last) & (e[None, :] < size)
        acc += tl.load(part_ptr + chunk[:, None].to(tl.int64) * size + e[None, :], mask=mask, other=0.0)
    return _fold(acc, CHUNKS, ELEMENTS)


@triton.jit
def _fold(acc, CHUNKS: tl.constexpr, ELEMENTS: tl.constexpr):
    """Sum over the first axis, by halves: tl.sum's order depends on which thread holds what."""
    if CHUNKS == 1:
        return tl.reshape(acc, (ELEMENTS,))
    else:
        a, b = tl.split(tl.permute(tl.reshape(acc, (2, CHUNKS // 2, ELEMENTS)), (1, 2, 0)))
        return _fold(a + b, CHUNKS // 2, ELEMENTS)


@triton.jit
def reduce_kernel(
    part_ptr, out_ptr, last_ptr, size, chunks, times, factor, SEVERAL: tl.constexpr,
    CHUNKS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """out[adapter] = factor * the sum of its partial sums; ``times`` of them for each chunk in ``last_ptr``."""
    adapter = tl.program_id(1)
    first, last = 0, chunks
    if SEVERAL:
        first, last = tl.load(last_ptr + adapter) * times, tl.load(last_ptr + adapter + 1) * times
    e = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    acc = add_chunks(part_ptr, e, size, first, last, CHUNKS, ELEMENTS)
    at = adapter.to(tl.int64) * size + e
    tl.store(out_ptr + at, cast(acc * factor, out_ptr.dtype.element_ty), mask=e < size)


@triton.jit
def reduce_all_kernel(
    part_ptr, out_ptr, owner_ptr, table_ptr, last_ptr, SEVERAL: tl.constexpr, ALIGN: tl.constexpr,
    CHUNKS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """What ``reduce_kernel`` computes, for every row of a table; a program finds its own in ``owner_ptr``."""
    program = tl.program_id(0)
    entry = table_ptr + tl.load(owner_ptr + program) * FIELDS
    part, out, block = tl.load(entry), tl.load(entry + 1), program - tl.load(entry + 2)
    size, first, last = tl.load(entry + 3), 0, tl.load(entry + 4)
    factor = tl.load(entry + 5).to(tl.float32, bitcast=True)
    if SEVERAL:
        times, at = tl.load(entry + 6), tl.load(entry + 7)
        counted = at >= 0
        first = tl.load(last_ptr + at, mask=counted, other=0) * times
        last = tl.where(counted, tl.load(last_ptr + at + 1, mask=counted, other=0) * times, last)
    e = block * ELEMENTS + tl.arange(0, ELEMENTS)
    acc = add_chunks(part_ptr + part.to(tl.int64) * ALIGN, e, size, first, last, CHUNKS, ELEMENTS)
    tl.store(out_ptr + out + e, cast(acc * factor, out_ptr.dtype.element_ty), mask=e < size)


class Sums:
    """What becomes of the partial sums of a factor: here they get memory of their own and are added up at once."""

    def room(self, like: Tensor, chunks: int, size: int) -> Tensor:
        """Memory for partial sums, on the device of ``like``."""
        return like.new_empty(chunks, size, dtype=torch.float32)

    def add_up(
        self, part: Tensor, like: Tensor, batch: Batch, last: Tensor | None, *, times: int = 1, factor: float = 1.0
    ) -> Tensor | None:
        """The gradient, of the shape and dtype of ``like``; None if it comes later.

        Args:
            part: (chunks, size) that ``room`` gave.
            last: If the batch has several adapters, where in chunks those of each begin and end.
            times: How many partial sums a chunk has.
            factor: What the sum is multiplied with.
        """
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        adapters = len(out) if batch.several else 1
        size = out.numel() // adapters
        reduce_kernel[cdiv(size, ELEMENTS), adapters](
            part, out, last, size, len(part), times, factor,
            SEVERAL=batch.several, CHUNKS=CHUNKS, ELEMENTS=ELEMENTS, num_warps=4,
        )  # fmt: skip
        return out


AT_ONCE = Sums()
CAPTURED: list[tuple[Tensor, Tensor]] = []


class Sum(NamedTuple):
    """One factor's partial sums among those of others."""

    part: int  # where they begin, in ALIGN numbers
    out: int  # where the result begins
    size: int
    chunks: int
    factor: float
    times: int
    at: int  # of several adapters, where among all counts of chunks theirs begin; else -1
    adapters: int


def aligned(numbers: int) -> int:
    return cdiv(numbers, ALIGN) * ALIGN


def add_up_all(parts: Tensor, out: Tensor, sums: tuple[Sum, ...], last: Tensor | None) -> None:
    """All sums in one launch; ``last`` are all counts of chunks, as ``Sums.add_up`` takes them."""
    owner, table = _on_device(sums, parts.device)
    if parts.is_cuda and torch.cuda.is_current_stream_capturing():
        CAPTURED.append((owner, table))  # a graph reads them after others have taken their places in the cache
    reduce_all_kernel[(len(owner),)](
        parts, out, owner, table, last,
        SEVERAL=last is not None, ALIGN=ALIGN, CHUNKS=CHUNKS, ELEMENTS=ELEMENTS, num_warps=4,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _on_device(sums: tuple[Sum, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which row each program works on, and the rows; copied once for equal sizes, so that a CUDA graph can hold it."""
    rows, owner = [], []
    for part, out, size, chunks, factor, times, at, adapters in sums:
        bits = struct.unpack("i", struct.pack("f", factor))[0]
        for g in range(adapters):
            blocks = cdiv(size, ELEMENTS)
            rows.append((part, out + g * size, len(owner), size, chunks, bits, times, -1 if at < 0 else at + g))
            owner += [len(rows) - 1] * blocks
    return tuple(torch.tensor(numbers, dtype=torch.int32).to(device) for numbers in (owner, rows))
