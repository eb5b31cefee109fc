"""In-batch losses over S = I T^T in plain PyTorch (HarMA, arXiv 2404.18253; upstream ``models/harma.py``)."""

from typing import Literal

import torch
from torch import Tensor


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """1/2 [mean_i -sum_j P_ij log softmax_j(t S)_ij + the same on the transpose], P the positives of a row, sum 1."""
    logits = logit_scale * (image_features @ text_features.mT)
    if image_ids is None:
        positive = torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device)
    else:
        positive = (image_ids[:, None] == (image_ids if text_ids is None else text_ids)).to(logits.dtype)

    def one_way(logits, positive):
        target = positive / positive.sum(1, keepdim=True).clamp(min=1)
        target = (1 - label_smoothing) * target + label_smoothing / logits.shape[1]
        return -(target * logits.log_softmax(1)).sum(1).mean()

    return (one_way(logits, positive) + one_way(logits.mT, positive.mT)) / 2


def adaptive_triplet_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    margin: float = 0.2,
    gamma: float = 2.0,
    negatives: Literal["all", "hardest"] = "all",
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    mask_same_id: bool = False,
) -> Tensor:
    """1/2 sum_ij [w(c_ij) + w(d_ij)],  w(c) = (1 - e^-c)^gamma c.

    c_ij = [m + S_ij - S_ii]_+,  d_ij = [m + S_ij - S_jj]_+.
    """
    scores = image_features @ text_features.mT
    diagonal = scores.diagonal()
    same = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    if mask_same_id:
        same = same | (image_ids[:, None] == (image_ids if text_ids is None else text_ids))

    def one_way(own, axis):
        cost = (margin + scores - own).clamp(min=0).masked_fill(same, 0)
        cost = (-torch.expm1(-cost)) ** gamma * cost
        return cost.sum() if negatives == "all" else cost.amax(axis).sum()

    return (one_way(diagonal[:, None], 1) + one_way(diagonal[None, :], 0)) / 2
