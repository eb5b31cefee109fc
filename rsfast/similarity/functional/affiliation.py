"""HarMA's loss against the centres of classes."""

from torch import Tensor

from rsfast.similarity import reference
from rsfast.similarity.functional import checks


def affiliation_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    labels: Tensor,  # (N,)
    logit_scale: Tensor,  # ()
    *,
    normalize: bool = False,
) -> Tensor:  # ()
    r"""Every feature looks for the centre of its class in the other modality.

    .. math::
        \tfrac1{2N} \sum_i -\log \mathrm{softmax}_j (\tau^{-1} \langle v_i, \bar t_j \rangle)_i
        - \log \mathrm{softmax}_j (\tau^{-1} \langle \bar v_i, t_j \rangle)_i

    where :math:`\bar v_i, \bar t_i` are the means of the images and of the texts that have pair i's label. Pairs of
    one class share a centre, which stands in a row's softmax once for each of them.

    Source: upstream HarMA ``get_affil_loss`` (from PIR). Differs from upstream: no loop over the batch, any width, and
    the temperature comes as its inverse. As upstream the second softmax runs over texts, not over centres.

    Args:
        image_features: Row i matches row i of ``text_features``. fp32, fp16, bf16 (or fp64).
        text_features: Same shape, dtype and device.
        labels: Integers, the class of each pair.
        logit_scale: As in :func:`contrastive_loss`.
        normalize: Give the features, not the centres, unit norm first; the gradient takes it into account.

    Returns:
        Scalar in fp32 (fp64 of fp64 features).

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument. N is at least 2.

    Precision: products in the features' dtype (in autocast's, inside an autocast region), and the centres rounded to
    it; all else in fp32. Deterministic: yes. Memory: N x N numbers, plain PyTorch.

    Example:
        >>> import torch, rsfast
        >>> v = t = torch.eye(4)
        >>> rsfast.affiliation_loss(v, t, torch.arange(4), torch.tensor(100.0)).item() < 1e-6
        True
    """
    image_features, text_features = checks.prepared(
        image_features=image_features, text_features=text_features, normalize=normalize, check_finite=False
    )
    checks.check_square(image_features, text_features)
    if labels is None:
        raise ValueError(f"labels must be {len(image_features)} integers, one a row, got None")
    (labels,) = checks.prepared_ids(dict(image=image_features), labels=labels)
    logit_scale = checks.prepared_number("logit_scale", logit_scale, image_features, positive=True, check_finite=False)
    return reference.affiliation_loss(image_features, text_features, labels, logit_scale)
