"""How one call is timed: device clock, cold cache, graphs, memory."""

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PASSES = ("forward+backward", "forward", "backward")
ROUNDS, WARM_UPS = 50, 5


class DeviceClock:
    """pytest-benchmark timer that advances by GPU time, divided by the calls in a round; wall time without a GPU."""

    def __init__(self):
        self.now, self.last, self.calls = 0.0, None, 1

    def __call__(self) -> float:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:
            self.now += self.last.elapsed_time(event) / 1e3 / self.calls  # ms -> s
        self.last = event
        return self.now


@dataclasses.dataclass
class Call:
    """One implementation on one set of inputs."""

    function: Callable[[], Tensor]
    leaves: Sequence[Tensor]  # what gradients are taken of
    dy: Tensor

    def forward(self) -> Tensor:
        return self.function()

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, self.dy)

    def both(self) -> tuple[Tensor, ...]:
        return self.backward(self.forward())


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def sets_of_inputs(bytes_of_one: int) -> int:
    """Inputs to rotate among, so that none is in the cache when its turn comes again; four at least."""
    return max(4, -(-2 * l2_bytes() // max(bytes_of_one, 1))) if torch.cuda.is_available() else 1


def flush() -> Callable[[], None]:
    """What empties the L2 cache: writes four times its size."""
    if not torch.cuda.is_available():
        return lambda: None
    junk = torch.empty(4 * l2_bytes(), dtype=torch.uint8, device="cuda")
    return lambda: junk.zero_() and None


def event_seconds(run: Callable, setup: Callable = tuple, rounds: int = 20) -> float:
    """Median seconds between two events around ``run(*setup())``, launch gaps included."""
    took = []
    for _ in range(rounds + 3):
        args = setup()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run(*args)
        stop.record()
        stop.synchronize()
        took.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(took[3:])


def memory(call: Call, which: str) -> dict[str, int]:
    """Peak bytes above the inputs in a run of its own; with a backward also what forward saves for it."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = {}
    if which == "forward":
        with torch.no_grad():
            call.forward()
    else:
        y = call.forward()
        found["saved_memory"] = torch.cuda.memory_allocated() - before - y.nbytes
        call.backward(y)
    torch.cuda.synchronize()
    return found | {"peak_memory": torch.cuda.max_memory_allocated() - before}


def _captured(calls: Sequence[Call], which: str) -> tuple[Callable, Callable]:
    """(setup, run) that replay CUDA graphs of all calls; gradients are captured as torch's graphed callables are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # a first call may compile, allocate or create handles, which no capture allows
            for call in calls[:2]:
                if which == "forward":
                    with torch.no_grad():
                        call.forward()
                else:
                    call.both()
    torch.cuda.current_stream().wait_stream(side)
    forward, backward, pool = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with torch.cuda.graph(forward, pool=pool), torch.set_grad_enabled(which != "forward"):
        outputs = [call.forward() for call in calls]
    if which == "forward":
        return lambda: outputs and None, forward.replay
    with torch.cuda.graph(backward, pool=pool):
        gradients = [call.backward(y) for call, y in zip(calls, outputs, strict=True)]
    if which == "backward":
        return lambda: gradients and forward.replay(), backward.replay
    return lambda: gradients and None, lambda: (forward.replay(), backward.replay())


def _eager(call: Call, which: str) -> tuple[Callable, Callable]:
    """(setup, run) of one plain call."""
    if which == "forward":
        return tuple, torch.no_grad()(call.forward)
    if which == "backward":
        return lambda: (call.forward(),), call.backward
    return tuple, call.both


def measure(benchmark, clock: DeviceClock, calls: Sequence[Call], which: str) -> dict:
    """Time one pass of an implementation; on a machine without a GPU run it once.

    ``seconds`` is device time a call: all inputs in one CUDA graph, divided, from a cold cache. ``wall_seconds`` is
    what an eager caller waits for: one call between two events, launch gaps included. Where no graph can be
    captured ``seconds`` is the latter, and ``method`` says so.

    Args:
        benchmark: The fixture.
        clock: The one its marker carries.
        calls: The same implementation on several inputs; see :func:`sets_of_inputs`.
        which: One of PASSES.
    """
    setup, run = _eager(calls[0], which)
    if not torch.cuda.is_available():
        benchmark.pedantic(lambda: run(*setup()))
        return {}
    cold = flush()
    found = memory(calls[0], which)

    def cold_setup():
        args = setup()
        cold()
        return args

    found["wall_seconds"] = event_seconds(run, cold_setup)
    try:
        graph_setup, graph_run = _captured(calls, which)
        clock.calls, found["method"] = len(calls), "graph"

        def cold_graph_setup():
            graph_setup()
            cold()

        benchmark.pedantic(graph_run, setup=cold_graph_setup, rounds=ROUNDS, warmup_rounds=WARM_UPS)
    except RuntimeError as error:
        if "captur" not in str(error):
            raise
        found["method"] = "events"
        benchmark.pedantic(run, setup=lambda: (cold_setup(), {}), rounds=ROUNDS, warmup_rounds=WARM_UPS)
    stats = benchmark.stats.stats
    return found | {"seconds": stats.median, "iqr_seconds": stats.iqr}


def measure_step(benchmark, run: Callable[[], object]) -> dict:
    """Time a whole training step between two events; on a machine without a GPU run it once."""
    if not torch.cuda.is_available():
        benchmark.pedantic(run)
        return {}
    benchmark.pedantic(run, rounds=20, warmup_rounds=WARM_UPS)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    stats, peak = benchmark.stats.stats, torch.cuda.max_memory_allocated()  # of everything, the model included
    return {"seconds": stats.median, "iqr_seconds": stats.iqr, "peak_memory": peak, "method": "events"}


def facts() -> dict[str, float]:
    """What the machine itself does: the ceilings that percentages refer to. Rates of random bf16 products."""
    gib = 2**30
    source = torch.empty(4 * gib, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = event_seconds(functools.partial(target.copy_, source))
    found = {"copy_bytes_per_second": 2 * source.nbytes / seconds}
    del source, target
    # a large square product, then the adapter's own: down, in_proj and up of ViT-B/16 at a batch of 256
    for m, k, n in ((8192, 8192, 8192), (50432, 768, 128), (50432, 128, 384), (50432, 128, 768)):
        a, b = (torch.randn(s, dtype=torch.bfloat16, device="cuda") for s in ((m, k), (k, n)))
        found[f"matmul_{m}x{k}x{n}_flops_per_second"] = 2 * m * k * n / event_seconds(functools.partial(torch.mm, a, b))
    found["empty_event_pair_seconds"] = event_seconds(lambda: None)
    one = torch.zeros(1, device="cuda")
    found["one_small_launch_seconds"] = event_seconds(lambda: one.add_(1))
    return found
