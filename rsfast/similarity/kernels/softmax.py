"""Contrastive loss, alone or with a triplet loss of all negatives: two passes over the pairs."""

import math

import torch
from torch import Tensor

from rsfast._tiles import cdiv
from rsfast.similarity.kernels.first import first_pass
from rsfast.similarity.kernels.prepare import FULL, Batch, matches
from rsfast.similarity.kernels.second import gradients, second_pass
from rsfast.similarity.kernels.vectors import (
    factors_kernel,
    grad_scalars_kernel,
    losses_kernel,
    scale_grad_kernel,
    sums_kernel,
)

BLOCK = 128  # rows of a program of the kernels over rows
LOST = 2.0**-106  # a sum of N exponentials below N times this may lack a millionth, flushed to zero


class _Problem:
    """The batch and how its rows and columns weigh in the loss, for their targets and for the smoothing of them."""

    def __init__(self, image, text, diagonal, smoothing, offset, both_ways):
        self.batch = batch = Batch(image, text, diagonal=diagonal, offset=offset)
        row, column = (0.5 / batch.N, 0.5 / batch.M) if both_ways else (1 / batch.N, 0.0)
        self.row, self.column = row, column
        self.rows, self.columns = ((w * (1 - smoothing), w * smoothing) for w in (row, column))
        self.smooth = smoothing * row / batch.M, smoothing * column / batch.N
        self.both_ways, self.smoothed = both_ways, smoothing > 0
        self.row_blocks, self.column_blocks = cdiv(batch.N, BLOCK), cdiv(batch.M, BLOCK) if both_ways else 0

    def targets(self, image_ids, text_ids) -> list[Tensor]:
        """Ids as small integers, and the weight of one positive in its row and its column, 0 without one."""
        ids_a, ids_b, met, met_b = matches(image_ids, image_ids if text_ids is None else text_ids)
        share, share_b = (
            torch.where(n > 0, hard / n.clamp(min=1), 0.0).float()
            for (hard, _), n in ((self.rows, met), (self.columns, met_b))
        )
        return [ids_a, ids_b, share, share_b]


def fwd(
    image: Tensor, text: Tensor, logit_scale: Tensor, image_ids: Tensor | None, text_ids: Tensor | None,
    triplet: bool, mask_same: bool, margin: float, gamma: float, weight: float, smoothing: float, offset: int,
    both_ways: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Both losses; for backward: base-2 logarithms of the sums of rows and columns without their positives, what is
    known of blocks of them, which kernel was right, and the targets.
    """
    p = _Problem(image, text, text_ids is None, smoothing, offset, both_ways)
    batch, device = p.batch, p.batch.device
    scalars, wide = batch.scalars(logit_scale, smooth=p.smooth, shared_exp=triplet and gamma > 0)
    targets = [] if image_ids is None else p.targets(image_ids, text_ids)
    vectors = tuple(targets) or (None,) * 4
    rows = torch.empty(batch.N, dtype=torch.float64, device=device)
    columns = torch.empty(batch.M if both_ways else 0, dtype=torch.float64, device=device)
    found = torch.empty(p.row_blocks + p.column_blocks, 3, dtype=torch.float64, device=device)
    contrastive, hinge = (torch.empty((), device=device) for _ in range(2))
    exact_needed = torch.empty_like(wide)
    for exact, flag in ((False, wide), (True, exact_needed)):
        row_parts, column_parts, totals = first_pass(
            batch, scalars, flag, vectors, softmax=True, triplet=triplet, sigmoid=False, columns=both_ways,
            smooth=p.smoothed, mask_same=mask_same, margin=margin, gamma=gamma, exact=exact,
        )  # fmt: skip
        sides = [(row_parts, rows, found, vectors[2], p.rows)]
        if both_ways:
            sides.append((column_parts, columns, found[p.row_blocks :], vectors[3], p.columns))
        for parts, logs, of_blocks, share, weights in sides:
            sums_kernel[(cdiv(len(logs), BLOCK),)](
                parts, logs, of_blocks, scalars, flag, logit_scale, batch.d, share, len(parts), len(logs), *weights,
                LOST * max(batch.N, batch.M), DIAGONAL=batch.diagonal, EXACT=exact, BLOCK=BLOCK, BLOCK_T=16,
            )  # fmt: skip
        losses_kernel[(1,)](
            contrastive, hinge, found, totals, logit_scale, flag, exact_needed, len(found), len(totals), weight,
            EXACT=exact, BLOCK=1024,
        )  # fmt: skip
    return contrastive, hinge, rows, columns, found, exact_needed, targets


def bwd(
    dcontrastive: Tensor, dtriplet: Tensor | None, image: Tensor, text: Tensor, logit_scale: Tensor, rows: Tensor,
    columns: Tensor, found: Tensor, wide: Tensor, targets: list[Tensor], diagonal: bool, triplet: bool, mask_same: bool,
    margin: float, gamma: float, weight: float, smoothing: float, offset: int, both_ways: bool, need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of both features (empty if not needed) and of the scale; ``dtriplet`` None counts as 0."""
    p = _Problem(image, text, diagonal, smoothing, offset, both_ways)
    batch, device = p.batch, p.batch.device
    scalars, _ = batch.scalars(logit_scale)
    tight = batch.diagonal and not targets and not p.smoothed
    grad_scalars_kernel[(1,)](
        scalars, dcontrastive, dtriplet, logit_scale, found, p.row_blocks, p.column_blocks, p.row, p.column,
        sum(p.smooth), weight if triplet else 0.0, 2 * (1 + gamma), FULL=FULL[batch.dtype], TIGHT=tight, BLOCK=1024,
    )  # fmt: skip
    share_a, share_b = targets[2:] or (None, None)
    own = torch.empty(batch.N, device=device) if batch.diagonal else None
    apart = smoothing * (p.row * (1 - 1 / batch.M) + p.column * (1 - 1 / batch.N))
    lse_a, coef_a = torch.empty(2, batch.N, device=device)
    # one way the keys have no softmax: a factor of 0 and, for no exponential may overflow, an infinite sum
    lse_b, coef_b = torch.full((batch.M,), math.inf, device=device), torch.zeros(batch.M, device=device)
    factors_kernel[(p.row_blocks,)](
        rows, columns, lse_a, coef_a, own, share_a, share_b, scalars, wide, logit_scale, batch.d, batch.N,
        *p.rows, *p.columns, apart,
        DIAGONAL=batch.diagonal, OWN=batch.diagonal, BOTH=both_ways, BLOCK=BLOCK,
    )  # fmt: skip
    if both_ways:
        factors_kernel[(p.column_blocks,)](
            columns, rows, lse_b, coef_b, None, share_b, share_a, scalars, wide, logit_scale, batch.d, batch.M,
            *p.columns, *p.rows, apart, DIAGONAL=batch.diagonal, OWN=False, BOTH=True, BLOCK=BLOCK,
        )  # fmt: skip
    vectors = (None,) * 4
    if targets:
        unit = scalars[9] / scalars[6]
        vectors = (*targets[:2], share_a * unit, share_b * unit)
    da, db, *by, totals = second_pass(
        batch, scalars, wide, vectors, (lse_a, lse_b, coef_a, coef_b), either=True,
        softmax=True, triplet=triplet, sigmoid=False, loss=False, smooth=p.smoothed, mask_same=mask_same,
        margin=margin, gamma=gamma, need_a=need_image, need_b=need_text,
    )  # fmt: skip
    dscale = torch.empty_like(logit_scale)
    scale_grad_kernel[(1,)](
        dscale, totals, scalars, logit_scale, own, batch.d, len(totals), batch.N, BLOCK=1024
    )  # fmt: skip
    dimage, dtext = gradients(
        batch, scalars, da, db, own, by if triplet else (None, None), need_image, need_text, image.dtype
    )  # fmt: skip
    return dimage, dtext, dscale
