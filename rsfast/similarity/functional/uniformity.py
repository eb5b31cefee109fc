"""How evenly features spread over the sphere, and how close the two of a pair are."""

from torch import Tensor

from rsfast._dispatch import Impl, use_fused
from rsfast.similarity import reference
from rsfast.similarity.functional import checks


def uniformity_loss(
    features: Tensor,  # (N, D)
    *,
    t: float = 2.0,
    normalize: bool = False,
    check_finite: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # ()
    r"""Logarithm of the mean Gaussian potential over the pairs of a batch: low where features spread evenly.

    .. math:: \log \frac{2}{N (N - 1)} \sum_{i < j} e^{-2 t (1 - \langle x_i, x_j \rangle)}

    For features of unit norm the exponent is :math:`-t \lVert x_i - x_j \rVert^2`.

    Source: Wang and Isola, arXiv 2005.10242. Differs from it: the inner product also for features of another norm.

    Args:
        features: One modality. fp32, fp16, bf16 (or fp64).
        t: Above 0; larger looks at closer pairs.
        normalize: Give the features unit norm first; the gradient takes it into account.
        check_finite: Look for NaN and infinity in the features; waits for the GPU.
        impl: As in :func:`contrastive_loss`.

    Returns:
        Scalar in fp32 (fp64 of fp64 features).

    Raises:
        ValueError: A shape, dtype or value does not fit; the message names the argument. N is at least 2.
        NotImplementedError: ``impl="fused"``; every reason is listed.

    Precision: similarities in the features' dtype (in autocast's, inside an autocast region), all else in fp32;
    gradients in the features' dtype. Deterministic: yes. Cost, fused: O(N D) memory, a workspace of at most 1.5 GiB;
    the reference keeps N x N similarities several times over.

    Example:
        >>> import torch, rsfast
        >>> round(rsfast.uniformity_loss(torch.eye(4)).item(), 6)
        -4.0
    """
    (features,) = checks.prepared(features=features, normalize=normalize, check_finite=check_finite)
    checks.check_not_alone(features, features)
    checks.check_range("t", t, 0, above=True)
    if use_fused(impl, why_not_fused(features)):
        from rsfast.similarity.kernels.uniformity import uniformity_loss as fused

        return fused(features, t=t)
    return reference.uniformity_loss(features, t=t)


def alignment_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    *,
    alpha: float = 2.0,
    normalize: bool = False,
) -> Tensor:  # ()
    r"""Mean distance of the two features of a pair: :math:`\tfrac1N \sum_i \lVert x_i - y_i \rVert^\alpha`.

    Source: Wang and Isola, arXiv 2005.10242. Differs from it: nothing.

    Args:
        image_features: Row i matches row i of ``text_features``. fp32, fp16, bf16 (or fp64).
        text_features: Same shape, dtype and device.
        alpha: 1 or more.
        normalize: Give the features unit norm first; the gradient takes it into account.

    Returns:
        Scalar in fp32 (fp64 of fp64 features).

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument. N is at least 2.

    Precision: fp32 throughout (of features in autocast's dtype, inside an autocast region). Deterministic: yes. Plain
    PyTorch: it looks at N pairs, not at N x N.

    Example:
        >>> import torch, rsfast
        >>> round(rsfast.alignment_loss(torch.eye(4), torch.eye(4).roll(1, 0)).item(), 6)
        2.0
    """
    image_features, text_features = checks.prepared(
        image_features=image_features, text_features=text_features, normalize=normalize, check_finite=False
    )
    checks.check_square(image_features, text_features)
    checks.check_range("alpha", alpha, 1)
    return reference.alignment_loss(image_features, text_features, alpha=alpha)


def why_not_fused(features: Tensor) -> list[str]:
    """Reasons a fused kernel cannot take these inputs."""
    return checks.why_not_pairs(features)
