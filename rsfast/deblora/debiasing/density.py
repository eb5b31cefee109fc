"""DBSCAN and HDBSCAN, the alternatives of debLoRA's authors, from scikit-learn."""

import math

import numpy as np


def check(x_shape: tuple[int, int], *, n_components, eps, min_samples, min_cluster_size, max_cluster_size) -> None:
    """ValueError that names the first of the arguments that does not fit."""
    for name, value, least, most in (
        ("min_samples", min_samples, 1, math.inf), ("min_cluster_size", min_cluster_size, 2, math.inf),
        ("max_cluster_size", max_cluster_size, 2, math.inf), ("n_components", n_components, 1, min(x_shape)),
    ):  # fmt: skip
        if value is not None and (type(value) is not int or not least <= value <= most):
            limit = f"of at least {least}" if most == math.inf else f"in {least}..{most}"
            raise ValueError(f"{name} must be an int {limit}, got {value!r}")
    if eps is not None and not (isinstance(eps, int | float) and 0 < eps < math.inf):
        raise ValueError(f"eps must be a number above 0, got {eps!r}")


def dbscan(x: np.ndarray, eps: float | None, min_samples: int) -> tuple[np.ndarray, float]:
    """Labels (N,) with -1 for noise, and the distance used; None: :func:`core_distance`."""
    from sklearn.cluster import DBSCAN

    if eps is None:
        eps = core_distance(x, min_samples)
    return DBSCAN(eps=eps, min_samples=min_samples).fit_predict(x), eps


def core_distance(x: np.ndarray, min_samples: int) -> float:
    """The median distance to the ``min_samples``-th nearest row, itself the first: half of the rows are core then."""
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=min(min_samples, len(x))).fit(x).kneighbors(x)[0]
    return max(float(np.median(near[:, -1])), float(np.finfo(np.float32).tiny))


def hdbscan(x: np.ndarray, min_cluster_size: int, max_cluster_size: int | None) -> np.ndarray:
    from sklearn.cluster import HDBSCAN

    if len(x) < min_cluster_size:
        raise ValueError(f"min_cluster_size must be at most the number of rows, {len(x)}, got {min_cluster_size}")
    return HDBSCAN(min_cluster_size=min_cluster_size, max_cluster_size=max_cluster_size, copy=True).fit_predict(x)


def reduced(x: np.ndarray, n_components: int | None, seed: int) -> np.ndarray:
    """The first principal components."""
    from sklearn.decomposition import PCA

    return x if n_components is None else PCA(n_components, random_state=seed).fit_transform(x)
