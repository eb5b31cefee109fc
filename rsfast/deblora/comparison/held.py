"""Rows of stored features: in memory where they are few, and where they are many in a file, or read when asked for."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rsfast.deblora.arrays import BATCH_BYTES, as_rows, give_back, mapping_of
from rsfast.deblora.learning.inputs import FeatureInputs

HELD = 2**30  # bytes of fp32 rows of a file that are taken into memory


def too_many(features: np.ndarray, count: int) -> bool:
    """Whether so many rows stay on disk."""
    return mapping_of(features) is not None and 4 * count * features.shape[1] > HELD


def taken(features: np.ndarray, rows: np.ndarray, path: Path) -> np.ndarray:
    """Rows in fp32: in memory, or in a new file."""
    if not too_many(features, len(rows)):
        return np.asarray(features[rows], dtype=np.float32)
    source, found = as_rows(features), in_file(path, len(rows), features.shape[1])
    size = max(1, BATCH_BYTES // (4 * source.dim))
    for start in range(0, len(rows), size):
        here = torch.from_numpy(rows[start : start + size])
        found[start : start + size] = source.take(here).numpy()
        give_back(mapping_of(found))
    return found


def in_file(path: Path, count: int, dim: int) -> np.ndarray:
    """A new file of fp32 rows."""
    return np.memmap(path, np.float32, "w+", shape=(count, dim))


class PartInputs(FeatureInputs):
    """Some rows of features in a file, whose values have been looked at before; read when they are asked for."""

    def __init__(self, features: np.ndarray, rows: np.ndarray):
        super().__init__(features)
        self.chosen = torch.from_numpy(rows)

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices, device) -> Tensor:
        return super().batch(self.chosen[torch.as_tensor(indices)], device)

    def check(self) -> None:
        """Nothing."""

    def digest(self) -> str:
        return f"{super().digest()} {hashlib.blake2b(self.chosen.numpy().tobytes()).hexdigest()}"
