"""HarMA's pair of losses as its authors' code computes it, written again from its equations: the baseline to beat.

Source: arXiv 2404.18253; upstream ``get_contr_loss`` and ``weighted_triplet_loss`` on one process. It trains in fp32.
"""

import torch
from torch import Tensor


def as_written(image: Tensor, text: Tensor, logit_scale: Tensor, *, image_ids: Tensor) -> tuple[Tensor, Tensor]:
    """In fp32 whatever comes in; S computed three times, the mask built on the CPU, the triplet computed twice."""
    image, text = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (image, text))
    _triplet(image @ text.t(), _mask_from_the_cpu(image))  # upstream's forward throws the first one away
    contrastive = _contrastive(image @ text.t() * logit_scale, image_ids)
    return contrastive, _triplet(image @ text.t(), _mask_from_the_cpu(image))


def cleaned(image: Tensor, text: Tensor, logit_scale: Tensor, *, image_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one S, a product in the features' dtype, one triplet and a mask built on the device."""
    scores = image @ text.t()
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    mask = torch.eye(len(scores), device=scores.device, dtype=torch.bool)
    return _contrastive(scores * logit_scale, image_ids), _triplet(scores, mask)


def _mask_from_the_cpu(features: Tensor) -> Tensor:
    return (torch.eye(len(features)) > 0.5).to(features.device)


def _contrastive(logits: Tensor, ids: Tensor) -> Tensor:
    ids = ids.view(-1, 1)
    positive = torch.eq(ids, ids.t()).to(logits.dtype)
    target = positive / positive.sum(dim=1, keepdim=True)
    by_image, by_text = (-(z.log_softmax(dim=1) * target).sum(dim=1).mean() for z in (logits, logits.t()))
    return (by_image + by_text) / 2


def _triplet(scores: Tensor, mask: Tensor, margin: float = 0.2, gamma: float = 2.0) -> Tensor:
    own = scores.diag().view(-1, 1)
    costs = [(margin + scores - d.expand_as(scores)).clamp(min=0).masked_fill_(mask, 0) for d in (own, own.t())]
    weighed = [(1 - torch.exp(-cost)) ** gamma * cost for cost in costs]
    return (weighed[0].sum() + weighed[1].sum()) / 2
