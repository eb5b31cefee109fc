"""Partial sums of one factor, and of many, are added up in the same order."""

import pytest
import torch
from torch import nn

from tests.test_lora_together import Stack, grads, inputs, plain_grads

NEEDED = ("plan", "sums", "together")
plan, sums, together = (pytest.importorskip(f"rsfast.lora.kernels.{name}") for name in NEEDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adds_up_as_alone(device, dtype):
    """Sums of few and many chunks and elements, of which some have a factor, alone and together."""
    g, shapes = torch.Generator().manual_seed(0), [(1, 5, 1.0), (33, 130, 4 / 3), (70, 128, 1.0), (32, 300, 0.1)]
    parts = [torch.randn(chunks, size, generator=g).to(device) for chunks, size, _ in shapes]
    workspace = torch.cat([nn.functional.pad(p.view(-1), (0, sums.aligned(p.numel()) - p.numel())) for p in parts])
    out = torch.full((700,), float("nan"), dtype=dtype, device=device)
    table, at, start = [], 0, 3
    for part, (chunks, size, factor) in zip(parts, shapes, strict=True):
        table.append(sums.Sum(at, start, size, chunks, factor, 1, -1, 1))
        at, start = at + sums.aligned(part.numel()) // sums.ALIGN, start + size
    sums.add_up_all(workspace, out, tuple(table), None)
    assert out[:3].isnan().all() and out[start:].isnan().all()
    for part, (_, size, factor), entry in zip(parts, shapes, table, strict=True):
        actual = out[entry.out : entry.out + size]
        alone = sums.AT_ONCE.add_up(part, out.new_empty(size), plan.Batch(), None, factor=factor)
        assert torch.equal(actual, alone)
        exact = factor * part.double().sum(0)
        assert (actual - exact).abs().max() <= (torch.finfo(dtype).eps + 1e-6) * exact.abs().max()


def test_each_adapter_has_its_own(device):
    """Two partial sums for each chunk, whole numbers: the first chunk is of no adapter, then 17, none and 17."""
    part = torch.arange(70 * 130, device=device).view(70, 130).float() % 17
    last = torch.tensor([1, 18, 18, 35], dtype=torch.int32, device=device)
    actual = sums.AT_ONCE.add_up(part, part.new_zeros(3, 130), plan.Batch(ids=last), last, times=2, factor=0.5)
    assert torch.equal(actual, torch.stack([part[a:b].sum(0) / 2 for a, b in ((2, 36), (36, 36), (36, 70))]))


@pytest.fixture
def piles(monkeypatch):
    """All that are made."""
    made = []

    class Watched(together._Pile):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(together, "_Pile", Watched)
    return made


def test_no_more_memory_than_promised_and_none_afterwards(device, piles):
    model, x = Stack().to(device), inputs(device)
    expected = plain_grads(model, x)
    with together.collected([p for p in model.parameters() if p.requires_grad], max_bytes=2048):
        y = model(x)
    assert len(piles) == 1 and 0 < 4 * piles[0].expected <= 2048
    y.square().sum().backward(retain_graph=True)
    assert not piles[0].runs
    for name, grad in grads(model).items():
        if grad is not None:
            torch.testing.assert_close(grad, expected[name])


def test_what_another_stream_computes_comes_on_top(device, monkeypatch):
    """Of a layer that is used three times, once elsewhere."""
    model, x, streams = Stack().to(device), inputs(device), iter([0, 0, 1, 0])
    expected, at_once = plain_grads(model, x), []
    add_up = sums.Sums.add_up
    monkeypatch.setattr(sums.Sums, "add_up", lambda *args, **more: at_once.append(1) or add_up(*args, **more))
    with together.collected([p for p in model.parameters() if p.requires_grad], 2**20):
        y = model(x)
    monkeypatch.setattr(together, "_stream", lambda device: next(streams, 0) or None)
    y.square().sum().backward()
    assert at_once
    for name, grad in grads(model).items():
        if grad is not None:
            torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5)
