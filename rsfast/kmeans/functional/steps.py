"""Nearest centres, sums by label, and both in one pass over the data."""

from torch import Tensor

from rsfast._dispatch import Impl, use_fused
from rsfast.kmeans import reference
from rsfast.kmeans.functional import checks
from rsfast.kmeans.functional.checks import Precision, why_not_fused
from rsfast.kmeans.functional.plain import plain
from rsfast.kmeans.reference import Assignment, Step, Update


@plain
def kmeans_assign(
    x: Tensor,  # (N, D)
    centers: Tensor,  # (K, D)
    *,
    subsidies: Tensor | None = None,  # (K,)
    precision: Precision = "exact",
    check_finite: bool = False,
    impl: Impl = "auto",
) -> Assignment:
    r"""Nearest centre of every row: :math:`\ell_i = \arg\min_k \lVert x_i - c_k \rVert^2 - s_k`.

    Args:
        x: fp32, fp16, bf16 (or fp64); rows may be strided.
        centers: Any of the same dtypes, on the same device; taken as the exact numbers that they are.
        subsidies: What makes a centre nearer than it is, in squared distance; None: 0. The dual variables of a size
            constraint are such.
        precision: ``"exact"``: labels are those of a float64 computation, ties go to the lowest index. Scores are
            computed on tensor cores from split operands, and rows whose two best scores differ by less than the error
            that can have are decided in float64. ``"fast"`` leaves that out: a row nearly between two centres may get
            either.
        check_finite: Refuse rows that hold NaN or infinity, by index; costs a pass, and on a GPU a wait. Without it
            such rows get some label.
        impl: ``auto`` takes kernels on a GPU and plain PyTorch elsewhere; ``fused`` insists; ``reference`` is PyTorch.

    Returns:
        ``labels`` (N,) int64 and ``distances`` (N,): squared, to the label's centre, without subsidy; summed from
        differences, so that close rows keep their digits. fp32 (fp64 of fp64 rows).

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Deterministic: yes, bit for bit. Source: Lloyd 1982; the certificate is our own.

    Example:
        >>> import torch, rsfast
        >>> x = torch.tensor([[0.0], [1.0], [5.0]])
        >>> rsfast.kmeans_assign(x, torch.tensor([[0.0], [4.0]])).labels
        tensor([0, 0, 1])
    """
    exact = _checked(x, centers, subsidies, precision, check_finite)
    if use_fused(impl, why_not_fused(x)):
        from rsfast.kmeans import kernels

        return kernels.kmeans_assign(x, centers, subsidies, exact)
    return reference.kmeans_assign(x, centers, subsidies, exact)


@plain
def kmeans_update(
    x: Tensor,  # (N, D)
    labels: Tensor,  # (N,)
    n_clusters: int,
    *,
    weights: Tensor | None = None,  # (N,)
    impl: Impl = "auto",
) -> Update:
    r"""Sums by label: :math:`S_k = \sum_i [\ell_i = k] w_i x_i` and :math:`n_k = \sum_i [\ell_i = k] w_i`.

    New centres are ``sums / counts[:, None]`` where ``counts`` is not zero. Sums of several processes add up.

    Args:
        x: As in :func:`rsfast.kmeans_assign`.
        labels: int64 in -1..n_clusters-1; -1 counts for nothing. On a GPU values outside are not looked for.
        n_clusters: K.
        weights: Of the rows, floating point, finite and not negative (looked at on the CPU only). None: 1.
        impl: As in :func:`rsfast.kmeans_assign`.

    Returns:
        ``sums`` (K, D) fp32 (fp64 of fp64 rows) and ``counts`` (K,) float64.

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Precision: fp32 products and sums. Deterministic: yes, bit for bit: no floating point atomics.

    Example:
        >>> import torch, rsfast
        >>> rsfast.kmeans_update(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]), 2).sums
        tensor([[3.],
                [5.]])
    """
    checks.check_rows(x)
    checks.check_labels(x, labels, n_clusters)
    checks.check_numbers(x, "weights", weights, len(x), least=0)
    if use_fused(impl, why_not_fused(x)):
        from rsfast.kmeans import kernels

        return kernels.kmeans_update(x, labels, n_clusters, weights)
    return reference.kmeans_update(x, labels, n_clusters, weights)


@plain
def kmeans_step(
    x: Tensor,  # (N, D)
    centers: Tensor,  # (K, D)
    *,
    weights: Tensor | None = None,  # (N,)
    subsidies: Tensor | None = None,  # (K,)
    precision: Precision = "exact",
    check_finite: bool = False,
    impl: Impl = "auto",
) -> Step:
    """One step of Lloyd's algorithm: :func:`kmeans_assign`, and :func:`kmeans_update` under its labels.

    Args:
        x: As in :func:`rsfast.kmeans_assign`; read once where the one-pass kernel serves (see ``rsfast info``).
        centers: As in :func:`rsfast.kmeans_assign`.
        weights: As in :func:`rsfast.kmeans_update`.
        subsidies: As in :func:`rsfast.kmeans_assign`.
        precision: As in :func:`rsfast.kmeans_assign`.
        check_finite: As in :func:`rsfast.kmeans_assign`.
        impl: As in :func:`rsfast.kmeans_assign`.

    Returns:
        ``labels`` and ``sums``, ``counts`` as the two functions return them, and ``inertia``, the weighted sum of
        squared distances to the centres given, a float64 number; it is a difference of sums over all rows, with an
        error of about 1e-6 of the rows' squared norms, and infinite where those pass fp32's range (rows longer than
        1.8e19). ``kmeans_assign(...).distances`` has more digits.

    Raises:
        ValueError: A shape, dtype, device or value does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Deterministic: yes, bit for bit.

    Example:
        >>> import torch, rsfast
        >>> step = rsfast.kmeans_step(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.0], [4.0]]))
        >>> step.sums / step.counts[:, None].float(), step.inertia
        (tensor([[0.5000],
                [5.0000]]), tensor(2., dtype=torch.float64))
    """
    exact = _checked(x, centers, subsidies, precision, check_finite)
    checks.check_numbers(x, "weights", weights, len(x), least=0)
    if use_fused(impl, why_not_fused(x)):
        from rsfast.kmeans import kernels

        return kernels.kmeans_step(x, centers, weights, subsidies, exact)
    return reference.kmeans_step(x, centers, weights, subsidies, exact)


@plain
def kmeans_distances(
    x: Tensor,  # (N, D)
    centers: Tensor,  # (K, D)
    *,
    impl: Impl = "auto",
) -> Tensor:  # (N, K)
    """Squared distance of every row to every centre, computed about the centres' mean; never negative.

    Args:
        x: As in :func:`rsfast.kmeans_assign`.
        centers: As in :func:`rsfast.kmeans_assign`.
        impl: As in :func:`rsfast.kmeans_assign`.

    Returns:
        fp32 (fp64 of fp64 rows).

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Precision: about that of fp32 products of the offsets from the mean centre; plain PyTorch takes what cancels in them
    from differences, so that a row on its centre is at distance 0. Deterministic: yes.

    Example:
        >>> import torch, rsfast
        >>> rsfast.kmeans_distances(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[25.,  1.]])
    """
    checks.check_rows(x)
    checks.check_centers(x, centers)
    if use_fused(impl, why_not_fused(x)):
        from rsfast.kmeans import kernels

        return kernels.kmeans_distances(x, centers)
    return reference.kmeans_distances(x, centers)


def _checked(x, centers, subsidies, precision, check_finite) -> bool:
    checks.check_rows(x)
    checks.check_centers(x, centers)
    checks.check_numbers(x, "subsidies", subsidies, len(centers))
    exact = checks.check_precision(precision)
    if check_finite:
        checks.check_finite(x)
        checks.check_finite(centers, "centers")
    return exact
