"""All squared distances, which only those who ask for them pay for."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast._tiles import cdiv, dot, place
from rsfast.kmeans.kernels.plan import pairs_tiles


@triton.jit
def distances_kernel(
    x_ptr, offsets_ptr, middle_ptr, norms_ptr, out_ptr, rows, width, pitch, centers,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """||x - m||^2 + ||c - m||^2 - 2 (x - m) . (c - m) in fp32; m is about the mean centre."""
    pm, pk = place(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(centers, BLOCK_K), GROUP)
    r = pm.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pk * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = (r < rows)[:, None] & (d < width)[None, :]
        x = tl.load(x_ptr + r[:, None] * pitch + d[None, :], mask=mask, other=0.0).to(tl.float32)
        middle = tl.load(middle_ptr + d, mask=d < width, other=0.0)
        x = tl.where((d < width)[None, :], x - middle[None, :], 0.0)
        mask = (k < centers)[:, None] & (d < width)[None, :]
        c = tl.load(offsets_ptr + k[:, None].to(tl.int64) * width + d[None, :], mask=mask, other=0.0)
        squares += tl.sum(x * x, 1)
        acc = dot(x, c.T, acc)
    norms = tl.load(norms_ptr + k, mask=k < centers, other=0.0)
    far = squares[:, None] + norms[None, :] - 2 * acc
    far = tl.where(far < 0, 0.0, far)  # NaN stays
    tl.store(out_ptr + r[:, None] * centers + k[None, :], far, mask=(r < rows)[:, None] & (k < centers)[None, :])


def distances(x: Tensor, centers: Tensor) -> Tensor:
    rows, width = x.shape
    out = x.new_empty(rows, len(centers), dtype=torch.float32)
    if not rows:
        return out
    middle = centers.mean(0, dtype=torch.float64).float()
    offsets = (centers.double() - middle).float().contiguous()
    norms = offsets.double().square().sum(1).float()
    plan = pairs_tiles(x, len(centers))
    distances_kernel[(cdiv(rows, plan.BLOCK_M) * cdiv(len(centers), plan.BLOCK_K),)](
        x, offsets, middle, norms, out, rows, width, x.stride(0), len(centers), GROUP=8, **plan.options()
    )  # fmt: skip
    return out
