"""What a scene is made of: how many things of what colour stand where on what ground, and the captions that say so."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rsfast.harma.scenes.pen import Pen

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
ARRANGEMENTS = (
    "in the middle", "in a corner", "side by side", "far apart", "in a row", "in a triangle", "in two rows",
    "in a ring", "scattered",
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """All that the captions of a scene may say.

    Attributes:
        label: Class of the scene.
        things: Name of the things counted, in the plural; ``thing`` is the singular.
        count: How many were drawn.
        colour: Their colour, or None where it is not worth a word.
        arrangement: One of :data:`ARRANGEMENTS`, or None where the class leaves no choice.
        ground: Name of what covers the ground.
        setting: Where the things are, such as "on the grass" or "over a river in the forest".
        place: What the scene is as a whole, such as "an airport".
        detail: One thing more to be seen, such as "beside a long building".
    """

    label: str
    thing: str
    things: str
    count: int
    colour: str | None
    arrangement: str | None
    ground: str
    setting: str
    place: str
    detail: str


@dataclass(frozen=True)
class Kind:
    """A kind of scene that is some number of the same thing on some ground.

    Attributes:
        thing: Its name.
        draw: Draws one, given a pen and the name of a colour.
        colours: Names, with spaces between.
        grounds: Likewise.
        place: What such a scene is as a whole.
        most: How many there are at most.
        aligned: Whether all head the same way.
        plural: Where an s is not enough.
    """

    thing: str
    draw: Callable[[Pen, str], None]
    colours: str
    grounds: str
    place: str
    most: int = 6
    aligned: bool = False
    plural: str | None = None

    def facts(self, label, count, colour, arrangement, ground, setting, detail) -> Facts:
        things = self.plural or f"{self.thing}s"
        return Facts(label, self.thing, things, count, colour, arrangement, ground, setting, self.place, detail)


def pick(rng: np.random.Generator, words: str) -> str:
    """One of the words."""
    return str(rng.choice(words.split()))


def some(facts: Facts, *, colour: bool) -> str:
    """ "a red car", "three red cars", "three cars": the things counted, with or without their colour."""
    words = [facts.colour] if colour and facts.colour else []
    if facts.count == 1:
        noun = " ".join([*words, facts.thing])
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    return " ".join([NUMBERS[facts.count], *words, facts.things])


def captions(facts: Facts, rng: np.random.Generator, *, number: int = 5) -> list[str]:
    """Different true sentences about a scene; most leave something out, as people do."""
    full, plain = some(facts, colour=True), some(facts, colour=False)
    are = "is" if facts.count == 1 else "are"
    where = f" {facts.arrangement}" if facts.arrangement else ""
    on = facts.setting
    sentences = [
        f"{full}{where} {on}",
        f"{full} {on} {facts.detail}",
        f"there {are} {full}{where}",
        f"there {are} {plain}{where} {on}",
        f"{facts.place} with {full}",
        f"{facts.place} with {plain}{where} {facts.detail}",
        f"{full}{where} {facts.detail}",
        f"{on}, {full} {are} seen{where}",
    ]
    return [sentences[i] for i in rng.permutation(len(sentences))[:number]]


def count_and_arrangement(rng: np.random.Generator, *, most: int) -> tuple[int, str]:
    """A number of things from 1 to ``most``, and an arrangement that such a number can show."""
    count = int(rng.integers(1, most + 1))
    fitting = {
        1: ("in the middle", "in a corner"),
        2: ("side by side", "far apart"),
        3: ("in a row", "in a triangle"),
        4: ("in two rows", "in a row", "scattered"),
        5: ("in a ring", "scattered"),
        6: ("in two rows", "in a ring"),
    }[count]
    return count, str(rng.choice(fitting))


def places(count: int, arrangement: str, rng: np.random.Generator) -> tuple[list[complex], float]:
    """Where the things go, in the square from -1 to 1, and the room that each has around its centre."""
    if arrangement == "in the middle":
        return [complex(*rng.uniform(-0.12, 0.12, 2))], 0.55
    if arrangement == "in a corner":
        return [complex(*rng.choice((-0.5, 0.5), 2))], 0.42
    if arrangement in ("in a row", "side by side"):
        y, step = rng.uniform(-0.25, 0.25), {2: 0.8, 3: 0.58, 4: 0.44}[count]
        return [complex((i - (count - 1) / 2) * step, y) for i in range(count)], step / 2 + 0.02
    if arrangement == "far apart":
        first = 0.62 * cmath.exp(1j * rng.uniform(0, 2 * math.pi))
        return [first, -first], 0.33
    if arrangement == "in two rows":
        columns, step = count // 2, min(0.8, 1.6 / (count // 2))
        return [
            complex((i - (columns - 1) / 2) * step, y) for y in (-0.4, 0.4) for i in range(columns)
        ], 0.26 if columns == 3 else 0.36
    if arrangement in ("in a ring", "in a triangle"):
        start, room = rng.uniform(0, 2 * math.pi), 0.36 if count == 3 else 0.3
        radius = 0.5 if count == 3 else 0.6
        return [cmath.rect(radius, start + 2 * math.pi * i / count) for i in range(count)], room
    cells = rng.permutation(9)[:count]
    spots = [complex(c % 3 - 1, c // 3 - 1) * 0.58 + complex(*rng.uniform(-0.05, 0.05, 2)) for c in cells]
    return [p * min(1, 0.72 / abs(p)) for p in spots], 0.24  # inside the circle that any turn keeps in the picture
