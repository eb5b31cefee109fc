"""Features on disk, with what is known of each row."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsfast.deblora.features import files as files

DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
LABEL = np.dtype("<i8")


class LeftOut(NamedTuple):
    """What a source had, and the store has not."""

    index: int  # in the source
    name: str
    reason: str


class FeatureStore:
    """Features of many samples in one folder: an array on disk that is mapped, not loaded, and grows by appending.

    ``FeatureStore.create(folder, dim)`` makes one, ``FeatureStore(folder)`` opens it; ``with`` or :meth:`close` gives
    up the right to write, which the first append takes. A FeatureStore sees the rows that were there when it was
    opened, and those it appends.

    Format, version 1. All numbers are little-endian, all checksums CRC-32:

    - ``store.json``: format, version, ``dim``, ``dtype``, ``classes``, ``metadata``, and the checksum of these.
    - ``features.bin``: the rows, one after the other and nothing else, so that
      ``np.memmap(folder + "/features.bin", "<f4", "r").reshape(-1, dim)`` reads a store that no append was cut off in
      (else the first ``len(store) * dim`` numbers count).
    - ``labels.bin``: an int64 a row, -1 where unknown.
    - ``rows.jsonl``: a line ``[name, split]`` a row.
    - ``appends.log``: a line an append: a checksum, and JSON that has the first row, the number of rows, and the bytes
      and the checksum of what went into each file.

    An append writes the three files, waits until they are on the disk, and writes its line last: before the line ends
    there was no append. So a store whose writer was killed opens with the rows of the completed appends, and the next
    append drops what lies behind them.

    Args:
        folder: Of a store that was created.

    Raises:
        FileNotFoundError: There is no store.
        ValueError: The header, the log, or the length of a file is damaged; the message names the file. Content is
            checked by :meth:`verify`.

    Example:
        >>> import tempfile, torch, rsfast.deblora
        >>> folder = tempfile.mkdtemp()
        >>> with rsfast.deblora.FeatureStore.create(folder, 4, classes=["ship", "plane"]) as store:
        ...     store.append(torch.ones(2, 4), labels=[0, 1], names=["a.png", "b.png"])
        >>> store = rsfast.deblora.FeatureStore(folder)
        >>> store.features.shape, store.labels.tolist(), store.names
        ((2, 4), [0, 1], ['a.png', 'b.png'])
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder, self._lock = Path(folder), None
        header = files.read_header(self.folder)
        self.dim: int = header["dim"]
        self.dtype = DTYPES[header["dtype"]]
        self.classes: tuple[str, ...] | None = None if header["classes"] is None else tuple(header["classes"])
        self.metadata: dict = header["metadata"]
        self._refresh()

    @classmethod
    def create(
        cls, folder: str | os.PathLike, dim: int, *, dtype: str = "float32", classes: Sequence[str] | None = None,
        metadata: Mapping | None = None,
    ) -> "FeatureStore":  # fmt: skip
        """A new store without rows; the folder is made where there is none.

        Args:
            folder: Holds no store yet.
            dim: Width of a row.
            dtype: ``"float32"`` or ``"float16"``: what is on the disk. NumPy has no bfloat16; such features fit
                ``"float32"`` exactly.
            classes: Names of the classes, in the order of the labels.
            metadata: Anything JSON can hold; it cannot be changed later.

        Raises:
            FileExistsError: There is a store, or files that would be part of one.
            ValueError, TypeError: An argument does not fit.
        """
        if type(dim) is not int or dim < 1:
            raise ValueError(f"dim must be a positive integer, got {dim!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)} (bfloat16 fits float32 exactly), got {dtype!r}")
        if classes is not None:
            classes = _texts(classes, "classes", None)
            if len(set(classes)) < len(classes) or not classes:
                raise ValueError(f"classes must be different names, one or more, got {classes}")
        folder, metadata = Path(folder), dict(metadata or {})
        if json.loads(json.dumps(metadata)) != metadata:
            raise TypeError("metadata must be what JSON gives back as it was: keys are str, sequences are lists")
        folder.mkdir(parents=True, exist_ok=True)
        lock = files.WriterLock(folder)
        try:
            there = [name for name in (files.HEADER, files.LOG, *files.DATA) if (folder / name).exists()]
            if there:
                raise FileExistsError(f"{folder} holds {there[0]} already; open it, or take another folder")
            files.write_header(folder, dict(dim=dim, dtype=dtype, classes=classes, metadata=metadata))
            store = cls(folder)
        except BaseException:
            lock.release()
            raise
        store._lock = lock
        return store

    def __len__(self) -> int:
        return self._rows

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.folder)!r}): {len(self)} rows of {self.dim} {self.dtype.name}"

    def __reduce__(self):
        return FeatureStore, (self.folder,)

    @property
    def features(self) -> np.ndarray:
        """(N, D) mapped from the disk, read only. It stays valid, and as long as it is, while rows are appended."""
        if not len(self):
            return np.empty((0, self.dim), self.dtype)  # nothing cannot be mapped
        if self._features is None:
            path, shape = self.folder / files.FEATURES, (len(self), self.dim)
            self._features = np.memmap(path, self.dtype, "r", shape=shape)
        return self._features

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64, -1 where unknown; read only."""
        if self._labels is None:
            path = self.folder / files.LABELS
            self._labels = np.fromfile(path, LABEL, len(self)) if len(self) else np.empty(0, LABEL)
            self._labels.flags.writeable = False
        return self._labels

    @property
    def names(self) -> list[str]:
        """The name of each row; empty where none was given."""
        return [name for name, _ in self._text()]

    @property
    def splits(self) -> list[str]:
        """The split of each row; empty where none was given."""
        return [split for _, split in self._text()]

    @property
    def left_out(self) -> list[LeftOut]:
        """What those who appended said to have left out."""
        return [LeftOut(*item) for append in self._appends for item in append.left_out]

    def append(
        self,
        features: np.ndarray | Tensor,  # (n, D)
        labels: Sequence[int] | np.ndarray | Tensor | None = None,  # (n,)
        names: Sequence[str] | None = None,
        splits: Sequence[str] | str | None = None,
        *,
        left_out: Sequence[tuple[int, str, str]] = (),
    ) -> None:
        """Add rows, all or none of them: they are on the disk when this returns.

        Args:
            features: Floating point, finite; n may be 0. Rounded to the store's dtype: float16 keeps less of float32
                and flushes to zero what is below 6e-8.
            labels: -1 is unknown, and so are all without this; else below the number of classes, if there are classes.
            names: Without them every name is empty.
            splits: One for each row, or one for all; without them every split is empty.
            left_out: ``(index, name, reason)`` of what the source of these rows had besides.

        Raises:
            ValueError, TypeError: A shape, dtype or number does not fit, a row is not finite or too large for
                float16, or another is writing. Nothing is written.
        """
        rows = self._checked(features)
        labels = self._checked_labels(labels, len(rows))
        names = [""] * len(rows) if names is None else _texts(names, "names", len(rows))
        splits = [splits or ""] * len(rows) if splits is None or isinstance(splits, str) else splits
        splits = _texts(splits, "splits", len(rows))
        left_out = [list(LeftOut(*item)) for item in left_out]
        text = "".join(json.dumps(pair) + "\n" for pair in zip(names, splits, strict=True)).encode()
        self.lock()
        content = dict(zip(files.DATA, (rows.tobytes(), labels.tobytes(), text), strict=True))
        for name, part in content.items():
            files.put(self.folder / name, self._sizes[name], part)
        sizes = {name: len(part) for name, part in content.items()}
        sums = {name: zlib.crc32(part) for name, part in content.items()}
        append = files.Append(len(self), len(rows), sizes, sums, left_out)
        line = append.line()
        files.put(self.folder / files.LOG, self._sizes[files.LOG], line)
        self._appends.append(append)
        for name, size in {**sizes, files.LOG: len(line)}.items():
            self._sizes[name] += size
        self._forget()

    def lock(self) -> None:
        """Become the one writer, as the first append does, and see what others appended before.

        Raises:
            ValueError: Another process or FeatureStore is.
        """
        if self._lock is not None and self._lock.held():
            return
        self._lock = files.WriterLock(self.folder)
        self._refresh()

    def close(self) -> None:
        """Give up the right to write; reading goes on, and an append would take it again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __del__(self):
        if getattr(self, "_lock", None) is not None:
            self.close()

    def verify(self) -> None:
        """Read everything, a few MiB at a time, and compare it with the checksums.

        Raises:
            ValueError: Something is not what was appended; the message names every damaged file with its rows.
        """
        damaged, at = [], dict.fromkeys(files.DATA, 0)
        for append in self._appends:
            for name in files.DATA:
                found = files.crc32_of(self.folder / name, at[name], append.bytes[name])
                if found != append.crc32[name]:
                    damaged.append(f"{name}, rows {append.first} to {append.first + append.rows - 1}")
                at[name] += append.bytes[name]
        if damaged:
            more = f" and {len(damaged) - 20} more" if len(damaged) > 20 else ""
            raise ValueError(f"{self.folder} is damaged: {'; '.join(damaged[:20])}{more}")

    def _refresh(self) -> None:
        row_bytes = {files.FEATURES: self.dim * self.dtype.itemsize, files.LABELS: LABEL.itemsize}
        self._appends, self._sizes = files.read_log(self.folder, row_bytes)
        self._forget()

    def _forget(self) -> None:
        last = self._appends[-1] if self._appends else None
        self._rows = last.first + last.rows if last else 0
        self._features = self._labels = self._pairs = None

    def _text(self) -> list[tuple[str, str]]:
        if self._pairs is None:
            path, size = self.folder / files.TEXT, self._sizes[files.TEXT]
            lines = path.read_bytes()[:size].splitlines() if size else []
            try:
                self._pairs = [tuple(json.loads(line)) for line in lines]
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}") from error
            if len(self._pairs) != len(self):
                raise ValueError(f"{path} is damaged: it has {len(self._pairs)} lines for {len(self)} rows")
        return self._pairs

    def _checked(self, features) -> np.ndarray:
        if not isinstance(features, Tensor | np.ndarray):
            raise TypeError(f"features must be a NumPy array or a tensor, got {type(features).__name__}")
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be (n, {self.dim}), got {tuple(features.shape)}")
        if isinstance(features, Tensor):
            features = features.detach().cpu()
            features = (features.float() if features.dtype == torch.bfloat16 else features).numpy()
        if features.dtype.kind != "f":
            raise TypeError(f"features must be floating point, got {features.dtype}")
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(features, self.dtype)
        for why, numbers in (("holds NaN or infinity", features), (f"is too large for {self.dtype.name}", rows)):
            bad = np.flatnonzero(~np.isfinite(numbers).all(1))
            if len(bad):
                raise ValueError(f"features: row {bad[0]} {why} ({len(bad)} of {len(rows)} rows: {bad[:8].tolist()})")
        return rows

    def _checked_labels(self, labels, count: int) -> np.ndarray:
        if labels is None:
            return np.full(count, -1, LABEL)
        array = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
        if array.shape != (count,):
            raise ValueError(f"labels must be one a row of features, {count}, got shape {array.shape}")
        if array.dtype.kind not in "iu" and count:
            raise TypeError(f"labels must be integers, got {array.dtype}")
        end = len(self.classes) if self.classes is not None else np.iinfo(LABEL).max
        bad = np.flatnonzero((array < -1) | (array >= end))
        if len(bad):
            known = f"to {end - 1}, of {end} classes" if self.classes is not None else "up"
            raise ValueError(f"labels: row {bad[0]} is {array[bad[0]]}; labels go from -1, unknown, {known}")
        return array.astype(LABEL)


def _texts(values, name: str, count: int | None) -> list[str]:
    if isinstance(values, str):
        raise TypeError(f"{name} must be several str, got one: {values!r}")
    values = list(values)
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{index}] must be str, got {type(value).__name__}")
    if count is not None and len(values) != count:
        raise ValueError(f"{name} must be one a row of features, {count}, got {len(values)}")
    return values
