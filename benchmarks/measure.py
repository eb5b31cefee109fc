"""How one call is timed: device clock, cold cache, graphs, memory."""

import ctypes
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import capture

PASSES = ("forward+backward", "forward", "backward")
ROUNDS, WARM_UPS = 50, 5
LONGEST = 10.0  # seconds for the rounds of one row


class DeviceClock:
    """pytest-benchmark timer that advances by a round's GPU time, divided by its calls; wall time without a GPU.

    Called before a round and after it. Unless it ``waits``, a round is launched while the GPU still empties its cache,
    so that no launch of a graph is counted.
    """

    def __init__(self):
        self.now, self.start, self.calls, self.waits = 0.0, None, 1, True

    def __call__(self) -> float:
        if not torch.cuda.is_available():
            return time.perf_counter()
        if self.start is None:
            self.start = _event(self.waits)
        else:
            self.now += _since(self.start) / self.calls
            self.start = None
        return self.now


@dataclasses.dataclass
class Call:
    """One implementation on one set of inputs."""

    function: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: Sequence[Tensor]  # what gradients are taken of
    dy: Tensor | tuple[Tensor, ...]  # of each output

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        return self.function()

    def backward(self, y) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, self.dy)

    def both(self) -> tuple[Tensor, ...]:
        return self.backward(self.forward())


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def sets_of_inputs(bytes_of_one: int) -> int:
    """Inputs to rotate among, so that none is in the cache when its turn comes again; four at least."""
    return max(4, -(-2 * l2_bytes() // max(bytes_of_one, 1))) if torch.cuda.is_available() else 1


def flush(device: str = "cuda") -> Callable[[], None]:
    """What empties the L2 cache: writes four times its size."""
    if not torch.cuda.is_available():
        return lambda: None
    junk = torch.empty(4 * l2_bytes(), dtype=torch.uint8, device=device)

    def run() -> None:
        junk.zero_()

    return run


def event_seconds(run: Callable, setup: Callable = tuple, rounds: int = 20) -> float:
    """Median seconds between two events around ``run(*setup())``, launch gaps included."""
    took = [_between_events(run, setup()) for _ in range(rounds + 3)]
    return statistics.median(took[3:])


def _between_events(run: Callable, args: tuple, waits: bool = True) -> float:
    start = _event(waits)
    run(*args)
    return _since(start)


def _event(waits: bool):
    """A point in the GPU's time; all that comes before it is done, if it ``waits``."""
    event = torch.cuda.Event(enable_timing=True)
    if waits:
        torch.cuda.synchronize()
    event.record()
    return event


def _since(start) -> float:
    """Seconds from then until all is done that was launched."""
    stop = _event(False)
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def memory(call: Call, which: str) -> tuple[dict[str, int], float]:
    """Peak bytes above the inputs in a run of its own, with a backward also what forward saves for it; its seconds."""
    if which == "forward":
        with torch.no_grad():
            call.forward()  # without gradients it may be compiled once more, and what that takes is not its own
    gc.collect()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = {}
    if which == "forward":
        with torch.no_grad():
            call.forward()
    else:
        y = call.forward()
        outputs = y if isinstance(y, tuple) else (y,)
        found["saved_memory"] = torch.cuda.memory_allocated() - before - sum(t.nbytes for t in outputs)
        call.backward(y)
    torch.cuda.synchronize()
    return found | {"peak_memory": torch.cuda.max_memory_allocated() - before}, time.perf_counter() - begun


def affordable(seconds: float, rounds: int, warm_ups: int) -> tuple[int, int]:
    """Rounds, two at least, and warm-ups of a call that takes so long: about LONGEST seconds in all."""
    fit = int(LONGEST / max(seconds, 1e-9))
    return max(min(rounds, fit), 2), min(warm_ups, fit // 4)


def _captured(calls: Sequence[Call], which: str) -> tuple[Callable, Callable]:
    """(setup, run) that replay CUDA graphs of all calls; gradients are captured as torch's graphed callables are."""
    capture.warm([torch.no_grad()(call.forward) if which == "forward" else call.both for call in calls])
    forward, backward, pool = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with capture.graph(forward, pool), torch.set_grad_enabled(which != "forward"):
        outputs = [call.forward() for call in calls]
    if which == "forward":
        return lambda: outputs and None, forward.replay
    with capture.graph(backward, pool):
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


def _runner(calls: Sequence[Call], which: str, graph: bool) -> tuple[Callable, Callable, int, str]:
    """(setup, run, calls in a run, method): graphs of all calls, or the first alone where there is no graph."""
    if graph:
        try:
            return *_captured(calls, which), len(calls), "graph"
        except capture.NotCapturable as error:
            print(f"no graph: {error}")
    return *_eager(calls[0], which), 1, "events"


def measure(
    benchmark, clock: DeviceClock, calls: Sequence[Call], which: str, *,
    beside: Sequence[Call] = (), graph: bool = True, hot: bool = False, rounds: int = ROUNDS, warm_ups: int = WARM_UPS,
) -> dict:  # fmt: skip
    """Time one pass of an implementation; on a machine without a GPU run it once.

    ``seconds`` is device time a call: all inputs in one CUDA graph, divided, from a cold cache. ``wall_seconds`` is
    what an eager caller waits for: one call between two events, launch gaps included. Where no graph is or can be
    captured ``seconds`` is the latter, and ``method`` says so.

    Args:
        benchmark: The fixture.
        clock: The one its marker carries.
        calls: The same implementation on several inputs; see :func:`sets_of_inputs`.
        which: One of PASSES.
        beside: Another implementation, run before each round in the same way: ``beside_seconds`` is its median.
        graph: False for calls so long that launches do not count, and so large that several do not fit.
        hot: Also ``hot_seconds``, of a graph of one input again and again.
        rounds: Timed rounds, if they are :func:`affordable`.
        warm_ups: Rounds before them.
    """
    plain_setup, plain = _eager(calls[0], which)
    if not torch.cuda.is_available():
        benchmark.pedantic(lambda: plain(*plain_setup()))
        return {}
    cold = flush()
    found, one = memory(calls[0], which)
    rounds, warm_ups = affordable(one, rounds, warm_ups)
    if graph:  # before the capture: autograd would wait for the stream of nodes that it keeps
        few, _ = affordable(4 * one, 20, 0)
        found["wall_seconds"] = event_seconds(plain, lambda: _then(plain_setup, cold), few)
    setup, run, clock.calls, found["method"] = _runner(calls, which, graph)
    clock.waits, took = found["method"] != "graph", []
    if beside:
        other_setup, other, others, method = _runner(beside, which, found["method"] == "graph")
        beside = beside if method == found["method"] else ()

    def cold_setup():
        if beside:
            took.append(_between_events(other, _then(other_setup, cold), clock.waits) / others)
        return _then(setup, cold), {}

    benchmark.pedantic(run, setup=cold_setup, rounds=rounds, warmup_rounds=warm_ups)
    if took:
        found["beside_seconds"] = statistics.median(took[warm_ups:])
    if hot and found["method"] == "graph":
        again, run, count, _ = _runner([calls[0]] * len(calls), which, graph)
        found["hot_seconds"] = event_seconds(run, lambda: again() or ()) / count
    return found | _summary(benchmark) | {"sm_mhz": _sm_mhz()}


def _then(setup: Callable, cold: Callable) -> tuple:
    """Arguments that ``setup`` makes, the cache emptied after it."""
    args = setup() or ()
    cold()
    return args


def _summary(benchmark) -> dict:
    stats = benchmark.stats.stats
    tenths = statistics.quantiles(stats.data, n=10, method="inclusive")
    found = {"seconds": stats.median, "iqr_seconds": stats.iqr, "rounds": len(stats.data)}
    return found | {"p10_seconds": tenths[0], "p90_seconds": tenths[-1]}


def _sm_mhz() -> int | None:
    """Clock of the multiprocessors right after a measurement; None where it cannot be asked for."""
    device, mhz = ctypes.c_void_p(), ctypes.c_uint()
    p = torch.cuda.get_device_properties(0)
    place = f"{p.pci_domain_id:08X}:{p.pci_bus_id:02X}:{p.pci_device_id:02X}.0".encode()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")  # nvidia-smi would take a good part of a second
    except OSError:
        return None
    sm = 1  # NVML_CLOCK_SM
    refused = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByPciBusId_v2(place, ctypes.byref(device))
        or nvml.nvmlDeviceGetClockInfo(device, sm, ctypes.byref(mhz))
    )
    return None if refused else mhz.value


def measure_step(
    benchmark, run: Callable[[], object], *, beside: Callable[[], Callable] | None = None, samples: int | None = None,
    rounds: int = 20, warm_ups: int = WARM_UPS,
) -> dict:  # fmt: skip
    """Time a whole step between two events; on a machine without a GPU run it once.

    Args:
        benchmark: The fixture.
        run: The step.
        beside: Makes another one, once the memory of this is measured; run before each round, ``beside_seconds`` is
            its median.
        samples: In a step, for ``samples_per_second``.
        rounds: Timed rounds.
        warm_ups: Rounds before them.
    """
    if not torch.cuda.is_available():
        benchmark.pedantic(run)
        return {}
    gc.collect()
    run()  # a first one allocates what stays, and may compile
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()  # of everything, the model included
    other, took = None if beside is None else beside(), []

    def setup():
        if other is not None:
            took.append(_between_events(other, ()))

    benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=warm_ups)
    found = _summary(benchmark) | {"peak_memory": peak, "method": "events"}
    found |= {"beside_seconds": statistics.median(took[warm_ups:])} if took else {}
    found |= {"samples_per_second": samples / found["seconds"]} if samples else {}
    return found | {"sm_mhz": _sm_mhz()}


def captured_step(step: Callable[[], object]) -> tuple[Callable[[], None], int | None]:
    """A training step as one CUDA graph, and the bytes that were allocated while it was captured, at most.

    What the graph needs stays in a pool of its own, so at a replay nothing of it is counted. Without a GPU the step
    itself, and None.
    """
    if not torch.cuda.is_available():
        return step, None
    capture.warm([step])  # what the optimizer keeps is made in the first
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with capture.graph(graph):
        step()
    return graph.replay, torch.cuda.max_memory_allocated()


def facts() -> dict[str, float]:
    """What percentages refer to, and what a launch costs; benchmarks/facts.py measures more of the machine."""
    gib = 2**30
    source = torch.empty(4 * gib, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = event_seconds(functools.partial(target.copy_, source))
    found = {"copy_bytes_per_second": 2 * source.nbytes / seconds}
    found["empty_event_pair_seconds"] = event_seconds(lambda: None)
    one = torch.zeros(1, device="cuda")
    found["one_small_launch_seconds"] = event_seconds(lambda: one.add_(1))
    return found


def gemm_seconds(n: int, d: int, chunk: int = 8192, device: str = "cuda") -> dict[str, float]:
    """What cuBLAS takes for the four bf16 products of a loss that recomputes S = I T^T in its backward.

    S in either pass; G T of ``chunk`` rows of the gradient at a time, and G^T I added to an fp32 sum. Where S is too
    large, its products are timed a chunk at a time too.

    Returns:
        Seconds of the ``forward`` product, and of the three of the ``backward``.
    """
    chunk, rows = min(n, chunk), n if n <= 65536 else min(n, chunk)
    image, text = (torch.randn(n, d, dtype=torch.bfloat16, device=device) for _ in range(2))
    scores = torch.empty(rows, n, dtype=torch.bfloat16, device=device)
    part, total = torch.empty_like(image[:chunk]), torch.zeros(n, d, device=device)
    of_scores = event_seconds(lambda: torch.mm(image[:rows], text.mT, out=scores)) * n / rows
    g = scores[:chunk]
    of_image = event_seconds(lambda: torch.mm(g, text, out=part)) * n / chunk
    add = functools.partial(torch.addmm, total, g.mT, image[:chunk], out_dtype=torch.float32, out=total)
    of_text = event_seconds(add) * n / chunk
    return {"forward": of_scores, "backward": of_scores + of_image + of_text}
