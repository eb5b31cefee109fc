"""The estimators under a size constraint."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import rsfast
from rsfast.kmeans import certify, scaled_bounds, size_bounds

KINDS = (rsfast.KMeans, rsfast.MiniBatchKMeans)
X = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
X[90:110] += 6
X[110:] -= 6


def least_cost(costs, lower, upper):
    """By the linear program itself."""
    n, k = costs.shape
    one_each = np.kron(np.eye(n), np.ones(k))
    sizes = np.kron(np.ones(n), np.eye(k))
    found = linprog(
        costs.flatten(), A_eq=one_each, b_eq=np.ones(n), A_ub=np.concatenate([sizes, -sizes]),
        b_ub=np.concatenate([upper, -np.asarray(lower)]), method="highs",
    )  # fmt: skip
    return found.fun


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "asked", [dict(rho=1.0), dict(rho=1.5), dict(size_max=25), dict(size_min=18, size_max=[20, 40, 30, 30, 30])]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_labels_are_the_cheapest_that_keep_the_bounds(kind, asked, weighted):
    w = X[:, 0].sigmoid().double() + 0.5 if weighted else None
    x = X.double()
    found = kind(5, random_state=0, **asked).fit(x, sample_weight=w)
    asked = {name: torch.tensor(v) if isinstance(v, list) else v for name, v in asked.items()}
    lower, upper = size_bounds(120, 5, **asked)
    sizes = found.labels_.bincount(minlength=5)
    assert ((lower <= sizes) & (sizes <= upper)).all() and found.certified_ is True
    costs = torch.cdist(x, found.cluster_centers_).square() * (1 if w is None else w[:, None])
    np.testing.assert_allclose(found.inertia_, least_cost(costs.numpy(), lower, upper), rtol=1e-9)
    reduced = costs - found.subsidies_
    chosen = reduced.gather(1, found.labels_[:, None])[:, 0]
    assert (chosen - reduced.min(1).values).max() < 1e-9 and (found.subsidies_ != 0).any()


def test_a_certificate_that_does_not_hold_is_seen():
    costs, ones, most = torch.tensor([[0.0, 3.0], [0.0, 1.0]]), torch.ones(2).long(), torch.full((2,), 2)
    good = torch.tensor([0, 1]), torch.tensor([0.0, 1.5]).double(), ones
    assert certify(costs, *good, ones, most)
    for labels, subsidies, counts, least in (
        (torch.tensor([1, 0]), good[1], ones, ones),  # another order costs more
        (good[0], torch.tensor([0.0, 4.0]).double(), ones, ones),  # row 0 would go too
        (good[0], good[1], ones, 0 * ones),  # paid for a bound that is not in the way
        (good[0], good[1], ones, 2 * ones),  # too few
        (0 * good[0], good[1], ones, ones),  # not the sizes of these labels
    ):
        assert not certify(costs, labels, subsidies, counts, least, most)


def test_the_user_writes_one_line():
    found = rsfast.KMeans(4, rho=2, random_state=0).fit(X.numpy())
    assert type(found.subsidies_) is np.ndarray and np.bincount(found.labels_).min() >= 120 / (4 * 2)
    assert np.array_equal(rsfast.KMeans(4, rho=2, random_state=0).fit_predict(X.numpy()), found.labels_)
    free = rsfast.KMeans(4, random_state=0).fit(X.numpy())
    assert np.bincount(free.labels_).min() < 15  # the bound was in the way


def test_centres_are_those_of_the_constrained_iteration():
    """Against the alternation written out, each assignment by the linear program."""
    x, k = X[::2].double(), 3
    lower, upper = size_bounds(60, k, rho=1.0)
    found = rsfast.KMeans(k, init=x[:k], rho=1.0, tol=0).fit(x)
    best = torch.inf
    centers = x[:k]
    for _ in range(50):
        costs = torch.cdist(x, centers).square()
        program = least_cost_labels(costs.numpy(), lower, upper)
        new = torch.stack([x[program == j].mean(0) for j in range(k)])
        cost = costs[torch.arange(60), program].sum()
        assert cost <= best + 1e-9
        best, moved, centers = cost, (new - centers).abs().max(), new
        if moved < 1e-12:
            break
    np.testing.assert_allclose(found.cluster_centers_, centers, atol=1e-9)


def least_cost_labels(costs, lower, upper):
    n, k = costs.shape
    one_each, sizes = np.kron(np.eye(n), np.ones(k)), np.kron(np.ones(n), np.eye(k))
    bounds = np.concatenate([upper, -np.asarray(lower)])
    constraints = dict(A_eq=one_each, b_eq=np.ones(n), A_ub=np.concatenate([sizes, -sizes]), b_ub=bounds)
    return torch.from_numpy(linprog(costs.flatten(), method="highs-ds", **constraints).x.reshape(n, k).argmax(1))


def test_bounds_that_are_not_in_the_way_change_nothing():
    free = rsfast.KMeans(4, random_state=0).fit(X)
    bound = rsfast.KMeans(4, random_state=0, size_min=1).fit(X)
    assert torch.equal(free.labels_, bound.labels_) and not bound.subsidies_.any() and bound.certified_
    torch.testing.assert_close(free.cluster_centers_, bound.cluster_centers_, rtol=1e-5, atol=1e-5)
    assert not hasattr(free, "subsidies_")
    assert not hasattr(bound.set_params(size_min=None).fit(X), "subsidies_")


def test_a_stream_is_steered_to_balance():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 4, generator=g) + 4 * (torch.arange(2000) % 20 == 0)[:, None]  # one row in twenty is far
    init = torch.cat([x[1:5], torch.full((1, 4), 4.0)])
    free, bound = (rsfast.MiniBatchKMeans(5, rho=rho, init=init, reassignment_ratio=0) for rho in (None, 1.25))
    for rows in x.split(200):
        free.partial_fit(rows)
        bound.partial_fit(rows)
        lower, _ = scaled_bounds(*size_bounds(5 * 2**20, 5, rho=1.25), 5 * 2**20, 200)
        assert bound.labels_.bincount(minlength=5).min() >= lower.min() >= 31 and bound.certified_
    share = {name: (m.counts_.min() / m.counts_.sum()).item() for name, m in (("free", free), ("bound", bound))}
    assert share["free"] < 0.08 < 0.14 < share["bound"]


def test_subsidies_persist_from_batch_to_batch():
    stream = rsfast.MiniBatchKMeans(3, rho=1.1, random_state=0).partial_fit(X[:60])
    first = stream.subsidies_
    assert (first > 0).any()
    stream.subsidies_ = first + 50 * (torch.arange(3) == 0)  # as if cluster 0 had needed much more
    pulled = stream.partial_fit(X[60:]).counts_[0]
    again = rsfast.MiniBatchKMeans(3, rho=1.1, random_state=0).partial_fit(X[:60]).partial_fit(X[60:]).counts_[0]
    assert pulled > again


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_clusters_as_rows_one_each(kind):
    x = torch.arange(6.0)[:, None].repeat(1, 2)
    for init in ("k-means++", "random"):
        found = kind(6, init=init, rho=1, random_state=0).fit(x)
        assert sorted(found.labels_.tolist()) == list(range(6))


@pytest.mark.parametrize("rho", [None, 1.5])
def test_a_stream_goes_on_from_its_state_as_if_it_had_not_stopped(rho):
    batches = X.numpy().astype(np.float32).reshape(6, 20, 3)
    options = dict(rho=rho, random_state=3, reassignment_ratio=0.5)
    stream, stopped = rsfast.MiniBatchKMeans(5, **options), rsfast.MiniBatchKMeans(5, **options)
    for number, batch in enumerate(batches):
        stream.partial_fit(batch, label=False)
        if number == 3:
            stopped = rsfast.MiniBatchKMeans(5, **options).resume(stopped.state())
        stopped.partial_fit(batch, label=False)
    ours, theirs = stream.state(), stopped.state()
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert stream.n_steps_ == 6 and (ours["subsidies"] is None) == (rho is None)


def test_a_batch_without_labels_moves_centres_as_one_with():
    """Without a constraint nothing else goes on with the next batch; with one, the subsidies are those of the step."""
    one, other = (rsfast.MiniBatchKMeans(4, random_state=0) for _ in range(2))
    for batch in X.split(40):
        one.partial_fit(batch)
        other.partial_fit(batch, label=False)
    assert one.cluster_centers_.equal(other.cluster_centers_) and one.counts_.equal(other.counts_)
    assert not hasattr(other, "labels_") and not hasattr(other, "certified_")
    centers = other.cluster_centers_
    assert other.partial_fit(X[:40], label=False).inertia_ == pytest.approx(
        torch.cdist(X[:40], centers).amin(1).square().sum().item(), rel=1e-5
    )
    with pytest.raises(ValueError, match="state must hold centers, .* got centers"):
        one.resume({"centers": 1})
    with pytest.raises(ValueError, match="of 5 clusters, got shapes"):
        rsfast.MiniBatchKMeans(5).resume(one.state())
