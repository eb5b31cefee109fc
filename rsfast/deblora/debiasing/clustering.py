"""Clusters of features, which know nothing of classes: in memory, or over rows that stay on disk."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import rsfast
from rsfast.deblora.arrays import Rows, as_rows
from rsfast.deblora.debiasing import density
from rsfast.deblora.debiasing.clusters import Clusters
from rsfast.deblora.debiasing.scaling import Scaling
from rsfast.deblora.debiasing.streaming import Stream
from rsfast.kmeans import size_bounds

Method = Literal["auto", "kmeans", "minibatch", "dbscan", "hdbscan"]
MIN_CLUSTER_SIZE = 15  # of HDBSCAN
METHODS = ("auto", "kmeans", "minibatch", "dbscan", "hdbscan")


class NoClusterError(ValueError):
    """A density method took all rows for noise."""


def cluster_features(
    features: Any,  # (N, D)
    n_clusters: int = 32,
    *,
    method: Method = "auto",
    rho: float | None = 2.0,
    seed: int = 0,
    max_iter: int | None = None,
    batch_size: int = 4096,
    standardize: bool = False,
    n_components: int | None = None,
    eps: float | None = None,
    min_samples: int = 5,
    min_cluster_size: int = MIN_CLUSTER_SIZE,
    max_cluster_size: int | None = None,
    memory_limit: int = 2**30,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Clusters:
    r"""Cluster features as debLoRA does: k-means in which every cluster has at least :math:`N / (K \rho)` rows.

    Args:
        features: As in :func:`as_rows`.
        n_clusters: K. For k-means; density methods find their own number.
        method: ``"kmeans"``: :class:`rsfast.KMeans`, all rows in memory. ``"minibatch"``:
            :class:`rsfast.MiniBatchKMeans`. ``"auto"``: ``"kmeans"``, and ``"minibatch"`` for files larger than
            ``memory_limit``. ``"dbscan"``, ``"hdbscan"``: scikit-learn's, in memory on the CPU; centres are means of
            their clusters, and rows in none are noise, -1.
        rho: The size constraint of k-means, exact in the result; None: none. debLoRA's value is not known; 2 is ours.
        seed: Of all that is drawn.
        max_iter: Iterations of ``"kmeans"`` (None: 300), passes of ``"minibatch"`` (None: 100). Both end earlier.
        batch_size: Rows of a batch of ``"minibatch"``.
        standardize: Cluster features less their mean, over their standard deviation, as the released code does.
            Centres returned are in the space of the features all the same.
        n_components: Density methods see so many principal components of the features (standardised, if asked for).
        eps: Of ``"dbscan"``. None: the median distance to the ``min_samples``-th nearest row.
        min_samples: Of ``"dbscan"``.
        min_cluster_size: Of ``"hdbscan"``.
        max_cluster_size: Of ``"hdbscan"``; None: no limit.
        memory_limit: Bytes. Rows of a larger memory-mapped file or store stay on disk, and ``"minibatch"`` reads
            batches of them: shuffled anew by the seed for every pass, until the smoothed inertia has made no new
            minimum for 10 batches. One more pass gives all N x K costs, and by them the labels of least cost.
        checkpoint: A file for what a run over rows on disk has reached, replaced every ``checkpoint_every`` batches. A
            run that was killed and is started again with it gives the same bits. It stays there after the end, and is
            refused for other data or settings. In memory it is not used: the seed alone gives the same bits.
        checkpoint_every: Batches.
        device: Where to compute; None: where the features are.
        progress: Show bars for rows on disk.

    Returns:
        :class:`Clusters`: tensors on the features' device if those are a tensor, else NumPy.

    Raises:
        FileNotFoundError: The folder of ``checkpoint`` is not there.
        TypeError, ValueError: An argument does not fit, rows are NaN or infinite (named by index), there are fewer rows
            than K, ``rho`` cannot be met (the bound is stated), rows on disk are too large for the method asked for, a
            density method found noise alone (:class:`NoClusterError`), or a checkpoint is damaged or of something else.

    Precision: that of :class:`rsfast.KMeans`; standardised rows are fp32 (fp64 of fp64). Deterministic: yes, bit for
    bit. Source: debLoRA (arXiv 2410.04546), equation 1.

    Example:
        >>> import torch
        >>> from rsfast.deblora import cluster_features
        >>> found = cluster_features(torch.tensor([[0.0], [0.2], [4.0], [4.2], [4.4], [4.6]]), 2, rho=1.0)
        >>> found.counts, found.certified
        (tensor([3, 3]), True)
    """
    rows = as_rows(features)
    settings = dict(
        n_clusters=n_clusters, rho=rho, seed=seed, max_iter=max_iter, batch_size=batch_size, standardize=standardize
    )
    on_disk = rows.on_disk and rows.nbytes > memory_limit
    method = _method(method, rows, on_disk, memory_limit)
    device = torch.device(device or rows.device)
    if method in ("dbscan", "hdbscan"):
        options = dict(n_components=n_components, eps=eps, min_samples=min_samples)
        options |= dict(min_cluster_size=min_cluster_size, max_cluster_size=max_cluster_size)
        density.check((len(rows), rows.dim), **options)
        rows.check()
        return _by_density(rows, method, seed, standardize, **options)
    model = _model(method, rows, **settings)
    if on_disk and batch_size < n_clusters:
        raise ValueError(f"batch_size must be at least n_clusters={n_clusters} for rows on disk, got {batch_size}")
    if not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be an int of at least 1, got {checkpoint_every!r}")
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"checkpoint {path} is to be written to a folder that is not there")
    crc = rows.check(checksum=on_disk and path is not None)
    scaling = Scaling.of(rows, device) if standardize else None
    settings |= dict(max_iter=model.max_iter, rho=None if rho is None else float(rho))
    if on_disk:
        stream = Stream(rows, model, seed, scaling, device)
        data = dict(rows=len(rows), dim=rows.dim, dtype=str(rows.dtype), checksum=crc)
        about = json.dumps(data | settings)
        centers = stream.run(path, checkpoint_every, about, progress)
        labels, certified = stream.labels(centers, rho, progress)
    else:
        x = rows.all(device)
        model.fit(x if scaling is None else scaling.apply(x))
        centers, labels, certified = model.cluster_centers_, model.labels_, getattr(model, "certified_", None)
    centers = centers if scaling is None else scaling.undo(centers)
    return _clusters(rows, centers, labels, method, certified, settings)


def _method(method: str, rows: Rows, on_disk: bool, memory_limit: int) -> str:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "auto":
        return "minibatch" if on_disk else "kmeans"
    if on_disk and method != "minibatch":
        raise ValueError(
            f"method={method!r} needs all rows in memory, {rows.nbytes} bytes, more than memory_limit={memory_limit}: "
            "take method='minibatch', or a higher memory_limit"
        )
    return method


def _model(method: str, rows: Rows, n_clusters, rho, seed, max_iter, batch_size, standardize):
    for name, value in (("n_clusters", n_clusters), ("batch_size", batch_size), ("max_iter", max_iter)):
        if not (value is None and name == "max_iter") and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an int of at least 0, got {seed!r}")
    if n_clusters > len(rows):
        raise ValueError(f"n_clusters must be at most the number of rows, {len(rows)}, got {n_clusters}")
    size_bounds(len(rows), n_clusters, rho=rho)
    if method == "kmeans":
        return rsfast.KMeans(n_clusters, rho=rho, random_state=seed, max_iter=max_iter or 300)
    options = dict(rho=rho, random_state=seed, max_iter=max_iter or 100, batch_size=batch_size)
    return rsfast.MiniBatchKMeans(n_clusters, **options)


def _by_density(rows: Rows, method, seed, standardize, n_components, eps, min_samples, **sizes) -> Clusters:
    device = torch.device("cpu")
    x = rows.all(device)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    seen = Scaling.of(rows, device).apply(x) if standardize else x
    seen = density.reduced(seen.numpy(), n_components, seed)
    settings = dict(seed=seed, standardize=standardize, n_components=n_components)
    if method == "dbscan":
        found, settings["eps"] = density.dbscan(seen, eps, min_samples)
        settings["min_samples"] = min_samples
    else:
        found, settings = density.hdbscan(seen, **sizes), settings | sizes
    labels = torch.from_numpy(found).long()
    if labels.max() < 0:
        raise NoClusterError(f"{method} found no cluster, all {len(rows)} rows are noise, with {settings}")
    sums, counts = rsfast.kmeans_update(x, labels, int(labels.max()) + 1)
    return _clusters(rows, (sums.double() / counts[:, None]).to(sums), labels, method, None, settings)


def _clusters(rows: Rows, centers: Tensor, labels: Tensor, method: str, certified, settings) -> Clusters:
    counts = torch.bincount(labels[labels >= 0], minlength=len(centers))
    return Clusters(*map(rows.back, (centers, labels, counts)), method, certified, settings)
