"""Losses over all pairs of a batch."""

from rsfast.similarity.functional import (
    adaptive_triplet_loss,
    affiliation_loss,
    alignment_loss,
    contrastive_loss,
    harma_loss,
    sigmoid_loss,
    triplet_loss,
    uniformity_loss,
)
from rsfast.similarity.module import AdaptiveTripletLoss, ContrastiveLoss, HarMALoss, SigmoidLoss, TripletLoss

__all__ = [
    "AdaptiveTripletLoss",
    "ContrastiveLoss",
    "HarMALoss",
    "SigmoidLoss",
    "TripletLoss",
    "adaptive_triplet_loss",
    "affiliation_loss",
    "alignment_loss",
    "contrastive_loss",
    "harma_loss",
    "sigmoid_loss",
    "triplet_loss",
    "uniformity_loss",
]
