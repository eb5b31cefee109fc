"""The input of a layer made again for backward from what it was made from."""

import pytest
import torch
import torch.nn.functional as F

import rsfast
from rsfast.lora import reference
from tests.cases import BF16, FP32

plan = pytest.importorskip("rsfast.lora.kernels.plan")


def made_of(function, device, dtype, shape=(3, 11, 24)):
    """x, its source, and what the source is computed from."""
    g = torch.Generator().manual_seed(4)
    h = torch.randn(shape, generator=g).to(device, dtype).requires_grad_()
    if function == "layer_norm":
        weight, bias = (torch.randn(shape[-1], generator=g).to(device, dtype) for _ in range(2))
        x, mean, rstd = torch.native_layer_norm(h.float(), shape[-1:], weight.float(), bias.float(), 1e-5)
        return x.to(dtype), rsfast.Source(function, h, mean, rstd, weight, bias), h
    if function == "quick_gelu":
        return h * torch.sigmoid(1.702 * h), rsfast.Source(function, h), h
    return F.gelu(h, approximate="tanh" if function.endswith("tanh") else "none"), rsfast.Source(function, h), h


@pytest.mark.parametrize("arm", ("composed", "outer"))
@pytest.mark.parametrize("dropout_p", (0.0, 0.5))
@pytest.mark.parametrize("function", reference.SOURCES)
@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_x_made_again_gives_the_same_gradients(device, function, dropout_p, arm, dtype):
    """Those of A to the last bits, all others exactly; and x is not among what is kept."""
    x, source, h = made_of(function, device, dtype)
    g = torch.Generator().manual_seed(6)
    weight, A, B = (torch.randn(s, generator=g).to(device, dtype) for s in ((16, 24), (8, 24), (16, 8)))
    A, B = A.float().requires_grad_(), B.float().requires_grad_()
    results, kept = [], []
    for given in (None, source):
        with plan.forced({"factor": plan.Choice(arm)}):
            saved, y = saved_tensors(
                lambda given=given: rsfast.lora_linear(
                    x, weight, None, A, B, 1.0, dropout_p=dropout_p, seed=3, source=given, impl="fused"
                )
            )
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(y)
            results.append((y, *torch.autograd.grad(y, (h, A, B), dy, retain_graph=True)))
        kept.append(saved)
    (y, dh, dA, dB), (y2, dh2, dA2, dB2) = results
    assert torch.equal(y, y2) and torch.equal(dh, dh2) and torch.equal(dB, dB2)
    # a value near the middle of two roundings may go to the other one
    assert (dA - dA2).abs().max() <= 8 * torch.finfo(dtype).eps * dA.abs().max() and dA.abs().max() > 0
    storages = [{t.untyped_storage().data_ptr() for t in tensors} for tensors in kept]
    assert x.untyped_storage().data_ptr() in storages[0] - storages[1]
    assert h.untyped_storage().data_ptr() in storages[1]


def saved_tensors(call):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = call()
    return kept, y


def test_a_source_of_another_function_would_show(device):
    """The test above can fail: a source that lies gives other gradients."""
    x, source, _ = made_of("gelu", device, FP32)
    weight, A, B = torch.ones(16, 24, device=device), torch.ones(8, 24, device=device), torch.ones(16, 8, device=device)
    A.requires_grad_()
    grads = []
    for given in (source, rsfast.Source("quick_gelu", source.input)):
        y = rsfast.lora_linear(x, weight, None, A, B, 1.0, source=given, impl="fused")
        grads += torch.autograd.grad(y.sum(), A, retain_graph=True)
    assert (grads[0] - grads[1]).abs().max() > 1e-3


def test_a_wider_source_is_rounded_to_what_x_was(device):
    """x in bf16 of a GELU in fp32, as autocast makes it: the very same x, so the very same gradient."""
    h = torch.randn(30, 24, generator=torch.Generator().manual_seed(2)).to(device)
    x, weight = F.gelu(h).to(BF16), torch.ones(16, 24, device=device, dtype=BF16)
    A, B = (torch.randn(s, generator=torch.Generator().manual_seed(3)).to(device) for s in ((8, 24), (16, 8)))
    A.requires_grad_()
    grads = []
    for given in (None, rsfast.Source("gelu", h)):
        with plan.forced({"factor": plan.COMPOSED}):
            y = rsfast.lora_linear(x, weight, None, A, B, 1.0, source=given, impl="fused")
            grads += torch.autograd.grad(y.sum(), A)
    assert torch.equal(*grads)


def test_x_is_kept_where_the_weight_is_trained(device):
    x, source, _ = made_of("gelu", device, FP32)
    weight, A, B = (torch.ones(s, device=device).requires_grad_() for s in ((16, 24), (8, 24), (16, 8)))
    y = rsfast.lora_linear(x, weight, None, A, B, 1.0, source=source, impl="fused")
    (dW,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(dW, x.detach().flatten(0, 1).sum(0).expand(16, 24))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(function="relu"), "source.function"),
        (dict(input=torch.zeros(2, 24)), "source.input"),
        (dict(mean=None), "source.mean"),
        (dict(rstd=torch.zeros(3)), "source.rstd"),
        (dict(weight=torch.zeros(3)), "source.weight"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(change, says):
    x, source, _ = made_of("layer_norm", "cpu", FP32)
    with pytest.raises(ValueError, match=says):
        rsfast.lora_linear(
            x, torch.ones(16, 24), None, torch.ones(2, 24), torch.ones(16, 2), 1.0, source=source._replace(**change)
        )


@pytest.mark.parametrize("written", ("x", "input"))
def test_what_is_written_into_is_no_longer_what_was_made(device, written):
    """By a layer in place, after the norm and before the product."""
    h = torch.randn(5, 24, device=device)
    layer = rsfast.LoRALinear(torch.nn.Linear(24, 16).to(device), r=4, impl="fused")
    torch.nn.init.normal_(layer.lora_B)
    source = rsfast.Source("gelu", h)
    x = source.note(F.gelu(h))
    assert rsfast.Source.of(x) is source and rsfast.Source.of(x + 0) is None
    (x if written == "x" else h).add_(1)
    assert rsfast.Source.of(x) is None
    layer(x).sum().backward()
    expected = layer.lora_B.sum(0)[:, None] * layer.scaling * x.sum(0)
    torch.testing.assert_close(layer.lora_A.grad, expected)
