"""The images of a data set, as an encoder takes them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rsfast.harma.images import BrokenImageError
from rsfast.harma.loading import seeded


class Items(Dataset):
    """The images of a data set as an encoder takes them: ``(index, image, label, "")``, or the reason there is none.

    Args:
        dataset: What has ``load(i)``, an RGB image, ``name(i)`` and ``label(i)``; else a data set of PyTorch whose
            items are ``(image or tensor, label)``, or a dict of both as TorchGeo's, and whose names are the indices.
        transform: From a PIL image to a tensor. Tensors of a data set of PyTorch go through it only if ``tensors``.
        tensors: See ``transform``.
    """

    def __init__(self, dataset, transform: Callable | None, *, tensors: bool = False):
        self.dataset, self.transform, self.tensors = dataset, transform, tensors
        self.loads = all(hasattr(dataset, name) for name in ("load", "name", "label"))
        if not self.loads and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise TypeError(
                "dataset must have load, name and label, or be a data set of PyTorch with a length, "
                f"got {type(dataset).__name__}"
            )
        if self.loads and transform is None:
            raise TypeError("transform is needed: it is not known what images the model takes")

    def __len__(self) -> int:
        return len(self.dataset) if hasattr(self.dataset, "__len__") else len(self.dataset.images)

    def name(self, index: int) -> str:
        return self.dataset.name(index) if self.loads else str(index)

    def label(self, index: int) -> int | None:
        """None where only loading the item would tell."""
        return max(int(self.dataset.label(index)), -1) if self.loads else None

    def split(self, index: int) -> str:
        splits = getattr(self.dataset, "splits", None)
        return "" if splits is None else splits[index] or ""

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, where the data set has names for them."""
        classes = getattr(self.dataset, "classes", None) or ()
        named = all(isinstance(name, str) for name in classes) and len(set(classes)) == len(classes)
        return list(classes) if classes and named else None

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, int, str]:
        try:
            if self.loads:
                image, label = self.dataset.load(index), self.label(index)
            else:
                image, label = self._pair(index)
            image = self._transformed(image, index)
        except BrokenImageError as error:
            return index, None, -1, error.reason
        except (OSError, SyntaxError) as error:  # what PIL raises on damaged files
            return index, None, -1, f"{type(error).__name__}: {error}"
        return index, image, label, ""

    def _pair(self, index: int):
        item = self.dataset[index]
        if isinstance(item, Mapping):
            if missing := [key for key in ("image", "label") if key not in item]:
                raise TypeError(f"dataset[{index}] must have {' and '.join(missing)}, has {', '.join(map(str, item))}")
            item = item["image"], item["label"]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(f"dataset[{index}] must be (image, label), got {type(item).__name__}")
        return item[0], max(int(item[1]), -1)

    def _transformed(self, image, index: int) -> Tensor:
        if not isinstance(image, Tensor) or self.tensors:
            if self.transform is None:
                raise TypeError("transform is needed: it is not known what images the model takes")
            image = seeded(self.transform, image, index)  # one that draws draws the same after a restart
        if not isinstance(image, Tensor):
            raise TypeError(f"transform must give a tensor, gave {type(image).__name__} for {self.name(index)}")
        return image


def collate(found):
    """Indices, images and labels of the whole ones; index and reason of the broken ones."""
    whole = [(index, image, label) for index, image, label, reason in found if not reason]
    shapes = {image.shape: index for index, image, _ in whole}
    if len(shapes) > 1:
        (a, i), (b, j), *_ = shapes.items()
        raise ValueError(f"transform must give one shape: image {i} became {tuple(a)}, image {j} {tuple(b)}")
    images = torch.stack([image for _, image, _ in whole]) if whole else None
    broken = [(index, reason) for index, _, _, reason in found if reason]
    return [index for index, _, _ in whole], images, [label for _, _, label in whole], broken
