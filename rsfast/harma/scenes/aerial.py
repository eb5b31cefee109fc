"""Scenes as an aircraft sees them: straight from above, at any turn."""

from __future__ import annotations

import math

import numpy as np

from rsfast.harma.scenes import above
from rsfast.harma.scenes.above import WHITE, WOOD, tree_top
from rsfast.harma.scenes.land import LAND
from rsfast.harma.scenes.pen import Pen
from rsfast.harma.scenes.things import Facts, Kind, count_and_arrangement, pick, places

THINGS = {
    "airport": Kind(
        "plane", above.plane, "white blue red yellow", "concrete asphalt grass", "an airport", aligned=True
    ),
    "storage tanks": Kind(
        "storage tank", above.tank, "white grey green brown", "soil concrete grass", "an industrial area", aligned=True
    ),
    "tennis": Kind(
        "tennis court",
        above.tennis_court,
        "blue green orange purple",
        "grass concrete",
        "a sports club",
        most=4,
        aligned=True,
    ),
    "harbour": Kind("boat", above.boat, "white red yellow brown", "water", "a harbour", aligned=True),
    "houses": Kind("house", above.house, "red grey brown blue", "grass soil snow", "a village"),
    "parking": Kind("car", above.car, "red blue white yellow", "asphalt concrete", "a parking lot", aligned=True),
    "pools": Kind("swimming pool", above.pool, "blue green", "grass concrete", "a holiday resort", most=4),
    "baseball": Kind("baseball field", above.diamond, "orange brown", "grass soil", "a park", most=4),
    "football": Kind(
        "football field", above.pitch, "red blue grey orange", "grass concrete", "a stadium", most=2, aligned=True
    ),
    "round fields": Kind("round field", above.pivot, "green brown yellow", "sand soil", "a desert farm"),
}
ANY_HEADING = ("in the middle", "in a corner", "scattered")
EDGES = ("beside a grey road", "near some trees", "beside a long building", "in an open area")
SHORES = ("beside a wooden pier", "near a sandy shore", "far from the land")


def edge(pen: Pen, detail: str) -> None:
    """What lies along one side of the picture."""
    along = np.linspace(-1.5, 1.5, 8) - 0.88j
    if detail == "beside a grey road":
        pen.band(along, 0.22, "asphalt")
        for x in np.arange(-1.5, 1.5, 0.25):
            pen.line([x - 0.88j, x + 0.1 - 0.88j], 0.02, WHITE)
    elif detail == "near some trees":
        for x in np.arange(-0.9, 0.95, 0.3):
            tree_top(pen, complex(x, -0.85) + complex(*pen.rng.uniform(-0.07, 0.07, 2)), pen.rng.uniform(0.1, 0.15))
    elif detail == "beside a long building":
        pen.box(-0.87j, 1.5, 0.22, pen.near((196, 190, 182)), shadow=0.07)
        for x in np.arange(-0.6, 0.7, 0.3):
            pen.box(complex(x, -0.87), 0.1, 0.1, (120, 124, 130))
    elif detail == "beside a wooden pier":
        pen.box(-0.87j, 3, 0.14, WOOD, shadow=0.03)
        for x in np.arange(-0.9, 1, 0.45):
            pen.box(complex(x, -0.72), 0.06, 0.2, WOOD)
    elif detail == "near a sandy shore":
        wave = 0.05 * np.sin(np.linspace(0, 9, 24))
        pen.texture([-2 - 2j, 2 - 2j, *(np.linspace(2, -2, 24) + 1j * (wave - 0.8))], "sand")


def draw_things(pen_on, rng: np.random.Generator, label: str) -> tuple[Pen, Facts]:
    kind = THINGS[label]
    count, arrangement = count_and_arrangement(rng, most=kind.most)
    colour, ground = pick(rng, kind.colours), pick(rng, kind.grounds)
    detail = str(rng.choice(SHORES if ground == "water" else EDGES))
    pen = pen_on(ground)
    edge(pen, detail)
    heading = rng.uniform(0, 2 * math.pi) if arrangement in ANY_HEADING else math.pi / 2
    spots, room = places(count, arrangement, rng)
    for spot in spots:
        angle = (heading + rng.normal(0, 0.06)) if kind.aligned else rng.uniform(0, 2 * math.pi)
        kind.draw(pen.moved(spot, scale=room * rng.uniform(0.86, 0.94), angle=angle), colour)
    setting = f"{'in' if ground == 'water' else 'on'} the {ground}"
    return pen, kind.facts(label, count, colour, arrangement, ground, setting, detail)


LABELS = (*THINGS, *LAND)


def draw(label: str, size: int, rng: np.random.Generator) -> tuple[Pen, Facts]:
    angle = rng.uniform(0, 2 * math.pi)

    def pen_on(ground: str) -> Pen:
        return Pen(size, ground, rng, angle=angle)

    return LAND[label](pen_on, rng) if label in LAND else draw_things(pen_on, rng, label)
