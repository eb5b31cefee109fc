"""What LoRA's operations take and refuse: messages that name what is wrong, and autocast."""

import contextlib
import math
import re

import pytest
import torch

import rsfast
from tests.cases import BF16, FP32

FP64 = torch.float64
FUSED = ("reference", "fused")


def draw(*shape, dtype=FP32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def given(op, **changes):
    """Arguments of an operation that fit: 2 samples of 3 tokens, 6 inputs, 4 outputs, rank 2, 3 adapters."""
    several = op.startswith("batched")
    axis = (3,) * several
    args = dict(
        x=draw(2, 3, 6), weight=draw(4, 6, seed=1), bias=draw(4, seed=2), lora_A=draw(*axis, 2, 6, seed=3),
        lora_B=draw(*axis, 4, 2, seed=4), scaling=torch.ones(3) if several else 0.5,
    )  # fmt: skip
    if op.endswith("shrink"):
        args = {name: args[name] for name in ("x", "lora_A", "scaling")}
    elif op.endswith("expand"):
        args = dict(s=draw(2, 3, 2), lora_B=args["lora_B"], base=draw(2, 3, 4))
    return args | (dict(adapter_ids=torch.tensor([2, -1])) if several else {}) | changes


def there(op, device):
    """The same on a device."""
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in given(op).items()}


def call(op, impl="reference", **changes):
    return getattr(rsfast, op if op == "batched_lora_linear" else op.removeprefix("batched_"))(
        **given(op, **changes), impl=impl
    )


LINEAR = ("lora_linear", "batched_lora_linear")
BATCHED = ("batched_lora_linear", "batched_lora_shrink", "batched_lora_expand")
OPS = ("lora_linear", "lora_shrink", "lora_expand", *BATCHED)
META = dict(device="meta")
REFUSED = [  # operations, changes, what the message says
    (LINEAR, dict(x=torch.tensor(1.0)), "x must have at least one dimension"),
    (LINEAR, dict(x=torch.ones(2, 3, 6, dtype=torch.int64)), "x must be a floating point tensor, got torch.int64"),
    (LINEAR, dict(weight=draw(4, 5)), "weight must be (N, 6) for x (2, 3, 6), got (4, 5)"),
    (LINEAR, dict(weight=draw(6)), "weight must be (N, 6)"),
    (LINEAR, dict(weight=draw(4, 6, dtype=FP64)), "weight must be torch.float32, as x is, outside autocast"),
    (LINEAR, dict(weight=torch.ones(4, 6, **META)), "weight must be on cpu, as the input is, got meta"),
    (LINEAR, dict(bias=draw(5)), "bias must be (4,) for weight (4, 6), got (5,)"),
    (LINEAR, dict(bias=draw(4, dtype=BF16)), "bias must be torch.float32, as x is, outside autocast"),
    (LINEAR, dict(bias=torch.ones(4, **META)), "bias must be on cpu"),
    (("lora_linear",), dict(lora_A=draw(3, 2, 6)), "lora_A must be (r, K), got shape (3, 2, 6)"),
    (("lora_linear",), dict(lora_A=draw(3, 6)), "lora_A must have shape (2, 6)"),
    (("lora_linear",), dict(lora_A=draw(2, 5)), "lora_A must have shape (2, 6)"),
    (LINEAR[:1], dict(lora_A=draw(0, 6), lora_B=draw(4, 0)), "a rank of 1 or more"),
    (LINEAR[:1], dict(lora_A=draw(2, 6, dtype=BF16)), "lora_A must be torch.float32, as x is, or torch.float32"),
    (LINEAR[:1], dict(lora_A=torch.ones(2, 6, **META)), "lora_A must be on cpu"),
    (LINEAR[:1], dict(lora_B=draw(5, 2)), "lora_B must have shape (4, 2)"),
    (LINEAR[:1], dict(lora_B=draw(4)), "lora_B must be (N, r), got shape (4,)"),
    (LINEAR[:1], dict(lora_B=draw(4, 2, dtype=FP64)), "lora_B must be torch.float32"),
    (LINEAR[:1], dict(scaling=torch.ones(3)), "scaling must be a number, got a tensor of shape (3,)"),
    (LINEAR[:1], dict(slices=((0, 2),)), "lora_B must have shape (2, 2)"),
    (LINEAR[:1], dict(slices=((0, 1), (1, 4))), "lora_A must have shape (4, 6)"),
    (LINEAR, dict(slices=((0, 5),)), "within 0 to 4, got ((0, 5),)"),
    (LINEAR, dict(slices=((2, 4), (0, 2))), "in order and apart"),
    (LINEAR, dict(slices=((0, 3), (2, 4))), "in order and apart"),
    (LINEAR, dict(slices=((2, 2),)), "slices must be ranges of columns"),
    (LINEAR, dict(slices=((-1, 2),)), "slices must be ranges of columns"),
    (LINEAR, dict(slices=()), "slices must be ranges of columns"),
    (LINEAR, dict(slices=((0, 1.5),)), "slices must be pairs of integers"),
    (LINEAR, dict(slices=(0, 4)), "slices must be pairs of integers"),
    (LINEAR, dict(slices=4), "slices must be pairs of integers"),
    (LINEAR, dict(dropout_p=1.0), "dropout_p must be at least 0 and below 1, got 1.0"),
    (LINEAR, dict(dropout_p=-0.1), "dropout_p must be at least 0"),
    (LINEAR, dict(dropout_p=math.nan), "dropout_p must be at least 0"),
    (LINEAR, dict(dropout_p=0.5, seed=1.5), "seed must be an integer of 64 bits or a tensor of one, got 1.5"),
    (LINEAR, dict(dropout_p=0.5, seed=2**63), "seed must be an integer of 64 bits"),
    (LINEAR, dict(dropout_p=0.5, seed=torch.tensor(1.0)), "seed must be one int64, got torch.float32"),
    (LINEAR, dict(dropout_p=0.5, seed=torch.tensor([1, 2])), "seed must be one int64, got torch.int64 of shape (2,)"),
    (LINEAR, dict(dropout_p=0.5, seed=torch.zeros((), dtype=torch.int64, **META)), "seed must be on cpu"),
    (OPS, dict(impl="fast"), "impl must be 'auto', 'fused' or 'reference', got 'fast'"),
    (BATCHED[:1], dict(lora_A=draw(2, 6)), "lora_A must be (G, r, K), got shape (2, 6)"),
    (BATCHED[:1], dict(lora_B=draw(2, 4, 2)), "must have shape (3, 4, 2)"),
    (BATCHED[:2], dict(scaling=torch.ones(2)), "scaling must be a floating point tensor of shape (3,), one a adapter"),
    (BATCHED[:2], dict(scaling=0.5), "scaling must be a floating point tensor of shape (3,), one a adapter, got float"),
    (BATCHED[:2], dict(scaling=torch.ones(3, dtype=torch.int64)), "scaling must be a floating point tensor"),
    (BATCHED[:2], dict(scaling=torch.ones(3, requires_grad=True)), "scaling must not require a gradient"),
    (BATCHED[:2], dict(scaling=torch.ones(3, **META)), "scaling must be on cpu"),
    (BATCHED, dict(adapter_ids=torch.tensor([0, 3])), "-1 (no adapter) to 2, one of 3 adapters; got 0 to 3"),
    (BATCHED, dict(adapter_ids=torch.tensor([-2, 0])), "adapter_ids must be -1 (no adapter) to 2"),
    (BATCHED, dict(adapter_ids=torch.tensor([0.0, 1.0])), "adapter_ids must be a tensor of int32 or int64"),
    (BATCHED, dict(adapter_ids=[0, 1]), "adapter_ids must be a tensor of int32 or int64, got list"),
    (BATCHED, dict(adapter_ids=torch.tensor([0, 1, 2])), "adapter_ids must be (2,), one a sample, or (2, 3)"),
    (BATCHED, dict(adapter_ids=torch.zeros(3, 2, dtype=torch.int64)), "adapter_ids must be (2,), one a sample"),
    (BATCHED, dict(adapter_ids=torch.tensor(0)), "adapter_ids must be (2,), one a sample"),
    (BATCHED, dict(adapter_ids=rsfast.AdapterBatch(torch.tensor([0, 1]), 4)), "for 4 adapters, but there are 3"),
    (("lora_shrink",), dict(x=torch.ones(2, 3, 6, dtype=torch.int64)), "x must be a floating point tensor"),
    (("lora_shrink",), dict(lora_A=draw(2, 5)), "lora_A must take 6 features for x (2, 3, 6), got (2, 5)"),
    (("lora_shrink",), dict(scaling=torch.ones(1)), "scaling must be a number without adapter_ids"),
    (("lora_shrink",), dict(adapter_ids=torch.tensor([0, 1])), "lora_A must be (G, r, K), got shape (2, 6)"),
    (("lora_expand",), dict(s=torch.tensor(1.0)), "s must have at least one dimension"),
    (("lora_expand",), dict(s=draw(2, 3, 3)), "lora_B must have shape (..., 4, r)"),
    (("lora_expand",), dict(lora_B=draw(5, 2)), "lora_B must have shape (..., 4, r)"),
    (("lora_expand",), dict(lora_B=draw(4)), "lora_B must be (N, r)"),
    (("lora_expand",), dict(base=torch.tensor(1.0)), "base must have at least one dimension"),
    (("lora_expand",), dict(base=draw(2, 2, 4)), "base must be torch.float32 of shape (2, 3, 'N') on cpu"),
    (("lora_expand",), dict(base=draw(2, 3, 4, dtype=BF16)), "base must be torch.float32"),
    (("lora_expand",), dict(base=torch.ones(2, 3, 4, **META)), "base must be torch.float32"),
    (("lora_expand",), dict(slices=((0, 5),)), "slices must be ranges of columns"),
    (("lora_expand",), dict(base=None, slices=()), "slices must be ranges of columns, in order and apart, from 0"),
    (("lora_expand",), dict(base=None, slices=((0, 2),)), "lora_B must have shape (..., 2, r) for 2 outputs"),
]


@pytest.mark.parametrize(
    "op, changes, says", [pytest.param(op, *rest, id=f"{op}-{rest[1][:40]}") for ops, *rest in REFUSED for op in ops]
)
def test_what_does_not_fit_is_refused_by_name(op, changes, says):
    for impl in FUSED if "impl" not in changes else [changes["impl"]]:
        others = {name: value for name, value in changes.items() if name != "impl"}
        with pytest.raises(ValueError, match=re.escape(says)):
            call(op, impl, **others)


@pytest.mark.parametrize("op", OPS)
def test_why_it_cannot_be_fused_is_said_in_full(op):
    first = "s" if op.endswith("expand") else "x"
    wide = {name: t.double() for name, t in given(op).items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    tall = {
        name: t.repeat_interleave(130, {"lora_A": -2, "lora_B": -1, "s": -1}[name])
        for name, t in wide.items()
        if name in ("lora_A", "lora_B", "s")
    }
    with pytest.raises(NotImplementedError, match="x is torch.float64.*\n.*rank is 260; the kernels take 1 to 256"):
        call(op, "fused", **wide | tall)
    assert call(op, "auto", **wide | tall).dtype == given(op, **wide)[first].dtype


@pytest.mark.parametrize("op", OPS)
def test_no_second_derivative_and_no_forward_mode(op, device):
    args, first = there(op, device), "s" if op.endswith("expand") else "x"
    x = args[first].requires_grad_()
    (dx,) = torch.autograd.grad(call(op, "fused", **args).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: take impl='reference'"):
        dx.sum().backward()
    with pytest.raises(NotImplementedError, match="torch.func is active"):
        torch.func.jvp(lambda t: call(op, "fused", **args | {first: t}), (x.detach(),), (x.detach(),))


# Autocast


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("op", OPS)
def test_autocast_is_casting_by_hand(op, impl, device):
    """fp32 inputs and parameters: bf16 out, gradients in each one's own dtype, all bits those of ``.to(bf16)``."""
    results = []
    for autocast in (True, False):
        args = there(op, device)
        tensors = {n: t.clone() for n, t in args.items() if isinstance(t, torch.Tensor) and n != "adapter_ids"}
        leaves = {n: t.requires_grad_() for n, t in tensors.items() if n != "scaling"}
        cast = {n: t if autocast or n.startswith("lora") else t.to(BF16) for n, t in leaves.items()}
        options = dict(dropout_p=0.5, seed=3) if op.endswith("linear") else {}
        with torch.autocast(device, BF16) if autocast else contextlib.nullcontext():
            y = call(op, impl, **args | cast, **options)
        dy = draw(*y.shape, seed=9).to(device, BF16)
        results.append((y, *torch.autograd.grad(y, list(leaves.values()), dy)))
    for auto, hand in zip(*results, strict=True):
        assert auto.dtype == hand.dtype and torch.equal(auto, hand)
    assert results[0][0].dtype == BF16 and {t.dtype for t in results[0][1:]} == {FP32}


def test_autocast_takes_parameters_of_any_floating_dtype():
    wide = {name: given("lora_linear")[name].double() for name in ("weight", "bias", "lora_A", "lora_B")}
    with torch.autocast("cpu", BF16):
        y = call("lora_linear", **wide)
        with pytest.raises(ValueError, match="weight must be"):
            call("lora_linear", weight=torch.ones(4, 6, dtype=torch.int64))
    assert torch.equal(y, call("lora_linear", **{n: t.to(BF16) for n, t in (wide | dict(x=draw(2, 3, 6))).items()}))
