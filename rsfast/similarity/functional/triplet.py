"""The triplet losses over all pairs of a batch."""

from torch import Tensor

from rsfast._dispatch import Impl, use_fused
from rsfast.similarity import reference
from rsfast.similarity.functional import checks
from rsfast.similarity.reference import Negatives


def triplet_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    *,
    margin: float = 0.2,
    negatives: Negatives = "all",
    image_ids: Tensor | None = None,  # (N,)
    text_ids: Tensor | None = None,  # (N,)
    mask_same_id: bool = False,
    normalize: bool = False,
    check_finite: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # ()
    r"""Hinge triplet loss in both directions, over all negatives or the hardest.

    .. math::
        \sum_{i \ne j} c_{ij} + d_{ij}, \quad c_{ij} = [m + s_{ij} - s_{ii}]_+, \; d_{ij} = [m + s_{ij} - s_{jj}]_+

    With ``negatives="hardest"`` the sum takes the largest :math:`c` of each row and the largest :math:`d` of each
    column; its gradient goes to that pair, the first of equals.

    Source: VSE++, arXiv 1707.05612; upstream HarMA ``get_triplet_loss``. Differs from upstream: a violation of exactly
    0 has no gradient, and ``mask_same_id``.

    Args:
        image_features: Row i matches row i of ``text_features``. fp32, fp16, bf16 (or fp64). Any norm, unless
            ``normalize``.
        text_features: Same shape, dtype and device.
        margin: In units of the inner product.
        negatives: Sum over all negatives, or only the hardest of each row and column.
        image_ids: Integers, used with ``mask_same_id``.
        text_ids: Defaults to ``image_ids``.
        mask_same_id: Leave out pairs of equal id. False is upstream's behaviour: only the diagonal is left out.
        normalize: Give the features unit norm first; the gradient takes it into account.
        check_finite: Look for NaN and infinity in the features; waits for the GPU.
        impl: As in :func:`contrastive_loss`.

    Returns:
        Scalar in fp32 (fp64 of fp64 features), a sum over pairs: it grows with N squared, or with N.

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument. N is at least 2.
        NotImplementedError: ``impl="fused"``; every reason is listed.

    Precision: similarities in the features' dtype (in autocast's, inside an autocast region), all else in fp32;
    gradients in the features' dtype. Deterministic: yes. Cost, fused: 2 N N D operations for the hardest negatives or
    without gradients, else 6 N N D, O(N D) memory, a workspace of at most 1.5 GiB; the reference keeps N x N
    similarities several times over.

    Example:
        >>> import torch, rsfast
        >>> v = t = torch.eye(4)
        >>> rsfast.triplet_loss(v, t.flip(0), margin=0.5).item()  # 2 (8 * 0.5 + 4 * 1.5)
        20.0
    """
    image_features, text_features, options = _prepared(
        image_features, text_features, margin, negatives, image_ids, text_ids, mask_same_id, normalize, check_finite
    )
    if use_fused(impl, why_not_fused(image_features)):
        from rsfast.similarity import kernels

        return kernels.triplet_loss(image_features, text_features, gamma=0.0, weight=1.0, **options)
    return reference.triplet_loss(image_features, text_features, **options)


def adaptive_triplet_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    *,
    margin: float = 0.2,
    gamma: float = 2.0,
    negatives: Negatives = "all",
    image_ids: Tensor | None = None,  # (N,)
    text_ids: Tensor | None = None,  # (N,)
    mask_same_id: bool = False,
    normalize: bool = False,
    check_finite: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # ()
    r"""HarMA's adaptive triplet loss: each violation is weighted by how large it is.

    .. math::
        \tfrac12 \sum_{i \ne j} w(c_{ij}) + w(d_{ij}), \quad w(c) = (1 - e^{-c})^\gamma c, \quad
        c_{ij} = [m + s_{ij} - s_{ii}]_+, \; d_{ij} = [m + s_{ij} - s_{jj}]_+

    The gradient flows through the weight. With ``negatives="hardest"`` as in :func:`triplet_loss`.

    Source: HarMA, arXiv 2404.18253; upstream ``weighted_triplet_loss``. Differs from upstream: a violation of exactly
    0 has no gradient (upstream's is NaN for a gamma between 0 and 1), and ``mask_same_id``.

    Args:
        image_features: As in :func:`triplet_loss`.
        text_features: As in :func:`triplet_loss`.
        margin: In units of the inner product.
        gamma: Exponent of the weight, 0 or more; 0 is the plain triplet loss, halved.
        negatives: As in :func:`triplet_loss`.
        image_ids: As in :func:`triplet_loss`.
        text_ids: As in :func:`triplet_loss`.
        mask_same_id: As in :func:`triplet_loss`.
        normalize: As in :func:`triplet_loss`.
        check_finite: As in :func:`triplet_loss`.
        impl: As in :func:`contrastive_loss`.

    Returns:
        Scalar in fp32 (fp64 of fp64 features), a sum over pairs: it grows with N squared, or with N.

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument. N is at least 2.
        NotImplementedError: ``impl="fused"``; every reason is listed.

    Precision, determinism and cost: as :func:`triplet_loss`.

    Example:
        >>> import torch, rsfast
        >>> v = t = torch.eye(4)
        >>> rsfast.adaptive_triplet_loss(v, t).item()
        0.0
    """
    checks.check_range("gamma", gamma, 0)
    image_features, text_features, options = _prepared(
        image_features, text_features, margin, negatives, image_ids, text_ids, mask_same_id, normalize, check_finite
    )
    if use_fused(impl, why_not_fused(image_features)):
        from rsfast.similarity import kernels

        return kernels.triplet_loss(image_features, text_features, gamma=gamma, weight=0.5, **options)
    return reference.adaptive_triplet_loss(image_features, text_features, gamma=gamma, **options)


def why_not_fused(image_features: Tensor) -> list[str]:
    """Reasons a fused kernel cannot take these inputs."""
    return checks.why_not_pairs(image_features)


def _prepared(image_features, text_features, margin, negatives, image_ids, text_ids, mask_same_id, normalize, finite):
    """Both features and the options that the two losses share, checked; ids only where they are used."""
    image_features, text_features = checks.prepared(
        image_features=image_features, text_features=text_features, normalize=normalize, check_finite=finite
    )
    checks.check_square(image_features, text_features)
    checks.check_range("margin", margin)
    if negatives not in ("all", "hardest"):
        raise ValueError(f"negatives must be 'all' or 'hardest', got {negatives!r}")
    checks.check_ids_given(image_ids, text_ids)
    if mask_same_id and image_ids is None:
        raise ValueError("image_ids are needed with mask_same_id=True, got None")
    text_ids = None if text_ids is image_ids else text_ids  # then a small batch takes one launch
    image_ids, text_ids = checks.prepared_ids(
        dict(image=image_features, text=text_features), image_ids=image_ids, text_ids=text_ids
    )
    if not mask_same_id:
        image_ids = text_ids = None
    options = dict(margin=margin, negatives=negatives, mask_same_id=mask_same_id)
    return image_features, text_features, options | dict(image_ids=image_ids, text_ids=text_ids)
