"""Losses over all pairs of a batch."""

from rsfast.similarity.functional import adaptive_triplet_loss, contrastive_loss

__all__ = ["adaptive_triplet_loss", "contrastive_loss"]
