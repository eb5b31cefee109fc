"""Calibration: rows of tail classes moved towards the de-biased centre of their class."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsfast.deblora.arrays import BATCH_BYTES, KINDS, Rows, as_integers, as_rows, give_back, mapping_of
from rsfast.deblora.features.store import FeatureStore

TIMES = 10  # smaller than the largest class: where the paper's alpha begins to move rows
Alpha = float | Literal["auto"] | Any


def auto_alpha(counts: Any) -> Any:
    r"""How much of a feature each class keeps: :math:`\alpha_c = \min(1, 10 / ir_c)` with :math:`ir_c = n_{max} / n_c`.

    Args:
        counts: Rows of each class (C,), integers.

    Returns:
        (C,) fp64, a tensor if ``counts`` are one, else NumPy; below 1 exactly where :math:`10 n_c < n_{max}`, and 0 for
        a class without rows.

    Raises:
        ValueError: ``counts`` are no such integers, or all are 0.

    Source: debLoRA, equation 3; its ir is not defined there, and is read as the largest class over this one.

    Example:
        >>> from rsfast.deblora import auto_alpha
        >>> auto_alpha([100, 10, 9, 1])
        array([1. , 1. , 0.9, 0.1])
    """
    found = as_integers(counts, "counts", len(counts))
    if not found.any():
        raise ValueError("counts must have a class with rows, got none")
    alpha = (TIMES * found.double() / found.max()).clamp(max=1)
    return alpha if isinstance(counts, Tensor) else alpha.numpy(force=True)


def calibrate(
    features: Any,  # (N, D)
    labels: Any,  # (N,)
    mu: Any,  # (C, D)
    alpha: Alpha = "auto",
    *,
    tail: Iterable[int] | None = None,
    out: Any = None,
) -> Any:  # (N, D)
    r"""Rows of tail classes moved towards the de-biased centre of their class: :math:`\alpha z + (1 - \alpha) \mu_c`.

    Args:
        features: As in :func:`as_rows`.
        labels: Classes, integers 0..C-1.
        mu: :func:`debiased_centers`.
        alpha: ``"auto"``: :func:`auto_alpha` of the labels. A number of 0..1 for every class that moves, or (C,) of
            them. The paper's released code multiplies the centre by its number, 0.5 by default: here 1 less that.
        tail: Classes that move. None: those with :math:`ir_c > 10`, the only ones that ``"auto"`` moves.
        out: Where the result goes: an array or tensor like the features (``np.memmap`` for what does not fit in
            memory: rows pass through a few at a time), or a :class:`FeatureStore`, which gets rows (in its dtype) and
            labels appended, and names and splits if features are a store too. None: a new array in memory.

    Returns:
        ``out``, or rows in the features' dtype: a tensor if features are one, else NumPy. Rows of other classes are
        the same bits. No gradients.

    Raises:
        TypeError, ValueError: A shape, dtype or value does not fit, a feature is NaN or infinite, or rows were to move
            towards NaN; the message names the argument, and the row or class. Nothing is written then.

    Precision: fp32 (fp64 of fp64 features), rounded once. Deterministic: yes. Source: debLoRA, equation 3.

    Example:
        >>> import torch
        >>> from rsfast.deblora import calibrate
        >>> z, mu = torch.tensor([[1.0], [2.0], [8.0]]), torch.tensor([[0.0], [4.0]])
        >>> calibrate(z, [0, 0, 1], mu, alpha=0.25, tail=[1]).flatten()
        tensor([1., 2., 5.])
    """
    rows, labels, move = _checked(features, labels, mu, alpha, tail)
    if out is not None:
        if out is features and isinstance(out, FeatureStore):
            raise ValueError("out must be another store than features")
        _check_out(out, rows)
    rows.check()
    if out is None and not rows.on_disk:
        return rows.back(_shifted(rows.all().clone(), labels, move))
    if out is None:
        out = rows.back(torch.empty(len(rows), rows.dim, dtype=rows.dtype))
    texts = {name: getattr(features, name) for name in ("names", "splits") if isinstance(features, FeatureStore)}
    _fill(out, _moved(rows, labels, move, None), labels, texts)
    return out


def calibrated_batches(
    features: Any,
    labels: Any,
    mu: Any,
    alpha: Alpha = "auto",
    *,
    tail: Iterable[int] | None = None,
    batch_size: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """:func:`calibrate` a part at a time: ``(start, rows)`` in order, for whatever takes them one after the other.

    Arguments and errors are those of :func:`calibrate`, and come before the first part. ``batch_size`` rows a part;
    None: 32 MiB. Parts are tensors of their own.

    Example:
        >>> import torch
        >>> from rsfast.deblora import calibrated_batches
        >>> z, mu = torch.tensor([[1.0], [2.0], [8.0]]), torch.tensor([[0.0], [4.0]])
        >>> for start, part in calibrated_batches(z, [0, 0, 1], mu, 0.25, tail=[1], batch_size=2):
        ...     print(start, part.flatten().tolist())
        0 [1.0, 2.0]
        2 [5.0]
    """
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
    rows, labels, move = _checked(features, labels, mu, alpha, tail)
    rows.check()
    return _moved(rows, labels, move, batch_size)


def augment(
    features: Any,  # (N, D)
    labels: Any,  # (N,)
    calibrated: Any,  # (N, D)
    *,
    tail: Iterable[int] | None = None,
) -> tuple[Any, Any]:
    """The released code's way to train: all rows, followed by the calibrated ones of tail classes as further rows.

    Args:
        features: As in :func:`as_rows`; the result is in memory.
        labels: Classes, integers.
        calibrated: :func:`calibrate` of them.
        tail: Classes whose calibrated rows are added. None: those with :math:`ir_c > 10`.

    Returns:
        ``(features, labels)`` of N + M rows, M of the tail, in their order: tensors if features are one, else NumPy.

    Raises:
        TypeError, ValueError: A shape, dtype or value does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from rsfast.deblora import augment
        >>> augment(torch.tensor([[1.0], [8.0]]), [0, 1], torch.tensor([[1.0], [5.0]]), tail=[1])
        (tensor([[1.],
                [8.],
                [5.]]), tensor([0, 1, 1]))
    """
    rows, moved = as_rows(features), as_rows(calibrated, "calibrated")
    if (len(moved), moved.dim, moved.dtype) != (len(rows), rows.dim, rows.dtype):
        wanted, got = (f"{each.dtype} of ({len(each)}, {each.dim})" for each in (rows, moved))
        raise ValueError(f"calibrated must be like features, {wanted}, got {got}")
    labels = as_integers(labels, "labels", len(rows)).to(rows.device)
    counts = torch.bincount(labels)
    added = _tail(tail, counts)[labels].nonzero()[:, 0]
    both = torch.cat([rows.all(), moved.take(added, rows.device)]), torch.cat([labels, labels[added]])
    return tuple(map(rows.back, both))


class _Move(NamedTuple):
    """What happens to each class; C is the first dimension."""

    moves: Tensor  # bool
    keep: Tensor  # alpha
    shift: Tensor  # (1 - alpha) mu


def _checked(features, labels, mu, alpha, tail) -> tuple[Rows, Tensor, _Move]:
    rows, centers = as_rows(features), as_rows(mu, "mu")
    if centers.dim != rows.dim:
        raise ValueError(f"mu must be {rows.dim} wide, as features, got {centers.dim}")
    labels = as_integers(labels, "labels", len(rows), most=len(centers) - 1).to(rows.device)
    counts = torch.bincount(labels, minlength=len(centers))
    keep, moves = _alpha(alpha, counts), _tail(tail, counts)
    moves = moves & (keep < 1) & (counts > 0)
    mu = centers.all(rows.device)
    for number in (moves & ~mu.isfinite().all(1)).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"mu must be finite for classes that move; that of class {number}, of {counts[number]} row(s), is not"
        )
    kind = torch.promote_types(rows.dtype, torch.float32)
    shift = ((1 - keep)[:, None] * mu.double()).to(kind)
    return rows, labels, _Move(moves, keep.to(kind)[:, None], shift)


def _alpha(alpha: Alpha, counts: Tensor) -> Tensor:
    if isinstance(alpha, str):
        if alpha != "auto":
            raise ValueError(f"alpha must be 'auto', a number or (C,) numbers, got {alpha!r}")
        return auto_alpha(counts)
    keep = alpha.detach() if isinstance(alpha, Tensor) else torch.from_numpy(np.asarray(alpha, np.float64).copy())
    keep = keep.to(counts.device, torch.float64)
    if keep.shape not in ((), counts.shape):
        raise ValueError(f"alpha must be a number or of shape ({len(counts)},), one per class, got {tuple(keep.shape)}")
    if not ((keep >= 0) & (keep <= 1)).all():
        raise ValueError(f"alpha must be in 0..1, got {keep.tolist()}")
    return keep.expand(len(counts))


def _tail(tail: Iterable[int] | None, counts: Tensor) -> Tensor:
    """Which classes move, (C,) bool."""
    if tail is None:
        return auto_alpha(counts) < 1
    tail = tail if isinstance(tail, Tensor | np.ndarray) else list(tail)
    known = as_integers(tail, "tail", len(tail), most=len(counts) - 1) if len(tail) else torch.zeros(0).long()
    moves = torch.zeros_like(counts, dtype=torch.bool)
    moves[known.to(counts.device)] = True
    return moves


def _moved(rows: Rows, labels: Tensor, move: _Move, batch_size: int | None) -> Iterator[tuple[int, Tensor]]:
    for start, part in rows.batches(batch_size):
        yield start, _shifted(part.clone(), labels[start : start + len(part)], move)


def _shifted(z: Tensor, labels: Tensor, move: _Move) -> Tensor:
    """``z`` itself, changed in place."""
    for some in move.moves[labels].nonzero()[:, 0].split(max(1, BATCH_BYTES // (4 * z.shape[1]))):
        own = labels[some]
        z[some] = torch.addcmul(move.shift[own], z[some].to(move.keep), move.keep[own]).to(z)
    return z


def _check_out(out: Any, rows: Rows) -> None:
    if isinstance(out, Tensor | np.ndarray):
        dtype = out.dtype if isinstance(out, Tensor) else KINDS.get(out.dtype, out.dtype)
        if tuple(out.shape) != (len(rows), rows.dim) or dtype != rows.dtype:
            wanted = f"{rows.dtype} of ({len(rows)}, {rows.dim})"
            raise ValueError(f"out must be like features, {wanted}, got {dtype} of {tuple(out.shape)}")
        if isinstance(out, np.ndarray) and not out.flags.writeable:
            raise ValueError("out must be writable, got a read-only array")
    elif not isinstance(out, FeatureStore):
        raise TypeError(f"out must be an array, a tensor or a FeatureStore, got {type(out).__name__}")
    elif out.dim != rows.dim:
        raise ValueError(f"out must be a store of dim {rows.dim}, as features, got {out.dim}")


def _fill(out: Any, parts: Iterator[tuple[int, Tensor]], labels: Tensor, texts: dict[str, list[str]]) -> None:
    for start, part in parts:
        here = slice(start, start + len(part))
        if isinstance(out, Tensor):
            out[here] = part
        elif isinstance(out, np.ndarray):
            out[here] = part.numpy(force=True)
            give_back(mapping_of(out))
        else:
            out.append(part.cpu(), labels[here].cpu(), **{name: text[here] for name, text in texts.items()})
