"""The centres as the kernels read them, and how wrong a score can be."""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rsfast._tiles import cast, cdiv

STEP = 128  # the parts of the centres are padded to this, so that no kernel has to look where they end
SIZE = tl.constexpr(6)  # scaled, the largest number of all centres lies just below 2^(SIZE + 1): fp16 ends at 2^16


@triton.jit
def _root(x):
    """Not less than the square root of a float64 number, from fp32's, which costs no call."""
    return tl.sqrt(x.to(tl.float32)).to(tl.float64) * (1 + 2.0**-20) + 1e-19


@triton.jit
def centers_kernel(
    centers_ptr, middle_ptr, largest_ptr, subsidies_ptr, high_ptr, low_ptr, bias_ptr, sizes_ptr, scale_ptr,
    width, padded, centers, CENTRED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """c' of a few centres in two parts, their biases (with one part, with both), and what bounds the scores' errors.

    Of 16-bit rows, ``x . r`` of what the parts r leave out is ``(x - m) . r + m . r``; the bias has the second term.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside, at = k < centers, k[:, None].to(tl.int64)
    largest = tl.load(largest_ptr)
    exponent = ((largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
    exponent = tl.minimum(tl.maximum(SIZE - exponent, -100), 100)
    exponent = tl.where(largest > 0, exponent, 0)
    scale = ((1023 + exponent) << 52).to(tl.float64, bitcast=True)
    inverse = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
    squares = tl.zeros([BLOCK_K], tl.float64)
    left1, left2, with1, with2 = squares, squares, squares, squares
    for first in tl.range(0, padded, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < width)[None, :]
        c = tl.load(centers_ptr + at * width + d[None, :], mask=mask, other=0.0).to(tl.float64)
        middle = tl.load(middle_ptr + d, mask=d < padded, other=0.0).to(tl.float64)[None, :]
        c = (c - middle) * scale
        high = cast(c.to(tl.float32), high_ptr.dtype.element_ty)
        rest = c - high.to(tl.float32).to(tl.float64)
        low = cast(rest.to(tl.float32), low_ptr.dtype.element_ty)
        mask = inside[:, None] & (d < padded)[None, :]
        tl.store(high_ptr + at * padded + d[None, :], high, mask=mask)
        tl.store(low_ptr + at * padded + d[None, :], low, mask=mask)
        least = rest - low.to(tl.float32).to(tl.float64)
        squares += tl.sum(c * c, 1)
        left1 += tl.sum(rest * rest, 1)
        left2 += tl.sum(least * least, 1)
        if not CENTRED:
            with1 += tl.sum(middle * (c - rest), 1)
            with2 += tl.sum(middle * (c - least), 1)
    subsidy = tl.zeros([BLOCK_K], tl.float64)
    if subsidies_ptr is not None:
        subsidy += tl.load(subsidies_ptr + k, mask=inside, other=0.0).to(tl.float64)
    if CENTRED:
        bias1 = squares - subsidy * scale * scale
        bias2 = bias1
    else:
        rest = squares * inverse - subsidy * scale
        bias1, bias2 = 2 * with1 + rest, 2 * with2 + rest
    tl.store(bias_ptr + k, bias1.to(tl.float32), mask=inside)
    tl.store(bias_ptr + centers + k, bias2.to(tl.float32), mask=inside)
    tl.store(sizes_ptr + k, _root(squares), mask=inside)
    tl.store(sizes_ptr + centers + k, _root(left1), mask=inside)
    tl.store(sizes_ptr + 2 * centers + k, _root(left2), mask=inside)
    tl.store(sizes_ptr + 3 * centers + k, tl.maximum(tl.abs(bias1), tl.abs(bias2)), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale.to(tl.float32))


@triton.jit
def _largest(sizes_ptr, n, BLOCK: tl.constexpr):
    most = tl.zeros([BLOCK], tl.float64)
    for first in tl.range(0, n, BLOCK):
        k = first + tl.arange(0, BLOCK)
        size = tl.load(sizes_ptr + k, mask=k < n, other=0.0)
        most = tl.where(size <= most, most, size)  # NaN is kept
    return tl.max(tl.where(most == most, most, float("inf")), 0)


@triton.jit
def limits_kernel(
    sizes_ptr, middle_ptr, scale_ptr, limits_ptr, centers, padded,
    CENTRED: tl.constexpr, STEP_FEW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """|error| of a score is at most ``limits[0] + limits[1] n`` with one part, ``limits[2] + limits[3] n`` with both.

    n is the computed ||(x - m) scale||. By Cauchy and Schwarz; ``u`` is what sums can lose, relative to ||x|| ||c'||: a
    step of 16 products on tensor cores that cut off is taken for 2^-20.
    """
    norm, scale = tl.zeros([BLOCK], tl.float64), tl.load(scale_ptr).to(tl.float64)
    for first in tl.range(0, padded, BLOCK):
        d = first + tl.arange(0, BLOCK)
        middle = tl.load(middle_ptr + d, mask=d < padded, other=0.0).to(tl.float64) * scale
        norm += middle * middle
    c, left1 = _largest(sizes_ptr, centers, BLOCK), _largest(sizes_ptr + centers, centers, BLOCK)
    left2 = _largest(sizes_ptr + 2 * centers, centers, BLOCK)
    bias = _largest(sizes_ptr + 3 * centers, centers, BLOCK)
    terms = padded.to(tl.float64)
    unit = tl.full([], 2.0**-24, tl.float64)
    # with one part, the last 8 bits of a score hold its column; see many_kernel
    one, column = terms * (2.0**-24) + 4 * unit, 2.0**-15 + 4 * unit
    c += left1
    both = STEP_FEW * (2.0**-24) * (1 + 2.0**-6) + (terms / STEP_FEW + 4) * unit
    if CENTRED:
        m, times = tl.zeros_like(unit), tl.full([], 1.0, tl.float64)
        left1 += c * (2.0**-9 + 4 * unit)
        left2 += c * (2.0**-17 + 4 * unit)
    else:
        times = (1 / tl.load(scale_ptr)).to(tl.float64)  # of a power of two: exact
        m = _root(tl.sum(norm, 0)) * times
    # what underflows: squares of a norm, products, and operands that are no normal numbers
    slack = 1 + (terms + 4) * unit
    lost, tiny = _root(terms) * (2.0**-62), terms * (2.0**-118) * (1 + c)
    each1, each2 = 2 * times * slack * (left1 + (one + column) * c), 2 * times * slack * (left2 + (both + 4 * unit) * c)
    always1 = 2 * (one + column) * m * c + column * bias + tiny + lost * each1
    always2 = 2 * (both + 4 * unit) * m * c + 4 * unit * bias + tiny + lost * each2
    up = 1 + 2.0**-16  # and the kernels' square roots are approximate
    tl.store(limits_ptr, (always1 * up).to(tl.float32))
    tl.store(limits_ptr + 1, (each1 * up).to(tl.float32))
    tl.store(limits_ptr + 2, (always2 * up).to(tl.float32))
    tl.store(limits_ptr + 3, (each2 * up).to(tl.float32))


@dataclasses.dataclass(frozen=True)
class Centers:
    """K centres for rows of one dtype."""

    given: Tensor  # (K, D), contiguous
    subsidies: Tensor | None
    high: Tensor  # (K, padded) in 16 bits
    low: Tensor
    middle: Tensor  # (padded,) fp32: m, about the mean centre
    bias: Tensor  # (2, K) fp32: with one part of c', with both
    limits: Tensor  # (4,) fp32
    scale: Tensor  # () fp32

    def parts(self, rows: int, step: int, tma: bool) -> tuple[Tensor | TensorDescriptor, ...]:
        """Both parts as a kernel reads them."""
        return tuple(described(part, rows, step) if tma else part for part in (self.high, self.low))


def described(x: Tensor, rows: int, step: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, step])


def prepare(x: Tensor, centers: Tensor, subsidies: Tensor | None, step_few: int) -> Centers:
    """``step_few``: products that a kernel which takes both parts adds up at once."""
    centers = centers.contiguous()
    (K, D), padded = centers.shape, cdiv(centers.shape[1], STEP) * STEP
    centred = x.dtype == torch.float32
    dtype = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
    middle = torch.zeros(padded, dtype=torch.float32, device=x.device)
    torch.nan_to_num(centers.mean(0, dtype=torch.float64).float(), nan=0.0, posinf=0.0, neginf=0.0, out=middle[:D])
    largest = torch.linalg.vector_norm(centers.flatten(), float("inf")).double()
    high, low = (x.new_empty(K, padded, dtype=dtype) for _ in range(2))
    bias = x.new_empty(2, K, dtype=torch.float32)
    sizes = x.new_empty(4, K, dtype=torch.float64)
    limits = x.new_empty(4, dtype=torch.float32)
    scale = x.new_empty((), dtype=torch.float32)
    group, step = (1, 1024) if D > 1024 else (8, STEP)
    centers_kernel[(cdiv(K, group),)](
        centers, middle, largest, subsidies, high, low, bias, sizes, scale, D, padded, K,
        CENTRED=centred, BLOCK_K=group, BLOCK_D=step, num_warps=4,
    )  # fmt: skip
    limits_kernel[(1,)](
        sizes, middle, scale, limits, K, padded, CENTRED=centred, STEP_FEW=step_few, BLOCK=512, num_warps=4
    )  # fmt: skip
    return Centers(centers, subsidies, high, low, middle, bias, limits, scale)
