"""Class-wise LoRA in a backbone: a few classes at a time, with the gradients of all at once."""

import pytest
import timm
import torch
from torch import nn

from rsfast.deblora.comparison import images
from rsfast.deblora.comparison.images import ClassWise

LORA = dict(r=2, alpha=2.0, targets=("q", "k", "v", "out"))


def class_wise(n_classes):
    torch.manual_seed(0)
    made = ClassWise(timm.create_model("test_vit", num_classes=0).requires_grad_(False).eval(), 64, n_classes, LORA)
    for name, p in made.named_parameters():
        if "lora_B" in name:  # which start at 0
            nn.init.normal_(p, std=0.1)
    return made


def pictures(count=4):
    return torch.randn(count, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def step(model, x, forward):
    model.zero_grad()
    found = getattr(model, forward)(x)
    (found * torch.arange(1.0, 1 + found.numel()).view_as(found).sin()).sum().backward()
    return found.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("at_once", [1, 8, 13])
@pytest.mark.parametrize("forward", ["logits", "forward"])
def test_gradients_are_those_of_all_classes_at_once(monkeypatch, at_once, forward):
    model, x = class_wise(5), pictures()
    expected, grads = step(model, x, forward)
    sizes = []
    model.backbone.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    monkeypatch.setattr(images, "AT_ONCE", at_once)
    found, others = step(model, x, forward)
    assert max(sizes) <= max(at_once, 4) and sum(sizes) == 2 * 5 * 4  # each image by each class, forward and again
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(other, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item() + 1e-6)
    sizes.clear()
    with torch.no_grad():
        assert model.forward_all(x).shape == (4, 5, 64)
    assert sum(sizes) == 5 * 4 and max(sizes) <= max(at_once, 4)


def kept(model, x):
    """Bytes that forward keeps for backward, each tensor's storage once."""
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = model.logits(x)
    del logits
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for at, size in found.items() if at not in known)


def test_memory_grows_with_the_features_alone(monkeypatch):
    x = pictures(2)
    all_at_once = kept(class_wise(9), x)
    monkeypatch.setattr(images, "AT_ONCE", 4)
    few, many = kept(class_wise(3), x), kept(class_wise(9), x)
    assert many - few < 2**16 and many < all_at_once / 8


def test_what_fits_goes_through_once(monkeypatch):
    model, sizes = class_wise(3), []
    model.backbone.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    step(model, pictures(2), "logits")
    assert sizes == [6]
