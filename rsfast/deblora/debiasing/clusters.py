"""What a clustering found, and the file that holds it."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rsfast._files import replace

ARRAYS = ("centers", "assignments", "counts")


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """Centres, and the cluster of every row.

    Attributes:
        centers: (K, D) fp32 (fp64 from fp64 features), in the space of the features.
        assignments: (N,) int64, -1 for noise.
        counts: (K,) int64: rows of each cluster.
        method: ``"kmeans"``, ``"minibatch"``, ``"dbscan"`` or ``"hdbscan"``: what was run.
        certified: Under a size constraint: whether the assignments were found to be proven of least cost for these
            centres. None without one.
        settings: What else it was made with, by name, as JSON can hold it.
    """

    centers: Any
    assignments: Any
    counts: Any
    method: str
    certified: bool | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        found = f"{len(self.centers)} clusters, {len(self.assignments)} rows, {self.noise} noise"
        return f"Clusters({self.method}, {found})"

    @property
    def noise(self) -> int:
        """Rows in no cluster; which classes have no other rows, :func:`classes_of_noise` says."""
        return len(self.assignments) - int(self.counts.sum())

    def save(self, path: str | Path) -> None:
        """Write an npz file, as a whole or not at all."""
        arrays = {name: _plain(getattr(self, name)) for name in ARRAYS}
        about = json.dumps(dict(method=self.method, certified=self.certified, settings=self.settings))

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:  # or savez would add an ending
                np.savez(file, about=about, **arrays)

        replace(Path(path), write)

    @classmethod
    def load(cls, path: str | Path) -> "Clusters":
        """Read what ``save`` wrote; arrays are NumPy's.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or another kind of file.
        """
        found = read_npz(path, (*ARRAYS, "about"))
        return cls(*(found[name] for name in ARRAYS), **json.loads(str(found["about"])))


def read_npz(path: str | Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Arrays of an npz file that holds at least ``names``."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no npz file: {type(error).__name__}: {error}") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; rsfast did not write it")
    return found


def _plain(array: Any) -> np.ndarray:
    return array.numpy(force=True) if isinstance(array, Tensor) else np.asarray(array)
