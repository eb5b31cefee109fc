"""The gated adapter inside a training loop: autocast, checkpointing, several processes, memory."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rsfast
from rsfast.testing import assert_within_budget
from tests.cases import BF16, FP32
from tests.test_adapter import build, draw, step, with_and_without_shared


@with_and_without_shared
def test_autocast_of_a_half_input_is_a_half_input(shared, device):
    adapter = build(device, shared=shared)
    x, dy = (draw(2, 9, 24, device=device, seed=seed, dtype=BF16) for seed in (1, 2))
    y, dx, grads = step(adapter, x, dy)
    with torch.autocast(device, BF16):
        y2, dx2, grads2 = step(adapter, x, dy)
    assert y.dtype == dx.dtype == BF16 and {grad.dtype for grad in grads.values()} == {FP32}
    assert torch.equal(y, y2) and torch.equal(dx, dx2)
    assert all(torch.equal(grads[name], grads2[name]) for name in grads)


@with_and_without_shared
def test_autocast_keeps_the_dtype_of_the_input(shared, device):
    x, dy = (draw(2, 9, 24, device=device, seed=seed) for seed in (1, 2))

    def under_autocast(impl):
        with torch.autocast(device, BF16):
            return step(build(device, shared=shared, impl=impl), x, dy)

    y, dx, grads = under_autocast("fused")
    assert y.dtype == dx.dtype == FP32 and {grad.dtype for grad in grads.values()} == {FP32}
    exact = build(device, shared=shared, impl="reference").double()
    gold, eager = step(exact, x.double(), dy.double()), under_autocast("reference")
    assert not torch.equal(y, build(device, shared=shared)(x)), "the products were not taken in bf16"
    for name, *values in zip(("y", "dx"), (y, dx), gold, eager, strict=False):
        assert_within_budget(*values, terms=96, name=name)


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("impl", ("reference", "fused"))
def test_checkpointing_keeps_every_bit(impl, reentrant, device):
    adapter = build(device, shared=True, impl=impl)
    x, dy, lengths = *(draw(2, 9, 24, device=device, seed=seed) for seed in (1, 2)), torch.tensor([9, 4], device=device)
    expected = step(adapter, x, dy, lengths)
    x = x.requires_grad_()
    y = checkpoint(adapter, x, lengths, use_reentrant=reentrant)
    y.backward(dy)  # reentrant checkpointing refuses torch.autograd.grad
    assert torch.equal(y, expected[0]) and torch.equal(x.grad, expected[1])
    for name, p in adapter.named_parameters():
        assert torch.equal(p.grad, expected[2][name]), name


class Towers(nn.Module):
    """Two adapters that own one sub-adapter."""

    def __init__(self, impl):
        super().__init__()
        self.image, self.text = build("cpu", shared=True, impl=impl), build("cpu", shared=True, impl=impl, width=16)
        self.text.shared = self.image.shared

    def forward(self, image, text):
        return self.image(image).square().mean() + self.text(text).square().mean()


def batch(device):
    return draw(4, 7, 24, device=device), draw(4, 9, 16, device=device, seed=2)


def train_one_step(rank, folder, device):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    towers = Towers("fused").to(device)
    model = nn.parallel.DistributedDataParallel(towers)
    model(*(t[2 * rank : 2 * rank + 2] for t in batch(device))).backward()
    torch.save({name: p.grad.cpu() for name, p in towers.named_parameters()}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_would(tmp_path, device):
    torch.multiprocessing.spawn(train_one_step, (tmp_path, device), nprocs=2)
    grads, same = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    gold, eager = Towers("reference").double(), Towers("reference")
    gold(*(t.double() for t in batch("cpu"))).backward()
    eager(*batch("cpu")).backward()
    one = dict(eager.named_parameters())
    for name, p in gold.named_parameters():
        assert torch.equal(grads[name], same[name]), name
        assert_within_budget(grads[name], p.grad, one[name].grad, terms=96, name=name)


@pytest.mark.parametrize("tokens", (50, 77))
@pytest.mark.parametrize("shared, most", ((False, 832), (True, 992)), ids=("alone", "shared"))
def test_little_is_saved_for_backward(shared, most, tokens, device):
    """Whole storages count, since a view keeps all of its own alive."""
    sub = rsfast.SharedAdapter() if shared else None
    adapter = rsfast.GatedAdapter(40, shared=sub, impl="fused").to(device, BF16)
    x, storages = draw(2, tokens, 40, device=device, dtype=BF16).requires_grad_(), {}
    saved = []

    def pack(t):
        saved.append(t.data_ptr())
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = adapter(x)
    assert x.data_ptr() in saved, "x was copied"
    assert not any(isinstance(value, torch.Tensor) for value in vars(y.grad_fn).values()), "saved behind our back"
    for t in (x, *adapter.parameters()):
        storages.pop(t.untyped_storage().data_ptr(), None)
    assert sum(storages.values()) <= most * 2 * tokens
