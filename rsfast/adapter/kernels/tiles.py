"""Tile maths that the kernels of the gated adapter share.

A tile is BLOCK_L tokens of one sample. Activations are (tokens, features) inside a sample, weights (out, in) as in
``nn.Linear``; feature blocks are padded to powers of two with zeros. Sums are fp32; operands of a product are rounded
to the weights' dtype first.
"""

import triton
import triton.language as tl

from rsfast._tiles import LOG2E, cast, dot


@triton.jit
def load(ptr, rows, cols, stride, row_end, col_end):
    """ptr[rows, cols], zero outside."""
    mask = (rows[:, None] < row_end) & (cols[None, :] < col_end)
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store(ptr, value, rows, cols, stride, valid, row_end, col_end):
    """ptr[rows, cols] = value, and zero in the rows from ``valid`` up to ``row_end``."""
    mask = (rows[:, None] < row_end) & (cols[None, :] < col_end)
    value = tl.where(rows[:, None] < valid, value, 0.0)
    out = ptr + rows[:, None] * stride + cols[None, :]
    tl.store(out, cast(value, ptr.dtype.element_ty), mask=mask)


@triton.jit
def vector(ptr, cols, col_end):
    """ptr[cols] as one row in fp32, zero outside."""
    return tl.load(ptr + cols, mask=cols < col_end, other=0.0).to(tl.float32)[None, :]


@triton.jit
def sigmoid_at(ptr):
    return tl.sigmoid(tl.load(ptr).to(tl.float32))


@triton.jit
def gelu(a):
    a = a.to(tl.float32)
    return 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))


@triton.jit
def gelu_grad(a):
    a = a.to(tl.float32)
    density = 0.3989422804014327 * tl.exp2(a * (-0.5 * LOG2E) * a)
    return 0.5 * (1 + tl.erf(a * 0.7071067811865476)) + a * density


@triton.jit
def linear_from(ptr, stride, w_ptr, b_ptr, rows, valid, IN, OUT: tl.constexpr,
                BLOCK_L: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """ptr[rows] @ w.T + b, with the (tokens, IN) input in memory; ``stride`` from token to token."""
    cols = tl.arange(0, BLOCK_OUT)
    acc = tl.zeros([BLOCK_L, BLOCK_OUT], tl.float32)
    for k in range(0, IN, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        w = load(w_ptr, cols, ks, IN, OUT, IN)  # [BLOCK_OUT, BLOCK_K]
        acc = dot(load(ptr, rows, ks, stride, valid, IN), w.T, acc)
    return acc + vector(b_ptr, cols, OUT)


@triton.jit
def linear_to(x, w_ptr, b_ptr, out_ptr, rows, valid, end, IN: tl.constexpr, OUT: tl.constexpr,
              BLOCK_L: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """out[rows] = x @ w.T + b, with the (BLOCK_L, BLOCK_IN) input in registers."""
    ins = tl.arange(0, BLOCK_IN)
    for n in range(0, OUT, BLOCK_N):
        ns = n + tl.arange(0, BLOCK_N)
        w = load(w_ptr, ns, ins, IN, OUT, IN)  # [BLOCK_N, BLOCK_IN]
        y = dot(x, w.T, tl.zeros([BLOCK_L, BLOCK_N], tl.float32)) + vector(b_ptr, ns, OUT)
        store(out_ptr, y, rows, ns, OUT, valid, end, OUT)


@triton.jit
def _columns(x, block, BLOCK_L: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns ``block * BLOCK_K`` and following of a tile in registers."""
    blocks = tl.reshape(x, [BLOCK_L, BLOCK_IN // BLOCK_K, BLOCK_K])
    mine = tl.arange(0, BLOCK_IN // BLOCK_K)[None, :, None] == block
    return tl.sum(tl.where(mine, blocks, 0.0), 1)


@triton.jit
def linear(x, w_ptr, b_ptr, IN: tl.constexpr, OUT: tl.constexpr,
           BLOCK_L: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr):  # fmt: skip
    """x @ w.T + b, all in registers."""
    outs = tl.arange(0, BLOCK_OUT)
    acc = tl.zeros([BLOCK_L, BLOCK_OUT], tl.float32)
    if w_ptr.dtype.element_ty == tl.float32:  # no tensor cores: a long product in one piece spills
        for block in range(BLOCK_IN // 16):
            w = load(w_ptr, outs, block * 16 + tl.arange(0, 16), IN, OUT, IN)
            acc = dot(_columns(x, block, BLOCK_L, BLOCK_IN, 16), w.T, acc)
    else:
        w = load(w_ptr, outs, tl.arange(0, BLOCK_IN), IN, OUT, IN)  # [BLOCK_OUT, BLOCK_IN]
        acc = dot(x, w.T, acc)
    return acc + vector(b_ptr, outs, OUT)


@triton.jit
def linear_grad(dy, w_ptr, IN: tl.constexpr, OUT: tl.constexpr,
                BLOCK_L: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr):  # fmt: skip
    """dy @ w, all in registers: the input's gradient of ``linear``."""
    ins = tl.arange(0, BLOCK_IN)
    acc = tl.zeros([BLOCK_L, BLOCK_IN], tl.float32)
    if w_ptr.dtype.element_ty == tl.float32:
        for block in range(BLOCK_OUT // 16):
            w = load(w_ptr, block * 16 + tl.arange(0, 16), ins, IN, OUT, IN)
            acc = dot(_columns(dy, block, BLOCK_L, BLOCK_OUT, 16), w, acc)
    else:
        acc = dot(dy, load(w_ptr, tl.arange(0, BLOCK_OUT), ins, IN, OUT, IN), acc)
    return acc


@triton.jit
def linear_grad_from(dy_ptr, w_ptr, rows, valid, IN: tl.constexpr, OUT: tl.constexpr,
                     BLOCK_L: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """dy[rows] @ w, with the (tokens, OUT) gradient in memory."""
    cols = tl.arange(0, BLOCK_IN)
    acc = tl.zeros([BLOCK_L, BLOCK_IN], tl.float32)
    for k in range(0, OUT, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        w = load(w_ptr, ks, cols, IN, OUT, IN)  # [BLOCK_K, BLOCK_IN]
        acc = dot(load(dy_ptr, rows, ks, OUT, valid, OUT), w, acc)
    return acc


@triton.jit
def linear_grad_to(dy, w_ptr, dx_ptr, rows, valid, end, IN: tl.constexpr, OUT: tl.constexpr,
                   BLOCK_L: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dx[rows] = dy @ w, with the (BLOCK_L, BLOCK_OUT) gradient in registers."""
    outs = tl.arange(0, BLOCK_OUT)
    for n in range(0, IN, BLOCK_N):
        ns = n + tl.arange(0, BLOCK_N)
        w = load(w_ptr, outs, ns, IN, OUT, IN)  # [BLOCK_OUT, BLOCK_N]
        dx = dot(dy, w, tl.zeros([BLOCK_L, BLOCK_N], tl.float32))
        store(dx_ptr, dx, rows, ns, IN, valid, end, IN)


@triton.jit
def sample_and_tile(lengths_ptr, tokens, tiles, HAS_LENGTHS: tl.constexpr):
    """Which sample and which tile of it this program has, and how many of the sample's tokens take part."""
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    valid = tokens
    if HAS_LENGTHS:
        valid = tl.minimum(tl.load(lengths_ptr + sample).to(tl.int32), tokens)
    return sample, pid % tiles, valid
