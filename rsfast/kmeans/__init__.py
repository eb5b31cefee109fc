"""k-means: one step of Lloyd's algorithm and its parts, labels that equal a float64 argmin."""

from rsfast.kmeans.constraint import Constrained, ascend, constrained_assign, dissolve, scaled_bounds, size_bounds
from rsfast.kmeans.functional import (
    Assignment,
    Step,
    Update,
    kmeans_assign,
    kmeans_distances,
    kmeans_step,
    kmeans_update,
)

__all__ = [
    "Assignment",
    "Constrained",
    "Step",
    "Update",
    "ascend",
    "constrained_assign",
    "dissolve",
    "kmeans_assign",
    "kmeans_distances",
    "kmeans_step",
    "kmeans_update",
    "scaled_bounds",
    "size_bounds",
]
