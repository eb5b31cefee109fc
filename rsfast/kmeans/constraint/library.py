"""The size constraint's halves in the compiled library, with the contracts of those in ``ascent`` and ``paths``."""

import contextlib
import ctypes

import numpy as np
import torch
from torch import Tensor

from rsfast import _extension
from rsfast._dispatch import INTERPRET
from rsfast.kmeans.constraint.finish import PLAIN, Way

SIZE, ARRAY = ctypes.c_int64, ctypes.c_void_p
MOST_CLUSTERS, MOST_POINTS = 4096, 2**31 - 1  # of the kernels


def why_not(costs: Tensor) -> list[str]:
    """Reasons that the library cannot serve these costs."""
    if not (costs.is_cuda or INTERPRET):
        return [f"the costs are on {costs.device}, not on a GPU"]
    wants = {
        f"there are {len(costs)} points; the kernels take up to {MOST_POINTS}": len(costs) <= MOST_POINTS,
        f"there are {costs.shape[1]} clusters; the kernels take up to {MOST_CLUSTERS}": costs.shape[1] <= MOST_CLUSTERS,
    }
    return _extension.missing(costs.device) + [reason for reason, fine in wants.items() if not fine]


def climb(gaps: Tensor, subsidies: Tensor, lower: Tensor, upper: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    sizes = _extension.library().rsf_climb_workspace
    sizes.argtypes, sizes.restype = [SIZE] * 2, SIZE
    workspace = torch.empty(sizes(*gaps.shape), dtype=torch.uint8, device=gaps.device)
    subsidies, labels = subsidies.clone(), torch.empty_like(gaps[0])
    call = _extension.function("rsf_climb", *[SIZE] * 3, *[ARRAY] * 6, SIZE, ARRAY)
    tensors = (gaps, lower, upper, subsidies, labels, workspace)
    with _on(gaps) as stream:
        call(*gaps.shape, rounds, *(t.data_ptr() for t in tensors), len(workspace), stream)
    return subsidies, labels


def widths(gaps: Tensor, subsidies: Tensor, labels: Tensor) -> Tensor:
    counts = torch.zeros(64, dtype=torch.int64, device=gaps.device)
    call = _extension.function("rsf_widths", *[SIZE] * 2, *[ARRAY] * 5)
    with _on(gaps) as stream:
        call(*gaps.shape, *(t.data_ptr() for t in (gaps, subsidies, labels, counts)), stream)
    return counts


def near(gaps: Tensor, subsidies: Tensor, labels: Tensor, reach: int) -> Tensor:
    result = torch.empty(gaps.shape[1], dtype=torch.bool, device=gaps.device)
    call = _extension.function("rsf_near", *[SIZE] * 3, *[ARRAY] * 5)
    with _on(gaps) as stream:
        call(*gaps.shape, reach, *(t.data_ptr() for t in (gaps, subsidies, labels, result)), stream)
    return result


def shortest_paths(
    lower: np.ndarray, upper: np.ndarray, counts: np.ndarray, subsidies: np.ndarray, gaps: np.ndarray,
    labels: np.ndarray, reach: int,
) -> bool:  # fmt: skip
    found = _extension.of_host() or _extension.library()
    call = _extension.bind(found, "rsf_shortest_paths", *[SIZE] * 3, *[ARRAY] * 7)
    ran_out = np.zeros(1, np.int32)
    arrays = (lower, upper, gaps, counts, subsidies, labels, ran_out)
    call(len(counts), len(labels), reach, *(array.ctypes.data for array in arrays))
    return not ran_out[0]


@contextlib.contextmanager
def _on(tensor: Tensor):
    """The current stream of the tensor's GPU, which is the current one meanwhile; None on the CPU."""
    with torch.cuda.device_of(tensor):
        yield torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None


def way(fused: bool) -> Way:
    """All of the library, or the half that runs on the host where an installed library has it."""
    if fused:
        return Way(climb, widths, near, shortest_paths)
    return PLAIN._replace(shortest_paths=shortest_paths) if _extension.of_host() else PLAIN
