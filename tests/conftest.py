import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # run the kernels on the CPU, slowly

import numpy as np
import pytest

FAILED = set()  # names of tests
SMALLEST = 2.0**-126  # normal number of fp32


def _interpret_as_compiled():
    """fp32's exponentials and roots below the normal numbers are 0, and a maximum of a number and NaN is the number."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def flushed(x):
        return np.where(np.abs(x) < SMALLEST, x.dtype.type(0), x) if x.dtype == np.float32 else x

    def approximate(op):
        @np.errstate(over="ignore", invalid="ignore")  # of lanes that count for nothing
        def run(self, x):
            return TensorHandle(flushed(op(flushed(x.data))), x.dtype.scalar)

        return run

    InterpreterBuilder.create_exp2, InterpreterBuilder.create_sqrt = approximate(np.exp2), approximate(np.sqrt)
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _interpret_as_compiled()


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory that a kernel forgets to write comes back as NaN."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            t = allocate(*args, **kwargs)
            real = type(t) is torch.Tensor and t.is_floating_point() and not torch.compiler.is_compiling()
            return t.fill_(float("nan")) if real else t

        return wrapper

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_runtest_logreport(report):
    if report.failed:
        FAILED.add(report.nodeid)


def pytest_runtest_logfinish(nodeid):
    """After an illegal access nothing works in a process any more: one of several ends, and is replaced."""
    if nodeid in FAILED and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
