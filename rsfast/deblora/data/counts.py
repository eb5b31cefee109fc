"""How many samples each class has, which classes are head, middle and tail, and drawing a tail on purpose."""

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rsfast.deblora.arrays import as_integers

GROUPS = ("head", "middle", "tail")
DOTA_GROUPS = {
    "head": ("ship", "small-vehicle", "large-vehicle", "plane"),
    "middle": ("harbor", "storage-tank", "tennis-court", "bridge", "swimming-pool"),
    "tail": (
        "helicopter", "basketball-court", "baseball-diamond", "roundabout", "soccer-ball-field", "ground-track-field",
    ),
}  # fmt: skip
Groups = Literal["auto", "dota"] | Mapping[str, Sequence]


@dataclasses.dataclass(frozen=True, eq=False)
class ClassCounts:
    """Samples of each class; made by :meth:`from_labels`. Losses and samplers take it for its ``counts``.

    Attributes:
        classes: C names.
        counts: (C,) int64; 0 for a class without samples.
        groups: ``head``, ``middle`` and ``tail``: class ids, larger classes first, of equal ones the lower id.

    Arrays are tensors on the labels' device where the labels were a tensor, else NumPy.

    Example:
        >>> from rsfast.deblora import ClassCounts
        >>> found = ClassCounts.from_labels([0, 0, 0, 0, 2, 2, 1], classes=["ship", "plane", "bridge"])
        >>> found.counts, found.imbalance, found.groups
        (array([4, 1, 2]), 4.0, {'head': (0,), 'middle': (2,), 'tail': (1,)})
        >>> found.ratios
        array([1., 4., 2.])
    """

    classes: tuple[str, ...]
    counts: Any
    groups: Mapping[str, tuple[int, ...]]

    @classmethod
    def from_labels(cls, labels, *, classes: Sequence[str] | None = None, groups: Groups = "auto") -> "ClassCounts":
        """Count labels.

        Args:
            labels: (N,) integers 0..C-1, N at least 1.
            classes: C names, no two alike. Default: the ids up to the largest label.
            groups: ``"auto"``: classes by size, of which the first round(C/3) are head, the last round(C/3) tail, the
                rest middle; one class alone is head, of two one is head and one tail, and classes without samples come
                last. ``"dota"``: debLoRA's list for DOTA, by name; case, spaces, ``_`` and ``-`` make no difference.
                Or a mapping of head, middle, tail to class names or ids; a class may be in none of them.

        Raises:
            ValueError: Labels, names or groups are not such; the message says which.
        """
        found = as_integers(labels, "labels", len(labels)) if len(labels) else None
        if found is None:
            raise ValueError("labels must hold one label at least, got none")
        largest = int(found.max())
        names = tuple(map(str, range(largest + 1) if classes is None else classes))
        if len(set(names)) < len(names):
            raise ValueError(
                f"classes must differ, got {next(n for n in names if names.count(n) > 1)!r} more than once"
            )
        if largest >= len(names):
            raise ValueError(f"labels must be below {len(names)}, the number of classes, got {largest}")
        counts = torch.bincount(found, minlength=len(names))
        chosen = _chosen(groups, names, counts.tolist())
        return cls(names, counts if isinstance(labels, Tensor) else counts.numpy(force=True), chosen)

    @property
    def imbalance(self) -> float:
        """Largest class over smallest, of those with samples."""
        present = self._numpy()[self._numpy() > 0]
        return float(present.max() / present.min())

    @property
    def ratios(self):
        """ir_c = n_max / n_c, (C,) fp64; infinite for a class without samples."""
        counts = self._numpy()
        with np.errstate(divide="ignore"):
            return self._like(counts.max() / counts.astype(np.float64))

    def _numpy(self) -> np.ndarray:
        return self.counts.numpy(force=True) if isinstance(self.counts, Tensor) else self.counts

    def _like(self, values: np.ndarray):
        if not isinstance(self.counts, Tensor):
            return values
        return torch.from_numpy(values).to(self.counts.device)


def _chosen(groups: Groups, names: tuple[str, ...], counts: list[int]) -> dict[str, tuple[int, ...]]:
    if isinstance(groups, str) and groups == "auto":
        members = _by_rank(counts)
    elif isinstance(groups, str) and groups == "dota":
        group_of = {name: group for group, known in DOTA_GROUPS.items() for name in known}
        for name in names:
            if normalised(name) not in group_of:
                raise ValueError(f"groups='dota' knows {', '.join(group_of)}; it has no class {name!r}")
        members = {group: [c for c, n in enumerate(names) if group_of[normalised(n)] == group] for group in GROUPS}
    elif isinstance(groups, Mapping):
        members = _named(groups, names)
    else:
        raise ValueError(f"groups must be 'auto', 'dota' or a mapping of {', '.join(GROUPS)}, got {groups!r}")
    return {group: tuple(sorted(members[group], key=lambda c: (-counts[c], c))) for group in GROUPS}


def _by_rank(counts: list[int]) -> dict[str, list[int]]:
    order = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    third = round(len(order) / 3)
    first, last = (1, 1) if len(order) == 1 else (third, len(order) - third)
    return {"head": order[:first], "middle": order[first:last], "tail": order[last:]}


def _named(groups: Mapping[str, Sequence], names: tuple[str, ...]) -> dict[str, list[int]]:
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ValueError(f"groups must be named {', '.join(GROUPS)}, got {unknown[0]!r}")
    members: dict[str, list[int]] = {group: [] for group in GROUPS}
    owner: dict[int, str] = {}
    for group, given in groups.items():
        if isinstance(given, str):
            raise ValueError(f"groups: {group} must be a sequence of class names or ids, got {given!r}")
        for one in given:
            number = names.index(one) if one in names else _class_id(one, group, len(names))
            if owner.setdefault(number, group) != group or number in members[group]:
                raise ValueError(f"groups: class {one!r} of {group} is in {owner[number]} already")
            members[group].append(number)
    return members


def _class_id(one, group: str, count: int) -> int:
    try:
        number = operator.index(one)
    except TypeError:
        raise ValueError(f"groups: {group} has {one!r}, which is no class") from None
    if not 0 <= number < count:
        raise ValueError(f"groups: {group} has {number}, which is no class: there are {count}")
    return number


def normalised(name: str) -> str:
    """A class name in lower case with hyphens."""
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())


def make_long_tailed(labels, imbalance: float, seed: int):
    """Draw samples so that class sizes fall exponentially from ``n_max`` to ``n_max / imbalance``.

    The class of rank r keeps ``n_max * imbalance ** (-r / (C - 1))`` samples, rounded, at least 1; C counts the classes
    that have samples, and ``n_max`` is the size of the smallest of them, so that any class can be the head and sizes
    are the same for every seed. The largest over the smallest is therefore as asked, up to rounding, where the
    smallest class has ``imbalance`` samples or more, and else ``n_max``.

    Args:
        labels: (N,) integers of at least 0.
        imbalance: At least 1; 1 gives every class the same size.
        seed: At least 0; draws which class has which rank, and which of its samples stay.

    Returns:
        Indices into ``labels``, int64, ascending: a tensor if ``labels`` are one, else NumPy.

    Raises:
        ValueError: There are no labels, or an argument is out of range.

    Source: the exponential profile of long-tailed CIFAR (Cui et al., 2019). Deterministic: yes.

    Example:
        >>> import numpy as np
        >>> from rsfast.deblora import make_long_tailed
        >>> labels = np.repeat([0, 1, 2], 100)
        >>> sorted(np.bincount(labels[make_long_tailed(labels, 100, seed=0)]).tolist())
        [1, 10, 100]
    """
    if isinstance(imbalance, bool) or not isinstance(imbalance, numbers.Real) or not 1 <= imbalance < math.inf:
        raise ValueError(f"imbalance must be a number of at least 1, got {imbalance!r}")
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or operator.index(seed) < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
    if not len(labels):
        raise ValueError("labels must hold one label at least, got none")
    found = as_integers(labels, "labels", len(labels)).numpy(force=True)
    present, sizes = np.unique(found, return_counts=True)
    generator = np.random.default_rng(operator.index(seed))
    kept = []
    for number, rank in zip(present, generator.permutation(len(present)), strict=True):
        share = float(imbalance) ** (-rank / max(len(present) - 1, 1))
        size = max(1, math.floor(sizes.min() * share + 0.5))
        kept.append(generator.choice(np.flatnonzero(found == number), size, replace=False))
    indices = np.sort(np.concatenate(kept)).astype(np.int64)
    return torch.from_numpy(indices).to(labels.device) if isinstance(labels, Tensor) else indices
