"""The gated adapter at its benchmark shapes: fused kernels, the reference, compiled, and HarMA's own."""

import pytest

from benchmarks.arms import DEVICE, FORCED, TIMED, grid, prepared, short, work
from benchmarks.measure import PASSES, measure
from rsfast._dispatch import INTERPRET


def _ready(case, shape, dtype, impl):
    """Calls; a skip where PyTorch has no kernel of the backend that is asked for."""
    try:
        return prepared(case, shape, dtype, impl)
    except RuntimeError as error:
        if impl not in FORCED:
            raise
        reason = str(error).splitlines()[0][:200]
    pytest.skip(f"{impl}: PyTorch has no such kernel for these heads: {reason}")


@pytest.mark.parametrize("case, shape, dtype, impl, which", [(*row, w) for row in grid() for w in PASSES], ids=short)
def bench_op(record, case, shape, dtype, impl, which):
    row = TIMED[case]
    if impl == "fused" and not row.has_kernel():
        pytest.skip(f"{case} has no kernel yet")
    if impl == "fused" and DEVICE == "cpu" and not INTERPRET:
        pytest.skip("fused kernels need a GPU, or TRITON_INTERPRET=1 to run slowly without one")
    calls = _ready(case, shape, dtype, impl)
    ours = impl != "fused" and row.has_kernel() and (DEVICE == "cuda" or INTERPRET)
    beside = prepared(case, shape, dtype, "fused") if ours else ()
    names = dict(family="adapter", op=case, shape=short(shape), dtype=short(dtype), impl=impl)
    record(
        names | {"pass": which},
        lambda benchmark, clock: measure(benchmark, clock, calls, which, beside=beside),
        **work(row, shape, dtype, which),
    )
