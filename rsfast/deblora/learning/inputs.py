"""What an encoder is fed: rows of stored features, or images that worker processes decode."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rsfast.deblora.arrays import as_rows
from rsfast.harma.loading import loader, mixed_seed, seeded


class FeatureInputs:
    """Stored features as inputs.

    Args:
        features: ``(N, D)`` of any kind that :func:`rsfast.deblora.as_rows` takes.
        name: What errors call it.

    Raises:
        TypeError: ``features`` is no array, tensor or store.
        ValueError: It is not ``(N, D)`` of a floating point dtype. In :meth:`check`: a value is NaN or infinite.

    Example:
        >>> import torch
        >>> from rsfast.deblora import FeatureInputs
        >>> inputs = FeatureInputs(torch.arange(6.0).view(3, 2))
        >>> len(inputs), inputs.batch([2, 0], "cpu").tolist()
        (3, [[4.0, 5.0], [0.0, 1.0]])
    """

    def __init__(self, features, name: str = "features"):
        self.rows = as_rows(features, name)
        self.dim = self.rows.dim

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
        """Rows as fp32 ``(B, D)`` on ``device``; fp64 stays fp64."""
        rows = self.rows.take(torch.as_tensor(indices), device)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def batches(self, batches: Iterable[Tensor], device, *, seed: int = 0) -> Iterator[Tensor]:
        """A tensor for each batch of indices; ``seed`` decides nothing here."""
        for indices in batches:
            yield self.batch(indices, device)

    def order(self) -> Tensor:
        """The order of an epoch of training, drawn from torch's random state: any."""
        return torch.randperm(len(self))

    def check(self) -> None:
        """Refuse NaN and infinity, by the index of the row."""
        self.rows.check()

    def digest(self) -> str:
        """What tells these features from others."""
        return f"{self.rows.check(checksum=True)} {self.rows.dtype} {len(self)} {self.dim}"


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

    def order(self) -> Tensor:
        """The order of an epoch of training, drawn from torch's random state: what the dataset's ``shuffled`` gives, if
        it has that (:meth:`LabelledImages.shuffled` keeps crops of one image near each other), else any."""
        own = getattr(self.dataset, "shuffled", None)
        return own() if callable(own) else torch.randperm(len(self))

    def check(self) -> None:
        """Nothing: images are looked at when they are decoded."""

    def digest(self) -> str:
        """What tells these images from others: how many they are, their names if they have any, and what decides the
        order of crops."""
        name = getattr(self.dataset, "name", None)
        names = [name(i) for i in range(len(self))] if callable(name) else []
        together = getattr(self.dataset, "together", 0)
        about = f"{len(self)} {names}" + f" {together}" * bool(together)
        return hashlib.blake2b(about.encode()).hexdigest()


class _Images(Dataset):
    def __init__(self, dataset, transform, seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        return seeded(self.transform, self.dataset.load(index), mixed_seed(self.seed, index))


def as_inputs(inputs):
    """Inputs as they are, features as :class:`FeatureInputs`."""
    return inputs if hasattr(inputs, "batches") and hasattr(inputs, "digest") else FeatureInputs(inputs, "inputs")
