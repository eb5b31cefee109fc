"""In-batch losses over S = I T^T in plain PyTorch, each as its equation reads.

S is a product in the features' dtype; all that follows is in fp32, or in float64 for float64 features.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Negatives = Literal["all", "hardest"]


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
    scores = _scores(image_features, text_features)
    return _contrastive(scores, logit_scale, image_ids, text_ids, label_smoothing)


def one_way_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    *,
    offset: int = 0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """mean_i -sum_j P_ij log softmax_j(t S)_ij, P the positives of a row: j = i + offset, or those of equal id."""
    scores = _scores(queries, keys)
    positive = _partners(scores, offset) if query_ids is None else query_ids[:, None] == key_ids
    return _cross_entropy(logit_scale * scores, positive, label_smoothing)


def triplet_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    margin: float = 0.2,
    negatives: Negatives = "all",
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    mask_same_id: bool = False,
) -> Tensor:
    """sum_{i != j} c_ij + d_ij,  c_ij = [m + S_ij - S_ii]_+,  d_ij = [m + S_ij - S_jj]_+."""
    scores = _scores(image_features, text_features)
    same = _left_out(scores, image_ids, text_ids, mask_same_id)
    return sum(cost.sum() for cost in _violations(scores, same, margin, negatives))


def adaptive_triplet_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    margin: float = 0.2,
    gamma: float = 2.0,
    negatives: Negatives = "all",
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    mask_same_id: bool = False,
) -> Tensor:
    """1/2 sum_{i != j} w(c_ij) + w(d_ij),  w(c) = (1 - e^-c)^gamma c,  c and d as in the triplet loss."""
    scores = _scores(image_features, text_features)
    same = _left_out(scores, image_ids, text_ids, mask_same_id)
    return _adaptive_triplet(scores, same, margin, gamma, negatives)


def harma_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    margin: float = 0.2,
    gamma: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """The contrastive loss, with positives by id, and the adaptive triplet loss over all negatives, from one S."""
    scores = _scores(image_features, text_features)
    contrastive = _contrastive(scores, logit_scale, image_ids, None, 0.0)
    return contrastive, _adaptive_triplet(scores, _partners(scores), margin, gamma, "all")


def sigmoid_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Tensor:
    """-1/N sum_ij log sigmoid(y_ij (t S_ij + b)),  y_ij = 1 on the diagonal, -1 elsewhere."""
    return one_way_sigmoid_loss(image_features, text_features, logit_scale, logit_bias)


def one_way_sigmoid_loss(
    queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None, *, offset: int = 0
) -> Tensor:
    """The sigmoid loss of some rows: y_ij = 1 where j = i + offset, N the number of queries."""
    scores = _scores(queries, keys)
    logits = logit_scale * scores + (0 if logit_bias is None else logit_bias)
    signed = torch.where(_partners(scores, offset), logits, -logits)
    return -torch.nn.functional.logsigmoid(signed).sum() / len(queries)


def uniformity_loss(features: Tensor, *, t: float = 2.0) -> Tensor:
    """log mean_{i<j} e^(-2t (1 - S_ij)),  S = X X^T."""
    scores = _scores(features, features)
    pairs = torch.ones_like(scores, dtype=torch.bool).triu(1)
    n = len(features)
    return (2 * t * (scores - 1)).masked_fill(~pairs, -torch.inf).logsumexp((0, 1)) - math.log(n * (n - 1) / 2)


def alignment_loss(image_features: Tensor, text_features: Tensor, *, alpha: float = 2.0) -> Tensor:
    """mean_i |x_i - y_i|^alpha."""
    apart = _wide(image_features) - _wide(text_features)
    return (torch.linalg.vector_norm(apart, dim=1) ** alpha).mean()


def affiliation_loss(image_features: Tensor, text_features: Tensor, labels: Tensor, logit_scale: Tensor) -> Tensor:
    """1/2 mean_i [-log softmax_j(t x_i . c_j)_i - log softmax_j(t y_j . b_i)_i],  b_i, c_i the centres of i's class.

    b_i is the mean of the images of label i, c_i that of its texts; the second softmax runs over texts.
    """
    same = labels[:, None] == labels
    count = same.sum(1, keepdim=True)

    def centres(features):
        return (_wide(same.to(features.dtype) @ features) / count).to(features.dtype)

    own = _partners(same)
    to_text = logit_scale * _scores(image_features, centres(text_features))
    to_image = logit_scale * _scores(centres(image_features), text_features)
    return (_cross_entropy(to_text, own, 0.0) + _cross_entropy(to_image, own, 0.0)) / 2


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _scores(one: Tensor, two: Tensor) -> Tensor:
    return _wide(one @ two.mT)


def _partners(scores: Tensor, offset: int = 0) -> Tensor:
    """Where j = i + offset."""
    rows, columns = (torch.arange(n, device=scores.device) for n in scores.shape)
    return rows[:, None] + offset == columns


def _cross_entropy(logits: Tensor, positive: Tensor, label_smoothing: float) -> Tensor:
    """Mean over rows; a row's positives share its weight."""
    target = positive.to(logits.dtype)
    target = target / target.sum(1, keepdim=True).clamp(min=1)
    target = (1 - label_smoothing) * target + label_smoothing / logits.shape[1]
    return -(target * logits.log_softmax(1)).sum(1).mean()


def _contrastive(scores, logit_scale, image_ids, text_ids, label_smoothing):
    if image_ids is None:
        positive = _partners(scores)
    else:
        positive = image_ids[:, None] == (image_ids if text_ids is None else text_ids)
    logits = logit_scale * scores
    return (
        _cross_entropy(logits, positive, label_smoothing) + _cross_entropy(logits.mT, positive.mT, label_smoothing)
    ) / 2


def _left_out(scores, image_ids, text_ids, mask_same_id):
    """Pairs that are no negatives."""
    if not mask_same_id:
        return _partners(scores)
    return _partners(scores) | (image_ids[:, None] == (image_ids if text_ids is None else text_ids))


def _violations(scores, same, margin, negatives):
    """c and d, of every pair or of the hardest negative of each row and column: the first of equals."""
    own, others = scores.diagonal(), scores.masked_fill(same, -torch.inf)
    if negatives == "hardest":  # max hands the gradient to one element, amax would share it between ties
        return (margin + others.max(1).values - own).relu(), (margin + others.max(0).values - own).relu()
    return (margin + others - own[:, None]).relu(), (margin + others - own).relu()


def _adaptive_triplet(scores, same, margin, gamma, negatives):
    def weighed(cost):
        # the base is 1 where the cost is 0: a power below 1 has no gradient at 0
        return (-torch.expm1(-cost)).where(cost > 0, 1) ** gamma * cost

    return sum(weighed(cost).sum() for cost in _violations(scores, same, margin, negatives)) / 2
