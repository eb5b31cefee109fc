"""The one-pass CUDA kernels, on a GPU or under emulation: the same sources."""

import pytest
import torch

from rsfast import _extension
from rsfast.kmeans import reference
from rsfast.kmeans.functional import lloyd, minibatch
from rsfast.testing import assert_within_budget
from tests.case import BF16, FP16, FP32

pytest.importorskip("triton")
from rsfast.kmeans.kernels import onepass

pytestmark = pytest.mark.skipif(bool(_extension.missing()), reason="; ".join(_extension.missing()))
DTYPES = (FP32, FP16, BF16)
SHAPES = [  # rows, features, clusters: every kernel, teams of 1, 2, 4, 5 and 8 blocks, ragged and whole
    (100, 64, 5), (65, 128, 32), (70, 192, 17), (300, 256, 32), (90, 320, 32), (97, 336, 20), (61, 1280, 32),
    (40, 2040, 3), (97, 72, 64), (50, 520, 40), (33, 1280, 64), (17, 2048, 33), (1, 64, 1), (5, 8, 5),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _poisoned_workspace(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(255))


def data(n, d, k, dtype, device, spread=1.0, offset=0.0):
    g = torch.Generator().manual_seed(n + d + k)
    centers = torch.randn(k, d, generator=g) * spread
    x = torch.randn(n, d, generator=g) + centers[torch.randint(k, (n,), generator=g)] + offset
    return x.to(device, dtype), (centers + 0.5 * torch.randn(k, d, generator=g) + offset).to(device)


def step(x, centers, subsidies=None, exact=True):
    assert onepass.serves(x, len(centers))
    return onepass.step(x, centers, subsidies, exact)


def assert_step(x, centers, subsidies=None):
    labels, sums, counts, energy = step(x, centers, subsidies)
    gold = reference.kmeans_step(x.double(), centers.double(), None, subsidies)
    assert torch.equal(labels, gold.labels)
    assert torch.equal(counts, gold.counts)
    eager = reference.kmeans_update(x, gold.labels, len(centers))
    # each sum may cancel: its terms are as large as the largest row
    scale = gold.sums.abs().max().item() + x.double().abs().max().item()
    assert_within_budget(sums, gold.sums, eager.sums, terms=len(x), scale=scale, name="sums")
    assert energy.item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_equals_float64(shape, dtype, device):
    if dtype == FP16 and shape[1] > 1024 and shape[2] > 32:  # would not fit the registers
        assert not onepass.serves(torch.zeros(1, shape[1], dtype=dtype, device=device), shape[2])
        return
    assert_step(*data(*shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_centres_are_told_apart(dtype, device):
    x, centers = data(200, 64, 32, dtype, device, spread=20.0)
    x = (centers[0].cpu() + torch.randn(200, 64, generator=torch.Generator().manual_seed(1))).to(x)
    centers[1] = centers[0] + 1e-5 * centers[2]
    assert_step(x, centers)
    wrong = step(x, centers, exact=False)[0] != reference.kmeans_step(x.double(), centers.double()).labels
    assert wrong.any()  # else the certificate had nothing to do


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_from_the_origin_labels_are_exact(dtype, device):
    assert_step(*data(200, 64, 32, dtype, device, spread=0.1, offset=300.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", (1.0, 2.0**-60, 2.0**60))
def test_ties_go_to_the_first(dtype, scale, device):
    if dtype == FP16 and scale != 1:
        return
    g = torch.Generator().manual_seed(0)
    x = (torch.randint(0, 3, (200, 16), generator=g) * scale).to(device, dtype)
    centers = (torch.randint(0, 3, (40, 16), generator=g) * scale).to(device)
    centers[7], centers[39] = centers[2], centers[30]
    labels, sums, counts, _ = step(x, centers)
    scores = reference.direct_scores(x.double(), centers.double(), x.new_zeros(40, dtype=torch.float64))
    assert torch.equal(labels, scores.argmin(1))
    assert counts[7] == counts[39] == 0
    assert torch.equal(sums / scale, reference.kmeans_update(x.float() / scale, labels, 40).sums)


def test_large_fp16(device):
    x, centers = data(100, 64, 9, FP32, device)
    assert_step((x * 10000).half(), centers * 10000)
    assert_step((x * 1e-5).half(), centers * 1e-5)


def test_constant_rows_and_centres(device):
    x = torch.ones(70, 64, device=device)
    labels, sums, counts, _ = step(x, torch.ones(4, 64, device=device))
    assert not labels.any() and counts.tolist() == [70, 0, 0, 0] and torch.equal(sums[0], x.sum(0))


def test_few_rows_are_in_doubt(device):
    x, centers = data(1000, 64, 32, BF16, device)
    _, _, status = onepass.lloyd(x, centers, torch.full((1000,), -1, device=device), True, 1, 0.0)
    assert status[1:2].view(torch.int64).item() < 20


def test_subsidies(device):
    x, centers = data(200, 64, 12, BF16, device)
    subsidies = torch.linspace(-90, 90, 12, dtype=torch.float64, device=device)
    assert_step(x, centers, subsidies)
    plain = reference.kmeans_step(x.double(), centers.double()).labels
    assert (step(x, centers, subsidies)[0] != plain).any()


def test_rows_may_be_strided(device):
    x, centers = data(100, 128, 9, BF16, device)
    assert_step(x[:, 64:], centers[:, 64:].contiguous())
    assert_step(x[::3], centers)


def test_what_is_not_served(device):
    x = torch.zeros(10, 64, device=device)
    assert onepass.serves(x, 64) and not onepass.serves(x, 65)
    assert not onepass.serves(x.double(), 2)
    assert not onepass.serves(x[:, :62], 2) and not onepass.serves(x[:, 1:61], 2)  # no whole copies of 16 bytes
    assert not onepass.serves(x.T, 2)
    assert not onepass.serves(torch.zeros(10, 4096, device=device), 2)


def reference_lloyd(x, centers, max_iter, tol):
    labels = None
    for n_iter in range(1, max_iter + 1):
        last, step = labels, reference.kmeans_step(x.double(), centers.double())
        labels, new = step.labels, (step.sums / step.counts[:, None]).float()
        shift = (new.double() - centers.double()).square().sum().item()
        centers = new
        if last is not None and torch.equal(labels, last):
            return centers, labels, n_iter, onepass.LABELS_STAY
        if shift <= tol:
            return centers, labels, n_iter, onepass.WITHIN_TOLERANCE
    return centers, labels, max_iter, onepass.RAN_OUT


@pytest.mark.parametrize("max_iter, tol", ((50, 0.0), (50, 30.0), (2, 0.0)))
@pytest.mark.parametrize("shape, dtype", (((200, 64, 5), BF16), ((150, 336, 12), FP32), ((90, 128, 40), FP16)), ids=str)
def test_lloyd_is_its_steps(shape, dtype, max_iter, tol, device):
    x, _ = data(*shape, dtype, device, spread=0.1)
    start = x[: shape[2]].float()
    centers, labels, status = onepass.lloyd(x, start, torch.full((len(x),), -1, device=device), True, max_iter, tol)
    gold, last, n_iter, outcome = reference_lloyd(x, start, max_iter, tol)
    assert onepass.read_status(status) == (n_iter, outcome) and torch.equal(labels, last)
    torch.testing.assert_close(centers, gold, rtol=1e-6, atol=1e-6)
    assert torch.equal(start, x[: shape[2]].float())


def test_lloyd_goes_on_from_labels(device):
    x, _ = data(100, 64, 5, BF16, device)
    centers, labels, _ = onepass.lloyd(x, x[:5].float(), torch.full((100,), -1, device=device), True, 50, 0.0)
    status = onepass.lloyd(x, centers, labels, True, 50, 0.0)[2]
    assert onepass.read_status(status) == (1, onepass.LABELS_STAY)


def test_lloyd_leaves_an_empty_cluster_to_the_caller(device):
    x, _ = data(100, 64, 5, BF16, device)
    start = x[:5].float()
    start[3] = 1e4
    centers, _, status = onepass.lloyd(x, start, torch.full((100,), -1, device=device), True, 50, 0.0)
    assert onepass.read_status(status) == (0, onepass.EMPTY_CLUSTER) and torch.equal(centers, start)


def reference_minibatch(x, centers, counts, order, smoothing, patience, ratio, tol):
    """Sculley's update with scikit-learn's reassignment and stopping rules, a step at a time."""
    average = least = None
    centers, counts, since, idle = centers.double(), counts.clone(), 0, 0
    for n_steps, rows in enumerate(order, 1):
        since += len(rows)
        due = bool((counts == 0).any()) or since >= 10 * len(centers)
        since = 0 if due else since
        step = reference.kmeans_step(x[rows].double(), centers)
        new, counts = counts[:, None] * centers + step.sums, counts + step.counts
        new = torch.where(step.counts[:, None] > 0, new / counts[:, None].clamp(min=1), centers)
        if due and ratio:
            poor = counts < ratio * counts.max()
            poor[counts.sort(stable=True).indices[len(rows) // 2 :]] = False
            new[poor] = x[rows[: int(poor.sum())]].double()
            counts[poor] = counts[~poor].min()
        shift, centers = (new - centers).square().sum().item(), new.float().double()
        if n_steps == 1:
            continue
        mean = step.inertia.item() / len(rows)
        average = mean if average is None else average + smoothing * (mean - average)
        if tol and shift <= tol:
            return centers, counts, n_steps, onepass.WITHIN_TOLERANCE
        idle = 0 if least is None or average < least else idle + 1
        least = average if idle == 0 else least
        if patience and idle >= patience:
            return centers, counts, n_steps, onepass.NO_IMPROVEMENT
    return centers, counts, n_steps, onepass.RAN_OUT


@pytest.mark.parametrize(
    "ratio, patience, tol, outcome",
    [(0.0, 0, 0.0, 0), (0.6, 0, 0.0, 0), (0.0, 2, 0.0, onepass.NO_IMPROVEMENT), (0, 0, 0.5, onepass.WITHIN_TOLERANCE)],
)
@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
def test_minibatches_are_their_definition(ratio, patience, tol, outcome, dtype, device):
    x, _ = data(300, 72, 8, dtype, device, spread=0.5)
    order = torch.randint(300, (25, 40), generator=torch.Generator().manual_seed(3)).to(device)
    counts, start = torch.zeros(8, dtype=torch.float64, device=device), x[:8].float()
    status = onepass.fresh_status(x)
    centers, counted, status = onepass.minibatch(
        x, start, counts, order, True, tol, 0.3, patience, ratio, status
    )  # fmt: skip
    gold, gold_counts, n_steps, ended = reference_minibatch(x, start, counts, order, 0.3, patience, ratio, tol)
    assert ended == outcome and onepass.read_status(status) == (n_steps, ended)
    assert torch.equal(counted, gold_counts) and not counts.any()
    torch.testing.assert_close(centers, gold.float(), rtol=1e-6, atol=1e-6)


def test_minibatches_go_on_where_they_stopped(device):
    x, _ = data(300, 64, 8, BF16, device)
    order = torch.randint(300, (9, 40), generator=torch.Generator().manual_seed(4)).to(device)
    state = x[:8].float(), torch.zeros(8, dtype=torch.float64, device=device), onepass.fresh_status(x)
    for parts in ((order,), (order[:4], order[4:])):
        centers, counts, status = state
        for part in parts:
            centers, counts, status = onepass.minibatch(x, centers, counts, part, True, 0.0, 0.3, 0, 0.6, status)
        if len(parts) == 1:
            whole = centers, counts, status
    for one, two in zip(whole, (centers, counts, status), strict=True):
        assert torch.equal(one.view(torch.int32), two.view(torch.int32))


def test_same_bits_every_time(device):
    x, centers = data(200, 336, 32, FP32, device)
    first = step(x, centers)
    assert all(torch.equal(a, b) for a, b in zip(first, step(x, centers), strict=True))


def test_registration(device):
    x, centers = data(40, 64, 5, BF16, device)
    labels, counts = torch.full((40,), -1, device=device), torch.zeros(5, dtype=torch.float64, device=device)
    order = torch.zeros(2, 8, dtype=torch.int64, device=device)
    for op, args in (
        (onepass.step, (x, centers, None, True)),
        (onepass.lloyd, (x, centers, labels, True, 3, 0.0)),
        (onepass.minibatch, (x, centers, counts, order, True, 0.0, 0.1, 0, 0.0, onepass.fresh_status(x))),
    ):
        torch.library.opcheck(op, args)


def test_lloyd_runs_in_one_launch_and_reseeds_empty_clusters(device):
    x, _ = data(200, 64, 6, FP32, device, spread=3.0)
    start = x[:6].clone()
    start[3] = 1e3
    for first in (x[:6], start):
        plain = lloyd(x, first, tol=0.0, impl="reference")
        fused = lloyd(x, first, tol=0.0, impl="fused")
        assert torch.equal(fused.labels, plain.labels) and fused.n_iter == plain.n_iter
        assert torch.equal(fused.counts, plain.counts) and fused.counts.min() > 0
        torch.testing.assert_close(fused.centers, plain.centers, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("patience, ratio", ((None, 0.0), (3, 0.0), (10, 0.5)))
def test_minibatches_run_in_few_launches(patience, ratio, device):
    x, _ = data(300, 64, 6, FP32, device, spread=2.0)
    options = dict(batch_size=32, max_steps=70, max_no_improvement=patience, reassignment_ratio=ratio, seed=5)
    plain, fused = (minibatch(x, x[:6], impl=impl, **options) for impl in ("reference", "fused"))
    assert fused.n_steps == plain.n_steps and torch.equal(fused.counts, plain.counts)
    torch.testing.assert_close(fused.centers, plain.centers, rtol=1e-5, atol=1e-5)
