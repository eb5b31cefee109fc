"""The rows that scores leave in doubt, decided by ||x - c||^2 - s as it is written, in float64.

How many they are is known on the device only: a fixed number of programs shares the list.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast._tiles import cdiv, multiprocessors, pad
from rsfast.kmeans.kernels.plan import FEW, few_tiles
from rsfast.kmeans.kernels.prepare import Centers
from rsfast.kmeans.kernels.tiles import error_of, products

LAST = tl.constexpr(2**31 - 1)
CHOICE = 4  # centres that choose_kernel holds, a power of two above those that many_kernel names


@triton.jit
def choose_kernel(
    x_ptr, centers_ptr, subsidies_ptr, nearest_ptr, labels_ptr, distances_ptr, listed_ptr, counts_ptr, width, pitch,
    DISTANCES: tl.constexpr, KEPT: tl.constexpr, CHOICE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Which of up to KEPT centres is the nearest of a listed row."""
    i = tl.arange(0, CHOICE)
    for at in tl.range(tl.program_id(0), tl.load(counts_ptr), tl.num_programs(0)):
        r = tl.load(listed_ptr + at).to(tl.int64)
        k = tl.load(nearest_ptr + KEPT * r + i, mask=i < KEPT, other=-1)
        total = tl.zeros([CHOICE, BLOCK_D], tl.float64)
        for first in tl.range(0, width, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            mask = (k >= 0)[:, None] & (d < width)[None, :]
            c = tl.load(centers_ptr + k[:, None].to(tl.int64) * width + d[None, :], mask=mask, other=0.0)
            x = tl.load(x_ptr + r * pitch + d, mask=d < width, other=0.0).to(tl.float64)
            apart = tl.where(mask, x[None, :] - c.to(tl.float64), 0.0)
            total += apart * apart
        distance = tl.sum(total, 1)
        value = distance
        if subsidies_ptr is not None:
            value -= tl.load(subsidies_ptr + k, mask=k >= 0, other=0.0).to(tl.float64)
        value = tl.where(k >= 0, value, float("inf"))
        label = tl.min(tl.where(value == tl.min(value, 0), k, LAST), 0)
        tl.store(labels_ptr + r, label.to(tl.int64))
        if DISTANCES:
            tl.store(distances_ptr + r, tl.sum(tl.where(k == label, distance, 0.0), 0).to(tl.float32))


@triton.jit
def _apart(x_ptr, centers_ptr, r, k, mine, width, pitch, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """||x - c||^2 of one row and some of a tile's centres; every centre's numbers are added up in the same order."""
    total = tl.zeros([BLOCK_K, BLOCK], tl.float64)
    for first in tl.range(0, width, BLOCK):
        d = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + r * pitch + d, mask=d < width, other=0.0).to(tl.float64)
        mask = mine[:, None] & (d < width)[None, :]
        c = tl.load(centers_ptr + k[:, None].to(tl.int64) * width + d[None, :], mask=mask, other=0.0).to(tl.float64)
        total += (x[None, :] - c) * (x[None, :] - c)
    return tl.sum(total, 1)


@triton.jit
def search_kernel(
    x_ptr, high, low, middle_ptr, bias_ptr, limits_ptr, scale_ptr, centers_ptr, subsidies_ptr, labels_ptr,
    distances_ptr, listed_ptr, counts_ptr, rows, width, pitch, centers, padded,
    DISTANCES: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The nearest of all centres: of every tile those whose score is within the error of the best so far."""
    count = tl.load(counts_ptr + 1)
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    scale = tl.load(scale_ptr)
    for first in tl.range(tl.program_id(0) * BLOCK_M, count, tl.num_programs(0) * BLOCK_M):
        inside = first + i < count
        r = tl.load(listed_ptr + (rows - 1 - first - i), mask=inside, other=0).to(tl.int64)
        least = tl.full([BLOCK_M], float("inf"), tl.float32)
        best = tl.full([BLOCK_M], float("inf"), tl.float64)
        distances = tl.zeros([BLOCK_M], tl.float64)
        labels = tl.zeros([BLOCK_M], tl.int64)
        for column in tl.range(0, centers, BLOCK_K):
            acc, squares = products(
                x_ptr, high, low, middle_ptr, scale, 0, r, inside, column, width, pitch, centers, padded,
                True, True, CENTRED, False, BLOCK_M, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            k = column + j
            bias = tl.load(bias_ptr + centers + k, mask=k < centers, other=0.0)
            score = tl.where((k < centers)[None, :], bias[None, :] - 2 * acc, float("inf"))
            least = tl.minimum(least, tl.min(score, 1))
            limit = least + 2 * error_of(squares, limits_ptr + 2)
            near = inside[:, None] & (k < centers)[None, :] & ~(score > limit[:, None])
            waiting = tl.max(near.to(tl.int32), 1)
            while tl.max(waiting, 0) > 0:
                here = i == tl.min(tl.where(waiting > 0, i, BLOCK_M), 0)
                mine = tl.max(tl.where(here[:, None], near.to(tl.int32), 0), 0) > 0
                row = tl.sum(tl.where(here, r, 0), 0)
                distance = _apart(x_ptr, centers_ptr, row, k, mine, width, pitch, BLOCK_K, BLOCK)
                value = distance
                if subsidies_ptr is not None:
                    value -= tl.load(subsidies_ptr + k, mask=mine, other=0.0).to(tl.float64)
                value = tl.where(mine, value, float("inf"))
                least_value = tl.min(value, 0)
                label = tl.min(tl.where(value == least_value, k, LAST), 0)
                better = here & (least_value < best)
                best = tl.where(better, least_value, best)
                distances = tl.where(better, tl.sum(tl.where(k == label, distance, 0.0), 0), distances)
                labels = tl.where(better, label.to(tl.int64), labels)
                waiting = tl.where(here, 0, waiting)
        tl.store(labels_ptr + r, labels, mask=inside)
        if DISTANCES:
            tl.store(distances_ptr + r, distances.to(tl.float32), mask=inside)


def recheck(
    x: Tensor, ready: Centers, labels: Tensor, distances: Tensor | None, chosen: Tensor, listed: Tensor, counts: Tensor
) -> None:
    """Labels, and distances if there are any, of the listed rows."""
    K, many = len(ready.high), len(ready.high) > FEW
    programs = 8 * multiprocessors(x.device)
    if many:
        choose_kernel[(min(len(x), 2 * programs),)](
            x, ready.given, ready.subsidies, chosen, labels, distances, listed, counts, x.shape[1], x.stride(0),
            DISTANCES=distances is not None, KEPT=chosen.shape[1], CHOICE=CHOICE, BLOCK_D=256, num_warps=1,
        )  # fmt: skip
    step = few_tiles(x, FEW).BLOCK_D
    block_m = min(64 if many else 16, pad(len(x)))
    search_kernel[(min(cdiv(len(x), block_m), programs // 4),)](
        x, ready.high, ready.low, ready.middle, ready.bias, ready.limits, ready.scale, ready.given, ready.subsidies,
        labels, distances, listed, counts, len(x), x.shape[1], x.stride(0), K, ready.high.shape[1],
        DISTANCES=distances is not None, CENTRED=x.dtype == torch.float32,
        BLOCK_M=block_m, BLOCK_K=64, BLOCK_D=step, BLOCK=32,
        num_warps=8 if block_m == 64 else 4, num_stages=2,
    )  # fmt: skip
