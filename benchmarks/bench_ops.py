"""The gated adapter at its benchmark shapes: fused kernels, the reference, compiled, and HarMA's own."""

import pytest

from benchmarks.arms import DEVICE, TIMED, grid, prepared, short, work
from benchmarks.measure import PASSES, measure
from rsfast._dispatch import INTERPRET


@pytest.mark.parametrize("case, shape, dtype, impl, which", [(*row, w) for row in grid() for w in PASSES], ids=short)
def bench_op(record, case, shape, dtype, impl, which):
    row = TIMED[case]
    if impl == "fused" and not row.has_kernel():
        pytest.skip(f"{case} has no kernel yet")
    if impl == "fused" and DEVICE == "cpu" and not INTERPRET:
        pytest.skip("fused kernels need a GPU, or TRITON_INTERPRET=1 to run slowly without one")
    calls = prepared(case, shape, dtype, impl)
    names = dict(family="adapter", op=case, shape=short(shape), dtype=short(dtype), impl=impl)
    record(
        names | {"pass": which},
        lambda benchmark, clock: measure(benchmark, clock, calls, which),
        **work(row, shape, dtype, which),
    )
