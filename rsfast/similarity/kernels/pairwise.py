"""Losses that are a sum over pairs, each by itself: sigmoid, and triplets of all negatives. One pass does it all."""

import torch
from torch import Tensor

from rsfast.similarity.kernels.first import first_pass
from rsfast.similarity.kernels.prepare import Batch, matches
from rsfast.similarity.kernels.second import gradients, second_pass
from rsfast.similarity.kernels.vectors import pairwise_kernel


def fwd(
    image: Tensor, text: Tensor, logit_scale: Tensor | None, logit_bias: Tensor | None, image_ids: Tensor | None,
    text_ids: Tensor | None, mask_same: bool, margin: float, gamma: float, weight: float, offset: int,
    need_image: bool, need_text: bool, need_scalars: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, and its gradients by features, scale and bias as far as they are needed, else empty or zero.

    The sigmoid loss with a ``logit_scale``, else a triplet loss. Gradients are in fp32 and for an upstream one of 1:
    what they are going to be multiplied by may be more than fp16 holds.
    """
    batch = Batch(image, text, diagonal=True, offset=offset)
    sigmoid, device = logit_scale is not None, batch.device
    either = not sigmoid and gamma > 0
    scalars, wide = batch.scalars(
        logit_scale, logit_bias, weight=weight, steepest=1.0 if sigmoid else 2 * (1 + gamma), shared_exp=either
    )
    targets = (None,) * 4
    if mask_same:
        targets = (*matches(image_ids, image_ids if text_ids is None else text_ids)[:2], None, None)
    options = dict(
        softmax=False, triplet=not sigmoid, sigmoid=sigmoid, smooth=False, mask_same=mask_same, margin=margin,
        gamma=gamma,
    )  # fmt: skip
    wanted = need_image or need_text or need_scalars
    da, db = (torch.empty(0, batch.D, device=device) for _ in "ab")
    by, own = (None, None), torch.empty(batch.N, device=device) if sigmoid else None
    if wanted:
        da, db, *by, totals = second_pass(
            batch, scalars, wide, targets, (None,) * 4, either=either, loss=True, need_a=need_image, need_b=need_text,
            **options,
        )  # fmt: skip
    else:
        passes = [
            first_pass(batch, scalars, wide, targets, columns=False, exact=exact, **options)[2]
            for exact in ((False, True) if either else (False,))
        ]
        totals = torch.where(wide == 0, passes[0], passes[-1])
    out = torch.empty(3, device=device)
    pairwise_kernel[(1,)](
        out, own, totals, scalars, logit_scale, logit_bias, batch.d, len(totals), batch.N, weight,
        LOSS_AT=2 if wanted else 1, STRIDE=totals.shape[1], SIGMOID=sigmoid, BLOCK=1024,
    )  # fmt: skip
    dimage, dtext = gradients(
        batch, scalars, da, db, own, (None, None) if sigmoid else by, need_image, need_text, torch.float32
    )  # fmt: skip
    return out[0].clone(), dimage, dtext, out[1].clone(), out[2].clone()
