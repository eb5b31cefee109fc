"""Calibration at the sizes of a data set, beside compositions that gather a centre for every row."""

import functools
import gc

import pytest
import torch
from torch import Tensor

from benchmarks.arms import DEVICE, compiled, short
from benchmarks.measure import Call, measure
from rsfast import deblora
from tests.case import BF16, FP32

# rows, columns, classes; the classes' sizes fall from the first to the last by a factor of 100
SHAPES = ((1_000_000, 1280, 15), (100_000, 1280, 15)) if DEVICE == "cuda" else ((96, 32, 5),)
DTYPES = (BF16, FP32) if DEVICE == "cuda" else (FP32,)


def composed(x: Tensor, labels: Tensor, mu: Tensor, *, lerp: bool) -> Tensor:
    """As a caller would write it: nothing is checked."""
    counts = torch.zeros(len(mu), device=x.device).index_add_(0, labels, torch.ones_like(labels, dtype=torch.float32))
    alpha = (10 * counts / counts.max()).clamp(max=1)[labels][:, None]
    if lerp:
        return torch.lerp(mu.to(x)[labels], x, alpha.to(x))
    return (alpha * x + (1 - alpha) * mu[labels]).to(x)


IMPLS = {
    "auto": lambda: deblora.calibrate,
    "torch": lambda: functools.partial(composed, lerp=False),
    "torch-lerp": lambda: functools.partial(composed, lerp=True),
    "torch-compiled": lambda: compiled(functools.partial(composed, lerp=False)),
}


@functools.lru_cache(maxsize=1)
def given(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n, width, classes = shape
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(n, width, dtype=dtype, generator=generator, device=DEVICE)
    share = 100 ** -(torch.arange(classes, device=DEVICE) / (classes - 1))
    labels = torch.multinomial(share, n, replacement=True, generator=generator)
    return x, labels, torch.randn(classes, width, generator=generator, device=DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=short)
def bench_deblora(record, shape, dtype, impl):
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    tensors = given(shape, dtype)
    run = IMPLS[impl]()
    some = [t[:1000] for t in tensors[:2]] + [tensors[2]]
    wanted = composed(some[0].double(), some[1], some[2].double(), lerp=False)
    error = (IMPLS[impl]()(*some).double() - wanted).norm() / wanted.norm()
    assert impl != "auto" or error < torch.finfo(dtype).eps
    key = dict(family="deblora", op="calibrate", shape=short(shape), dtype=short(dtype), impl=impl)
    record(
        key | {"pass": "forward"},
        lambda benchmark, clock: (
            {"error": float(error)}
            | measure(benchmark, clock, [Call(lambda: run(*tensors), [], ())], "forward", graph=False, rounds=20)
        ),
        moved=2 * tensors[0].nbytes,
        flops=0,
    )
