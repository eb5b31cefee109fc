"""Compiles every kernel that the operations launch, for GPUs that are not there, and prints what it costs.

Run as ``python -m tests.aot 80 90 100`` without ``TRITON_INTERPRET``. Each row that is benchmarked is called, forward
and backward, on the CPU with launches recorded instead of run; so a new family joins by having rows there (or rows with
shapes ``ahead``). It is
called at its benchmark shapes (an adapter at its first small one too), with no larger a batch than changes kernels;
``--all`` takes the other rows too.
"""

import argparse
import concurrent.futures
import inspect
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import rsfast
from rsfast import _dispatch
from tests import kmeans_cases
from tests.kmeans_cases import KMeansCase, data

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_cooperative_grid")
NOW = []  # the architectures launches were recorded for, so far
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a program may use


def record(cases, dtypes, target):
    """Distinct launches of the cases on ``target``: kernel, arguments as ``_kind`` has them, options."""
    launches = {}

    def run(self, *args, grid, warmup, **kwargs):
        launches.setdefault(launch_of(self, args, kwargs), None)

    original, JITFunction.run = JITFunction.run, run
    NOW.append(target)
    _dispatch.capability = lambda device: NOW[-1]  # kernels' modules keep the first one that they see
    try:
        for case, dtype in itertools.product(cases, dtypes):
            shapes = case.large or case.ahead or case.small[-1:]
            for n, *others in (*shapes, *case.small[: case.name.startswith("gated_adapter") and bool(case.large)]):
                _call(case, (min(n, case.enough), *others), dtype)
    finally:
        JITFunction.run = original
    return list(launches)


def launch_of(kernel, args, kwargs):
    """What :func:`compile` wants to know of a launch: kernel, arguments as ``_kind`` has them, options."""
    options = {k: kwargs[k] for k in OPTIONS if k in kwargs}
    named = {k: value for k, value in kwargs.items() if k not in options}
    values = inspect.signature(kernel.fn).bind(*args, **named).arguments
    return kernel, tuple((p.name, *_kind(p, values[p.name])) for p in kernel.params), tuple(options.items())


def _call(case, shape, dtype):
    if isinstance(case, KMeansCase):
        return case.call(data(shape, dtype, "cpu"), impl="fused")
    tensors = [t.requires_grad_() for t in case.inputs(shape, dtype, "cpu")]
    y = case.call(case.public, tensors, impl="fused")
    torch.autograd.grad(y, tensors, y)
    with torch.no_grad():
        case.call(case.public, tensors, impl="fused")
    factors = [t for name, t in zip(case.names, tensors, strict=True) if name.startswith("lora_")]
    if len(factors) == 2:
        with rsfast.reduce_together(factors):
            y = case.call(case.public, tensors, impl="fused")
        torch.autograd.grad(y, tensors, y)


def _kind(param, value):
    """Type, constant and what is known to divide an argument, as Triton specialises it at a launch; 1 where nothing is.

    As exactly as that, or a launch would not find what was compiled ahead.
    """
    if param.is_constexpr or value is None:
        return "constexpr", value, None
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>", None, None
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}", None, 1 if value.data_ptr() % 16 else 16
    if isinstance(value, int):
        if value == 1:
            return "constexpr", 1, None
        return "i32" if -(2**31) <= value < 2**31 else "i64", None, 1 if value % 16 else 16
    return "fp32", None, None


def source(launch):
    """What Triton compiles of it."""
    kernel, args, _ = launch
    return ASTSource(
        kernel,
        {name: kind for name, kind, _, _ in args},
        {name: value for name, kind, value, _ in args if kind == "constexpr"},
        {(i,): [["tt.divisibility", 16]] * (by > 1) for i, (_, _, _, by) in enumerate(args) if by},
    )


def compile(launch, target):
    """Registers, stack (bytes of spills) and shared memory of one launch on one architecture."""
    kernel, args, options = launch
    built = triton.compile(source(launch), target=GPUTarget("cuda", target, 32), options=dict(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        pathlib.Path(cubin.name).write_bytes(built.asm["cubin"])
        tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return dict(
        kernel=kernel.fn.__name__, file=pathlib.Path(inspect.getfile(kernel.fn)).parent.parent.name,
        target=target, registers=registers, stack=stack, shared=built.metadata.shared,
        types=sorted({kind for _, kind, _, _ in args if kind.startswith(("*", "tensordesc"))}),
        constants={n: v for n, k, v, _ in args if k == "constexpr" and v is not None}, options=dict(options),
    )  # fmt: skip


WORK = []


def _compile_at(index):
    return compile(*WORK[index])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", type=int, nargs="+", choices=SHARED_MEMORY)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--all", action="store_true", help="rows without benchmark shapes too")
    parser.add_argument("--cases", default="", help="only rows whose name contains this")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    options = parser.parse_args()
    _dispatch.INTERPRET = True  # the operations take CPU tensors; the kernels themselves are compiled, not interpreted
    from benchmarks.arms import TIMED
    from tests.cases import CASES

    rows = {case.name: case for case in (*CASES, *kmeans_cases.CASES) if options.all or case.ahead} | TIMED
    cases = [case for name, case in rows.items() if options.cases in name and case.has_kernel()]
    dtypes = [getattr(torch, name) for name in options.dtypes]
    for target in options.targets:
        WORK.extend(
            (launch, target) for launch in record(cases, dtypes, target) if options.kernel in launch[0].fn.__name__
        )
    context = multiprocessing.get_context("fork")  # a launch holds functions, which do not pickle
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        for result in pool.map(_compile_at, range(len(WORK))):
            print(json.dumps(result, default=str), flush=True)


if __name__ == "__main__":
    main()
