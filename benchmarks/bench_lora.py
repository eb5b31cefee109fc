"""Linear layers with LoRA at their benchmark shapes, beside PEFT's and beside compositions of PyTorch's products."""

import gc

import pytest
import torch

from benchmarks import lora_attention, lora_memory
from benchmarks.arms import DEVICE, short, work
from benchmarks.lora import DTYPE, OWN, ROWS, grid, prepared, target, why_not
from benchmarks.measure import measure


def _ready(impl: str, reason: str | None, prepare):
    """Calls and errors; a skip where something cannot run, or another library's code fails."""
    if reason:
        pytest.skip(reason)
    if DEVICE == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # what the last implementation took in large pieces
    try:
        return prepare(impl)
    except Exception as error:
        if impl in OWN:
            raise
        reason = f"{impl} failed: {type(error).__name__}: {str(error)[:200]}"
    pytest.skip(reason)  # out of the handler, or the error would keep the memory of its frames


def _record(record, name, shape, impl, which, ready, beside, more, moved):
    """Time it in turn with ours, or ours with the frozen layer."""
    calls, found = ready
    found = found | more | {"beside": "frozen" if impl == "auto" else "auto"}
    key = dict(family="lora", op=name, shape=short(shape), dtype=short(DTYPE), impl=impl) | {"pass": which}
    record(key, lambda benchmark, clock: found | measure(benchmark, clock, calls, which, beside=beside), **moved)


@pytest.mark.parametrize("name, shape, impl, which", grid(main=True), ids=short)
def bench_lora(record, name, shape, impl, which):
    row, aim = ROWS[name], target(name, shape, impl, which)
    ready = _ready(impl, why_not(row, DTYPE, impl), lambda impl: prepared(name, shape, DTYPE, impl))
    beside, _ = prepared(name, shape, DTYPE, "frozen" if impl == "auto" else "auto")
    more = {} if aim is None else {"target": aim}
    _record(record, name, shape, impl, which, ready, beside, more, work(row.case, shape, DTYPE, which))


@pytest.mark.parametrize("impl", lora_memory.IMPLEMENTATIONS)
def bench_lora_memory(record, impl):
    """No time: bytes that the LoRA of a whole tower keeps for the backward."""

    def run(benchmark, clock):
        before = _kept("frozen")
        kept = benchmark.pedantic(_kept, (impl,))
        assert kept > before, f"{impl} keeps {kept} bytes, without LoRA {before}"
        found = dict(kept_for_lora=kept - before, kept_without=before, method="saved tensors", peak_memory=None)
        return found | ({} if impl == "auto" else {"target": lora_memory.TARGET})

    shape = short(lora_memory.TOWER)
    key = dict(family="lora", op="lora_memory", shape=shape, dtype=short(DTYPE), impl=impl) | {"pass": "memory"}
    record(key, run, moved=None, flops=0)


def _kept(impl: str) -> int:
    kept, dx = lora_memory.of_tower(impl, lora_memory.TOWER)
    assert dx.isfinite().all()
    return kept


@pytest.mark.parametrize("which", ("forward+backward", "forward"))
@pytest.mark.parametrize("impl", lora_attention.IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", lora_attention.SHAPES, ids=short)
def bench_lora_attention(record, shape, impl, which):
    def prepare(impl):
        return lora_attention.prepared(shape, DTYPE, impl)

    ready = _ready(impl, None, prepare)
    beside, _ = prepare("frozen" if impl == "auto" else "auto")
    moved = lora_attention.work(shape, DTYPE.itemsize, which)
    _record(record, f"lora_attention_r{lora_attention.RANK}", shape, impl, which, ready, beside, {}, moved)


@pytest.mark.parametrize("name, shape, impl, which", grid(main=False), ids=short)
def bench_lora_more(record, name, shape, impl, which):
    bench_lora(record, name, shape, impl, which)
