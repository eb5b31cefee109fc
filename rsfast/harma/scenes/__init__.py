"""Drawn scenes with captions: aerial ones to adapt to, and everyday ones to learn the words from."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from rsfast.harma.scenes import aerial, everyday
from rsfast.harma.scenes.things import Facts, captions

DOMAINS = {"everyday": everyday, "aerial": aerial}
SPLITS = ("train", "val", "test")


class Scene(NamedTuple):
    image: Image.Image  # RGB, size x size
    captions: list[str]
    facts: Facts


def draw_scene(
    domain: Literal["everyday", "aerial"],
    split: Literal["train", "val", "test"],
    index: int,
    *,
    seed: int = 0,
    size: int = 128,
) -> Scene:
    """Draw one scene and write its captions.

    The same arguments always give the same scene, and no two splits share their random numbers. Classes take turns
    with ``index``.

    Args:
        domain: ``everyday`` is seen upright from the side, ``aerial`` from above at any turn.
        split: Which independent set of scenes.
        index: Number of the scene within its split.
        seed: Another seed is another world.
        size: Pixels a side.

    Returns:
        The image, five true captions, and the facts that they were written from.

    Raises:
        ValueError: The domain or the split is unknown, or a number is out of range.

    Example:
        >>> from rsfast.harma.scenes import draw_scene
        >>> scene = draw_scene("aerial", "train", 0)
        >>> scene.facts.label, scene.image.size, len(scene.captions)
        ('airport', (128, 128), 5)
    """
    for name, value, known in (("domain", domain, tuple(DOMAINS)), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if index < 0 or seed < 0 or size < 16:
        raise ValueError(f"index and seed must not be negative and size at least 16, got {index}, {seed} and {size}")
    rng = np.random.default_rng([seed, tuple(DOMAINS).index(domain), SPLITS.index(split), index])
    labels = DOMAINS[domain].LABELS
    pen, facts = DOMAINS[domain].draw(labels[index % len(labels)], size, rng)
    return Scene(pen.picture(), captions(facts, rng), facts)


def labels(domain: Literal["everyday", "aerial"]) -> tuple[str, ...]:
    """Classes of a domain, in the order in which they take turns."""
    return DOMAINS[domain].LABELS
