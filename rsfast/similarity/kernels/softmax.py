"""Contrastive loss, alone or with a triplet loss of all negatives: two passes over the pairs."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.similarity.kernels.first import LN2, LOWEST, SHARP, first_pass, shift
from rsfast.similarity.kernels.prepare import Batch, matches
from rsfast.similarity.kernels.second import gradients, second_pass, unit


class _Problem:
    """The batch, and the weights of rows, columns and targets in the loss.

    Attributes:
        rows, columns: Weight of each logarithm of a sum.
        vectors: Ids, and the share of one positive in its row's and column's targets, times their weights.
        smooth: The share of any pair, from label smoothing.
        rest: Targets of a row and a column outside their own positive.
    """

    def __init__(self, image, text, logit_scale, image_ids, text_ids, smoothing, offset, both_ways):
        ids = image_ids is not None
        self.batch = batch = Batch(image, text, diagonal=text_ids is None, offset=offset)
        row, column = (0.5 / batch.N, 0.5 / batch.M) if both_ways else (1 / batch.N, 0.0)
        self.smooth = smoothing * row / batch.M, smoothing * column / batch.N
        self.rows, self.columns, self.vectors = row, column, (None,) * 4
        self.rest = smoothing * (row * (1 - 1 / batch.M) + column * (1 - 1 / batch.N))
        self.hard, self.both_ways = ids or smoothing > 0, both_ways
        if ids:
            ids_a, ids_b, met, met_b = matches(image_ids, image_ids if text_ids is None else text_ids)
            share, share_b = (w * (1 - smoothing) / n.clamp(min=1) for w, n in ((row, met), (column, met_b)))
            self.vectors = ids_a, ids_b, share, share_b
            if batch.diagonal:
                self.rest = self.rest + (1 - smoothing) * (row + column) * (1 - 1 / met.double())
            else:
                self.rows, self.columns = (
                    w * ((1 - smoothing) * (n > 0).double() + smoothing) for w, n in ((row, met), (column, met_b))
                )
        self.scale = logit_scale.reshape(()).float()
        self.shift = shift(batch, self.scale)
        # of each positive, in base 2; without a diagonal every pair is in the sums
        self.logits = self.scale.double() / LN2 * batch.d if batch.diagonal else None

    def scalars(self, *last: Tensor | float) -> Tensor:
        scores, new = self.batch.to_score, self.scale.new_full
        values = (self.scale / LN2 * scores, self.shift, scores, 0.0, *last)
        return torch.stack([x.float() if isinstance(x, Tensor) else new((), x) for x in values])

    def share(self, log_sums: Tensor) -> Tensor:
        """Probability of everything but the positive."""
        return ((log_sums - self.logits) * LN2).sigmoid()

    def all(self, log_sums: Tensor) -> Tensor:
        """Logarithms of the sums with the positive."""
        return log_sums if self.logits is None else torch.logaddexp2(log_sums, self.logits)

    def entropy(self, log_sums: Tensor) -> Tensor:
        """Minus the logarithm of the positive's probability; without a diagonal only the logarithm of the sum."""
        return LN2 * log_sums if self.logits is None else F.softplus((log_sums - self.logits) * LN2)

    def lost(self, sums: Tensor) -> Tensor:
        """Whether underflow took from a sum what the loss would show."""
        least = max(self.batch.N, self.batch.M) * 2.0 ** (LOWEST + 20)
        lost = sums < least
        if self.logits is not None:
            lost = lost & (self.logits - self.shift < math.log2(least) - LOWEST)
        return lost.any()


def fwd(
    image: Tensor, text: Tensor, logit_scale: Tensor, image_ids: Tensor | None, text_ids: Tensor | None,
    triplet: bool, mask_same: bool, margin: float, gamma: float, weight: float, smoothing: float, offset: int,
    both_ways: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Both losses; base-2 logarithms of rows' and columns' sums without their positives; which kernel was right."""
    p = _Problem(image, text, logit_scale, image_ids, text_ids, smoothing, offset, both_ways)
    scalars = p.scalars(*p.smooth)
    options = dict(
        softmax=True, triplet=triplet, sigmoid=False, columns=both_ways, smooth=smoothing > 0, mask_same=mask_same,
        margin=margin, gamma=gamma,
    )  # fmt: skip
    sharp = (p.batch.bound > SHARP) & (triplet and gamma > 0)
    rows, columns, totals = first_pass(
        p.batch, scalars, sharp.int().reshape(1), p.vectors, exact=False, **options
    )  # fmt: skip
    wide = sharp | p.lost(rows) | (p.lost(columns) if both_ways else False)
    exact = first_pass(p.batch, scalars, wide.int().reshape(1), p.vectors, exact=True, **options)
    both = zip(exact[:2], (rows, columns), strict=True)
    rows, columns = (torch.where(wide, logs.double(), sums.double().log2() + p.shift) for logs, sums in both)
    aligned, hinge = torch.where(wide, exact[2], totals)
    contrastive = (p.rows * p.entropy(rows)).sum() - p.scale * aligned
    if both_ways:
        contrastive = contrastive + (p.columns * p.entropy(columns)).sum()
    return torch.stack([contrastive, weight * hinge]).float(), rows, columns, wide.int().reshape(1)


def bwd(
    dlosses: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, image_ids: Tensor | None,
    text_ids: Tensor | None, rows: Tensor, columns: Tensor, wide: Tensor, triplet: bool, mask_same: bool, margin: float,
    gamma: float, weight: float, smoothing: float, offset: int, both_ways: bool, need_image: bool, need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of both features (empty if not needed) and of the scale."""
    p = _Problem(image, text, logit_scale, image_ids, text_ids, smoothing, offset, both_ways)
    batch = p.batch
    steep, steep_triplet = dlosses[0].double() * p.scale, dlosses[1] * weight * triplet
    row_share = column_share = own = None
    bound = steep.abs() * ((p.rows + p.columns) if isinstance(p.rows, float) else 1)
    if batch.diagonal:
        row_share = p.share(rows)
        column_share = p.share(columns) if both_ways else torch.zeros_like(row_share)
        own = steep * (p.rest - p.rows * row_share - p.columns * column_share)
        if not p.hard:
            bound = steep.abs() * (p.rows * row_share.amax() + p.columns * column_share.amax())
    bound = bound + steep_triplet.abs() * 2 * (1 + gamma)
    one = unit(batch, bound.float())
    lse = [p.all(rows), p.all(columns) if both_ways else torch.zeros(batch.M, device=batch.device)]
    coef = [
        w * steep / one * torch.where(wide > 0, 1.0, torch.exp2(p.shift - x))
        for w, x in zip((p.rows, p.columns), lse, strict=True)
    ]
    vectors = p.vectors
    if vectors[0] is not None:
        vectors = (*vectors[:2], *((steep / one * share).float() for share in vectors[2:]))
    da, db, rows_by, columns_by, totals = second_pass(
        batch, p.scalars(steep / one * sum(p.smooth), steep_triplet / one), wide, vectors,
        tuple(x.float() for x in (*lse, *coef)),
        softmax=True, triplet=triplet, sigmoid=False, loss=False, smooth=smoothing > 0, mask_same=mask_same,
        margin=margin, gamma=gamma, need_a=need_image, need_b=need_text,
    )  # fmt: skip
    dscale = totals[0] * one * batch.to_score
    if own is not None:
        dscale = dscale + (own * batch.d).sum()
        own = own.float()
        if triplet:
            own = own - steep_triplet * (rows_by + columns_by)
    dimage, dtext = gradients(batch, da, db, own, one, need_image, need_text)
    return dimage, dtext, (dscale / p.scale).to(logit_scale.dtype).reshape(logit_scale.shape)
