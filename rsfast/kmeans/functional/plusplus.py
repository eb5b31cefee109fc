"""k-means++: starting centres, each a row drawn with probability proportional to its squared distance."""

from typing import NamedTuple

import torch
from torch import Tensor

from rsfast._dispatch import Impl
from rsfast.kmeans.functional import checks
from rsfast.kmeans.functional.checks import why_not_fused as why_not_fused  # `rsfast info` asks for it here
from rsfast.kmeans.functional.draws import Weighted, child, seed_of, uniforms
from rsfast.kmeans.functional.plain import plain
from rsfast.kmeans.functional.steps import kmeans_assign


class Seeds(NamedTuple):
    """Rows to start from."""

    centers: Tensor  # (K, D), of x's dtype
    indices: Tensor  # (K,) int64


@plain
def kmeans_plusplus(
    x: Tensor,  # (N, D)
    n_clusters: int,
    *,
    weights: Tensor | None = None,  # (N,)
    random_state: int | torch.Generator | None = None,
    candidates: int = 32,
    check_finite: bool = False,
    impl: Impl = "auto",
) -> Seeds:
    r"""Rows drawn one after another with probability :math:`w_i \min_k \lVert x_i - c_k \rVert^2`, in a few passes.

    A pass measures every row against the centres accepted since the last one and draws ``candidates`` rows from the
    distribution this gives. Each is then accepted with the probability by which its distance has shrunk since, so that
    every centre has exactly the distribution it would have had with a pass of its own. A GPU is waited for once a pass.

    Args:
        x: As in :func:`rsfast.kmeans_assign`.
        n_clusters: K, at most N.
        weights: Of the rows, floating point, finite and not negative (looked at on the CPU only). None: 1.
        random_state: Seed. None takes one from PyTorch's global generator. A seed draws alike on CPU and GPU.
        candidates: Rows drawn at once. More need fewer passes; the distribution is the same.
        check_finite: As in :func:`rsfast.kmeans_assign`.
        impl: As in :func:`rsfast.kmeans_assign`.

    Returns:
        ``centers``, rows of ``x``, and ``indices``, their numbers, in the order of drawing. No two centres are equal,
        unless fewer than K different rows have a weight; the rest is filled with the first rows not yet taken.

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Deterministic: yes, bit for bit. Source: Arthur and Vassilvitskii 2007, without greedy trials; the rejection is that
    of Cohen-Addad et al. 2020 with exact distances.

    Example:
        >>> import torch, rsfast
        >>> x = torch.tensor([[0.0], [0.0], [9.0]])
        >>> rsfast.kmeans_plusplus(x, 2, random_state=0).centers.sort(0).values
        tensor([[0.],
                [9.]])
    """
    checks.check_rows(x)
    checks.check_count("candidates", candidates)
    checks.check_count("n_clusters", n_clusters, at_most=len(x))
    checks.check_numbers(x, "weights", weights, len(x), least=0)
    if check_finite:
        checks.check_finite(x)
    seed, device = seed_of(random_state), x.device
    weights = torch.ones(len(x), device=device) if weights is None else weights
    taken = Weighted(weights).rows(uniforms(child(seed, 0), 0, 1, device)).tolist()
    taken, fresh, nearest = [row for row in taken if row < len(x)], 0, None
    while 0 < len(taken) < n_clusters:
        distances = kmeans_assign(x, x[taken[fresh:]], impl=impl).distances.double()
        nearest = distances if nearest is None else torch.minimum(nearest, distances)
        fresh, stream = len(taken), child(seed, len(taken))
        drawn = Weighted(weights * nearest).rows(uniforms(stream, 0, candidates, device))
        # what decides is small and decided on the CPU
        rows, near, chances = torch.stack(
            [drawn.double(), nearest[drawn.clamp(max=len(x) - 1)], uniforms(stream, 1, candidates, device)]
        ).cpu()
        if rows[0] == len(x):  # no row is away from a centre
            break
        between, now = _between(x[drawn]).cpu(), near.clone()
        for j in range(candidates):
            if chances[j] * near[j] < now[j] and len(taken) < n_clusters:
                taken.append(int(rows[j]))
                now = torch.minimum(now, between[j])
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[taken] = False
    indices = torch.cat([torch.tensor(taken, dtype=torch.long), rest.nonzero()[: n_clusters - len(taken), 0]]).to(
        device
    )
    return Seeds(x[indices], indices)


def _between(rows: Tensor) -> Tensor:
    """Squared distances from differences: 0 between equal rows."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.stack([(rows - row).square().sum(1) for row in rows]).double()
