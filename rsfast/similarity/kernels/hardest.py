"""Triplet loss of the hardest negatives: one pass over the pairs, and gradients in O(N D).

A violation grows with its score, so the hardest negative of an image is its text of the highest score, and the loss's
gradient has two pairs for each row, the positive and that negative; for each column likewise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast._dispatch import capability, once_differentiable, register
from rsfast._tiles import LOG2E, cast, cdiv, pad, pieces, place
from rsfast.similarity.kernels.plan import Tiles
from rsfast.similarity.kernels.prepare import Batch, matches
from rsfast.similarity.kernels.tiles import at_edge, inside, scores, weighed, weighed_grad

_LAST = tl.constexpr(2**31 - 1)
BLOCK = 256  # rows or columns of a program that looks at the violations


@triton.jit
def _key(score, index):
    """Integers in the order of the scores; of equal scores the first has the highest key."""
    bits = score.to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & _LAST
    return (bits.to(tl.int64) << 32) | (index ^ _LAST).to(tl.int64)


@triton.jit
def hardest_kernel(
    a, b, ids_a_ptr, ids_b_ptr, row_keys_ptr, column_keys_ptr, n, width,
    MASK_SAME: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Keys of each row's and each column's highest score: a maximum of integers, which is the same in any order."""
    tiles_m, tiles_n = tl.cdiv(n, BLOCK_M), tl.cdiv(n, BLOCK_N)
    PIECE: tl.constexpr = BLOCK_N // PIECES
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pm, pn = place(tile, tiles_m, tiles_n, GROUP)
        row, column = pm * BLOCK_M, pn * BLOCK_N
        acc = scores(a, b, row, column, n, n, width, PARTS, TMA, BLOCK_M, BLOCK_N, BLOCK_K)
        edge = at_edge(row, column, n, n, 0, True, BLOCK_M, BLOCK_N)
        rows = row + tl.arange(0, BLOCK_M)
        parts = pieces(acc, BLOCK_M, BLOCK_N, PIECES)
        for i in tl.static_range(PIECES):
            x = parts[i]
            columns = column + i * PIECE + tl.arange(0, PIECE)
            if MASK_SAME:
                same = (
                    tl.load(ids_a_ptr + rows, mask=rows < n, other=-1)[:, None]
                    == tl.load(ids_b_ptr + columns, mask=columns < n, other=-2)[None, :]
                )
                x = tl.where(same, float("-inf"), x)
            if edge:
                x = tl.where(inside(rows, columns, n, n, 0, True), x, float("-inf"))
            top = tl.max(x, 1)
            first = tl.min(tl.where(x == top[:, None], columns[None, :], _LAST), 1)
            tl.atomic_max(row_keys_ptr + rows, _key(top, first), mask=rows < n, sem="relaxed")
            top = tl.max(x, 0)
            first = tl.min(tl.where(x == top[None, :], rows[:, None], _LAST), 0)
            tl.atomic_max(column_keys_ptr + columns, _key(top, first), mask=columns < n, sem="relaxed")


@triton.jit
def violations_kernel(
    keys_ptr, d_ptr, scales_ptr, slopes_ptr, hardest_ptr, losses_ptr, n, margin, weight,
    GAMMA: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the keys of rows, then of columns, say: slopes, hardest negatives, and of each block the loss."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < 2 * n
    keys = tl.load(keys_ptr + at, mask=mask, other=0)
    bits = (keys >> 32).to(tl.int32)
    score = (bits ^ ((bits >> 31) & _LAST)).to(tl.float32, bitcast=True).to(tl.float64)
    if PARTS == 2:
        score /= tl.load(scales_ptr).to(tl.float64) * tl.load(scales_ptr + 1)
    c = score + (margin - tl.load(d_ptr + at % n, mask=mask, other=0.0).to(tl.float64))
    c = tl.where(c < 0, 0.0, c)  # NaN stays
    u = 1 - tl.exp2(c * -LOG2E)  # in float64, else a small one would be lost
    if GAMMA == 0:
        u = tl.where(c > 0, 1.0, 0.0).to(tl.float64)
    loss, slope = tl.where(c == c, weighed(c, u, GAMMA), c), weight * weighed_grad(c, u, GAMMA)
    tl.store(slopes_ptr + at, slope, mask=mask)
    tl.store(hardest_ptr + at, tl.where(slope > 0, ((keys & _LAST) ^ _LAST).to(tl.int32), n), mask=mask)
    tl.store(losses_ptr + tl.program_id(0), tl.sum(tl.where(mask, weight * loss, 0.0), 0))


@triton.jit
def hardest_grad_kernel(
    y_ptr, dx_ptr, dloss_ptr, slope_ptr, hardest_ptr, other_slope_ptr, order_ptr, starts_ptr, N, D,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx_i = p_i (y_h(i) - y_i) - q_i y_i + the sum of q_j y_j over those j whose hardest negative is i.

    p are the slopes of this side, h its hardest negatives (N for none), q the slopes of the other side. ``order`` lists
    the other side by its hardest negatives, in which i's begin at ``starts[i]``.
    """
    i = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    slope, hardest = tl.load(slope_ptr + i), tl.load(hardest_ptr + i).to(tl.int64)
    y = tl.load(y_ptr + i * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    last = tl.where(hardest < N, D, 0)  # not "& (hardest < N)": the interpreter of Triton 3.9 takes no scalar there
    y_hardest = tl.load(y_ptr + hardest * D + cols, mask=cols < last, other=0.0).to(tl.float32)
    acc = slope * (y_hardest - y) - tl.load(other_slope_ptr + i) * y
    end = tl.load(starts_ptr + i + 1)
    for start in tl.range(tl.load(starts_ptr + i), end, BLOCK_S):
        at = start + tl.arange(0, BLOCK_S)
        j = tl.load(order_ptr + at, mask=at < end, other=0)
        q = tl.load(other_slope_ptr + j, mask=at < end, other=0.0)
        mask = (at < end)[:, None] & (cols[None, :] < D)
        acc += tl.sum(q[:, None] * tl.load(y_ptr + j[:, None] * D + cols[None, :], mask=mask, other=0.0), 0)
    acc *= tl.load(dloss_ptr)
    tl.store(dx_ptr + i * D + cols, cast(acc, dx_ptr.dtype.element_ty), mask=cols < D)


def _tiles(n: int, width: int, device: torch.device) -> Tiles:
    """High tiles: with more rows to a thread, a column's maximum takes fewer steps between threads."""
    block_m = 256 if capability(device) >= 90 else 128
    block_m, block_n = (min(size, pad(n)) for size in (block_m, 128))
    return Tiles(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=min(64, pad(width)),
        PIECES=max(1, block_n // 64),
        GROUP=8,
        num_warps=8 if block_m == 256 or block_n == 128 else 4,
        num_stages=3,
    )


def fwd(
    image: Tensor, text: Tensor, image_ids: Tensor | None, text_ids: Tensor | None, margin: float, gamma: float,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss; of each image and each text, (2, N), its loss's slope in a score and its hardest negative (N for none)."""
    batch = Batch(image, text, diagonal=True)
    plan = _tiles(batch.N, batch.width, batch.device)
    masked = image_ids is not None
    ids = matches(image_ids, image_ids if text_ids is None else text_ids)[:2] if masked else (None, None)
    keys = torch.full((2, batch.N), -(2**63), dtype=torch.int64, device=batch.device)
    hardest_kernel[plan.grid(batch.N, batch.N, batch.device)](
        batch.operand(batch.a, plan.BLOCK_M, plan.BLOCK_K), batch.operand(batch.b, plan.BLOCK_N, plan.BLOCK_K),
        *ids, *keys, batch.N, batch.width, MASK_SAME=masked, PARTS=batch.parts, TMA=batch.tma, **plan.options(),
    )  # fmt: skip
    slopes = image.new_empty(2, batch.N, dtype=torch.float32)
    hardest = image.new_empty(2, batch.N, dtype=torch.int32)
    losses = image.new_empty(cdiv(2 * batch.N, BLOCK), dtype=torch.float64)
    violations_kernel[(len(losses),)](
        keys, batch.d, batch.scales, slopes, hardest, losses, batch.N, margin, weight,
        GAMMA=gamma, PARTS=batch.parts, BLOCK=BLOCK,
    )  # fmt: skip
    return losses.sum().float(), slopes, hardest


def bwd(
    dloss: Tensor, image: Tensor, text: Tensor, slopes: Tensor, hardest: Tensor, need_image: bool, need_text: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the features, empty if not needed."""
    dimage = _grad(dloss, text, *slopes, *hardest, need_image)
    return dimage, _grad(dloss, image, *slopes.flip(0), *hardest.flip(0), need_text)


def _grad(dloss, y, slope, other_slope, hardest, other_hardest, need):
    N, D = y.shape
    dx = y.new_empty(N if need else 0, D)
    if need:
        ordered, order = other_hardest.sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(N + 1, dtype=torch.int32, device=y.device), out_int32=True)
        block_d = min(512, pad(D))
        hardest_grad_kernel[N, cdiv(D, block_d)](
            y, dx, dloss, slope, hardest, other_slope, order, starts, N, D,
            BLOCK_S=16, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return dx


def _fake_fwd(image, text, image_ids, text_ids, margin, gamma, weight):
    N = len(image)
    return (
        image.new_empty((), dtype=torch.float32),
        image.new_empty(2, N, dtype=torch.float32),
        image.new_empty(2, N, dtype=torch.int32),
    )


def _fake_bwd(dloss, image, text, slopes, hardest, need_image, need_text):
    N, D = image.shape
    return image.new_empty(N if need_image else 0, D), text.new_empty(N if need_text else 0, D)


_fwd = register(
    "triplet_hardest_fwd(Tensor image, Tensor text, Tensor? image_ids, Tensor? text_ids, float margin, float gamma, "
    "float weight) -> (Tensor, Tensor, Tensor)",
    fwd,
    _fake_fwd,
)
_bwd = register(
    "triplet_hardest_bwd(Tensor dloss, Tensor image, Tensor text, Tensor slopes, Tensor hardest, bool need_image, "
    "bool need_text) -> (Tensor, Tensor)",
    bwd,
    _fake_bwd,
)


class _HardestTriplet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, *options):
        loss, slopes, hardest = _fwd(image, text, *options)
        ctx.save_for_backward(image, text, slopes, hardest)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        need = ctx.needs_input_grad
        dimage, dtext = _bwd(dloss, *ctx.saved_tensors, need[0], need[1])
        return dimage if need[0] else None, dtext if need[1] else None, *[None] * (len(need) - 2)


def triplet_loss(
    image: Tensor, text: Tensor, image_ids: Tensor | None, text_ids: Tensor | None, mask_same: bool, margin: float,
    gamma: float, weight: float,
) -> Tensor:  # fmt: skip
    image, text = image.contiguous(), text.contiguous()
    ids = (image_ids, text_ids) if mask_same else (None, None)
    if torch.is_grad_enabled() and (image.requires_grad or text.requires_grad):
        return _HardestTriplet.apply(image, text, *ids, margin, gamma, weight)
    return _fwd(image, text, *ids, margin, gamma, weight)[0]
