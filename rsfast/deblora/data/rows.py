"""From rows that a loader read to labelled images: classes, what is left out, what is refused."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rsfast.deblora.data.counts import normalised
from rsfast.deblora.data.labelled import LabelledImages
from rsfast.harma.images import ImageStore
from rsfast.harma.tables import described, read_json

SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


class Row(NamedTuple):
    """An image or a crop; ``where`` it was read, ``label`` an id or a name, None where it has none."""

    where: str
    image: str
    label: int | str | None
    split: str | None = None
    box: tuple[float, ...] | None = None
    name: str | None = None


def labelled(
    rows: Iterable[Row],
    store: ImageStore,
    source: str,
    *,
    classes: Sequence[str] | None = None,
    left_out: Mapping[str, str] | None = None,
    first: Sequence[str] = (),
    **options,
) -> LabelledImages:
    """Rows as :class:`LabelledImages`.

    Ids are classes as they are. Names are numbered by ``classes``, where case, spaces, ``_`` and ``-`` make no
    difference; without ``classes`` by ``first``, and whatever else there is follows in the order of the alphabet.
    Rows without a label, of another class than ``classes``, or whose image is not in ``store`` are left out.

    Raises:
        FileNotFoundError: No image is in ``store``.
        ValueError: No row is left, an id has no class, or ids and names are mixed.
    """
    left_out, there, found, final = dict(left_out or {}), {}, [], []
    for row in rows:
        if row.label is None:
            left_out[row.where] = f"{row.image} has no label"
            continue
        if row.image not in there:
            there[row.image] = row.image in store
        if there[row.image]:
            found.append(row)
        else:
            left_out[row.where] = f"{row.image} is not in {store.root}"
    if there and not found:
        raise FileNotFoundError(
            f"none of the {len(there)} images that {source} names is in {store.root}, for example {next(iter(there))}; "
            "images= says where they are"
        )
    names, numbers = _numbered(found, source, classes, first)
    for row, number in zip(found, numbers, strict=True):
        if number is None:
            left_out[row.where] = f"{row.label} is none of the classes"
        else:
            final.append((row, number))
    if not final:
        reasons = [f"; {where}: {why}" for where, why in left_out.items()]
        raise ValueError(f"{source} holds no labelled images{''.join(reasons[:1])}")
    kept = [row for row, _ in final]
    has = {field: any(getattr(row, field) is not None for row in kept) for field in ("split", "box", "name")}
    return LabelledImages(
        [row.image for row in kept], [number for _, number in final], names, store, source=source, left_out=left_out,
        boxes=[(box[0:2], box[2:4], box[4:6], box[6:8]) for box in (row.box for row in kept)] if has["box"] else None,
        splits=[row.split for row in kept] if has["split"] else None,
        names=[row.name for row in kept] if has["name"] else None,
        **options,
    )  # fmt: skip


def _numbered(rows: list[Row], source: str, classes, first) -> tuple[tuple[str, ...], list[int | None]]:
    """The names of classes, and each row's number, None for one of another class."""
    named = next((row for row in rows if isinstance(row.label, str)), None)
    bare = next((row for row in rows if not isinstance(row.label, str)), None)
    if named is not None and bare is not None:
        raise ValueError(
            f"{source}: labels must be all ids or all names, got {bare.label} in {bare.where} and {named.label!r} in "
            f"{named.where}"
        )
    if bare is not None:
        count = max(0, *(row.label for row in rows)) + 1 if classes is None else len(classes)
        for row in rows:
            if not 0 <= row.label < count:
                raise ValueError(f"{row.where}: label must be in 0..{count - 1}, got {row.label}")
        return tuple(map(str, range(count)) if classes is None else classes), [row.label for row in rows]
    if classes is None:
        known = {normalised(name) for name in first}
        classes = (*first, *sorted({row.label for row in rows if normalised(row.label) not in known}))
    exact = {name: number for number, name in enumerate(classes)}
    loose = {normalised(name): number for name, number in reversed(exact.items())}
    return tuple(classes), [exact.get(row.label, loose.get(normalised(row.label))) for row in rows]


def read_classes(classes: Sequence[str] | str | Path | None) -> tuple[str, ...] | None:
    """Class names in the order of their ids, from a sequence or a file.

    A file holds a name a line, with its id before or after it where every line has one (Places365's list), or is a JSON
    list of names or of dictionaries with ``name`` (iNaturalist's categories), which are in the order of their ``id``.
    """
    if classes is None or not isinstance(classes, str | Path):
        names = None if classes is None else tuple(map(str, classes))
        return _differing(names, "classes")
    path = Path(classes)
    if not path.is_file():
        raise FileNotFoundError(f"classes: there is no file {path}")
    if path.suffix.lower() == ".json":
        return _differing(_json_names(path), path)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    for split, at in ((str.split, 0), (str.rsplit, 1)):
        parts = [split(line, None, 1) for line in lines]
        if all(len(part) == 2 and part[at].isdecimal() for part in parts):
            numbered = {int(part[at]): part[1 - at] for part in parts}
            if sorted(numbered) == list(range(len(lines))):
                return _differing(tuple(numbered[number] for number in range(len(lines))), path)
    return _differing(tuple(lines), path)


def _json_names(path: Path) -> tuple[str, ...]:
    content = read_json(path)
    if isinstance(content, list) and all(isinstance(one, dict) and "name" in one for one in content):
        content = [str(one["name"]) for one in sorted(content, key=lambda one: one.get("id", 0))]
    if not isinstance(content, list) or not all(isinstance(one, str) for one in content):
        raise ValueError(f"{path} must be a list of names, or of dictionaries with 'name', got {described(content)}")
    return tuple(content)


def _differing(names: tuple[str, ...] | None, where) -> tuple[str, ...] | None:
    if names is not None and (not names or len(set(names)) < len(names)):
        raise ValueError(f"{where} must be names that differ, one or more, got {list(names)[:5]}")
    return names
