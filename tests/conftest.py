import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # run the kernels on the CPU, slowly

import pytest

FAILED = set()  # names of tests


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
