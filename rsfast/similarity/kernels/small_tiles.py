"""What the phases of a small batch do with a tile of S, and what they leave for each other in memory.

Below, d_i = S_ii, and a loss has the gradient k (A + B) off the diagonal, A from the terms of a row and B from those of
a column, and -k (sum_j A_ij + sum_j B_ji) on it, which never leaves fp32.
"""

import triton
import triton.language as tl

from rsfast._tiles import LOG2E, cast, dot

TILES = tl.constexpr(16)  # most tiles along a side
ROOM = tl.constexpr(1024)  # most pieces of tiles: four of each
NOTHING = tl.constexpr(-1e30)  # the score of what is no pair: its exponential and its violation are zero

# partial results of the tiles, [tile of the other side, row or column] each
ROW_MAX, ROW_SUM, COL_MAX, COL_SUM = tl.constexpr(0), tl.constexpr(16), tl.constexpr(32), tl.constexpr(48)
SAME, OWN = tl.constexpr(64), tl.constexpr(80)  # pairs of equal id; d
COL_B, ROW_A = tl.constexpr(96), tl.constexpr(128)  # each for two losses; a tile may leave A in four pieces
PARTIALS = 256
# one number a piece of a tile
LOSS, DSCALE, STEP = tl.constexpr(0), tl.constexpr(2), tl.constexpr(3)  # two losses, two steps
NUMBERS = 5


@triton.jit
def power(peak):
    """Powers of two, each the other's inverse; the first takes ``peak`` to between 2^14 and 2^15, where fp16 ends."""
    peak = tl.minimum(tl.maximum(peak, 7.888609052210118e-31), 1.2676506002282294e30)  # 2^-100, 2^100
    exponent = peak.to(tl.int32, bitcast=True) & 0x7F800000
    up = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    return up * 16384.0, exponent.to(tl.float32, bitcast=True) * 6.103515625e-05


@triton.jit
def _parts(x, up, dtype: tl.constexpr):
    """Two fp16 numbers whose sum is x times ``up`` to 22 bits; other dtypes stay as they are, twice."""
    if x.dtype == tl.float32:
        x = x * up
        high = cast(x, dtype)
        return high, cast(x - high.to(tl.float32), dtype)
    else:
        return x, x


@triton.jit
def _product(a, a_low, b, b_low, acc, FP32: tl.constexpr):
    """acc + a @ b, small products first, so that they round less; low times low is below fp32's last bit."""
    if FP32:
        acc = dot(a, b_low, acc)
        acc = dot(a_low, b, acc)
    return dot(a, b, acc)


@triton.jit
def _times_product(factor, a, a_low, b, b_low, acc, FP32: tl.constexpr):
    """acc + factor * a @ b. The factor parts the products: one that feeds the next is laid out for 128 rows."""
    zero = tl.zeros(acc.shape, tl.float32)
    if FP32:
        acc += factor * dot(a, b_low, zero)
        acc += factor * dot(a_low, b, zero)
    return acc + factor * dot(a, b, zero)


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
    return tl.maximum(x, 0.0) + w * (2 * LOG2E) * series


@triton.jit
def softmax(ptr, max_slot: tl.constexpr, sum_slot: tl.constexpr, index, own, tiles, N, rate):
    """Of each row or column: its largest score, and log2 sum_j 2^(rate (S_ij - largest)) to its last bits."""
    peaks, exists = _gather(ptr, max_slot, index, tiles, N)
    peaks = tl.where(exists, peaks, NOTHING)
    peak = tl.max(peaks, 0)
    total = tl.sum(_gather(ptr, sum_slot, index, tiles, N)[0] * tl.exp2((peaks - peak[None, :]) * rate), 0)
    first = _softplus2((peak - own) * rate + tl.log2(total))  # where the largest is d_i
    other = tl.log2(total + tl.exp2(tl.minimum(own - peak, 0.0) * rate))
    return tl.maximum(peak, own), tl.where(own < peak, other, first)


@triton.jit
def _max_and_sum(s, rate, AXIS: tl.constexpr):
    """Largest score of each row (AXIS = 1) or column, and the sum of 2^(rate (s - largest))."""
    peak = tl.max(s, AXIS)
    return peak, tl.sum(tl.exp2((s - tl.expand_dims(peak, AXIS)) * rate), AXIS)


@triton.jit
def scores(image_ptr, text_ptr, image_up, text_up, down, rows, cols, N, D, end, TYPE: tl.constexpr,
           FP32: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A tile of S, from the first ``end`` features."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, end, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        a, a_low = _parts(_load(image_ptr, rows, ks, N, D), image_up, TYPE)
        b, b_low = _parts(_load(text_ptr, cols, ks, N, D), text_up, TYPE)
        if FP32 and BLOCK_M == 64:
            acc = _times_product(down, a, a_low, b.T, b_low.T, acc, FP32)
        else:
            acc = _product(a, a_low, b.T, b_low.T, acc, FP32)
    return acc if FP32 and BLOCK_M == 64 else acc * down


@triton.jit
def same_id(ids_ptr, rows, cols, N):
    one = tl.load(ids_ptr + rows, mask=rows < N, other=0)
    other = tl.load(ids_ptr + cols, mask=cols < N, other=0)
    return one[:, None] == other[None, :]


@triton.jit
def target(ids_ptr, partials_ptr, index, tiles, N, smoothing):
    """Target of each positive of a row or column."""
    if ids_ptr is not None:
        return (1 - smoothing) / _total(partials_ptr, SAME, index, tiles, N)
    else:
        return (1 - smoothing) + tl.zeros(index.shape, tl.float32)


@triton.jit
def statistics(s, rows, cols, ids_ptr, partials_ptr, pm, pn, N, rate):
    """What the softmax of rows and columns needs to know of the tile."""
    peak, total = _max_and_sum(s, rate, 1)
    _put(partials_ptr, ROW_MAX, pn, rows, peak, N)
    _put(partials_ptr, ROW_SUM, pn, rows, total, N)
    peak, total = _max_and_sum(s, rate, 0)
    _put(partials_ptr, COL_MAX, pm, cols, peak, N)
    _put(partials_ptr, COL_SUM, pm, cols, total, N)
    if ids_ptr is not None:
        same = same_id(ids_ptr, rows, cols, N) & (cols[None, :] < N)
        _put(partials_ptr, SAME, pn, rows, tl.sum(same.to(tl.float32), 1), N)


@triton.jit
def emit(g, a_sums, b_sums, loss: tl.constexpr, g_ptr, partials_ptr, numbers_ptr, rows, cols, pm, pn,
         tiles_m, tiles_n, N, FP32: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Leaves the tile of A + B in 16 bits, as large as they hold, and in fp32 what the diagonal needs of it."""
    _put(partials_ptr, ROW_A + 64 * loss, pn, rows, a_sums, N)
    _put(partials_ptr, COL_B + 16 * loss, pm, cols, b_sums, N)
    up, down = power(tl.max(tl.abs(g)))
    tl.store(numbers_ptr + (STEP + loss) * ROOM + pm * tiles_n + pn, down)
    high, low = _parts(g, up, g_ptr.dtype.element_ty)
    width = tiles_n * BLOCK_N
    out = g_ptr + loss * (1 + FP32) * tiles_m * BLOCK_M * width + rows[:, None] * width + cols[None, :]
    tl.store(out, high)
    if FP32:
        tl.store(out + tiles_m * BLOCK_M * width, low)


@triton.jit
def _pull(acc, loss: tl.constexpr, g_ptr, numbers_ptr, x, x_low, index, ks, tile, tiles_m, tiles_n,
          TEXT: tl.constexpr, FP32: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """acc + the tile of A + B (of its transpose for the texts) times x."""
    width = tiles_n * BLOCK_N
    part = tiles_m * BLOCK_M * width
    g_ptr += loss * (1 + FP32) * part
    if TEXT:
        at = g_ptr + ks[:, None] * width + index[None, :]
        g = tl.load(at).T
        low = tl.load(at + part).T if FP32 else g
    else:
        at = g_ptr + index[:, None] * width + ks[None, :]
        g = tl.load(at)
        low = tl.load(at + part) if FP32 else g
    step = tl.load(numbers_ptr + (STEP + loss) * ROOM + tile)
    return _times_product(step[:, None], g, low, x, x_low, acc, FP32)


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
def gradient(g_ptr, partials_ptr, numbers_ptr, x_ptr, up, down, out_ptr, factor, factor_2, block, ds,
             tiles_m, tiles_n, N, D, LOSSES: tl.constexpr, TEXT: tl.constexpr, FP32: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
             PIECES: tl.constexpr):  # fmt: skip
    """One tile of the images' gradient (x the texts), or of the texts' (x the images), for each loss."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc_2 = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, N, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x, x_low = _parts(_load(x_ptr, ks, ds, N, D), up, g_ptr.dtype.element_ty)
        row, col = (k, index) if TEXT else (index, k)
        tile = (row // BLOCK_M) * tiles_n + col // BLOCK_N  # of each index
        acc = _pull(acc, 0, g_ptr, numbers_ptr, x, x_low, index, ks, tile, tiles_m, tiles_n,
                    TEXT, FP32, BLOCK_M, BLOCK_N)  # fmt: skip
        if LOSSES == 2:
            acc_2 = _pull(acc_2, 1, g_ptr, numbers_ptr, x, x_low, index, ks, tile, tiles_m, tiles_n,
                          TEXT, FP32, BLOCK_M, BLOCK_N)  # fmt: skip
    own = _load(x_ptr, index, ds, N, D).to(tl.float32)
    _finish(acc * down, 0, partials_ptr, out_ptr, factor, own, index, ds, tiles_m, tiles_n, N, D, PIECES)
    if LOSSES == 2:
        _finish(acc_2 * down, 1, partials_ptr, out_ptr, factor_2, own, index, ds, tiles_m, tiles_n, N, D, PIECES)


@triton.jit
def total_of(ptr, kind: tl.constexpr, tiles):
    """Sum of one kind of number over the pieces of all tiles."""
    tile = tl.arange(0, ROOM)
    return tl.sum(tl.load(ptr + kind * ROOM + tile, mask=tile < tiles, other=0.0), 0)


@triton.jit
def barrier(counter_ptr):
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
