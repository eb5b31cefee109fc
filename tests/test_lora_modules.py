"""LoRA's layers as modules: what they refuse, share, freeze and keep; merging, dtypes, copies, ranks that differ."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rsfast
from tests.cases import BF16, FP16, FP32
from tests.test_lora_inputs import FP64, FUSED, call, draw


def base(dtype=FP32, bias=True):
    torch.manual_seed(1)
    return nn.Linear(6, 4, bias=bias, dtype=dtype)


def stirred(layer):
    nn.init.normal_(layer.lora_B)
    for B, rank in zip(layer.lora_B, getattr(layer, "ranks", ()), strict=False):
        B.data[:, rank:] = 0
    return layer


def single(linear=None, device="cpu", **options):
    return stirred(rsfast.LoRALinear(linear or base(), **dict(r=2, alpha=3) | options)).to(device)


def several(linear=None, device="cpu", **options):
    layer = stirred(rsfast.BatchedLoRALinear(linear or base(), **dict(num_adapters=3, r=3, ranks=(3, 1, 2)) | options))
    layer.adapter_ids = rsfast.AdapterBatch(torch.tensor([2, -1], device=device), layer.num_adapters)
    return layer.to(device)


@pytest.mark.parametrize(
    "kind, options, error, says",
    [
        *[
            (kind, options, ValueError, says)
            for kind in (rsfast.LoRALinear, rsfast.BatchedLoRALinear)
            for options, says in (
                (dict(r=0), "r must be a positive integer, got 0"),
                (dict(r=2.0), "r must be a positive integer, got 2.0"),
                (dict(dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
                (dict(dropout=-0.5), "dropout must be at least 0"),
                (dict(slices=((0, 5),)), "slices must be ranges of columns"),
                (dict(slices=((0, 1.0),)), "slices must be pairs of integers"),
            )
        ],
        *[
            (rsfast.BatchedLoRALinear, options, ValueError, says)
            for options, says in (
                (dict(num_adapters=0), "num_adapters must be a positive integer, got 0"),
                (dict(num_adapters=2.0), "num_adapters must be a positive integer"),
                (dict(ranks=(1, 2)), "ranks must have 3 entries, one a adapter, got 2"),
                (dict(alpha=(1, 2)), "alpha must have 3 entries, one a adapter, got 2"),
                (dict(ranks=(1, 2, 9)), "ranks must be integers from 1 to 8, the rank of the bank, got (1, 2, 9)"),
                (dict(ranks=(1, 2, 0)), "ranks must be integers from 1 to 8"),
                (dict(ranks=(1, 2, 1.5)), "ranks must be integers from 1 to 8"),
            )
        ],
    ],
)
def test_a_module_refuses_before_it_freezes(kind, options, error, says):
    linear = base()
    extra = dict(num_adapters=3) if kind is rsfast.BatchedLoRALinear else {}
    with pytest.raises(error, match=re.escape(says)):
        kind(linear, **extra | options)
    assert all(p.requires_grad for p in linear.parameters())


@pytest.mark.parametrize("make", (rsfast.LoRALinear, lambda b: rsfast.BatchedLoRALinear(b, 2)))
def test_a_module_takes_plain_linear_layers(make):
    for wrong in (nn.Conv1d(6, 4, 1), single(), several()):
        with pytest.raises(TypeError, match=f"base must be an nn.Linear without LoRA, got {type(wrong).__name__}"):
            make(wrong)


def test_ids_are_asked_for():
    layer = several()
    assert torch.equal(layer(draw(2, 6)), layer(draw(2, 6), torch.tensor([2, -1])))
    layer.adapter_ids = None
    with pytest.raises(ValueError, match="adapter_ids must be given with the call, or set beforehand"):
        layer(draw(2, 6))


@pytest.mark.parametrize("make", (single, several))
@pytest.mark.parametrize("bias", (True, False))
def test_parameters_are_shared_frozen_and_keep_their_names(make, bias):
    linear = base(bias=bias)
    layer = make(linear)
    names = ["weight", *["bias"] * bias]
    assert sorted(layer.state_dict()) == sorted([*names, "lora_A", "lora_B"])
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    layer(draw(2, 6)).square().sum().backward()
    assert layer.weight.grad is None and layer.lora_A.grad.any() and layer.lora_B.grad.any()
    with torch.no_grad():
        assert not layer(draw(2, 6)).requires_grad
    assert isinstance(layer, nn.Linear) and layer.training == linear.training
    assert not make(base().eval()).training


def test_it_starts_as_the_layer_and_scales_by_alpha_over_r():
    linear, x = base(), draw(5, 6)
    assert torch.equal(rsfast.LoRALinear(linear)(x), F.linear(x, linear.weight, linear.bias))
    layer = single(r=2, alpha=3)
    expected = linear(x) + 1.5 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), expected)
    bank = several(alpha=(3, 1, 6), ranks=(3, 1, 2))
    assert bank.scaling.tolist() == [1, 1, 3]
    assert rsfast.BatchedLoRALinear(base(), 3, r=4, alpha=8).scaling.tolist() == [2, 2, 2]


def test_dropout_is_for_training():
    layer, x = single(dropout=0.5), draw(50, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    y = layer(x)
    layer.dropout = 0.0
    assert torch.equal(layer.train()(x), y)


@pytest.mark.parametrize("dtype", (FP32, FP16, BF16, FP64))
@pytest.mark.parametrize("slices", (None, ((0, 1), (2, 4))))
def test_merged_and_back(dtype, slices):
    layer, x = single(base(dtype), slices=slices).eval(), draw(5, 6, dtype=dtype)
    before, unmerged = layer.weight.clone(), layer(x)
    with pytest.raises(ValueError, match="not merged"):
        layer.unmerge()
    layer.merge()
    assert layer.merged and not torch.equal(layer.weight, before)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), unmerged, rtol=0, atol=16 * eps * unmerged.abs().max().item())
    if slices:
        assert torch.equal(layer.weight[1], before[1])
    with pytest.raises(ValueError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, before) and torch.equal(layer(x), unmerged)


def test_what_cannot_be_merged_changes_nothing():
    layer = single(base(FP16))
    nn.init.constant_(layer.lora_B, 1e6)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="not finite; nothing is merged"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.weight, before)
    for refused in (several().merge, several().unmerge):
        with pytest.raises(ValueError, match="3 adapters share the weight"):
            refused()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", (FP16, BF16, FP64))
@pytest.mark.parametrize("make", (single, several))
def test_a_module_in_another_dtype(make, dtype, impl, device):
    """Factors follow ``.to``; those made for a 16-bit layer are in fp32. Scalings are rounded to no 16 bits."""
    impl = "reference" if dtype == FP64 else impl
    layer = make(alpha=1, r=3, impl=impl, device=device).to(dtype)
    y = layer(draw(2, 6, dtype=dtype).to(device))
    assert y.dtype == layer.lora_A.dtype == dtype and y.isfinite().all()
    y.sum().backward()
    assert {p.grad.dtype for p in (layer.lora_A, layer.lora_B)} == {dtype}
    assert torch.equal(torch.as_tensor(layer.scaling).cpu(), torch.as_tensor(make(alpha=1, r=3).scaling))
    beside = make(base(dtype), impl=impl, device=device)
    assert beside.lora_A.dtype == beside.lora_B.dtype == torch.promote_types(dtype, FP32)
    beside(draw(2, 6, dtype=dtype).to(device)).sum().backward()
    assert beside.lora_A.grad.dtype == beside.lora_A.dtype


@pytest.mark.parametrize("again", (copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))))
@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("make", (single, several))
def test_copies_compute_the_same(make, impl, again, device):
    layer, x = make(impl=impl, device=device).eval(), draw(2, 5, 6).to(device)
    y = layer(x)  # a batch has its tables now
    twin = again(layer)
    assert torch.equal(twin(x), y) and twin.lora_A is not layer.lora_A
    nn.init.zeros_(twin.lora_B)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("again", (copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))))
def test_copies_of_a_batch(again):
    batch = rsfast.AdapterBatch(torch.tensor([2, -1]), 3)
    batch.plan(5)
    twin = again(batch)
    assert twin.num_adapters == 3 and torch.equal(twin.ids, batch.ids)
    assert all(torch.equal(a, b) for a, b in zip(twin.plan(5), batch.plan(5), strict=True))
    assert torch.equal(call("batched_lora_linear", adapter_ids=twin), call("batched_lora_linear"))


@pytest.mark.parametrize("slices", (None, ((0, 1), (2, 4))))
@pytest.mark.parametrize("impl", FUSED)
def test_rows_beyond_a_rank_stay_zero(impl, slices, device):
    """Through steps of AdamW with weight decay, in each slice."""
    layer, x = several(dropout=0.3, slices=slices, impl=impl, device=device), draw(6, 6).to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    before = [p.detach().clone() for p in (layer.lora_A, layer.lora_B)]
    for _ in range(3):
        optimizer.zero_grad()
        layer(x, torch.tensor([0, 1, 2, 1, -1, 2], device=device)).square().sum().backward()
        optimizer.step()
    for g, rank in enumerate(layer.ranks):
        assert not layer.lora_A[g].view(-1, 3, 6)[:, rank:].any() and not layer.lora_B[g, :, rank:].any()
    assert not torch.equal(layer.lora_A, before[0]) and not torch.equal(layer.lora_B, before[1])


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize(
    "make, shape", [(single, (0, 6)), (single, (2, 0, 6)), (several, (0, 6)), (several, (0, 5, 6))]
)
def test_an_empty_batch(make, shape, impl, device):
    layer, x = make(dropout=0.5, impl=impl, device=device), torch.empty(shape, device=device, requires_grad=True)
    options = dict(adapter_ids=torch.empty(0, dtype=torch.int64, device=device)) if make is several else {}
    y = layer(x, **options)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 4) and x.grad.shape == shape
    assert not layer.lora_A.grad.any() and not layer.lora_B.grad.any()
