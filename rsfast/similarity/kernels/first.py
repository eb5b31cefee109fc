"""Launches of the first pass."""

import math

import torch
from torch import Tensor

from rsfast.similarity.kernels.forward import stats_kernel
from rsfast.similarity.kernels.plan import band_rows, tiles
from rsfast.similarity.kernels.prepare import Batch


def first_pass(
    batch: Batch, scalars: Tensor, wide: Tensor, targets: tuple, *, softmax: bool, triplet: bool, sigmoid: bool,
    columns: bool, smooth: bool, mask_same: bool, margin: float, gamma: float, exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sums over parts of a row, (parts, N), and of a column, (parts, M), for ``exact`` their logarithms; totals.

    All is garbage where ``wide`` is not ``exact``.

    Args:
        targets: Ids of both sides and the share of each positive in its row and column, or four None.
    """
    N, M, device = batch.N, batch.M, batch.device
    plan = tiles(device, N, M, batch.width, large=not (softmax and exact))
    band = band_rows(plan, N, M)
    ids_a, ids_b, share_a, share_b = targets
    row_sums, column_sums, totals = [], [], []
    d_b = None
    if triplet or (batch.diagonal and (ids_a is not None or smooth)):
        # each text's score with its image; of queries against more keys nobody asks for it
        d_b = batch.d if N == M else torch.zeros(M, device=device)
    for start in range(0, N, band):
        at = slice(start, min(start + band, N))
        n = at.stop - at.start
        rows = torch.empty(-(-M // plan.BLOCK_N) * plan.PIECES if softmax else 0, n, device=device)
        cols = torch.empty(-(-n // plan.BLOCK_M) if softmax and columns else 0, M, device=device)
        grid = plan.grid(n, M, device)
        found = torch.empty(*grid, 2, device=device)
        stats_kernel[grid](
            batch.operand(batch.a[at], plan.BLOCK_M, plan.BLOCK_K), batch.operand(batch.b, plan.BLOCK_N, plan.BLOCK_K),
            scalars, wide, batch.d[at] if batch.diagonal else None, d_b,
            None if ids_a is None else ids_a[at], ids_b, None if share_a is None else share_a[at], share_b,
            rows, cols, found, n, M, batch.width, start + batch.offset, margin,
            SOFTMAX=softmax, TRIPLET=triplet, SIGMOID=sigmoid, COLUMNS=columns, DIAGONAL=batch.diagonal,
            HAS_IDS=ids_a is not None, SMOOTH=smooth, MASK_SAME=mask_same, EXACT=exact, GAMMA=gamma,
            PARTS=batch.parts, TMA=batch.tma, **plan.options(),
        )  # fmt: skip
        totals.append(found)
        several = band < N
        row_sums.append(_sum(rows, exact) if several and softmax else rows)
        column_sums.append(_sum(cols, exact) if several and softmax and columns else cols)
    return _joined(row_sums, 1), _joined(column_sums, 0), _joined(totals, 0)


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _sum(x: Tensor, exact: bool) -> Tensor:
    """Of a band the sums are taken at once: their parts are too many to keep."""
    return (x * math.log(2)).logsumexp(0, keepdim=True) / math.log(2) if exact else x.sum(0, keepdim=True)
