"""k-means: estimators, and one step of Lloyd's algorithm and its parts, labels that equal a float64 argmin."""

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
    "ConvergenceWarning",
    "KMeans",
    "MiniBatchKMeans",
    "NotFittedError",
    "Seeds",
    "Step",
    "Update",
    "kmeans_assign",
    "kmeans_distances",
    "kmeans_plusplus",
    "kmeans_step",
    "kmeans_update",
]
