"""Uniformity of one set of features: the softmax's two passes over S = X X^T, of which only one half is computed."""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rsfast._dispatch import register
from rsfast.similarity.kernels.first import LN2, LOWEST, first_pass, shift
from rsfast.similarity.kernels.plan import BLOCK_ROWS
from rsfast.similarity.kernels.prepare import Batch
from rsfast.similarity.kernels.second import finish, second_pass, unit

BAND = BLOCK_ROWS  # rows of S at once
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


def _scalars(batch: Batch, t: float) -> tuple[Tensor, Tensor]:
    """What the passes read, and the constant in the exponent."""
    scale, zero = torch.full_like(batch.bound, 2 * t), torch.zeros_like(batch.bound)
    constant = shift(batch, scale)
    return torch.stack([scale / LN2 * batch.to_score, constant, batch.to_score, zero, zero, zero]), constant


def _log_sum(batch: Batch, scalars: Tensor, wide: Tensor, exact: bool) -> Tensor:
    """log2 of the sum over all pairs, those right of the squares counted twice; without ``exact`` before the shift."""
    sums = []
    for _, _, part in _blocks(batch):
        rows, _, _ = first_pass(part, scalars, wide, NO_IDS, columns=False, exact=exact, **OPTIONS)
        rows, times = rows.double(), 1 if part.diagonal else 2
        sums.append(rows * LN2 + math.log(times) if exact else rows * times)
    return torch.cat(sums).logsumexp(0) / LN2 if exact else torch.cat(sums).sum().log2()


def fwd(features: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, log2 of the sum over all pairs, and which kernel was right."""
    N, batch = len(features), Batch(features, features, diagonal=True)
    scalars, constant = _scalars(batch, t)
    log_sum = _log_sum(batch, scalars, torch.zeros(1, dtype=torch.int32, device=batch.device), False)
    wide = (log_sum < LOWEST + 24 + 2 * math.log2(N)).int().reshape(1)  # flushed terms would be seen in fp32
    exact = _log_sum(batch, scalars, wide, True)
    log_sum = torch.where(wide[0] > 0, exact, log_sum + constant)
    return (LN2 * log_sum - math.log(N * (N - 1)) - 2 * t).float(), log_sum, wide


def bwd(dloss: Tensor, features: Tensor, log_sum: Tensor, wide: Tensor, t: float) -> Tensor:
    """Gradient of the features: 2 G X, as S and G are symmetric."""
    batch = Batch(features, features, diagonal=True)
    scalars, constant = _scalars(batch, t)
    steep = 4 * t * dloss.double()
    largest = torch.exp2(2 * t / LN2 * batch.bound - log_sum).clamp(max=0.5)  # share of one pair, which counts twice
    one = unit(batch, (steep.abs() * largest).float())
    whole = log_sum.floor()  # exact in fp32; the rest of the logarithm is in the factor
    factor = steep / one / 2 * torch.exp2(torch.where(wide[0] > 0, whole, constant) - log_sum)
    sums = [x.float().expand(batch.N).contiguous() for x in (whole, whole, factor, factor)]  # rows and columns: halves
    dx = torch.zeros(batch.N, batch.D, device=batch.device)
    for rows, columns, part in _blocks(batch):
        da, db, *_ = second_pass(
            part, scalars, wide, NO_IDS, tuple(x[: max(part.N, part.M)] for x in sums),
            loss=False, need_a=True, need_b=not part.diagonal, **OPTIONS,
        )  # fmt: skip
        dx[rows] += da
        if not part.diagonal:
            dx[columns] += db
    by = one if batch.parts == 1 else one / batch.scale_a
    return finish(dx, by.float(), features.dtype, None, features)


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
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        return _bwd(dloss, *ctx.saved_tensors, ctx.t), None


def uniformity_loss(features: Tensor, *, t: float) -> Tensor:
    if torch.is_grad_enabled() and features.requires_grad:
        return _Uniformity.apply(features, t)
    return _fwd(features, t)[0]
