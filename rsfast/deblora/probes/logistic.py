"""Logistic regression with its strength chosen on validation rows."""

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rsfast.deblora.learning.inputs import FeatureInputs
from rsfast.deblora.learning.losses import Loss, balanced_weights, log_prior
from rsfast.deblora.probes.probe import LinearProbe, given, macro_f1

C_RANGE = (-6, 4)  # powers of ten between which C is chosen


def logistic_probe(
    features, labels, *, n_classes: int | None = None, val: tuple | None = None, loss: Loss = "ce", tau: float = 1.0,
    Cs: int | Sequence[float] = 40, max_iter: int = 1000, tol: float = 1e-4,
    device: torch.device | str | None = None, progress: bool = False,
) -> LinearProbe:  # fmt: skip
    r"""Logistic regression with its C chosen on validation rows, torchgeo-bench's protocol.

    Minimises :math:`C \sum_i w_i\, \mathrm{CE}_i + \frac12 \lVert W \rVert^2`, scikit-learn's objective, by SciPy's
    L-BFGS-B, scikit-learn's solver, with the products on the features' device. C is one of ``Cs`` values, log-spaced
    from 1e-6 to 1e4; the fit of one starts from that of the one before. The C of the best macro F1 on ``val`` is kept
    (the smallest of equals) and fitted again on training and validation rows together. Features are not standardised;
    that the solver sees them without their mean only makes it faster, as biases are not penalised. Differs from
    torchgeo-bench: macro F1 chooses, not accuracy.

    Args:
        features: ``(N, D)`` array, tensor or store; all are held in memory.
        labels: ``(N,)`` integers, 0 to C - 1.
        n_classes: C; None: one more than the highest label.
        val: Features and labels to choose by; without them ``Cs`` must be one value, or is taken to be 1.
        loss: ``reweight`` gives each row the weight of its class in :func:`balanced_weights`. ``logit-adjust`` takes
            ``tau log pi`` from the fitted biases, which, as biases are not penalised, is where training with the
            adjusted loss would end.
        tau: Of logit adjustment.
        Cs: How many values, or the values themselves.
        max_iter: Iterations of L-BFGS for each C.
        tol: It stops where no element of the gradient of the mean loss is larger.
        device: Where it is fitted; None: where the features are.
        progress: Show a bar.

    Raises:
        TypeError: ``features`` is no array, tensor or store.
        ValueError: A setting, a label or a length does not fit, or a value is not finite; the row is named.

    Precision: products in fp32 (fp64 for such features), the loss in fp64. Deterministic: on a CPU.

    Example:
        >>> import torch
        >>> from rsfast.deblora import logistic_probe
        >>> z, labels = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([0, 0, 1, 1])
        >>> probe = logistic_probe(z, labels, val=(torch.tensor([[0.9], [2.1]]), torch.tensor([0, 1])), Cs=5)
        >>> probe.chosen["val_f1"], probe.predict(z).tolist()
        (100.0, [0, 0, 1, 1])
    """
    inputs, labels, val, n_classes, device = given(features, labels, n_classes, val, loss, device)
    grid = _grid(Cs, val is not None)
    x = _whole(inputs, device)
    theta, best = np.zeros((n_classes, inputs.dim + 1)), None
    for C in tqdm(grid, unit="C", disable=not progress):
        theta, chosen = _fit(theta, x, labels, C, loss, max_iter, tol)
        probe = _probe(theta, labels, loss, tau, x, {"C": C} | chosen)
        if val is not None:
            probe.chosen["val_f1"] = macro_f1(val[1], probe.guess(val[0]), n_classes)
        if best is None or probe.chosen["val_f1"] > best[1].chosen["val_f1"]:
            best = theta, probe
    if val is None:
        return best[1]
    x, labels = torch.cat([x, _whole(val[0], device)]), torch.cat([labels, val[1]])
    theta, chosen = _fit(best[0], x, labels, best[1].chosen["C"], loss, max_iter, tol)
    return _probe(theta, labels, loss, tau, x, best[1].chosen | chosen)


def _fit(
    start: np.ndarray, x: Tensor, labels: Tensor, C: float, loss: Loss, max_iter: int, tol: float
) -> tuple[np.ndarray, dict]:
    """Weights and biases ``(C, D + 1)``, fp64, zero where a class has no row; and how the solver ended."""
    from scipy.optimize import minimize

    present, target = labels.unique(return_inverse=True)
    rows, width = x.shape
    mean = x.mean(0)
    x, away = x - mean, mean.double().cpu().numpy()
    target = target.to(x.device)
    weight = torch.ones(rows, dtype=torch.float64, device=x.device)
    if loss == "reweight":
        weight = balanced_weights(torch.bincount(labels))[labels].to(x.device)
    index = torch.arange(rows, device=x.device)
    penalty = 1 / (C * rows)

    def mean_loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.from_numpy(flat).view(len(present), width + 1).to(x.device)
        W, b = theta[:, :-1], theta[:, -1]
        logits = (x @ W.T.to(x.dtype)).double() + b
        logp = logits.log_softmax(1)
        value = 0.5 * penalty * W.square().sum() - (weight * logp[index, target]).sum() / rows
        d = logp.exp()
        d[index, target] -= 1
        d *= weight[:, None] / rows
        gradient = torch.cat([(d.T.to(x.dtype) @ x).double() + penalty * W, d.sum(0)[:, None]], 1)
        return value.item(), gradient.cpu().numpy().ravel()

    present = present.numpy()
    first = start[present]
    first[:, -1] += first[:, :-1] @ away
    found = minimize(
        mean_loss, first.ravel(), jac=True, method="L-BFGS-B",
        options={"maxiter": max_iter, "gtol": tol, "ftol": 64 * np.finfo(np.float64).eps, "maxls": 50},
    )  # fmt: skip
    theta = np.zeros_like(start)
    theta[present] = found.x.reshape(len(present), width + 1)
    theta[present, -1] -= theta[present, :-1] @ away
    return theta, {"iterations": int(found.nit), "gradient": float(abs(found.jac).max())}


def _probe(theta: np.ndarray, labels: Tensor, loss: Loss, tau: float, x: Tensor, chosen: dict) -> LinearProbe:
    counts, bias = torch.bincount(labels, minlength=len(theta)), torch.from_numpy(theta[:, -1])
    if loss == "logit-adjust":
        bias = bias - tau * log_prior(counts)
    bias = torch.where(counts > 0, bias, -torch.inf)
    return LinearProbe(torch.from_numpy(theta[:, :-1]).to(x), bias.to(x), chosen)


def _whole(inputs: FeatureInputs, device: torch.device) -> Tensor:
    return inputs.batch(torch.arange(len(inputs)), device)


def _grid(Cs: int | Sequence[float], choose: bool) -> list[float]:
    if type(Cs) is int and Cs >= 1:
        return np.logspace(*C_RANGE, Cs).tolist() if choose else [1.0]
    grid = sorted(Cs) if isinstance(Cs, Sequence | np.ndarray) else []
    if not grid or not all(isinstance(C, Real) and 0 < C < math.inf for C in grid):
        raise ValueError(f"Cs must be how many values, 1 or more, or the values, above 0; got {Cs!r}")
    if not choose and len(grid) > 1:
        raise ValueError(f"val must be given to choose among {len(grid)} values of C")
    return [float(C) for C in grid]
