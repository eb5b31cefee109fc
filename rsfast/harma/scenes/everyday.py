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
    "baseball": Kind("baseball", side.baseball, "white orange brown", LAND, "a park"),
    "roundabout": Kind("roundabout", side.roundabout, "red blue yellow green", "grass sand soil", "a playground"),
    "round table": Kind("round table", side.round_table, "brown white green yellow", LAND, "a farm"),
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
SKY = ("under the sun", "under white clouds")
LAND_DETAILS = (
    *SKY, "near some trees", "between dense trees", "beside a long building", "beside a grey road",
    "beside a narrow road", "beside a narrow path", "beside white waves", "beside the calm sea", "in an open area",
)  # fmt: skip
WATER_DETAILS = (*SKY, "beside a wooden pier", "near a sandy shore", "far from the land")
HORIZON = -0.25
STRIPS = {  # what lies on the horizon, and how far it reaches below it
    "beside a grey road": ("asphalt", 0.16), "beside a narrow road": ("asphalt", 0.07),
    "beside a narrow path": ("sand", 0.06), "beside white waves": ("water", 0.22),
    "beside the calm sea": ("water", 0.22), "near a sandy shore": ("sand", 0.1),
}  # fmt: skip


def backdrop(pen: Pen, detail: str) -> None:
    """The sky, and what lies or stands on the horizon or hangs above it."""
    pen.texture([-1 - 1j, 1 - 1j, complex(1, HORIZON), complex(-1, HORIZON)], "sky")
    if detail in STRIPS:
        ground, depth = STRIPS[detail]
        pen.texture([complex(x, HORIZON + y) for x, y in ((-1, 0), (1, 0), (1, depth), (-1, depth))], ground)
    if detail == "under the sun":
        pen.disc(complex(pen.rng.uniform(-0.6, 0.6), -0.72), 0.17, (250, 214, 80))
    elif detail == "under white clouds":
        for x in pen.rng.uniform(-0.2, 0.2) + np.array([-0.5, 0.45]):
            for beside, radius in ((-0.15, 0.1), (0, 0.14), (0.16, 0.1)):
                pen.disc(complex(x + beside, -0.7), radius, (248, 250, 252), flat=0.8)
    elif detail in ("near some trees", "between dense trees"):
        for x in np.arange(-0.95, 1, 0.34 if detail == "near some trees" else 0.13):
            tree = pen.moved(complex(x + pen.rng.uniform(-0.06, 0.06), HORIZON - 0.16), scale=0.19)
            side.tree(tree, "green")
    elif detail == "beside a long building":
        pen.box(complex(0, HORIZON - 0.16), 1.6, 0.34, pen.near((186, 176, 164)))
        for x in np.arange(-0.68, 0.7, 0.17):
            pen.box(complex(x, HORIZON - 0.17), 0.09, 0.12, (110, 132, 152))
    elif detail in ("beside a grey road", "beside white waves"):
        for x in np.arange(-0.9, 1, 0.3):
            pen.line([complex(x, HORIZON + 0.08), complex(x + 0.16, HORIZON + 0.08)], 0.025, side.WHITE)
    elif detail == "beside a wooden pier":
        pen.box(complex(0, HORIZON - 0.02), 2, 0.06, side.WOOD)
        for x in np.arange(-0.9, 1, 0.3):
            pen.box(complex(x, HORIZON + 0.04), 0.05, 0.14, side.WOOD)


def draw(label: str, size: int, rng: np.random.Generator) -> tuple[Pen, Facts]:
    kind = THINGS[label]
    count, arrangement = count_and_arrangement(rng, most=kind.most)
    colour, ground = pick(rng, kind.colours), pick(rng, kind.grounds)
    detail = str(rng.choice(WATER_DETAILS if ground == "water" else LAND_DETAILS))
    pen = Pen(size, ground, rng)
    backdrop(pen, detail)
    spots, room = places(count, arrangement, rng)
    flying = label == "plane"
    for spot in sorted(spots, key=lambda p: p.imag):
        depth = 1 + 0.25 * spot.imag  # farther things are smaller
        at = complex(spot.real, (-0.2 if flying else 0.32) + 0.62 * spot.imag)
        kind.draw(pen.moved(at, scale=0.92 * room * depth), colour)
    where = {"plane": "above", "train": "on rails through"}.get(label, "in" if ground == "water" else "on")
    setting = f"{where} the {ground}"
    return pen, kind.facts(label, count, colour, arrangement, ground, setting, detail)
