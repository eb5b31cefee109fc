"""LoRA inside whole models against weights merged by hand, in float64: outputs, gradients, adapters of a batch."""

import copy

import pytest
import torch

from rsfast.models import add_lora, check_live, lora_layers, merge_lora, remove_lora, set_adapter_ids, unmerge_lora
from tests.lora_models import MODELS, build, by_hand, merged_weights, run, stir_lora, tensors
from tests.tiny_clip import assert_unchanged, snapshot

every_model = pytest.mark.parametrize("name", MODELS)


def assert_same(a, b):
    """Equal but for the order of float64 sums."""
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-12 * b.abs().max().item()), (a - b).abs().max()


@every_model
@pytest.mark.parametrize("targets", [("q", "k", "v", "out", "fc", "proj"), ("v", "q"), ("out", "k")], ids="-".join)
def test_values_and_gradients_are_those_of_merged_weights(name, targets):
    plain, batch = build(name)
    plain.requires_grad_(False)
    model = copy.deepcopy(plain)
    expected = run(plain, batch)
    report = add_lora(model, r=2, alpha=3, targets=targets, impl="reference")
    assert not report.skipped and report.placed.keys() == lora_layers(model).keys()
    assert_same(run(model, batch), expected)
    stir_lora(model)
    y = run(model, batch)
    oracle = by_hand(plain, batch, merged_weights(model))
    assert_same(y, oracle)
    assert not torch.allclose(y, expected, rtol=1e-3)
    factors = [factor for layer in lora_layers(model).values() for factor in (layer.lora_A, layer.lora_B)]
    dy = torch.randn_like(y)
    for dfactor, gold in zip(
        torch.autograd.grad(y, factors, dy), torch.autograd.grad(oracle, factors, dy), strict=True
    ):
        assert gold.abs().max() > 0
        assert_same(dfactor, gold)
    assert check_live(model, batch) == []


@every_model
def test_removing_merging_and_unmerging_restore_everything(name):
    model, batch = build(name)
    next(model.parameters()).requires_grad_(False)
    model.train()
    before, flags = snapshot(model), [getattr(m, "qkv_bias_separate", None) for m in model.modules()]
    add_lora(model, r=2)
    model.eval()
    assert model.state_dict().keys() > before[0].keys()
    for key, value in before[0].items():
        assert torch.equal(model.state_dict()[key], value)
    with torch.no_grad():
        y, state = run(stir_lora(model), batch), snapshot(model)
        merge_lora(model)
        assert_same(run(model, batch), y)
        with pytest.raises(ValueError, match="merged already"):
            merge_lora(model)
        unmerge_lora(model)
        assert_unchanged(model, state)
        assert torch.equal(run(model, batch), y)
        with pytest.raises(ValueError, match="not merged"):
            unmerge_lora(model)
        merge_lora(model)
    remove_lora(model)
    assert_unchanged(model, before)
    assert [getattr(m, "qkv_bias_separate", None) for m in model.modules()] == flags
    assert not any(m.training for m in model.modules())
    add_lora(model, r=2)  # and it can be done again


@every_model
def test_samples_with_adapters_of_their_own(name):
    """Each sample is computed as if its adapter were merged, -1 as if there were none, and gradients follow."""
    plain, batch = build(name)
    plain.requires_grad_(False)
    model = copy.deepcopy(plain)
    if name == "lnd":
        before = snapshot(model)
        with pytest.raises(NotImplementedError, match=r"visual.transformer.resblocks.0.attn takes \(tokens, samples"):
            add_lora(model, r=2, num_adapters=3)
        return assert_unchanged(model, before)
    add_lora(model, r=2, num_adapters=3, impl="reference")
    with pytest.raises(ValueError, match="adapter_ids"):
        run(model, batch)
    stir_lora(model)
    ids = torch.tensor([2, -1, 0])
    set_adapter_ids(model, ids)
    y = run(model, batch)
    total = 0
    for g in (2, -1, 0):
        alone = by_hand(plain, batch, {} if g < 0 else merged_weights(model, g))
        total = total + torch.where(rows_of(model, batch, ids == g), alone, 0)
    assert_same(y, total)
    factors = [factor for layer in lora_layers(model).values() for factor in (layer.lora_A, layer.lora_B)]
    dy = torch.randn_like(y)
    for dfactor, gold in zip(torch.autograd.grad(y, factors, dy), torch.autograd.grad(total, factors, dy), strict=True):
        assert gold[0].abs().max() > 0 and gold[2].abs().max() > 0 and not gold[1].any()
        assert_same(dfactor, gold)
    return None


def rows_of(model, batch, mine):
    """Which elements of the outputs belong to the samples."""
    output = model(**batch) if isinstance(batch, dict) else model(*batch)
    return torch.cat(
        [
            mine.view(-1, *[1] * (x.ndim - 1)).expand(x.shape).flatten()
            if x.ndim and len(x) == len(mine)
            else torch.full_like(x, bool(mine[0]), dtype=torch.bool).flatten()
            for x in tensors(output)
            if x.is_floating_point()
        ]
    )
