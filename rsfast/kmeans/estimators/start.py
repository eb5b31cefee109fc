"""What the estimators begin with: parameters that make sense, a tolerance, centres."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from rsfast.kmeans.estimators.inputs import rows
from rsfast.kmeans.functional import kmeans_plusplus
from rsfast.kmeans.functional.draws import shuffled


def check_int(name: str, value: Any, least: int = 1) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    return int(value)


def check_real(name: str, value: Any, most: float = math.inf) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= most:
        limit = "of at least 0" if most == math.inf else f"in 0..{most:g}"
        raise ValueError(f"{name} must be a number {limit}, got {value!r}")
    return float(value)


def tolerance(x: Tensor, tol: float) -> float:
    """``tol`` times the mean of the features' variances, as scikit-learn scales it."""
    if not tol:
        return 0.0
    shift = x[0].double()
    total, squares = torch.zeros_like(shift), torch.zeros_like(shift)
    for part in x.split(max(1, (2**26 if x.is_cuda else 2**20) // x.shape[1])):
        part = part.double() - shift  # a common offset would cancel what is looked for
        total += part.sum(0)
        squares += part.square().sum(0)
    return tol * max(0.0, float((squares / len(x) - (total / len(x)).square()).mean()))


class Start:
    """Starting centres by ``init``: a rule that draws, or an array that is given."""

    def __init__(self, init: Any, n_clusters: int, x: Tensor):
        if isinstance(init, str):
            if init not in ("k-means++", "random"):
                raise ValueError(f"init must be 'k-means++', 'random' or an array of centres, got {init!r}")
            self.rule = init
            return
        centers = rows(init, "init").tensor
        if centers.shape != (n_clusters, x.shape[1]):
            raise ValueError(
                f"init must be of shape ({n_clusters}, {x.shape[1]}), (n_clusters, n_features), "
                f"got {tuple(centers.shape)}"
            )
        self.rule = centers.to(x.device, torch.promote_types(x.dtype, torch.float32))

    def times(self, n_init: Any, for_random: int) -> int:
        """How often to start: given centres once, whatever is asked."""
        if n_init != "auto":
            check_int("n_init", n_init)
        if isinstance(self.rule, Tensor) or (n_init == "auto" and self.rule == "k-means++"):
            return 1
        return for_random if n_init == "auto" else int(n_init)

    def draw(self, x: Tensor, n_clusters: int, weights: Tensor | None, seed: int, impl: str) -> Tensor:
        if isinstance(self.rule, Tensor):
            return self.rule
        if self.rule == "k-means++":
            return kmeans_plusplus(x, n_clusters, weights=weights, random_state=seed, impl=impl).centers
        return x[shuffled(seed, 0, len(x), x.device, weights)[:n_clusters]]
