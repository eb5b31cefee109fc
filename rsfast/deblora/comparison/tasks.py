"""What a comparison works on, and stored features as such; images are in ``images.py``."""

import copy
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import nn

from rsfast.deblora.comparison.config import RunConfig, SettingError
from rsfast.deblora.comparison.held import PartInputs, too_many
from rsfast.deblora.data.features import LabelledFeatures
from rsfast.deblora.learning.inputs import FeatureInputs
from rsfast.deblora.learning.maps import ClassMaps, FullMap, LowRankMap


class Defaults(NamedTuple):
    """What settings that are None stand for, where features or images are trained on."""

    epochs: int
    lr: float  # a tenth where all weights are trained
    deblora_epochs: int
    deblora_lr: float
    batch_size: int
    precision: str


class Task(Protocol):
    """Rows with labels, and encoders that make features of them by the settings of a config.

    Attributes:
        frozen: (N, D) features without any adaptation.
        labels: (N,) int64.
        is_test: (N,) bool.
        is_val: (N,) bool.
        classes: Names of the classes.
        source: Named in messages.
        defaults: What settings that are None stand for.
        at_once: Rows that are encoded together.
    """

    frozen: np.ndarray
    labels: np.ndarray
    is_test: np.ndarray
    is_val: np.ndarray
    classes: Sequence[str]
    source: str
    defaults: Defaults
    at_once: int

    def under(self, config: RunConfig) -> "Task":
        """The same rows, and encoders by other settings."""

    def inputs(self, rows: np.ndarray):
        """What an encoder takes for some rows."""

    def encoder(self, trained: str | None) -> nn.Module:
        """A new encoder: None is the frozen one; ``"full"``, ``"lora"`` and ``"class-wise"`` have what is trained."""

    def with_lora(self, encoder: nn.Module, trained: str | None) -> nn.Module:
        """The encoder with a LoRA to go on with: its own, or a new one where it has none and is frozen then."""


class FeatureTask:
    """Stored features, and maps of them."""

    defaults = Defaults(30, 1e-3, 60, 3e-3, 128, "fp32")
    at_once = 1024

    def __init__(self, data: LabelledFeatures, config: RunConfig, is_val: np.ndarray | None = None):
        self.frozen, self.labels, self.is_test = data.features, data.labels, data.is_test
        self.is_val = np.zeros_like(self.is_test) if is_val is None else is_val
        self.classes, self.source = data.classes, data.source
        self.dim = self.frozen.shape[1]
        self._take(config)

    def under(self, config: RunConfig) -> "FeatureTask":
        other = copy.copy(self)
        other._take(config)
        return other

    def _take(self, config: RunConfig) -> None:
        if config.rank > self.dim:
            raise SettingError("rank", f"{{}} must be at most {self.dim}, the width of the features; got {config.rank}")
        self.lora = dict(r=config.rank, alpha=config.lora_alpha)

    def inputs(self, rows: np.ndarray) -> FeatureInputs:
        if too_many(self.frozen, len(rows)):
            return PartInputs(self.frozen, rows)
        return FeatureInputs(np.asarray(self.frozen[rows], dtype=np.float32))  # maps are fp32

    def encoder(self, trained: str | None) -> nn.Module:
        if trained == "full":
            return FullMap(self.dim)
        if trained == "lora":
            return LowRankMap(self.dim, **self.lora)
        return nn.Identity() if trained is None else ClassMaps(self.dim, len(self.classes), **self.lora)

    def with_lora(self, encoder: nn.Module, trained: str | None) -> nn.Module:
        if trained in ("lora", "class-wise"):
            return encoder
        return nn.Sequential(encoder.requires_grad_(False), LowRankMap(self.dim, **self.lora))
