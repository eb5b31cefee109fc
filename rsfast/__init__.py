"""Fused kernels for adapting vision-language models to remote sensing."""

from rsfast.adapter import GatedAdapter, SharedAdapter, SharedWeights, gated_adapter
from rsfast.lora import (
    AdapterBatch,
    BatchedLoRALinear,
    LoRALinear,
    batched_lora_linear,
    lora_expand,
    lora_linear,
    lora_shrink,
)
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
    "AdapterBatch",
    "AdaptiveTripletLoss",
    "BatchedLoRALinear",
    "ContrastiveLoss",
    "GatedAdapter",
    "HarMALoss",
    "LoRALinear",
    "SharedAdapter",
    "SharedWeights",
    "SigmoidLoss",
    "TripletLoss",
    "adaptive_triplet_loss",
    "affiliation_loss",
    "alignment_loss",
    "batched_lora_linear",
    "contrastive_loss",
    "gated_adapter",
    "harma_loss",
    "lora_expand",
    "lora_linear",
    "lora_shrink",
    "sigmoid_loss",
    "triplet_loss",
    "uniformity_loss",
]
