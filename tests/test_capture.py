"""What is put right after a CUDA graph that could not be captured, told by what is asked of PyTorch."""

import contextlib
import types

import pytest
import torch

from benchmarks import capture


class World:
    """Stands for ``torch``; a capture changes the current stream and, where it fails, leaves it changed."""

    def __init__(self, fails_at_its_end=False, spoilt=False):
        self.log, self.stream, self.fails, self.spoilt = [], "main", fails_at_its_end, spoilt
        self._C = types.SimpleNamespace(
            _cuda_endAllocateToPool=self.end_pool,
            _cuda_releasePool=lambda device, pool: self.log.append(f"released {pool}"),
            _host_emptyCache=lambda: None,
        )
        generator = types.SimpleNamespace(initial_seed=lambda: 5, graphsafe_set_state=self.log.append)
        self.cuda = types.SimpleNamespace(
            graph=self.graph, current_stream=lambda: self.stream, set_stream=lambda s: setattr(self, "stream", s),
            graph_pool_handle=lambda: "own", current_device=lambda: 0, default_generators=[generator],
            synchronize=lambda: None, empty_cache=self.empty_cache,
        )  # fmt: skip

    def Generator(self, device):
        fresh = types.SimpleNamespace(manual_seed=lambda seed: fresh.__setattr__("seed", seed) or fresh)
        fresh.graphsafe_get_state = lambda: f"fresh, seed {fresh.seed}"
        return fresh

    def rand(self, n, device):
        self.log.append("drawn")

    @contextlib.contextmanager
    def graph(self, into, pool):
        self.stream = "capturing"
        try:
            yield
        finally:
            if self.fails:
                raise torch.AcceleratorError("operation failed due to a previous error during capture\nmore")
            self.stream = "main"

    def end_pool(self, device, pool):
        if not self.fails:
            raise RuntimeError("not currently recording to this pool")
        self.log.append(f"ended {pool}")

    def empty_cache(self):
        if self.spoilt:
            raise RuntimeError("an illegal memory access was encountered")


def test_a_failed_capture_leaves_nothing_behind(monkeypatch):
    world = World(fails_at_its_end=True)
    monkeypatch.setattr(capture, "torch", world)
    with pytest.raises(capture.NotCapturable, match="previous error during capture$"), capture.graph(None, "pool"):
        raise RuntimeError("operation not permitted when stream is capturing")
    ended, released, state, drawn = world.log
    assert (ended, released, drawn) == ("ended pool", "released pool", "drawn") and world.stream == "main"
    assert state == "fresh, seed 5", "random numbers come from a state that knows of no capture"


def test_an_error_within_a_capture_that_ends_well_is_itself(monkeypatch):
    world = World()
    monkeypatch.setattr(capture, "torch", world)
    with pytest.raises(RuntimeError, match="shapes differ"), capture.graph(None):
        raise RuntimeError("shapes differ")
    assert not any(str(said).startswith(("ended", "released")) for said in world.log), "the graph gives its pool back"


def test_a_process_that_cannot_go_on_says_so(monkeypatch):
    monkeypatch.setattr(capture, "torch", World(fails_at_its_end=True, spoilt=True))
    with pytest.raises(RuntimeError, match="illegal memory access"), capture.graph(None):
        pass
