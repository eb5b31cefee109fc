"""The operations of this family: contract, checks, choice."""

from rsfast.lora.functional.batch import AdapterBatch
from rsfast.lora.functional.linear import batched_lora_linear, lora_linear
from rsfast.lora.functional.parts import lora_expand, lora_shrink
from rsfast.lora.functional.source import Source
from rsfast.lora.functional.together import reduce_together

__all__ = [
    "AdapterBatch",
    "Source",
    "batched_lora_linear",
    "lora_expand",
    "lora_linear",
    "lora_shrink",
    "reduce_together",
]
