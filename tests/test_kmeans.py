"""The promises of every operation of k-means, for plain PyTorch and for the kernels."""

import functools

import pytest
import torch

from rsfast.kmeans import reference
from rsfast.testing import assert_within_budget
from tests.case import BF16, FP16, FP32
from tests.kmeans_cases import CASES, data
from tests.recorder import Recorder

IMPLS = ("reference", "fused")
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_impl = pytest.mark.parametrize("impl", IMPLS)
GRID = [
    pytest.param(case, shape, dtype, id=f"{case}-{'x'.join(map(str, shape))}-{str(dtype)[6:]}")
    for case in CASES
    for shape in case.small
    for dtype in (FP32, FP16, BF16)
]


def fields(result):
    """Outputs by name."""
    return {"all": result} if isinstance(result, torch.Tensor) else result._asdict()


def assert_same_bits(one, two):
    for (name, a), b in zip(fields(one).items(), fields(two).values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def exact_labels(x, centers, subsidies=None):
    x, centers = x.double(), centers.double()
    subsidies = centers.new_zeros(len(centers)) if subsidies is None else subsidies.double()
    return reference.direct_scores(x, centers, subsidies).argmin(1)


@each_impl
@pytest.mark.parametrize("case, shape, dtype", GRID)
def test_matches_float64(case, shape, dtype, impl, device):
    given = data(shape, dtype, device)
    gold = fields(case.call(given._replace(x=given.x.double()), impl="reference"))
    plain = fields(case.call(given, impl="reference"))
    (n, d, _), size = shape, given.x.double().abs().max().item() if shape[0] else 0.0
    for name, ours in fields(case.call(given, impl=impl)).items():
        if name == "labels":
            subsidies = case.pack(given)[1].get("subsidies")
            expected = exact_labels(given.x, given.centers, subsidies) if n else gold[name]
            assert ours.dtype == torch.int64 and torch.equal(ours, expected)
        elif name == "counts":  # weights are added in float64, in some order
            assert ours.dtype == torch.float64
            torch.testing.assert_close(ours, gold[name], rtol=1e-14 * (n + 1) if "weights" in str(case) else 0, atol=0)
        else:
            terms, scale = (n, n * size) if name == "sums" else (n * d, d * size**2)
            scale = n * scale if name == "inertia" else scale
            wanted = torch.float64 if name == "inertia" else FP32
            assert ours.dtype == wanted
            assert_within_budget(
                ours.float(), gold[name], plain[name].float(), terms=max(terms, 1), scale=scale / (n or 1), name=name
            )  # fmt: skip


@each_case
def test_runs_twice_alike(case, device):
    given = data(case.small[-1], FP32, device)
    assert_same_bits(*(case.call(given, impl="fused") for _ in "ab"))


@functools.cache
def calls(case, device):
    with Recorder() as recorder:
        case.call(data(case.tiny, FP32, device), impl="fused")
    return recorder.calls


@each_case
def test_registration(case, device):
    assert calls(case, device)
    for op, args, kwargs in calls(case, device):
        torch.library.opcheck(op, args, kwargs)


@each_case
def test_compiles_whole(case, device):
    given = data(case.tiny, FP32, device)
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(given, impl="fused"), case.call(given, impl="fused"))


LAYOUTS = {
    "wider": lambda t: torch.nn.functional.pad(t, (3, 5), value=float("nan"))[:, 3:-5],
    "transposed": lambda t: t.T.contiguous().T,
    "aligned": lambda t: torch.nn.functional.pad(t, (0, 16), value=float("nan"))[:, : t.shape[1]],
}


@each_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_may_be_strided(case, layout, device):
    given = data((20, 16, 5), FP32, device)
    strided = LAYOUTS[layout](given.x)
    assert_same_bits(case.call(given._replace(x=strided), impl="fused"), case.call(given, impl="fused"))


@each_case
def test_centres_may_be_of_any_dtype_and_layout(case, device):
    given = data((20, 16, 5), BF16, device)
    for centers in (given.centers.half(), given.centers.double() / 3, given.centers.T.contiguous().T):
        other = given._replace(centers=centers)
        one, two = (fields(case.call(other, impl=impl)) for impl in IMPLS)
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=2e-5, atol=1e-4)


@each_case
def test_weights_may_be_of_any_dtype_and_layout(case, device):
    given = data((20, 16, 5), FP32, device)
    halves = given._replace(weights=given.weights.half(), subsidies=given.subsidies.half())
    same = halves._replace(weights=halves.weights.double(), subsidies=halves.subsidies.double())
    apart = same._replace(**{k: torch.stack([v, v - 99], 1)[:, 0] for k, v in same._asdict().items() if v.ndim == 1})
    expected = case.call(halves, impl="fused")
    assert_same_bits(case.call(same, impl="fused"), expected)
    if "update" not in str(case):  # labels have no other layout that is theirs
        apart = apart._replace(labels=same.labels)
    else:
        apart = apart._replace(labels=torch.stack([same.labels, same.labels * 0 - 1], 1)[:, 0])
    assert_same_bits(case.call(apart, impl="fused"), expected)


@pytest.mark.parametrize("clusters", (5, 300))
@each_impl
def test_rows_without_a_cluster_count_for_nothing(clusters, impl, device):
    given = data((50, 12, clusters), FP32, device)
    kept = given.labels >= 0
    kernels = functools.partial(CASES[3].call, impl=impl)
    few = given._replace(x=given.x[kept], labels=given.labels[kept], weights=given.weights[kept])
    for one, two in zip(kernels(given), kernels(few), strict=True):
        torch.testing.assert_close(one, two)
    none = given._replace(labels=torch.full_like(given.labels, -1))
    assert not any(t.any() for t in kernels(none))


@pytest.mark.parametrize("clusters", (5, 300))
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_sums_keep_fp32s_digits(clusters, dtype, device):
    """Whole numbers of 24 bits, and powers of two far apart: every sum is exact, in any order."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**7), 2**7, (64, 16), generator=g).to(dtype)
    if dtype == FP32:
        x = x * 2**10 + torch.randint(0, 2**10, x.shape, generator=g)
    labels = torch.arange(64) % 5
    given = data((64, 16, clusters), dtype, device)._replace(x=x.to(device), labels=labels.to(device))
    sums = CASES[2].call(given, impl="fused").sums.cpu()
    assert torch.equal(sums[:5].double(), torch.stack([x[labels == k].double().sum(0) for k in range(5)]))
    assert not sums[5:].any()


@pytest.mark.parametrize("clusters", (3, 300))
def test_largest_numbers_do_not_overflow_in_parts(clusters, device):
    x = torch.full((1, 16), torch.finfo(FP32).max, device=device)
    given = data((1, 16, clusters), FP32, device)._replace(x=x, labels=torch.zeros(1, dtype=torch.long, device=device))
    assert torch.equal(CASES[2].call(given, impl="fused").sums[:1], x)


@each_case
def test_float64_has_no_kernel(case, device):
    given = data(case.tiny, torch.float64, device)
    with pytest.raises(NotImplementedError, match="x is float64"):
        case.call(given, impl="fused")
