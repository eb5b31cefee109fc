"""Gated adapters in an open_clip model: attaching, removing, saving, loading, and reading HarMA's checkpoints."""

from rsfast.models.adapters import AdapterReport, add_adapters, remove_adapters
from rsfast.models.storage import load_adapters, save_adapters

__all__ = [
    "AdapterReport",
    "add_adapters",
    "load_adapters",
    "remove_adapters",
    "save_adapters",
]
