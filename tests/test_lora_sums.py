"""Partial sums of one factor, and of many, are added up in the same order."""

import pytest
import torch
from torch import nn

plan, sums = (pytest.importorskip(f"rsfast.lora.kernels.{name}") for name in ("plan", "sums"))


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
