"""Which kernels run for a call, and with which tiles."""

from dataclasses import dataclass

import torch

from rsfast._tiles import pad


@dataclass(frozen=True)
class Plan:
    """Tile sizes of one call; feature blocks are padded to powers of two."""

    resident: bool  # a sample fits one tile
    BLOCK_L: int  # tokens of a tile
    BLOCK_R: int  # bottleneck
    BLOCK_S: int  # width of the shared sub-adapter
    BLOCK_H: int  # head
    BLOCK_HS: int  # head of the shared sub-adapter
    BLOCK_D: int  # step over the width
    BLOCK_K: int  # step over what is contracted, or over keys
    BLOCK_N: int  # step over outputs
    num_warps: int
    grad_warps: int  # of the attention's backward over a whole sample: few, so that each thread has registers for it

    def blocks(self, names: str) -> dict[str, int]:
        """The tile sizes named by their last letters: ``"L R D"``."""
        return {f"BLOCK_{n}": getattr(self, f"BLOCK_{n}") for n in names.split()}


def plan(length: int, bottleneck: int, heads: int, shared_heads: int, dtype: torch.dtype, capability: int) -> Plan:
    """Tiles that compile without spills on sm_90; from metadata only, so equal calls choose equally.

    sm_80 has no wgmma, so operands of a product take registers, and a sample of 64 tokens spills.
    """
    block_r = pad(bottleneck)
    wide = dtype == torch.float32
    large = block_r > 128 or (wide and bottleneck // heads >= 64)
    tokens = 16 if large else 32 if wide else 64  # what the registers of one program hold
    held = 16 if wide else tokens if capability >= 90 else min(tokens, 32)  # a whole sample, next to its attention
    return Plan(
        resident=length <= held,
        BLOCK_L=min(tokens, pad(length)),
        BLOCK_R=block_r,
        BLOCK_S=pad(bottleneck // 2),
        BLOCK_H=pad(bottleneck // heads),
        BLOCK_HS=pad(bottleneck // 2 // shared_heads),
        BLOCK_D=32 if wide else 64,
        BLOCK_K=32 if wide else 64,
        BLOCK_N=32 if wide else 64,
        num_warps=8,
        grad_warps=8 if wide else 4,
    )


# FIX
