"""Uniformity of one set of features: the softmax's two passes over S = X X^T, of which only one half is computed."""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rsfast._dispatch import once_differentiable, register
from rsfast._tiles import cdiv
from rsfast.similarity.kernels.first import first_pass
from rsfast.similarity.kernels.plan import BLOCK_ROWS
from rsfast.similarity.kernels.prepare import FULL, Batch
from rsfast.similarity.kernels.second import second_pass
from rsfast.similarity.kernels.vectors import sums_kernel

BAND = BLOCK_ROWS  # rows of S at once
BLOCK = 128  # rows of a program that sums up
LN2 = math.log(2)
LOST = 2.0**-102  # below N^2 times this, exponentials that were flushed to zero would be seen in the sum of all pairs
OPTIONS = dict(softmax=True, triplet=False, sigmoid=False, smooth=False, mask_same=False, margin=0.0, gamma=0.0)
NO_IDS = (None,) * 4


def _blocks(batch: Batch) -> Iterator[tuple[slice, slice, Batch]]:
    """Squares along the diagonal and what is right of each; what is below is its transpose."""
    for top in range(0, batch.N, BAND):
        rows = slice(top, min(top + BAND, batch.N))
        for columns in (rows, slice(rows.stop, batch.N)):
            part = copy.copy(batch)
            part.a, part.b, part.d = batch.a[rows], batch.b[columns], batch.d[rows]
            part.N, part.M, part.diagonal = len(part.a), len(part.b), columns is rows
            if part.M:
                yield rows, columns, part


def _prepared(features: Tensor, t: float) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """Batch, logit scale, and what the passes read."""
    batch = Batch(features, features, diagonal=True)
    scale = torch.full((), 2 * t, device=batch.device)
    return batch, scale, *batch.scalars(scale)


def fwd(features: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, log2 of the sum over all pairs, and which kernel was right."""
    batch, scale, scalars, wide = _prepared(features, t)
    N, parts = batch.N, list(_blocks(batch))
    logs = torch.empty(sum(part.N for *_, part in parts), dtype=torch.float64, device=batch.device)
    times = torch.cat([torch.full((part.N,), 1.0 if part.diagonal else 2.0, device=batch.device) for *_, part in parts])
    found = torch.empty(cdiv(min(BAND, N), BLOCK), 3, dtype=torch.float64, device=batch.device)
    flag = wide
    for exact in (False, True):
        start = 0
        for *_, part in parts:
            rows, _, _ = first_pass(part, scalars, flag, NO_IDS, columns=False, exact=exact, **OPTIONS)
            sums_kernel[(cdiv(part.N, BLOCK),)](
                rows, logs[start:], found, scalars, flag, scale, None, None, len(rows), part.N, 0.0, 0.0, 0.0,
                DIAGONAL=False, EXACT=exact, BLOCK=BLOCK, BLOCK_T=16,
            )  # fmt: skip
            start += part.N
        log_sum = (logs * LN2 + times.log()).logsumexp(0) / LN2
        if not exact:
            flag = (log_sum - scalars[1] < math.log2(LOST * N * N)).int().reshape(1)
    return (LN2 * log_sum - math.log(N * (N - 1)) - 2 * t).float(), log_sum, flag


def bwd(dloss: Tensor, features: Tensor, log_sum: Tensor, wide: Tensor, t: float) -> Tensor:
    """Gradient of the features: 2 G X, as S and G are symmetric."""
    batch, _, scalars, _ = _prepared(features, t)
    steep = 4 * t * dloss.double()
    highest = 2 * t / LN2 * batch.norms.amax()
    largest = torch.exp2(highest - log_sum).clamp(max=0.5)  # share of one pair, which counts twice
    bound = (steep.abs() * largest).float()
    one = torch.where(bound > 0, bound.log2().ceil().exp2(), 1.0) / FULL[batch.dtype]
    whole = log_sum.floor()  # exact in fp32; the rest of the logarithm is in the factor
    factor = steep / one / 2 * torch.exp2(torch.where(wide[0] > 0, whole, scalars[1]) - log_sum)
    sums = [x.float().expand(batch.N).contiguous() for x in (whole, whole, factor, factor)]  # rows and columns: halves
    dx = torch.zeros(batch.N, batch.D, device=batch.device)
    for rows, columns, part in _blocks(batch):
        da, db, *_ = second_pass(
            part, scalars, wide, NO_IDS, tuple(x[: max(part.N, part.M)] for x in sums), either=True,
            loss=False, need_a=True, need_b=not part.diagonal, **OPTIONS,
        )  # fmt: skip
        dx[rows] += da
        if not part.diagonal:
            dx[columns] += db
    return dx.mul_(one / batch.scales[0] if batch.parts == 2 else one).to(features.dtype)


def _fake_fwd(features, t):
    return (
        features.new_empty((), dtype=torch.float32),
        features.new_empty((), dtype=torch.float64),
        features.new_empty(1, dtype=torch.int32),
    )


def _fake_bwd(dloss, features, log_sum, wide, t):
    return features.new_empty(features.shape)


_fwd = register("uniformity_loss_fwd(Tensor features, float t) -> (Tensor, Tensor, Tensor)", fwd, _fake_fwd)
_bwd = register(
    "uniformity_loss_bwd(Tensor dloss, Tensor features, Tensor log_sum, Tensor wide, float t) -> Tensor", bwd, _fake_bwd
)


class _Uniformity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, t):
        loss, log_sum, wide = _fwd(features, t)
        ctx.save_for_backward(features, log_sum, wide)
        ctx.t = t
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return _bwd(dloss, *ctx.saved_tensors, ctx.t), None


def uniformity_loss(features: Tensor, *, t: float) -> Tensor:
    if torch.is_grad_enabled() and features.requires_grad:
        return _Uniformity.apply(features, t)
    return _fwd(features, t)[0]
