"""Uses that are odd and legal, and arguments that are refused before anything has changed."""

import itertools
import os

import pytest
import torch
from torch import nn

import rsfast
import rsfast.models
from tests.cases import BF16, FP32

launch, plan, shrink = (pytest.importorskip(f"rsfast.lora.kernels.{name}") for name in ("launch", "plan", "shrink"))


def bank(device, **options):
    torch.manual_seed(0)
    layer = rsfast.BatchedLoRALinear(nn.Linear(20, 12).to(device), 3, r=4, impl="fused", **options)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("inside", ("layer", "batch and layer"))
def test_a_batch_first_used_in_inference_mode_trains(device, inside):
    """Validation before training, with one batch for both."""
    layer, x, ids = bank(device), torch.randn(3, 5, 20, device=device), torch.tensor([2, 0, -1], device=device)
    batch = rsfast.AdapterBatch(ids, 3)
    with torch.inference_mode():
        batch = rsfast.AdapterBatch(ids.clone(), 3) if "batch" in inside else batch
        expected = layer(x, batch)
    y = layer(x, batch)
    y.sum().backward()
    assert torch.equal(y, expected) and layer.lora_A.grad[[0, 2]].abs().sum() > 0


def test_ids_that_are_written_into_are_planned_anew(device):
    layer, x, ids = bank(device), torch.randn(3, 5, 20, device=device), torch.tensor([2, 0, -1], device=device)
    batch = rsfast.AdapterBatch(ids, 3)
    before = layer(x, batch)
    ids.copy_(torch.tensor([0, 1, 2]))
    after = layer(x, batch)
    assert torch.equal(after, layer(x, ids)) and not torch.equal(after, before)
    if device == "cpu":
        ids[1] = 3
        with pytest.raises(ValueError, match="adapter_ids must be -1"):
            layer(x, batch)


def test_a_batch_made_outside_of_a_compiled_region(device):
    """By nobody yet, and by layers that planned it."""
    layer, x, ids = bank(device), torch.randn(3, 5, 20, device=device), torch.tensor([2, 0, -1], device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for batch in (rsfast.AdapterBatch(ids, 3), rsfast.AdapterBatch(ids.flip(0), 3)):
        assert torch.equal(compiled(x, batch), layer(x, batch))
        assert torch.equal(compiled(x, batch), layer(x, batch))


@pytest.mark.parametrize("first", (nn.LayerNorm(20), nn.GELU()))
def test_features_made_in_inference_mode_are_taken(device, first):
    """Which a norm or an activation in front of LoRA cannot watch for being written into."""
    model = nn.Sequential(first, nn.Linear(20, 12)).to(device)
    rsfast.models.add_lora(model, r=4, targets=["1"])
    with torch.inference_mode():
        x = torch.randn(5, 20, device=device)
        with torch.enable_grad():
            model(x)
    model(x).sum().backward()
    assert model[1].lora_B.grad.abs().sum() > 0


def test_the_meta_device_gives_shapes():
    layer = rsfast.LoRALinear(nn.Linear(20, 12, device="meta"), r=4)
    y = layer(torch.empty(5, 20, device="meta"))
    assert y.shape == (5, 12) and y.device.type == "meta"


def test_autocast_leaves_fp64_alone(device):
    """As it does in nn.Linear."""
    base = nn.Linear(20, 12).to(device).double()
    x = torch.randn(5, 20, dtype=torch.float64, device=device)
    layer = rsfast.LoRALinear(base, r=4)
    nn.init.normal_(layer.lora_B)
    expected = layer(x)
    with torch.autocast(device):
        assert base(x).dtype == torch.float64 and torch.equal(layer(x), expected)


def test_products_take_every_pair_of_dtypes(device):
    """Factors may be of a 16-bit dtype that is not autocast's."""
    for of, to in itertools.product((FP32, BF16, torch.float16), repeat=2):
        a, b = torch.randn(4, 6, device=device).to(of), torch.randn(6, 3, device=device).to(of)
        found = launch.product(a, b, to)
        assert found.dtype == to
        assert torch.allclose(found.double(), a.double() @ b.double(), atol=0.1 if to != of or of != FP32 else 1e-5)


def test_transforms_of_torch_func_take_the_reference(device):
    layer = rsfast.LoRALinear(nn.Linear(20, 12).to(device), r=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5, 20, device=device)
    assert torch.allclose(torch.vmap(layer)(x), layer(x), atol=1e-5)
    layer.impl = "fused"
    for transformed in (torch.vmap(layer), torch.func.grad(lambda x: layer(x).sum())):
        with pytest.raises(NotImplementedError, match=r"a transform of torch\.func is active"):
            transformed(x)


@pytest.mark.parametrize("sm, room", ((80, 163), (86, 99), (89, 99), (90, 227), (120, 99)))
@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_down_to_any_rank_fits_into_shared_memory(monkeypatch, sm, room, dtype):
    """What the loop holds at once, and what dropout's bits take when they are spread; every path needs this kernel."""
    monkeypatch.setattr(shrink, "capability", lambda device: sm)
    for ranks in (1, 24, 48, 64, 96, 192, 3 * 256):
        x = torch.empty(4096, 1024, dtype=dtype, device="meta")
        block_m, block_k, block_r, stages = shrink.tiling(x, ranks, False)
        held = stages * (block_m + block_r) * block_k * dtype.itemsize
        assert held + 2 * block_m * block_k <= room * 1024, (ranks, block_k, block_r, stages)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(slices=((0, 1000),)), "slices must be ranges"),
        (dict(slices=(0, 4)), "slices must be pairs"),
        (dict(slices=()), "slices must be ranges"),
        (dict(alpha=float("nan")), "alpha must be finite"),
        (dict(alpha=None), "alpha must be finite"),
        (dict(dropout="0.1"), "dropout must be at least 0"),
        (dict(impl="fast"), "impl must be"),
    ],
)
@pytest.mark.parametrize("several", ((), (3,)))
def test_a_layer_that_is_refused_leaves_its_base_alone(several, options, says):
    base = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=says):
        (rsfast.BatchedLoRALinear if several else rsfast.LoRALinear)(base, *several, **options)
    assert base.weight.requires_grad and base.bias.requires_grad


@pytest.mark.parametrize("options", (dict(ranks=(9, 1, 1)), dict(ranks=(1.5, 1, 1)), dict(alpha=(1, 2)), dict(r=0)))
def test_a_bank_that_is_refused_leaves_its_base_alone(options):
    base = nn.Linear(6, 4)
    with pytest.raises(ValueError):
        rsfast.BatchedLoRALinear(base, 3, **options)
    assert base.weight.requires_grad


@pytest.mark.parametrize(
    "base", (nn.LazyLinear(4), nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))), ids=("lazy", "parametrised")
)
def test_a_base_without_a_weight_of_its_own_is_refused(base):
    with pytest.raises(TypeError, match="must hold its weight as a parameter"):
        rsfast.LoRALinear(base)


@pytest.mark.parametrize("seed", (1.5, 2**63, "7"))
def test_a_seed_that_is_no_int64_is_refused(seed):
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="seed must be an integer of 64 bits"):
        rsfast.lora_linear(x, torch.eye(4), None, x, torch.ones(4, 2), 1.0, dropout_p=0.5, seed=seed)


@pytest.mark.parametrize("slices", ((), (0, 4), ((2, 1),)))
def test_slices_without_a_base_are_checked(slices):
    with pytest.raises(ValueError, match="slices must be"):
        rsfast.lora_expand(torch.ones(1, 2), torch.ones(3, 2), slices=slices)


def test_a_home_that_may_not_be_read_has_no_table(monkeypatch):
    """As in a container that runs as another user than its image was made for."""

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    plan.table_of.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "stat", refuse)
    try:
        assert plan.table_of(torch.device("cpu")) == {}
    finally:
        plan.table_of.cache_clear()


def test_nobody_s_home_has_no_table(monkeypatch):
    """A user without an entry in the password file, and without HOME."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert plan.table_path("none") is None


@pytest.mark.parametrize("measured", ("null", "[]", '{"a": 1}'))
def test_a_table_broken_in_what_was_measured(tmp_path, measured):
    path = tmp_path / "table.json"
    path.write_text(f'{{"choices": {{}}, "measured": {measured}}}')
    with pytest.raises(ValueError, match="is no table of rsfast tune"):
        plan.read_table(path)


def test_a_table_that_may_not_be_read_is_a_warning(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.mkdir()  # which open() refuses, whoever runs this
    plan.table_of.cache_clear()
    monkeypatch.setattr(plan, "table_path", lambda gpu: path)
    try:
        with pytest.warns(UserWarning, match="is no table"):
            assert plan.table_of(torch.device("cpu")) == {}
    finally:
        plan.table_of.cache_clear()
