"""SigLIP's loss, and the part of it that one of several processes computes of its own rows."""

from torch import Tensor

from rsfast._dispatch import Impl, use_fused
from rsfast.similarity import reference
from rsfast.similarity.functional import checks


def sigmoid_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    logit_scale: Tensor,  # ()
    logit_bias: Tensor | None = None,  # ()
    *,
    normalize: bool = False,
    check_finite: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # ()
    r"""Every pair judged on its own: matching or not.

    .. math::
        -\tfrac1N \sum_{ij} \log \sigma\big(y_{ij} (\tau^{-1} s_{ij} + b)\big),
        \quad y_{ij} = 1 \text{ if } i = j \text{ else } -1

    Source: SigLIP, arXiv 2303.15343; upstream open_clip ``SigLipLoss``. Differs from upstream: nothing.

    Args:
        image_features: Row i matches row i of ``text_features``. fp32, fp16, bf16 (or fp64). Any norm, unless
            ``normalize``.
        text_features: Same shape, dtype and device.
        logit_scale: As in :func:`contrastive_loss`.
        logit_bias: One number, added to every scaled similarity; receives a gradient. None: 0. Where it may live is as
            for ``logit_scale``.
        normalize: As in :func:`contrastive_loss`.
        check_finite: As in :func:`contrastive_loss`; a ``logit_bias`` must be finite too.
        impl: As in :func:`contrastive_loss`.

    Returns:
        Scalar in fp32 (fp64 of fp64 features).

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument. N is at least 2.
        NotImplementedError: ``impl="fused"``; every reason is listed.

    Precision: similarities in the features' dtype (in autocast's, inside an autocast region), all else in fp32;
    gradients in the dtype of what they belong to. Deterministic: yes. Cost, fused: 2 N N D operations without
    gradients, 6 N N D with them, O(N D) memory, a workspace of at most 1.5 GiB; the reference keeps N x N similarities
    several times over.

    Example:
        >>> import torch, rsfast
        >>> v = t = torch.eye(4)
        >>> rsfast.sigmoid_loss(v, t, torch.tensor(40.0), torch.tensor(-20.0)).item() < 1e-7
        True
    """
    image_features, text_features = checks.prepared(
        image_features=image_features, text_features=text_features, normalize=normalize, check_finite=check_finite
    )
    checks.check_square(image_features, text_features)
    numbers = _numbers(logit_scale, logit_bias, image_features, check_finite)
    if use_fused(impl, why_not_fused(image_features)):
        from rsfast.similarity import kernels

        return kernels.sigmoid_loss(image_features, text_features, *numbers, offset=0)
    return reference.sigmoid_loss(image_features, text_features, *numbers)


def one_way_sigmoid_loss(
    queries: Tensor,  # (N, D)
    keys: Tensor,  # (M, D)
    logit_scale: Tensor,  # ()
    logit_bias: Tensor | None = None,  # ()
    *,
    offset: int = 0,
    normalize: bool = False,
    check_finite: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # ()
    """Some rows of :func:`sigmoid_loss`: its sum over the pairs of N queries and M keys, divided by N.

    With a process's own images as queries and everyone's texts as keys it is the loss of open_clip's ``SigLipLoss``
    on that process.

    Args:
        queries: As ``image_features`` in :func:`sigmoid_loss`.
        keys: As ``text_features``; M is N or more.
        logit_scale: As in :func:`sigmoid_loss`.
        logit_bias: As in :func:`sigmoid_loss`.
        offset: Key ``i + offset`` matches query i.
        normalize: As in :func:`sigmoid_loss`.
        check_finite: As in :func:`sigmoid_loss`.
        impl: As in :func:`sigmoid_loss`.

    Returns:
        Scalar in fp32 (fp64 of fp64 features).

    Raises:
        ValueError: As in :func:`sigmoid_loss`; and where a query's key lies outside ``keys``.
        NotImplementedError: ``impl="fused"``; every reason is listed.

    Precision, determinism and cost: as :func:`sigmoid_loss`.

    Example:
        >>> import torch
        >>> from rsfast.similarity.functional import one_way_sigmoid_loss
        >>> keys, numbers = torch.eye(6), (torch.tensor(40.0), torch.tensor(-20.0))
        >>> one_way_sigmoid_loss(keys[2:4], keys, *numbers, offset=2).item() < 1e-7
        True
    """
    queries, keys = checks.prepared(queries=queries, keys=keys, normalize=normalize, check_finite=check_finite)
    checks.check_not_alone(queries, keys)
    checks.check_offset(offset, queries, keys)
    numbers = _numbers(logit_scale, logit_bias, queries, check_finite)
    if use_fused(impl, why_not_fused(queries)):
        from rsfast.similarity import kernels

        return kernels.sigmoid_loss(queries, keys, *numbers, offset=offset)
    return reference.one_way_sigmoid_loss(queries, keys, *numbers, offset=offset)


def why_not_fused(features: Tensor) -> list[str]:
    """Reasons a fused kernel cannot take these inputs."""
    return checks.why_not_pairs(features)


def _numbers(logit_scale, logit_bias, features, check_finite):
    prepared = checks.prepared_number("logit_scale", logit_scale, features, positive=True, check_finite=check_finite)
    if logit_bias is None:
        return prepared, None
    return prepared, checks.prepared_number(
        "logit_bias", logit_bias, features, positive=False, check_finite=check_finite
    )
