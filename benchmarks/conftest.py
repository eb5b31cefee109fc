"""The device clock, provenance, the time budget and the results file of every benchmark."""

import gc
import pathlib
import sys
import time

import pytest
import torch

from benchmarks import capture, results
from benchmarks.measure import DeviceClock, facts

STARTED = time.monotonic()
NO_GPU = "no GPU: every benchmark ran once at a small shape to see that it works; no kernel was timed, nothing written"
SHOWN = pytest.StashKey[list[str]]()  # lines for the end of the terminal's report
SUSPECT = set()  # names of rows that failed, or were skipped since something of another library did


def pytest_addoption(parser):
    group = parser.getgroup("rsfast benchmarks")
    group.addoption("--results", type=pathlib.Path, default=results.FOLDER, help="folder of the results files")
    group.addoption("--commit", help="what to write as the commit, for a copy of the tree without its git folder")
    group.addoption("--budget", type=float, help="seconds after which no further benchmark starts")
    group.addoption("--until", type=float, help="the same as a point of the monotonic clock")
    group.addoption("--after", help="begin with what comes after the benchmark of this name")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if not torch.cuda.is_available():
        config.option.benchmark_disable = True  # a wall time of small shapes on a CPU would say nothing


def pytest_collection_modifyitems(config, items):
    names, after = [item.nodeid for item in items], config.getoption("after")
    if after in names:
        until = names.index(after) + 1
        config.hook.pytest_deselected(items=items[:until])
        del items[:until]
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=DeviceClock()))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= results.provenance(config.getoption("commit"))


def pytest_runtest_logreport(report):
    if not report.passed:
        SUSPECT.add(report.nodeid)


def pytest_runtest_logfinish(nodeid):
    if nodeid in SUSPECT and torch.cuda.is_available():  # an illegal access fails all that comes after it
        try:
            capture.healthy()
        except RuntimeError as error:
            pytest.exit(f"{capture.LOST}: {str(error).splitlines()[0]}")


def pytest_terminal_summary(terminalreporter):
    if not torch.cuda.is_available():
        terminalreporter.section("benchmarks")
        terminalreporter.write_line(NO_GPU)
    for line in terminalreporter.config.stash.get(SHOWN, []):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def writer(request):
    """Results file of this GPU, its facts measured and written first; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    writer = results.Writer(request.config.getoption("results"), results.provenance(request.config.getoption("commit")))
    writer.facts(facts())
    gc.collect()
    gc.freeze()  # every row collects garbage, and what was imported takes half a second of it each time
    return writer


@pytest.fixture(autouse=True)
def _within_budget(request):
    budget, until = request.config.getoption("budget"), request.config.getoption("until")
    if budget is not None and time.monotonic() - STARTED > budget:
        pytest.skip(f"the time budget of {budget:.0f} s is spent")
    if until is not None and time.monotonic() > until:
        pytest.skip("the time of this part is over")


@pytest.fixture(autouse=True, scope="module")
def _forgotten():
    """What a file's rows share is let go with its last: the memory of the next ones is of everything."""
    yield
    for module in [m for name, m in sys.modules.items() if name.startswith("benchmarks.")]:
        for kept in vars(module).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()


@pytest.fixture
def record(request, benchmark, writer):
    """Measure by ``measure(benchmark, clock)`` and write the row; ``key`` holds the fields of results.KEY."""

    def run(key: dict, measure, *, moved: int | None, flops: int) -> None:
        benchmark.group = " ".join(str(key[name]) for name in ("op", "shape", "dtype", "pass"))
        found = measure(benchmark, request.node.get_closest_marker("benchmark").kwargs["timer"])
        if writer is None:
            return
        row = key | {"bytes": moved, "flops": flops} | found
        writer.add(row)
        benchmark.extra_info |= {name: row[name] for name in ("bytes", "flops", "peak_memory", "method")}
        if moved is not None:
            rate = moved / row["seconds"]
            share = rate / writer.copy_rate()
            benchmark.extra_info |= {"GB/s": round(rate / 1e9, 1), "% of copy": round(100 * share, 1)}

    return run
