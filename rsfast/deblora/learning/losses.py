"""Losses on class logits that know how often each class occurs."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Literal["ce", "reweight", "logit-adjust"]
LOSSES = ("ce", "reweight", "logit-adjust")


class ClassLoss(nn.Module):
    """Cross-entropy of ``logits (B, C)`` and ``labels (B,)``, a scalar in fp32; made by :func:`class_loss`."""

    def __init__(self, weight: Tensor | None, adjustment: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("adjustment", adjustment)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.adjustment is not None:
            logits = logits + self.adjustment.to(logits.dtype)
        if self.weight is None:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, self.weight.to(logits.dtype), reduction="sum") / max(1, len(labels))


def class_loss(name: Loss, counts=None, *, tau: float = 1.0) -> ClassLoss:
    r"""Loss of a long-tailed classifier by name.

    ``ce``: plain cross-entropy. ``reweight``: that of a row is multiplied by its class's weight of
    :func:`balanced_weights`, and the mean is over rows, so that its expectation does not depend on which rows share a
    batch (PyTorch's weighted mean divides by the weights of the batch). ``logit-adjust``: cross-entropy of ``logits +
    tau log pi``, with ``pi`` the share of a class among the training rows; the logits themselves then predict.

    Source of ``logit-adjust``: Menon et al., "Long-tail learning via logit adjustment", arXiv 2007.07314, the logit
    adjusted softmax cross-entropy. A class without rows is not adjusted (its ``log pi`` would be minus infinity, and
    nothing would push it down).

    Args:
        name: ``ce``, ``reweight`` or ``logit-adjust``.
        counts: Rows of each class ``(C,)``, or what has such ``counts``, e.g. :class:`rsfast.deblora.ClassCounts`; not
            needed for ``ce``.
        tau: Of logit adjustment.

    Raises:
        ValueError: An unknown name, or counts that are missing, negative or all zero.

    Example:
        >>> import torch
        >>> from rsfast.deblora import class_loss
        >>> logits, labels = torch.zeros(2, 2), torch.tensor([0, 1])
        >>> round(class_loss("logit-adjust", [3, 1])(logits, labels).item(), 4)  # -(log 3/4 + log 1/4) / 2
        0.837
    """
    check_loss(name)
    if name == "ce":
        return ClassLoss(None, None)
    if counts is None:
        raise ValueError(f"counts must be given for {name}: how many rows has each class?")
    if name == "reweight":
        return ClassLoss(balanced_weights(counts), None)
    return ClassLoss(None, tau * log_prior(counts))


def balanced_weights(counts) -> Tensor:
    """Weight of each class by inverse frequency, fp64 ``(C,)``: ``N / (C' n_c)``, C' the classes that have rows.

    The mean over the rows is 1; scikit-learn's ``class_weight="balanced"``. A class without rows has weight 0.
    """
    counts = count_tensor(counts)
    weights = counts.sum() / ((counts > 0).sum() * counts.clamp(min=1))
    return torch.where(counts > 0, weights, 0.0)


def log_prior(counts) -> Tensor:
    """Logarithm of the share of each class, fp64 ``(C,)``; 0 for a class without rows, which nothing adjusts."""
    counts = count_tensor(counts)
    return torch.where(counts > 0, (counts.clamp(min=1) / counts.sum()).log(), 0.0)


def check_loss(name: str) -> None:
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {name!r}")


def count_tensor(counts) -> Tensor:
    """Counts as fp64 on the CPU."""
    counts = getattr(counts, "counts", counts)
    counts = counts.detach().cpu() if isinstance(counts, Tensor) else torch.from_numpy(np.array(counts))
    counts = counts.double()
    if counts.ndim != 1 or not len(counts) or not counts.isfinite().all() or counts.min() < 0 or counts.max() <= 0:
        raise ValueError(f"counts must be (C,) numbers of rows, one above 0 at least, got {counts.tolist()}")
    return counts
