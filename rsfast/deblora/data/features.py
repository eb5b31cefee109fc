"""Features with labels and a test part: from an npz, and scikit-learn's digits, which need no download."""

import dataclasses
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsfast.deblora.arrays import as_integers, as_rows
from rsfast.deblora.data.counts import make_long_tailed

KEYS = ("features", "label", "is_test", "classes")
DIGITS_TEST = 50  # rows of each digit


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """Features, their classes, and which rows are for testing.

    Args:
        features: (N, D) NumPy array of fp16, fp32 or fp64, finite; kept as it is.
        labels: (N,) integers 0..C-1; kept as int64.
        is_test: (N,) booleans (or 0 and 1): rows of both kinds.
        classes: C names, no two alike.
        source: Named in messages.

    Raises:
        TypeError, ValueError: One of these is not so; the message names the source, the array, and the row.

    Example:
        >>> import numpy as np
        >>> from rsfast.deblora import LabelledFeatures
        >>> data = LabelledFeatures(np.zeros((3, 8), np.float16), [0, 1, 1], [0, 0, 1], ["field", "river"])
        >>> data.features.dtype, data.labels.dtype, data.is_test
        (dtype('float16'), dtype('int64'), array([False, False,  True]))
    """

    features: np.ndarray
    labels: np.ndarray
    is_test: np.ndarray
    classes: Sequence[str]
    source: str = "the features"

    def __post_init__(self):
        if not isinstance(self.features, np.ndarray):
            raise TypeError(f"{self.source}: features must be a NumPy array, got {type(self.features).__name__}")
        rows = as_rows(self.features, f"{self.source}: features")
        classes = tuple(map(str, self.classes))
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f"{self.source}: classes must be names that differ, one or more, got {list(classes)[:5]}")
        labels = as_integers(self.labels, f"{self.source}: label", len(rows), most=len(classes) - 1).numpy(force=True)
        is_test = np.asarray(self.is_test)
        if is_test.shape != (len(rows),) or is_test.dtype.kind not in "biu" or not np.isin(is_test, (0, 1)).all():
            raise ValueError(
                f"{self.source}: is_test must be ({len(rows)},) booleans, one per row of features, got "
                f"{is_test.dtype} of {is_test.shape}"
            )
        is_test = is_test.astype(bool)
        if is_test.all() or not is_test.any():
            raise ValueError(f"{self.source}: is_test must mark some rows, not {'all' if is_test.all() else 'none'}")
        rows.check()
        for name, value in (("labels", labels), ("is_test", is_test), ("classes", classes)):
            object.__setattr__(self, name, value)

    def long_tailed(self, imbalance: float, seed: int) -> "LabelledFeatures":
        """With the training rows that :func:`make_long_tailed` draws, and all test rows, in their order."""
        train = np.flatnonzero(~self.is_test)
        kept = train[make_long_tailed(self.labels[train], imbalance, seed)]
        rows = np.sort(np.concatenate([kept, np.flatnonzero(self.is_test)]))
        return LabelledFeatures(self.features[rows], self.labels[rows], self.is_test[rows], self.classes, self.source)


def load_features(path: str | Path) -> LabelledFeatures:
    """Read an ``.npz`` of ``features`` (N, D), ``label`` (N,), ``is_test`` (N,) and ``classes`` (C,).

    fp16 features stay fp16. Nothing pickled is read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no npz, lacks a key, or what it holds does not fit; file, key and row are named.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from rsfast.deblora import load_features
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "f.npz"
        ...     features = np.ones((2, 4), np.float32)
        ...     np.savez(path, features=features, label=[0, 1], is_test=[True, False], classes=["a", "b"])
        ...     load_features(path).classes
        ('a', 'b')
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"features: there is no file {path}")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip of arrays")
        archive = np.load(path)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no npz: {error}") from error
    with archive:
        missing = [key for key in KEYS if key not in archive]
        if missing:
            raise ValueError(f"{path}: no {' and no '.join(missing)}; it has {', '.join(archive.files) or 'nothing'}")
        arrays = {key: _array(path, archive, key) for key in KEYS}
    names = arrays["classes"]
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise ValueError(f"{path}: classes must be (C,) texts, got {names.dtype} of {names.shape}")
    names = np.char.decode(names, "utf-8") if names.dtype.kind == "S" else names
    return LabelledFeatures(arrays["features"], arrays["label"], arrays["is_test"], names.tolist(), str(path))


def _array(path: Path, archive, key: str) -> np.ndarray:
    try:
        return archive[key]
    except Exception as error:  # zlib, zipfile and NumPy each have their own for damaged bytes and pickles
        raise ValueError(f"{path}: {key} cannot be read: {error}") from error


def digits() -> LabelledFeatures:
    """Scikit-learn's 1,797 handwritten digits: 8x8 pixels as 64 features from 0 to 1, fp32.

    They come with scikit-learn. The split is fixed: of each digit's first 150 every third is a test row, 50 in all.

    Example:
        >>> import numpy as np
        >>> from rsfast.deblora import digits
        >>> data = digits().long_tailed(100, seed=0)
        >>> data.features.shape[1], int(data.is_test.sum())
        (64, 500)
        >>> sorted(np.bincount(data.labels[~data.is_test]).tolist())
        [1, 2, 3, 6, 10, 16, 27, 45, 74, 124]
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    is_test = np.zeros(len(labels), bool)
    for digit in range(10):
        is_test[np.flatnonzero(labels == digit)[2 : 3 * DIGITS_TEST : 3]] = True
    features = (pixels / 16).astype(np.float32)
    return LabelledFeatures(features, labels, is_test, tuple("0123456789"), "scikit-learn's digits")
