"""k-means at its benchmark shapes, beside compositions of PyTorch's operations and other libraries."""

import gc

import pytest
import torch

from benchmarks import kmeans_cpu
from benchmarks.arms import DEVICE, short
from benchmarks.conftest import SHOWN
from benchmarks.floors import kmeans_floor, kmeans_work
from benchmarks.kmeans import OWN, ROWS, WAITING, aims, grid, prepared, why_not
from benchmarks.measure import ROUNDS, WARM_UPS, measure


def _ready(name, shape, dtype, impl):
    """Calls and errors; a skip where something of another library, or of plain PyTorch, cannot run."""
    if reason := why_not(dtype, impl):
        pytest.skip(reason)
    try:
        return prepared(name, shape, dtype, impl)
    except Exception as error:
        if impl in OWN or isinstance(error, AssertionError):
            raise
        reason = f"{impl} failed: {type(error).__name__}: {str(error)[:200]}"
    pytest.skip(reason)  # out of the handler, or the error would keep the memory of its frames


def _run(record, name, shape, dtype, impl):
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # what the last implementation took in large pieces
    row = ROWS[name]
    calls, found = _ready(name, shape, dtype, impl)
    beside = () if impl == "auto" else prepared(name, shape, dtype, "auto")[0]
    graph = impl not in WAITING and (row.graph or impl.startswith("torch"))
    rounds, warm_ups = (3, 1) if impl in WAITING else (ROUNDS, WARM_UPS) if shape[0] <= 100_000 else (20, 3)
    found |= {"floor_seconds": kmeans_floor(name, shape, dtype)} | aims(name, shape, dtype, impl)
    record(
        dict(family="kmeans", op=name, shape=short(shape), dtype=short(dtype), impl=impl) | {"pass": "forward"},
        lambda benchmark, clock: (
            found
            | measure(benchmark, clock, calls, "forward", beside=beside, graph=graph, rounds=rounds, warm_ups=warm_ups)
        ),
        **kmeans_work(name, shape, dtype),
    )


@pytest.mark.parametrize("name, shape, dtype, impl", grid(main=True), ids=short)
def bench_kmeans(record, name, shape, dtype, impl):
    _run(record, name, shape, dtype, impl)


@pytest.mark.parametrize("name, shape, dtype, impl", grid(main=False), ids=short)
def bench_kmeans_more(record, name, shape, dtype, impl):
    _run(record, name, shape, dtype, impl)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's time is for the GPU")
def bench_kmeans_step_on_the_cpu(request):
    pytest.importorskip("sklearn")
    for name, row in kmeans_cpu.compare().items():
        line = f"kmeans_step on the CPU, {short(kmeans_cpu.SHAPE)} float32, {torch.get_num_threads()} threads: {name}"
        line += f" {row['ms']:.0f} ms, {row['cpu_ms']:.0f} ms of CPU time"
        request.config.stash.setdefault(SHOWN, []).append(line)
