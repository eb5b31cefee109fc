"""The way a call is timed on a GPU, walked through with a GPU that is only pretended."""

import contextlib
import types

import pytest
import torch

from benchmarks import measure


class Pretended:
    """Stands for ``torch.cuda``: time passes by one millisecond an event, and graphs remember what they captured."""

    L2 = 1000

    def __init__(self, refuse_capture=False):
        self.refuse_capture, self.log, self.ticks = refuse_capture, [], 0

    def Event(self, enable_timing):
        world = self

        class Event:
            def record(self):
                world.ticks += 1
                self.at = world.ticks

            def synchronize(self):
                pass

            def elapsed_time(self, later):
                return float(later.at - self.at)  # ms

        return Event()

    def CUDAGraph(self):
        graph = types.SimpleNamespace(name=f"graph {sum(e.startswith('new') for e in self.log)}")
        graph.replay = lambda: self.log.append(f"replay {graph.name}")
        self.log.append(f"new {graph.name}")
        return graph

    @contextlib.contextmanager
    def graph(self, graph, pool):
        if self.refuse_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield
        self.log.append(f"captured {graph.name}")

    def Stream(self):
        return types.SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, side):
        return contextlib.nullcontext()

    def get_device_properties(self, index):
        return types.SimpleNamespace(L2_cache_size=self.L2)

    def is_available(self):
        return True

    def graph_pool_handle(self):
        return 0

    def synchronize(self):
        pass

    reset_peak_memory_stats = synchronize

    def memory_allocated(self):
        return 100

    def max_memory_allocated(self):
        return 700


class Benchmark:
    """Calls as pytest-benchmark does, timing each round by the clock."""

    def __init__(self, clock):
        self.clock, self.rounds = clock, []

    def pedantic(self, target, setup=None, rounds=1, warmup_rounds=0):
        for n in range(warmup_rounds + rounds):
            args, kwargs = (setup() if setup else None) or ((), {})
            start = self.clock()
            target(*args, **kwargs)
            self.rounds += [self.clock() - start] * (n >= warmup_rounds)
        median = sorted(self.rounds)[len(self.rounds) // 2]
        self.stats = types.SimpleNamespace(stats=types.SimpleNamespace(median=median, iqr=0.0))


@pytest.fixture
def calls():
    def a_call(i):
        x = torch.full((4,), float(i), requires_grad=True)
        return measure.Call(lambda: x * x, [x], torch.ones(4))

    return [a_call(i) for i in range(5)]


def timed(monkeypatch, calls, which, **world):
    world = Pretended(**world)
    monkeypatch.setattr(measure.torch, "cuda", world)
    monkeypatch.setattr(measure, "flush", lambda: lambda: world.log.append("flush"))
    clock = measure.DeviceClock()
    benchmark = Benchmark(clock)
    return measure.measure(benchmark, clock, calls, which), world.log, benchmark


@pytest.mark.parametrize("which", measure.PASSES)
def test_a_graph_of_all_inputs_is_divided_by_their_number(monkeypatch, calls, which):
    found, _, benchmark = timed(monkeypatch, calls, which)
    assert found["method"] == "graph" and len(benchmark.rounds) == measure.ROUNDS
    assert found["seconds"] == pytest.approx(1e-3 / len(calls))
    assert found["wall_seconds"] == pytest.approx(1e-3)
    assert found["peak_memory"] == 600
    assert ("saved_memory" in found) == (which != "forward")


@pytest.mark.parametrize(
    "which, before, inside",
    [
        ("forward", ["flush"], ["replay graph 0"]),
        ("backward", ["replay graph 0", "flush"], ["replay graph 1"]),
        ("forward+backward", ["flush"], ["replay graph 0", "replay graph 1"]),
    ],
)
def test_each_round_starts_cold_and_runs_what_it_should(monkeypatch, calls, which, before, inside):
    _, log, _ = timed(monkeypatch, calls, which)
    rounds = [*before, *inside]
    assert log[-2 * len(rounds) :] == 2 * rounds


def test_without_a_graph_events_are_used_and_said(monkeypatch, calls):
    for which in measure.PASSES:
        found, log, _ = timed(monkeypatch, calls, which, refuse_capture=True)
        assert found["method"] == "events" and found["seconds"] == pytest.approx(1e-3)
        assert "flush" in log and not any(entry.startswith("replay") for entry in log)


def test_an_error_of_the_operation_is_not_taken_for_a_failed_capture(monkeypatch, calls):
    def broken():
        raise RuntimeError("illegal memory access")

    calls[1].function = broken
    with pytest.raises(RuntimeError, match="illegal memory access"):
        timed(monkeypatch, calls, "forward")


def test_inputs_together_are_twice_the_cache(monkeypatch):
    monkeypatch.setattr(measure.torch, "cuda", Pretended())
    assert [measure.sets_of_inputs(n) for n in (10, 300, 10_000)] == [200, 7, 4]


def test_a_step_is_timed_between_events(monkeypatch):
    world = Pretended()
    monkeypatch.setattr(measure.torch, "cuda", world)
    found = measure.measure_step(Benchmark(measure.DeviceClock()), lambda: None)
    assert found == {"seconds": pytest.approx(1e-3), "iqr_seconds": 0.0, "peak_memory": 700, "method": "events"}
