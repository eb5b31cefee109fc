"""A small batch in one launch: contrastive and triplet loss over all pairs, and all their gradients.

Each program keeps one tile of S = I T^T in registers from its product to its gradient; three phases are parted by two
barriers across the grid. Below, d_i = S_ii, and a loss has the gradient k (A + B) off the diagonal, A from the terms of
a row and B from those of a column, and -k (sum_j A_ij + sum_j B_ji) on it, which never leaves fp32.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
TILES = tl.constexpr(16)  # most tiles along a side
ROOM = tl.constexpr(512)  # most pieces of tiles
PEAKS = tl.constexpr(64)  # programs that look for the largest feature of a side
BLOCK_PEAK = 2048
BLOCK = 64  # rows and features of one tile of a gradient
NOTHING = tl.constexpr(-1e30)  # the score of what is no pair: its exponential and its violation are zero

# partial results of the tiles, [tile of the other side, row or column] each
ROW_MAX, ROW_SUM, COL_MAX, COL_SUM = tl.constexpr(0), tl.constexpr(16), tl.constexpr(32), tl.constexpr(48)
SAME, OWN = tl.constexpr(64), tl.constexpr(80)  # pairs of equal id; d
COL_B, ROW_A = tl.constexpr(96), tl.constexpr(128)  # each for two losses; a tile may leave A in four pieces
PARTIALS = 256
# one number a tile, [kind, tile]
LOSS, DSCALE, STEP = tl.constexpr(0), tl.constexpr(2), tl.constexpr(3)  # two losses, two steps
KINDS = 5


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """x rounded to the nearest value of ``dtype``."""
    if INTERPRET and dtype == tl.bfloat16:  # the interpreter cuts the bits off
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, acc):
    if INTERPRET:  # the interpreter multiplies bf16 operands wrongly, without a word
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _power(peak):
    """Powers of two, each the other's inverse; the first takes ``peak`` to between 2^14 and 2^15, where fp16 ends."""
    peak = tl.minimum(tl.maximum(peak, 7.888609052210118e-31), 1.2676506002282294e30)  # 2^-100, 2^100
    exponent = peak.to(tl.int32, bitcast=True) & 0x7F800000
    up = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    return up * 16384.0, exponent.to(tl.float32, bitcast=True) * 6.103515625e-05


@triton.jit
def _halves(x, up, dtype: tl.constexpr):
    """Two fp16 numbers whose sum is x times ``up`` to 22 bits; other dtypes stay as they are, twice."""
    if x.dtype == tl.float32:
        x = x * up
        high = _cast(x, dtype)
        return high, _cast(x - high.to(tl.float32), dtype)
    else:
        return x, x


@triton.jit
def _product(a, a_low, b, b_low, acc, PARTS: tl.constexpr):
    acc = _dot(a, b, acc)
    if PARTS == 2:  # low times low is below fp32's last bit
        acc = _dot(a, b_low, acc)
        acc = _dot(a_low, b, acc)
    return acc


@triton.jit
def _load(ptr, rows, cols, N, D):
    mask = (rows[:, None] < N) & (cols[None, :] < D)
    return tl.load(ptr + rows[:, None] * D + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _gather(ptr, slot: tl.constexpr, index, tiles, N, MOST: tl.constexpr = TILES):
    """What all ``tiles`` tiles left in a slot for each index, [MOST, index], and which of it exists."""
    tile = tl.arange(0, MOST)[:, None]
    exists = tile < tiles
    index = tl.minimum(index, N - 1)[None, :]
    return tl.load(ptr + (slot + tile) * N + index, mask=exists, other=0.0), exists


@triton.jit
def _total(ptr, slot: tl.constexpr, index, tiles, N, MOST: tl.constexpr = TILES):
    return tl.sum(_gather(ptr, slot, index, tiles, N, MOST)[0], 0)


@triton.jit
def _put(ptr, slot: tl.constexpr, tile, index, value, N):
    tl.store(ptr + (slot + tile) * N + index, value, mask=index < N)


@triton.jit
def _softplus2(x):
    """log2(1 + 2^x), to the last bits also where it is tiny."""
    t = tl.exp2(-tl.abs(x))
    w = t / (2 + t)  # log(1 + t) = 2 artanh w
    q = w * w
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series)))
    return tl.maximum(x, 0.0) + 2 * LOG2E * w * series


@triton.jit
def _log_sum(ptr, max_slot: tl.constexpr, sum_slot: tl.constexpr, index, own, tiles, N, rate):
    """log2 sum_{j != i} 2^(rate (S_ij - d_i))."""
    peaks, exists = _gather(ptr, max_slot, index, tiles, N)
    peaks = tl.where(exists, peaks, NOTHING)
    peak = tl.max(peaks, 0)
    sums = _gather(ptr, sum_slot, index, tiles, N)[0] * tl.exp2((peaks - peak[None, :]) * rate)
    return (peak - own) * rate + tl.log2(tl.sum(sums, 0))


@triton.jit
def _max_and_sum(s, rate, AXIS: tl.constexpr):
    """Largest score of each row (AXIS = 1) or column, and the sum of 2^(rate (s - largest))."""
    peak = tl.max(s, AXIS)
    return peak, tl.sum(tl.exp2((s - tl.expand_dims(peak, AXIS)) * rate), AXIS)


@triton.jit
def _violation(gap, margin, GAMMA: tl.constexpr, ADAPTIVE: tl.constexpr):
    """A triplet's term and its derivative by the gap between the negative and the positive."""
    c = tl.maximum(margin + gap, 0.0)
    if not ADAPTIVE:
        return c, (c > 0).to(tl.float32)
    e = tl.exp2(-LOG2E * c)
    if GAMMA == 2:
        u = 1 - e
        return u * u * c, u * (u + 2 * c * e)
    else:  # a power below 1 would blow up the rounding of a small u
        series = 1 - c * (1 / 2 - c * (1 / 6 - c * (1 / 24 - c * (1 / 120 - c * (1 / 720)))))
        u = tl.where(c < 0.25, c * series, 1 - e)
        u = tl.where(c > 0, u, 1.0)
        p = tl.where(c > 0, tl.exp2(GAMMA * tl.log2(u)), 0.0)
        return p * c, p * (1 + GAMMA * e * c / u)


@triton.jit
def _scores(image_ptr, text_ptr, image_up, text_up, rows, cols, N, D, G_TYPE: tl.constexpr, PARTS: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        a, a_low = _halves(_load(image_ptr, rows, ks, N, D), image_up, G_TYPE)
        b, b_low = _halves(_load(text_ptr, cols, ks, N, D), text_up, G_TYPE)
        acc = _product(a, a_low, b.T, b_low.T, acc, PARTS)
    return acc


@triton.jit
def _emit(a, b, loss: tl.constexpr, g_ptr, partials_ptr, numbers_ptr, rows, cols, pm, pn, tiles_m, tiles_n, N,
          PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Leaves the tile of A + B in 16 bits, as large as they hold, and in fp32 what the diagonal needs of it."""
    _put(partials_ptr, ROW_A + 64 * loss, pn, rows, tl.sum(a, 1), N)
    _put(partials_ptr, COL_B + 16 * loss, pm, cols, tl.sum(b, 0), N)
    g = a + b
    up, down = _power(tl.max(tl.abs(g)))
    tl.store(numbers_ptr + (STEP + loss) * ROOM + pm * tiles_n + pn, down)
    high, low = _halves(g, up, g_ptr.dtype.element_ty)
    width = tiles_n * BLOCK_N
    out = g_ptr + loss * PARTS * tiles_m * BLOCK_M * width + rows[:, None] * width + cols[None, :]
    tl.store(out, high)
    if PARTS == 2:
        tl.store(out + tiles_m * BLOCK_M * width, low)


@triton.jit
def _pull(acc, loss: tl.constexpr, g_ptr, numbers_ptr, x, x_low, index, ks, tile, tiles_m, tiles_n,
          TEXT: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """acc + the tile of A + B (of its transpose for the texts) times x."""
    width = tiles_n * BLOCK_N
    part = tiles_m * BLOCK_M * width
    g_ptr += loss * PARTS * part
    if TEXT:
        at = g_ptr + ks[:, None] * width + index[None, :]
        g = tl.load(at).T
        low = tl.load(at + part).T if PARTS == 2 else g
    else:
        at = g_ptr + index[:, None] * width + ks[None, :]
        g = tl.load(at)
        low = tl.load(at + part) if PARTS == 2 else g
    step = tl.load(numbers_ptr + (STEP + loss) * ROOM + tile)
    return acc + step[:, None] * _product(g, low, x, x_low, tl.zeros(acc.shape, tl.float32), PARTS)


@triton.jit
def _finish(acc, loss: tl.constexpr, partials_ptr, out_ptr, factor, own, index, ds, tiles_m, tiles_n, N, D,
            PIECES: tl.constexpr):  # fmt: skip
    """Adds the diagonal and stores the gradient; ``own`` is the partner's features."""
    diagonal = _total(partials_ptr, ROW_A + 64 * loss, index, tiles_n, N, TILES * PIECES)
    diagonal += _total(partials_ptr, COL_B + 16 * loss, index, tiles_m, N)
    out = out_ptr + loss * N * D + index[:, None] * D + ds[None, :]
    mask = (index[:, None] < N) & (ds[None, :] < D)
    tl.store(out, factor * (acc - diagonal[:, None] * own), mask=mask)


@triton.jit
def _gradient(g_ptr, partials_ptr, numbers_ptr, x_ptr, up, down, out_ptr, factor, factor_2, block, ds,
              tiles_m, tiles_n, N, D, LOSSES: tl.constexpr, TEXT: tl.constexpr, PARTS: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
              PIECES: tl.constexpr):  # fmt: skip
    """One tile of the images' gradient (x the texts), or of the texts' (x the images), for each loss."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc_2 = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, N, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x, x_low = _halves(_load(x_ptr, ks, ds, N, D), up, g_ptr.dtype.element_ty)
        row, col = (k, index) if TEXT else (index, k)
        tile = (row // BLOCK_M) * tiles_n + col // BLOCK_N  # of each index
        acc = _pull(acc, 0, g_ptr, numbers_ptr, x, x_low, index, ks, tile, tiles_m, tiles_n,
                    TEXT, PARTS, BLOCK_M, BLOCK_N)  # fmt: skip
        if LOSSES == 2:
            acc_2 = _pull(acc_2, 1, g_ptr, numbers_ptr, x, x_low, index, ks, tile, tiles_m, tiles_n,
                          TEXT, PARTS, BLOCK_M, BLOCK_N)  # fmt: skip
    own = _load(x_ptr, index, ds, N, D).to(tl.float32)
    _finish(acc * down, 0, partials_ptr, out_ptr, factor, own, index, ds, tiles_m, tiles_n, N, D, PIECES)
    if LOSSES == 2:
        _finish(acc_2 * down, 1, partials_ptr, out_ptr, factor_2, own, index, ds, tiles_m, tiles_n, N, D, PIECES)


@triton.jit
def _barrier(counter_ptr):
    """Waits until all programs of the grid are here, and sees what they wrote.

    A cooperative launch runs all programs at once, so none waits for one that cannot start. The barrier of the block
    puts the writes of all its threads before the release, and its reads after the acquire; both are cumulative at the
    scope of the GPU. What crosses is read by plain loads, so no fence for TMA is needed. Counters start at zero and
    serve once.
    """
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while arrived < tl.num_programs(0):
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _peak_kernel(image_ptr, text_ptr, peaks_ptr, counters_ptr, size, BLOCK: tl.constexpr):
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
def _statistics(s, rows, cols, ids_ptr, partials_ptr, pm, pn, N, rate):
    """What the softmax of rows and columns needs to know of the tile."""
    peak, total = _max_and_sum(s, rate, 1)
    _put(partials_ptr, ROW_MAX, pn, rows, peak, N)
    _put(partials_ptr, ROW_SUM, pn, rows, total, N)
    peak, total = _max_and_sum(s, rate, 0)
    _put(partials_ptr, COL_MAX, pm, cols, peak, N)
    _put(partials_ptr, COL_SUM, pm, cols, total, N)
    if ids_ptr is not None:
        same = _same(ids_ptr, rows, cols, N) & (cols[None, :] < N)
        _put(partials_ptr, SAME, pn, rows, tl.sum(same.to(tl.float32), 1), N)


@triton.jit
def _same(ids_ptr, rows, cols, N):
    one = tl.load(ids_ptr + rows, mask=rows < N, other=0)
    other = tl.load(ids_ptr + cols, mask=cols < N, other=0)
    return one[:, None] == other[None, :]


@triton.jit
def _share(ids_ptr, partials_ptr, index, tiles, N, smoothing):
    """Target of each positive of a row or column."""
    share = 1 - smoothing
    if ids_ptr is not None:
        share = share / _total(partials_ptr, SAME, index, tiles, N)
    return share


@triton.jit
def _pairs(rows, cols, N):
    return (rows[:, None] < N) & (cols[None, :] < N) & (rows[:, None] != cols[None, :])


@triton.jit
def _contrastive(row_gap, col_gap, rows, cols, row_plus, col_plus, row_share, col_share, ids_ptr, numbers_ptr,
                 pm, pn, tiles_n, N, scale, smoothing, SMOOTH: tl.constexpr, GRAD: tl.constexpr):  # fmt: skip
    """A = P - y and B of the contrastive loss; leaves its terms, and those of the temperature's gradient."""
    loss = 0.0
    if pn == 0:
        loss += tl.sum(tl.where(rows < N, row_plus, 0.0)) / LOG2E
    if pm == 0:
        loss += tl.sum(tl.where(cols < N, col_plus, 0.0)) / LOG2E
    # P_ij = e^(s S_ij) / sum_k e^(s S_ik), both over e^(s d_i)
    a = tl.exp2(row_gap * (scale * LOG2E) - row_plus[:, None])
    b = tl.exp2(col_gap * (scale * LOG2E) - col_plus[None, :])
    if SMOOTH or ids_ptr is not None:
        pairs = _pairs(rows, cols, N)
        row_y = tl.where(pairs, smoothing / N, 0.0)
        col_y = row_y
        if ids_ptr is not None:
            same = pairs & _same(ids_ptr, rows, cols, N)
            row_y += tl.where(same, row_share[:, None], 0.0)
            col_y += tl.where(same, col_share[None, :], 0.0)
        loss -= scale * tl.sum(row_y * row_gap + col_y * col_gap)
        a -= row_y
        b -= col_y
    tile = pm * tiles_n + pn
    tl.store(numbers_ptr + LOSS * ROOM + tile, loss)
    if GRAD:  # the rows of P - y add up to zero, so scores may count from d_i
        slope = tl.sum(a * row_gap + b * col_gap)
        tl.store(numbers_ptr + DSCALE * ROOM + tile, slope)
    return a, b


@triton.jit
def _piece(s, piece: tl.constexpr, row_own, row_plus, row_share, rows, ids_ptr, partials_ptr, numbers_ptr, g_ptr, pm, pn,
           tiles_m, tiles_n, N, scale, margin, smoothing, CONTRASTIVE: tl.constexpr, TRIPLET: tl.constexpr,
           ADAPTIVE: tl.constexpr, GAMMA: tl.constexpr, MASK_SAME: tl.constexpr, SMOOTH: tl.constexpr,
           GRAD: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """Phase 2 for ``WIDTH`` columns of a program's tile: losses, and what the gradients are made of."""
    cols = (pn * PIECES + piece) * WIDTH + tl.arange(0, WIDTH)
    col_share = _share(ids_ptr, partials_ptr, cols, tiles_n, N, smoothing)
    pn, tiles_n = pn * PIECES + piece, tiles_n * PIECES
    col_own = tl.load(partials_ptr + OWN * N + cols, mask=cols < N, other=0.0)
    if CONTRASTIVE:
        col_plus = _softplus2(
            _log_sum(partials_ptr, COL_MAX, COL_SUM, cols, col_own, tiles_m, N, scale * LOG2E)
        )
        a, b = _contrastive(s - row_own[:, None], s - col_own[None, :], rows, cols, row_plus, col_plus, row_share,
                            col_share, ids_ptr, numbers_ptr, pm, pn, tiles_n, N, scale, smoothing, SMOOTH, GRAD)  # fmt: skip
        if GRAD:
            _emit(a, b, 0, g_ptr, partials_ptr, numbers_ptr, rows, cols, pm, pn, tiles_m, tiles_n, N,
                  PARTS, BLOCK_M, WIDTH)  # fmt: skip
    if TRIPLET:
        if MASK_SAME:
            s = tl.where(_same(ids_ptr, rows, cols, N), NOTHING, s)
        f, a = _violation(s - row_own[:, None], margin, GAMMA, ADAPTIVE)
        f_2, b = _violation(s - col_own[None, :], margin, GAMMA, ADAPTIVE)
        tl.store(numbers_ptr + (LOSS + 1) * ROOM + pm * tiles_n + pn, tl.sum(f + f_2))
        if GRAD:
            _emit(a, b, CONTRASTIVE, g_ptr, partials_ptr, numbers_ptr, rows, cols, pm, pn, tiles_m, tiles_n, N,
                  PARTS, BLOCK_M, WIDTH)  # fmt: skip


@triton.jit
def _halve(s):
    """Left and right half of a tile; each thread keeps what it has."""
    return tl.split(tl.permute(tl.reshape(s, [s.shape[0], 2, s.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _numbers(ptr, kind: tl.constexpr, tiles):
    """Sum over the tiles."""
    tile = tl.arange(0, ROOM)
    return tl.sum(tl.load(ptr + kind * ROOM + tile, mask=tile < tiles, other=0.0), 0)


@triton.jit
def _small_kernel(
    image_ptr, text_ptr, scale_ptr, ids_ptr, peaks_ptr, counters_ptr, partials_ptr, numbers_ptr, g_ptr,
    losses_ptr, dimage_ptr, dtext_ptr, dscale_ptr, N, D, tiles_m, tiles_n, margin, smoothing,
    CONTRASTIVE: tl.constexpr, TRIPLET: tl.constexpr, ADAPTIVE: tl.constexpr, GAMMA: tl.constexpr,
    MASK_SAME: tl.constexpr, SMOOTH: tl.constexpr, GRAD: tl.constexpr, PARTS: tl.constexpr, PHASE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """PHASE 0 runs all phases with barriers between; 1, 2 and 3 run one, for three launches."""
    pid = tl.program_id(0)
    tiles = tiles_m * tiles_n
    pm, pn = pid // tiles_n, pid % tiles_n  # programs beyond the tiles wait for phase 3
    rows, cols = pm * BLOCK_M + tl.arange(0, BLOCK_M), pn * BLOCK_N + tl.arange(0, BLOCK_N)
    image_up, image_down, text_up, text_down = 1.0, 1.0, 1.0, 1.0
    if PARTS == 2:
        image_up, image_down = _power(tl.max(tl.load(peaks_ptr + tl.arange(0, PEAKS)), 0))
        text_up, text_down = _power(tl.max(tl.load(peaks_ptr + PEAKS + tl.arange(0, PEAKS)), 0))
    scale = 1.0
    if CONTRASTIVE:
        scale = tl.load(scale_ptr).to(tl.float32)
    if PHASE < 3:
        s = _scores(image_ptr, text_ptr, image_up, text_up, rows, cols, N, D, g_ptr.dtype.element_ty, PARTS,
                    BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        s *= image_down * text_down
        own_ptr = partials_ptr + OWN * N
        if PHASE < 2:
            own = tl.sum(tl.where(rows[:, None] == cols[None, :], s, 0.0), 0)
            tl.store(own_ptr + cols, own, mask=(cols // BLOCK_M == pm) & (cols < N))
        s = tl.where(_pairs(rows, cols, N), s, NOTHING)
        if PHASE < 2 and CONTRASTIVE and pid < tiles:
            _statistics(s, rows, cols, ids_ptr, partials_ptr, pm, pn, N, scale * LOG2E)
    if PHASE == 0:
        _barrier(counters_ptr)
    if (PHASE == 0 or PHASE == 2) and pid < tiles:
        row_own = tl.load(own_ptr + rows, mask=rows < N, other=0.0)
        row_plus = row_own
        if CONTRASTIVE:
            row_plus = _softplus2(
                _log_sum(partials_ptr, ROW_MAX, ROW_SUM, rows, row_own, tiles_n, N, scale * LOG2E)
            )
        row_share = _share(ids_ptr, partials_ptr, rows, tiles_n, N, smoothing)
        pieces = (s,)
        if PIECES > 1:
            pieces = _halve(s)
        if PIECES > 2:
            pieces = _halve(pieces[0]) + _halve(pieces[1])
        for piece in tl.static_range(PIECES):
            _piece(pieces[piece], piece, row_own, row_plus, row_share, rows, ids_ptr, partials_ptr, numbers_ptr, g_ptr, pm, pn,
                   tiles_m, tiles_n, N, scale, margin, smoothing, CONTRASTIVE, TRIPLET, ADAPTIVE, GAMMA, MASK_SAME,
                   SMOOTH, GRAD, PARTS, BLOCK_M, BLOCK_N // PIECES, PIECES)  # fmt: skip
    if PHASE == 0:
        _barrier(counters_ptr + 1)
    if PHASE == 0 or PHASE == 3:
        half: tl.constexpr = 0.5 if ADAPTIVE else 1.0
        if pid == 0:
            contrastive, triplet, slope = 0.0, 0.0, 0.0
            if CONTRASTIVE:
                contrastive = _numbers(numbers_ptr, LOSS, tiles * PIECES) / (2 * N)
                if GRAD:
                    slope = _numbers(numbers_ptr, DSCALE, tiles * PIECES) / (2 * N)
            if TRIPLET:
                triplet = half * _numbers(numbers_ptr, LOSS + 1, tiles * PIECES)
            tl.store(losses_ptr, contrastive)
            tl.store(losses_ptr + 1, triplet)
            tl.store(dscale_ptr, slope)
        if GRAD:
            factor = scale / (2 * N) if CONTRASTIVE else half
            blocks, steps = tl.cdiv(N, BLOCK), tl.cdiv(D, BLOCK)
            for item in range(pid, 2 * blocks * steps, tl.num_programs(0)):
                block = item // steps
                ds = item % steps * BLOCK + tl.arange(0, BLOCK)
                if block < blocks:
                    _gradient(g_ptr, partials_ptr, numbers_ptr, text_ptr, text_up, text_down, dimage_ptr, factor, half,
                              block, ds, tiles_m, tiles_n * PIECES, N, D, CONTRASTIVE + TRIPLET, False, PARTS,
                              BLOCK_M, BLOCK_N // PIECES, BLOCK_K, BLOCK, PIECES)  # fmt: skip
                else:
                    _gradient(g_ptr, partials_ptr, numbers_ptr, image_ptr, image_up, image_down, dtext_ptr, factor,
                              half, block - blocks, ds, tiles_m, tiles_n * PIECES, N, D, CONTRASTIVE + TRIPLET, True, PARTS,
                              BLOCK_M, BLOCK_N // PIECES, BLOCK_K, BLOCK, PIECES)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The tile that a program keeps, the pieces that it takes it in, so that registers hold it, and its warps."""

    BLOCK_M: int
    BLOCK_N: int
    PIECES: int
    num_warps: int

    def tiles(self, n: int) -> tuple[int, int]:
        return triton.cdiv(n, self.BLOCK_M), triton.cdiv(n, self.BLOCK_N)

    @property
    def width(self) -> int:
        return self.BLOCK_N // self.PIECES


PLANS = Plan(64, 64, 1, 8), Plan(128, 64, 2, 8), Plan(128, 128, 4, 8)


def _plan(n: int, sm_count: int) -> Plan | None:
    """Smallest tile that leaves one to a multiprocessor."""
    for plan in PLANS:
        tiles_m, tiles_n = plan.tiles(n)
        if tiles_m * tiles_n <= sm_count and max(tiles_m, tiles_n) <= TILES.value:
            return plan
    return None


def supports(n: int, m: int, d: int, dtype: torch.dtype, sm_count: int) -> bool:
    """Whether :func:`step` takes (n, d) images and (m, d) texts on a GPU of ``sm_count`` multiprocessors."""
    known = dtype in (torch.float32, torch.float16, torch.bfloat16)
    return known and n == m and n >= 2 and d >= 1 and _plan(n, sm_count) is not None


@functools.cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def step(
    image: Tensor,  # (N, D)
    text: Tensor,  # (N, D)
    logit_scale: Tensor | None,  # ()
    image_ids: Tensor | None,  # (N,)
    *,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        The two losses (2,), 0 where not asked; gradients of the asked losses by the images and texts, (1 or 2, N, D)
        in this order, empty without ``grad``; the contrastive loss's by ``logit_scale`` (). All fp32, each gradient
        for an upstream gradient of 1.

    Precision: fp32 products are made of fp16 halves, 22 bits; the diagonal's gradient stays in fp32, the other
    pairs' is rounded to the features' dtype (22 bits for fp32). Deterministic: yes.
    """
    (n, d), new = image.shape, functools.partial(image.new_empty, dtype=torch.float32)
    sm_count = sm_count or _sm_count(image.device)
    plan = _plan(n, sm_count)
    image, text = image.contiguous(), text.contiguous()
    tiles_m, tiles_n = plan.tiles(n)
    split, losses = image.dtype == torch.float32, contrastive + triplet
    parts = 1 + split
    g = new(losses * parts, tiles_m * plan.BLOCK_M, tiles_n * plan.BLOCK_N if grad else 0,
            dtype=torch.float16 if split else image.dtype)  # fmt: skip
    gradients = new(2, losses, n if grad else 0, d)
    values, dscale = new(2), new(())
    partials, numbers, peaks = new(PARTIALS, n), new(KINDS, ROOM.value), new(2, PEAKS.value)
    if split:
        counters = torch.empty(2, dtype=torch.int32, device=image.device)
        _peak_kernel[PEAKS.value, 2](image, text, peaks, counters, n * d, BLOCK=BLOCK_PEAK)
    else:
        counters = torch.zeros(2, dtype=torch.int32, device=image.device)
    items = 2 * triton.cdiv(n, BLOCK) * triton.cdiv(d, BLOCK) if grad else 0
    for phase in (0,) if cooperative else (1, 2, 3):
        _small_kernel[min(max(items, tiles_m * tiles_n), sm_count),](
            image, text, logit_scale, image_ids, peaks, counters, partials, numbers, g,
            values, gradients[0], gradients[1], dscale, n, d, tiles_m, tiles_n, float(margin), float(label_smoothing),
            CONTRASTIVE=contrastive, TRIPLET=triplet, ADAPTIVE=adaptive, GAMMA=float(gamma), MASK_SAME=mask_same_id,
            SMOOTH=label_smoothing > 0, GRAD=grad, PARTS=parts, PHASE=phase,
            BLOCK_M=plan.BLOCK_M, BLOCK_N=plan.BLOCK_N, BLOCK_K=min(32 if split else 64, plan.width), BLOCK=BLOCK,
            PIECES=plan.PIECES,
            num_warps=plan.num_warps, launch_cooperative_grid=phase == 0,
        )  # fmt: skip
    return values, gradients[0], gradients[1], dscale
