"""DOTA's annotations: an oriented box a line, a file an image."""

import math
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np

from rsfast.deblora.data.counts import DOTA_GROUPS
from rsfast.deblora.data.crops import bounds
from rsfast.deblora.data.folders import is_image
from rsfast.deblora.data.rows import SPLITS, Row
from rsfast.harma.images import BrokenImageError, ImageStore

DOTA_CLASSES = tuple(name for names in DOTA_GROUPS.values() for name in names)
HEADS = ("imagesource:", "gsd:")


def label_files(names: Sequence[str], folder: str = "labelTxt") -> list[str]:
    """Those of ``names`` that are annotations: text files in ``folder``, at the top or in the folder of a split."""
    found = []
    for name in names:
        path = PurePosixPath(name)
        inside = [str(PurePosixPath(*path.parts[k:-1])) for k in (0, 1, 2)]
        if path.suffix.lower() == ".txt" and path.name[0] != "." and folder.strip("/") in inside:
            found.append(name)
    return found


def dota_rows(
    labels: ImageStore, images: ImageStore, folder: str, *, difficult: bool, left_out: dict[str, str]
) -> Iterator[Row]:
    """Rows of all annotations; what cannot be cut is named in ``left_out`` instead.

    Raises:
        ValueError: A line is malformed; file and line are named.
    """
    stems: dict[str, list[str]] = {}
    for name in filter(is_image, images.names()):
        stems.setdefault(PurePosixPath(name).stem, []).append(name)
    for file in label_files(labels.names(), folder):
        where = f"{labels.root}/{file}"
        boxes = list(_boxes(labels.read(file), where))  # malformed lines are told of in files without an image too
        above = PurePosixPath(file).parents[len(PurePosixPath(folder).parts)]
        part = next((part for part in reversed(above.parts) if part.lower() in SPLITS), above.name)
        image = _image_of(file, part, stems)
        if image is None:
            left_out[where] = f"no image, or more than one, of the name {PurePosixPath(file).stem} in {images.root}"
            continue
        try:
            size = images.size(image) if boxes else (0, 0)
        except BrokenImageError as error:
            left_out[where] = str(error)
            continue
        split = SPLITS.get(part.lower())
        for number, (line, box, category, hard) in enumerate(boxes):
            place = f"{where}, line {line}"
            if hard and not difficult:
                left_out[place] = f"{category} is marked difficult"
                continue
            try:
                bounds(np.reshape(box, (4, 2)), size)
            except ValueError as error:
                left_out[place] = f"{category}: {error}"
                continue
            # the number counts what is left out too, so that a crop's name does not depend on that
            yield Row(place, image, category, split, box, f"{image}#{number}")


def _image_of(file: str, part: str, stems: dict[str, list[str]]) -> str | None:
    """The image of the same name; where several have it, the one in a folder of the same split."""
    found = stems.get(PurePosixPath(file).stem, [])
    near = [name for name in found if part in PurePosixPath(name).parts[:-1]]
    chosen = near if len(found) > 1 else found
    return chosen[0] if len(chosen) == 1 else None


def _boxes(content: bytes, where: str) -> Iterator[tuple[int, tuple[float, ...], str, bool]]:
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text in UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or line.strip().lower().startswith(HEADS):
            continue
        try:
            if len(words) != 10:
                raise ValueError(f"{len(words)} words")
            box = tuple(map(float, words[:8]))
            if not all(map(math.isfinite, box)):
                raise ValueError("a coordinate that is not finite")
            if not words[9].isdecimal():
                raise ValueError(f"difficult {words[9]!r}")
        except ValueError as error:
            raise ValueError(
                f"{where}, line {number}: expected 'x1 y1 x2 y2 x3 y3 x4 y4 category difficult', got {error} in "
                f"{line!r}"
            ) from error
        yield number, box, words[8], int(words[9]) > 0
