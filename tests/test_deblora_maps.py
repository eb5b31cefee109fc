"""Maps of features: identity at the start, the equations, gradients, many adapters as a loop over them."""

import pytest
import torch

from rsfast.deblora import ClassMaps, FullMap, LowRankMap


def stirred(module):
    """Every parameter with values of its own, so that nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module.double()


def rows(count, dim, dtype=torch.float64):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("made", [lambda: LowRankMap(7, 3), lambda: FullMap(7)], ids=["low_rank", "full"])
def test_starts_as_the_identity(made, dtype):
    z = rows(5, 7, dtype)
    assert torch.equal(made()(z), z) and made()(z).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made()(z), z)


def test_start_is_that_of_lora():
    torch.manual_seed(0)
    low_rank, full = LowRankMap(400, 4), FullMap(5)
    bound = 400**-0.5
    assert low_rank.lora_A.shape == (4, 400) and low_rank.lora_B.shape == (400, 4)
    assert low_rank.lora_A.abs().max() <= bound and low_rank.lora_A.detach().std().item() == pytest.approx(
        bound / 3**0.5, rel=0.1
    )
    assert not low_rank.lora_B.any() and not full.weight.any() and not full.bias.any()
    assert {p.dtype for p in low_rank.parameters()} == {torch.float32}


def test_low_rank_map_is_its_equation():
    layer, z = stirred(LowRankMap(6, r=2, alpha=3.0)), rows(5, 6)
    torch.testing.assert_close(layer(z), z + 1.5 * (z @ layer.lora_A.T) @ layer.lora_B.T)


def test_gradients_of_the_low_rank_map():
    layer, z = stirred(LowRankMap(3, r=1)), rows(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, A, B: torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (z,)),
        (z, layer.lora_A, layer.lora_B),
    )


def test_several_maps_are_a_loop_over_them():
    layer, z = stirred(LowRankMap(6, r=2, num_adapters=3)), rows(5, 6)
    ids = torch.tensor([2, 0, -1, 1, 2])
    y = layer(z, ids)
    assert torch.equal(y[2], z[2])
    for row, g in enumerate(ids.tolist()):
        if g >= 0:
            expected = z[row] + 4.0 * layer.lora_B[g] @ (layer.lora_A[g] @ z[row])
            torch.testing.assert_close(y[row], expected)


def test_full_map_is_its_equation():
    layer, z = stirred(FullMap(6)), rows(5, 6)
    torch.testing.assert_close(layer(z), z + z @ layer.weight.T + layer.bias)


def test_class_maps_are_a_loop_over_the_classes():
    maps, z = stirred(ClassMaps(6, n_classes=3, r=2, alpha=3.0)), rows(5, 6)
    copies = torch.stack([z + 1.5 * (z @ A.T) @ B.T for A, B in zip(maps.lora_A, maps.lora_B, strict=True)], 1)
    logits = torch.stack([copies[:, c] @ maps.head.weight[c] + maps.head.bias[c] for c in range(3)], 1)
    torch.testing.assert_close(maps.forward_all(z), copies)
    torch.testing.assert_close(maps.logits(z), logits)
    torch.testing.assert_close(maps(z), (logits.softmax(1)[..., None] * copies).sum(1))


def test_class_maps_on_the_kernels(device):
    """Of small integers, so that no sum rounds; a head of zeros believes in all four classes alike, 1/4."""
    draw = torch.Generator().manual_seed(5)
    maps, z = ClassMaps(20, n_classes=4, r=1), torch.randint(-3, 4, (5, 20), generator=draw).float()
    with torch.no_grad():
        for p in maps.parameters():
            p.copy_(torch.randint(-3, 4, p.shape, generator=draw))
    fused = ClassMaps(20, n_classes=4, r=1, impl="fused")
    fused.load_state_dict(maps.state_dict())
    fused, maps, z = fused.to(device), maps.to(device), z.to(device)
    assert torch.equal(fused.logits(z), maps.logits(z)) and torch.equal(fused.forward_all(z), maps.forward_all(z))
    for each in (fused, maps):
        torch.nn.init.zeros_(each.head.weight)
        torch.nn.init.zeros_(each.head.bias)
    assert torch.equal(fused(z), maps(z)) and torch.equal(maps(z), maps.forward_all(z).mean(1))


def test_class_maps_train_every_adapter_on_every_row():
    maps = stirred(ClassMaps(6, n_classes=3, r=2))
    torch.nn.functional.cross_entropy(maps.logits(rows(1, 6)), torch.tensor([1])).backward()
    assert all(maps.lora_A.grad[c].any() and maps.lora_B.grad[c].any() for c in range(3))


def test_class_maps_in_half_precision():
    maps, z = stirred(ClassMaps(6, n_classes=3, r=2)).float(), rows(5, 6, torch.float16)
    assert maps(z).dtype == torch.float16 and maps.forward_all(z).dtype == torch.float16
    assert maps.logits(z).dtype == torch.float32
    torch.testing.assert_close(maps.logits(z), maps.logits(z.float()), rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LowRankMap(0), "dim must be a positive integer, got 0"),
        (lambda: LowRankMap(4, r=1.5), "r must be a positive integer"),
        (lambda: LowRankMap(4, alpha=float("nan")), "alpha must be a positive number"),
        (lambda: LowRankMap(4, impl="quick"), "impl must be"),
        (lambda: ClassMaps(4, n_classes=0), "n_classes must be a positive integer"),
        (lambda: LowRankMap(4)(torch.ones(2, 5)), "4 wide"),
        (lambda: FullMap(4)(torch.ones(2, 5)), "4 wide"),
        (lambda: ClassMaps(4, 2)(torch.ones(2, 4, dtype=torch.int64)), "floating point"),
        (lambda: LowRankMap(4)(torch.ones(2, 4), torch.zeros(2).long()), "adapter_ids must be given if"),
        (lambda: LowRankMap(4, num_adapters=2)(torch.ones(2, 4)), "adapter_ids must be given if"),
        (lambda: LowRankMap(4, num_adapters=2)(torch.ones(2, 4), torch.tensor([0, 2])), "adapter_ids must be -1"),
    ],
)
def test_what_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
