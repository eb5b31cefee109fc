"""From a PIL image to the model's input: HarMA's augmentation for training, a plain resize for evaluation."""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

FILL = [128, 128, 128]  # what is uncovered by a shift, as upstream


class RandAugment:
    """Two of ten operations, each applied with probability one half, at magnitude 7 of 10.

    Upstream: HarMA ``dataset/randaugment.py::RandomAugment(2, 7)`` with the ten operations of its retrieval set-up.
    Differs from upstream: a translation is 7/224 of the image's side, which is upstream's 7 pixels at its 224.
    Draws from torch's default generator.
    """

    OPERATIONS = (
        "Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness",
        "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
    )  # fmt: skip

    def __init__(self, count: int = 2, magnitude: float = 7.0):
        self.count, self.level = count, magnitude / 10

    def __call__(self, image: Image.Image) -> Image.Image:
        for operation in torch.randint(len(self.OPERATIONS), (self.count,)).tolist():
            apply, negative = (torch.rand(2) < 0.5).tolist()
            if apply:
                image = self.apply(image, self.OPERATIONS[operation], -self.level if negative else self.level)
        return image

    def apply(self, image: Image.Image, operation: str, level: float) -> Image.Image:
        """One operation; the sign of ``level``, from -1 to 1, is the direction where there is one."""
        if operation == "AutoContrast":
            return F.autocontrast(image)
        if operation == "Equalize":
            return F.equalize(image)
        if operation == "Brightness":
            return F.adjust_brightness(image, 1.8 * abs(level) + 0.1)
        if operation == "Sharpness":
            return F.adjust_sharpness(image, 1.8 * abs(level) + 0.1)
        if operation == "Rotate":
            return F.rotate(image, 30 * level, interpolation=InterpolationMode.BILINEAR, fill=FILL)
        width, height = image.size
        angle, shift = math.degrees(math.atan(0.3 * level)), 10 / 224 * level
        moves = {
            "ShearX": ([0, 0], [angle, 0.0]),
            "ShearY": ([0, 0], [0.0, angle]),
            "TranslateX": ([round(shift * width), 0], [0.0, 0.0]),
            "TranslateY": ([0, round(shift * height)], [0.0, 0.0]),
        }
        if operation not in moves:
            return image
        translate, shear = moves[operation]
        return F.affine(
            image, 0.0, translate, 1.0, shear, interpolation=InterpolationMode.BILINEAR, fill=FILL, center=[0, 0]
        )


def train_transform(size: Sequence[int], mean: Sequence[float], std: Sequence[float], *, augment: bool = True):
    """Crop of 0.5 to 1 of the area, flip, :class:`RandAugment`, normalise; only the last where not ``augment``."""
    if not augment:
        return eval_transform(size, mean, std)
    crop = transforms.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), RandAugment(), *_to_input(mean, std)])


def eval_transform(size: Sequence[int], mean: Sequence[float], std: Sequence[float]):
    """The whole image, squashed to ``size`` (height, width) by bicubic resampling, normalised."""
    return transforms.Compose([transforms.Resize(size, InterpolationMode.BICUBIC), *_to_input(mean, std)])


def _to_input(mean, std):
    return transforms.ToTensor(), transforms.Normalize(mean, std)
