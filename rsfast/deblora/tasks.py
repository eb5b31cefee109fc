"""What a comparison works on: stored features, or images and a backbone. Both make encoders and inputs for them."""

import copy
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rsfast.deblora.config import RunConfig
from rsfast.deblora.features_file import LabelledFeatures
from rsfast.deblora.inputs import FeatureInputs, ImageInputs
from rsfast.deblora.maps import ClassMaps, FullMap, LowRankMap
from rsfast.models import add_lora, set_adapter_ids

TARGETS = ("q", "k", "v", "out")  # of a backbone's LoRA: the attention's maps, as the authors have it
IMAGES = 64  # a step


def lora_of(backbone: nn.Module, config: RunConfig) -> dict:
    """Arguments of :func:`add_lora` for a backbone."""
    return dict(r=config.rank, alpha=config.lora_alpha, targets=getattr(backbone, "lora_targets", TARGETS))


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
            raise ValueError(f"rank must be at most {self.dim}, the width of the features; got {config.rank}")
        self.lora = dict(r=config.rank, alpha=config.lora_alpha)

    def inputs(self, rows: np.ndarray) -> FeatureInputs:
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


class ImageTask:
    """Images and a backbone, which is copied for every method."""

    def __init__(self, features: "FeatureTask", dataset, backbone: nn.Module, transform, config: RunConfig):
        self.frozen, self.labels, self.is_test = features.frozen, features.labels, features.is_test
        self.is_val, self.classes, self.source = features.is_val, features.classes, features.source
        self.dataset, self.backbone, self.transform = dataset, backbone, transform
        self._take(config)

    def under(self, config: RunConfig) -> "ImageTask":
        other = copy.copy(self)
        other._take(config)
        return other

    def _take(self, config: RunConfig) -> None:
        self.workers, self.at_once = config.workers, config.batch_size or IMAGES
        self.defaults = Defaults(10, 1e-4, 10, 1e-4, IMAGES, "bf16" if config.place().startswith("cuda") else "fp32")
        self.lora = lora_of(self.backbone, config)

    def inputs(self, rows: np.ndarray) -> ImageInputs:
        return ImageInputs(self.dataset.subset(rows), self.transform, self.workers)

    def encoder(self, trained: str | None) -> nn.Module:
        backbone = copy.deepcopy(self.backbone).requires_grad_(trained == "full")
        if trained == "lora":
            add_lora(backbone, **self.lora)
        elif trained == "class-wise":
            return ClassWise(backbone, self.frozen.shape[1], len(self.classes), self.lora)
        return backbone

    def with_lora(self, encoder: nn.Module, trained: str | None) -> nn.Module:
        if trained in (None, "full"):
            add_lora(encoder, **self.lora)
        return encoder


class ClassWise(nn.Module):
    """Class-wise LoRA in a backbone: what :class:`ClassMaps` is for features. Every image meets every class's LoRA."""

    def __init__(self, backbone: nn.Module, dim: int, n_classes: int, lora: dict):
        super().__init__()
        add_lora(backbone, num_adapters=n_classes, **lora)
        self.backbone, self.head, self.n_classes = backbone, nn.Linear(dim, n_classes), n_classes

    def forward_all(self, images: Tensor) -> Tensor:
        """Features by each class's LoRA, (B, C, D)."""
        ids = torch.arange(self.n_classes, device=images.device).repeat(len(images))
        set_adapter_ids(self.backbone, ids)
        every = self.backbone(images.repeat_interleave(self.n_classes, 0))
        return every.unflatten(0, (len(images), self.n_classes))

    def logits(self, images: Tensor) -> Tensor:
        """What the head gives each class for the features by its own LoRA, (B, C)."""
        return self._logits(self.forward_all(images))

    def forward(self, images: Tensor) -> Tensor:
        """Their mean by what the head believes, (B, D)."""
        every = self.forward_all(images)
        return (self._logits(every).softmax(-1).to(every)[..., None] * every).sum(1)

    def _logits(self, every: Tensor) -> Tensor:
        return torch.einsum("bcd,cd->bc", every.to(self.head.weight.dtype), self.head.weight) + self.head.bias
