"""Gated adapters and LoRA in whole models: adding, merging, removing, storing, and reading HarMA's checkpoints."""

from rsfast.models.adapters import AdapterReport, adapters_off, add_adapters, remove_adapters
from rsfast.models.harma_checkpoint import HarmaReport, convert_harma_adapter, load_harma_checkpoint
from rsfast.models.lora import (
    LoraReport,
    add_lora,
    lora_layers,
    merge_lora,
    remove_lora,
    set_adapter_ids,
    unmerge_lora,
)
from rsfast.models.lora_live import check_live
from rsfast.models.lora_storage import load_lora, save_lora
from rsfast.models.peft_patch import PatchReport, patch_peft, unpatch
from rsfast.models.satmae import load_satmae
from rsfast.models.storage import load_adapters, save_adapters

__all__ = [
    "AdapterReport",
    "HarmaReport",
    "LoraReport",
    "PatchReport",
    "adapters_off",
    "add_adapters",
    "add_lora",
    "check_live",
    "convert_harma_adapter",
    "load_adapters",
    "load_harma_checkpoint",
    "load_lora",
    "load_satmae",
    "lora_layers",
    "merge_lora",
    "patch_peft",
    "remove_adapters",
    "remove_lora",
    "save_adapters",
    "save_lora",
    "set_adapter_ids",
    "unmerge_lora",
    "unpatch",
]
