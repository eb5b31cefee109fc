"""The operations of this family: contract, checks, choice."""

from rsfast.kmeans.functional.steps import kmeans_assign, kmeans_distances, kmeans_step, kmeans_update
from rsfast.kmeans.reference import Assignment, Step, Update

__all__ = ["Assignment", "Step", "Update", "kmeans_assign", "kmeans_distances", "kmeans_step", "kmeans_update"]
