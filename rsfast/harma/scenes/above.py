"""Things as an aircraft sees them, straight from above; each fills the square from -1 to 1 of its pen."""

from __future__ import annotations

import cmath
import math

import numpy as np

from rsfast.harma.scenes.pen import Pen, darker

WHITE, DARK, ASPHALT, WOOD = (240, 240, 236), (45, 48, 55), (92, 93, 98), (140, 112, 82)


def plane(pen: Pen, colour: str) -> None:
    rgb, half = pen.colour(colour), [0.9 + 0j, 0.8 + 0.1j, 0.25 + 0.13j, -0.2 + 0.9j, -0.42 + 0.9j, -0.18 + 0.13j]
    half += [-0.6 + 0.1j, -0.8 + 0.38j, -0.95 + 0.38j, -0.85 + 0j]
    pen.polygon([*half, *(p.conjugate() for p in half[::-1])], rgb, shadow=0.035)
    pen.line([-0.85 + 0j, -0.6 + 0j], 0.07, DARK)
    pen.disc(0.72, 0.08, DARK)
    for side in (-1, 1):
        pen.box(0.02 + 0.42j * side, 0.24, 0.12, DARK)


def tank(pen: Pen, colour: str) -> None:
    rgb = pen.colour(colour)
    pen.disc(0, 0.88, darker(rgb, 0.72), shadow=0.07)
    pen.disc(0, 0.78, rgb)
    pen.line([0, 0.78 * cmath.exp(1j * pen.rng.uniform(0, 6.28))], 0.07, (120, 120, 124))
    pen.disc(0, 0.12, (120, 120, 124))


def tennis_court(pen: Pen, colour: str) -> None:
    outer = {"green": (150, 75, 60)}.get(colour, (60, 120, 80))
    pen.box(0, 1.24, 1.9, pen.near(outer))
    pen.box(0, 0.82, 1.4, pen.colour(colour))
    for x in (-0.41, -0.29, 0.29, 0.41):
        pen.line([x - 0.7j, x + 0.7j], 0.045, WHITE)
    for y in (-0.7, -0.36, 0.36, 0.7):
        pen.line([-0.41 + y * 1j, 0.41 + y * 1j], 0.045, WHITE)
    pen.line([-0.5 + 0j, 0.5 + 0j], 0.07, DARK)


def boat(pen: Pen, colour: str) -> None:
    hull = [0.95 + 0j, 0.5 + 0.3j, -0.8 + 0.3j, -0.8 - 0.3j, 0.5 - 0.3j]
    pen.polygon([-0.8 + 0.2j, -1.4 + 0.42j, -1.4 - 0.42j, -0.8 - 0.2j], (150, 185, 205))
    pen.polygon(hull, pen.colour(colour), shadow=0.03)
    pen.box(-0.25, 0.6, 0.36, WHITE if colour != "white" else (150, 120, 90))
    pen.box(0.12, 0.12, 0.34, DARK)


def house(pen: Pen, colour: str) -> None:
    rgb = pen.colour(colour)
    shade = darker(rgb, 0.7)
    pen.box(0, 1.5, 1.15, rgb, shadow=0.06)
    pen.polygon([-0.75 + 0.575j, 0.75 + 0.575j, 0.5 + 0j, -0.5 + 0j], shade)
    pen.line([-0.5 + 0j, 0.5 + 0j], 0.05, darker(rgb, 0.55))
    pen.box(0.3 - 0.3j, 0.16, 0.16, DARK)


def car(pen: Pen, colour: str) -> None:
    pen.box(0, 1.6, 0.8, pen.colour(colour), shadow=0.025)
    pen.box(0.3, 0.25, 0.68, DARK)
    pen.box(-0.5, 0.16, 0.64, DARK)


def pool(pen: Pen, colour: str) -> None:
    pen.box(0, 1.75, 1.25, pen.near((222, 214, 196)))
    pen.box(0, 1.35, 0.85, pen.near({"blue": (60, 160, 220), "green": (70, 185, 150)}[colour]))
    pen.line([-0.5 - 0.3j, 0.4 - 0.3j], 0.06, (180, 225, 240))
    pen.box(0.75 + 0.5j, 0.2, 0.2, WHITE)


def diamond(pen: Pen, colour: str) -> None:
    quarter = 1.5 * np.exp(1j * np.linspace(-math.pi / 4, math.pi / 4, 12))
    pen.polygon([-0.75, *(quarter - 0.75)], pen.near((86, 160, 70)))
    infield = 0.95 * np.exp(1j * np.linspace(-math.pi / 4, math.pi / 4, 10))
    pen.polygon([-0.75, *(infield - 0.75)], pen.colour(colour))
    pen.polygon([-0.55, -0.2 + 0.35j, 0.12, -0.2 - 0.35j], pen.near((86, 160, 70)))
    for end in (1 + 1j, 1 - 1j):
        pen.line([-0.75, -0.75 + 1.06 * end], 0.035, WHITE)
    pen.disc(-0.22, 0.09, pen.colour(colour))


def pitch(pen: Pen, colour: str) -> None:
    for width, rgb in ((0.98, pen.colour(colour)), (0.72, pen.near((80, 155, 66)))):
        ends = [width * (0.75 * cmath.exp(1j * a)) for a in np.linspace(-math.pi / 2, math.pi / 2, 10)]
        pen.polygon([*(0.42 + p for p in ends), *(-0.42 - p for p in ends)], rgb)
    for x in (-0.3, 0.1):
        pen.box(complex(x + 0.1, 0), 0.2, 0.62, (94, 172, 78))
    frame = [-0.5 - 0.31j, 0.5 - 0.31j, 0.5 + 0.31j, -0.5 + 0.31j]
    for line in ([*frame, frame[0]], [-0.31j, 0.31j]):
        pen.line(line, 0.03, WHITE)
    pen.disc(0, 0.11, WHITE)
    pen.disc(0, 0.08, (90, 165, 74))


def pivot(pen: Pen, colour: str) -> None:
    rgb = pen.colour(colour)
    pen.disc(0, 0.92, rgb)
    start = pen.rng.uniform(0, 6.28)
    wedge = 0.92 * np.exp(1j * np.linspace(start, start + 1.3, 10))
    pen.polygon([0, *wedge], darker(rgb))
    pen.line([0, wedge[0]], 0.06, WHITE)


def tree_top(pen: Pen, where: complex, radius: float) -> None:
    rgb = pen.near((52, 104, 50))
    pen.disc(where, radius, rgb, shadow=0.03)
    pen.disc(where - radius * (0.25 + 0.25j), 0.55 * radius, tuple(c + 18 for c in rgb))
