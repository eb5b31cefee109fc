"""k-means as others compute it: compositions of PyTorch's operations, and libraries, each at one version.

An arm is a function that is given rows, centres and what else its task needs, does what may be done once, and returns
what is timed: a function without arguments that returns a :class:`Found`. None of the libraries is a dependency of
rsfast; `pip install rsfast[bench]` brings them, and what is missing is skipped with the reason.
"""

import contextlib
import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

AT_ONCE = 2**30  # scores that compositions hold at a time


class Found(NamedTuple):
    """What an arm returns; None where it has no such thing."""

    labels: Tensor | None = None
    centers: Tensor | None = None
    subsidies: Tensor | None = None


class Library(NamedTuple):
    """A package and the version that a row is for."""

    package: str
    version: str
    module: str
    needs_gpu: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def why_not(self, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, or None."""
        try:
            found = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package} {self.version} is not installed"
        if found != self.version:
            return f"{self.package} {found} is installed, and the row is for {self.version}"
        if dtype not in self.dtypes:
            return f"{self.package} does not take {dtype}"
        if self.needs_gpu and not torch.cuda.is_available():
            return f"{self.package} needs a GPU"
        try:
            self.load()
        except Exception as error:  # whatever ails another library must not end the run
            return f"{self.package} cannot be imported: {error}"
        return None

    def load(self):
        return importlib.import_module(self.module)


SINGLE, HALF = torch.float32, torch.float16
FLASH = Library("flash-kmeans", "0.3.1", "flash_kmeans.kmeans_triton_impl")
FLASHLIB = Library("flashlib", "0.4.0", "flashlib")
FAST_PYTORCH = Library("fast-pytorch-kmeans", "0.2.2", "fast_pytorch_kmeans", False, (SINGLE, HALF))
FASTKMEANS = Library("fastkmeans", "0.5.0", "fastkmeans", True, (SINGLE,))
SKLEARN = Library("scikit-learn", "1.9.1", "sklearn.cluster", False, (SINGLE,))
FAISS = Library("faiss-gpu", "1.14.3", "faiss", True, (SINGLE,))
CONSTRAINED = Library("k-means-constrained", "0.9.1", "k_means_constrained.k_means_constrained_", False, (SINGLE,))


@contextlib.contextmanager
def tf32(on: bool):
    """Products of fp32 numbers on tensor cores, or not, for what is captured or run inside."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 from operands as they are."""
    if a.dtype == SINGLE or a.dtype == torch.float64:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=SINGLE)
    return torch.mm(a.float(), b.float())


def nearest(x: Tensor, centers: Tensor) -> Tensor:
    """Labels by one product with the centres in x's dtype, as many rows at a time as fit."""
    norms = centers.to(torch.promote_types(x.dtype, SINGLE)).square().sum(1)
    doubled = (-2 * centers).to(x.dtype).T
    parts = x.split(max(AT_ONCE // len(centers), 1))
    labels = [product(part, doubled).add_(norms).argmin(1) for part in parts]
    return labels[0] if len(labels) == 1 else torch.cat(labels)


def summed(x: Tensor, labels: Tensor, k: int, one_hot: bool) -> tuple[Tensor, Tensor]:
    """Sums and counts by label: one product with a one-hot matrix, or ``index_add_``."""
    kind = torch.promote_types(x.dtype, SINGLE)
    counts = torch.zeros(k, dtype=kind, device=x.device).index_add_(0, labels, torch.ones_like(labels, dtype=kind))
    sums = torch.zeros(k, x.shape[1], dtype=kind, device=x.device)
    if not one_hot:
        return sums.index_add_(0, labels, x.to(kind)), counts
    classes, rows = torch.arange(k, device=x.device), max(AT_ONCE // k, 1)
    for part, mine in zip(x.split(rows), labels.split(rows), strict=True):
        sums += product((mine[:, None] == classes).to(x.dtype).T, part)
    return sums, counts


def means(sums: Tensor, counts: Tensor, centers: Tensor) -> Tensor:
    """New centres; an empty cluster keeps its own."""
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers.to(sums))


def lloyd_step(x: Tensor, centers: Tensor, one_hot: bool) -> Found:
    labels = nearest(x, centers)
    return Found(labels, means(*summed(x, labels, len(centers), one_hot), centers))


def composed(x: Tensor, centers: Tensor, *, one_hot: bool, fast: bool = False, prepare=lambda f: f) -> Callable:
    """A step by PyTorch's own operations; ``fast``: TF32; ``prepare`` may compile it."""
    step = prepare(functools.partial(lloyd_step, one_hot=one_hot))

    def run():
        with tf32(fast):
            return step(x, centers)

    return run


def composed_fit(x: Tensor, centers: Tensor, iterations: int, *, fast: bool = False) -> Callable:
    def run():
        found = Found(None, centers)
        with tf32(fast):
            for _ in range(iterations):
                found = lloyd_step(x, found.centers, True)
            return Found(nearest(x, found.centers), found.centers)

    return run


def composed_minibatch(x: Tensor, centers: Tensor, batches: Tensor) -> Callable:
    """Sculley's update with true counts; ``batches`` (steps, B) are drawn before the clock starts."""

    def run():
        kind = torch.promote_types(x.dtype, SINGLE)
        now, seen = centers.to(kind), torch.zeros(len(centers), dtype=kind, device=x.device)
        for rows in batches:
            batch = x[rows]
            sums, counts = summed(batch, nearest(batch, now), len(centers), True)
            seen, weight = seen + counts, seen[:, None]
            now = torch.where(counts[:, None] > 0, (now * weight + sums) / seen.clamp(min=1)[:, None], now)
        return Found(None, now)

    return run


@triton.jit
def _runs_kernel(
    x_ptr, order_ptr, labels_ptr, sums_ptr, counts_ptr, n, width, stride_x, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows in the order of their labels, a slice of columns a program; an atomic add for each run of equal labels."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside, within = rows < n, columns < width
    label = tl.load(labels_ptr + rows, mask=inside, other=-1)
    order = tl.load(order_ptr + rows, mask=inside, other=0)
    x = tl.load(x_ptr + order[:, None] * stride_x + columns, mask=inside[:, None] & within, other=0.0).to(tl.float32)
    first = tl.min(tl.where(inside, label, 2147483647), 0)
    for k in range(first, tl.max(label, 0) + 1):
        mine = label == k
        count = tl.sum(mine.to(tl.int32), 0)
        if count > 0:
            total = tl.sum(tl.where(mine[:, None], x, 0.0), 0)
            tl.atomic_add(sums_ptr + k * width + columns, total, mask=within)
            if tl.program_id(1) == 0:
                tl.atomic_add(counts_ptr + k, count)


def sorted_update(x: Tensor, cluster_ids: Tensor, old_centroids: Tensor) -> Tensor:
    """What flash-kmeans' sorted update computes, (1, N, D) by (1, N) to (1, K, D), with the columns in slices.

    Its own holds all columns of 256 rows in registers, which spills from D = 512 on. This one is ours, so that ours is
    not compared with that defect.
    """
    (_, n, width), k = x.shape, old_centroids.shape[1]
    labels, order = cluster_ids[0].to(torch.int32).sort()
    sums = torch.zeros(k, width, device=x.device)
    counts = torch.zeros(k, dtype=torch.int32, device=x.device)
    grid = (triton.cdiv(n, 256), triton.cdiv(width, 128))
    _runs_kernel[grid](x[0], order, labels, sums, counts, n, width, x.stride(1), BLOCK_N=256, BLOCK_D=128, num_warps=8)
    return means(sums, counts.float(), old_centroids[0]).to(x.dtype)[None]


@contextlib.contextmanager
def _update_of(module, update: Callable | None):
    """flash-kmeans with another update, while this lasts."""
    name = "triton_centroid_update_sorted_euclid"
    its_own = getattr(module, name)
    setattr(module, name, update or its_own)
    try:
        yield
    finally:
        setattr(module, name, its_own)


def flash_step(x: Tensor, centers: Tensor, *, patched: bool = False) -> Callable:
    module, rows, start = FLASH.load(), x[None], centers.to(x.dtype)[None]
    norms = rows.float().square().sum(-1)  # once a fit there, so not timed

    def run():
        with _update_of(module, sorted_update if patched else None):
            after, _, labels = module._euclid_iter(rows, norms, start)
        return Found(labels[0], after[0])

    return run


def flash_fit(x: Tensor, centers: Tensor, iterations: int, *, patched: bool = False) -> Callable:
    module, start = FLASH.load(), centers.to(x.dtype)[None]

    def run():
        with _update_of(module, sorted_update if patched else None):
            labels, after, _ = module.batch_kmeans_Euclid(x[None], len(centers), iterations, init_centroids=start)
        return Found(labels[0], after[0])

    return run


def flash_assign(x: Tensor, centers: Tensor) -> Callable:
    module, rows, start = FLASH.load(), x[None], centers.to(x.dtype)[None]
    norms = rows.float().square().sum(-1)
    return lambda: Found(module.euclid_assign_triton(rows, start, norms)[0])


def flashlib_fit(x: Tensor, centers: Tensor, iterations: int) -> Callable:
    fit, start = FLASHLIB.load().flash_kmeans, centers.to(x.dtype)[None]

    def run():
        # its buffers take turns, and the given centres are one of them
        labels, after, *_ = fit(x[None], len(centers), max_iters=iterations, init_centroids=start.clone())
        return Found(labels.view(-1), after.view(centers.shape))

    return run


def flashlib_step(x: Tensor, centers: Tensor) -> Callable:
    return flashlib_fit(x, centers, 1)


def fast_pytorch_fit(x: Tensor, centers: Tensor, iterations: int) -> Callable:
    fit, start = FAST_PYTORCH.load().KMeans, centers.to(x.dtype)

    def run():
        one = fit(len(centers), max_iter=iterations, tol=-1)
        labels = one.fit_predict(x, centroids=start.clone())
        return Found(labels, one.centroids)

    return run


def fast_pytorch_step(x: Tensor, centers: Tensor) -> Callable:
    return fast_pytorch_fit(x, centers, 1)


def fast_pytorch_minibatch(x: Tensor, centers: Tensor, batches: Tensor) -> Callable:
    fit, start = FAST_PYTORCH.load().KMeans, centers.to(x.dtype)

    def run():
        one = fit(len(centers), max_iter=len(batches), tol=-1, minibatch=batches.shape[1])
        one.fit_predict(x, centroids=start.clone())
        return Found(None, one.centroids)

    return run


def fastkmeans_fit(x: Tensor, centers: Tensor, iterations: int) -> Callable:
    """From its own random start, in fp16, from memory of the host: it knows no other way."""
    fit, rows = FASTKMEANS.load().FastKMeans, x.cpu().numpy()

    def run():
        one = fit(x.shape[1], len(centers), niter=iterations, tol=-1).fit(rows)
        return Found(None, torch.from_numpy(one.centroids))

    return run


def faiss_fit(x: Tensor, centers: Tensor, iterations: int) -> Callable:
    """From memory of the host, where it also computes the centres; by default it would train on 256 rows a centre."""
    kmeans, rows, start = FAISS.load().Kmeans, x.cpu().numpy(), centers.float().cpu().numpy()
    every_row = dict(min_points_per_centroid=1, max_points_per_centroid=len(x))

    def run():
        one = kmeans(x.shape[1], len(centers), niter=iterations, gpu=True, **every_row)
        one.train(rows, init_centroids=start)
        return Found(None, torch.from_numpy(one.centroids))

    return run


def sklearn_fit(x: Tensor, centers: Tensor, iterations: int) -> Callable:
    fit, rows, start = SKLEARN.load().KMeans, x.cpu().numpy(), centers.float().cpu().numpy()

    def run():
        one = fit(len(centers), init=start, n_init=1, max_iter=iterations, tol=0).fit(rows)
        return Found(torch.from_numpy(one.labels_).long(), torch.from_numpy(one.cluster_centers_))

    return run


def sklearn_minibatch(x: Tensor, centers: Tensor, batches: Tensor) -> Callable:
    fit, start = SKLEARN.load().MiniBatchKMeans, centers.float().cpu().numpy()
    parts = [x[rows].cpu().numpy() for rows in batches]

    def run():
        one = fit(len(centers), init=start, n_init=1, batch_size=batches.shape[1], reassignment_ratio=0)
        for part in parts:
            one.partial_fit(part)
        return Found(None, torch.from_numpy(one.cluster_centers_))

    return run


def constrained(x: Tensor, centers: Tensor, least: int) -> Callable:
    """The step of k-means-constrained, on the CPU; it minimises distances that are not squared, in thousandths."""
    import numpy as np

    label, rows, start = (
        CONSTRAINED.load()._labels_constrained,
        x.cpu().double().numpy(),
        centers.cpu().double().numpy(),
    )

    def run():
        labels, _ = label(rows, start, least, len(rows), np.empty(len(rows)))
        return Found(torch.from_numpy(labels).long())

    return run
