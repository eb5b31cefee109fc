"""HarMA's multimodal gated adapter."""

from rsfast.adapter.functional import SharedWeights, gated_adapter
from rsfast.adapter.module import GatedAdapter, SharedAdapter

__all__ = ["GatedAdapter", "SharedAdapter", "SharedWeights", "gated_adapter"]
