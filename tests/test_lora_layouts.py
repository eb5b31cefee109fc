"""Memory of LoRA's inputs that is not in one piece: rows far apart, tokens first, factors and sources of any stride."""

import pytest
import torch
import torch.nn.functional as F

import rsfast
from tests.cases import CASES, FP32
from tests.test_contract import assert_same_bits, run, tiny

plan = pytest.importorskip("rsfast.lora.kernels.plan")
LORA = [case for case in CASES if "lora" in case.name and case.tiny]


def apart(t):
    """Columns of a wider tensor, and every other number of a vector; what lies between is no number."""
    if t.ndim < 2:
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    return F.pad(t, (0, 3), value=float("nan"))[..., : t.shape[-1]]


@pytest.mark.parametrize("case", LORA, ids=str)
def test_rows_apart(case, device):
    tensors = tiny(case, device)
    expected = run(case, case.public, tensors, impl="fused")
    actual = run(case, case.public, [apart(t) for t in tensors], apart(expected[1]), impl="fused")
    assert_same_bits(case, actual, expected)


@pytest.mark.parametrize("arm", ("composed", "augmented", "expand"))
def test_rows_apart_in_every_arm(device, arm):
    case = next(case for case in LORA if case.name == "lora_linear")
    tensors = tiny(case, device)
    with plan.forced({"forward": plan.Choice(arm), "dgrad": plan.Choice(arm), "low": plan.Choice("composed")}):
        expected = run(case, case.public, tensors, impl="fused")
        actual = run(case, case.public, [apart(t) for t in tensors], apart(expected[1]), impl="fused")
    for one, two in zip((actual[0], *actual[2]), (expected[0], *expected[2]), strict=True):
        torch.testing.assert_close(one, two)  # cuBLAS may choose by the stride


def arguments(device, dtype=FP32):
    g = torch.Generator().manual_seed(5)
    shapes = dict(x=(3, 5, 24), weight=(8, 24), lora_A=(4, 24), lora_B=(8, 4))
    return {name: torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for name, shape in shapes.items()}


def tokens_first(x):
    return x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("several", (False, True))
def test_tokens_first_drop_and_adapt_the_same(device, several):
    """Dropout of a seed, and the ids of samples, go by the shape and not by the memory."""
    args, results = arguments(device), []
    if several:
        op, more = rsfast.batched_lora_linear, dict(scaling=torch.ones(2, device=device))
        more |= dict(adapter_ids=torch.tensor([1, -1, 0], device=device))
        args |= {name: args[name].detach().expand(2, -1, -1).clone() for name in ("lora_A", "lora_B")}
        args["lora_B"][1] *= -1
    else:
        op, more = rsfast.lora_linear, dict(scaling=1.0, dropout_p=0.5, seed=3)
    for x in (args["x"], tokens_first(args["x"])):
        y = op(**args | dict(x=x), bias=None, **more, impl="fused")
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert same(*results)


@pytest.mark.parametrize("op", ("batched_lora_linear", "lora_shrink"))
def test_scalings_of_any_stride(device, op):
    args, results = arguments(device), []
    A, B = (args[name].detach().expand(3, -1, -1).clone() for name in ("lora_A", "lora_B"))
    ids, scaling = torch.tensor([1, 2, 0], device=device), torch.tensor([1.0, 9, 2, 9, 3, 9], device=device)
    for scales in (scaling[::2], scaling[::2].clone()):
        if op == "lora_shrink":
            y = rsfast.lora_shrink(args["x"], A, scales, ids, impl="fused")
        else:
            y = rsfast.batched_lora_linear(args["x"], args["weight"], None, A, B, scales, ids, impl="fused")
        results.append((y, *torch.autograd.grad(y.square().sum(), args["x"])))
    assert same(*results)


@pytest.mark.parametrize("memory", ("x tokens first", "input apart", "learned apart"))
def test_sources_of_any_memory(device, memory):
    """dA is that of ``x`` itself, whether the source can be made use of or not."""
    args, h = arguments(device), torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(6)).to(device)
    weight = torch.linspace(1, 2, 24, device=device)
    if memory == "learned apart":
        x, mean, rstd = torch.native_layer_norm(h, (24,), weight, -weight, 1e-5)
        source = rsfast.Source("layer_norm", h, mean, rstd, apart(weight), apart(-weight))
    elif memory == "input apart":
        wide = torch.stack([h, torch.full_like(h, float("nan"))], -1)[..., 0]
        x, source = F.gelu(h), rsfast.Source("gelu", wide)
    else:
        x, source = tokens_first(F.gelu(h)), rsfast.Source("gelu", h)
    args["weight"].requires_grad_(False)
    grads = []
    for given in (None, source):
        y = rsfast.lora_linear(**args | dict(x=x), bias=None, scaling=1.0, source=given, impl="fused")
        grads += torch.autograd.grad(y.square().sum(), args["lora_A"])
    torch.testing.assert_close(*grads)


def test_the_base_of_an_expansion_alone_has_a_gradient(device):
    s, B, base = torch.ones(5, 2, device=device), torch.ones(7, 2, device=device), torch.ones(5, 7, device=device)
    y = rsfast.lora_expand(s, B, base.requires_grad_(), impl="fused")
    (dbase,) = torch.autograd.grad(y, base, 3 * torch.ones_like(y))
    assert torch.equal(dbase, 3 * torch.ones_like(y))
