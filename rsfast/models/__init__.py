"""Gated adapters in an open_clip model: adding, switching off, removing, storing, and reading HarMA's checkpoints."""

from rsfast.models.adapters import AdapterReport, adapters_off, add_adapters, remove_adapters
from rsfast.models.harma_checkpoint import HarmaReport, convert_harma_adapter, load_harma_checkpoint
from rsfast.models.peft_patch import PatchReport, patch_peft, unpatch
from rsfast.models.storage import load_adapters, save_adapters

__all__ = [
    "AdapterReport",
    "HarmaReport",
    "PatchReport",
    "adapters_off",
    "add_adapters",
    "convert_harma_adapter",
    "load_adapters",
    "load_harma_checkpoint",
    "patch_peft",
    "remove_adapters",
    "save_adapters",
    "unpatch",
]
