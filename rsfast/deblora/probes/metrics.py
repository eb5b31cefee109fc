"""F1 by head, middle and tail, and how far apart and how tight classes lie."""

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rsfast.deblora.arrays import as_integers, as_rows
from rsfast.deblora.data.counts import GROUPS, ClassCounts


def grouped_f1(
    y_true, y_pred, groups: ClassCounts | Mapping[str, Sequence[int]], *, style: Literal["strict", "deblora"] = "strict"
) -> dict[str, float]:
    """Macro F1 of head, middle and tail classes, and of all, in percent.

    Args:
        y_true: (N,) class ids, N at least 1.
        y_pred: (N,) class ids.
        groups: What says which class is in which group: a :class:`ClassCounts`, or a mapping of head, middle, tail to
            class ids.
        style: ``"strict"``: F1 of each class over all N, averaged over the classes of a group; one that neither
            ``y_true`` nor ``y_pred`` has is left out. ``"deblora"``: of the N those whose true class is in the group,
            and on them the average over whatever classes true and predicted ones have: a class of another group that
            was predicted enters with an F1 of 0, and what other groups wrongly took for this one does not count.

    Returns:
        ``head``, ``middle``, ``tail``, and ``mean``: the average over all classes that ``y_true`` or ``y_pred`` has, in
        either style. NaN for a group without such classes (strict), or without rows (deblora).

    Raises:
        ValueError: The arguments are not such, or a class is none of the :class:`ClassCounts`.

    Upstream: debLoRA ``calculate_group_f1`` for ``"deblora"``. Equal to scikit-learn's ``f1_score`` with
    ``average="macro"``, and for strict ``labels=`` the group's and ``zero_division=nan``. Precision: fp64.

    Example:
        >>> from rsfast.deblora import grouped_f1
        >>> groups = {"head": [0], "middle": [], "tail": [1]}
        >>> found = grouped_f1([0, 0, 0, 1], [0, 0, 1, 1], groups)
        >>> found["head"], round(found["tail"], 1), round(found["mean"], 1), found["middle"]
        (80.0, 66.7, 73.3, nan)
        >>> grouped_f1([0, 0, 0, 1], [0, 0, 1, 1], groups, style="deblora")["head"]
        40.0
    """
    if style not in ("strict", "deblora"):
        raise ValueError(f"style must be strict or deblora, got {style!r}")
    if not len(y_true):
        raise ValueError("y_true must hold one class at least, got none")
    counted = isinstance(groups, ClassCounts)
    most = len(groups.classes) - 1 if counted else None
    true = as_integers(y_true, "y_true", len(y_true), most=most).numpy(force=True)
    predicted = as_integers(y_pred, "y_pred", len(true), most=most).numpy(force=True)
    members = _members(groups.groups if counted else groups)
    scores = _f1(true, predicted)
    result = {}
    for group in GROUPS:
        if style == "strict":
            of_group = [scores[c] for c in members[group] if c < len(scores)]
        else:
            rows = np.isin(true, members[group])
            of_group = _f1(true[rows], predicted[rows])
        result[group] = 100 * _mean(of_group)
    return result | {"mean": 100 * _mean(scores)}


def class_f1(y_true, y_pred, n_classes: int) -> np.ndarray:
    """F1 of each class in percent, (C,) fp64; NaN for a class that neither ``y_true`` nor ``y_pred`` has.

    Args:
        y_true: (N,) class ids, N at least 1.
        y_pred: (N,) class ids.
        n_classes: C.

    Raises:
        ValueError: The arguments are not such.

    Example:
        >>> from rsfast.deblora import class_f1
        >>> class_f1([0, 0, 0, 1], [0, 0, 1, 1], 3).round(1)
        array([80. , 66.7,  nan])
    """
    true = as_integers(y_true, "y_true", len(y_true), most=n_classes - 1).numpy(force=True)
    predicted = as_integers(y_pred, "y_pred", len(true), most=n_classes - 1).numpy(force=True)
    found = np.full(n_classes, np.nan)
    scores = _f1(true, predicted)
    found[: len(scores)] = 100 * scores
    return found


def _members(groups: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ValueError(f"groups must be named {', '.join(GROUPS)}, got {unknown[0]!r}")
    of = {group: list(groups.get(group, ())) for group in GROUPS}
    return {group: as_integers(ids, f"groups: {group}", len(ids)).tolist() if ids else [] for group, ids in of.items()}


def _f1(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """F1 of each class, NaN for those that are in neither: 2 TP / (true + predicted)."""
    count = int(max(true.max(initial=-1), predicted.max(initial=-1))) + 1
    hits, both = (np.bincount(rows, minlength=count) for rows in (true[true == predicted], np.r_[true, predicted]))
    return np.divide(2.0 * hits, both, out=np.full(count, np.nan), where=both > 0)


def _mean(scores) -> float:
    known = np.asarray(scores, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else float("nan")


@torch.no_grad()
def class_distances(
    features,  # (N, D)
    labels,  # (N,)
    *,
    groups: ClassCounts | Mapping[str, Sequence[int]] | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """How far classes are from each other and how tight they are, as cosine distances (1 - cosine).

    Args:
        features: As in :func:`as_rows`; read twice, ``batch_size`` rows at a time.
        labels: Class ids.
        groups: As in :func:`grouped_f1`; adds the distances by group.
        batch_size: Rows at a time; None: 32 MiB.

    Returns:
        ``inter``: mean distance between the centres (means of the rows as they are) of two classes, over all pairs;
        larger is better. ``intra``: mean distance of a class's rows to its centre, averaged over classes, each counting
        the same however many rows it has; smaller is better. With groups ``inter_head_head``, ``inter_head_middle``,
        ``inter_head_tail``, ``inter_middle_middle``, ``inter_middle_tail``, ``inter_tail_tail``, over pairs of a class
        of the one and another class of the other, and ``intra_head``, ``intra_middle``, ``intra_tail``. NaN where
        there is no such pair or class. Classes without rows are left out; a row or centre of zeros is at a distance
        of 1 from everything.

    Raises:
        TypeError, ValueError: A shape, dtype or value does not fit, or a feature is NaN or infinite, by row.

    Source: debLoRA's feature analysis, Table R5. Precision: centres and sums in fp64, cosines of rows in fp32 (fp64 of
    fp64 features). Deterministic: on the CPU; on a GPU sums may differ in their last bits.

    Example:
        >>> import torch
        >>> from rsfast.deblora import class_distances
        >>> class_distances(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), [0, 0, 1])
        {'inter': 1.0, 'intra': 0.0}
    """
    rows = as_rows(features)
    labels = as_integers(labels, "labels", len(rows)).to(rows.device)
    rows.check()
    counts = torch.bincount(labels)
    sums = torch.zeros(len(counts), rows.dim, dtype=torch.float64, device=rows.device)
    for start, part in rows.batches(batch_size):
        sums.index_add_(0, labels[start : start + len(part)], part.double())
    centers = torch.nn.functional.normalize(sums, dim=1, eps=1e-300)  # the direction of a sum is that of its mean
    kind = torch.promote_types(rows.dtype, torch.float32)
    sums, directions = torch.zeros(len(counts), dtype=torch.float64, device=rows.device), centers.to(kind)
    for start, part in rows.batches(batch_size):
        own = labels[start : start + len(part)]
        unit = torch.nn.functional.normalize(part.to(kind), dim=1, eps=torch.finfo(kind).tiny)
        sums.index_add_(0, own, _distance((unit * directions[own]).sum(1)).double())
    intra = (sums / counts).cpu()  # NaN for a class without rows
    centers, present = centers.cpu(), (counts > 0).cpu()
    everything = present.nonzero()[:, 0].tolist()
    result = {"inter": _apart(centers, everything, everything), "intra": _mean(intra)}
    if groups is None:
        return result
    members = _members(groups.groups if isinstance(groups, ClassCounts) else groups)
    of = {group: [c for c in ids if c < len(present) and present[c]] for group, ids in members.items()}
    for one, other in combinations_with_replacement(GROUPS, 2):
        result[f"inter_{one}_{other}"] = _apart(centers, of[one], of[other])
    return result | {f"intra_{group}": _mean(intra[ids]) for group, ids in of.items()}


def _distance(cosines: Tensor) -> Tensor:
    return (1 - cosines).clamp(0, 2)  # rounding may bring a cosine above 1


def _apart(centers: Tensor, one: list[int], other: list[int]) -> float:
    """Mean distance of a class of the one and another class of the other, from sums: C x C cosines need not be held."""
    both = sorted(set(one) & set(other))
    pairs = len(one) * len(other) - len(both)
    if not pairs:
        return float("nan")
    cosines = centers[one].sum(0) @ centers[other].sum(0) - centers[both].square().sum()
    return float(_distance(cosines / pairs))
