"""What an encoder is fed: rows of stored features, or images that worker processes decode."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rsfast.harma.loading import loader, mixed_seed, seeded

BLOCK = 64 << 20  # bytes of features that are looked at together


class FeatureInputs:
    """Stored features as inputs.

    Args:
        features: ``(N, D)``: a numpy array (memory-mapped too), a tensor, or anything with such ``features``.

    Raises:
        TypeError: ``features`` is none of these.
        ValueError: It is not floating point of two axes with a row and a column at least. In :meth:`check`: a value is
            NaN or infinite.

    Example:
        >>> import torch
        >>> from rsfast.deblora import FeatureInputs
        >>> inputs = FeatureInputs(torch.arange(6.0).view(3, 2))
        >>> len(inputs), inputs.batch([2, 0], "cpu").tolist()
        (3, [[4.0, 5.0], [0.0, 1.0]])
    """

    def __init__(self, features):
        self.array = rows_of(features, "features")
        self.dim = self.array.shape[1]

    def __len__(self) -> int:
        return len(self.array)

    def batch(self, indices: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
        """Rows as fp32 ``(B, D)`` on ``device``; fp64 stays fp64."""
        indices = torch.as_tensor(indices)
        if isinstance(self.array, Tensor):
            rows = self.array[indices.to(self.array.device)]
        else:
            rows = torch.from_numpy(self.array[indices.cpu().numpy()])
        return rows.to(device, torch.promote_types(rows.dtype, torch.float32))

    def batches(self, batches: Iterable[Tensor], device, *, seed: int = 0) -> Iterator[Tensor]:
        """A tensor for each batch of indices; ``seed`` decides nothing here."""
        for indices in batches:
            yield self.batch(indices, device)

    def check(self, name: str = "features") -> None:
        """Refuse NaN and infinity, by the index of the row."""
        for start, rows in self._blocks():
            bad = ~rows.isfinite().all(1)
            if bad.any():
                raise ValueError(f"{name} must be finite, row {start + int(bad.nonzero()[0])} is not")

    def digest(self) -> str:
        """What tells these features from others."""
        found = hashlib.blake2b(f"{self.array.dtype} {tuple(self.array.shape)}".encode())
        for _, rows in self._blocks():
            found.update(rows.cpu().contiguous().view(torch.uint8).numpy())
        return found.hexdigest()

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        step = max(1, BLOCK // (self.dim * self.array.itemsize))
        for start in range(0, len(self), step):
            rows = self.array[start : start + step]
            yield start, rows.detach() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))


class ImageInputs:
    """Images as inputs, decoded and transformed on the way, by worker processes if there are any.

    Args:
        dataset: Has ``len()``, and ``load(i)`` gives image i, e.g. :class:`rsfast.deblora.LabelledImages`.
        transform: Image to tensor. Where it draws at random it depends on the seed and the index alone, so that
            workers change nothing.
        workers: Processes; 0 decodes in this one.

    Raises:
        TypeError: ``dataset`` lacks ``load`` or ``len()``.
        ValueError: It is empty, or ``workers`` is no whole number from 0.

    Example:
        >>> import numpy as np, torch
        >>> from PIL import Image
        >>> from rsfast.deblora import ImageInputs
        >>> class Two:
        ...     def __len__(self): return 2
        ...     def load(self, i): return Image.new("RGB", (4, 4), (i, i, i))
        >>> inputs = ImageInputs(Two(), lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
        >>> inputs.batch([0, 1], "cpu").shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, dataset, transform, workers: int = 0):
        if not callable(getattr(dataset, "load", None)) or not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset must have len() and load(i), a {type(dataset).__name__} has not")
        if type(workers) is not int or workers < 0:
            raise ValueError(f"workers must be a whole number of at least 0, got {workers!r}")
        if not len(dataset):
            raise ValueError("dataset holds no image")
        self.dataset, self.transform, self.workers = dataset, transform, workers

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int] | Tensor, device: torch.device | str, *, seed: int = 0) -> Tensor:
        """Transformed images ``(B, ...)`` on ``device``."""
        items = _Images(self.dataset, self.transform, seed)
        return torch.stack([items[i] for i in torch.as_tensor(indices).tolist()]).to(device)

    def batches(self, batches: Iterable[Tensor], device, *, seed: int = 0) -> Iterator[Tensor]:
        """A tensor for each batch of indices; ``seed`` decides what the transform draws."""
        images, pin = _Images(self.dataset, self.transform, seed), torch.device(device).type == "cuda"
        ahead = [indices.tolist() for indices in batches]
        for batch in loader(images, workers=self.workers, pin_memory=pin, batch_sampler=ahead):
            yield batch.to(device, non_blocking=True)

    def check(self, name: str = "images") -> None:
        """Nothing: images are looked at when they are decoded."""

    def digest(self) -> str:
        """What tells these images from others: how many they are, and their names if they have any."""
        name = getattr(self.dataset, "name", None)
        names = [name(i) for i in range(len(self))] if callable(name) else []
        return hashlib.blake2b(f"{len(self)} {names}".encode()).hexdigest()


class _Images(Dataset):
    def __init__(self, dataset, transform, seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        return seeded(self.transform, self.dataset.load(index), mixed_seed(self.seed, index))


def as_inputs(inputs):
    """Inputs as they are, features as :class:`FeatureInputs`."""
    return inputs if hasattr(inputs, "batches") and hasattr(inputs, "check") else FeatureInputs(inputs)


def rows_of(features, name: str) -> np.ndarray | Tensor:
    """The ``(N, D)`` array or tensor that ``features`` is or holds."""
    array = features if isinstance(features, np.ndarray | Tensor) else getattr(features, "features", None)
    if not isinstance(array, np.ndarray | Tensor):
        raise TypeError(f"{name} must be an array, a tensor or a store of features, got {type(features).__name__}")
    floating = array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"
    if array.ndim != 2 or not floating or 0 in array.shape:
        raise ValueError(
            f"{name} must be floating point numbers (N, D), a row and a column at least; got {array.dtype} of shape "
            f"{tuple(array.shape)}"
        )
    return array


def label_tensor(labels, rows: int, n_classes: int | None, name: str = "labels") -> Tensor:
    """Labels as int64 on the CPU; each must be a class, from 0 to C - 1."""
    labels = labels.detach().cpu() if isinstance(labels, Tensor) else torch.from_numpy(np.array(labels))
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(f"{name} must be integers (N,), got {labels.dtype} of shape {tuple(labels.shape)}")
    if len(labels) != rows:
        raise ValueError(f"{name} must be {rows}, one a row of the features, got {len(labels)}")
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (n_classes is not None and high >= n_classes):
        row = int(((labels < 0) | (labels >= (high + 1 if n_classes is None else n_classes))).nonzero()[0])
        within = "0 or more" if n_classes is None else f"0 to {n_classes - 1}"
        raise ValueError(f"{name} must be classes, {within}; row {row} has {int(labels[row])}")
    return labels
