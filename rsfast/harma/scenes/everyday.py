"""Scenes as a pedestrian sees them: from the side, upright, ground below and sky above."""

from __future__ import annotations

import numpy as np

from rsfast.harma.scenes import side
from rsfast.harma.scenes.pen import Pen
from rsfast.harma.scenes.things import Facts, Kind, count_and_arrangement, pick, places

LAND = "grass sand soil snow concrete"
BRIGHT = "red blue white yellow orange purple green"
THINGS = {
    "house": Kind("house", side.house, "red grey brown blue", LAND, "a village"),
    "tree": Kind("tree", side.tree, "green orange brown yellow", LAND, "a park"),
    "car": Kind("car", side.car, BRIGHT, "asphalt concrete sand snow", "a road"),
    "person": Kind("person", side.person, BRIGHT, LAND, "a meeting", plural="people"),
    "flower": Kind("flower", side.flower, BRIGHT, "grass soil", "a garden"),
    "boat": Kind("boat", side.boat, BRIGHT, "water", "a harbour"),
    "table": Kind("table", side.table, "brown white green blue grey", LAND, "a picnic"),
    "ball": Kind("ball", side.ball, BRIGHT, LAND, "a playground"),
    "umbrella": Kind("umbrella", side.umbrella, "red blue yellow green orange", "sand grass", "a beach"),
    "train": Kind("train", side.train, "red blue white green", "grass sand soil snow", "a railway"),
    "plane": Kind("plane", side.plane, "white blue red yellow", "concrete asphalt grass", "an airport"),
    "tank": Kind("storage tank", side.tank, "white grey green brown", LAND, "an industrial area"),
    "bridge": Kind("bridge", side.bridge, "white red grey brown", "water", "a river"),
    "pond": Kind("pond", side.pond, "blue green brown", "grass forest soil", "a forest"),
    "tennis": Kind("tennis court", side.court, "blue green orange purple", "grass concrete", "a sports club"),
    "pool": Kind("swimming pool", side.pool, "blue green", "grass concrete", "a holiday resort"),
    "football": Kind("football field", side.pitch, "red blue grey orange", "grass concrete", "a stadium"),
    "field": Kind("striped field", side.field, "yellow green brown purple", "soil grass", "farmland"),
}
LABELS = tuple(THINGS)
DETAILS = ("under the sun", "under white clouds", "near some trees", "beside a long building", "in an open area")
HORIZON = -0.25


def backdrop(pen: Pen, detail: str) -> None:
    """The sky, and what stands on the horizon or hangs above it."""
    pen.texture([-1 - 1j, 1 - 1j, complex(1, HORIZON), complex(-1, HORIZON)], "sky")
    x = pen.rng.uniform(-0.6, 0.6)
    if detail == "under the sun":
        pen.disc(complex(x, -0.72), 0.17, (250, 214, 80))
    elif detail == "under white clouds":
        for dx in (-0.5, 0.45):
            for ddx, r in ((-0.15, 0.1), (0, 0.14), (0.16, 0.1)):
                pen.disc(complex(x / 3 + dx + ddx, -0.7), r, (248, 250, 252), flat=0.8)
    elif detail == "near some trees":
        for at in np.arange(-0.85, 1, 0.34):
            side.tree(pen.moved(complex(at + pen.rng.uniform(-0.08, 0.08), HORIZON - 0.16), scale=0.19), "green")
    elif detail == "beside a long building":
        pen.box(complex(0, HORIZON - 0.16), 1.6, 0.34, pen.near((186, 176, 164)))
        for at in np.arange(-0.68, 0.7, 0.17):
            pen.box(complex(at, HORIZON - 0.17), 0.09, 0.12, (110, 132, 152))


def draw(label: str, size: int, rng: np.random.Generator) -> tuple[Pen, Facts]:
    kind = THINGS[label]
    count, arrangement = count_and_arrangement(rng, most=kind.most)
    colour, ground, detail = pick(rng, kind.colours), pick(rng, kind.grounds), str(rng.choice(DETAILS))
    pen = Pen(size, ground, rng)
    backdrop(pen, detail)
    spots, room = places(count, arrangement, rng)
    flying = label == "plane"
    for spot in sorted(spots, key=lambda p: p.imag):
        depth = 1 + 0.25 * spot.imag  # farther things are smaller
        where = complex(spot.real, (-0.2 if flying else 0.32) + 0.62 * spot.imag)
        kind.draw(pen.moved(where, scale=0.92 * room * depth), colour)
    setting = f"above the {ground}" if flying else f"{'in' if ground == 'water' else 'on'} the {ground}"
    return pen, kind.facts(label, count, colour, arrangement, ground, setting, detail)
