"""Files that list images and their classes: CSV, HarMA's json, and lines of path and id."""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from rsfast.deblora.data.rows import SPLITS, Row
from rsfast.harma.tables import csv_rows, described, read_json, require

KINDS = {".json": "harma", ".csv": "csv", ".tsv": "csv", ".txt": "list"}
Files = Mapping[str | None, Path]  # the file of each split; None: of no split


def split_files(names: list[str], kinds: set[str]) -> dict[str, str]:
    """Of the files at the top those that are named after a split, such as ``Places_LT_train.txt``.

    Raises:
        ValueError: Two are of one split, or they are of different kinds.
    """
    found: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        words = path.stem.lower().replace("-", "_").split("_")
        splits = {SPLITS[word] for word in words if word in SPLITS}
        if len(path.parts) > 1 or KINDS.get(path.suffix.lower()) not in kinds or len(splits) != 1:
            continue
        other = found.setdefault(splits.pop(), name)
        if other != name:
            raise ValueError(f"{other} and {name} are of one split; give the files as a mapping of split to file")
    if len({KINDS[PurePosixPath(name).suffix.lower()] for name in found.values()}) > 1:
        raise ValueError(f"{', '.join(found.values())} are of different kinds; format= says which to read")
    return found


def list_rows(files: Files) -> Iterator[Row]:
    """Rows of lines ``path id``: Places365-LT, iNaturalist 2018."""
    for split, path in files.items():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8: {error}") from error
        for number, line in enumerate(lines, 1):
            words = line.rsplit(None, 1)
            if not words:
                continue
            where = f"{path}, line {number}"
            if len(words) != 2 or not words[1].isdecimal():
                raise ValueError(f"{where}: expected a path and a label, an integer of at least 0, got {line!r}")
            yield Row(where, words[0].strip(), int(words[1]), split)


def labelled_csv_rows(
    files: Files, path_key: str, label_key: str, split_key: str, separator: str | None, encoding: str | None
) -> list[Row]:
    """Rows of CSV files; labels are ids where all of them are integers, else names."""
    rows = []
    for split, path in files.items():
        for where, row in csv_rows(path, (path_key, label_key), separator, encoding):
            if not row[path_key].strip():
                raise ValueError(f"{where}: {path_key} is empty")
            own = (row.get(split_key) or "").strip()
            rows.append(
                Row(where, row[path_key].strip(), row[label_key].strip() or None,
                    split or SPLITS.get(own.lower(), own or None))
            )  # fmt: skip
    if all(row.label is None or row.label.removeprefix("-").isdecimal() for row in rows):  # below 0 is refused later
        return [row if row.label is None else row._replace(label=int(row.label)) for row in rows]
    return rows


def harma_rows(files: Files) -> tuple[list[Row], dict[int, str]]:
    """Rows of HarMA's json, an image once a split, and for ids in ``label`` their names in ``label_name``."""
    rows: dict[tuple, Row] = {}
    names: dict[int, str] = {}
    for split, path in files.items():
        content = read_json(path)
        if not isinstance(content, list):
            raise ValueError(f"{path} must hold a list of rows, got {described(content)}")
        for number, given in enumerate(content):
            where = f"{path}, row {number}"
            require(given, ("image",), where)
            image, label, name = given["image"], given.get("label"), given.get("label_name")
            if not isinstance(image, str) or not image.strip():
                raise ValueError(f"{where}: the image's name must be text, got {image!r}")
            if isinstance(label, int) and not isinstance(label, bool):
                if name not in (None, "") and names.setdefault(label, str(name)) != str(name):
                    raise ValueError(f"{where}: label {label} is named {name!r}, and {names[label]!r} further up")
            else:
                label = next((str(text) for text in (name, label) if text not in (None, "")), None)
            row = rows.setdefault((split, image), Row(where, image, label, split))
            if row.label != label:
                raise ValueError(f"{where}: image {image} has the label {label!r}, and {row.label!r} in {row.where}")
    return list(rows.values()), names
