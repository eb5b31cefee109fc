"""Launches of the second pass: blocks of G, and the products that turn them into gradients."""

import torch
import triton.language as tl
from torch import Tensor

from rsfast.similarity.kernels.backward import grad_kernel
from rsfast.similarity.kernels.plan import block_shape, tiles
from rsfast.similarity.kernels.prepare import Batch
from rsfast.similarity.kernels.vectors import finish_kernel

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def second_pass(
    batch: Batch, scalars: Tensor, wide: Tensor, targets: tuple, sums: tuple, *, either: bool,
    softmax: bool, triplet: bool, sigmoid: bool, loss: bool, smooth: bool, mask_same: bool, margin: float, gamma: float,
    need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """G b and G^T a without the positives, the triplet's derivatives by each row's and column's positive, totals.

    Args:
        wide: Says which of two kernels runs, if it may be ``either``.
        targets: Ids of both sides and the share of each positive in its row and column, or four None.
        sums: The softmax's logarithms of sums and factors: of rows, of columns, of rows, of columns; or four None.
    """
    N, M, device = batch.N, batch.M, batch.device
    plan = tiles(device, N, M, batch.width, large=not triplet and batch.parts == 1)
    height, length = block_shape(N, M, batch.parts)
    store, piece = need_a or need_b, plan.BLOCK_N // plan.PIECES
    g = torch.empty(batch.parts, height, -(-length // 8) * 8, dtype=batch.dtype, device=device) if store else None
    da = torch.zeros(N if need_a else 0, batch.D, device=device)
    db = torch.zeros(M if need_b else 0, batch.D, device=device)
    rows_by, columns_by = (torch.zeros(n if triplet else 0, device=device) for n in (N, M))
    totals = []
    for top in range(0, N, height):
        r = slice(top, min(top + height, N))
        for left in range(0, M, length):
            c = slice(left, min(left + length, M))
            n, m = r.stop - r.start, c.stop - c.start
            block = [part[:n, :m] for part in g] if store else []
            stored = [batch.operand(part, plan.BLOCK_M, piece) for part in block] + [None] * (2 - len(block))
            rows = torch.empty(-(-m // plan.BLOCK_N) * plan.PIECES if triplet else 0, n, device=device)
            columns = torch.empty(-(-n // plan.BLOCK_M) if triplet else 0, m, device=device)
            grid = plan.grid(n, m, device)
            for exact in (False, True) if either else (False,):
                found = torch.zeros(*grid, 3, device=device)  # the kernel that returns at once leaves them
                grad_kernel[grid](
                    batch.operand(batch.a[r], plan.BLOCK_M, plan.BLOCK_K),
                    batch.operand(batch.b[c], plan.BLOCK_N, plan.BLOCK_K), *stored, scalars, wide,
                    *((batch.d[r], batch.d[c]) if triplet else (None, None)),
                    *_part(targets, r, c), *_part(sums, r, c), rows, columns, found,
                    n, m, batch.width, g.stride(1) if store else 0, top + batch.offset - left, margin,
                    SOFTMAX=softmax, TRIPLET=triplet, SIGMOID=sigmoid, LOSS=loss, DIAGONAL=batch.diagonal,
                    HAS_IDS=targets[0] is not None, SMOOTH=smooth, MASK_SAME=mask_same, EXACT=exact, GAMMA=gamma,
                    PARTS=batch.parts, TMA=batch.tma, STORE=store, DTYPE=DTYPES[batch.dtype], **plan.options(),
                )  # fmt: skip
                totals.append(found)
            if triplet:
                rows_by[r] += rows.sum(0)
                columns_by[c] += columns.sum(0)
            if need_a:
                _multiply(da[r], block, _both_parts(batch, batch.b[c]))
            if need_b:
                _multiply(db[c], [part.mT for part in block], _both_parts(batch, batch.a[r]))
    return da, db, rows_by, columns_by, totals[0] if len(totals) == 1 else torch.cat(totals)


def _part(vectors: tuple, rows: slice, columns: slice) -> list:
    """Of a row's and a column's vectors in turn, those of a block."""
    return [None if v is None else v[at] for v, at in zip(vectors, (rows, columns) * 2, strict=True)]


def _both_parts(batch: Batch, x: Tensor) -> list[Tensor]:
    half = batch.width // batch.parts
    return [x[:, i * half : i * half + batch.D] for i in range(batch.parts)]


def _multiply(out: Tensor, left: list[Tensor], right: list[Tensor]) -> None:
    """out += left @ right in fp32; of two parts each, all but the product of the low ones."""
    for i, x in enumerate(left):
        for y in right[: len(right) - i]:
            if out.is_cuda:
                torch.addmm(out, x, y, out_dtype=torch.float32, out=out)
            else:
                torch.addmm(out, x.float(), y.float(), out=out)  # autocast leaves it alone, unlike x @ y


def gradients(
    batch: Batch,
    scalars: Tensor,
    da: Tensor,
    db: Tensor,
    own: Tensor | None,
    by: tuple,
    need_a: bool,
    need_b: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of both features in ``dtype``, from the products and the gradient of each positive's score.

    Args:
        own: That gradient, (N,), of the softmax or sigmoid, if any.
        by: The triplet's derivatives by it, of rows and columns, or two None.
    """
    N, first, D = batch.N, batch.offset, batch.D

    def finished(acc, other, factor, first):
        out = acc if dtype == acc.dtype else torch.empty(acc.shape, dtype=dtype, device=batch.device)
        grid = (-(-len(acc) // 16), -(-D // 128))
        finish_kernel[grid](
            acc, out, other, own, *by, scalars[factor:], scalars[10:], len(acc), first, N if batch.diagonal else 0, D,
            batch.pitch, BLOCK_R=16, BLOCK_D=128,
        )  # fmt: skip
        return out

    dimage = finished(da, batch.text[first:], 7, 0) if need_a else da.to(dtype)
    dtext = finished(db, batch.image, 8, first) if need_b else db.to(dtype)
    return dimage, dtext
