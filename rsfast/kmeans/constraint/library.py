"""The size constraint's halves in the compiled library, with the contracts of those in PyTorch and NumPy."""

import ctypes

import numpy as np

from rsfast import _extension

SIZE, ARRAY = ctypes.c_int64, ctypes.c_void_p


def shortest_paths(
    lower: np.ndarray, upper: np.ndarray, counts: np.ndarray, subsidies: np.ndarray, gaps: np.ndarray,
    labels: np.ndarray, reach: int,
) -> bool:  # fmt: skip
    """:func:`rsfast.kmeans.constraint.paths.shortest_paths`, of contiguous int64 arrays."""
    call = _extension.function("rsf_shortest_paths", *[SIZE] * 3, *[ARRAY] * 7)
    ran_out = np.zeros(1, np.int32)
    arrays = (lower, upper, gaps, counts, subsidies, labels, ran_out)
    call(len(counts), len(labels), reach, *(array.ctypes.data for array in arrays))
    return not ran_out[0]
