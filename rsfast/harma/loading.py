"""Batches: which samples, in which order, decoded and augmented by worker processes."""

import signal
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rsfast.harma.data import CaptionedImages
from rsfast.harma.images import BrokenImageError

ATTEMPTS = 50  # images tried in place of a broken one before giving up


def mixed_seed(*numbers: int) -> int:
    """One seed out of several numbers; near numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seeded(transform, image: Image.Image, seed: int) -> Tensor:
    """``transform(image)`` as ``seed`` alone decides it; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would reseed the GPU's too
        return transform(image)


def seed_generators(seed: int, device: torch.device) -> None:
    """The generators that training draws from; torch.manual_seed would reseed the other GPUs too."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


class TrainBatches(Sampler):
    """For every step from ``start`` on, the (epoch, index) pairs of this process's share of the batch.

    The order of an epoch depends on seed and epoch alone, and the rows that fill no batch are left out of it.
    """

    def __init__(self, count: int, batch_size: int, *, steps: range, seed: int, rank: int = 0, world: int = 1):
        self.count, self.batch_size, self.steps, self.seed = count, batch_size, steps, seed
        self.rank, self.world = rank, world
        self.steps_per_epoch = count // (batch_size * world)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, known = None, None
        for step in self.steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != known:
                generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, 0))
                order, known = torch.randperm(self.count, generator=generator), epoch
            first = (place * self.world + self.rank) * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size].tolist()]


class TrainPairs(Dataset):
    """Augmented image, caption, image id, scene class; the augmentation depends on (seed, epoch, index) alone.

    A row whose image is broken is replaced by the next row whose image is not, and reported.
    """

    def __init__(self, data: CaptionedImages, transform, *, seed: int):
        self.data, self.transform, self.seed = data, transform, seed

    def __len__(self) -> int:
        return len(self.data.texts)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        broken: dict[int, str] = {}
        for row in ((index + k) % len(self) for k in range(len(self))):
            number = self.data.text_to_image[row]
            if number in broken:
                continue
            try:
                image = self.data.load(number)
            except BrokenImageError as error:
                broken[number] = error.reason
                if len(broken) == ATTEMPTS:
                    break
                continue
            image = seeded(self.transform, image, mixed_seed(self.seed, epoch, 1, index))
            return image, self.data.texts[row], self.data.image_id(number), self.data.label(number), broken
        return None, "", -1, -1, broken


class TrainCollate:
    """Images, tokens, image ids, scene classes, and what was broken; images are None where none was to be had."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, items):
        images, texts, ids, labels, broken = zip(*items, strict=True)
        found = {number: reason for part in broken for number, reason in part.items()}
        if any(image is None for image in images):
            return None, None, None, None, found
        return torch.stack(images), self.tokenizer(list(texts)), torch.tensor(ids), torch.tensor(labels), found


class EvalImages(Dataset):
    """Index and transformed image, or index and the reason there is none."""

    def __init__(self, data: CaptionedImages, transform):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int):
        try:
            return index, self.transform(self.data.load(index)), None
        except BrokenImageError as error:
            return index, None, error.reason


def eval_collate(items):
    """Indices and images of the whole ones, and the reasons by index of the broken ones."""
    whole = [(index, image) for index, image, reason in items if reason is None]
    images = torch.stack([image for _, image in whole]) if whole else None
    return [index for index, _ in whole], images, {index: reason for index, _, reason in items if reason is not None}


def loader(dataset: Dataset, *, workers: int, pin_memory: bool, **options) -> DataLoader:
    """A DataLoader whose workers leave Ctrl-C to the main process."""
    return DataLoader(
        dataset, num_workers=workers, pin_memory=pin_memory, worker_init_fn=_leave_signals, **options
    )  # fmt: skip


def _leave_signals(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to every process of the group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or a forked worker would keep the trainer's handler and live on
