"""What the tiles need to know of the batch, in O(N D): operands in 16 bits, scores of the positives, norms, ids."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rsfast._dispatch import capability
from rsfast._tiles import cast, cdiv
from rsfast.similarity.kernels.vectors import SCALARS, scalars_kernel

FULL = {torch.float16: 2.0**14, torch.bfloat16: 1.0}  # size of the largest entry of G: fp16 needs its range
PART_BITS = 14  # the largest element of an fp32 operand's high part lies just below 2^14: fp16 ends at 2^16
ROWS = 16  # of a program
STEP = 64  # both parts are padded to this, so that no step over the width reads from two of them


@triton.jit
def _part(x_ptr, out_ptr, scale_ptr, rows, cols, n, D, width):
    """The rows times a power of two as high and low fp16 parts: 22 bits of every fp32 element."""
    mask = rows[:, None] < n
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * D + cols[None, :], mask=mask & (cols[None, :] < D), other=0.0)
    x *= tl.load(scale_ptr)
    high = cast(x, tl.float16)
    out = out_ptr + rows[:, None].to(tl.int64) * width + cols[None, :]
    mask = mask & (cols[None, :] < width // 2)
    tl.store(out, high, mask=mask)
    tl.store(out + width // 2, cast(x - high.to(tl.float32), tl.float16), mask=mask)


@triton.jit
def _rows(x_ptr, rows, cols, n, D):
    mask = ((rows >= 0) & (rows < n))[:, None] & (cols[None, :] < D)
    return tl.load(x_ptr + rows[:, None].to(tl.int64) * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def prepare_kernel(a_ptr, b_ptr, a_parts_ptr, b_parts_ptr, scales_ptr, d_ptr, norms_ptr, N, M, D, width, offset,
                   DIAGONAL: tl.constexpr, PARTS: tl.constexpr,
                   BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Scores of the positives, largest squared norms of a block of rows, and the two parts of fp32 operands."""
    pid = tl.program_id(0)
    rows = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    aa = tl.zeros([BLOCK_R], tl.float32)
    bb = tl.zeros([BLOCK_R], tl.float32)
    ab = tl.zeros([BLOCK_R], tl.float32)
    for k in range(0, width // PARTS, BLOCK_D):
        cols = k + tl.arange(0, BLOCK_D)
        a, b = _rows(a_ptr, rows, cols, N, D), _rows(b_ptr, rows, cols, M, D)
        aa += tl.sum(a * a, 1)
        bb += tl.sum(b * b, 1)
        if DIAGONAL:
            ab += tl.sum(a * _rows(b_ptr, rows + offset, cols, M, D), 1)
        if PARTS == 2:
            _part(a_ptr, a_parts_ptr, scales_ptr, rows, cols, N, D, width)
            _part(b_ptr, b_parts_ptr, scales_ptr + 1, rows, cols, M, D, width)
    tl.store(norms_ptr + 2 * pid, tl.max(aa, 0))
    tl.store(norms_ptr + 2 * pid + 1, tl.max(bb, 0))
    if DIAGONAL:
        tl.store(d_ptr + rows, ab, mask=rows < N)


def _packed(x: Tensor, tma: bool) -> Tensor:
    """Contiguous, and where descriptors read it at a multiple of 16 bytes, with rows of such a multiple."""
    short = -x.shape[1] % (16 // x.element_size()) if tma else 0
    x = torch.nn.functional.pad(x, (0, short)) if short else x.contiguous()
    x = x.flatten().view(x.shape)  # one row is contiguous whatever its stride says
    return x.clone() if tma and x.data_ptr() % 16 else x


class Batch:
    """Images and texts, or queries and keys, as the kernels read them.

    Attributes:
        a, b: 16-bit operands, (N, width) and (M, width).
        parts: 2 where they hold the two parts of fp32 features.
        dtype: Of the operands.
        image, text: The features, contiguous, with rows of ``pitch`` elements.
        d: Scores of the positives, (N,) fp32, where there is a diagonal.
        norms: Largest squared norms of blocks of rows.
        scales: Powers of two in the operands, where they have two parts.
    """

    def __init__(self, image: Tensor, text: Tensor, *, diagonal: bool, offset: int = 0):
        self.diagonal, self.offset = diagonal, offset
        (self.N, self.D), self.M, self.device = image.shape, len(text), image.device
        self.tma = capability(self.device) >= 90
        self.parts = 2 if image.dtype == torch.float32 else 1
        self.dtype = torch.float16 if self.parts == 2 else image.dtype
        self.a, self.b = self.image, self.text = _packed(image, self.tma), _packed(text, self.tma)
        self.width = self.pitch = self.image.shape[1]
        self.scales = None
        if self.parts == 2:
            largest = torch.stack([torch.linalg.vector_norm(x.flatten(), float("inf")) for x in (image, text)])
            largest = torch.where(largest.isinf(), math.nan, largest)  # else all that is finite would become 0
            self.scales = torch.exp2((PART_BITS - 1 - largest.log2().floor()).clamp(-60, 60))
            self.width = 2 * STEP * cdiv(self.D, STEP)
            self.a, self.b = (image.new_empty(n, self.width, dtype=self.dtype) for n in (self.N, self.M))
        blocks = cdiv(max(self.N, self.M), ROWS)
        self.d = image.new_empty(self.N if diagonal else 0, dtype=torch.float32)
        self.norms = image.new_empty(blocks, 2, dtype=torch.float32)
        prepare_kernel[(blocks,)](
            self.image, self.text, self.a, self.b, self.scales, self.d, self.norms,
            self.N, self.M, self.pitch, self.width, offset,
            DIAGONAL=diagonal, PARTS=self.parts, BLOCK_R=ROWS, BLOCK_D=STEP,
        )  # fmt: skip

    def operand(self, x: Tensor, rows: int, step: int) -> Tensor | TensorDescriptor:
        """``x`` as a kernel reads or writes it in blocks of rows x step."""
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, step]) if self.tma else x

    def scalars(
        self, scale: Tensor | None, bias: Tensor | None = None, *, smooth: tuple[float, float] = (0.0, 0.0),
        weight: float = 0.0, steepest: float = 0.0, shared_exp: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The call's scalars, see ``vectors.py``, and which of two kernels is right so far."""
        scalars = torch.empty(SCALARS, device=self.device)
        wide = torch.empty(1, dtype=torch.int32, device=self.device)
        scalars_kernel[(1,)](
            scalars, wide, self.norms, len(self.norms), self.scales, scale, bias, math.log2(max(self.N, self.M)),
            *smooth, weight, steepest, FULL=FULL[self.dtype], PARTS=self.parts, SHARED_EXP=shared_exp, BLOCK=1024,
        )  # fmt: skip
        return scalars, wide


def matches(image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both sides' ids as small integers, -1 in an image without a text, and how many each one meets."""
    sorted_ids, _ = text_ids.sort()
    first = torch.searchsorted(sorted_ids, image_ids)
    met = torch.searchsorted(sorted_ids, image_ids, right=True) - first
    ids_a = torch.where(met > 0, first, -1).int()
    if text_ids is image_ids:
        return ids_a, ids_a.clone(), met, met  # outputs of an operator may not share memory
    ids_b = torch.searchsorted(sorted_ids, text_ids).int()
    sorted_ids, _ = image_ids.sort()
    met_b = torch.searchsorted(sorted_ids, text_ids, right=True) - torch.searchsorted(sorted_ids, text_ids)
    return ids_a, ids_b, met, met_b
