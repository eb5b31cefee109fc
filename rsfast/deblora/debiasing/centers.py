"""De-biased class centres: classes described by clusters that know nothing of classes."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

import rsfast
from rsfast.deblora.arrays import BATCH_BYTES, Rows, as_integers, as_rows
from rsfast.deblora.debiasing.composition import checked, counts_of


class NoiseWarning(UserWarning):
    """Clusters say nothing of a class, because they hold none of its rows."""


def debiased_centers(
    features: Any | None,  # (N, D)
    labels: Any,  # (N,)
    assignments: Any,  # (N,)
    centers: Any,  # (K, D)
    *,
    n_classes: int | None = None,
    variant: Literal["weighted", "cluster"] = "weighted",
    chosen: Mapping[int, int] | None = None,
) -> Any:  # (C, D)
    r"""Centres of classes as mixtures of cluster centres: :math:`\mu_c = \sum_k (n_{kc} / n_c) \mu_k`.

    :math:`n_{kc}` counts the rows of class c in cluster k, and :math:`n_c` those of class c in any cluster: noise
    (assignment -1) is in neither, so that the weights of a class add up to 1.

    Args:
        features: As in :func:`as_rows`, or None. Read only for classes of which all rows are noise
            (:func:`classes_of_noise`): such a class gets the mean of its rows, and a :class:`NoiseWarning` says so.
        labels: Classes, integers 0..C-1.
        assignments: Clusters 0..K-1, -1 for noise.
        centers: Cluster centres.
        n_classes: C. None: the greatest label and one.
        variant: ``"weighted"`` is the paper. ``"cluster"`` is its released code, which takes the centre of one cluster
            chosen by hand: that of ``chosen``, else of the cluster that holds most rows of the class, the lowest index
            among equals.
        chosen: Cluster of a class, for ``"cluster"``.

    Returns:
        fp32 (fp64 of fp64 centres); a tensor if ``centers`` are one, else NumPy. A class without rows, and one of noise
        alone where ``features`` is None, has NaN: :func:`calibrate` refuses to move rows there.

    Raises:
        TypeError, ValueError: A shape, dtype or value does not fit; the message names the argument.

    Precision: weights and sums in fp64. Deterministic: yes.
    Source: debLoRA (arXiv 2410.04546), equation 2; its slides write :math:`n_k` for :math:`n_{kc}`.

    Example:
        >>> import torch
        >>> from rsfast.deblora import debiased_centers
        >>> centers = torch.tensor([[0.0, 0.0], [4.0, 8.0]])
        >>> debiased_centers(None, [0, 0, 0, 0, 1], [0, 0, 0, 1, 1], centers)
        tensor([[1., 2.],
                [4., 8.]])
    """
    if variant not in ("weighted", "cluster"):
        raise ValueError(f"variant must be 'weighted' or 'cluster', got {variant!r}")
    if chosen is not None and variant != "cluster":
        raise ValueError("chosen is for variant='cluster'")
    given = as_rows(centers, "centers")
    given.check()
    mu_k = given.all()
    labels, assignments, n_classes, k = checked(labels, assignments, n_classes, len(mu_k))
    labels, assignments = labels.to(mu_k.device), assignments.to(mu_k.device)
    counts = counts_of(labels, assignments, n_classes, k)
    weights = counts.double() / counts.sum(1, keepdim=True)  # NaN for a class that is in no cluster
    if variant == "cluster":
        weights = _one_each(counts, chosen or {})
    mu = (weights @ mu_k.double()).to(torch.promote_types(mu_k.dtype, torch.float32))
    if features is not None:
        mu = _with_means_of_noise(as_rows(features), labels, mu)
    return given.back(mu)


def _few(numbers: list[int], most: int = 10) -> str:
    return ", ".join(map(str, numbers[:most])) + ", ..." * (len(numbers) > most)


def _one_each(counts: Tensor, chosen: Mapping[int, int]) -> Tensor:
    """Weights (C, K) of one cluster for every class that is in any, and for those chosen for."""
    for name, values, limit in (("classes", chosen, len(counts)), ("clusters", chosen.values(), counts.shape[1])):
        as_integers(list(values) or torch.zeros(0, dtype=torch.long), f"chosen {name}", len(chosen), most=limit - 1)
    place, known = counts.argmax(1), counts.sum(1) > 0
    for number, cluster in chosen.items():
        place[number], known[number] = cluster, True
    return torch.where(known[:, None], torch.nn.functional.one_hot(place, counts.shape[1]).double(), torch.nan)


def _with_means_of_noise(rows: Rows, labels: Tensor, mu: Tensor) -> Tensor:
    """``mu`` with the means of classes that have rows, but none in a cluster."""
    if len(rows) != len(labels):
        raise ValueError(f"labels must be of shape ({len(rows)},), one per row of features, got ({len(labels)},)")
    if rows.dim != mu.shape[1]:
        raise ValueError(f"centers must be {rows.dim} wide, as features, got {mu.shape[1]}")
    alone = mu[:, 0].isnan()[labels].nonzero()[:, 0]
    if not len(alone):
        return mu
    named = labels[alone].unique().tolist()
    warnings.warn(
        f"all rows of {len(named)} class(es), {_few(named)}, are noise: their centres are the means of these rows",
        NoiseWarning,
        stacklevel=3,
    )
    sums, counts = torch.zeros_like(mu, dtype=torch.float64), torch.bincount(labels[alone], minlength=len(mu))
    for some in alone.split(max(1, BATCH_BYTES // rows.dim // rows.dtype.itemsize)):
        theirs = rows.take(some, mu.device)
        if not theirs.isfinite().all():
            rows.check()  # which names them
        sums += rsfast.kmeans_update(theirs, labels[some], len(mu)).sums
    return torch.where((counts > 0)[:, None], (sums / counts[:, None]).to(mu), mu)
