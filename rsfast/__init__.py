"""Fused kernels for adapting vision-language models to remote sensing."""

from rsfast.adapter import GatedAdapter, SharedAdapter, SharedWeights, gated_adapter
from rsfast.similarity import adaptive_triplet_loss, contrastive_loss

__all__ = [
    "GatedAdapter",
    "SharedAdapter",
    "SharedWeights",
    "adaptive_triplet_loss",
    "contrastive_loss",
    "gated_adapter",
]
