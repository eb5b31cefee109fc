"""Upright crops of oriented boxes."""

import math

import numpy as np
from PIL import Image


def bounds(box: np.ndarray, size: tuple[int, int], margin: float = 0.0) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the whole pixels around a box (4, 2), as far as the image goes.

    Raises:
        ValueError: The box has no area, or lies outside of the image.
    """
    x, y = box[:, 0], box[:, 1]
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2  # shoelace formula
    if area == 0:
        raise ValueError(f"the box {corners(box)} has no area")
    low, high = box.min(0), box.max(0)
    if not all(first < end and last > 0 for first, last, end in zip(low, high, size, strict=True)):
        raise ValueError(f"the box {corners(box)} lies outside of the image of {size[0]} x {size[1]} pixels")
    grown = margin * (high - low)
    left, top = (max(0, math.floor(v)) for v in low - grown)
    right, bottom = (min(s, math.ceil(v)) for v, s in zip(high + grown, size, strict=True))
    return left, top, right, bottom


def cut(image: Image.Image, box: np.ndarray, *, crop: str, margin: float) -> Image.Image:
    """What :class:`LabelledImages` calls ``bounds`` and ``rotated``; ``ValueError`` as in :func:`bounds`."""
    around = bounds(box, image.size, margin)
    if crop == "bounds":
        return image.crop(around)
    grown = _grown(box, margin)
    wide, high = (np.linalg.norm(grown[k + 1] - grown[k]) for k in (0, 1))
    size = max(1, round(wide)), max(1, round(high))
    # PIL wants the corners that go to the top left, bottom left, bottom right, top right
    return image.transform(size, Image.Transform.QUAD, grown[[0, 3, 2, 1]].ravel().tolist(), Image.Resampling.BICUBIC)


def _grown(box: np.ndarray, margin: float) -> np.ndarray:
    return box.mean(0) + (1 + 2 * margin) * (box - box.mean(0))


def corners(box: np.ndarray) -> str:
    return " ".join(f"{number:g}" for number in box.ravel())
