"""What the in-batch losses promise, and which implementation keeps the promise."""

from typing import Literal

from torch import Tensor

from rsfast._dispatch import Impl, use_fused, why_not_triton
from rsfast.similarity import reference


def contrastive_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (M, D)
    logit_scale: Tensor,  # ()
    *,
    image_ids: Tensor | None = None,  # (N,)
    text_ids: Tensor | None = None,  # (M,)
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:  # ()
    r"""Symmetric InfoNCE with one or several positives a row.

    .. math::
        \tfrac12 \Big[ \tfrac1N \sum_i -\sum_j P_{ij} \log \mathrm{softmax}_j (\tau^{-1} S)_{ij}
        + (\text{transposed}) \Big]

    where :math:`S = I T^\top`, :math:`\tau^{-1}` is ``logit_scale`` and :math:`P` shares each row's weight among the
    pairs of equal id (the diagonal, without ids).

    Source: HarMA, arXiv 2404.18253; upstream ``get_contr_loss``. Differs from upstream: the temperature comes as its
    inverse, as open_clip passes it.

    Args:
        image_features: fp32, fp16, bf16 (or fp64). Unit norm is the caller's business.
        text_features: Same dtype, device and D. M may differ from N where both ids are given.
        logit_scale: Multiplies the similarities as it is, already exponentiated; receives a gradient.
        image_ids: Integers; an image and a text of equal id are positives.
        text_ids: Defaults to ``image_ids`` where the batch is square.
        label_smoothing: Share of each target spread evenly over the row, from 0 to 1.
        impl: ``auto`` uses a fused kernel where there is one; ``fused`` insists; ``reference`` is plain PyTorch.

    Returns:
        Scalar. A row without a positive counts as zero.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"``; every reason is listed.

    Precision: the features' dtype throughout. Deterministic: yes. Cost: N x M memory.

    Example:
        >>> import torch, rsfast
        >>> v = t = torch.eye(4)
        >>> rsfast.contrastive_loss(v, t, torch.tensor(100.0)).item() < 1e-6
        True
    """
    _check(image_features, text_features, image_ids, text_ids)
    if len(image_features) != len(text_features) and (image_ids is None or text_ids is None):
        raise ValueError(
            f"image_ids and text_ids are needed for {len(image_features)} images and {len(text_features)} texts"
        )
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must hold one number, got shape {tuple(logit_scale.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    use_fused(impl, why_not_fused(image_features))
    return reference.contrastive_loss(
        image_features, text_features, logit_scale,
        image_ids=image_ids, text_ids=text_ids, label_smoothing=label_smoothing,
    )  # fmt: skip


def adaptive_triplet_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    *,
    margin: float = 0.2,
    gamma: float = 2.0,
    negatives: Literal["all", "hardest"] = "all",
    image_ids: Tensor | None = None,  # (N,)
    text_ids: Tensor | None = None,  # (N,)
    mask_same_id: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # ()
    r"""HarMA's adaptive triplet loss: each violation is weighted by how large it is.

    .. math::
        \tfrac12 \sum_{i \ne j} w(c_{ij}) + w(d_{ij}), \quad w(c) = (1 - e^{-c})^\gamma c, \quad
        c_{ij} = [m + s_{ij} - s_{ii}]_+, \; d_{ij} = [m + s_{ij} - s_{jj}]_+

    Source: HarMA, arXiv 2404.18253; upstream ``weighted_triplet_loss``. The gradient flows through the weight. Differs
    from upstream: nothing, unless ``mask_same_id``.

    Args:
        image_features: Row i matches row i of ``text_features``. Unit norm is the caller's business.
        text_features: Same shape, dtype and device.
        margin: In units of the inner product.
        gamma: Exponent of the weight, 0 or more; 0 is the plain triplet loss, halved.
        negatives: Sum over all negatives, or only the hardest of each row and column.
        image_ids: Integers, used with ``mask_same_id``.
        text_ids: Defaults to ``image_ids``.
        mask_same_id: Leave out pairs of equal id. False is upstream's behaviour: only the diagonal is left out.
        impl: As in :func:`contrastive_loss`.

    Returns:
        Scalar, a sum over pairs: it grows with N squared.

    Raises:
        ValueError: A shape, dtype, device or option does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"``; every reason is listed.

    Precision: the features' dtype throughout. Deterministic: yes. Cost: N x N memory.

    Example:
        >>> import torch, rsfast
        >>> v = t = torch.eye(4)
        >>> rsfast.adaptive_triplet_loss(v, t).item()
        0.0
    """
    _check(image_features, text_features, image_ids, text_ids)
    if len(image_features) != len(text_features):
        raise ValueError(f"text_features must have {len(image_features)} rows, one an image, got {len(text_features)}")
    if negatives not in ("all", "hardest"):
        raise ValueError(f"negatives must be 'all' or 'hardest', got {negatives!r}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be 0 or more, got {gamma}")
    if mask_same_id and image_ids is None:
        raise ValueError("image_ids are needed with mask_same_id=True, got None")
    use_fused(impl, why_not_fused(image_features))
    return reference.adaptive_triplet_loss(
        image_features, text_features, margin=margin, gamma=gamma, negatives=negatives,
        image_ids=image_ids, text_ids=text_ids, mask_same_id=mask_same_id,
    )  # fmt: skip


def why_not_fused(image_features: Tensor) -> list[str]:
    """Reasons a fused kernel cannot take these inputs."""
    return [*why_not_triton(image_features), "the in-batch losses have no kernel yet"]


def _check(image_features, text_features, image_ids, text_ids):
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(
                f"{name} must be floating point (N, D), got {features.dtype} of shape {tuple(features.shape)}"
            )
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            f"text_features must be {image_features.shape[1]} wide, as image_features, got {text_features.shape[1]}"
        )
    if len(image_features) == 0 or len(text_features) == 0:
        raise ValueError(f"the batch is empty: {len(image_features)} images and {len(text_features)} texts")
    for what in ("dtype", "device"):
        if getattr(image_features, what) != getattr(text_features, what):
            raise ValueError(
                f"text_features must have {what} {getattr(image_features, what)}, as image_features, "
                f"got {getattr(text_features, what)}"
            )
    for name, ids, features in (("image_ids", image_ids, image_features), ("text_ids", text_ids, text_features)):
        if ids is not None and (ids.shape != features.shape[:1] or ids.is_floating_point()):
            raise ValueError(
                f"{name} must be {len(features)} integers, one a row, got {ids.dtype} of shape {tuple(ids.shape)}"
            )
        if ids is not None and ids.device != features.device:
            raise ValueError(f"{name} must be on {features.device}, as the features are, got {ids.device}")
    if text_ids is not None and image_ids is None:
        raise ValueError("image_ids are needed where text_ids are given, got None")
