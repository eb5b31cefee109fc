"""Sums by label where there are many: rows in the order of their labels, each cluster's added up in pieces.

A piece has at most PIECE rows, so that one huge cluster does not keep a single program; the pieces of a cluster are
added up in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast._tiles import cdiv, pad
from rsfast.kmeans.reference import Update

PIECE = 1024  # rows
ROWS = 16  # that a program reads at once


@triton.jit
def segments_kernel(
    x_ptr, order_ptr, starts_ptr, pieces_ptr, spare_ptr, owner_ptr, weights_ptr, sums_ptr, counts_ptr, part_ptr,
    part_counts_ptr, clusters, width, pitch,
    WEIGHTED: tl.constexpr, PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A piece's sum: the result, where a cluster has one piece, or one of the partial sums from ``spare`` on."""
    program = tl.program_id(0)
    k = tl.load(owner_ptr + program).to(tl.int64)
    if k < clusters:  # there are programs for the most pieces that there can be
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        first_piece, last_piece = tl.load(pieces_ptr + k), tl.load(pieces_ptr + k + 1)
        piece = program - first_piece
        begin = tl.load(starts_ptr + k) + piece * PIECE
        end = tl.minimum(begin + PIECE, tl.load(starts_ptr + k + 1))
        acc = tl.zeros([BLOCK_D], tl.float32)
        count = tl.zeros([BLOCK_M], tl.float64)
        for first in tl.range(begin, end, BLOCK_M):
            at = first + tl.arange(0, BLOCK_M)
            r = tl.load(order_ptr + at, mask=at < end, other=0)
            mask = (at < end)[:, None] & (d < width)[None, :]
            x = tl.load(x_ptr + r[:, None] * pitch + d[None, :], mask=mask, other=0.0).to(tl.float32)
            if WEIGHTED:
                weights = tl.load(weights_ptr + r, mask=at < end, other=0.0)
                x *= weights.to(tl.float32)[:, None]
                count += weights.to(tl.float64)
            acc += tl.sum(x, 0)
        total = tl.sum(count, 0)
        if not WEIGHTED:
            total += (end - begin).to(tl.float64)
        if last_piece - first_piece == 1:
            tl.store(sums_ptr + k * width + d, acc, mask=d < width)
            if tl.program_id(1) == 0:
                tl.store(counts_ptr + k, total)
        else:
            slot = (tl.load(spare_ptr + k) + piece).to(tl.int64)
            tl.store(part_ptr + slot * width + d, acc, mask=d < width)
            if tl.program_id(1) == 0:
                tl.store(part_counts_ptr + slot, total)


@triton.jit
def pieces_kernel(pieces_ptr, spare_ptr, part_ptr, part_counts_ptr, sums_ptr, counts_ptr, width, BLOCK_D: tl.constexpr):
    """The sum of a cluster's partial sums, if it has several."""
    k = tl.program_id(0).to(tl.int64)
    pieces = tl.load(pieces_ptr + k + 1) - tl.load(pieces_ptr + k)
    if pieces > 1:
        first = tl.load(spare_ptr + k).to(tl.int64)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = tl.zeros([BLOCK_D], tl.float32)
        total = tl.full([], 0.0, tl.float64)
        for piece in tl.range(0, pieces):
            acc += tl.load(part_ptr + (first + piece) * width + d, mask=d < width, other=0.0)
            total += tl.load(part_counts_ptr + first + piece)
        tl.store(sums_ptr + k * width + d, acc, mask=d < width)
        if tl.program_id(1) == 0:
            tl.store(counts_ptr + k, total)


def segments(x: Tensor, labels: Tensor, clusters: int, weights: Tensor | None) -> Update:
    """``weights`` contiguous; rows with label -1 come first in the order, and no cluster begins before their end."""
    rows, width = x.shape
    ordered, order = labels.int().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(clusters + 1, dtype=torch.int32, device=x.device))
    each = ((starts.diff() + PIECE - 1) // PIECE).clamp_(min=1)
    several = torch.where(each > 1, each, 0)
    pieces = torch.nn.functional.pad(each.cumsum(0), (1, 0))
    spare = several.cumsum(0) - several
    most = clusters + rows // PIECE
    owner = torch.searchsorted(pieces[1:], torch.arange(most, device=x.device), right=True)
    sums = x.new_empty(clusters, width, dtype=torch.float32)
    counts = x.new_empty(clusters, dtype=torch.float64)
    part = x.new_empty(2 * (rows // PIECE), width, dtype=torch.float32)
    part_counts = x.new_empty(len(part), dtype=torch.float64)
    block_d = min(512, pad(width))
    segments_kernel[(most, cdiv(width, block_d))](
        x, order, starts, pieces, spare, owner, weights, sums, counts, part, part_counts, clusters, width, x.stride(0),
        WEIGHTED=weights is not None, PIECE=PIECE, BLOCK_M=ROWS, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    if len(part):
        pieces_kernel[(clusters, cdiv(width, block_d))](
            pieces, spare, part, part_counts, sums, counts, width, BLOCK_D=block_d, num_warps=4
        )  # fmt: skip
    return Update(sums, counts)
