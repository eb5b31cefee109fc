"""The operations of this family: contract, checks, choice."""

from rsfast.kmeans.functional.batches import BatchStep, MiniBatch, minibatch, minibatch_step
from rsfast.kmeans.functional.loop import Lloyd, lloyd
from rsfast.kmeans.functional.plusplus import Seeds, kmeans_plusplus
from rsfast.kmeans.functional.steps import kmeans_assign, kmeans_distances, kmeans_step, kmeans_update
from rsfast.kmeans.reference import Assignment, Step, Update

__all__ = [
    "Assignment",
    "BatchStep",
    "Lloyd",
    "MiniBatch",
    "Seeds",
    "Step",
    "Update",
    "kmeans_assign",
    "kmeans_distances",
    "kmeans_plusplus",
    "kmeans_step",
    "kmeans_update",
    "lloyd",
    "minibatch",
    "minibatch_step",
]
