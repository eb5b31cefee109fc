"""The drawn scenes: the same every time, apart where they should be, and as their captions say."""

import hashlib
import re

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from rsfast.harma.scenes import DOMAINS, SPLITS, draw_scene, labels
from rsfast.harma.scenes.pen import COLOURS
from rsfast.harma.scenes.things import ARRANGEMENTS, NUMBERS, count_and_arrangement, places

DOMAIN_NAMES = tuple(DOMAINS)


def digest(scene):
    return hashlib.sha256(scene.image.tobytes()).hexdigest()


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_the_same_arguments_draw_the_same_scene(domain):
    for index in (0, 7, 31):
        first, again = (draw_scene(domain, "val", index, seed=3, size=48) for _ in range(2))
        assert digest(first) == digest(again) and first[1:] == again[1:]


def test_domains_splits_seeds_and_indices_share_nothing():
    seen = [
        digest(draw_scene(domain, split, index, seed=seed, size=32))
        for domain in DOMAIN_NAMES
        for split in SPLITS
        for seed in (0, 1)
        for index in range(20)
    ]
    assert len(set(seen)) == len(seen)


def test_the_size_changes_pixels_only():
    for index in range(18):
        small, large = (draw_scene("aerial", "test", index, size=size) for size in (48, 144))
        assert small[1:] == large[1:]
        shrunk = large.image.resize((48, 48), Image.Resampling.BOX)
        apart = np.abs(np.asarray(shrunk, float) - np.asarray(small.image, float)).mean()
        other = np.asarray(draw_scene("aerial", "test", index + 1, size=48).image, float)
        assert apart < 0.25 * np.abs(other - np.asarray(small.image, float)).mean()


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_captions_say_what_the_facts_say(domain):
    for index in range(4 * len(labels(domain))):
        _, captions, facts = draw_scene(domain, "train", index, size=16)
        assert len(captions) == len(set(captions)) == 5
        number = "an?" if facts.count == 1 else NUMBERS[facts.count]
        noun = facts.thing if facts.count == 1 else facts.things
        counted = re.compile(rf"\b{number} ({facts.colour} )?{noun}\b")
        for caption in captions:
            assert counted.search(caption), (caption, facts)
            assert len(caption.split()) <= 17
            said = [phrase for phrase in ARRANGEMENTS if re.search(rf"\b{phrase}\b", caption)]
            assert said in ([], [facts.arrangement]), (caption, facts)
        assert sum(bool(facts.colour in caption.split()) for caption in captions) >= 3


@pytest.mark.parametrize("label", ["airport", "forest"])
def test_as_many_things_of_that_colour_are_drawn_as_the_facts_say(label):
    """Count the patches whose hue is that of the colour named."""
    place, checked = labels("aerial").index(label), 0
    for index in range(place, 60 * len(labels("aerial")), len(labels("aerial"))):
        scene = draw_scene("aerial", "train", index, size=128)
        facts = scene.facts
        if (label, facts.colour) not in {("airport", "red"), ("airport", "yellow"), ("forest", "blue")}:
            continue
        hsv = np.asarray(scene.image.convert("HSV")).astype(int)
        wanted = Image.new("RGB", (1, 1), COLOURS[facts.colour]).convert("HSV").getpixel((0, 0))[0]
        hue = np.abs((hsv[..., 0] - wanted + 128) % 256 - 128)
        mask = (hue < 18) & (hsv[..., 1] > (140 if label == "airport" else 90)) & (hsv[..., 2] > 90)
        patches, found = ndimage.label(ndimage.binary_closing(mask))
        sizes = ndimage.sum_labels(mask, patches, range(1, found + 1))
        assert (sizes > 60).sum() == facts.count, (index, facts, sizes)
        checked += 1
    assert checked >= 10


def test_things_stand_where_the_arrangement_puts_them_and_apart():
    rng = np.random.default_rng(0)
    for _ in range(300):
        count, arrangement = count_and_arrangement(rng, most=6)
        spots, room = places(count, arrangement, rng)
        assert arrangement in ARRANGEMENTS and len(spots) == count and room > 0.15
        assert max(abs(spot) for spot in spots) < 0.95  # in the picture at any turn
        nearest = min((abs(a - b) for i, a in enumerate(spots) for b in spots[:i]), default=2)
        assert nearest > 1.6 * room, (arrangement, spots, room)


def test_classes_take_turns_and_look_different():
    """Nearest neighbours in colours alone find the class far more often than chance."""

    def colours(split, count):
        scenes = [draw_scene("aerial", split, index, size=32) for index in range(count * len(labels("aerial")))]
        assert [s.facts.label for s in scenes[: len(labels("aerial"))]] == list(labels("aerial"))
        pixels = [(np.asarray(s.image) // 52).reshape(-1, 3) @ (1, 5, 25) for s in scenes]
        return np.sqrt([np.bincount(p, minlength=125) for p in pixels]), np.array([s.facts.label for s in scenes])

    (known, names), (asked, truth) = colours("train", 12), colours("test", 3)
    nearest = ((asked[:, None] - known[None]) ** 2).sum(-1).argmin(1)
    assert len(labels("aerial")) >= 12
    assert (names[nearest] == truth).mean() > 5 / len(labels("aerial"))


def test_bad_arguments_are_named():
    for arguments, word in (
        (("martian", "train", 0), "domain"),
        (("aerial", "dev", 0), "split"),
        (("aerial", "train", -1), "index"),
    ):
        with pytest.raises(ValueError, match=word):
            draw_scene(*arguments)
    with pytest.raises(ValueError, match="size"):
        draw_scene("aerial", "train", 0, size=8)
