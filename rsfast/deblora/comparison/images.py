"""Images and a backbone as what a comparison works on."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsfast.deblora.comparison.config import RunConfig
from rsfast.deblora.comparison.tasks import Defaults, FeatureTask
from rsfast.deblora.learning.inputs import ImageInputs
from rsfast.models import add_lora, set_adapter_ids

TARGETS = ("q", "k", "v", "out")  # of a backbone's LoRA: the attention's maps, as the authors have it
IMAGES = 64  # a step
AT_ONCE = 256  # images and classes that a class-wise LoRA keeps activations of


def lora_of(backbone: nn.Module, config: RunConfig) -> dict:
    """Arguments of :func:`add_lora` for a backbone."""
    return dict(r=config.rank, alpha=config.lora_alpha, targets=getattr(backbone, "lora_targets", TARGETS))


class ImageTask:
    """Images and a backbone, which is copied for every method."""

    def __init__(self, features: FeatureTask, dataset, backbone: nn.Module, transform, config: RunConfig):
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
    """Class-wise LoRA in a backbone: what :class:`ClassMaps` is for features. Every image meets every class's LoRA.

    So a batch costs C passes through the backbone: all that could be shared is what lies before the first LoRA, in the
    first block. Where that is more than :data:`AT_ONCE` images, they go through a few classes at a time, and backward
    computes each such part again, for a third pass beside forward and backward: memory grows with C by the features
    alone.
    """

    def __init__(self, backbone: nn.Module, dim: int, n_classes: int, lora: dict):
        super().__init__()
        add_lora(backbone, num_adapters=n_classes, **lora)
        self.backbone, self.head, self.n_classes = backbone, nn.Linear(dim, n_classes), n_classes

    def forward_all(self, images: Tensor) -> Tensor:
        """Features by each class's LoRA, (B, C, D)."""
        classes = torch.arange(self.n_classes, device=images.device)
        parts = classes.split(max(1, AT_ONCE // max(1, len(images))))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([self._by(part, images) for part in parts], 1)
        return torch.cat([checkpoint(self._by, part, images, use_reentrant=False) for part in parts], 1)

    def _by(self, classes: Tensor, images: Tensor) -> Tensor:
        """Features by the LoRA of some classes; backward comes here too, so that ids are set here."""
        set_adapter_ids(self.backbone, classes.repeat(len(images)))
        return self.backbone(images.repeat_interleave(len(classes), 0)).unflatten(0, (len(images), len(classes)))

    def logits(self, images: Tensor) -> Tensor:
        """What the head gives each class for the features by its own LoRA, (B, C)."""
        return self._logits(self.forward_all(images))

    def forward(self, images: Tensor) -> Tensor:
        """Their mean by what the head believes, (B, D)."""
        every = self.forward_all(images)
        return (self._logits(every).softmax(-1).to(every)[..., None] * every).sum(1)

    def _logits(self, every: Tensor) -> Tensor:
        return torch.einsum("bcd,cd->bc", every.to(self.head.weight.dtype), self.head.weight) + self.head.bias
