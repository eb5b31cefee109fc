"""Launches of the first pass, and the losses from what it leaves."""

import math

import torch
from torch import Tensor

from rsfast.similarity.kernels.forward import stats_kernel
from rsfast.similarity.kernels.plan import band_rows, tiles
from rsfast.similarity.kernels.prepare import Batch

LN2 = math.log(2)
HIGHEST = 85 / LN2  # base-2 logarithm that no sum of exponentials reaches: fp32 ends at 2^128
LOWEST = -126  # below, exponentials are flushed to zero
SHARP = 60.0  # scores above this may overflow exp(-S), which the triplet's two directions share


def shift(batch: Batch, logit_scale: Tensor) -> Tensor:
    """m, the constant in the exponent: as low as it can be without overflow."""
    highest = logit_scale.abs() * batch.bound / LN2 + math.log2(max(batch.N, batch.M))
    return (highest - HIGHEST).clamp(min=0)


def first_pass(
    batch: Batch, scalars: Tensor, wide: Tensor, targets: tuple, *, softmax: bool, triplet: bool, sigmoid: bool,
    columns: bool, smooth: bool, mask_same: bool, margin: float, gamma: float, exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sums of a row and of a column (for ``exact`` their logarithms), totals; garbage where ``wide`` is not ``exact``.

    Args:
        targets: Ids of both sides and the share of each positive in its row and column, or four None.
    """
    N, M, device = batch.N, batch.M, batch.device
    plan = tiles(device, N, M, batch.width, large=True)
    band = band_rows(plan, N, M)
    ids_a, ids_b, share_a, share_b = targets
    row_sums, column_sums, totals = [], None, 0.0
    d_b = _diagonal_of_columns(batch)
    for start in range(0, N, band):
        at = slice(start, min(start + band, N))
        n = at.stop - at.start
        rows = torch.empty(-(-M // plan.BLOCK_N) * plan.PIECES if softmax else 0, n, device=device)
        cols = torch.empty(-(-n // plan.BLOCK_M) if softmax and columns else 0, M, device=device)
        grid = plan.grid(n, M, device)
        found = torch.zeros(*grid, 2, device=device)
        stats_kernel[grid](
            batch.operand(batch.a[at], plan.BLOCK_M, plan.BLOCK_K), batch.operand(batch.b, plan.BLOCK_N, plan.BLOCK_K),
            scalars, wide, batch.d[at] if batch.diagonal else None, d_b,
            None if ids_a is None else ids_a[at], ids_b, None if share_a is None else share_a[at], share_b,
            rows, cols, found, n, M, batch.width, start + batch.offset, margin,
            SOFTMAX=softmax, TRIPLET=triplet, SIGMOID=sigmoid, COLUMNS=columns, DIAGONAL=batch.diagonal,
            HAS_IDS=ids_a is not None, SMOOTH=smooth, MASK_SAME=mask_same, EXACT=exact, GAMMA=gamma,
            PARTS=batch.parts, TMA=batch.tma, **plan.options(),
        )  # fmt: skip
        totals = totals + found.sum(0, dtype=torch.float64)
        if softmax:
            row_sums.append(_log_sum(rows) if exact else rows.sum(0))
        if softmax and columns:
            cols = _log_sum(cols) if exact else cols.sum(0)
            column_sums = cols if column_sums is None else _both(column_sums, cols, exact)
    nothing = torch.empty(0, device=device)
    return (
        torch.cat(row_sums) if len(row_sums) > 1 else row_sums[0] if row_sums else nothing,
        nothing if column_sums is None else column_sums,
        totals,
    )


def _diagonal_of_columns(batch: Batch) -> Tensor | None:
    """Each text's score with its image; of queries against more keys nobody asks for it."""
    if not batch.diagonal:
        return None
    return batch.d if batch.N == batch.M else torch.zeros(batch.M, device=batch.device)


def _log_sum(x: Tensor) -> Tensor:
    return (x * LN2).logsumexp(0) / LN2


def _both(x: Tensor, y: Tensor, exact: bool) -> Tensor:
    return torch.logaddexp2(x, y) if exact else x + y
