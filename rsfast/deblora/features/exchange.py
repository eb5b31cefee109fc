"""Features from debLoRA's files, and to files that others read."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rsfast.deblora.features.files import FEATURES, HEADER
from rsfast.deblora.features.store import FeatureStore

SPLITS = ("train", "val", "test")
BLOCK = 2**16  # rows of a parquet row group
BLOCK_BYTES = 2**22


def import_pt(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    pooling: str = "mean",
    classes: Sequence[str] | None = None,
    dtype: str = "float32",
    batch_size: int = 256,
) -> FeatureStore:
    """Read debLoRA's features, a ``.pt`` file a crop, into a :class:`FeatureStore`; started again, it goes on.

    The class of a file is the name of the folder that it is in. Its name in the store is its path in ``folder``
    without ``.pt``. Its split is the first folder on that path, if that is ``train``, ``val`` or ``test`` and not its
    class. Rows are ordered by path.

    Args:
        folder: With ``CLASS/NAME.pt`` or ``SPLIT/CLASS/NAME.pt``; each holds one tensor, (C, h, w) or (D,), floating
            point, with leading dimensions of 1 or without; all of one shape.
        out: Folder of the store: a new one, or one that this was begun in.
        pooling: ``"mean"`` over places, which is what the authors' probe does first (``AdaptiveAvgPool``), in fp32; or
            ``"flatten"``, which is what they cluster. A flat tensor stays as it is.
        classes: Names of the classes, in the order of the labels. Default: the names found, sorted.
        dtype: Of the store, ``float32`` or ``float16``.
        batch_size: Files an append.

    Returns:
        The store, open for reading. What was done before an error is kept.

    Raises:
        FileNotFoundError: There is no ``folder``, or no ``.pt`` file in it.
        ValueError: A file is damaged, holds anything but one such tensor, or has another width or numbers that are not
            finite; a class is not in ``classes``; the store was begun with something else. The file is named. Files
            are read with ``weights_only=True``, so that none can run code.

    Example:
        >>> import pathlib, tempfile, torch, rsfast.deblora
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "train", "ship")
        >>> folder.mkdir(parents=True)
        >>> torch.save(torch.ones(1280, 8, 8), folder / "P0001_0.pt")
        >>> store = rsfast.deblora.import_pt(folder.parents[1], tempfile.mkdtemp())
        >>> store.features.shape, store.classes, store.names, store.splits
        ((1, 1280), ('ship',), ['train/ship/P0001_0'], ['train'])
    """
    if pooling not in ("mean", "flatten"):
        raise ValueError(f"pooling must be mean or flatten, got {pooling!r}")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {folder}")
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.pt"))
    if not paths:
        raise FileNotFoundError(f"folder: {folder} holds no .pt files")
    names = [path.with_suffix("").as_posix() for path in paths]
    found = [path.parent.name or folder.resolve().name for path in paths]
    classes = sorted(set(found)) if classes is None else list(classes)
    strange = next((path for path, name in zip(paths, found, strict=True) if name not in classes), None)
    if strange is not None:
        raise ValueError(f"classes lack that of {folder / strange}; they are {', '.join(classes)}")
    number = {name: index for index, name in enumerate(classes)}
    settings = {
        "made_by": "rsfast.deblora.import_pt", "pooling": pooling, "batch_size": batch_size,
        "files": hashlib.sha256("\n".join(names).encode(errors="surrogatepass")).hexdigest(),
    }  # fmt: skip
    store = None
    try:
        if (out / HEADER).exists():
            store = FeatureStore(out)
            store.lock()
            begun = {**store.metadata, "dtype": store.dtype.name, "classes": list(store.classes or ())}
            for key, value in {**settings, "dtype": dtype, "classes": classes}.items():
                if begun.get(key) != value:
                    raise ValueError(f"{out} was begun with {key} {begun.get(key)!r}, now it is {value!r}")
        for start in range(0 if store is None else len(store), len(paths), batch_size):
            part = slice(start, start + batch_size)
            rows = [_read(folder / path, pooling) for path in paths[part]]
            if store is None:
                store = FeatureStore.create(out, len(rows[0]), dtype=dtype, classes=classes, metadata=settings)
            for path, row in zip(paths[part], rows, strict=True):
                if len(row) != store.dim:
                    raise ValueError(f"{folder / path} gives {len(row)} features, others give {store.dim}")
            labels = [number[name] for name in found[part]]
            store.append(torch.stack(rows), labels, names[part], [_split(path) for path in paths[part]])
    finally:
        if store is not None:
            store.close()
    return store


def _split(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 2 and path.parts[0] in SPLITS else ""


def _read(path: Path, pooling: str) -> Tensor:
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, struct and zipfile each have their own for damaged bytes
        raise ValueError(f"{path} is damaged or holds more than a tensor: {type(error).__name__}: {error}") from error
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{path} must hold one tensor of floating point, holds {got}")
    shape, tensor = tuple(tensor.shape), tensor.float()
    while tensor.ndim > 1 and tensor.ndim != 3 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim not in (1, 3) or not tensor.numel():
        raise ValueError(f"{path} must hold a tensor (C, h, w) or (D,), holds {shape}")
    if tensor.ndim == 3:
        tensor = tensor.mean((1, 2)) if pooling == "mean" else tensor.flatten()
    if not tensor.isfinite().all():
        raise ValueError(f"{path} holds NaN or infinity")
    return tensor


def export_parquet(store: FeatureStore, out: str | os.PathLike, *, rows: int = 1_000_000) -> list[Path]:
    """Write a store as clip-retrieval lays features out: ``img_emb/img_emb_0.npy`` and ``metadata/metadata_0.parquet``.

    Row i of a metadata file belongs to row i of the array of the same number. Its columns: ``image_path`` (the name),
    ``label`` (int64, -1 where unknown), ``class`` (null where unknown), ``split``. Numbers have as many digits as the
    last one, so that sorting by name is sorting by number. Needs the extra ``parquet``.

    Args:
        store: With one row or more.
        out: A folder that is new, or empty. It appears when all is written.
        rows: At most so many a file; features are copied a few MiB at a time.

    Returns:
        The files.

    Raises:
        ValueError: An argument does not fit, or pyarrow is missing.
        FileExistsError: There is something in ``out``.

    Example:
        >>> import tempfile, numpy, torch, rsfast.deblora
        >>> store = rsfast.deblora.FeatureStore.create(tempfile.mkdtemp(), 4, classes=["ship"])
        >>> store.append(torch.ones(2, 4), labels=[0, -1])
        >>> array, metadata = rsfast.deblora.export_parquet(store, tempfile.mkdtemp())
        >>> array.name, metadata.name, numpy.load(array).shape
        ('img_emb_0.npy', 'metadata_0.parquet', (2, 4))
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("parquet needs pyarrow; pip install 'rsfast[parquet]'") from error
    out = Path(out)
    if type(rows) is not int or rows < 1:
        raise ValueError(f"rows must be a positive integer, got {rows!r}")
    if not len(store):
        raise ValueError(f"store: {store.folder} has no rows")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: {out} is not empty; take another folder")
    schema = pyarrow.schema(
        [("image_path", pyarrow.string()), ("label", pyarrow.int64()), ("class", pyarrow.string()),
         ("split", pyarrow.string())]
    )  # fmt: skip
    names, labels, splits = store.names, store.labels, store.splits
    starts = range(0, len(store), rows)
    digits, written = len(str(len(starts) - 1)), []
    with _appearing(out) as folder:
        (folder / "img_emb").mkdir()
        (folder / "metadata").mkdir()
        for number, start in enumerate(starts):
            stop = min(start + rows, len(store))
            array = Path("img_emb", f"img_emb_{number:0{digits}}.npy")
            _write_npy(store, folder / array, start, stop)
            metadata = Path("metadata", f"metadata_{number:0{digits}}.parquet")
            with pyarrow.parquet.ParquetWriter(folder / metadata, schema) as file:
                for a, b in _blocks(start, stop, BLOCK):
                    known = [None if y < 0 or not store.classes else store.classes[y] for y in labels[a:b]]
                    paths = [_encodable(name) for name in names[a:b]]
                    file.write_table(pyarrow.table([paths, labels[a:b], known, splits[a:b]], schema))
            written += [out / array, out / metadata]
    return written


def _write_npy(store: FeatureStore, path: Path, start: int, stop: int) -> None:
    """By reading and writing, not by mapping: pages of a mapped file would pile up in memory."""
    width = store.dim * store.dtype.itemsize
    header = {"descr": store.dtype.str, "fortran_order": False, "shape": (stop - start, store.dim)}
    with open(store.folder / FEATURES, "rb") as source, open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        source.seek(start * width)
        for a, b in _blocks(0, (stop - start) * width, BLOCK_BYTES):
            file.write(source.read(b - a))


def _blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    return ((a, min(a + size, stop)) for a in range(start, stop, size))


def _encodable(name: str) -> str:
    """File names that are not UTF-8 are in no parquet file: their odd bytes are written out."""
    return name.encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` when all went well."""
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
