"""What is timed of k-means: steps, whole fits, mini-batches, starting centres and the size constraint."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import rsfast
import rsfast.kmeans
from benchmarks import kmeans_peers as peers
from benchmarks import kmeans_truth as truth
from benchmarks.arms import DEVICE, compiled, slow_last
from benchmarks.kmeans_peers import Found, Library
from benchmarks.measure import Call, l2_bytes, sets_of_inputs
from rsfast.kmeans import functional
from tests.case import BF16, FP32

MILLION = 1_000_000
STEPS, ITERATIONS = 200, 100  # of mini-batches; of a fit, if it goes on that long
FEW = None if DEVICE == "cuda" else 3  # of either where nothing is timed
Shape = tuple[int, int, int]  # N, D, K; the rows of one batch in N's place where they come in batches


class Setting(NamedTuple):
    """What every arm of a row is given."""

    x: Tensor
    centers: Tensor  # fp32, to start from
    more: tuple = ()  # what else the task needs


@dataclass(frozen=True)
class Row:
    """A task at its benchmark shapes, the first ``main`` of which are timed before anything else."""

    name: str
    shapes: tuple[Shape, ...]
    arms: dict[str, Callable]  # (x, centers, *more) -> what is timed
    judge: Callable  # (setting, what an arm found, ours or not) -> errors
    more: Callable = field(default=lambda x, shape: ())  # what else an arm is given
    dtypes: tuple[torch.dtype, ...] = (BF16, FP32)
    main: int = 0
    rho: float = 1.0
    graph: bool = True  # whether ours never waits for the device


def ours_step(x: Tensor, centers: Tensor, **options) -> Callable:
    def run():
        step = rsfast.kmeans_step(x, centers, **options)
        return Found(step.labels, peers.means(step.sums, step.counts.to(step.sums), centers))

    return run


def ours_assign(x: Tensor, centers: Tensor, **options) -> Callable:
    return lambda: Found(rsfast.kmeans_assign(x, centers, **options).labels)


def ours_fit(x: Tensor, centers: Tensor, iterations: int, **options) -> Callable:
    model = rsfast.KMeans(len(centers), init=centers, n_init=1, max_iter=iterations, tol=0, **options)

    def run():
        found = model.fit(x)
        return Found(found.labels_, found.cluster_centers_)

    return run


def ours_minibatch(x: Tensor, centers: Tensor, batches: Tensor, **options) -> Callable:
    """Draws its own batches, inside the clock."""
    options |= dict(batch_size=batches.shape[1], max_steps=len(batches), max_no_improvement=None, reassignment_ratio=0)
    return lambda: Found(None, functional.minibatch(x, centers, **options).centers)


def ours_plusplus(x: Tensor, centers: Tensor) -> Callable:
    return lambda: Found(functional.kmeans_plusplus(x, len(centers), random_state=0).indices)


def sequential_plusplus(x: Tensor, centers: Tensor) -> Callable:
    """A pass for every centre, by our own kernel."""

    def run():
        chosen, near = torch.zeros(1, dtype=torch.long, device=x.device), None
        for _ in range(len(centers) - 1):
            distances = rsfast.kmeans_assign(x, x[chosen[-1:]]).distances
            near = distances if near is None else torch.minimum(near, distances)
            uniform = torch.rand((), dtype=torch.float64, device=x.device)
            until = near.double().cumsum(0)
            chosen = torch.cat([chosen, torch.searchsorted(until, uniform * until[-1:]).clamp(max=len(x) - 1)])
        return Found(chosen)

    return run


def ours_constrained(x: Tensor, centers: Tensor, least: int, **options) -> Callable:
    def run():
        found = rsfast.kmeans.constrained_assign(rsfast.kmeans_distances(x, centers), least, **options)
        return Found(found.labels, None, found.subsidies)

    return run


def _batches(x: Tensor, shape: Shape) -> tuple[Tensor]:
    """Row numbers of every batch, drawn beforehand for those who do not draw."""
    generator = torch.Generator().manual_seed(2)
    return (torch.randint(len(x), (FEW or STEPS, shape[0]), generator=generator).to(x.device),)


_tuned = functools.partial(compiled, mode="max-autotune-no-cudagraphs")
STEP = {
    "auto": ours_step,
    "torch-one-hot": functools.partial(peers.composed, one_hot=True),
    "flash-kmeans-patched": functools.partial(peers.flash_step, patched=True),
    "flashlib": peers.flashlib_step,
    "torch-one-hot-tf32": functools.partial(peers.composed, one_hot=True, fast=True),
    "flash-kmeans": peers.flash_step,
    "torch-index-add": functools.partial(peers.composed, one_hot=False),
    "torch-one-hot-compiled": functools.partial(peers.composed, one_hot=True, prepare=compiled),
    "torch-one-hot-tuned": functools.partial(peers.composed, one_hot=True, prepare=_tuned),
    "fast": functools.partial(ours_step, precision="fast"),
    "reference": functools.partial(ours_step, impl="reference"),
    "fast-pytorch-kmeans": peers.fast_pytorch_step,
}
ASSIGN = {
    "auto": ours_assign,
    "flash-kmeans": peers.flash_assign,
    "torch": lambda x, centers: lambda: Found(peers.nearest(x, centers)),
    "fast": functools.partial(ours_assign, precision="fast"),
}
FIT = {
    "auto": ours_fit,
    "flashlib": peers.flashlib_fit,
    "torch-one-hot": peers.composed_fit,
    "flash-kmeans-patched": functools.partial(peers.flash_fit, patched=True),
    "torch-one-hot-tf32": functools.partial(peers.composed_fit, fast=True),
    "flash-kmeans": peers.flash_fit,
    "fast-pytorch-kmeans": peers.fast_pytorch_fit,
    "fastkmeans": peers.fastkmeans_fit,
    "faiss": peers.faiss_fit,
    "sklearn": peers.sklearn_fit,
    "fast": functools.partial(ours_fit, precision="fast"),
}
MINIBATCH = {
    "auto": ours_minibatch,
    "torch": peers.composed_minibatch,
    "fast-pytorch-kmeans": peers.fast_pytorch_minibatch,
    "sklearn": peers.sklearn_minibatch,
}
CONSTRAINED = {
    "auto": ours_constrained,
    "reference": functools.partial(ours_constrained, impl="reference"),
    "k-means-constrained": peers.constrained,
}


def _constrained(rho: float, main: int = 0) -> Row:
    shapes = ((MILLION, 1280, 32), (50_000, 1280, 32), (100_000, 1280, 32), (7_000, 1280, 32))
    return Row(
        f"kmeans_constrained_rho{rho:g}", shapes, CONSTRAINED, truth.of_constrained,
        more=lambda x, shape: (int(len(x) / (shape[2] * rho)),), dtypes=(FP32,), main=main, rho=rho, graph=False,
    )  # fmt: skip


SQUARE = (
    (MILLION, 1280, 32), (MILLION, 1024, 32), (MILLION, 1024, 64), (MILLION, 512, 64), (100_000, 1024, 32),
    (4 * MILLION, 1280, 32),
)  # fmt: skip
ROWS = {
    row.name: row
    for row in (
        Row("kmeans_step", SQUARE, STEP, truth.of_step, main=3),
        Row(
            "kmeans_fit", ((7_000, 1280, 32), (98_304, 1280, 32)), FIT, truth.of_fit,
            more=lambda x, shape: (FEW or ITERATIONS,), main=1, graph=False,
        ),
        Row(
            "kmeans_minibatch", ((4096, 1280, 32), (1024, 1280, 32), (16_384, 1280, 32)), MINIBATCH,
            truth.of_minibatch, more=_batches, main=1, graph=False,
        ),
        _constrained(1.25, main=2),
        Row(
            "kmeans_plusplus", ((MILLION, 1024, 64), (MILLION, 1024, 32)),
            {"auto": ours_plusplus, "sequential": sequential_plusplus}, truth.of_plusplus, dtypes=(BF16,), main=1,
            graph=False,
        ),
        Row("kmeans_step_many", ((MILLION, 1024, 1024),), STEP, truth.of_step, dtypes=(BF16,), main=1),
        Row(
            "kmeans_assign", ((MILLION, 1024, 65_536), (262_144, 1024, 65_536)), ASSIGN, truth.of_assign,
            dtypes=(BF16,), main=1,
        ),
        Row("kmeans_step_wide", ((7_000, 81_920, 32),), STEP, truth.of_step),
        _constrained(2),
        _constrained(4),
    )
}  # fmt: skip

OWN = ("auto", "fast", "reference")
LIBRARIES: dict[str, Library] = {
    "flash-kmeans": peers.FLASH, "flash-kmeans-patched": peers.FLASH, "flashlib": peers.FLASHLIB,
    "fast-pytorch-kmeans": peers.FAST_PYTORCH, "fastkmeans": peers.FASTKMEANS, "sklearn": peers.SKLEARN,
    "k-means-constrained": peers.CONSTRAINED, "faiss": peers.FAISS,
}  # fmt: skip
WAITING = (
    "fast-pytorch-kmeans",
    "fastkmeans",
    "faiss",
    "sklearn",
    "k-means-constrained",
)  # for the device, or for the CPU
ON_CPU = {"sklearn": 100_000, "k-means-constrained": 50_000, "fastkmeans": 100_000}  # rows that it is asked for at most


class Target(NamedTuple):
    """What was aimed at before anything was measured; nothing of it is a result."""

    name: str
    op: str
    shape: Shape
    dtypes: tuple[torch.dtype, ...]
    seconds: float | None = None  # ours, at most
    times: dict[str, float] = {}  # theirs over ours, at least; "torch": every composition without TF32


TARGETS = (
    Target("T1", "kmeans_step", (MILLION, 1024, 32), (BF16,), 0.58e-3,
           {"torch": 2.0, "flash-kmeans-patched": 2.2, "flash-kmeans": 4.0, "flashlib": 4.0}),
    Target("T2", "kmeans_step", (MILLION, 1280, 32), (FP32,), 1.45e-3, {"torch": 2.5, "torch-one-hot-tf32": 1.8}),
    Target("T3", "kmeans_step", (MILLION, 1024, 64), (BF16,), 0.65e-3),
    Target("T4", "kmeans_fit", (7_000, 1280, 32), (BF16, FP32), 1.5e-3, {"flashlib": 15.0}),  # of 100 iterations
    Target("T5", "kmeans_minibatch", (4096, 1280, 32), (BF16, FP32), 2e-3, {"torch": 3.0, "fast-pytorch-kmeans": 12.0}),
    Target("T6", "kmeans_plusplus", (MILLION, 1024, 64), (BF16,), 2.5e-3, {"sequential": 10.0}),
    Target("T7", "kmeans_constrained_rho1.25", (MILLION, 1280, 32), (FP32,), 15e-3),
    Target("T7", "kmeans_constrained_rho1.25", (50_000, 1280, 32), (FP32,), None, {"k-means-constrained": 30.0}),
    Target("T8", "kmeans_step_many", (MILLION, 1024, 1024), (BF16,), 4e-3, {"flash-kmeans-patched": 1.4}),
    Target("T9", "kmeans_assign", (MILLION, 1024, 65_536), (BF16,), 225e-3, {"flash-kmeans": 1.2}),
)  # fmt: skip


def aims(op: str, shape: Shape, dtype: torch.dtype, impl: str) -> dict:
    """``target_seconds`` of ours, ``target`` (times ours) of others, as far as there are any, and whose they are."""
    for target in TARGETS:
        if (target.op, target.shape) != (op, shape) or dtype not in target.dtypes:
            continue
        if impl == "auto":
            return {} if target.seconds is None else {"target_seconds": target.seconds, "target_name": target.name}
        composed = impl.startswith("torch") and not impl.endswith("tf32")
        times = target.times.get(impl, target.times.get("torch") if composed else None)
        return {} if times is None else {"target": times, "target_name": target.name}
    return {}


def implementations(row: Row, shape: Shape, dtype: torch.dtype) -> list[str]:
    """Who is timed, in this order."""
    left_out = {impl for impl, most in ON_CPU.items() if shape[0] > most}
    if dtype != FP32:
        left_out |= {impl for impl in row.arms if impl.endswith("tf32")}
    if DEVICE != "cuda":
        left_out |= {impl for impl in row.arms if impl.endswith(("tf32", "tuned"))}
    return [impl for impl in row.arms if impl not in left_out]


def grid(main: bool) -> list[tuple]:
    """(row, shape, dtype, implementation): what has targets, or all the rest; what takes long, or compiles, last."""
    rows = []
    for row in ROWS.values():
        for shape in _shapes(row)[: row.main] if main else _shapes(row)[row.main :]:
            for dtype in row.dtypes if DEVICE == "cuda" else (FP32,):
                rows += [(row.name, shape, dtype, impl) for impl in implementations(row, shape, dtype)]
    return slow_last(sorted(rows, key=lambda row: (row[3].endswith("-compiled"), row[3] in WAITING)))


def _shapes(row: Row) -> tuple[Shape, ...]:
    """On a CPU a single small one, among the main ones of a row that has such."""
    return row.shapes if DEVICE == "cuda" else ((96, 32, 5),)


def why_not(dtype: torch.dtype, impl: str) -> str | None:
    return LIBRARIES[impl].why_not(dtype) if impl in LIBRARIES else None


@functools.lru_cache(maxsize=1)
def setting(name: str, shape: Shape, dtype: torch.dtype) -> Setting:
    """Rows about K means, columns of decaying weight as after a PCA, and centres a few steps on the way."""
    row, (n, width, k) = ROWS[name], shape
    n = n if name != "kmeans_minibatch" else 24 * n
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, device=DEVICE)

    scale = torch.arange(1, width + 1, device=DEVICE).float().pow(-0.5)
    middles = normal(k, width) * scale * 0.5 + scale
    x = torch.empty(n, width, dtype=dtype, device=DEVICE)
    for part in x.split(2**18):
        mine = torch.randint(k, (len(part),), generator=generator, device=DEVICE)
        part.copy_(middles[mine] + normal(len(part), width) * scale)
    first = x[: max(2**16, 2 * k)]
    centers = first[torch.randperm(len(first), generator=generator, device=DEVICE)[:k]].float()
    for _ in range(2):
        centers = peers.lloyd_step(first, centers, True).centers
    return Setting(x, centers.float(), row.more(x, shape))


def shown_iterations(name: str, shape: Shape, dtype: torch.dtype) -> Setting:
    """The same, with the iterations that ours takes: everyone else is asked for as many, and not for more."""
    given = setting(name, shape, dtype)
    if name != "kmeans_fit":
        return given
    return given._replace(more=(_iterations(name, shape, dtype),))


@functools.lru_cache(maxsize=1)
def _iterations(name: str, shape: Shape, dtype: torch.dtype) -> int:
    x, centers, (iterations,) = setting(name, shape, dtype)
    return int(rsfast.KMeans(len(centers), init=centers, n_init=1, max_iter=iterations, tol=0).fit(x).n_iter_)


@functools.lru_cache(maxsize=2)  # ours is run beside the others
def prepared(name: str, shape: Shape, dtype: torch.dtype, impl: str) -> tuple[list[Call], dict[str, float]]:
    """An implementation on several inputs, ready to be timed, and its errors.

    Raises:
        AssertionError: Ours is wrong: no wrong answer of ours is ever timed.
    """
    row, given = ROWS[name], shown_iterations(name, shape, dtype)
    run = row.arms[impl](given.x, given.centers, *given.more)
    found = run()
    errors = row.judge(given, found, impl in OWN, impl == "fast")
    if impl == "auto":
        truth.assert_repeats(run, found)
    if name == "kmeans_fit":
        errors["iterations"] = given.more[0]
    copies = 1 if DEVICE != "cuda" or given.x.nbytes > 4 * l2_bytes() else sets_of_inputs(given.x.nbytes)
    runs = [row.arms[impl](given.x.roll(i, 0), given.centers, *given.more) for i in range(1, copies)]
    return [Call(each, [], ()) for each in (run, *runs)], errors
