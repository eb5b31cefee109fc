"""The way a call is timed on a GPU, walked through with a GPU that is only pretended."""

import contextlib
import types

import pytest
import torch

from benchmarks import capture, measure


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

    def set_sync_debug_mode(self, mode):
        self.log.append(f"waits: {mode}")

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
        return types.SimpleNamespace(L2_cache_size=self.L2, pci_domain_id=0, pci_bus_id=0x9B, pci_device_id=0)

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
        self.stats = types.SimpleNamespace(stats=types.SimpleNamespace(median=median, iqr=0.0, data=self.rounds))


@pytest.fixture(autouse=True)
def _clock_rate(monkeypatch):
    monkeypatch.setattr(measure, "_sm_mhz", lambda: 1980)
    monkeypatch.setattr(measure, "LONGEST", 1e9)  # a busy CPU takes what a GPU would not
    monkeypatch.setattr(capture, "_clear_up", lambda stream, pool: None)
    monkeypatch.setattr(capture, "healthy", lambda: None)


@pytest.fixture
def calls():
    def a_call(i):
        x = torch.full((4,), float(i), requires_grad=True)
        return measure.Call(lambda: x * x, [x], torch.ones(4))

    return [a_call(i) for i in range(5)]


def timed(monkeypatch, calls, which, options=None, world=None, **made):
    world = world or Pretended(**made)
    monkeypatch.setattr(measure.torch, "cuda", world)
    monkeypatch.setattr(measure, "flush", lambda: lambda: world.log.append("flush"))
    clock = measure.DeviceClock()
    benchmark = Benchmark(clock)
    return measure.measure(benchmark, clock, calls, which, **(options or {})), world.log, benchmark


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


def test_the_cache_is_flushed_before_a_round(monkeypatch):
    monkeypatch.setattr(measure.torch, "cuda", Pretended())
    written = []
    monkeypatch.setattr(measure.torch.Tensor, "zero_", lambda junk: written.append(junk.nbytes) or junk)
    assert measure.flush("cpu")() is None and written == [4 * Pretended.L2]


def test_without_a_graph_events_are_used_and_said(monkeypatch, calls):
    for which in measure.PASSES:
        found, log, _ = timed(monkeypatch, calls, which, refuse_capture=True)
        assert found["method"] == "events" and found["seconds"] == pytest.approx(1e-3)
        assert "flush" in log and not any(entry.startswith("replay") for entry in log)


def test_what_waits_for_the_device_is_never_captured(monkeypatch, calls):
    world = Pretended()
    plain = calls[0].function

    def waits():
        if world.log[-1:] == ["waits: error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        return plain()

    calls[0].function = waits
    found, log, _ = timed(monkeypatch, calls, "forward", world=world)
    assert found["method"] == "events" and log.count("waits: default") == 1 and not any("graph" in e for e in log)


def test_every_input_has_run_before_it_is_captured(monkeypatch, calls):
    world, ran = Pretended(), set()
    for i, call in enumerate(calls):
        call.function = lambda i=i, plain=call.function: (ran.add(i), plain())[1]

    @contextlib.contextmanager
    def graph(graph, pool):
        assert ran == set(range(len(calls)))  # a first call may compile
        yield

    world.graph = graph
    timed(monkeypatch, calls, "forward", world=world)


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
    assert found == {
        "seconds": pytest.approx(1e-3), "iqr_seconds": 0.0, "p10_seconds": pytest.approx(1e-3),
        "p90_seconds": pytest.approx(1e-3), "rounds": 20, "peak_memory": 700, "method": "events", "sm_mhz": 1980,
    }  # fmt: skip


def test_a_step_is_timed_in_turn_with_another_made_after_its_memory_is_known(monkeypatch):
    world, log = Pretended(), []
    monkeypatch.setattr(measure.torch, "cuda", world)
    monkeypatch.setattr(world, "max_memory_allocated", lambda: log.append("memory") or 700, raising=False)

    def another():
        log.append("made")
        return lambda: log.append("beside")

    options = dict(beside=another, samples=8, rounds=3, warm_ups=1)
    found = measure.measure_step(Benchmark(measure.DeviceClock()), lambda: log.append("step"), **options)
    assert log == ["step", "step", "memory", "made", *["beside", "step"] * 4]
    assert found["beside_seconds"] == pytest.approx(1e-3) and found["samples_per_second"] == pytest.approx(8000)
    assert found["rounds"] == 3


def test_a_captured_step_says_what_it_held_and_is_replayed(monkeypatch):
    world, log = Pretended(), []
    monkeypatch.setattr(measure.torch, "cuda", world)
    held = lambda graph, pool: contextlib.nullcontext(log.append("capture"))  # noqa: E731
    monkeypatch.setattr(world, "graph", held, raising=False)
    replay, peak = measure.captured_step(lambda: log.append("step"))
    assert log == ["step"] * 4 + ["capture", "step"] and peak == 700
    replay()
    assert world.log[-2:] == ["new graph 0", "replay graph 0"] and len(log) == 6


def pairs(calls):
    """The same calls with two outputs each, as of HarMA's two losses."""
    return [
        measure.Call(lambda c=c: (c.function(), c.leaves[0].sum()), c.leaves, (c.dy, torch.ones(()))) for c in calls
    ]


def test_several_losses_are_one_call(monkeypatch, calls):
    both = pairs(calls)[1].both()
    assert torch.equal(both[0], torch.full((4,), 3.0))  # 2 x + 1
    found, _, _ = timed(monkeypatch, pairs(calls), "forward+backward")
    assert found["saved_memory"] == -(4 + 1) * 4, "both outputs are left out"


@pytest.mark.parametrize("graph", (True, False))
@pytest.mark.parametrize("which", measure.PASSES)
def test_ours_runs_before_every_round_of_another(monkeypatch, calls, which, graph):
    found, log, benchmark = timed(
        monkeypatch, calls, which, dict(beside=pairs(calls[:2]), graph=graph, rounds=7, warm_ups=2)
    )
    assert len(benchmark.rounds) == found["rounds"] == 7 and ("wall_seconds" in found) == graph
    assert found["beside_seconds"] == pytest.approx(1e-3 / 2 if graph else 1e-3)
    if not graph:
        assert found["method"] == "events" and "captured graph 0" not in log
    elif which == "forward":  # theirs is captured first, ours is graph 2
        assert log[-4:] == ["flush", "replay graph 2", "flush", "replay graph 0"]


def test_ours_is_not_compared_by_another_method(monkeypatch, calls):
    captures = iter((True, False))

    def captured(calls, which):
        if next(captures):
            return list, lambda: None
        raise capture.NotCapturable("operation not permitted when stream is capturing")

    monkeypatch.setattr(measure, "_captured", captured)
    found, _, _ = timed(monkeypatch, calls, "forward", dict(beside=calls))
    assert found["method"] == "graph" and "beside_seconds" not in found


def test_a_hot_cache_is_one_input_again_and_again(monkeypatch, calls):
    seen = []
    captured = measure._captured
    monkeypatch.setattr(measure, "_captured", lambda calls, which: seen.append(calls) or captured(calls, which))
    found, log, _ = timed(monkeypatch, calls, "backward", dict(hot=True))
    assert found["hot_seconds"] == pytest.approx(1e-3 / len(calls)) and seen == [calls, [calls[0]] * len(calls)]
    assert log[-2:] == ["replay graph 2", "replay graph 3"], "nothing is flushed between"


def test_the_clock_is_that_of_the_gpu_in_use_and_unknown_where_nothing_tells_it(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(measure.torch, "cuda", Pretended())

    def handle(place, device):
        assert place == b"00000000:9B:00.0"
        return 0

    def clock(device, which, mhz):
        assert which == 1
        mhz._obj.value = 1755
        return answers.pop()

    nvml = types.SimpleNamespace(
        nvmlInit_v2=lambda: 0, nvmlDeviceGetHandleByPciBusId_v2=handle, nvmlDeviceGetClockInfo=clock
    )
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: nvml)
    answers = [3, 0]
    assert measure._sm_mhz() == 1755
    assert measure._sm_mhz() is None, "it was refused"

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(measure.ctypes, "CDLL", missing)
    assert measure._sm_mhz() is None


def test_long_calls_have_few_rounds(monkeypatch, calls):
    monkeypatch.setattr(measure, "LONGEST", 10.0)
    assert measure.affordable(1e-5, 50, 5) == (50, 5) and measure.affordable(0.3, 50, 5) == (33, 5)
    assert measure.affordable(1.0, 50, 5) == (10, 2) and measure.affordable(7.5, 3, 1) == (2, 0)
    monkeypatch.setattr(measure, "affordable", lambda seconds, rounds, warm_ups: (2, 0) if seconds > 0 else None)
    found, _, _ = timed(monkeypatch, calls, "backward", dict(beside=calls))
    assert found["rounds"] == 2 and found["beside_seconds"] == pytest.approx(1e-3 / len(calls))


def test_memory_is_not_that_of_compiling(monkeypatch, calls):
    world, log = Pretended(), []
    monkeypatch.setattr(measure.torch, "cuda", world)
    monkeypatch.setattr(world, "memory_allocated", lambda: log.append("before") or 0, raising=False)
    calls[0].function = lambda: log.append("run")
    measure.memory(calls[0], "forward")
    assert log == ["run", "before", "run"], "compiled for a forward without gradients before it is watched"


@pytest.mark.parametrize("refuse_capture", (False, True))
def test_a_graph_is_launched_while_the_cache_is_emptied(monkeypatch, calls, refuse_capture):
    """Else a GPU that has nothing to do waits for the launch, and the time of it is counted."""
    world = Pretended(refuse_capture)
    monkeypatch.setattr(world, "synchronize", lambda: world.log.append("wait"), raising=False)
    _, log, _ = timed(monkeypatch, calls, "forward", dict(beside=pairs(calls)), world=world)
    if refuse_capture:
        assert log[-4:] == ["flush", "wait", "flush", "wait"]
    else:
        assert log[-4:] == ["flush", "replay graph 2", "flush", "replay graph 0"]


def test_what_an_eager_caller_waits_for_is_measured_before_anything_is_captured(monkeypatch, calls):
    _, log, _ = timed(monkeypatch, calls, "backward")
    assert "flush" in log[: log.index("new graph 0")]


def test_four_products_are_counted_in_chunks(monkeypatch):
    made = []

    def seconds(run):
        run()
        return 1.0

    def addmm(total, a, b, *, out_dtype, out):
        made.append((a.shape[0], b.shape[1], a.shape[1]))
        assert out is total and total.dtype == out_dtype == torch.float32 and b.shape[0] == a.shape[1]

    mm = torch.mm
    monkeypatch.setattr(
        measure.torch, "mm", lambda a, b, out: made.append((*out.shape, a.shape[1])) or mm(a, b, out=out)
    )
    monkeypatch.setattr(measure.torch, "addmm", addmm)
    monkeypatch.setattr(measure, "event_seconds", seconds)
    assert measure.gemm_seconds(65536, 512, device="meta") == {"forward": 1.0, "backward": 1.0 + 8 + 8}
    assert made == [(65536, 65536, 512), (8192, 512, 65536), (65536, 512, 8192)]
    assert measure.gemm_seconds(1 << 20, 512, device="meta") == {"forward": 128.0, "backward": 3 * 128.0}
    assert measure.gemm_seconds(428, 512, device="meta") == {"forward": 1.0, "backward": 3.0}
