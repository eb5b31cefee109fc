"""Tiles of the kernels, and how much of S is worked on at once."""

from dataclasses import asdict, dataclass

import torch

from rsfast._dispatch import capability
from rsfast._tiles import cdiv, multiprocessors, pad

WORKSPACE = 2**29  # bytes of a pass's partial sums
BLOCK = 2**29  # elements of 16 bits in a block of G, both parts counted
BLOCK_ROWS, BLOCK_COLUMNS = 8192, 65536  # of G: then the products with it fill whole waves of an H200


@dataclass(frozen=True)
class Tiles:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    PIECES: int  # into which the epilogue cuts a tile
    GROUP: int
    num_warps: int
    num_stages: int

    def options(self) -> dict:
        return asdict(self)

    def grid(self, rows: int, columns: int, device: torch.device) -> tuple[int]:
        tiles = cdiv(rows, self.BLOCK_M) * cdiv(columns, self.BLOCK_N)
        return (min(tiles, multiprocessors(device)),)


def tiles(device: torch.device, rows: int, columns: int, width: int, *, large: bool) -> Tiles:
    """Tiles that compile without spills on sm_90, ``large`` or not; smaller for a batch that is smaller."""
    # sm_120 has descriptors, but 99 KB of shared memory and no warpgroups: the wide tile neither fits nor helps it
    block_n = 256 if large and 90 <= capability(device) < 120 else 128
    pieces = block_n // 64
    block_m, block_n = (min(size, pad(n)) for size, n in ((128, rows), (block_n, columns)))
    return Tiles(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=min(64, pad(width)),
        PIECES=min(pieces, max(1, block_n // 64)),
        GROUP=8,
        num_warps=8 if block_m * block_n >= 128 * 128 else 4,
        num_stages=3,
    )


def band_rows(tiles: Tiles, rows: int, columns: int) -> int:
    """Rows of S that the first pass takes at once, so that their partial sums fit the workspace."""
    a_row = 4 * columns * (tiles.PIECES / tiles.BLOCK_N + 1 / tiles.BLOCK_M)
    return min(rows, max(1, int(WORKSPACE / a_row) // tiles.BLOCK_M) * tiles.BLOCK_M)


def block_shape(rows: int, columns: int, parts: int) -> tuple[int, int]:
    """Rows and columns of a block of G."""
    rows = min(rows, BLOCK_ROWS)
    return rows, min(columns, BLOCK_COLUMNS, BLOCK // BLOCK_ROWS // parts)
