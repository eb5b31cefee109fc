"""Linear layers with LoRA at their benchmark shapes, beside PEFT's and beside compositions of PyTorch's products."""

import gc

import pytest
import torch

from benchmarks.arms import DEVICE, short, work
from benchmarks.lora import OWN, ROWS, grid, prepared, target, why_not
from benchmarks.measure import measure


def _ready(name, shape, dtype, impl):
    """Calls and errors; a skip where another library's code cannot run."""
    if reason := why_not(ROWS[name], dtype, impl):
        pytest.skip(reason)
    try:
        return prepared(name, shape, dtype, impl)
    except Exception as error:
        if impl in OWN:
            raise
        reason = f"{impl} failed: {type(error).__name__}: {str(error)[:200]}"
    pytest.skip(reason)  # out of the handler, or the error would keep the memory of its frames


@pytest.mark.parametrize("case, shape, dtype, impl, which", grid(), ids=short)
def bench_lora(record, case, shape, dtype, impl, which):
    if DEVICE == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # what the last implementation took in large pieces
    calls, found = _ready(case, shape, dtype, impl)
    other = "frozen" if impl == "auto" else "auto"
    beside, _ = prepared(case, shape, dtype, other)
    found = found | {"beside": other}
    if (aim := target(case, shape, impl, which)) is not None:
        found["target"] = aim
    key = dict(family="lora", op=case, shape=short(shape), dtype=short(dtype), impl=impl) | {"pass": which}
    moved = work(ROWS[case].case, shape, dtype, which)
    record(key, lambda benchmark, clock: found | measure(benchmark, clock, calls, which, beside=beside), **moved)
