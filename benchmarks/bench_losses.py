"""The in-batch losses at their benchmark shapes, beside the same losses of others."""

import functools
import gc

import pytest
import torch

from benchmarks.arms import DEVICE, TIMED, short, work
from benchmarks.losses import GRAPH_UP_TO, LOSSES, WHOLE_UP_TO, grid, prepared, too_large, why_not
from benchmarks.measure import ROUNDS, WARM_UPS, gemm_seconds, measure
from tests.cases import BF16


@functools.cache
def _gemms(writer, shape) -> dict[str, float]:
    """Of the products at this shape, measured in this run and written as facts too."""
    found = gemm_seconds(*shape)
    writer.facts({f"gemms_{short(shape)}_{which}_seconds": seconds for which, seconds in found.items()})
    return found | {"forward+backward": sum(found.values())}


def _ready(name, shape, dtype, impl):
    """Calls and errors; a skip where something of another library, or of plain PyTorch, cannot run."""
    if reason := why_not(name, shape, dtype, impl) or too_large(name, shape, dtype, impl):
        pytest.skip(reason)
    try:
        return prepared(name, shape, dtype, impl)
    except torch.OutOfMemoryError as error:
        if impl == "fused":
            raise
        reason = f"{impl} ran out of memory: {str(error).splitlines()[0]}"
    except Exception as error:
        if impl not in LOSSES[name].peers:
            raise
        reason = f"{impl} failed: {type(error).__name__}: {str(error)[:200]}"
    pytest.skip(reason)  # out of the handlers, or the error would keep the memory of its frames


@pytest.mark.parametrize("case, shape, dtype, impl, which", grid(), ids=short)
def bench_loss(record, writer, case, shape, dtype, impl, which):
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # what the last implementation took in large pieces
    calls, errors = _ready(case, shape, dtype, impl)
    beside = ()
    if impl != "fused" and why_not(case, shape, dtype, "fused") is None:
        beside, _ = prepared(case, shape, dtype, "fused")
    rounds, warm_ups = (ROUNDS, WARM_UPS) if shape[0] <= GRAPH_UP_TO else (30, 3) if shape[0] <= WHOLE_UP_TO else (2, 1)
    graph = shape[0] <= GRAPH_UP_TO
    extra = errors if writer is None or dtype != BF16 else errors | {"gemm_seconds": _gemms(writer, shape)[which]}
    record(
        dict(family="similarity", op=case, shape=short(shape), dtype=short(dtype), impl=impl) | {"pass": which},
        lambda benchmark, clock: (
            extra
            | measure(
                benchmark, clock, calls, which, beside=beside, graph=graph, hot=graph, rounds=rounds, warm_ups=warm_ups
            )
        ),
        **work(TIMED[case], shape, dtype, which),
    )
