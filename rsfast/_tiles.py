"""What the Triton kernels of all families share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x rounded to the nearest value of ``dtype``."""
    if INTERPRET and dtype == tl.bfloat16 and x.dtype == tl.float32:  # the interpreter cuts the bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32, without TF32; an operand in another dtype is rounded to the narrower one's."""
    if a.dtype != b.dtype:
        if b.dtype == tl.float32:
            b = cast(b, a.dtype)
        else:
            a = cast(a, b.dtype)
    if INTERPRET:  # the interpreter multiplies bf16 operands wrongly, without a word
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile; tiles that run at the same time share operands in the L2 cache."""
    band = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    inside = tile % (GROUP * tiles_n)
    return band * GROUP + inside % height, inside // height


@triton.jit
def operand(source, row, column, rows, width, pitch, TMA: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block of a (rows, width) matrix with rows ``pitch`` apart, zero outside; ``source`` may be a descriptor."""
    if TMA:
        return source.load([row, column])
    else:  # descriptors do not compile as pointers
        r, k = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK_K)
        mask = (r[:, None] < rows) & (k[None, :] < width)
        return tl.load(source + r[:, None].to(tl.int64) * pitch + k[None, :], mask=mask, other=0.0)


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def pieces(x, M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr):
    """The tile as 1, 2 or 4 tiles side by side, so that what is computed from one needs few registers."""
    if PIECES == 1:
        return (x,)
    elif PIECES == 2:
        return _halves(x, M, N)
    else:
        left, right = _halves(x, M, N)
        return _halves(left, M, N // 2) + _halves(right, M, N // 2)


def cdiv(n: int, size: int) -> int:
    """Blocks of ``size`` that hold ``n``; Triton's own costs the host microseconds a call."""
    return -(-n // size)


def pad(size: int) -> int:
    """Smallest block that holds ``size`` and that a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


def rows_apart(x: Tensor) -> Tensor:
    """``x`` with contiguous features; rows may be any distance apart."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def roomy(sm: int) -> bool:
    """Whether a program may have 163 KB of shared memory or more; GPUs of workstations and notebooks have 99."""
    return sm in (80, 90, 100, 103)


@torch.compiler.assume_constant_result
def multiprocessors(device: torch.device) -> int:
    """Programs that run at the same time."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2 if INTERPRET.value else 132  # interpreted, two show that they divide the work; compiled, as for an H200
