"""Small images of noise, and a small model for them: quick to import."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from rsfast.deblora import extract_features
from rsfast.deblora.features import files as files
from rsfast.harma import BrokenImageError


class Scenes:
    """Ten small images of noise; those in ``broken`` do not load."""

    classes = ("ship", "plane")

    def __init__(self, count=10, broken=()):
        self.count, self.broken, self.splits = count, broken, ["train"] * 7 + ["test"] * (count - 7)

    def __len__(self):
        return self.count

    def load(self, index):
        if index in self.broken:
            raise BrokenImageError(self.name(index), "no image")
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (9, 7, 3), np.uint8))

    def name(self, index):
        return f"{index}.png"

    def label(self, index):
        return index % 3 - 1


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Mean(nn.Module):
    """(B, 3, H, W) to (B, 2); in training mode it would not give the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(3, 2), nn.Dropout(0.5)

    def forward(self, images):
        return self.norm(self.linear(images.mean((2, 3))))


def extract(folder, dataset=None, model=None, **options):
    options = {"transform": pixels, "batch_size": 4, **options}
    return extract_features(model or Mean(), Scenes() if dataset is None else dataset, folder, **options)


def contents(folder):
    """What a store is, byte by byte."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != files.LOCK}
