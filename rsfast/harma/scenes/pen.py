"""A small anti-aliased pen: points are complex numbers, and a pen can be moved, scaled and turned."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

OVERSAMPLING = 3
GRAIN = 96  # grains along a side of the picture
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (200, 45, 40), "blue": (45, 85, 185), "white": (238, 238, 234), "yellow": (235, 200, 55),
    "green": (40, 135, 65), "grey": (140, 142, 146), "black": (42, 42, 48), "orange": (232, 125, 40),
    "brown": (126, 82, 50), "purple": (125, 65, 150),
}  # fmt: skip

# mean colour, strength of the slow mottling, strength of the grain
GROUNDS: dict[str, tuple[RGB, float, float]] = {
    "grass": ((104, 146, 74), 16, 7), "sand": ((214, 192, 146), 10, 5), "soil": ((150, 112, 80), 16, 8),
    "concrete": ((178, 177, 172), 7, 4), "asphalt": ((98, 99, 104), 6, 5), "water": ((48, 96, 138), 10, 4),
    "snow": ((232, 236, 242), 6, 3), "forest": ((44, 84, 48), 16, 16), "sky": ((150, 195, 232), 6, 1),
}  # fmt: skip


def texture(ground: str, size: int, rng: np.random.Generator) -> Image.Image:
    """A square that looks like ``ground``: mottling of two sizes and grain, which do not depend on ``size``."""
    mean, mottling, grain = GROUNDS[ground]
    noise = np.zeros((GRAIN, GRAIN), np.float32)
    for cells, strength in ((5, mottling), (13, mottling / 2)):
        coarse = Image.fromarray(rng.normal(0, strength, (cells, cells)).astype(np.float32))
        noise += np.asarray(coarse.resize((GRAIN, GRAIN), Image.Resampling.BICUBIC))
    noise += rng.normal(0, grain, (GRAIN, GRAIN)).astype(np.float32)
    tint = np.array(mean, np.float32) + rng.normal(0, 3, 3).astype(np.float32)
    square = Image.fromarray((noise[..., None] + tint).clip(0, 255).astype(np.uint8))
    return square.resize((size, size), Image.Resampling.BILINEAR)


class Pen:
    """Draws on a square whose centre is 0 and whose edges lie at -1 and 1; the imaginary axis points down.

    Args:
        size: Pixels a side of the finished picture.
        ground: Name in :data:`GROUNDS` of what covers the square at first.
        rng: Source of every random choice.
        angle: Turns everything drawn, in radians.
    """

    def __init__(self, size: int, ground: str, rng: np.random.Generator, *, angle: float = 0.0):
        self.size, self.rng = size, rng
        self.canvas = texture(ground, size * OVERSAMPLING, rng)
        self.draw = ImageDraw.Draw(self.canvas, "RGBA")
        self.shift, self.turn = 0j, cmath.exp(1j * angle)

    def moved(self, to: complex, *, scale: float = 1.0, angle: float = 0.0) -> Pen:
        """A pen on the same canvas whose origin is at ``to``, which draws ``scale`` times as large and turned."""
        pen = Pen.__new__(Pen)
        pen.__dict__.update(self.__dict__)
        pen.shift = self.shift + self.turn * to
        pen.turn = self.turn * cmath.rect(scale, angle)
        return pen

    def colour(self, name: str) -> RGB:
        """The named colour, a little different each time."""
        return self.near(COLOURS[name])

    def near(self, rgb: RGB, spread: float = 8.0) -> RGB:
        jitter = self.rng.normal(0, spread / 3, 3) + self.rng.normal(0, spread)
        return tuple(int(min(255, max(0, c + j))) for c, j in zip(rgb, jitter, strict=True))

    def polygon(self, points: Sequence[complex], colour: RGB, *, shadow: float = 0.0) -> None:
        """Fill a polygon; ``shadow`` is its height above the ground in units of the whole picture."""
        if shadow:
            self.draw.polygon(self._pixels(points, shadow * (1 + 0.7j)), fill=(0, 0, 0, 90))
        self.draw.polygon(self._pixels(points), fill=colour)

    def box(self, centre: complex, width: float, height: float, colour: RGB, *, shadow: float = 0.0) -> None:
        self.polygon(_corners(centre, width, height), colour, shadow=shadow)

    def disc(self, centre: complex, radius: float, colour: RGB, *, shadow: float = 0.0, flat: float = 1.0) -> None:
        """Fill a circle, or an ellipse whose height is ``flat`` times its width."""
        angles = np.linspace(0, 2 * math.pi, 28, endpoint=False)
        self.polygon(centre + radius * (np.cos(angles) + 1j * flat * np.sin(angles)), colour, shadow=shadow)

    def line(self, points: Sequence[complex], width: float, colour: RGB) -> None:
        pixels = self._pixels(points)
        thickness = max(1, round(width * abs(self.turn) * self.canvas.width / 2))
        self.draw.line(pixels, fill=colour, width=thickness, joint="curve")

    def texture(self, points: Sequence[complex], ground: str) -> None:
        """Fill a polygon with the texture of ``ground``."""
        cover = texture(ground, self.canvas.width, self.rng)
        mask = Image.new("L", self.canvas.size)
        ImageDraw.Draw(mask).polygon(self._pixels(points), fill=255)
        self.canvas.paste(cover, mask=mask)

    def band(self, points: Sequence[complex], width: float, ground: str) -> None:
        """Cover a strip of the given width along a line with the texture of ``ground``."""
        along = np.asarray(points)
        normal = 1j * np.gradient(along)
        side = width / 2 * normal / np.abs(normal)
        self.texture(np.concatenate([along + side, (along - side)[::-1]]), ground)

    def picture(self) -> Image.Image:
        """The finished picture, averaged down to ``size`` pixels, in a light of its own."""
        small = np.asarray(self.canvas.resize((self.size,) * 2, Image.Resampling.BOX), np.float32)
        light = self.rng.uniform(0.9, 1.08)
        return Image.fromarray((small * light).clip(0, 255).astype(np.uint8))

    def _pixels(self, points, offset: complex = 0j) -> list[tuple[float, float]]:
        half = self.canvas.width / 2
        where = (self.shift + self.turn * np.asarray(points) + offset + (1 + 1j)) * half
        return list(zip(where.real.tolist(), where.imag.tolist(), strict=True))


def darker(rgb: RGB, share: float = 0.75) -> RGB:
    return tuple(int(share * c) for c in rgb)


def _corners(centre: complex, width: float, height: float) -> list[complex]:
    w, h = width / 2, height / 2
    return [centre + complex(*c) for c in ((-w, -h), (w, -h), (w, h), (-w, h))]
