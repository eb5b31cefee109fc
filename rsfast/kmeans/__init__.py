"""k-means: one step of Lloyd's algorithm and its parts, labels that equal a float64 argmin."""

from rsfast.kmeans.functional import (
    Assignment,
    Step,
    Update,
    kmeans_assign,
    kmeans_distances,
    kmeans_step,
    kmeans_update,
)

__all__ = ["Assignment", "Step", "Update", "kmeans_assign", "kmeans_distances", "kmeans_step", "kmeans_update"]
