"""What the in-batch losses promise, and which implementation keeps the promise."""

from rsfast.similarity.functional.affiliation import affiliation_loss
from rsfast.similarity.functional.contrastive import contrastive_loss, one_way_loss
from rsfast.similarity.functional.harma import harma_loss
from rsfast.similarity.functional.sigmoid import one_way_sigmoid_loss, sigmoid_loss
from rsfast.similarity.functional.triplet import Negatives, adaptive_triplet_loss, triplet_loss
from rsfast.similarity.functional.uniformity import alignment_loss, uniformity_loss

__all__ = [
    "Negatives",
    "adaptive_triplet_loss",
    "affiliation_loss",
    "alignment_loss",
    "contrastive_loss",
    "harma_loss",
    "one_way_loss",
    "one_way_sigmoid_loss",
    "sigmoid_loss",
    "triplet_loss",
    "uniformity_loss",
]
