"""What the Triton kernels of all families share."""

import triton
import triton.language as tl

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
