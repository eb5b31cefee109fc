"""Seconds and peak memory of a piece of work."""

import ctypes
import gc
import os
import sys
import threading
import time
from pathlib import Path

import torch


class Measure:
    """Times a ``with`` block and watches the memory it takes on top of what was held before.

    On a GPU ``peak_memory`` is the peak of what PyTorch allocated there. On the CPU it is the growth of the process's
    resident memory, sampled every 5 ms, so a shorter peak can be missed; None where the system does not tell (it does
    on Linux).

    Example:
        >>> import torch
        >>> from rsfast.harma.measure import Measure
        >>> with Measure() as measured:
        ...     x = torch.zeros(1_000_000)
        >>> measured.seconds > 0
        True
    """

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.seconds: float = 0.0
        self.peak_memory: int | None = None  # bytes

    def __enter__(self) -> "Measure":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            _give_back_freed_memory()
            self._before = self._highest = resident_memory()
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        self._since = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.seconds = time.perf_counter() - self._since
            self.peak_memory = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self.seconds = time.perf_counter() - self._since
        self._done.set()
        self._thread.join()
        if self._before is not None:
            self.peak_memory = self._highest - self._before

    def _watch(self) -> None:
        while self._before is not None and not self._done.wait(0.005):
            self._highest = max(self._highest, resident_memory())


def resident_memory() -> int | None:
    """Bytes of this process that are in memory now; None where the system has no /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


def _give_back_freed_memory() -> None:
    # glibc keeps freed memory for the next phase, which would then seem to need less than it does
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
