"""Labelled images from folders and files of every kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from rsfast.deblora.data.dota import DOTA_CLASSES, dota_rows, label_files
from rsfast.deblora.data.folders import FUSRS_CLASSES, class_folders, is_fusrs, is_image
from rsfast.deblora.data.labelled import LabelledImages
from rsfast.deblora.data.lists import KINDS, Files, harma_rows, labelled_csv_rows, list_rows, split_files
from rsfast.deblora.data.rows import SPLITS, labelled, read_classes
from rsfast.harma.images import ImageStore

FORMATS = ("auto", "folder", "dota", "fusrs", "csv", "harma", "list")
Format = Literal["auto", "folder", "dota", "fusrs", "csv", "harma", "list"]


def load_labelled(
    path: str | Path | Mapping[str, str | Path],
    images: str | Path | ImageStore | None = None,
    *,
    format: Format = "auto",
    classes: Sequence[str] | str | Path | None = None,
    difficult: bool = True,
    label_folder: str = "labelTxt",
    crop: Literal["bounds", "rotated"] = "bounds",
    margin: float = 0.0,
    csv_path_key: str = "path",
    csv_label_key: str = "label",
    csv_split_key: str = "split",
    csv_separator: str | None = None,
    csv_encoding: str | None = None,
) -> LabelledImages:
    """Read labelled images; what they are is told from what is there.

    ======== ===================================================================================================
    folder   A folder of images for each class, in a folder or zip; or ``train``, ``val``, ``test`` and in each such
             folders. Classes in the order of the alphabet.
    fusrs    The same with FUSRS's classes in debLoRA's order: cargo, other, fishing, tanker, dredger.
    dota     ``labelTxt/*.txt`` beside the images, at the top or in a folder for each split, lines of
             ``x1 y1 x2 y2 x3 y3 x4 y4 category difficult``; crops are cut out when they are loaded. Classes are
             debLoRA's 15 in the order of its groups, and then what else there is, in the order of the alphabet.
    csv      Columns for path, label, and split if there is one. Labels that are all integers are ids.
    harma    HarMA's json: ``label``, an id with ``label_name`` as its name, or ``label_name`` alone.
    list     Lines of path and id: Places365-LT, iNaturalist 2018, and debLoRA's own lists.
    ======== ===================================================================================================

    The last three are a file, a mapping of split to file, or a folder where files are named after splits, for example
    ``train.json`` or ``Places_LT_train.txt``. Without ids, labels are names, numbered in the order of the alphabet.

    Args:
        path: Folder, zip, file, or ``{"train": file, "test": file}``.
        images: Folder or zip of the images. Default: ``path``, or the folder that the file is in.
        format: One of the above, for what ``"auto"`` cannot tell.
        classes: Names in the order of their ids, or a file of them: a name a line, with its id before or after it where
            every line has one, or a JSON list of names or of dictionaries with ``name``. Case, spaces, ``_`` and ``-``
            make no difference. What is of another class is left out.
        difficult: DOTA's objects that are marked difficult are read too.
        label_folder: Where DOTA's annotations are, e.g. ``labelTxt-v1.5``.
        crop: How DOTA's boxes are cut, see :class:`LabelledImages`.
        margin: Of DOTA's crops, see :class:`LabelledImages`.
        csv_path_key: Column of image names.
        csv_label_key: Column of classes.
        csv_split_key: Column of splits, if it is there.
        csv_separator: Default: whichever of tab, comma and semicolon gives the header both columns.
        csv_encoding: Default: UTF-8, or where that fails GB18030.

    Returns:
        Images without a label, of another class, that are not there, boxes outside of their image or of no area are in
        its ``left_out``. Splits are called train, val and test; ``validation``, for example, is val.

    Raises:
        FileNotFoundError: There is nothing at a path, or none of the images is there.
        ValueError: It cannot be told what this is, or something in it is wrong; file and line are named.

    Images as large as DOTA-v2.0's largest need ``PIL.Image.MAX_IMAGE_PIXELS`` raised: Pillow refuses them.

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> from rsfast.deblora import load_labelled
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("river", "field"):
        ...         (pathlib.Path(folder) / name).mkdir()
        ...         Image.new("RGB", (8, 8)).save(pathlib.Path(folder) / name / "1.png")
        ...     data = load_labelled(folder)
        ...     data.classes, data.labels.tolist(), data.name(1), data.load(1).size
        (('field', 'river'), [0, 1], 'river/1.png', (8, 8))
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    classes, cutting = read_classes(classes), {"crop": crop, "margin": margin}
    files, format = _found(path, format, label_folder)
    if files is None:
        return _from_folder(Path(path), images, format, classes, label_folder, difficult, cutting)
    source = ", ".join(map(str, files.values() if isinstance(path, Mapping) else [path]))
    if format == "csv":
        rows = labelled_csv_rows(files, csv_path_key, csv_label_key, csv_split_key, csv_separator, csv_encoding)
    elif format == "harma":
        rows, names = harma_rows(files)
        if classes is not None:  # whose order need not be that of the ids
            rows = [row._replace(label=names.get(row.label, row.label)) for row in rows]
        elif names and all(isinstance(row.label, int | None) for row in rows):
            largest = max(row.label for row in rows if row.label is not None)
            classes = [names.get(number, str(number)) for number in range(largest + 1)]
    else:
        rows = list_rows(files)
    return labelled(rows, _store(images, next(iter(files.values())).parent), source, classes=classes, **cutting)


def _store(images: str | Path | ImageStore | None, default: Path) -> ImageStore:
    return images if isinstance(images, ImageStore) else ImageStore(default if images is None else images)


def _from_folder(root, images, format, classes, label_folder, difficult, cutting) -> LabelledImages:
    store = ImageStore(root)
    if format == "dota":
        left_out: dict[str, str] = {}
        shown = _store(images, root)
        rows = list(dota_rows(store, shown, label_folder, difficult=difficult, left_out=left_out))
        first = DOTA_CLASSES if classes is None else ()
        return labelled(rows, shown, str(root), classes=classes, left_out=left_out, first=first, **cutting)
    if images is not None:
        raise ValueError(f"images= is for files and DOTA; the class folders of {root} hold their images themselves")
    rows = list(class_folders([*filter(is_image, store.names())]))
    if classes is None and (format == "fusrs" or (format == "auto" and is_fusrs(rows))):
        classes = FUSRS_CLASSES
    return labelled(rows, store, str(root), classes=classes, **cutting)


def _found(path, format: str, label_folder: str) -> tuple[Files | None, str]:
    """The files to read, None for what is read as a folder, and their format."""
    if isinstance(path, Mapping):
        files = {SPLITS.get(str(split).lower(), str(split)): Path(file) for split, file in path.items()}
        if not files or len(files) < len(path):
            raise ValueError(f"path must name a file for each split, splits that differ, got {list(path)}")
    else:
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"there is no folder, zip or file {path}")
        if path.is_dir() or path.suffix.lower() == ".zip":
            return _found_in(path, format, label_folder)
        files = {None: path}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
    if format in ("folder", "dota", "fusrs"):
        raise ValueError(f"format={format!r} needs a folder or zip, {next(iter(files.values()))} is a file")
    kinds = {KINDS.get(file.suffix.lower()) for file in files.values()}
    if format == "auto" and (len(kinds) > 1 or None in kinds):
        raise ValueError(
            f"{', '.join(map(str, files.values()))}: what this is cannot be told from its name; looked for a folder, "
            f"a .zip, {', '.join(f'{suffix} ({kind})' for suffix, kind in KINDS.items())}; format= says"
        )
    return files, kinds.pop() if format == "auto" else format


def _found_in(root: Path, format: str, label_folder: str) -> tuple[Files | None, str]:
    names = ImageStore(root).names()
    if format in ("folder", "fusrs"):
        return None, format
    if format in ("auto", "dota") and label_files(names, label_folder):
        return None, "dota"
    files = {}
    if root.is_dir() and format != "dota":
        found = split_files(names, set(KINDS.values()) if format == "auto" else {format})
        files = {split: root / name for split, name in found.items()}
    if files:
        return files, KINDS[next(iter(files.values())).suffix.lower()]
    if format == "auto" and any(row.label is not None for row in class_folders([*filter(is_image, names)])):
        return None, "auto"
    raise ValueError(
        f"{root}: found no labelled images; looked for {label_folder}/*.txt (dota), files named after a split, like "
        "train.json (harma), train.csv (csv), train.txt (list), and images in a folder for each class (folder, fusrs); "
        f"it holds {', '.join(names[:3]) or 'nothing'}{', ...' if len(names) > 3 else ''}"
    )
