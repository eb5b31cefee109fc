"""Where the blocks of LoRA's kernels end: wide dropout, ranks of no multiple of eight, slices that end in a tile."""

import bisect

import pytest
import torch
import torch.nn.functional as F

import rsfast
from rsfast.lora import reference
from tests.cases import BF16, FP32
from tests.lora_cases import linear_case
from tests.recorder import Recorder
from tests.test_contract import assert_matches_the_oracle, run
from tests.test_lora import plan, saved_bytes


def whole(*shape, seed=0):
    """Small whole numbers: their products and sums are exact in any order."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("arm", ("composed", "expand"))
def test_dropout_wider_than_a_block(device, arm):
    """Of everything that reads or writes bits: y, dx and dA of inputs of several blocks of columns."""
    x, eye, seed = torch.ones(20, 136, device=device), torch.eye(136, device=device), torch.tensor(5, device=device)
    x, A = x.requires_grad_(), eye.clone().requires_grad_()
    with plan.forced({stage: plan.Choice(arm, 64, 64, 32) for stage in ("forward", "dgrad")}):
        y = rsfast.lora_linear(x, torch.zeros_like(eye), None, A, eye, 1.0, dropout_p=0.5, seed=seed, impl="fused")
        dx, dA = torch.autograd.grad(y, (x, A), torch.ones_like(y))
    kept = 2 * reference.keep_mask(20, 136, 0.5, seed).float()
    assert torch.equal(y, kept) and torch.equal(dx, kept) and torch.equal(dA, kept.sum(0).expand(136, 136))


def test_a_draw_at_the_threshold_is_kept(device):
    """The probability is that of a draw below it, neither of one at it."""
    seed, x, one = torch.tensor(5), torch.ones(1, 8, device=device), torch.ones(1, 8, device=device)

    def dropped(level):
        return not reference.keep_mask(1, 8, level / reference.LEVELS, seed)[0, 0]

    at = 1 + bisect.bisect_left(range(1, reference.LEVELS), True, key=dropped)  # the least that drops it
    for level, kept in ((at - 1, True), (at, False)):
        options = dict(dropout_p=level / reference.LEVELS, seed=seed.to(device))
        mask = reference.keep_mask(1, 8, options["dropout_p"], seed)
        assert mask[0, 0] == kept
        y = rsfast.lora_linear(x, 0 * one, None, torch.eye(8, device=device), one, 1.0, **options, impl="fused")
        factor = reference.LEVELS / (reference.LEVELS - level)
        torch.testing.assert_close(y.item(), mask.sum().item() * factor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("stage", ("forward", "dgrad"))
def test_columns_that_fill_up_the_ranks_count_for_nothing(device, stage):
    """One product of [x | s] takes ranks in eights: nothing behind the last, in memory of others, gets into it."""
    for options in ({}, dict(slices=((0, 0.5),)), *[dict(dropout_p=0.3)] * (stage == "forward")):
        case = linear_case(rank=3, **options)
        with plan.forced({stage: plan.Choice("augmented")}):
            assert_matches_the_oracle(case, (5, 13, 8), FP32, device)
    x, W, A, B = (t.to(device) for t in (whole(5, 13), whole(8, 13), whole(3, 13), whole(8, 3)))
    behind = torch.cat([A, torch.full((13, 13), float("nan"), device=device)])[:3]
    with plan.forced({stage: plan.Choice("augmented")}):
        y = rsfast.lora_linear(x.requires_grad_(), W, None, behind, B, 1.0, impl="fused")
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y, x @ W.T + x @ A.T @ B.T) and torch.equal(dx, (W + B @ A).sum(0).expand(5, 13))


def test_what_is_kept_has_the_ranks_alone(device):
    x, W, A, B = (t.to(device, BF16) for t in (whole(16, 24), whole(8, 24), whole(3, 24), whole(8, 3)))
    A.requires_grad_()
    with plan.forced({"forward": plan.Choice("augmented")}):
        kept, _ = saved_bytes(lambda: rsfast.lora_linear(x, W, None, A, B, 1.0, impl="fused"))
    assert kept == sum(t.nbytes for t in (x, W, A, B)) + 16 * 3 * 2


@pytest.mark.parametrize("slices", (((0, 33), (63, 102)), ((31, 32), (32, 64), (95, 97))))
@pytest.mark.parametrize("arm", ("composed", "augmented", "expand"))
def test_slices_that_end_beside_a_tile(device, arm, slices):
    """By a column on either side of it, forward and in the gradients."""
    adapted = sum(end - start for start, end in slices)
    shapes = ((7, 24), (102, 24), (102,), (2 * len(slices), 24), (adapted, 2))
    tensors = [whole(*shape, seed=i).to(device).requires_grad_() for i, shape in enumerate(shapes)]
    forced = {"forward": plan.Choice(arm, 32, 32, 16), "low": plan.Choice("composed" if arm == "composed" else "once")}
    results = []
    for impl in ("fused", "reference"):
        with plan.forced(forced):
            y = rsfast.lora_linear(*tensors, 1.0, slices=slices, impl=impl)
        results.append((y, *torch.autograd.grad(y, tensors, whole(*y.shape, seed=9).to(device))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(results[0][0], F.linear(*tensors[:3]))


@pytest.mark.parametrize("arm", ("composed", "expand"))
def test_tiles_whose_rows_have_other_adapters(device, arm):
    """Each of three tiles of rows has adapters that the ones before have not."""
    x, W, A, B = whole(6, 64, 8), whole(8, 8), whole(5, 2, 8), whole(5, 8, 2)
    x, W, A, B = (t.to(device).requires_grad_() for t in (x, W, A, B))
    ids, scaling = torch.tensor([4, 4, -1, 3, 0, 1], device=device), torch.ones(5, device=device)
    results = []
    for impl in ("fused", "reference"):
        with plan.forced({stage: plan.Choice(arm, 64, 64, 32) for stage in ("forward", "dgrad")}):
            y = rsfast.batched_lora_linear(x, W, None, A, B, scaling, ids, impl=impl)
        results.append((y, *torch.autograd.grad(y, (x, A, B), whole(*y.shape, seed=9).to(device))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_choice_is_asked_for_what_is_run(device, monkeypatch):
    """Sizes, slices, adapters, dropout, and the dtype of products: that of x even where its source is in another."""
    from rsfast.lora.kernels import launch

    asked, choose = [], launch.choose
    monkeypatch.setattr(
        launch, "choose", lambda stage, facts, *rest: asked.append(facts) or choose(stage, facts, *rest)
    )
    whole_one = dict(rows=15, contracted=13, outputs=8, rank=3, parts=1, adapters=0, dropout=False, dtype=BF16)
    for options, expected in (
        ({}, {}),
        (dict(dropout_p=0.3, slices=((0, 0.25), (0.5, 1))), dict(parts=2, dropout=True)),
        (dict(adapters=2), dict(adapters=2)),
    ):
        case = linear_case(rank=3, **options)
        shape = (3, 5, 13, 8) if "adapters" in options else (15, 13, 8)
        run(case, case.public, case.inputs(shape, BF16, device), impl="fused")
        assert set(asked) == {plan.Facts(**whole_one | expected)} and len(asked) == len(plan.STAGES)
        asked.clear()
    h = torch.randn(15, 13, device=device)
    A, B = (torch.ones(s, device=device).requires_grad_() for s in ((3, 13), (8, 3)))
    x, W, source = F.gelu(h).to(BF16), torch.ones(8, 13, device=device, dtype=BF16), rsfast.Source("gelu", h)
    rsfast.lora_linear(x, W, None, A, B, 1.0, source=source, impl="fused").sum().backward()
    assert set(asked) == {plan.Facts(**whole_one)}


@pytest.mark.parametrize("wanted", ((), ("x",), ("lora_A",), ("lora_B",), ("weight",), ("bias",)))
@pytest.mark.parametrize("low", ("composed", "once"))
def test_what_is_not_needed_is_empty(device, low, wanted):
    """As it is promised to the compiler, for each input that may want a gradient alone, and for none."""
    case = linear_case(rank=3, dropout_p=0.3)
    with Recorder() as recorder, plan.forced({"low": plan.Choice(low)}):
        if wanted:
            run(case, case.public, case.inputs((5, 13, 8), FP32, device), wanted=wanted, impl="fused")
        else:
            case.call(case.public, case.inputs((5, 13, 8), FP32, device), impl="fused")
    with plan.forced({"low": plan.Choice(low)}):
        assert len(recorder.calls) == 1 + bool(wanted)
        for op, args, kwargs in recorder.calls:
            torch.library.opcheck(op, args, kwargs, test_utils="test_faketensor")


@pytest.mark.parametrize("adapters", (0, 2))
@pytest.mark.parametrize("low, factor", (("composed", "composed"), ("once", "outer")))
def test_gradients_of_wide_factors_are_not_rounded_to_16_bits(device, low, factor, adapters):
    """Sums of whole numbers that bf16 does not hold, of bf16 inputs and fp32 factors."""
    x, W, dy = (t.to(device, BF16) for t in (whole(4, 75, 9).abs() + 1, whole(8, 9), whole(4, 75, 8, seed=1).abs() + 1))
    A, B = whole(*[adapters] * bool(adapters), 2, 9), whole(*[adapters] * bool(adapters), 8, 2, seed=2)
    A, B = (t.to(device).requires_grad_() for t in (A, B))
    args, op = (1.0,), rsfast.lora_linear
    if adapters:
        op = rsfast.batched_lora_linear
        args = torch.ones(adapters, device=device), torch.tensor([0, 1, -1, 0], device=device)
    with plan.forced({"low": plan.Choice(low), "factor": plan.Choice(factor)}):
        grads = torch.autograd.grad(op(x, W, None, A, B, *args, impl="fused"), (A, B), dy)
    wide = [t.double() for t in (x, W, A, B)]
    exact = op(*wide[:2], None, *wide[2:], *args, impl="reference")
    for ours, gold in zip(grads, torch.autograd.grad(exact, (A, B), dy.double()), strict=True):
        assert torch.equal(ours, gold) and not torch.equal(ours, ours.to(BF16).float())
