"""Inputs of LoRA layers that are computed again instead of kept, in whole models."""

import copy
import pickle

import pytest
import timm
import torch

import rsfast.models
from rsfast.models.lora_sources import NOTED
from tests.tiny_clip import inputs, tiny_clip


def towers():
    clip, quick = tiny_clip(), tiny_clip(quick_gelu=True)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=5)
    return {"clip": clip.visual, "quick": quick.visual, "timm": vit}


@pytest.mark.parametrize("name", ("clip", "quick", "timm"))
def test_nothing_changes_but_what_is_kept(name, device):
    """Outputs bit for bit, gradients to the last bits of a sum; inputs of LoRA layers are not kept."""
    (y, grads, layers, kept), (y2, grads2, _, few) = (trained(name, device, recompute) for recompute in (False, True))
    assert torch.equal(y, y2) and len(grads) == len(grads2) >= 12
    for path, grad in grads.items():
        assert (grad - grads2[path]).abs().max() <= 1e-5 * grad.abs().max(), path
    assert kept == layers and not few


def trained(name, device, recompute):
    """Output and gradients, the layers with LoRA, and those whose input is kept for backward."""
    tower, images = towers()[name].to(device), inputs()[0].to(device)
    rsfast.models.add_lora(tower, r=2, targets=("q", "k", "v", "fc", "proj"), recompute=recompute, impl="fused")
    torch.manual_seed(2)
    for p in tower.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    taken, kept = {}, set()  # the inputs themselves: memory that is freed would be taken by others

    def take(path):
        return lambda layer, args: taken.update({path: args[0]})

    for path, layer in rsfast.models.lora_layers(tower).items():
        layer.register_forward_pre_hook(take(path))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        y = tower(images)
    y.square().sum().backward()
    grads = {path: p.grad for path, p in tower.named_parameters() if p.grad is not None}
    return y, grads, set(taken), {path for path, x in taken.items() if x.data_ptr() in kept}


def test_removed_with_lora():
    model = tiny_clip()
    before = {path: type(m) for path, m in model.named_modules()}
    rsfast.models.add_lora(model, r=2)
    assert any(type(m) in NOTED.values() for m in model.modules())
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert {type(m) for m in again.modules()} == {type(m) for m in model.modules()}
    rsfast.models.remove_lora(model)
    assert {path: type(m) for path, m in model.named_modules()} == before


@pytest.mark.parametrize("kind", NOTED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("autocast", (False, True))
def test_a_noted_module_computes_what_it_did(kind, dtype, autocast):
    module = kind(8) if "Norm" in kind.__name__ else kind()
    if dtype == torch.bfloat16 and "Fp32" not in kind.__name__ and not autocast:
        module.to(dtype)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(3, 5, 8, dtype=dtype if not autocast else torch.float32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = module(x)
        module.__class__ = NOTED[kind]
        y = module(x)
    assert y.dtype == expected.dtype and torch.equal(y, expected) and rsfast.Source.of(y).input is x
    with torch.no_grad():
        assert rsfast.Source.of(module(x)) is None
    (dx,), (dx2,) = (torch.autograd.grad(out, x, torch.ones_like(out)) for out in (expected, y))
    assert torch.equal(dx, dx2)


def test_checkpointing_recomputes_with_the_same_sources(device):
    model = tiny_clip()
    rsfast.models.add_lora(model, r=2, impl="fused")
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    images, model = inputs()[0].to(device), model.to(device)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        model.train()
        model.encode_image(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.visual.parameters() if p.grad is not None])
    assert len(grads[0]) >= 12 and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("approximate, function", [("none", "gelu"), ("tanh", "gelu_tanh")])
def test_a_gelu_says_which_one_it_is(approximate, function):
    model = torch.nn.Sequential(torch.nn.GELU(approximate), torch.nn.Linear(8, 8))
    rsfast.models.add_lora(model, r=2, targets=("1",))
    assert rsfast.Source.of(model[0](torch.randn(3, 8))).function == function
