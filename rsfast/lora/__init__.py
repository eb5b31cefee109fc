"""Low-rank adaptation: one fused linear layer, and batches in which every sample has an adapter of its own."""

from rsfast.lora.functional import (
    AdapterBatch,
    Source,
    batched_lora_linear,
    lora_expand,
    lora_linear,
    lora_shrink,
    reduce_together,
)
from rsfast.lora.group import LoRALinearGroup
from rsfast.lora.module import BatchedLoRALinear, LoRALinear

__all__ = [
    "AdapterBatch",
    "BatchedLoRALinear",
    "LoRALinear",
    "LoRALinearGroup",
    "Source",
    "batched_lora_linear",
    "lora_expand",
    "lora_linear",
    "lora_shrink",
    "reduce_together",
]
