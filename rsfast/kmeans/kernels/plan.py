"""Which kernels run, and in which tiles; chosen to compile without spills on sm_90, timed on nothing yet."""

import dataclasses

import torch
from torch import Tensor

from rsfast._dispatch import capability
from rsfast._tiles import cdiv, multiprocessors, pad, roomy

FEW = 128  # centres up to which all scores of a row are in one tile, with both parts of the centres
CHUNK = 4096  # rows whose labels one program counts


@dataclasses.dataclass(frozen=True)
class Tiles:
    BLOCK_M: int
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int
    num_stages: int

    def options(self) -> dict:
        return dataclasses.asdict(self)


def few_tiles(x: Tensor, centers: int) -> Tiles:
    """A step over the features is always as long, so that one bound of the errors serves all."""
    block_k = pad(centers)
    block_m = (128 if block_k <= 64 else 64) // (1 if _aligned(x) else 4)
    stages = 3 if roomy(capability(x.device)) else 2
    return Tiles(min(block_m, pad(len(x))), block_k, 64, 4 if block_k <= 32 else 8, stages)


def many_tiles(x: Tensor, centers: int) -> Tiles:
    # wider ones do not fit the registers of fp32 rows, which are split there
    narrow = x.element_size() == 4
    if not _aligned(x):
        return Tiles(min(64, pad(len(x))), 128, 64, 8, 2)
    if not roomy(capability(x.device)):
        return Tiles(min(64 if narrow else 128, pad(len(x))), 128, 64, 8, 2)
    if narrow or capability(x.device) < 90:
        return Tiles(min(128, pad(len(x))), 128, 64, 8, 3)
    return Tiles(min(128, pad(len(x))), 256, 64, 8, 4)


def _aligned(x: Tensor) -> bool:
    """Whether all rows begin at multiples of 16 bytes; others are read a number at a time, each with its address."""
    return not (x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16)


def tma_reads(x: Tensor) -> bool:
    """Whether descriptors can read the rows."""
    return capability(x.device) >= 90 and _aligned(x)


def sums_by_product(x: Tensor, clusters: int, weighted: bool) -> bool:
    """Whether sums by label are products with indicators: of fp32 numbers these cost three times as much."""
    return clusters <= (128 if weighted or x.dtype == torch.float32 else 256)


def sums_tiles(x: Tensor, clusters: int) -> tuple[Tiles, int]:
    """Tiles, and into how many chunks the rows are cut: all programs run at the same time, about."""
    block_k = min(128, pad(clusters))
    block_d = min(64 if block_k == 128 or x.dtype == torch.float32 else 128, pad(x.shape[1]))
    columns = cdiv(x.shape[1], block_d) * cdiv(clusters, block_k)
    return Tiles(64, block_k, block_d, 4, 3), max(1, 4 * multiprocessors(x.device) // columns)


def pairs_tiles(x: Tensor, centers: int) -> Tiles:
    return Tiles(min(64, pad(len(x))), min(64, pad(centers)), 32, 4, 3)
