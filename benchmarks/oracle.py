"""The in-batch losses in chunks of rows, for batches whose N x N reference fits no memory: O(rows x N) of it.

Each loss is written from its definition: what a chunk of rows adds to every row and column, recomputed in the backward,
and the loss of all of that. The gradients are autograd's, so nothing here shares a formula with the kernels. In float64
this is what results are judged by, in the features' dtype how wrong plain PyTorch is, and a baseline of its own.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 1024  # of a chunk: 0.5 GB for each float64 matrix at N = 65,536


class Scores:
    """S = I T^T of a chunk at a time: products in ``kind``, everything after in fp32 or float64.

    Args:
        kind: Dtype of the products.
        rows: Of a chunk.
        squares: For each scalar parameter, sum of squares of the terms of its gradient; filled by the backward.
    """

    def __init__(self, kind: torch.dtype, rows: int = ROWS, squares: dict[str, Tensor] | None = None):
        self.kind, self.rows, self.squares = kind, rows, squares
        self.wide = torch.promote_types(kind, torch.float32)

    def leaves(self, tensors) -> list[Tensor]:
        """Copies to take gradients of; wide, so that the chunks' gradients are added without rounding."""
        return [t.detach().to(self.wide).requires_grad_() for t in tensors]

    def product(self, some: Tensor, others: Tensor) -> Tensor:
        return (some.to(self.kind) @ others.to(self.kind).mT).to(self.wide)

    def own(self, image: Tensor, text: Tensor) -> Tensor:
        """S_ii, (N,)."""
        blocks = zip(image.split(self.rows), text.split(self.rows), strict=True)
        return torch.cat([self.product(*block).diagonal() for block in blocks])

    def chunks(self, image: Tensor, text: Tensor, partial) -> list:
        """``partial(S of some rows, their numbers)`` for all rows in turn, computed again in the backward."""

        def run(some, numbers):
            return partial(self.product(some, text), numbers)

        numbers = torch.arange(len(image), device=image.device)
        return [
            checkpoint(run, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(image.split(self.rows), numbers.split(self.rows), strict=True)
        ]

    def affine(self, scores: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        return _Affine.apply(scores, scale, bias, self.squares)


class _Affine(torch.autograd.Function):
    """scale S + bias; the backward also measures how large the terms are that it sums for either."""

    @staticmethod
    def forward(ctx, scores, scale, bias, squares):
        ctx.save_for_backward(scores, scale)
        ctx.squares, ctx.biased = squares, bias is not None
        return scale * scores + (0 if bias is None else bias)

    @staticmethod
    def backward(ctx, dz):
        scores, scale = ctx.saved_tensors
        terms = dz * scores
        if ctx.squares is not None:
            for name, each in (("logit_scale", terms), *[("logit_bias", dz)] * ctx.biased):
                ctx.squares[name] = ctx.squares.get(name, 0) + each.double().square().sum()
        return scale * dz, terms.sum(), dz.sum() if ctx.biased else None, None


def contrastive(s: Scores, image, text, logit_scale, *, image_ids=None) -> Tensor:
    ids = torch.arange(len(image), device=image.device) if image_ids is None else image_ids

    def partial(scores, numbers):
        logits = s.affine(scores, logit_scale)
        positive = ids[numbers, None] == ids
        shared = torch.where(positive, logits, 0)
        rows = logits.logsumexp(1) - shared.sum(1) / positive.sum(1)
        return rows, logits.logsumexp(0), shared.sum(0), positive.sum(0)

    rows, columns, shared, count = zip(*s.chunks(image, text, partial), strict=True)
    columns = torch.stack(columns).logsumexp(0) - sum(shared) / sum(count)
    return (torch.cat(rows).mean() + columns.mean()) / 2


def adaptive_triplet(s: Scores, image, text, *, margin=0.2, gamma=2.0) -> Tensor:
    return _violations(s, image, text, margin, lambda cost: (-torch.expm1(-cost)) ** gamma * cost) / 2


def triplet(s: Scores, image, text, *, margin=0.2, negatives="all") -> Tensor:
    if negatives == "all":
        return _violations(s, image, text, margin, lambda cost: cost)
    own = s.own(image, text)

    def partial(scores, numbers):
        others = _others(scores, numbers)
        return others.max(1).values, others.max(0).values

    rows, columns = zip(*s.chunks(image, text, partial), strict=True)
    hardest = torch.cat(rows), torch.stack(columns).max(0).values
    return sum((margin + h - own).relu().sum() for h in hardest)


def _others(scores: Tensor, numbers: Tensor) -> Tensor:
    """Without the pairs i = j."""
    return scores.masked_fill(numbers[:, None] == torch.arange(scores.shape[1], device=scores.device), -torch.inf)


def _violations(s: Scores, image, text, margin: float, weigh) -> Tensor:
    own = s.own(image, text)

    def partial(scores, numbers):
        others = _others(scores, numbers)
        return sum(weigh((margin + others - d).relu()).sum() for d in (own[numbers, None], own))

    return sum(s.chunks(image, text, partial))


def harma(s: Scores, image, text, logit_scale, *, image_ids=None, margin=0.2, gamma=2.0) -> tuple[Tensor, Tensor]:
    return (
        contrastive(s, image, text, logit_scale, image_ids=image_ids),
        adaptive_triplet(s, image, text, margin=margin, gamma=gamma),
    )


def sigmoid(s: Scores, image, text, logit_scale, logit_bias=None) -> Tensor:
    def partial(scores, numbers):
        logits = s.affine(scores, logit_scale, logit_bias)
        same = numbers[:, None] == torch.arange(len(text), device=text.device)
        return -F.logsigmoid(torch.where(same, logits, -logits)).sum()

    return sum(s.chunks(image, text, partial)) / len(image)


def uniformity(s: Scores, features, *, t=2.0) -> Tensor:
    n = len(features)

    def partial(scores, numbers):
        return (2 * t * (_others(scores, numbers) - 1)).logsumexp((0, 1))

    return torch.stack(s.chunks(features, features, partial)).logsumexp(0) - math.log(n * (n - 1))


def results(loss, tensors, kwargs: dict, dy, kind: torch.dtype, rows: int = ROWS) -> tuple[list[Tensor], dict]:
    """Losses and every gradient of one of the functions above, and for each scalar the norm of its gradient's terms.

    Args:
        loss: One of the functions above.
        tensors: Its tensors.
        kwargs: Its options.
        dy: Gradient of each loss.
        kind: Dtype of the products. Gradients come in the tensors' own dtype where it is that, else wide.
        rows: Of a chunk.
    """
    squares = {}
    s = Scores(kind, rows, squares)
    leaves = s.leaves(tensors)
    found = loss(s, *leaves, **kwargs)
    found = found if isinstance(found, tuple) else (found,)
    grads = torch.autograd.grad(found, leaves, [g.to(s.wide) for g in dy])
    grads = [g.to(t.dtype) if t.dtype == kind else g for g, t in zip(grads, tensors, strict=True)]
    return [*(loss.detach() for loss in found), *grads], {name: total.sqrt().item() for name, total in squares.items()}


def sampled_contrastive(image, text, logit_scale, some: Tensor, kinds, rows: int = ROWS) -> list[list[Tensor]]:
    """The contrastive loss, and its gradients of some rows only, for batches too large for every gradient.

    One pass over S, its products accumulated in fp32, gives both softmaxes; the gradient of row i is
    G_i T with G_ij = scale / 2N (e^(z_ij - R_i) + e^(z_ij - C_j) - 2 [i = j]).

    Args:
        image: (N, D).
        text: (N, D).
        logit_scale: Multiplies S.
        some: Rows to take gradients of, (K,).
        kinds: Dtypes of the gradients' products; fp32 is the one to judge by.
        rows: Of a chunk.

    Returns:
        For each of ``kinds``: loss, image gradients (K, D), text gradients (K, D).
    """
    n, scale = len(image), logit_scale.float()
    exact = image.is_cuda and image.dtype != torch.float32  # products of 16 bits are exact, only their sum is rounded
    of_rows, of_columns, own = [], torch.full((n,), -torch.inf, device=image.device, dtype=torch.float64), []
    with torch.no_grad():
        for start, chunk in zip(range(0, n, rows), image.split(rows), strict=True):
            logits = torch.mm(chunk, text.mT, out_dtype=torch.float32) if exact else chunk.float() @ text.float().mT
            logits *= scale
            own.append(logits[:, start : start + rows].diagonal().clone())  # a view would keep all of the logits
            of_rows.append(logits.logsumexp(1))
            of_columns = torch.logaddexp(of_columns, logits.logsumexp(0).double())
        of_rows, own = torch.cat(of_rows), torch.cat(own)
        loss = ((of_rows.double() + of_columns) / 2 - own.double()).mean()

        def gradient(queries, keys, first, second, kind):
            z = scale * (queries[some].to(kind) @ keys.to(kind).mT).float()
            g = (z - first[some, None]).exp() + (z - second).exp()
            g[torch.arange(len(some), device=some.device), some] -= 2
            return (scale / (2 * n) * g).to(kind) @ keys.to(kind)

        of_columns = of_columns.float()
        return [
            [loss, gradient(image, text, of_rows, of_columns, kind), gradient(text, image, of_columns, of_rows, kind)]
            for kind in kinds
        ]
