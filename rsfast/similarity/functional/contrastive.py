"""The contrastive loss, and the half of it that one of several processes computes of its own rows."""

from torch import Tensor

from rsfast._dispatch import Impl, use_fused
from rsfast.similarity import reference
from rsfast.similarity.functional import checks


def contrastive_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (M, D)
    logit_scale: Tensor,  # ()
    *,
    image_ids: Tensor | None = None,  # (N,)
    text_ids: Tensor | None = None,  # (M,)
    label_smoothing: float = 0.0,
    normalize: bool = False,
    check_finite: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # ()
    r"""Symmetric InfoNCE with one or several positives a row.

    .. math::
        \tfrac12 \Big[ \tfrac1N \sum_i -\sum_j P_{ij} \log \mathrm{softmax}_j (\tau^{-1} S)_{ij}
        + (\text{transposed}) \Big]

    where :math:`S = I T^\top`, :math:`\tau^{-1}` is ``logit_scale`` and :math:`P` shares each row's weight among the
    pairs of equal id (the diagonal, without ids).

    Source: HarMA, arXiv 2404.18253; upstream ``get_contr_loss``. Without ids it is open_clip's ``ClipLoss`` of one
    process. Differs from upstream: the temperature comes as its inverse, as open_clip passes it; the positives of a
    column are normalised over the column, which is the same where images and texts have the same ids.

    Args:
        image_features: fp32, fp16, bf16 (or fp64). Any norm, unless ``normalize``.
        text_features: Same dtype, device and D. M may differ from N where both ids are given.
        logit_scale: One number, multiplies the similarities as it is, already exponentiated; receives a gradient. On
            the features' device, or on the CPU: then its gradient goes back there, and backward waits for the GPU.
        image_ids: Integers; an image and a text of equal id are positives.
        text_ids: Defaults to ``image_ids`` where the batch is square.
        label_smoothing: Share of each target spread evenly over the row, from 0 to 1.
        normalize: Give the features unit norm first; the gradient takes it into account.
        check_finite: Look for NaN and infinity, and for a ``logit_scale`` not above 0; waits for the GPU. A
            ``logit_scale`` on the CPU is looked at always.
        impl: ``auto`` uses a fused kernel where there is one; ``fused`` insists; ``reference`` is plain PyTorch.

    Returns:
        Scalar in fp32 (fp64 of fp64 features). Of a row without a positive only the smoothing counts.

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument. A square batch of one
            pair is refused: it has no negatives.
        NotImplementedError: ``impl="fused"``; every reason is listed.

    Precision: similarities in the features' dtype (in autocast's, inside an autocast region), all else in fp32;
    gradients in the dtype of what they belong to. Deterministic: yes. Cost, fused: 2 N M D operations forward, 6 N M D
    backward (similarities are made again), O((N + M) D) memory, a workspace of at most 1.5 GiB; the reference keeps
    N x M similarities several times over.

    Example:
        >>> import torch, rsfast
        >>> v = t = torch.eye(4)
        >>> rsfast.contrastive_loss(v, t, torch.tensor(100.0)).item() < 1e-6
        True
    """
    image_features, text_features = checks.prepared(
        image_features=image_features, text_features=text_features, normalize=normalize, check_finite=check_finite
    )
    checks.check_not_alone(image_features, text_features)
    checks.check_ids_given(image_ids, text_ids)
    if len(image_features) != len(text_features) and text_ids is None:
        raise ValueError(
            f"image_ids and text_ids are needed for {len(image_features)} images and {len(text_features)} texts"
        )
    text_ids = None if text_ids is image_ids else text_ids  # kernels do more for the positives on the diagonal
    image_ids, text_ids = checks.prepared_ids(
        dict(image=image_features, text=text_features), image_ids=image_ids, text_ids=text_ids
    )
    logit_scale = checks.prepared_number(
        "logit_scale", logit_scale, image_features, positive=True, check_finite=check_finite
    )
    checks.check_range("label_smoothing", label_smoothing, 0, 1)
    options = dict(image_ids=image_ids, text_ids=text_ids, label_smoothing=label_smoothing)
    if use_fused(impl, why_not_fused(image_features)):
        from rsfast.similarity import kernels

        return kernels.contrastive_loss(image_features, text_features, logit_scale, **options)
    return reference.contrastive_loss(image_features, text_features, logit_scale, **options)


def one_way_loss(
    queries: Tensor,  # (N, D)
    keys: Tensor,  # (M, D)
    logit_scale: Tensor,  # ()
    *,
    offset: int = 0,
    query_ids: Tensor | None = None,  # (N,)
    key_ids: Tensor | None = None,  # (M,)
    label_smoothing: float = 0.0,
    normalize: bool = False,
    check_finite: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # ()
    r"""One direction of :func:`contrastive_loss`: queries look for their keys.

    .. math:: \tfrac1N \sum_i -\sum_j P_{ij} \log \mathrm{softmax}_j (\tau^{-1} S)_{ij}, \quad S = Q K^\top

    With a process's own rows as queries and everyone's as keys it is what open_clip calls ``local_loss``.

    Args:
        queries: As ``image_features`` in :func:`contrastive_loss`.
        keys: As ``text_features``; M of any size, 1 for 1 query excepted.
        logit_scale: As in :func:`contrastive_loss`.
        offset: Key ``i + offset`` belongs to query i; without ids it is the only positive.
        query_ids: Integers; keys of equal id are positives. Both ids, or none.
        key_ids: As above.
        label_smoothing: As in :func:`contrastive_loss`.
        normalize: As in :func:`contrastive_loss`.
        check_finite: As in :func:`contrastive_loss`.
        impl: As in :func:`contrastive_loss`.

    Returns:
        Scalar in fp32 (fp64 of fp64 features).

    Raises:
        ValueError: As in :func:`contrastive_loss`; and where a query's key lies outside ``keys``.
        NotImplementedError: ``impl="fused"``; every reason is listed.

    Precision, determinism and cost: as :func:`contrastive_loss`.

    Example:
        >>> import torch
        >>> from rsfast.similarity.functional import one_way_loss
        >>> keys = torch.eye(6)
        >>> one_way_loss(keys[2:4], keys, torch.tensor(100.0), offset=2).item() < 1e-6
        True
    """
    queries, keys = checks.prepared(queries=queries, keys=keys, normalize=normalize, check_finite=check_finite)
    checks.check_not_alone(queries, keys)
    if (query_ids is None) != (key_ids is None):
        missing = "query_ids" if query_ids is None else "key_ids"
        raise ValueError(f"query_ids and key_ids come together, got None for {missing}")
    if query_ids is None:
        checks.check_offset(offset, queries, keys)
    query_ids, key_ids = checks.prepared_ids(dict(query=queries, key=keys), query_ids=query_ids, key_ids=key_ids)
    logit_scale = checks.prepared_number("logit_scale", logit_scale, queries, positive=True, check_finite=check_finite)
    checks.check_range("label_smoothing", label_smoothing, 0, 1)
    options = dict(offset=offset, query_ids=query_ids, key_ids=key_ids, label_smoothing=label_smoothing)
    if use_fused(impl, why_not_fused(queries)):
        from rsfast.similarity import kernels

        return kernels.one_way_loss(queries, keys, logit_scale, **options)
    return reference.one_way_loss(queries, keys, logit_scale, **options)


def why_not_fused(features: Tensor) -> list[str]:
    """Reasons a fused kernel cannot take these inputs."""
    return checks.why_not_pairs(features)
