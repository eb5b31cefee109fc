"""k-means keeps the precision it promises, whatever PyTorch is set to."""

import pytest
import torch

import rsfast
from rsfast.kmeans import constrained_assign, reference
from rsfast.kmeans.functional import lloyd, minibatch
from tests.case import FP16, FP32
from tests.kmeans_cases import CASES, data
from tests.test_kmeans import assert_same_bits, each_case, each_impl, exact_labels

WHOLE = {
    "lloyd": lambda d: lloyd(d.x, d.centers, max_iter=5),
    "minibatch": lambda d: minibatch(d.x, d.centers, batch_size=8, max_steps=5, seed=1)[:3],
    "plusplus": lambda d: rsfast.kmeans_plusplus(d.x, 4, random_state=1),
    "constrained": lambda d: constrained_assign(rsfast.kmeans_distances(d.x, d.centers), 7),
}


def near(device):
    """Centres that no product of 16-bit numbers tells apart."""
    given = data((40, 20, 5), FP32, device, offset=20.0)
    return given._replace(centers=given.x[::8] + 0.001)


@each_impl
@each_case
def test_autocast_stays_outside(case, impl, device):
    given = near(device)
    expected = case.call(given, impl=impl)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same_bits(case.call(given, impl=impl), expected)
        assert torch.is_autocast_enabled(device)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_runs_stay_outside_of_autocast(name, device):
    given = near(device)
    expected = WHOLE[name](given)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = WHOLE[name](given)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each_impl
@each_case
def test_nothing_keeps_gradients(case, impl, device):
    given = near(device)
    given = given._replace(x=given.x.requires_grad_(), centers=given.centers.requires_grad_())
    result = case.call(given, impl=impl)
    assert not any(t.requires_grad for t in ((result,) if isinstance(result, torch.Tensor) else result))


@pytest.mark.parametrize("switch", ("mkldnn", "cuda", "both"))
def test_products_that_may_be_rounded_are_taken_in_float64(switch):
    """PyTorch's newer switches too, under which the older question is an error."""
    given, backends = near("cpu"), torch.backends
    places = {"mkldnn": [backends.mkldnn.matmul], "cuda": [backends.cuda.matmul], "both": [backends]}[switch]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32"
        assert (reference._working(given.x) == torch.float64) is (switch != "cuda")
        labels = rsfast.kmeans_step(given.x, given.centers, impl="reference").labels
    finally:
        for place, was in zip(places, before, strict=True):
            place.fp32_precision = was
    assert torch.equal(labels, exact_labels(given.x, given.centers))


def test_without_onednn_labels_are_the_same(monkeypatch):
    given = near("cpu")
    monkeypatch.setattr(reference, "_onednn", lambda: None)
    for case in CASES[-3:-1]:
        subsidies = case.pack(given)[1].get("subsidies")
        assert torch.equal(case.call(given).labels, exact_labels(given.x, given.centers, subsidies))


def test_norms_may_be_given(monkeypatch):
    given = data((70, 20, 5), FP16, "cpu")
    steps = [reference.kmeans_step(given.x, given.centers, given.weights)]
    monkeypatch.setattr(reference, "_AT_ONCE", 64 * 20)  # of two chunks
    norms = reference.row_norms(given.x)
    steps.append(reference.kmeans_step(given.x, given.centers, given.weights, norms=norms))
    assert torch.equal(norms, torch.linalg.vector_norm(given.x.float(), dim=1))
    assert torch.equal(steps[0].labels, steps[1].labels) and torch.equal(steps[0].counts, steps[1].counts)
    torch.testing.assert_close(steps[0].inertia, steps[1].inertia, rtol=1e-6, atol=0)


@pytest.mark.parametrize("at_once", (2**22, 32), ids=("whole", "in pieces"))
def test_close_pairs_keep_their_digits(at_once, monkeypatch):
    """A row on its centre, one beside it, and one in the middle, for centres far apart; twice the same centre."""
    monkeypatch.setattr(reference, "_AT_ONCE", at_once)
    g = torch.Generator().manual_seed(0)
    centers = 100 * torch.randn(6, 16, generator=g)
    centers[4] = centers[1]
    x = torch.cat([centers, centers + 2.0**-8, centers[:1] / 3, centers[1:2] * (1 + 2.0**-20)])
    found = rsfast.kmeans_distances(x, centers, impl="reference")
    gold = (x.double()[:, None] - centers.double()).square().sum(2)
    torch.testing.assert_close(found.double(), gold, rtol=1e-4, atol=0)
    assert not found[:6].diagonal().any() and not found[1, 4] and not found[4, 1]
    kmeans = rsfast.KMeans(5, init=x[[0, 1, 2, 3, 5]], impl="reference").fit(x)
    assert not kmeans.transform(kmeans.cluster_centers_).diagonal().any()


@pytest.mark.parametrize("weighted", (False, True))
def test_rows_in_doubt_are_added_too(weighted):
    """Every row is, for the centres come in equal pairs."""
    given = data((40, 20, 5), FP32, "cpu")
    weights = given.weights if weighted else None
    centers = given.centers.repeat(2, 1)
    step = reference.kmeans_step(given.x, centers, weights)
    update = reference.kmeans_update(given.x, step.labels, 10, weights)
    assert step.labels.max() < 5 and not (reference._Nearest(given.x, centers, None, True)(given.x, 0) + 1).any()
    torch.testing.assert_close(step.sums, update.sums)
    assert torch.equal(step.counts, update.counts) and update.counts.sum() > 0
    distances = reference.kmeans_assign(given.x, centers).distances.double()
    cost = (distances if weights is None else distances * weights).sum()
    assert step.inertia.item() == pytest.approx(cost.item(), rel=1e-4)
