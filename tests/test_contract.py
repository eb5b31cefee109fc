"""The promises every operation makes, checked once for all of them."""

import functools
import inspect
import math

import pytest
import torch

from rsfast.testing import assert_within_budget
from tests import kmeans_cases, test_kmeans
from tests.cases import CASES, FP32
from tests.recorder import Recorder

FUSED = [case for case in CASES if case.has_kernel()]
WIRED = [case for case in CASES if case.tiny]
each_case = pytest.mark.parametrize("case", WIRED, ids=str)


def unless_waiting(case, *values, **more):
    return pytest.param(case, *values, marks=() if case in FUSED else pytest.mark.skip("no kernel yet"), **more)


each_kernel = pytest.mark.parametrize("case", [unless_waiting(case) for case in WIRED], ids=str)
GRID = [
    unless_waiting(case, shape, dtype, id=f"{case}-{'x'.join(map(str, shape))}-{str(dtype)[6:]}")
    for case in CASES
    for shape in case.small
    for dtype in case.dtypes
]


def run(case, fn, tensors, dy=None, wanted=None, **options):
    """Output, its gradient, and the gradients of the tensors named in ``wanted``, all by default."""
    wanted = case.names if wanted is None else wanted
    leaves = [t.detach().requires_grad_(name in wanted) for name, t in zip(case.names, tensors, strict=True)]
    y = case.call(fn, leaves, **options)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return y.detach(), dy, torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy.to(y.dtype))


def tiny(case, device, dtype=FP32):
    return case.inputs(case.tiny, dtype, device)


def assert_same_bits(case, actual, expected, names=None):
    (y, _, grads), (y2, _, grads2) = actual, expected
    for name, one, two in zip(("y", *(names or case.names)), (y, *grads), (y2, *grads2), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two), name


def plain_errors(case, tensors, dy, draws=8):
    """Error of plain PyTorch in each gradient; in one that is a single number, the largest over several draws of dy.

    One number is right by chance now and then, so its own error says little.
    """
    several = []
    for fn, leaves, options in (
        (case.public, tensors, dict(impl="reference")),  # casts weights as the kernel does
        (case.reference, [t.double() for t in tensors], {}),
    ):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = case.call(fn, leaves, **options)
        rolled = ((dy.roll(17 * i) * (1 + i / 8)).to(dy.dtype).to(y.dtype) for i in range(draws))
        several.append([torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in rolled])
    draws = ([eager - exact for eager, exact in zip(*pair, strict=True)] for pair in zip(*several, strict=True))
    return [max(e, key=torch.linalg.vector_norm) if e[0].numel() == 1 else e[0] for e in zip(*draws, strict=True)]


def plain_error(case, tensors, gold, draws=8):
    """Error of plain PyTorch in the output; in one that is a number or two, the largest over inputs nearly the same."""
    if gold.numel() > 2:
        return case.call(case.public, tensors, impl="reference") - gold
    g, several = torch.Generator().manual_seed(2), []
    for i in range(draws):
        noise = (torch.randn(t.shape, generator=g).to(t) * (1e-3 * (i > 0)) for t in tensors)
        near = [t + t * change for t, change in zip(tensors, noise, strict=True)]
        exact = case.call(case.reference, [t.double() for t in near])
        several.append(case.call(case.public, near, impl="reference") - exact)
    several = torch.stack(several)
    return several.gather(0, several.abs().argmax(0, keepdim=True))[0]


def assert_matches_the_oracle(case, shape, dtype, device, products=0.0):
    """Output and every gradient, within the budget.

    ``products``: relative error that the promised precision of products makes in a gradient.
    """
    tensors = case.inputs(shape, dtype, device)
    y, dy, grads = run(case, case.public, tensors, impl="fused")
    gold, _, gold_grads = run(case, case.reference, [t.double() for t in tensors], dy)
    plain = case.call(case.public, tensors, impl="reference")
    errors = (plain_error(case, tensors, gold), *plain_errors(case, tensors, dy))
    names, terms, scales = ("y", *case.names), max(case.terms(shape), 1), case.scale(tensors, dy)
    for name, ours, exact, error, like in zip(
        names, (y, *grads), (gold, *gold_grads), errors, (plain, *tensors), strict=True
    ):
        assert ours.dtype == like.dtype, name
        # fp32 parameters beside a 16-bit input have 16-bit products; the output is in the precision that it promises
        judged = like.dtype if name == "y" else dtype
        scale = scales.get(name)
        if products and name != "y" and scale is None:
            scale = exact.abs().max().item() * (1 + products / (1 + math.sqrt(terms)) / torch.finfo(FP32).eps)
        assert_within_budget(ours.to(judged), exact, (exact + error).to(judged), terms=terms, scale=scale, name=name)


@pytest.mark.parametrize("case, shape, dtype", GRID)
def test_matches_the_oracle(case, shape, dtype, device):
    assert_matches_the_oracle(case, shape, dtype, device)


@each_case
def test_oracle_gradients(case):
    """Along a random direction for each tensor, which is as far as large parameters allow."""
    tensors = [t.requires_grad_() for t in tiny(case, "cpu", torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: case.call(case.reference, t), tensors, fast_mode=True)


@functools.cache
def calls(case, device):
    with Recorder() as recorder:
        run(case, case.public, tiny(case, device), impl="fused")
    return recorder.calls


@each_kernel
def test_registration(case, device):
    assert calls(case, device)
    for op, args, kwargs in calls(case, device):
        torch.library.opcheck(op, args, kwargs)


def test_every_registered_operation_has_a_case(device):
    seen = {op.name() for case in FUSED if case in WIRED for op, _, _ in calls(case, device)}
    seen |= {op.name() for case in kmeans_cases.CASES for op, _, _ in test_kmeans.calls(case, device)}
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rsfast::")}
    assert registered - kmeans_cases.ONE_PASS == seen


@each_case
def test_compiles_whole(case, device):
    tensors, impl = tiny(case, device), "fused" if case in FUSED else "reference"
    torch._dynamo.reset()
    compiled = torch.compile(case.public, fullgraph=True, backend="aot_eager")  # so that the bits can be compared
    expected = run(case, case.public, tensors, impl=impl)
    assert_same_bits(case, run(case, compiled, tensors, impl=impl), expected)


LAYOUTS = {
    "transposed": lambda t: t.permute([*range(t.ndim)][::-1]).contiguous().permute([*range(t.ndim)][::-1]),
    "every_other": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_kernel
def test_accepts_strided_inputs(case, device, layout):
    tensors = tiny(case, device)
    expected = run(case, case.public, tensors, impl="fused")
    strided = [LAYOUTS[layout](t) for t in tensors]
    actual = run(case, case.public, strided, LAYOUTS[layout](expected[1]), impl="fused")
    assert_same_bits(case, actual, expected)


@each_kernel
def test_runs_twice_alike(case, device):
    tensors = case.inputs(case.small[-1], FP32, device)
    assert_same_bits(case, *(run(case, case.public, tensors, impl="fused") for _ in "ab"))


@each_kernel
def test_forward_is_the_same_without_gradients(case, device):
    tensors = tiny(case, device)
    with torch.no_grad():
        y = case.call(case.public, tensors, impl="fused")
    assert not y.requires_grad and torch.equal(y, run(case, case.public, tensors, impl="fused")[0])


@each_kernel
def test_gradients_do_not_depend_on_who_else_wants_one(case, device):
    tensors = tiny(case, device)
    y, dy, grads = run(case, case.public, tensors, impl="fused")
    grads = dict(zip(case.names, grads, strict=True))
    for wanted in filter(None, ({case.names[0]}, {*case.names[1:]}, {*case.names[1::2]})):
        names = [name for name in case.names if name in wanted]
        alone = run(case, case.public, tensors, dy, wanted, impl="fused")
        assert_same_bits(case, alone, (y, dy, [grads[name] for name in names]), names)


@each_case
def test_signatures_agree(case):
    public, reference = (list(inspect.signature(f).parameters) for f in (case.public, case.reference))
    assert [p for p in public if p not in ("normalize", "check_finite", "source", "impl")] == reference
