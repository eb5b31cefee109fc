"""Images in a folder, or a zip, for each class."""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from rsfast.deblora.data.counts import normalised
from rsfast.deblora.data.rows import SPLITS, Row

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".ppm", ".pgm"}
FUSRS_CLASSES = ("cargo", "other", "fishing", "tanker", "dredger")  # debLoRA's order


def is_image(name: str) -> bool:
    """Whether a name is an image's; hidden ones, and those that macOS adds to a zip, are not."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(
        part[0] == "." or part == "__MACOSX" for part in path.parts
    )


def class_folders(images: Sequence[str]) -> Iterator[Row]:
    """Rows of ``class/.../image``, or ``train/class/.../image`` where all lie in folders of splits.

    One folder around all others, as in a zip of a folder, is left out of account: one in which most images lie deeper.
    """
    parts = {name: PurePosixPath(name).parts for name in images}
    tops = {part[0].lower() for part in parts.values()}
    if len(tops) == 1 and not tops & SPLITS.keys() and 2 * sum(len(part) > 2 for part in parts.values()) > len(parts):
        parts = {name: part[1:] for name, part in parts.items()}
        tops = {part[0].lower() for part in parts.values()}
    split = bool(tops) and tops <= SPLITS.keys() and all(len(part) > 1 for part in parts.values())
    for name, part in parts.items():
        inner = part[1:] if split else part
        yield Row(name, name, inner[0] if len(inner) > 1 else None, SPLITS[part[0].lower()] if split else None)


def is_fusrs(rows: Sequence[Row]) -> bool:
    """Whether the classes are those of FUSRS, all five."""
    return {normalised(row.label) for row in rows if row.label is not None} == set(FUSRS_CLASSES)
