"""HarMA's objective: the contrastive and the adaptive triplet loss of the same similarities."""

from torch import Tensor

from rsfast._dispatch import Impl, use_fused
from rsfast.similarity import reference
from rsfast.similarity.functional import checks


def harma_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    logit_scale: Tensor,  # ()
    *,
    image_ids: Tensor | None = None,  # (N,)
    margin: float = 0.2,
    gamma: float = 2.0,
    normalize: bool = False,
    check_finite: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # (), ()
    """The two losses that HarMA trains on, from one set of similarities.

    The same numbers as :func:`contrastive_loss` with ``image_ids`` and :func:`adaptive_triplet_loss` without a mask:
    captions of one image are positives of the first and still negatives of the second, as upstream.

    Source: HarMA, arXiv 2404.18253; upstream ``get_contr_loss`` and ``weighted_triplet_loss``.

    Args:
        image_features: Row i matches row i of ``text_features``. fp32, fp16, bf16 (or fp64). Any norm, unless
            ``normalize``.
        text_features: Same shape, dtype and device.
        logit_scale: As in :func:`contrastive_loss`.
        image_ids: Integers; pairs of equal id are positives of each other. None: only the diagonal.
        margin: As in :func:`adaptive_triplet_loss`.
        gamma: As in :func:`adaptive_triplet_loss`.
        normalize: As in :func:`contrastive_loss`.
        check_finite: As in :func:`contrastive_loss`.
        impl: As in :func:`contrastive_loss`.

    Returns:
        Contrastive loss (a mean) and adaptive triplet loss (a sum over pairs), scalars in fp32 (fp64 of fp64
        features).

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument. N is at least 2.
        NotImplementedError: ``impl="fused"``; every reason is listed.

    Precision: similarities in the features' dtype (in autocast's, inside an autocast region), all else in fp32;
    gradients in the dtype of what they belong to. Deterministic: yes. Cost, fused: 2 N N D operations forward, 6 N N D
    backward (similarities are made again), O(N D) memory, a workspace of at most 1.5 GiB; the reference keeps
    N x N similarities several times over.

    Example:
        >>> import torch, rsfast
        >>> v = t = torch.eye(4)
        >>> contrastive, triplet = rsfast.harma_loss(v, t, torch.tensor(100.0))
        >>> (contrastive + triplet).item() < 1e-6
        True
    """
    image_features, text_features = checks.prepared(
        image_features=image_features, text_features=text_features, normalize=normalize, check_finite=check_finite
    )
    checks.check_square(image_features, text_features)
    (image_ids,) = checks.prepared_ids(dict(image=image_features), image_ids=image_ids)
    logit_scale = checks.prepared_number(
        "logit_scale", logit_scale, image_features, positive=True, check_finite=check_finite
    )
    checks.check_range("margin", margin)
    checks.check_range("gamma", gamma, 0)
    options = dict(image_ids=image_ids, margin=margin, gamma=gamma)
    if use_fused(impl, why_not_fused(image_features)):
        from rsfast.similarity import kernels

        return kernels.harma_loss(image_features, text_features, logit_scale, **options)
    return reference.harma_loss(image_features, text_features, logit_scale, **options)


def why_not_fused(image_features: Tensor) -> list[str]:
    """Reasons a fused kernel cannot take these inputs."""
    return checks.why_not_pairs(image_features)
