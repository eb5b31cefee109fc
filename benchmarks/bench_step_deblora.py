"""debLoRA's clustering of a whole data set, from features in memory to labels; ours, and others' k-means."""

import functools
import gc

import pytest
import torch

import rsfast
from benchmarks import kmeans_peers as peers
from benchmarks import kmeans_truth as truth
from benchmarks.arms import DEVICE, short
from benchmarks.floors import kmeans_work
from benchmarks.kmeans import setting
from benchmarks.measure import measure_step
from rsfast import deblora
from tests.case import FP32

SHAPES = ((100_000, 1280, 32), (1_000_000, 1280, 32)) if DEVICE == "cuda" else ((96, 32, 5),)
RHO, SEED = 2.0, 0
OURS = ("auto", "auto-unconstrained")
LIBRARIES = {"flashlib": peers.FLASHLIB, "flash-kmeans-patched": peers.FLASH, "sklearn": peers.SKLEARN}
OTHERS = {  # (rows, centres to start from, iterations) -> what is timed; starting centres cost them nothing
    "torch": peers.composed_fit,
    "flashlib": peers.flashlib_fit,
    "flash-kmeans-patched": functools.partial(peers.flash_fit, patched=True),
    "sklearn": peers.sklearn_fit,
}
ON_CPU = 100_000  # rows that scikit-learn is asked for at most


def ours(x, impl: str):
    return deblora.cluster_features(x, 32 if DEVICE == "cuda" else 5, rho=RHO if impl == "auto" else None, seed=SEED)


@functools.cache
def known(shape) -> tuple[int, float]:
    """Iterations that ours takes without a constraint, which others are asked for, and the inertia it ends with."""
    x, k = setting("kmeans_step", shape, FP32).x, shape[2]
    fitted = rsfast.KMeans(k, random_state=SEED, n_init=1).fit(x)
    return int(fitted.n_iter_), truth.inertia(x, fitted.cluster_centers_)


def judged(shape, impl: str, labels, centers) -> dict[str, float]:
    """``inertia_over_ours``: of the centres, over that of ours without a constraint.

    Raises:
        AssertionError: Ours has a cluster that is too small, or a label that does not belong to the centres.
    """
    x, k = setting("kmeans_step", shape, FP32).x, shape[2]
    iterations, best = known(shape)
    found = {"iterations": iterations, "inertia_over_ours": truth.inertia(x, centers.to(x.device)) / best}
    if impl == "auto":
        least = torch.bincount(labels, minlength=k).min().item()
        assert least >= int(len(x) / (k * RHO)), f"a cluster has {least} rows"
    elif impl in OURS:
        found["error_labels"] = truth.wrong(x, centers, labels)
        assert found["error_labels"] == 0, f"{found} of the labels"
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=short)
@pytest.mark.parametrize("impl", (*OURS, *OTHERS))
def bench_step_deblora(record, shape, impl):
    if impl in LIBRARIES and (reason := LIBRARIES[impl].why_not(FP32)):
        pytest.skip(reason)
    if impl == "sklearn" and shape[0] > ON_CPU:
        pytest.skip(f"scikit-learn is asked for {ON_CPU} rows at most")
    gc.collect()
    x, k = setting("kmeans_step", shape, FP32).x, shape[2]
    if impl in OURS:
        run = functools.partial(ours, x, impl)
        found = run()
        found = judged(shape, impl, found.assignments, found.centers)
    else:
        start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))[:k].to(x.device)].float()
        run = OTHERS[impl](x, start, known(shape)[0])
        found = judged(shape, impl, *run()[:2])
    rounds = dict(rounds=3, warm_ups=1) if impl == "sklearn" else dict(rounds=7, warm_ups=1)
    beside = None if impl in OURS or DEVICE != "cuda" else lambda: functools.partial(ours, x, "auto-unconstrained")
    work = kmeans_work("kmeans_step", shape, FP32)
    key = dict(family="step", op="deblora_clustering", shape=short(shape), dtype="float32", impl=impl)
    record(
        key | {"pass": "step"},
        lambda benchmark, clock: found | measure_step(benchmark, run, beside=beside, **rounds),
        moved=work["moved"] * found["iterations"],
        flops=work["flops"] * found["iterations"],
    )
