"""Scenes as an aircraft sees them: straight from above, at any turn."""

from __future__ import annotations

import cmath
import math

import numpy as np

from rsfast.harma.scenes.pen import Pen, darker
from rsfast.harma.scenes.things import Facts, count_and_arrangement, places

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


# label: the thing, the things, how to draw one, how many at most, colours, grounds, place, do they share a direction
THINGS = {
    "airport": ("plane", "planes", plane, 6, ("white", "blue", "red", "yellow"), ("concrete", "asphalt", "grass"), "an airport", True),
    "storage tanks": ("storage tank", "storage tanks", tank, 6, ("white", "grey", "green", "brown"), ("soil", "concrete", "grass"), "an industrial area", True),
    "tennis": ("tennis court", "tennis courts", tennis_court, 4, ("blue", "green", "orange", "purple"), ("grass", "concrete"), "a sports club", True),
    "harbour": ("boat", "boats", boat, 6, ("white", "red", "yellow", "brown"), ("water",), "a harbour", True),
    "houses": ("house", "houses", house, 6, ("red", "grey", "brown", "blue"), ("grass", "soil", "snow"), "a village", False),
    "parking": ("car", "cars", car, 6, ("red", "blue", "white", "yellow"), ("asphalt", "concrete"), "a parking lot", True),
    "pools": ("swimming pool", "swimming pools", pool, 4, ("blue", "green"), ("grass", "concrete"), "a holiday resort", False),
    "baseball": ("baseball field", "baseball fields", diamond, 4, ("orange", "brown"), ("grass", "soil"), "a park", False),
    "football": ("football field", "football fields", pitch, 2, ("red", "blue", "grey", "orange"), ("grass", "concrete"), "a stadium", True),
    "round fields": ("round field", "round fields", pivot, 6, ("green", "brown", "yellow"), ("sand", "soil"), "a desert farm", False),
}  # fmt: skip
EDGES = ("beside a grey road", "near some trees", "beside a long building", "in an open area")
SHORES = ("beside a wooden pier", "near a sandy shore", "far from the land")


def tree_top(pen: Pen, where: complex, radius: float) -> None:
    rgb = pen.near((52, 104, 50))
    pen.disc(where, radius, rgb, shadow=0.03)
    pen.disc(where - radius * (0.25 + 0.25j), 0.55 * radius, tuple(c + 18 for c in rgb))


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
    thing, plural, draw, most, colours, grounds, place, aligned = THINGS[label]
    count, arrangement = count_and_arrangement(rng, most=most)
    colour, ground = str(rng.choice(colours)), str(rng.choice(grounds))
    detail = str(rng.choice(SHORES if ground == "water" else EDGES))
    pen = pen_on(ground)
    edge(pen, detail)
    heading = (
        rng.uniform(0, 2 * math.pi) if arrangement in ("in the middle", "in a corner", "scattered") else math.pi / 2
    )
    spots, room = places(count, arrangement, rng)
    for spot in spots:
        angle = (heading + rng.normal(0, 0.06)) if aligned else rng.uniform(0, 2 * math.pi)
        draw(pen.moved(spot, scale=room * rng.uniform(0.86, 0.94), angle=angle), colour)
    setting = f"{'in' if ground == 'water' else 'on'} the {ground}"
    return pen, Facts(label, thing, plural, count, colour, arrangement, ground, setting, place, detail)


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
        str(rng.choice(["grass", "forest", "sand", "snow"])),
        str(rng.choice(["white", "red", "grey", "brown"])),
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
        f"across a {kind} stream of water",
    )


def bridge(pen_on, rng):
    colour, count = str(rng.choice(["red", "blue", "white", "yellow"])), int(rng.integers(1, 6))
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
        str(rng.choice(["grass", "forest", "sand", "snow"])),
        str(rng.choice(["red", "blue", "white", "yellow"])),
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
        str(rng.choice(["grass", "sand", "snow"])),
        str(rng.choice(["red", "blue", "white", "yellow"])),
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
        str(rng.choice(["grass", "sand", "soil", "snow"])),
        str(rng.choice(["red", "blue", "white", "green"])),
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
    colour, count = str(rng.choice(["red", "blue", "yellow", "green", "orange"])), int(rng.integers(1, 7))
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
    colour, count = str(rng.choice(["yellow", "green", "brown", "purple"])), int(rng.integers(1, 5))
    ground = str(rng.choice(["soil", "grass"]))
    pen, road_between = pen_on(ground), bool(rng.integers(2))
    for i in range(count):
        centre = complex((i % 2 - 0.5) * 0.86 if count > 1 else 0, (i // 2 - 0.5) * 0.86 if count > 2 else 0)
        field, rgb = pen.moved(centre, angle=rng.normal(0, 0.04)), pen.colour(colour)
        field.box(0, 0.74, 0.74, rgb)
        for x in np.linspace(-0.32, 0.32, 7):
            field.line([x - 0.36j, x + 0.36j], 0.035, darker(rgb, 0.8))
    if road_between:
        pen.band(np.linspace(-1.6, 1.6, 8) + (0j if count > 2 else 0.55j), 0.1, "asphalt")
    detail = "along a narrow road" if road_between else "in the open country"
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
    colour, count = str(rng.choice(["blue", "green", "brown"])), int(rng.integers(1, 5))
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
LABELS = (*THINGS, *LAND)


def draw(label: str, size: int, rng: np.random.Generator) -> tuple[Pen, Facts]:
    angle = rng.uniform(0, 2 * math.pi)

    def pen_on(ground: str) -> Pen:
        return Pen(size, ground, rng, angle=angle)

    return LAND[label](pen_on, rng) if label in LAND else draw_things(pen_on, rng, label)
