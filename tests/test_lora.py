"""What is special about linear layers with LoRA: every way to compute them, dropout, and who has which adapter."""

import math

import pytest
import torch
import torch.nn.functional as F

import rsfast
from rsfast.lora import reference
from tests.cases import BF16, CASES, FP32
from tests.lora_cases import linear_case
from tests.test_contract import assert_matches_the_oracle, assert_same_bits, run

plan = pytest.importorskip("rsfast.lora.kernels.plan")
LORA = {case.name: case for case in CASES if "lora_linear" in case.name}
ARMS = {  # stage -> what can run it, by candidates()
    "forward": ("composed", "augmented", "expand", "inside"),
    "dgrad": ("composed", "augmented", "expand"),
    "low": ("composed", "once"),
    "factor": ("composed", "outer"),
}


def facts(case, shape, dtype=FP32):
    x, weight, *_, A, B = case.inputs(shape, dtype, "cpu")
    _, options = case.pack(case.inputs(shape, dtype, "cpu"))
    several = len(A) if A.ndim == 3 else 0
    parts = len(options.get("slices") or (0,))
    return plan.Facts(
        x[..., 0].numel(), x.shape[-1], len(weight), B.shape[-1], parts, several, "dropout_p" in options, dtype
    )


def every_arm():
    """Rows that differ in what a stage has to do, with each implementation that may run it."""
    for name in (
        "lora_linear",
        "lora_linear_qv",
        "lora_linear_dropout",
        "batched_lora_linear",
        "batched_lora_linear_dropout_qv",
    ):
        case = LORA[name]
        shape = case.small[-1] if name.endswith("qv") else case.small[1] if len(case.small) > 1 else case.small[0]
        for stage in ARMS:
            found = facts(case, shape, BF16 if case.dtypes[-1] == BF16 else FP32)
            for arm in dict.fromkeys(choice.arm for choice in plan.candidates(stage, found)):
                yield pytest.param(name, shape, stage, arm, id=f"{name}-{stage}-{arm}")


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("name, shape, stage, arm", list(every_arm()))
def test_every_way_is_right(device, name, shape, stage, arm, dtype):
    with plan.forced({stage: plan.Choice(arm, 64, 64, 32)}):
        assert_matches_the_oracle(LORA[name], shape, dtype, device)


def test_every_way_is_offered():
    offered = {stage: {p.values[3] for p in every_arm() if p.values[2] == stage} for stage in ARMS}
    assert offered == {stage: set(arms) for stage, arms in ARMS.items()}


def test_all_composed_is_right(device):
    """What auto runs where no table speaks."""
    with plan.forced({stage: plan.COMPOSED for stage in plan.STAGES}):
        for case in LORA.values():
            assert_matches_the_oracle(case, case.small[0], case.dtypes[-1], device)


def test_tiles_larger_than_a_program_s_share(device):
    """Several tiles in either direction, on fewer programs than tiles."""
    choice = plan.Choice("expand", 32, 32, 16, num_warps=4)
    with plan.forced({"forward": choice, "dgrad": choice}):
        assert_matches_the_oracle(LORA["lora_linear"], (150, 40, 100), FP32, device)
        assert_matches_the_oracle(LORA["lora_linear_qv"], (70, 40, 102), FP32, device)
        assert_matches_the_oracle(LORA["batched_lora_linear"], (2, 131, 24, 70), FP32, device)


@pytest.mark.parametrize("rank", (1, 2, 16, 17, 100, 256))
def test_any_rank(device, rank):
    assert_matches_the_oracle(linear_case(rank=rank), (19, 24, 20), FP32, device)
    assert_matches_the_oracle(linear_case(rank=rank, adapters=2), (3, 5, 24, 20), FP32, device)


def whole_numbers(case, shape, device, seed=0):
    """Inputs whose products and sums are exact in any order, so that bits can be compared across implementations."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(-2, 3, t.shape, generator=g).to(t) for t in case.inputs(shape, FP32, device)]


@pytest.mark.parametrize("arm", ("composed", "expand"))
@pytest.mark.parametrize("name", ("batched_lora_linear", "batched_lora_linear_dropout_qv"))
def test_rows_of_no_adapter_are_the_layer_s(device, name, arm):
    case, shape = LORA[name], (4, 67, 24, 18)
    x, weight, bias, A, B = whole_numbers(case, shape, device)
    _, options = case.pack((x, weight, bias, A, B))
    ids = torch.tensor([-1, 1, -1, 0], device=device)
    scaling = torch.ones(len(A), device=device)
    with plan.forced({stage: plan.Choice(arm, 64, 64, 32) for stage in ("forward", "dgrad")}):
        x.requires_grad_()
        y = rsfast.batched_lora_linear(x, weight, bias, A, B, scaling, ids, impl="fused", **options)
        dy = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(3)).to(y)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y[ids < 0], F.linear(x, weight, bias)[ids < 0])
    assert torch.equal(dx[ids < 0], (dy @ weight)[ids < 0])
    assert not torch.equal(y[ids == 0], F.linear(x, weight, bias)[ids == 0])


@pytest.mark.parametrize("arm", ("composed", "expand"))
def test_rows_of_no_adapter_do_not_see_the_others(device, arm):
    case = LORA["batched_lora_linear"]
    x, weight, bias, A, B = case.inputs((4, 67, 24, 18), FP32, device)
    scaling, ids = torch.ones(3, device=device), torch.tensor([-1, 1, -1, 0], device=device)
    with plan.forced({"forward": plan.Choice(arm, 64, 64, 32)}):
        some, none = (
            rsfast.batched_lora_linear(x, weight, bias, A, B, scaling, each, impl="fused")
            for each in (ids, torch.full_like(ids, -1))
        )
    assert torch.equal(some[ids < 0], none[ids < 0])


def test_batched_is_a_loop_of_single_ones(device):
    """Outputs and gradients; every adapter's share of the gradients by itself."""
    case, shape = LORA["batched_lora_linear"], (6, 40, 24, 18)
    tensors = whole_numbers(case, shape, device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    x, weight, bias, A, B = leaves
    ids, scaling = torch.tensor([2, 0, -1, 2, 1, 0], device=device), torch.tensor([1.0, 2.0, 0.5], device=device)
    y = rsfast.batched_lora_linear(x, weight, bias, A, B, scaling, ids, impl="fused")
    dy = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), dy)
    for g in range(3):
        x, weight, bias, A, B = (t.clone().requires_grad_() for t in tensors)
        alone = rsfast.lora_linear(x[ids == g], weight, bias, A[g], B[g], scaling[g].item(), impl="fused")
        expected = torch.autograd.grad(alone, (x, A, B), dy[ids == g])
        assert torch.equal(y[ids == g], alone)
        assert torch.equal(dx[ids == g], expected[0][ids == g])
        assert torch.equal(dA[g], expected[1][g]) and torch.equal(dB[g], expected[2][g])


@pytest.mark.parametrize("ids", ([0] * 5, [-1] * 5, [4, 0, 4, 1, -1]))
def test_adapters_that_nobody_has_get_zero(device, ids):
    x, weight, bias, A, B = LORA["batched_lora_linear"].inputs((5, 9, 24, 18), FP32, device)
    A, B = (torch.cat([t, t[:2]]).requires_grad_() for t in (A, B))
    ids = torch.tensor(ids, device=device)
    y = rsfast.batched_lora_linear(x, weight, bias, A, B, torch.ones(5, device=device), ids, impl="fused")
    dA, dB = torch.autograd.grad(y.square().sum(), (A, B))
    used = torch.isin(torch.arange(5, device=device), ids)
    assert torch.equal(dA.flatten(1).any(1), used) and torch.equal(dB.flatten(1).any(1), used)


def test_more_rows_than_a_chunk(device):
    """Chunks of one adapter's rows: several of the fine ones, and more than one of the coarse."""
    assert_matches_the_oracle(LORA["batched_lora_linear"], (5, 900, 8, 8), BF16, device)


def test_a_batch_is_planned_once_for_all_layers(device):
    batch = rsfast.AdapterBatch(torch.tensor([1, -1, 0], device=device), 2)
    assert batch.plan(7) is batch.plan(7) and batch.plan(7) is not batch.plan(1)
    ids, counts, listed, order, fine, fine_last, *_ = batch.plan(7)
    assert ids.tolist() == [1] * 7 + [-1] * 7 + [0] * 7
    assert counts.tolist() == [2] and sorted(listed[0].tolist()) == [0, 1]
    assert order.tolist() == [*range(7, 14), *range(14, 21), *range(7)]
    assert fine[:3].tolist() == [[-1, 0, 7], [0, 7, 14], [1, 14, 21]] and (fine[3:, 1] == fine[3:, 2]).all()
    assert fine_last.tolist() == [1, 2, 3]


# Dropout


def test_what_is_kept_is_as_often_as_promised():
    """Binomial: the share of 2^18 draws within five deviations; rows, columns and seeds all differ."""
    seed = torch.tensor(11)
    for p in (0.1, 0.5, 0.9):
        keep = reference.keep_mask(512, 512, p, seed)
        share, deviation = keep.double().mean().item(), math.sqrt(p * (1 - p) / keep.numel())
        assert abs(share - (1 - p)) < 5 * deviation + 2**-17
        for axis in (0, 1):
            spread = keep.double().mean(axis).std().item()
            assert abs(spread - math.sqrt(p * (1 - p) / 512)) < 0.2 * math.sqrt(p * (1 - p) / 512)
        flat = keep.double().flatten() - keep.double().mean()
        for lag in (1, 2, 7, 8, 512, 513):  # neighbours in a word, in a group, in a row, in a column
            together = (flat[:-lag] * flat[lag:]).mean().item() / (p * (1 - p))
            assert abs(together) < 5 / math.sqrt(keep.numel())
        assert not torch.equal(keep, reference.keep_mask(512, 512, p, seed + 1))
        assert not torch.equal(keep, reference.keep_mask(512, 512, p, seed + 2**32))


def test_philox_is_philox():
    """The known answer for ten rounds of Philox 4x32 (Random123's kat_vectors), by our rounds."""
    rounds, reference.ROUNDS = reference.ROUNDS, 10
    try:  # counter and key 0
        words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
        for p in (0.25, 0.6):
            kept = reference.keep_mask(1, 8, p, torch.tensor(0))[0].tolist()
            draws = [w & 0xFFFF for w in words] + [w >> 16 for w in words]
            assert kept == [draw >= reference.levels(p) for draw in draws]
    finally:
        reference.ROUNDS = rounds


def test_forward_and_backward_drop_the_same(device):
    """With a LoRA of rank K that is the identity, what comes out is the dropped input, and dx its mask."""
    x = torch.rand(40, 24, device=device) + 1
    x.requires_grad_()
    eye, seed = torch.eye(24, device=device), torch.tensor(5, device=device)
    A = eye.clone().requires_grad_()
    y = rsfast.lora_linear(x, torch.zeros_like(eye), None, A, eye, 1.0, dropout_p=0.5, seed=seed, impl="fused")
    kept = (y != 0).to(y)
    dx, dA = torch.autograd.grad(y, (x, A), torch.ones_like(y))
    assert torch.equal(kept.bool(), reference.keep_mask(40, 24, 0.5, seed))
    assert torch.equal(y, 2 * x * kept) and torch.equal(dx, 2 * kept)
    torch.testing.assert_close(dA, (2 * x * kept).sum(0).expand(24, 24))
    with torch.no_grad():
        again = rsfast.lora_linear(x, torch.zeros_like(eye), None, A, eye, 1.0, dropout_p=0.5, seed=5, impl="fused")
    assert torch.equal(again, y)


def test_a_seed_is_drawn_from_the_generator(device):
    case = LORA["lora_linear_dropout"]
    tensors = case.inputs((5, 16, 7), FP32, device)
    x, weight, bias, A, B = tensors

    def draw():
        return rsfast.lora_linear(x, weight, bias, A, B, 1.0, dropout_p=0.5, impl="fused")

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first) and not torch.equal(first, second)


# Memory


def saved_bytes(call):
    """Bytes of distinct tensors that a forward keeps, by their storage."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    return sum(kept.values()), y


@pytest.mark.parametrize("dropout_p", (0.0, 0.1))
@pytest.mark.parametrize("arm", ("composed", "augmented", "expand", "inside"))
def test_what_is_kept_is_s_and_bits_beside_the_inputs(device, dropout_p, arm):
    if dropout_p and arm == "inside":
        pytest.skip("bits are drawn once, before the product")
    case = LORA["lora_linear"]
    x, weight, bias, A, B = case.inputs((64, 80, 48), BF16, device)
    A.requires_grad_(), B.requires_grad_()
    seed = torch.tensor(3, device=device)
    with plan.forced({"forward": plan.Choice(arm, 64, 64, 32)}):
        kept, _ = saved_bytes(
            lambda: rsfast.lora_linear(x, weight, bias, A, B, 1.0, dropout_p=dropout_p, seed=seed, impl="fused")
        )
    inputs = sum(t.nbytes for t in (x, weight, A, B))
    bits = x.numel() // 8 if dropout_p else 0
    assert kept == inputs + 64 * 16 * 2 + bits and bits <= x.nbytes / 16


def test_frozen_weights_get_no_product(device, monkeypatch):
    """Neither dW nor a bias gradient is asked for; without x's, dx is not computed either."""
    from rsfast.lora.kernels import launch

    case = LORA["lora_linear"]
    asked, dgrad = [], launch._dgrad
    monkeypatch.setattr(launch, "_dgrad", lambda *args: asked.append("dx") or dgrad(*args))
    x, weight, bias, A, B = case.inputs((33, 24, 16), FP32, device)
    leaves = (A.requires_grad_(), B.requires_grad_())
    y = rsfast.lora_linear(x, weight, bias, A, B, 1.0, impl="fused")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert not asked
    assert not [e for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::matmul")]
    x.requires_grad_()
    y = rsfast.lora_linear(x, weight, bias, A, B, 1.0, impl="fused")
    torch.autograd.grad(y, x, torch.ones_like(y))
    assert asked == ["dx"]


def test_a_wide_factor_makes_no_wide_copy_of_x(device):
    """fp32 factors and bf16 x: nothing of x's size in fp32 is made, and gradients come out in fp32."""
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.dtype == FP32 and t.numel() >= 64 * 80:
                    made.append(func)
            return out

    x, weight, bias, A, B = LORA["lora_linear"].inputs((64, 80, 80), BF16, device)
    A, B = (t.float().requires_grad_() for t in (A, B))
    with Watch():
        y = rsfast.lora_linear(x.requires_grad_(), weight, bias, A, B, 1.0, impl="fused")
        dx, dA, dB = torch.autograd.grad(y, (x, A, B), torch.ones_like(y))
    assert not made and (y.dtype, dx.dtype, dA.dtype, dB.dtype) == (BF16, BF16, FP32, FP32)


def test_tokens_first_in_memory_are_not_copied(device):
    case = LORA["lora_linear"]
    x, weight, bias, A, B = case.inputs((30, 24, 16), FP32, device)
    x = x.view(5, 6, 24).transpose(0, 1)
    y = rsfast.lora_linear(x, weight, bias, A, B, 1.5, impl="fused")
    assert y.stride() == y.transpose(0, 1).contiguous().transpose(0, 1).stride()
    assert torch.equal(y.transpose(0, 1), rsfast.lora_linear(x.transpose(0, 1), weight, bias, A, B, 1.5, impl="fused"))


def test_same_seed_same_bits_in_every_arm(device):
    case = LORA["lora_linear_dropout"]
    tensors = whole_numbers(case, (33, 40, 24), device)
    results = []
    for arm in ("composed", "expand"):
        with plan.forced({stage: plan.Choice(arm, 64, 64, 32) for stage in ("forward", "dgrad")}):
            results.append(run(case, case.public, tensors, impl="fused", wanted={"x"}))
    (y, _, (dx,)), (y2, _, (dx2,)) = results
    torch.testing.assert_close(y, y2, rtol=1e-6, atol=0)
    torch.testing.assert_close(dx, dx2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("lora_linear", "lora_linear_dropout", "batched_lora_linear"))
def test_composed_runs_twice_alike(device, name):
    case = LORA[name]
    tensors = case.inputs(case.small[0], FP32, device)
    with plan.forced({stage: plan.COMPOSED for stage in plan.STAGES}):
        assert_same_bits(case, *(run(case, case.public, tensors, impl="fused") for _ in "ab"))
