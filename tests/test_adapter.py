"""What is special about the gated adapter."""

import copy
import pathlib
import re

import numpy as np
import pytest
import torch
from torch import nn

import rsfast
from rsfast.testing import assert_within_budget
from tests.cases import BF16, CASES, FP16, FP32, WEIGHTS

DATA = pathlib.Path(__file__).parent / "data"
IMPLS = ("reference", "fused")
both_impls = pytest.mark.parametrize("impl", IMPLS)
with_and_without_shared = pytest.mark.parametrize("shared", (False, True), ids=("alone", "shared"))


def build(device, *, shared=False, impl="fused", width=24, dtype=FP32):
    """An adapter in the middle of its training: nothing is zero any more."""
    torch.manual_seed(0)
    sub = rsfast.SharedAdapter(32, 2) if shared else None
    adapter = rsfast.GatedAdapter(width, 32, 2, shared=sub, impl=impl)
    for name, p in adapter.named_parameters():
        if "up." in name or name.endswith("bias"):
            nn.init.normal_(p, std=0.3)
    return adapter.to(device, dtype)


def draw(*shape, device, seed=1, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def step(adapter, x, dy, lengths=None):
    """Output, dx, and the gradient of every parameter."""
    x = x.detach().requires_grad_()
    y = adapter(x, lengths)
    dx, *grads = torch.autograd.grad(y, [x, *adapter.parameters()], dy)
    return y.detach(), dx, dict(zip([name for name, _ in adapter.named_parameters()], grads, strict=True))


def assert_same(actual: dict, expected: dict):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# HarMA's names of WEIGHTS, in the adapter and in its shared sub-adapter
HARMA = ["img_proj_down.weight", "img_proj_down.bias"]
HARMA += [f"multihead_attention.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]
HARMA += ["img_proj_up.weight", "img_proj_up.bias", "gate1"]
HARMA_SHARED = [
    "BiShareAdapterxx." + n.replace("img_proj_down", "l1").replace("img_proj_up", "l2").replace("tion.", "tion1.")
    for n in HARMA
]


def golden(which, case, device):
    """The file, and its inputs and gradients in the order of the case's names."""
    file = np.load(DATA / f"harma_adapter_{which}.npz")
    names = dict(zip(WEIGHTS, HARMA, strict=True)) | {"residual_gate": "block_gate"}
    names |= {f"shared.{ours}": theirs for ours, theirs in zip(WEIGHTS, HARMA_SHARED, strict=True)}

    def read(key):
        t = torch.from_numpy(file[key]).to(device)
        return t.transpose(0, 1) if t.ndim == 3 else t  # HarMA is sequence first

    tensors = [read("x"), *(read(n if n == "block_gate" else f"param.{n}") for n in map(names.get, case.names[1:]))]
    grads = [read("grad_x"), *(read("grad_" * (n == "block_gate") + "grad." * (n != "block_gate") + n)
                               for n in map(names.get, case.names[1:]))]  # fmt: skip
    return read, tensors, grads


@pytest.mark.parametrize("dtype", (torch.float64, FP32), ids=str)
@pytest.mark.parametrize("which, row", (("image", "gated_adapter"), ("text_shared", "gated_adapter_shared")))
def test_equals_harma(which, row, dtype, device):
    """The reference in fp64 as closely as the file's fp32 holds it; the kernels in fp32 within their budget."""
    case = next(case for case in CASES if case.name == row)
    read, tensors, gold_grads = golden(which, case, device)
    dy, gold = read("grad_out"), (read("adapter_out"), read("block_out"), *gold_grads)

    def everything(dtype, impl):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        args, kwargs = case.pack(leaves)
        without_gate = rsfast.gated_adapter(*args[:10], **kwargs, impl=impl)
        y = case.call(rsfast.gated_adapter, leaves, impl=impl)
        return without_gate, y, *torch.autograd.grad(y, leaves, dy.to(dtype))

    names, scales = ("adapter_out", "block_out", *case.names), case.scale(tensors, dy)
    if dtype == torch.float64:
        for name, ours, theirs in zip(names, everything(dtype, "reference"), gold, strict=True):
            # the file rounds what went in as well as what came out, so small numbers carry the noise of large ones
            assert (ours - theirs).abs().max() <= torch.finfo(FP32).eps * theirs.abs().max(), name
        return
    fused, eager = everything(FP32, "fused"), everything(FP32, "reference")
    for name, ours, reference, theirs in zip(names, fused, eager, gold, strict=True):
        assert_within_budget(ours, theirs.double(), reference, terms=384, scale=scales.get(name), name=name)


@both_impls
@pytest.mark.parametrize("dtype", (FP32, FP16, BF16), ids=str)
@with_and_without_shared
def test_a_new_adapter_changes_nothing(shared, dtype, impl, device):
    sub = rsfast.SharedAdapter(32, 4) if shared else None
    for gate in (True, False):
        adapter = rsfast.GatedAdapter(24, 32, 4, shared=sub, residual_gate=gate, impl=impl).to(device, dtype)
        x = draw(2, 9, 24, device=device, dtype=dtype)
        assert torch.equal(adapter(x), x)
        assert torch.equal(adapter(x, torch.tensor([9, 4], device=device)), x)


@both_impls
@with_and_without_shared
def test_at_first_only_the_up_projection_learns(shared, impl, device):
    sub = rsfast.SharedAdapter(32, 4) if shared else None
    adapter = rsfast.GatedAdapter(24, 32, 4, shared=sub, impl=impl).to(device)
    *_, grads = step(adapter, draw(2, 9, 24, device=device), draw(2, 9, 24, device=device, seed=2))
    learning = {name for name, grad in grads.items() if grad.any()}
    assert learning == {"up.weight", "up.bias"}


@both_impls
@pytest.mark.parametrize("tokens", (11, 67))
@with_and_without_shared
def test_samples_never_mix(shared, tokens, impl, device):
    """One sample beside another and in another place keeps every bit."""
    adapter = build(device, shared=shared, impl=impl)
    x, dy = (draw(2, tokens, 24, device=device, seed=seed) for seed in (1, 2))
    y, dx, _ = step(adapter, x, dy)
    y2, dx2, _ = step(adapter, torch.stack([5 * x[1].flip(0), x[0]]), torch.stack([-dy[1], dy[0]]))
    assert torch.equal(y2[1], y[0]) and torch.equal(dx2[1], dx[0])
    assert not torch.equal(y2[0], y[1]) and not torch.equal(dx2[0], dx[1])


LENGTHS = {9: (0, 1, 9, 5), 67: (33, 65)}


def padded(tokens, device):
    lengths = torch.tensor(LENGTHS[tokens], device=device)
    x, dy = (draw(len(lengths), tokens, 24, device=device, seed=seed) for seed in (1, 2))
    return x, dy, lengths, torch.arange(tokens, device=device) >= lengths[:, None]


@both_impls
@pytest.mark.parametrize("tokens", LENGTHS)
@with_and_without_shared
def test_padding_passes_through_and_tells_nothing(shared, tokens, impl, device):
    adapter = build(device, shared=shared, impl=impl)
    x, dy, lengths, padding = padded(tokens, device)
    y, dx, grads = step(adapter, x, dy, lengths)
    assert torch.equal(y[padding], x[padding]) and torch.equal(dx[padding], dy[padding])
    garbage = padding[..., None]
    x2, dy2 = x.masked_fill(garbage, 1e4), dy.masked_fill(garbage, -3e3)
    y2, dx2, grads2 = step(adapter, x2, dy2, lengths)
    assert torch.equal(y2[~padding], y[~padding]) and torch.equal(dx2[~padding], dx[~padding])
    assert_same(grads2, grads)


@both_impls
@with_and_without_shared
def test_lengths_of_either_type_and_beyond_the_end(shared, impl, device):
    adapter = build(device, shared=shared, impl=impl)
    x, dy, lengths, _ = padded(9, device)
    _, _, grads = step(adapter, x, dy, lengths)
    assert_same(step(adapter, x, dy, torch.where(lengths == 9, 100, lengths).int())[2], grads)


@both_impls
@pytest.mark.parametrize("tokens", LENGTHS)
@with_and_without_shared
def test_lengths_are_as_good_as_cutting(shared, tokens, impl, device):
    adapter, exact = build(device, shared=shared, impl=impl), build(device, shared=shared, impl="reference").double()
    x, _, lengths, _ = padded(tokens, device)
    y = adapter(x, lengths)
    for sample, length in enumerate(lengths.tolist()):
        cut = x[sample : sample + 1, :length]
        gold, eager = exact(cut.double()), build(device, shared=shared, impl="reference")(cut)
        assert_within_budget(y[sample : sample + 1, :length], gold, eager, terms=96)


@pytest.mark.parametrize("tokens", (9, 67))
@with_and_without_shared
def test_full_lengths_are_no_lengths(shared, tokens, device):
    adapter = build(device, shared=shared)
    x, dy = (draw(1, tokens, 24, device=device, seed=seed) for seed in (1, 2))
    y, dx, grads = step(adapter, x, dy)
    y2, dx2, grads2 = step(adapter, x, dy, torch.tensor([tokens], device=device))
    assert torch.equal(y, y2) and torch.equal(dx, dx2)
    assert_same(grads2, grads)


@both_impls
def test_nothing_to_do_leaves_no_gradient(impl, device):
    adapter, x, dy = build(device, shared=True, impl=impl), *(draw(2, 5, 24, device=device, seed=s) for s in (1, 2))
    y, dx, grads = step(adapter, x, dy, torch.zeros(2, dtype=torch.int64, device=device))
    assert torch.equal(y, x) and torch.equal(dx, dy) and not any(grad.any() for grad in grads.values())


def test_two_adapters_own_one_sub_adapter(device):
    sub = rsfast.SharedAdapter(32, 4)
    towers = nn.ModuleDict({n: rsfast.GatedAdapter(w, 32, 4, shared=sub) for n, w in (("image", 24), ("text", 16))})
    state = towers.state_dict()
    owned = [name for name in state if ".shared." in name]
    assert len(owned) == 2 * len(WEIGHTS) and {name.split(".")[0] for name in owned} == {"image", "text"}
    assert len(list(towers.parameters())) == 3 * len(WEIGHTS) + 2  # the sub-adapter counts once; two block gates
    twin = copy.deepcopy(towers)
    assert twin["image"].shared is twin["text"].shared is not sub
    with torch.no_grad():
        for p in twin.parameters():
            p.normal_()
    twin.load_state_dict(state)
    assert twin["image"].shared is twin["text"].shared
    assert_same(twin.state_dict(), state)


@both_impls
def test_the_sub_adapter_keeps_its_own_heads(impl, device):
    adapter, x = build(device, shared=True, impl=impl), draw(2, 9, 24, device=device)
    two = adapter(x)
    adapter.shared.num_heads = 4
    args, shared = (x, *adapter.weights(), adapter.residual_gate), adapter.shared.weights()
    four = rsfast.gated_adapter(*args, shared=shared, num_heads=2, shared_heads=4, impl=impl)
    assert torch.equal(adapter(x), four) and not torch.equal(four, two)
    assert torch.equal(two, rsfast.gated_adapter(*args, shared=shared, num_heads=2, impl=impl))


def arguments(**changes):
    x = torch.randn(2, 5, 24)
    tensors = {name: torch.zeros(shape) for name, shape in zip(WEIGHTS, (
        (32, 24), (32,), (96, 32), (96,), (32, 32), (32,), (24, 32), (24,), ()), strict=True)}  # fmt: skip
    sub = build("cpu", shared=True).shared.weights()
    return {"x": x, **tensors, "residual_gate": torch.zeros(()), "shared": sub, "num_heads": 4, **changes}


SUB = build("cpu", shared=True).shared.weights()
ZEROS = torch.zeros
BAD = {
    "x must be (batch, tokens, width), got shape (5, 24)": dict(x=ZEROS(5, 24)),
    "x must be a floating point tensor, got torch.int64": dict(x=ZEROS(2, 5, 24).long()),
    "down_weight must be (bottleneck, width), got shape (32,)": dict(down_weight=ZEROS(32)),
    "down_weight must have shape (32, 25)": dict(x=ZEROS(2, 5, 25)),
    "down_bias must have shape (32,)": dict(down_bias=ZEROS(31)),
    "in_proj_weight must have shape (96, 32)": dict(in_proj_weight=ZEROS(32, 32)),
    "up_weight must have shape (24, 32)": dict(up_weight=ZEROS(32, 24)),
    "gate must have shape ()": dict(gate=ZEROS(1)),
    "residual_gate must have shape ()": dict(residual_gate=ZEROS(2)),
    "shared.up_bias must have shape (32,)": dict(shared=SUB._replace(up_bias=ZEROS(16))),
    "up_weight must be torch.float16, as x is, or torch.float32; got torch.bfloat16": dict(
        x=ZEROS(2, 5, 24).half(), up_weight=ZEROS(24, 32).bfloat16()
    ),
    "shared.gate must be torch.float32, as x is": dict(shared=SUB._replace(gate=ZEROS(()).double())),
    "down_weight must be on meta, as x is, got cpu": dict(x=ZEROS(2, 5, 24, device="meta")),
    "shared.down_weight must be on cpu, as x is, got meta": dict(
        shared=SUB._replace(down_weight=ZEROS(16, 32, device="meta"))
    ),
    "num_heads must divide the bottleneck of 32, got 5": dict(num_heads=5),
    "num_heads must divide the bottleneck of 32, got 0": dict(num_heads=0),
    "shared_heads must divide half the bottleneck of 32, got 3": dict(shared_heads=3),
    "lengths must be 2 integers, one a sample, got torch.int64 of shape (3,)": dict(lengths=torch.ones(3).long()),
    "lengths must be 2 integers, one a sample, got torch.float32 of shape (2,)": dict(lengths=torch.ones(2)),
    "lengths must be 2 integers, one a sample, got torch.bool of shape (2, 5)": dict(lengths=torch.ones(2, 5).bool()),
    "lengths must be on cpu, as x is, got meta": dict(lengths=torch.ones(2, dtype=torch.int64, device="meta")),
    "impl must be 'auto', 'fused' or 'reference', got 'fast'": dict(impl="fast"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    rsfast.gated_adapter(**arguments())
    with pytest.raises(ValueError, match=re.escape(message)):
        rsfast.gated_adapter(**arguments(**BAD[message]))


@pytest.mark.parametrize(
    "layer, message",
    (
        (lambda: rsfast.GatedAdapter(24, 32, 5), "num_heads must divide the bottleneck of 32, got 5"),
        (lambda: rsfast.GatedAdapter(24, 0), "num_heads must divide the bottleneck of 0, got 8"),
        (lambda: rsfast.SharedAdapter(33), "bottleneck must be even, got 33"),
        (lambda: rsfast.SharedAdapter(48, 16), "num_heads must divide the bottleneck of 24, got 16"),
        (
            lambda: rsfast.GatedAdapter(24, 32, 4, shared=rsfast.SharedAdapter(64)),
            "shared must have a bottleneck of 32, as the adapter, got 64",
        ),
    ),
)
def test_bad_layers_are_named(layer, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layer()


def test_fused_lists_every_reason(device):
    adapter = rsfast.GatedAdapter(8, 16, 4, impl="fused").to(device, torch.float64)
    with pytest.raises(NotImplementedError) as error:
        adapter(torch.ones(1, 1025, 8, dtype=torch.float64, device=device))
    for reason in ("x is torch.float64", "there are 1025 tokens", "the bottleneck is 16"):
        assert reason in str(error.value)
