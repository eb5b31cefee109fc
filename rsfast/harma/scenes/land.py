"""Aerial scenes that are a piece of land as a whole, and what moves or stands on it."""

from __future__ import annotations

import cmath
import math

import numpy as np

from rsfast.harma.scenes.above import ASPHALT, DARK, WHITE, car, tree_top
from rsfast.harma.scenes.pen import Pen, darker
from rsfast.harma.scenes.things import Facts, pick, places

CAR_COLOURS = "red blue white yellow"


def winding(rng: np.random.Generator, *, bend: float) -> np.ndarray:
    x = np.linspace(-1.6, 1.6, 40)
    return x + 1j * bend * np.sin(2.2 * x + rng.uniform(0, 6.28))


def cars_along(pen: Pen, line: np.ndarray, count: int, colour: str, *, lane: float, scale: float) -> None:
    """Cars at even steps along a line, in two lanes that run opposite ways."""
    inside = np.flatnonzero(np.abs(line) < 0.8)
    for i, at in enumerate(np.linspace(inside[0], inside[-1], count + 2)[1:-1].round().astype(int)):
        ahead = (line[at + 1] - line[at - 1]) / abs(line[at + 1] - line[at - 1])
        side = 1 if i % 2 else -1
        car(pen.moved(line[at] + side * lane * 1j * ahead, scale=scale, angle=cmath.phase(side * ahead)), colour)


def river(pen_on, rng):
    ground, colour, count = (
        pick(rng, "grass forest sand snow"),
        pick(rng, "white red grey brown"),
        int(rng.integers(1, 4)),
    )
    bend = rng.choice([0.0, 0.28])
    pen, line = pen_on(ground), winding(rng, bend=bend)
    pen.band(line, 0.62, "sand" if ground != "sand" else "soil")
    pen.band(line, 0.5, "water")
    for x in (np.arange(count) - (count - 1) / 2) * 0.6:
        middle = line[np.abs(line.real - x).argmin()]
        bridge = pen.moved(middle, angle=rng.normal(0, 0.1))
        bridge.box(0, 0.17, 0.86, bridge.colour(colour), shadow=0.04)
        bridge.line([-0.43j, 0.43j], 0.02, DARK)
    kind = "winding" if bend else "straight"
    return pen, Facts(
        "river",
        "bridge",
        "bridges",
        count,
        colour,
        None,
        ground,
        f"over a river in the {ground}",
        f"a {kind} river",
        "between two banks",
    )


def bridge(pen_on, rng):
    colour, count = pick(rng, CAR_COLOURS), int(rng.integers(1, 6))
    pen, line = pen_on("water"), winding(rng, bend=0.0)
    banks = bool(rng.integers(2))
    if banks:
        for side in (-1, 1):
            pen.texture([side * (0.72 - 2j), side * 3 - 2j, side * 3 + 2j, side * (0.72 + 2j)], "grass")
    pen.box(0.06 + 0.09j, 3, 0.6, (30, 62, 92))
    pen.box(0, 3, 0.6, pen.near((205, 203, 198)))
    pen.box(0, 3, 0.48, ASPHALT)
    pen.line([-2, 2], 0.015, WHITE)
    cars_along(pen, line, count, colour, lane=0.12, scale=0.17)
    detail = "between two green banks" if banks else "far from the land"
    return pen, Facts(
        "bridge", "car", "cars", count, colour, None, "water", "on a bridge over the water", "a long bridge", detail
    )


def road(pen_on, rng):
    ground, colour, count = (
        pick(rng, "grass forest sand snow"),
        pick(rng, CAR_COLOURS),
        int(rng.integers(1, 5)),
    )
    bend = rng.choice([0.0, 0.28])
    pen, line = pen_on(ground), winding(rng, bend=bend)
    pen.band(line, 0.58, "asphalt")
    for start in range(0, 38, 2):
        pen.line(line[start : start + 2], 0.025, WHITE)
    crossing = not bend and bool(rng.integers(2))
    if crossing:
        pen.band(1j * line, 0.5, "asphalt")
    cars_along(pen, line, count, colour, lane=0.13, scale=0.19)
    place = "a crossroads" if crossing else "a curved road" if bend else "a straight road"
    detail = "at a crossing" if crossing else "in a bend" if bend else "along a straight line"
    return pen, Facts(
        "road", "car", "cars", count, colour, None, ground, f"on a road through the {ground}", place, detail
    )


def roundabout(pen_on, rng):
    ground, colour, count = (
        pick(rng, "grass sand snow"),
        pick(rng, CAR_COLOURS),
        int(rng.integers(1, 6)),
    )
    pen = pen_on(ground)
    for turn in (1, 1j):
        pen.band(np.linspace(-1.6, 1.6, 8) * turn, 0.34, "asphalt")
    pen.disc(0, 0.74, ASPHALT)
    trees = bool(rng.integers(2))
    pen.disc(0, 0.32, pen.near((100, 150, 72)))
    if trees:
        for a in range(5):
            tree_top(pen, 0.18 * cmath.exp(1.257j * a), 0.09)
    for a in rng.uniform(0, 6.28) + np.arange(count) * 2 * math.pi / count:
        car(pen.moved(0.53 * cmath.exp(1j * a), scale=0.19, angle=a + math.pi / 2), colour)
    detail = "around some trees" if trees else "around a green circle"
    return pen, Facts(
        "roundabout",
        "car",
        "cars",
        count,
        colour,
        None,
        ground,
        f"on a roundabout in the {ground}",
        "a roundabout",
        detail,
    )


def railway(pen_on, rng):
    ground, colour = (
        pick(rng, "grass sand soil snow"),
        pick(rng, "red blue white green"),
    )
    tracks, count = int(rng.integers(2, 5)), int(rng.integers(1, 3))
    pen, rows = pen_on(ground), (np.arange(tracks) - (tracks - 1) / 2) * 0.36
    for y in rows:
        pen.box(complex(0, y), 3.2, 0.27, pen.near((122, 112, 104)))
        for x in np.arange(-1.5, 1.5, 0.12):
            pen.box(complex(x, y), 0.035, 0.2, (88, 70, 58))
        for side in (-0.06, 0.06):
            pen.line([complex(-2, y + side), complex(2, y + side)], 0.02, (196, 198, 202))
    for y in rng.permutation(rows)[:count]:
        head, rgb = rng.uniform(-0.1, 0.3), pen.colour(colour)
        for i in range(3):
            pen.box(complex(head + 0.36 - 0.42 * i, y), 0.38, 0.2, rgb, shadow=0.03)
            pen.box(complex(head + 0.36 - 0.42 * i, y), 0.26, 0.06, darker(rgb))
    detail = f"with {('two', 'three', 'four')[tracks - 2]} tracks"
    return pen, Facts(
        "railway", "train", "trains", count, colour, None, ground, f"on rails through the {ground}", "a railway", detail
    )


def beach(pen_on, rng):
    colour, count = pick(rng, "red blue yellow green orange"), int(rng.integers(1, 7))
    pen = pen_on("sand")
    wave = 0.06 * np.sin(np.linspace(0, 11, 30) + rng.uniform(0, 6.28))
    shore = np.linspace(2, -2, 30) + 1j * (wave - 0.15)
    waves = bool(rng.integers(2))
    pen.texture([-2 - 2j, 2 - 2j, *shore], "water")
    for depth in (0.0, 0.14, 0.3)[: 3 if waves else 1]:
        pen.line(shore - 1j * depth, 0.045, (232, 240, 242))
    for i in range(count):
        at = complex(
            (i - (count - 1) / 2) * min(0.32, 1.5 / count), 0.36 + (0.22 if i % 2 else 0) + rng.uniform(-0.04, 0.04)
        )
        pen.disc(at, 0.14, pen.colour(colour), shadow=0.05)
        for a in range(0, 6, 2):
            wedge = at + 0.14 * np.exp(1j * np.linspace(a * 1.047, (a + 1) * 1.047, 5))
            pen.polygon([at, *wedge], (244, 240, 232))
    detail = "beside white waves" if waves else "beside the calm sea"
    return pen, Facts("beach", "umbrella", "umbrellas", count, colour, None, "sand", "on the sand", "a beach", detail)


def farmland(pen_on, rng):
    colour, count = pick(rng, "yellow green brown purple"), int(rng.integers(1, 5))
    ground = pick(rng, "soil grass")
    pen, road_between = pen_on(ground), bool(rng.integers(2))
    for i in range(count):
        centre = complex((i % 2 - 0.5) * 0.86 if count > 1 else 0, (i // 2 - 0.5) * 0.86 if count > 2 else 0)
        field, rgb = pen.moved(centre, angle=rng.normal(0, 0.04)), pen.colour(colour)
        field.box(0, 0.74, 0.74, rgb)
        for x in np.linspace(-0.32, 0.32, 7):
            field.line([x - 0.36j, x + 0.36j], 0.035, darker(rgb, 0.8))
    if road_between:
        pen.band(np.linspace(-1.6, 1.6, 8) + (0j if count > 2 else 0.55j), 0.1, "asphalt")
    detail = "beside a narrow road" if road_between else "in an open area"
    return pen, Facts(
        "farmland",
        "striped field",
        "striped fields",
        count,
        colour,
        None,
        ground,
        f"on the {ground}",
        "farmland",
        detail,
    )


def forest(pen_on, rng):
    colour, count = pick(rng, "blue green brown"), int(rng.integers(1, 5))
    pen, path = pen_on("forest"), bool(rng.integers(2))
    for _ in range(70):
        tree_top(pen, complex(*rng.uniform(-1, 1, 2)), rng.uniform(0.07, 0.13))
    if path:
        pen.band(winding(rng, bend=0.15) + 0.1j, 0.07, "sand")
    spots, room = places(count, "scattered", rng)
    for spot in spots:
        rgb, lobes = (
            pen.near({"blue": (62, 128, 190), "green": (84, 170, 120), "brown": (128, 96, 62)}[colour]),
            rng.uniform(0, 6.28),
        )
        a = np.linspace(0, 2 * math.pi, 30, endpoint=False)
        pond = spot + room * (0.8 + 0.16 * np.sin(3 * a + lobes)) * np.exp(1j * a)
        pen.polygon(spot + 1.12 * (pond - spot), (150, 140, 96))
        pen.polygon(pond, rgb)
    detail = "beside a narrow path" if path else "between dense trees"
    return pen, Facts("forest", "pond", "ponds", count, colour, None, "forest", "in the forest", "a forest", detail)


LAND = {
    "river": river,
    "bridge": bridge,
    "road": road,
    "roundabout": roundabout,
    "railway": railway,
    "beach": beach,
    "farmland": farmland,
    "forest": forest,
}
