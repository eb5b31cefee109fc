"""What probes have in common: what goes in, what comes out, and by what a choice is made."""

import numpy as np
import torch
from torch import Tensor

from rsfast.deblora.arrays import as_integers
from rsfast.deblora.learning.inputs import FeatureInputs
from rsfast.deblora.learning.losses import check_loss
from rsfast.deblora.probes.metrics import class_f1
from rsfast.harma.loading import mixed_seed

BATCH = 8192  # rows that are scored together


class Probe:
    """A fitted probe.

    Attributes:
        n_classes: C.
        dim: Width of the features.
        chosen: What was chosen, on the validation rows if there were any, e.g. ``{"C": 0.1, "val_f1": 81.2}``.
    """

    def __init__(self, n_classes: int, dim: int, chosen: dict):
        self.n_classes, self.dim, self.chosen = n_classes, dim, chosen

    def scores(self, features) -> np.ndarray | Tensor:
        """Score of each class ``(N, C)``, minus infinity for a class that training had no row of; a tensor if
        ``features`` is one, else an array."""
        return self._over(features, lambda x: self._judge(x)[0])

    def predict(self, features) -> np.ndarray | Tensor:
        """Class of each row, int64 ``(N,)``; a tensor if ``features`` is one, else an array."""
        return self._over(features, lambda x: self._judge(x)[1])

    def guess(self, inputs: FeatureInputs) -> Tensor:
        """Class of each row, on the CPU."""
        return self._run(inputs, lambda x: self._judge(x)[1]).cpu()

    def _over(self, features, judge) -> np.ndarray | Tensor:
        inputs = FeatureInputs(features)
        if inputs.dim != self.dim:
            raise ValueError(f"features must be {self.dim} wide, as those the probe was fitted on, got {inputs.dim}")
        return inputs.rows.back(self._run(inputs, judge))

    def _run(self, inputs: FeatureInputs, judge) -> Tensor:
        batches = torch.arange(len(inputs)).split(BATCH)
        return torch.cat([judge(x) for x in inputs.batches(batches, self._device())])


class LinearProbe(Probe):
    """``weight (C, D)`` and ``bias (C,)``; the scores are logits, the class is the highest's, the first of equals."""

    def __init__(self, weight: Tensor, bias: Tensor, chosen: dict):
        super().__init__(*weight.shape, chosen)
        self.weight, self.bias = weight, bias

    def _device(self) -> torch.device:
        return self.weight.device

    def _judge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x.to(self.weight.dtype) @ self.weight.T + self.bias
        return logits, logits.argmax(1)


def given(features, labels, n_classes: int | None, val: tuple | None, loss: str, device):
    """What a probe is fitted on, checked: inputs, labels, val as inputs and labels or None, C, device."""
    check_loss(loss)
    inputs = FeatureInputs(features)
    most = None if n_classes is None else n_classes - 1
    labels = as_integers(labels, "labels", len(inputs), most=most).cpu()
    if val is not None:
        val_inputs = FeatureInputs(val[0], "val's features")
        if val_inputs.dim != inputs.dim:
            raise ValueError(f"val must have features of width {inputs.dim} as in training, got {val_inputs.dim}")
        val = val_inputs, as_integers(val[1], "val's labels", len(val_inputs), most=most).cpu()
        val_inputs.check()
    inputs.check()
    if n_classes is None:
        n_classes = 1 + int(max(labels.max(), -1 if val is None else val[1].max()))
    if device is None:
        device = inputs.rows.device
    return inputs, labels, val, n_classes, torch.device(device)


def macro_f1(y_true: Tensor, y_pred: Tensor, n_classes: int) -> float:
    """Mean F1 in percent over the classes that ``y_true`` has."""
    return class_f1(y_true, y_pred, n_classes)[y_true.unique()].mean().item()


def hold_out(labels, share: float = 0.2, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into training and validation rows, class by class.

    Of ``n`` rows of a class ``share * n`` are held out, rounded to the nearest whole number, but at least one where
    there are two, and never all: a class of one row stays in training.

    Args:
        labels: ``(N,)`` integers from 0.
        share: Above 0 and below 1.
        seed: Of which rows are held out.

    Returns:
        Indices of the training and of the validation rows, int64, in order.

    Raises:
        ValueError: ``share`` or a label does not fit.

    Example:
        >>> from rsfast.deblora import hold_out
        >>> train, val = hold_out([0, 0, 0, 0, 1, 1, 2], 0.25)
        >>> len(train), len(val)
        (5, 2)
    """
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share!r}")
    labels = as_integers(labels, "labels", len(labels)).numpy(force=True)
    held = []
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        size = min(max(round(share * len(rows)), 1), len(rows) - 1)
        held.append(np.random.default_rng(mixed_seed(seed, int(c))).permutation(rows)[:size])
    val = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), val), val
