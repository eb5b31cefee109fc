"""Things as a pedestrian sees them, from the side; each fills the square from -1 to 1 of its pen and stands on 1."""

from __future__ import annotations

import math

import numpy as np

from rsfast.harma.scenes.pen import RGB, Pen, darker

WHITE, DARK, WOOD, SKIN = (240, 240, 236), (45, 48, 55), (122, 84, 52), (224, 178, 146)


def house(pen: Pen, colour: str) -> None:
    pen.box(0.35j, 1.4, 1.3, pen.near((232, 220, 196)))
    pen.polygon([-0.9 - 0.28j, -0.95j, 0.9 - 0.28j], pen.colour(colour))
    pen.box(-0.3 + 0.65j, 0.34, 0.7, WOOD)
    pen.box(0.32 + 0.3j, 0.4, 0.4, (120, 170, 205))
    pen.line([0.32 + 0.1j, 0.32 + 0.5j], 0.05, WHITE)


def tree(pen: Pen, colour: str) -> None:
    pen.box(0.6j, 0.22, 0.8, WOOD)
    rgb = pen.colour(colour)
    for where, radius in ((-0.35 + 0j, 0.48), (0.35 + 0j, 0.48), (-0.42j, 0.55)):
        pen.disc(where, radius, rgb)
    pen.disc(-0.15 - 0.5j, 0.25, tuple(min(255, c + 20) for c in rgb))


def car(pen: Pen, colour: str) -> None:
    rgb = pen.colour(colour)
    pen.polygon([-0.55 + 0.45j, -0.35 + 0.05j, 0.35 + 0.05j, 0.6 + 0.45j], rgb)
    pen.polygon([-0.42 + 0.45j, -0.28 + 0.14j, 0.28 + 0.14j, 0.45 + 0.45j], (150, 195, 220))
    pen.box(0.62j, 1.9, 0.4, rgb)
    for x in (-0.55, 0.55):
        pen.disc(x + 0.8j, 0.22, DARK)
        pen.disc(x + 0.8j, 0.1, (190, 190, 190))


def person(pen: Pen, colour: str) -> None:
    for x in (-0.14, 0.14):
        pen.box(complex(x, 0.7), 0.2, 0.6, (60, 64, 92))
    rgb = pen.colour(colour)
    pen.box(0.05j, 0.62, 0.8, rgb)
    for side in (-1, 1):
        pen.line([side * 0.3 - 0.28j, side * 0.5 + 0.3j], 0.14, rgb)
    pen.disc(-0.6j, 0.28, SKIN)
    pen.polygon([-0.28 - 0.62j, -0.2 - 0.88j, 0.2 - 0.88j, 0.28 - 0.62j], (70, 50, 38))


def flower(pen: Pen, colour: str) -> None:
    pen.line([1j, -0.3j], 0.1, (60, 130, 60))
    pen.polygon([0.6j, 0.5 + 0.25j, 0.3 + 0.6j], (70, 145, 66))
    rgb = pen.colour(colour)
    for a in np.arange(6) * math.pi / 3:
        pen.disc(-0.42j + 0.36 * complex(math.cos(a), math.sin(a)), 0.25, rgb)
    pen.disc(-0.42j, 0.2, (225, 190, 60) if colour != "yellow" else WOOD)


def boat(pen: Pen, colour: str) -> None:
    pen.box(-0.1j, 0.07, 1.4, WOOD)
    pen.polygon([0.08 - 0.8j, 0.08 + 0.35j, 0.75 + 0.35j], WHITE)
    pen.polygon([-0.08 - 0.6j, -0.08 + 0.35j, -0.6 + 0.35j], WHITE)
    pen.polygon([-0.95 + 0.5j, 0.95 + 0.5j, 0.6 + 1j, -0.6 + 1j], pen.colour(colour))


def table(pen: Pen, colour: str) -> None:
    rgb = pen.colour(colour)
    for x in (-0.7, 0.7):
        pen.box(complex(x, 0.6), 0.14, 0.8, darker(rgb))
    pen.polygon([-0.95 + 0.25j, -0.7 - 0.1j, 0.7 - 0.1j, 0.95 + 0.25j], rgb)
    pen.box(0.3j, 1.9, 0.12, darker(rgb))


def ball(pen: Pen, colour: str) -> None:
    pen.disc(0.95j, 0.6, (60, 60, 50), flat=0.15)
    pen.disc(0.35j, 0.62, pen.colour(colour))
    pen.box(0.35j, 1.2, 0.16, WHITE)
    pen.disc(-0.2 + 0.1j, 0.12, WHITE)


def baseball(pen: Pen, colour: str) -> None:
    pen.disc(0.95j, 0.6, (60, 60, 50), flat=0.15)
    pen.disc(0.35j, 0.62, pen.colour(colour))
    for end in (-1, 1):
        stitches = end * (0.95 - 0.62 * np.exp(1j * np.linspace(-0.7, 0.7, 8))) + 0.35j
        pen.line(stitches, 0.09, (190, 40, 40))


def roundabout(pen: Pen, colour: str) -> None:
    rgb = pen.colour(colour)
    pen.disc(0.75j, 0.95, darker(rgb), flat=0.28)
    pen.disc(0.62j, 0.95, rgb, flat=0.28)
    for x in (-0.65, 0, 0.65):
        pen.line([complex(x, 0.6), complex(x, -0.2)], 0.08, (190, 194, 198))
    pen.line([-0.65 - 0.2j, 0.65 - 0.2j], 0.08, (190, 194, 198))


def round_table(pen: Pen, colour: str) -> None:
    rgb = pen.colour(colour)
    pen.box(0.55j, 0.16, 0.9, darker(rgb))
    pen.disc(0.95j, 0.4, darker(rgb), flat=0.2)
    pen.disc(0.12j, 0.95, darker(rgb), flat=0.3)
    pen.disc(0.05j, 0.95, rgb, flat=0.3)


def umbrella(pen: Pen, colour: str) -> None:
    pen.line([-0.7j, 1j], 0.08, WOOD)
    rgb = pen.colour(colour)
    arc = 0.95 * np.exp(1j * np.linspace(math.pi, 2 * math.pi, 19))
    for part in range(6):
        pen.polygon([0j, *arc[3 * part : 3 * part + 4]], rgb if part % 2 else WHITE)


def train(pen: Pen, colour: str) -> None:
    rgb = pen.colour(colour)
    pen.box(0.25j, 1.9, 1.0, rgb)
    pen.box(-0.3j, 1.95, 0.12, darker(rgb))
    for x in (-0.65, -0.22, 0.22, 0.65):
        pen.box(complex(x, 0.12), 0.3, 0.34, (160, 205, 230))
    for x in (-0.65, -0.3, 0.3, 0.65):
        pen.disc(complex(x, 0.85), 0.15, DARK)
    pen.line([-1.05 + 1.02j, 1.05 + 1.02j], 0.06, (120, 110, 104))


def plane(pen: Pen, colour: str) -> None:
    rgb = pen.colour(colour)
    pen.polygon([-0.9 - 0.05j, -1 - 0.55j, -0.75 - 0.55j, -0.5 - 0.05j], rgb)
    pen.polygon([-0.95 - 0.05j, 0.75 - 0.05j, 1 + 0.15j, 0.75 + 0.32j, -0.6 + 0.32j], rgb)
    pen.polygon([-0.2 + 0.15j, 0.25 + 0.15j, -0.15 + 0.7j, -0.4 + 0.7j], darker(rgb))
    for x in np.arange(-0.55, 0.6, 0.25):
        pen.disc(complex(x, 0.06), 0.06, DARK)


def tank(pen: Pen, colour: str) -> None:
    rgb = pen.colour(colour)
    pen.box(0.3j, 1.5, 1.2, rgb)
    pen.disc(0.9j, 0.75, rgb, flat=0.25)
    pen.box(0.5 + 0.3j, 0.5, 1.2, darker(rgb))
    pen.disc(-0.3j, 0.75, darker(rgb, 0.88), flat=0.25)
    pen.line([-0.45 - 0.2j, -0.45 + 1j], 0.06, DARK)


def bridge(pen: Pen, colour: str) -> None:
    rgb, arch = pen.colour(colour), 0.42 * np.exp(1j * np.linspace(math.pi, 2 * math.pi, 10))
    pen.box(0.35j, 1.96, 1.1, rgb)
    pen.box(-0.22j, 1.98, 0.16, darker(rgb))
    for x in (-0.5, 0.5):
        pen.polygon([*(x + 0.45j + arch), complex(x + 0.42, 0.95), complex(x - 0.42, 0.95)], (60, 100, 135))


def pond(pen: Pen, colour: str) -> None:
    pen.disc(0.4j, 0.95, (150, 140, 96), flat=0.5)
    pen.disc(
        0.4j,
        0.84,
        pen.near({"blue": (62, 128, 190), "green": (84, 170, 120), "brown": (128, 96, 62)}[colour]),
        flat=0.46,
    )
    pen.line([-0.4 + 0.3j, 0.1 + 0.3j], 0.05, (225, 235, 240))


def _seen_flat(pen: Pen, outer: RGB, inner: RGB) -> None:
    """A rectangle on the ground, as it looks from its long side, and another within it."""
    for grow, rgb in ((1.0, outer), (0.8, inner)):
        pen.polygon([0.45j + grow * p for p in (-0.66 - 0.45j, 0.66 - 0.45j, 1 + 0.5j, -1 + 0.5j)], rgb)


def court(pen: Pen, colour: str) -> None:
    _seen_flat(pen, (60, 120, 80) if colour != "green" else (150, 75, 60), pen.colour(colour))
    for x in (-0.4, 0.4):
        pen.line([complex(x * 0.7, 0.15), complex(x, 0.8)], 0.04, WHITE)
    pen.box(0.35j, 1.5, 0.2, DARK)
    pen.line([-0.75 + 0.24j, 0.75 + 0.24j], 0.05, WHITE)


def pool(pen: Pen, colour: str) -> None:
    _seen_flat(pen, (222, 214, 196), pen.near({"blue": (60, 160, 220), "green": (70, 185, 150)}[colour]))
    for x in (0.5, 0.66):
        pen.line([complex(x, 0.7), complex(x, -0.15)], 0.05, (150, 155, 160))


def pitch(pen: Pen, colour: str) -> None:
    _seen_flat(pen, pen.colour(colour), (80, 155, 66))
    pen.line([0.1j, 0.85j], 0.04, WHITE)
    for x in (-0.72, 0.72):
        pen.line([complex(x, 0.65), complex(x, 0.1), complex(x * 0.75, 0.0), complex(x * 0.75, 0.45)], 0.07, WHITE)


def field(pen: Pen, colour: str) -> None:
    rgb = pen.colour(colour)
    _seen_flat(pen, rgb, rgb)
    for x in np.linspace(-0.9, 0.9, 8):
        pen.line([complex(x * 0.66, 0), complex(x, 0.95)], 0.06, darker(rgb, 0.7))
