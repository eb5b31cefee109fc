"""Rows of features, wherever they are: tensors, NumPy arrays, memory-mapped files, feature stores."""

import mmap
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = {np.dtype(np.float16): torch.float16, np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}
BATCH_BYTES = 2**25  # of rows read at once
SCATTERED = 64  # rows read between giving pages back: each may bring 64 KiB of its neighbours along
NAMED = 5  # wrong rows that an error lists


class Rows:
    """(N, D) floating point features, read a part at a time.

    Attributes:
        dim: D.
        dtype: A torch dtype.
        device: Where a tensor lives; the CPU for everything else.
        nbytes: Of all rows.
        on_disk: Whether they are a memory-mapped file, of which no page stays resident after it was read.
    """

    def __init__(self, source: Tensor | np.ndarray, name: str):
        self._source, self.name, self._mapping = source, name, None
        self.is_numpy = isinstance(source, np.ndarray)
        self.dim, self.dtype, self.device = source.shape[1], None, torch.device("cpu")
        if self.is_numpy:
            self._mapping, self.dtype = mapping_of(source), KINDS[source.dtype]
        else:
            self.dtype, self.device = source.dtype, source.device
        self.nbytes, self.on_disk = len(source) * self.dim * self.dtype.itemsize, self._mapping is not None

    def __len__(self) -> int:
        return len(self._source)

    def batches(
        self, size: int | None = None, device: torch.device | str | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """``(start, rows)`` in order, ``size`` rows at a time; of NumPy arrays they may be views: not to be changed."""
        size = size or max(1, BATCH_BYTES // (self.dim * self.dtype.itemsize))
        for start in range(0, len(self), size):
            yield start, self._read(slice(start, start + size)).to(device or self.device)

    def take(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Copies of rows (M,) int64, in the order asked for."""
        device = device or self.device
        if not self.on_disk:
            return self._read(indices.to(self.device) if not self.is_numpy else indices.numpy(force=True)).to(device)
        ordered, places = indices.cpu().sort()  # a disk prefers to go forward
        found = torch.empty(len(indices), self.dim, dtype=self.dtype)
        for some, there in zip(ordered.split(SCATTERED), places.split(SCATTERED), strict=True):
            found[there] = self._read(some.numpy())
        return found.to(device)

    def all(self, device: torch.device | str | None = None) -> Tensor:
        """All rows as one tensor: the caller's own memory where that is possible, not to be changed."""
        device = torch.device(device or self.device)
        if not self.on_disk:
            return self._read(slice(None)).to(device)
        found = torch.empty(len(self), self.dim, dtype=self.dtype, device=device)
        for start, part in self.batches():
            found[start : start + len(part)] = part
        return found

    def back(self, tensor: Tensor) -> Any:
        """A result in the kind that came: NumPy for NumPy and stores, else a tensor on the features' device."""
        return tensor.numpy(force=True) if self.is_numpy else tensor.to(self.device)

    def check(self, checksum: bool = False) -> int:
        """Refuse NaN and infinity by row; the CRC-32 of all bytes, or 0 if that was not asked for."""
        wrong, count, crc = [], 0, 0
        for start, part in self.batches(None if self.on_disk else len(self)):
            if not torch.stack(part.aminmax()).isfinite().all():  # NaN is what aminmax gives for it
                bad = (~part.isfinite()).any(1).nonzero()[:, 0] + start
                wrong, count = wrong + bad[: NAMED - len(wrong)].tolist(), count + len(bad)
            if checksum:
                crc = zlib.crc32(part.contiguous().cpu().view(torch.uint8).numpy(), crc)
        if wrong:
            rows = ", ".join(map(str, wrong)) + (", ..." if count > len(wrong) else "")
            raise ValueError(f"{self.name} must be finite, got NaN or infinity in {count} row(s): {rows}")
        return crc

    def _read(self, index: Any) -> Tensor:
        part = self._source[index]
        if not self.is_numpy:
            return part
        if self._mapping is None:
            return torch.from_numpy(np.require(part, requirements="CW"))  # a tensor cannot be read-only
        part = torch.from_numpy(np.array(part))
        give_back(self._mapping)
        return part


def as_rows(features: Any, name: str = "features") -> Rows:
    """Features of any kind as :class:`Rows`; values are not looked at (:meth:`Rows.check` does).

    Args:
        features: (N, D) of fp16, fp32, fp64 (tensors: bf16 too): a tensor on any device, a NumPy array,
            an ``np.memmap`` or a view of one, or whatever has one as ``.features``: a ``FeatureStore``.
        name: What errors call it.

    Raises:
        TypeError: It is none of these.
        ValueError: It is not (N, D) with N and D above 0, or of another dtype.

    A memory-mapped file is read into memory of its own and its pages are given back after each batch, so that resident
    memory does not grow with what was read; one opened copy-on-write (mode ``"c"``) is taken as an array in memory.

    Example:
        >>> import numpy as np
        >>> from rsfast.deblora import as_rows
        >>> [(start, len(part)) for start, part in as_rows(np.zeros((5, 3), np.float16)).batches(2)]
        [(0, 2), (2, 2), (4, 1)]
    """
    source = features if isinstance(features, Tensor | np.ndarray) else getattr(features, "features", None)
    if not isinstance(source, Tensor | np.ndarray):
        raise TypeError(f"{name} must be a tensor, a NumPy array or a feature store, got {type(features).__name__}")
    if source.ndim != 2 or not source.shape[0] or not source.shape[1]:
        raise ValueError(f"{name} must be of shape (N, D) with N and D of at least 1, got {tuple(source.shape)}")
    if isinstance(source, Tensor):
        if source.layout != torch.strided or source.dtype not in (*KINDS.values(), torch.bfloat16):
            raise ValueError(f"{name} must be dense, of fp16, bf16, fp32 or fp64, got {source.dtype}, {source.layout}")
        return Rows(source.detach(), name)
    if source.dtype not in KINDS:
        raise ValueError(f"{name} must be of float16, float32 or float64 in native byte order, got {source.dtype.str}")
    return Rows(source, name)


def as_integers(values: Any, name: str, count: int, *, least: int = 0, most: int | None = None) -> Tensor:
    """(N,) int64 on the CPU, or on the values' GPU, each in ``least..most``; errors name the argument and the index."""
    found = values if isinstance(values, Tensor) else np.asarray(values)
    if isinstance(found, np.ndarray) and found.dtype.kind in "iu":
        found = torch.from_numpy(found.astype(np.int64))
    if not isinstance(found, Tensor) or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {found.dtype}")
    found = found.long()
    if found.shape != (count,):
        raise ValueError(f"{name} must be of shape ({count},), one integer per row, got {tuple(found.shape)}")
    low, high = (int(n) for n in torch.stack(found.aminmax()).tolist()) if count else (least, least)
    if low < least or (most is not None and high > most):
        at = int(((found < least) | (found > (high if most is None else most))).nonzero()[0])
        limit = f"at least {least}" if most is None else f"in {least}..{most}"
        raise ValueError(f"{name} must be {limit}, got {int(found[at])} at index {at}")
    return found


def mapping_of(array: np.ndarray) -> mmap.mmap | None:
    """The file mapping under an array, if its pages may be given back without losing what was written to them."""
    shared = False
    while isinstance(array, np.ndarray):
        shared |= isinstance(array, np.memmap) and array.mode in ("r", "r+", "w+")  # "c" has changes of its own
        array = array.base
    return array if shared and isinstance(array, mmap.mmap) and hasattr(array, "madvise") else None


def give_back(mapping: mmap.mmap | None) -> None:
    """Pages that were touched stay in the file and leave this process."""
    if mapping is not None:
        mapping.madvise(mmap.MADV_DONTNEED)
