"""CUDA graphs of what is timed, and a process that goes on where one cannot be captured."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence

import torch

LOST = "this process has lost its GPU"
TIMES = 3  # a first call may compile, allocate or create handles, which no capture allows


class NotCapturable(RuntimeError):
    """What was to be captured waits for the device, or does something else that no graph can hold."""


def warm(runs: Sequence[Callable[[], object]]) -> None:
    """Run what is to be captured on a stream of its own, the first once more so that any wait for the device raises.

    Raises:
        NotCapturable: It waits for the device; said before any capture, for a failed one spoils the process.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in (*runs, *runs[:1] * (TIMES - 1)):
            run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            runs[0]()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise NotCapturable(str(error)) from None
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)


@contextlib.contextmanager
def graph(into, pool=None) -> Iterator[None]:
    """As ``torch.cuda.graph``, but after a failure others can be captured, memory given back and numbers drawn.

    Raises:
        NotCapturable: CUDA refused something that was to be captured.
    """
    stream, pool = torch.cuda.current_stream(), pool or torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(into, pool=pool):
            yield
    except RuntimeError as error:
        _clear_up(stream, pool)
        if "captur" not in str(error):
            raise
        healthy()
        raise NotCapturable(str(error).splitlines()[0]) from None


def _clear_up(stream, pool) -> None:
    """What PyTorch before 2.12 leaves undone where a capture ends with an error."""
    torch.cuda.set_stream(stream)
    with contextlib.suppress(RuntimeError):  # this capture was ended
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    fresh = torch.Generator("cuda").manual_seed(generator.initial_seed())  # its own still believes in the capture
    generator.graphsafe_set_state(fresh.graphsafe_get_state())
    gc.collect()  # the graph, and what it was to write


def healthy() -> None:
    """Nothing, if this process can still use its GPU.

    Raises:
        RuntimeError: It cannot, and nothing but another process will.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()
    torch.rand(1, device="cuda")
    torch.cuda.synchronize()
