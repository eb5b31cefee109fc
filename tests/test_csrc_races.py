"""What the emulation's watch over memory finds: nothing in the kernels, and every mistake that is made on purpose."""

import ctypes
import functools
import subprocess

import numpy as np
import pytest
import torch

from rsfast import _extension, _sources
from rsfast._dispatch import INTERPRET
from tests.case import BF16, FP16, FP32

pytest.importorskip("triton")
from rsfast.kmeans.constraint import library as constraint
from rsfast.kmeans.kernels import onepass
from tests.test_kmeans_constraint_library import problem
from tests.test_kmeans_onepass import data

pytestmark = [
    pytest.mark.skipif(not INTERPRET, reason="there is a GPU, and its own tools watch"),
    pytest.mark.skipif(bool(_extension.missing()), reason="; ".join(_extension.missing())),
]
WATCHED = ("-fsanitize=thread", "-DRSF_RACES", "-g")
MISTAKES = """
#include "common/device.cuh"
#include "common/launch.h"

// every case is right with its second half, and wrong without
__global__ void exchange(float* out, bool right) {  // between the threads of a block
  RSF_SHARED(raw);
  auto* s = reinterpret_cast<float*>(raw);
  s[threadIdx.x] = threadIdx.x;
  if (right) __syncthreads();
  else __syncwarp();
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[(threadIdx.x + 32) % blockDim.x];
}
__global__ void lanes(float* out, bool right) {  // a shuffle waits, but orders nothing
  RSF_SHARED(raw);
  auto* s = reinterpret_cast<float*>(raw);
  s[threadIdx.x] = __shfl_xor_sync(~0u, float(threadIdx.x), 1);
  if (right) __syncwarp();
  else (void)__ballot_sync(~0u, 1);
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void overwritten(float* out, bool right) {  // read, then written by another
  RSF_SHARED(raw);
  auto* s = reinterpret_cast<float*>(raw);
  for (int turn = 0; turn < 2; ++turn) {
    s[threadIdx.x] = turn;
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = s[(threadIdx.x + 32) % blockDim.x];
    if (right) __syncthreads();
  }
}
__global__ void blocks(float* out, bool right) {  // through global memory: a flag without fences
  auto* flag = reinterpret_cast<uint32_t*>(out + 1000);
  uint32_t turn = 0;
  if (blockIdx.x == 1) out[threadIdx.x] = 1;
  if (right) {
    rsf::grid_barrier(flag, turn);
  } else {
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(flag, 1u);
    while (rsf::load_acquire(flag) < gridDim.x) rsf::relax();
  }
  if (blockIdx.x == 0) out[100 + threadIdx.x] = out[threadIdx.x];
}
__global__ void copied(float* out, bool right) {  // asynchronously, and looked at by others before it is there
  RSF_SHARED(raw);
  auto* s = reinterpret_cast<float*>(raw);
  rsf::copy_async(s + threadIdx.x * 4, out + threadIdx.x * 4, true);
  rsf::commit_copies();
  if (right) rsf::wait_for_copies<0>();
  __syncthreads();
  const float got = s[(threadIdx.x + 1) % blockDim.x * 4];
  __syncthreads();
  rsf::wait_for_copies<0>();
  out[400 + blockIdx.x * blockDim.x + threadIdx.x] = got;
}
__global__ void early(float* out, bool right) {  // a block of the cluster that may not have begun
  RSF_SHARED(raw);
  auto* s = reinterpret_cast<float*>(raw);
  if (right) rsf::cluster_barrier();
  if (threadIdx.x == 0) rsf::in_block(s, rsf::cluster_rank() ^ 1)[0] = 1;
  rsf::cluster_barrier();
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[0];
}
__global__ void late(float* out, bool right) {  // a block of the cluster that may have ended
  RSF_SHARED(raw);
  auto* s = reinterpret_cast<float*>(raw);
  s[threadIdx.x] = threadIdx.x;
  rsf::cluster_barrier();
  out[blockIdx.x * blockDim.x + threadIdx.x] = rsf::in_block(s, rsf::cluster_rank() ^ 1)[threadIdx.x];
  if (right) rsf::cluster_barrier();
}
__global__ void outside(float* out, bool right) {  // of shared memory
  RSF_SHARED(raw);
  auto* s = reinterpret_cast<float*>(raw);
  s[threadIdx.x + (right ? 0 : 3 * blockDim.x + 1)] = 1;
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}
__global__ void added(float* out, bool right) {  // by all, and looked at
  RSF_SHARED(raw);
  auto* s = reinterpret_cast<int*>(raw);
  if (threadIdx.x == 0) s[0] = 0;
  __syncthreads();
  atomicAdd(s, 1);
  if (right) __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[0];
}

RSF_EXPORT int rsf_mistake(int which, int right, float* out) {
  void (*const cases[])(float*, bool) = {exchange, lanes, overwritten, blocks, copied, early, late, outside, added};
  const rsf::Shape shape{2, 64, 64 * 16, which == 5 || which == 6 ? 2u : 1u, which == 3};
  return rsf::launch(cases[which], shape, nullptr, out, right);
}
"""
CASES = ("exchange", "lanes", "overwritten", "blocks", "copied", "early", "late", "outside", "added")


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "mistakes.cu").write_text(MISTAKES)
    flags = [*_sources.host_flags(_sources.CSRC), *WATCHED, "-O1", "-I", str(_sources.CSRC)]
    units = [folder / "mistakes.cu", _sources.CSRC / _sources.EMULATION / "races.cpp"]
    objects = [str(folder / f"{unit.stem}.o") for unit in units]
    for unit, built in zip(units, objects, strict=True):
        subprocess.run([*_extension._compiler(), *flags, "-c", str(unit), "-o", built], check=True)
    subprocess.run([*_extension._compiler(), "-shared", *objects, "-o", str(folder / "mistakes.so")], check=True)
    return ctypes.CDLL(str(folder / "mistakes.so"))


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_found(mistakes, case, capfd):
    out = torch.zeros(1024)
    call = functools.partial(mistakes.rsf_mistake, CASES.index(case))
    assert call(1, ctypes.c_void_p(out.data_ptr())) == 0, capfd.readouterr().err
    out.zero_()
    assert call(0, ctypes.c_void_p(out.data_ptr())) == -101
    said = capfd.readouterr().err
    assert "thread " in said and ("shared memory of block" in said) == (case != "blocks")


@pytest.fixture
def watched(monkeypatch):
    """The whole library with every access watched; a race is an error of the launch."""

    def forget():
        for cached in (onepass._run, onepass._asked):
            cached.cache_clear()

    found = functools.cache(lambda: _extension._emulation(*WATCHED))
    monkeypatch.setattr(_extension, "_load", found)
    found()
    forget()
    yield
    forget()


SHAPES = ((100, 64, 5, BF16), (70, 520, 9, BF16), (40, 136, 33, FP16), (50, 264, 6, FP32))  # teams of 1, 2, 3 and 5


@pytest.mark.parametrize("n, d, k, dtype", SHAPES, ids=str)
def test_one_pass_kernels_do_not_race(watched, n, d, k, dtype):
    x, centers = data(n, d, k, dtype, "cpu")
    close = (centers[0] + torch.randn(n, d, generator=torch.Generator().manual_seed(1))).to(dtype)
    centers[1] = centers[0] + 1e-5 * centers[2]
    onepass.step(close, centers, None, True)  # many rows in doubt
    _, _, status = onepass.lloyd(x, x[:k].float(), torch.full((n,), -1), True, 2, 0.0)
    assert onepass.read_status(status)[0] == 2
    order = torch.randint(n, (3, 40), generator=torch.Generator().manual_seed(2))
    fresh = torch.zeros(k, dtype=torch.float64), order, True, 0.0, 0.3, 0, 0.6, onepass.fresh_status(x)
    onepass.minibatch(x, x[:k].float(), *fresh)


def test_kernels_of_the_constraint_do_not_race(watched):
    gaps, subsidies, lower, upper = problem(np.random.default_rng(1), "equal", "cpu", 5000, 5)
    subsidies, labels = constraint.climb(gaps, subsidies, lower, upper, 3)
    constraint.widths(gaps, subsidies, labels)
    constraint.near(gaps, subsidies, labels, 1 << 47)
