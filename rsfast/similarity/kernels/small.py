"""A small batch in one launch: contrastive and triplet loss over all pairs, and all their gradients.

Each program keeps one tile of S = I T^T in registers from its product to its gradient; three phases are parted by two
barriers across the grid.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast._tiles import INTERPRET, LOG2E, cast, cdiv, multiprocessors, pieces
from rsfast.similarity.kernels import small_tiles as small
from rsfast.similarity.kernels.tiles import inside, violation, weighed, weighed_grad

PEAKS = tl.constexpr(64)  # programs that look for the largest feature of a side
BLOCK_PEAK = 2048
BLOCK = 64  # rows and features of one tile of a gradient


@triton.jit
def peak_kernel(image_ptr, text_ptr, peaks_ptr, counters_ptr, size, BLOCK: tl.constexpr):
    """Largest magnitude of an interleaved share of the images (side 0) or texts (side 1); resets the barriers."""
    share, side = tl.program_id(0), tl.program_id(1)
    x_ptr = image_ptr
    if side == 1:
        x_ptr = text_ptr
    peak = tl.zeros([BLOCK], tl.float32)
    for start in range(share * BLOCK, size, PEAKS * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        peak = tl.maximum(peak, tl.abs(tl.load(x_ptr + offs, mask=offs < size, other=0.0)))
    tl.store(peaks_ptr + side * PEAKS + share, tl.max(peak, 0))
    tl.store(counters_ptr + side, 0)


@triton.jit
def _one_way(s, rows, cols, peak, log, target, ids_ptr, N, scale, smoothing, SMOOTH: tl.constexpr):
    """P - y of one direction, and the sums over pairs of y and of P - y times the scores."""
    gap = s - peak  # scores count from their largest, so that no large exponents cancel
    a = tl.exp2(gap * (scale * LOG2E) - log)
    aligned = 0.0
    if SMOOTH or ids_ptr is not None:
        pairs = s > 0.5 * small.NOTHING
        y = tl.where(pairs, smoothing / N, 0.0)
        if ids_ptr is not None:
            y += tl.where(pairs & small.same_id(ids_ptr, rows, cols, N), target, 0.0)
        aligned = tl.sum(y * gap)
        a -= y
    return a, aligned, tl.sum(a * gap)


@triton.jit
def _lost(index, own, peak, log, target, N, scale, smoothing):
    """What the rows or columns lose but for their other positives: log sum_j e^(s (S_ij - peak)) and their own."""
    lost = log / LOG2E + scale * (target + smoothing / N) * (peak - own)
    return tl.sum(tl.where(index < N, lost, 0.0))


@triton.jit
def _piece(s, part: tl.constexpr, row_own, row_peak, row_log, row_target, rows, ids_ptr, partials_ptr, numbers_ptr,
           g_ptr, pm, pn, tiles_m, tiles_n, N, scale, margin, smoothing, CONTRASTIVE: tl.constexpr,
           TRIPLET: tl.constexpr, GAMMA: tl.constexpr, MASK_SAME: tl.constexpr, SMOOTH: tl.constexpr,
           GRAD: tl.constexpr, FP32: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
           PIECES: tl.constexpr):  # fmt: skip
    """Phase 2 for ``WIDTH`` columns of a program's tile: losses, and what the gradients are made of."""
    column = pn * PIECES + part
    cols = column * WIDTH + tl.arange(0, WIDTH)
    piece = pm * tiles_n * PIECES + column
    col_own = tl.load(partials_ptr + small.OWN * N + cols, mask=cols < N, other=0.0)
    if TRIPLET:
        negatives = s
        if MASK_SAME:
            negatives = tl.where(small.same_id(ids_ptr, rows, cols, N), small.NOTHING, s)
        c, u = violation(negatives, row_own[:, None], 0.0, margin, True, GAMMA == 0)
        c_2, u_2 = violation(negatives, col_own[None, :], 0.0, margin, True, GAMMA == 0)
        lost = tl.sum(weighed(c, u, GAMMA) + weighed(c_2, u_2, GAMMA))
        tl.store(numbers_ptr + (small.LOSS + 1) * small.ROOM + piece, lost)
        if GRAD:
            a, b = weighed_grad(c, u, GAMMA), weighed_grad(c_2, u_2, GAMMA)
            small.emit(a + b, tl.sum(a, 1), tl.sum(b, 0), CONTRASTIVE, g_ptr, partials_ptr, numbers_ptr, rows, cols,
                       pm, column, tiles_m, tiles_n * PIECES, N, FP32, BLOCK_M, WIDTH)  # fmt: skip
    if CONTRASTIVE:
        col_peak, col_log = small.softmax(
            partials_ptr, small.COL_MAX, small.COL_SUM, cols, col_own, tiles_m, N, scale * LOG2E
        )
        col_target = small.target(ids_ptr, partials_ptr, cols, tiles_n, N, smoothing)
        loss = 0.0
        if column == 0:
            loss += _lost(rows, row_own, row_peak, row_log, row_target, N, scale, smoothing)
        if pm == 0:
            loss += _lost(cols, col_own, col_peak, col_log, col_target, N, scale, smoothing)
        a, aligned, slope = _one_way(s, rows, cols, row_peak[:, None], row_log[:, None], row_target[:, None],
                                     ids_ptr, N, scale, smoothing, SMOOTH)  # fmt: skip
        b, aligned_2, slope_2 = _one_way(s, rows, cols, col_peak[None, :], col_log[None, :], col_target[None, :],
                                         ids_ptr, N, scale, smoothing, SMOOTH)  # fmt: skip
        tl.store(numbers_ptr + small.LOSS * small.ROOM + piece, loss - scale * (aligned + aligned_2))
        if GRAD:
            a_sums, b_sums = tl.sum(a, 1), tl.sum(b, 0)
            # d_i itself adds nothing where scores count from it: the rows of P - y add up to zero
            slope += slope_2 + tl.sum(a_sums * (row_peak - row_own)) + tl.sum(b_sums * (col_peak - col_own))
            tl.store(numbers_ptr + small.DSCALE * small.ROOM + piece, slope)
            small.emit(a + b, a_sums, b_sums, 0, g_ptr, partials_ptr, numbers_ptr, rows, cols, pm, column, tiles_m,
                       tiles_n * PIECES, N, FP32, BLOCK_M, WIDTH)  # fmt: skip


@triton.jit
def small_kernel(
    image_ptr, text_ptr, scale_ptr, ids_ptr, peaks_ptr, counters_ptr, partials_ptr, numbers_ptr, g_ptr,
    contrastive_ptr, triplet_ptr, dimage_ptr, dtext_ptr, dscale_ptr, N, D, tiles_m, tiles_n, margin, weight, smoothing,
    CONTRASTIVE: tl.constexpr, TRIPLET: tl.constexpr, GAMMA: tl.constexpr, MASK_SAME: tl.constexpr,
    SMOOTH: tl.constexpr, GRAD: tl.constexpr, FP32: tl.constexpr, PHASE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """PHASE 0 runs all phases with barriers between; 1, 2 and 3 run one, for three launches."""
    pid = tl.program_id(0)
    tiles = tiles_m * tiles_n
    pm, pn = pid // tiles_n, pid % tiles_n
    rows, cols = pm * BLOCK_M + tl.arange(0, BLOCK_M), pn * BLOCK_N + tl.arange(0, BLOCK_N)
    image_up, image_down, text_up, text_down = 1.0, 1.0, 1.0, 1.0
    if FP32:
        image_up, image_down = small.power(tl.max(tl.load(peaks_ptr + tl.arange(0, PEAKS)), 0))
        text_up, text_down = small.power(tl.max(tl.load(peaks_ptr + PEAKS + tl.arange(0, PEAKS)), 0))
    scale = 1.0
    if CONTRASTIVE:
        scale = tl.load(scale_ptr).to(tl.float32)
    if PHASE < 3:
        end = tl.where(pid < tiles, D, 0)  # programs beyond the tiles wait for phase 3
        s = small.scores(image_ptr, text_ptr, image_up, text_up, image_down * text_down, rows, cols, N, D, end,
                         g_ptr.dtype.element_ty, FP32, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        own_ptr = partials_ptr + small.OWN * N
        if PHASE < 2:
            own = tl.sum(tl.where(rows[:, None] == cols[None, :], s, 0.0), 0)
            tl.store(own_ptr + cols, own, mask=(cols // BLOCK_M == pm) & (cols < N))
        s = tl.where(inside(rows, cols, N, N, 0, True), s, small.NOTHING)
        if PHASE < 2 and CONTRASTIVE and pid < tiles:
            small.statistics(s, rows, cols, ids_ptr, partials_ptr, pm, pn, N, scale * LOG2E)
    if PHASE == 0:
        small.barrier(counters_ptr)
    if (PHASE == 0 or PHASE == 2) and pid < tiles:
        row_own = tl.load(own_ptr + rows, mask=rows < N, other=0.0)
        row_peak, row_log, row_target = row_own, row_own, row_own
        if CONTRASTIVE:
            row_peak, row_log = small.softmax(
                partials_ptr, small.ROW_MAX, small.ROW_SUM, rows, row_own, tiles_n, N, scale * LOG2E
            )
            row_target = small.target(ids_ptr, partials_ptr, rows, tiles_n, N, smoothing)
        parts = pieces(s, BLOCK_M, BLOCK_N, PIECES)
        for part in tl.static_range(PIECES):
            _piece(parts[part], part, row_own, row_peak, row_log, row_target, rows, ids_ptr, partials_ptr, numbers_ptr,
                   g_ptr, pm, pn, tiles_m, tiles_n, N, scale, margin, smoothing, CONTRASTIVE, TRIPLET,
                   GAMMA, MASK_SAME, SMOOTH, GRAD, FP32, BLOCK_M, BLOCK_N // PIECES, PIECES)  # fmt: skip
    if PHASE == 0:
        small.barrier(counters_ptr + 1)
    if PHASE == 0 or PHASE == 3:
        if pid == 0:
            contrastive, triplet, slope = 0.0, 0.0, 0.0
            if CONTRASTIVE:
                contrastive = small.total_of(numbers_ptr, small.LOSS, tiles * PIECES) / (2 * N)
                if GRAD:
                    slope = small.total_of(numbers_ptr, small.DSCALE, tiles * PIECES) / (2 * N)
            if TRIPLET:
                triplet = weight * small.total_of(numbers_ptr, small.LOSS + 1, tiles * PIECES)
            tl.store(contrastive_ptr, contrastive)
            tl.store(triplet_ptr, triplet)
            tl.store(dscale_ptr, slope)
        if GRAD:
            factor = scale / (2 * N) if CONTRASTIVE else weight
            blocks, steps = tl.cdiv(N, BLOCK), tl.cdiv(D, BLOCK)
            for item in range(pid, 2 * blocks * steps, tl.num_programs(0)):
                block = item // steps
                ds = item % steps * BLOCK + tl.arange(0, BLOCK)
                if block < blocks:
                    small.gradient(g_ptr, partials_ptr, numbers_ptr, text_ptr, text_up, text_down, dimage_ptr,
                                   factor, weight, block, ds, tiles_m, tiles_n * PIECES, N, D, CONTRASTIVE + TRIPLET,
                                   False, FP32, BLOCK_M, BLOCK_N // PIECES, BLOCK_K, BLOCK, PIECES)  # fmt: skip
                else:
                    small.gradient(g_ptr, partials_ptr, numbers_ptr, image_ptr, image_up, image_down, dtext_ptr,
                                   factor, weight, block - blocks, ds, tiles_m, tiles_n * PIECES, N, D,
                                   CONTRASTIVE + TRIPLET, True, FP32, BLOCK_M, BLOCK_N // PIECES, BLOCK_K, BLOCK,
                                   PIECES)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The tile that a program keeps, the pieces that it takes it in, so that registers hold it, and its warps."""

    BLOCK_M: int
    BLOCK_N: int
    PIECES: int
    num_warps: int

    def tiles(self, n: int) -> tuple[int, int]:
        return cdiv(n, self.BLOCK_M), cdiv(n, self.BLOCK_N)


PLANS = Plan(64, 64, 1, 8), Plan(128, 64, 2, 8), Plan(128, 128, 4, 8)


def _plan(n: int, sm_count: int, losses: int) -> Plan | None:
    """Smallest tile that leaves at most one to a multiprocessor; the widest spills on sm_90 with two losses."""
    for plan in PLANS[: 4 - losses]:
        tiles_m, tiles_n = plan.tiles(n)
        if tiles_m * tiles_n <= sm_count and max(tiles_m, tiles_n) <= small.TILES.value:
            return plan
    return None


def supports(n: int, m: int, d: int, dtype: torch.dtype, sm_count: int, losses: int) -> bool:
    """Whether :func:`step` takes (n, d) images and (m, d) texts for 1 or 2 losses on so many multiprocessors."""
    known = dtype in (torch.float32, torch.float16, torch.bfloat16)
    return known and n == m and n >= 2 and d >= 1 and _plan(n, sm_count, losses) is not None


def step(
    image: Tensor,  # (N, D)
    text: Tensor,  # (N, D)
    logit_scale: Tensor | None,  # ()
    image_ids: Tensor | None,  # (N,)
    contrastive: bool,
    triplet: bool,
    margin: float,
    gamma: float,
    adaptive: bool,
    mask_same_id: bool,
    label_smoothing: float,
    grad: bool,
    sm_count: int | None = None,
    cooperative: bool = not INTERPRET.value,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contrastive and triplet loss (all negatives) of a batch that :func:`supports` takes, and their gradients.

    Args:
        image: fp32, fp16 or bf16.
        text: Same shape, dtype and device.
        logit_scale: Multiplies the similarities; positive; needed for the contrastive loss.
        image_ids: Integers of pairs; equal ones are positives, and no negatives with ``mask_same_id``.
        contrastive: Whether that loss is wanted.
        triplet: Whether that one is; one of them must be.
        margin: Of the triplet loss.
        gamma: Exponent of the adaptive triplet loss.
        adaptive: Half the weighed sum; otherwise the sum of the violations.
        mask_same_id: Leave pairs of equal id out of the triplet loss.
        label_smoothing: Share of each target spread evenly over the row.
        grad: Whether gradients are wanted.
        sm_count: Most programs that run at once; by default the device's multiprocessors.
        cooperative: One launch with barriers across the grid; otherwise three launches, for where that cannot be.

    Returns:
        The two losses (), 0 where not asked; gradients of the asked losses by the images and texts, (1 or 2, N, D)
        in this order, empty without ``grad``; the contrastive loss's by ``logit_scale`` (). All fp32, each gradient
        for an upstream gradient of 1.

    Precision: fp32 products are made of fp16 parts, 22 bits of the largest feature; the diagonal's gradient stays in
    fp32, that of other pairs is rounded to the features' dtype (22 bits for fp32). Deterministic: yes.
    """
    (n, d), new = image.shape, functools.partial(image.new_empty, dtype=torch.float32)
    sm_count = sm_count or (multiprocessors(image.device) if image.is_cuda else 132)
    losses, fp32 = contrastive + triplet, image.dtype == torch.float32
    plan = _plan(n, sm_count, losses)
    tiles_m, tiles_n = plan.tiles(n)
    image, text = image.contiguous(), text.contiguous()
    g = new(losses * (1 + fp32), tiles_m * plan.BLOCK_M, tiles_n * plan.BLOCK_N if grad else 0,
            dtype=torch.float16 if fp32 else image.dtype)  # fmt: skip
    dimage, dtext = (new(losses, n if grad else 0, d) for _ in range(2))
    values, dscale = (new(()), new(())), new(())
    partials, numbers, peaks = new(small.PARTIALS, n), new(small.NUMBERS, small.ROOM.value), None
    if fp32:
        counters, peaks = torch.empty(2, dtype=torch.int32, device=image.device), new(2, PEAKS.value)
        peak_kernel[PEAKS.value, 2](image, text, peaks, counters, n * d, BLOCK=BLOCK_PEAK)
    else:
        counters = torch.zeros(2, dtype=torch.int32, device=image.device)
    items = 2 * cdiv(n, BLOCK) * cdiv(d, BLOCK) if grad else 0
    for phase in (0,) if cooperative else (1, 2, 3):
        small_kernel[min(max(items, tiles_m * tiles_n), sm_count),](
            image, text, logit_scale, None if image_ids is None else image_ids.contiguous(), peaks, counters, partials,
            numbers, g, *values, dimage, dtext, dscale, n, d, tiles_m, tiles_n, float(margin), 0.5 if adaptive else 1.0,
            float(label_smoothing), CONTRASTIVE=contrastive, TRIPLET=triplet, GAMMA=float(gamma) if adaptive else 0.0,
            MASK_SAME=mask_same_id, SMOOTH=label_smoothing > 0, GRAD=grad, FP32=fp32, PHASE=phase,
            BLOCK_M=plan.BLOCK_M, BLOCK_N=plan.BLOCK_N, BLOCK_K=32 if fp32 or plan.PIECES > 1 else 64, BLOCK=BLOCK,
            PIECES=plan.PIECES, num_warps=plan.num_warps, launch_cooperative_grid=phase == 0,
        )  # fmt: skip
    return *values, dimage, dtext, dscale


@triton.jit
def weigh_kernel(
    dcontrastive_ptr, dtriplet_ptr, by_image_ptr, by_text_ptr, by_scale_ptr, dimage_ptr, dtext_ptr, dscale_ptr, size,
    CONTRASTIVE: tl.constexpr, TRIPLET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of each loss, times what comes from above, added; of the images (side 0) and the texts (side 1)."""
    block, side = tl.program_id(0), tl.program_id(1)
    by_ptr, out_ptr = by_image_ptr, dimage_ptr
    if side == 1:
        by_ptr, out_ptr = by_text_ptr, dtext_ptr
    at = block * BLOCK + tl.arange(0, BLOCK)
    out = tl.zeros([BLOCK], tl.float32)
    slope = 0.0
    if CONTRASTIVE:
        steep = tl.load(dcontrastive_ptr)
        out += steep * tl.load(by_ptr + at, mask=at < size, other=0.0)
        slope += steep * tl.load(by_scale_ptr)
    if TRIPLET:
        out += tl.load(dtriplet_ptr) * tl.load(by_ptr + CONTRASTIVE * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, cast(out, out_ptr.dtype.element_ty), mask=at < size)
    if block + side == 0:
        tl.store(dscale_ptr, slope)


def weigh(
    dcontrastive: Tensor | None, dtriplet: Tensor | None, by_image: Tensor, by_text: Tensor, by_scale: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by images, texts (in ``dtype``) and scale, from those by and of each loss; None of one not asked."""
    _, n, d = by_image.shape
    dimage, dtext = (by_image.new_empty(n, d, dtype=dtype) for _ in range(2))
    dscale = by_image.new_empty(())
    weigh_kernel[cdiv(n * d, BLOCK_PEAK), 2](
        dcontrastive, dtriplet, by_image, by_text, by_scale, dimage, dtext, dscale, n * d,
        CONTRASTIVE=dcontrastive is not None, TRIPLET=dtriplet is not None, BLOCK=BLOCK_PEAK,
    )  # fmt: skip
    return dimage, dtext, dscale
