"""DBSCAN and HDBSCAN, the alternatives of debLoRA's authors, from scikit-learn."""

import numpy as np


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

    return HDBSCAN(min_cluster_size=min_cluster_size, max_cluster_size=max_cluster_size, copy=True).fit_predict(x)


def reduced(x: np.ndarray, n_components: int | None, seed: int) -> np.ndarray:
    """The first principal components."""
    from sklearn.decomposition import PCA

    return x if n_components is None else PCA(n_components, random_state=seed).fit_transform(x)
