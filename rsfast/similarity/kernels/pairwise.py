"""Losses that are a sum over pairs, each by itself: sigmoid, and triplets of all negatives. One pass does it all."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.similarity.kernels.first import LN2, SHARP, first_pass
from rsfast.similarity.kernels.prepare import Batch, matches
from rsfast.similarity.kernels.second import gradients, second_pass, unit


def fwd(
    image: Tensor, text: Tensor, logit_scale: Tensor | None, logit_bias: Tensor | None, image_ids: Tensor | None,
    text_ids: Tensor | None, mask_same: bool, margin: float, gamma: float, weight: float, offset: int,
    need_image: bool, need_text: bool, need_scalars: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, and its gradients by features, scale and bias as far as they are needed, else empty.

    The sigmoid loss with a ``logit_scale``, else a triplet loss.
    """
    batch = Batch(image, text, diagonal=True, offset=offset)
    sigmoid, device = logit_scale is not None, batch.device
    targets, zero = (None,) * 4, torch.zeros((), device=device)
    scale = logit_scale.reshape(()).float() if sigmoid else zero
    bias = zero if logit_bias is None else logit_bias.reshape(()).float()
    if mask_same:
        targets = (*matches(image_ids, image_ids if text_ids is None else text_ids)[:2], None, None)
    wide = None if sigmoid or gamma == 0 else (batch.bound > SHARP).int().reshape(1)
    options = dict(
        softmax=False, triplet=not sigmoid, sigmoid=sigmoid, smooth=False, mask_same=mask_same, margin=margin,
        gamma=gamma,
    )  # fmt: skip
    scalars = torch.stack([scale / LN2 * batch.to_score, zero, batch.to_score, bias / LN2, zero, zero])
    z = scale * batch.d + bias
    if not (need_image or need_text or need_scalars):
        never = torch.zeros(1, dtype=torch.int32, device=device)
        lost = 0.0
        for exact in (False,) if wide is None else (False, True):
            _, _, totals = first_pass(
                batch, scalars, never if wide is None else wide, targets, columns=False, exact=exact, **options
            )  # fmt: skip
            lost = lost + totals[1]
        nothing = [image.new_empty(0), image.new_empty(0), zero.new_empty(0), zero.new_empty(0)]
        return _loss(lost, z, weight, sigmoid), *nothing
    steep = scale if sigmoid else torch.ones_like(zero)
    one = unit(batch, weight * steep.abs() * (1 if sigmoid else 2 * (1 + gamma)))
    scalars[5] = weight * steep / one
    da, db, rows_by, columns_by, totals = second_pass(
        batch, scalars, wide, targets, (None,) * 4, loss=True, need_a=need_image, need_b=need_text, **options
    )  # fmt: skip
    own = -weight * steep * torch.sigmoid(-z) if sigmoid else -weight * (rows_by + columns_by)
    dimage, dtext = gradients(batch, da, db, own, one, need_image, need_text)
    own = own.double()
    dscale = (totals[0] * one * batch.to_score + (own * batch.d).sum()) / steep
    dbias = (totals[1] * one + own.sum()) / steep
    return _loss(totals[2], z, weight, sigmoid), dimage, dtext, dscale.float(), dbias.float()


def _loss(lost: Tensor, z: Tensor, weight: float, sigmoid: bool) -> Tensor:
    """The pairs' sum with the positives, which only the sigmoid loss has."""
    if sigmoid:
        lost = lost + F.softplus(-z.double()).sum()
    return (weight * lost).float()
