"""Fused kernels for adapting vision-language models to remote sensing."""

from rsfast.adapter import GatedAdapter, SharedAdapter, SharedWeights, gated_adapter
from rsfast.similarity import (
    AdaptiveTripletLoss,
    ContrastiveLoss,
    HarMALoss,
    SigmoidLoss,
    TripletLoss,
    adaptive_triplet_loss,
    affiliation_loss,
    alignment_loss,
    contrastive_loss,
    harma_loss,
    sigmoid_loss,
    triplet_loss,
    uniformity_loss,
)

__all__ = [
    "AdaptiveTripletLoss",
    "ContrastiveLoss",
    "GatedAdapter",
    "HarMALoss",
    "SharedAdapter",
    "SharedWeights",
    "SigmoidLoss",
    "TripletLoss",
    "adaptive_triplet_loss",
    "affiliation_loss",
    "alignment_loss",
    "contrastive_loss",
    "gated_adapter",
    "harma_loss",
    "sigmoid_loss",
    "triplet_loss",
    "uniformity_loss",
]
