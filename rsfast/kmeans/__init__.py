"""k-means: estimators, steps of Lloyd's algorithm with labels that equal a float64 argmin, and a size constraint."""

from rsfast.kmeans.constraint import (
    Constrained,
    ascend,
    certify,
    constrained_assign,
    dissolve,
    scaled_bounds,
    size_bounds,
)
from rsfast.kmeans.estimators import ConvergenceWarning, KMeans, MiniBatchKMeans, NotFittedError
from rsfast.kmeans.functional import (
    Assignment,
    Seeds,
    Step,
    Update,
    kmeans_assign,
    kmeans_distances,
    kmeans_plusplus,
    kmeans_step,
    kmeans_update,
)

__all__ = [
    "Assignment",
    "Constrained",
    "ConvergenceWarning",
    "KMeans",
    "MiniBatchKMeans",
    "NotFittedError",
    "Seeds",
    "Step",
    "Update",
    "ascend",
    "certify",
    "constrained_assign",
    "dissolve",
    "kmeans_assign",
    "kmeans_distances",
    "kmeans_plusplus",
    "kmeans_step",
    "kmeans_update",
    "scaled_bounds",
    "size_bounds",
]
