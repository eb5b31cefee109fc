"""Launches of the second pass: blocks of G, and the products that turn them into gradients."""

import torch
import triton.language as tl
from torch import Tensor

from rsfast.similarity.kernels.backward import grad_kernel
from rsfast.similarity.kernels.plan import BLOCK_ROWS, block_shape, tiles
from rsfast.similarity.kernels.prepare import Batch

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FULL = {torch.float16: 2.0**14, torch.bfloat16: 1.0}  # size of the largest entry of G: fp16 needs its range


def unit(batch: Batch, bound: Tensor) -> Tensor:
    """What one unit in a stored G stands for: a power of two, from a bound on the entries of the true one."""
    size = torch.where(bound > 0, bound.log2().ceil().exp2(), 1.0)
    return size / FULL[batch.dtype]


def second_pass(
    batch: Batch, scalars: Tensor, wide: Tensor | None, targets: tuple, sums: tuple, *,
    softmax: bool, triplet: bool, sigmoid: bool, loss: bool, smooth: bool, mask_same: bool, margin: float, gamma: float,
    need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """G b and G^T a without the positives, the triplet's derivatives by each row's and column's positive, totals.

    Args:
        wide: Says which of two kernels runs; None where one is always right.
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
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    never = torch.zeros(1, dtype=torch.int32, device=device) if wide is None else wide
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
            for exact in (False,) if wide is None else (False, True):
                found = torch.zeros(*grid, 3, device=device)
                grad_kernel[grid](
                    batch.operand(batch.a[r], plan.BLOCK_M, plan.BLOCK_K),
                    batch.operand(batch.b[c], plan.BLOCK_N, plan.BLOCK_K), *stored, scalars, never,
                    *((batch.d[r], batch.d[c]) if triplet else (None, None)),
                    *_part(targets, r, c), *_part(sums, r, c), rows, columns, found,
                    n, m, batch.width, g.stride(1) if store else 0, top + batch.offset - left, margin,
                    SOFTMAX=softmax, TRIPLET=triplet, SIGMOID=sigmoid, LOSS=loss, DIAGONAL=batch.diagonal,
                    HAS_IDS=targets[0] is not None, SMOOTH=smooth, MASK_SAME=mask_same, EXACT=exact, GAMMA=gamma,
                    PARTS=batch.parts, TMA=batch.tma, STORE=store, DTYPE=DTYPES[batch.dtype], **plan.options(),
                )  # fmt: skip
                totals += found.sum(0, dtype=torch.float64)
            if triplet:
                rows_by[r] += rows.sum(0)
                columns_by[c] += columns.sum(0)
            if need_a:
                _multiply(da[r], block, _both_parts(batch, batch.b[c]))
            if need_b:
                _multiply(db[c], [part.mT for part in block], _both_parts(batch, batch.a[r]))
    return da, db, rows_by, columns_by, totals


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
                out += x.float() @ y.float()


def finish(
    acc: Tensor, factor: Tensor, dtype: torch.dtype, own: Tensor | None, other: Tensor, first: int = 0
) -> Tensor:
    """acc * factor in ``dtype``, from row ``first`` on plus own * other, the positives' part; ``acc`` is used up."""
    acc.mul_(factor)
    if own is not None:
        for start in range(0, len(own), BLOCK_ROWS):  # a slice at a time, else a copy of all features in fp32
            n = min(BLOCK_ROWS, len(own) - start)
            mine = own[start : start + n, None]
            acc[first + start : first + start + n].addcmul_(mine, other[start : start + n].float())
    return acc.to(dtype)


def gradients(
    batch: Batch, da: Tensor, db: Tensor, own: Tensor | None, one: Tensor, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of both features, from the products and the gradient of each positive's score."""
    dtype, first = batch.image.dtype, batch.offset
    by_a, by_b = (one, one) if batch.parts == 1 else (one / batch.scale_b, one / batch.scale_a)
    positives = batch.text[first : first + batch.N]
    dimage = finish(da, by_a.float(), dtype, own, positives) if need_a else da.to(dtype)
    dtext = finish(db, by_b.float(), dtype, own, batch.image, first) if need_b else db.to(dtype)
    return dimage, dtext
