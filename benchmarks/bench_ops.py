"""Every operation of tests/cases.py at its benchmark shapes: fused kernels, the reference, compiled, and peers."""

import pytest

from benchmarks.arms import DEVICE, TIMED, grid, prepared
from benchmarks.measure import PASSES, measure
from rsfast._dispatch import INTERPRET


def _id(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("case, shape, dtype, impl, which", [(*row, w) for row in grid() for w in PASSES], ids=_id)
def bench_op(record, case, shape, dtype, impl, which):
    row = TIMED[case]
    if impl == "fused" and not row.has_kernel():
        pytest.skip(f"{case} has no kernel yet")
    if impl == "fused" and DEVICE == "cpu" and not INTERPRET:
        pytest.skip("fused kernels need a GPU, or TRITON_INTERPRET=1 to run slowly without one")
    calls = prepared(case, shape, dtype, impl)
    backward = {"forward": (False,), "backward": (True,), "forward+backward": (False, True)}[which]
    names = dict(family=row.public.__module__.split(".")[1], op=case, shape=_id(shape), dtype=_id(dtype), impl=impl)
    record(
        names | {"pass": which},
        lambda benchmark, clock: measure(benchmark, clock, calls, which),
        moved=sum(row.io_bytes(shape, dtype.itemsize, backward=b) for b in backward),
        flops=sum(row.flops(shape, backward=b) for b in backward),
    )
