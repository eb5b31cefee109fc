"""The exact size constraint against a solver of linear programmes, and against its own certificate."""

import fractions

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.optimize import linprog

from rsfast.kmeans import ascend, constrained_assign, dissolve, scaled_bounds, size_bounds
from rsfast.kmeans.constraint import ascent, assign, finish, fixed


def random_costs(rng, ties=False, most=60, dtype=np.float32):
    n = int(rng.integers(1, most))
    k = int(rng.integers(1, min(9, n) + 1))
    costs = rng.random((n, k)) * rng.choice([1, 10, 1000]) + rng.random(k) * rng.choice([0, 0.5, 2])
    return (np.round(costs * rng.choice([2, 8])) / 8 if ties else costs).astype(dtype)


def random_bounds(rng, kind, n, k):
    share, all_of_them = n // k, np.full(k, n)
    lower = rng.integers(0, share + 1, k) if kind != "upper" else np.zeros(k, int)
    upper = (
        np.minimum(n, -(-n // k) + rng.integers(0, rng.choice([1, 3, n]) + 1, k)) if kind != "lower" else all_of_them
    )
    if kind == "equal":
        lower, upper = np.full(k, share), np.full(k, -(-n // k))
    return torch.from_numpy(lower), torch.from_numpy(np.maximum(lower, upper))


def least_cost(costs, lower, upper):
    """By scipy's HiGHS."""
    n, k = costs.shape
    of_rows = scipy.sparse.kron(scipy.sparse.eye(n), np.ones((1, k)), format="csr")
    of_clusters = scipy.sparse.kron(np.ones((1, n)), scipy.sparse.eye(k), format="csr")
    found = linprog(
        costs.ravel(),
        A_ub=scipy.sparse.vstack([-of_clusters, of_clusters]),
        b_ub=np.r_[-lower.numpy(), upper.numpy()],
        A_eq=of_rows,
        b_eq=np.ones(n),
        method="highs",
    )
    return found.fun


def total(costs, labels):
    return costs.double().gather(1, labels[:, None]).sum().item()


def check_certificate(costs, found, lower, upper):
    """Complementary slackness, without any tolerance: it proves that nothing is cheaper."""
    labels, subsidies, counts = found
    assert counts.equal(torch.bincount(labels, minlength=costs.shape[1]))
    assert (lower <= counts).all() and (counts <= upper).all()
    scores = costs.double() - subsidies
    assert scores.gather(1, labels[:, None])[:, 0].equal(scores.amin(1)), "a label is not the cheapest"
    assert counts[subsidies > 0].equal(lower[subsidies > 0]), "paid for more than was asked"
    assert counts[subsidies < 0].equal(upper[subsidies < 0]), "taxed with room left"


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("kind", ["lower", "upper", "both", "equal"])
def test_optimal(kind, ties, monkeypatch):
    rng = np.random.default_rng([ord(kind[0]), ties])
    for _ in range(40):
        numbers = random_costs(rng, ties)
        costs = torch.from_numpy(numbers)
        lower, upper = random_bounds(rng, kind, *costs.shape)
        monkeypatch.setattr(finish, "NEAR", int(rng.choice([1, 8, 1 << 14])))  # so that lists run out, or do not
        monkeypatch.setattr(assign, "ROUNDS", int(rng.choice([0, 1, 16])))
        start = torch.from_numpy(rng.normal(size=costs.shape[1]) * numbers.max()) if rng.random() < 0.4 else None
        found = constrained_assign(costs, lower, upper, subsidies=start, impl="reference")
        check_certificate(costs, found, lower, upper)
        best = least_cost(numbers.astype(np.float64), lower, upper)
        assert total(costs, found.labels) == pytest.approx(best, rel=1e-9, abs=1e-9)  # HiGHS's own is 1e-7


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_few_paths_need_few_rows(ties, monkeypatch):
    """The rows that move most cheaply decide as all rows do, bit for bit."""
    generator, shares, original = torch.Generator().manual_seed(5), [], ascent.nearest

    def noted(*args):
        rows = original(*args)
        shares.append(rows.double().mean().item())
        return rows

    def all_rows(gaps, *_):
        return torch.ones_like(gaps[0], dtype=torch.bool)

    for rounds in (2, 4, 6, 16):
        monkeypatch.setattr(assign, "ROUNDS", rounds)
        costs = torch.rand(3000, 6, generator=generator) + torch.linspace(0, 0.4, 6)
        costs = (100 * costs).round() if ties else costs
        found = []
        for nearest in (noted, all_rows):
            monkeypatch.setattr(ascent, "nearest", nearest)
            found.append(constrained_assign(costs, 400, 700, impl="reference"))
        for one, two in zip(*found, strict=True):
            assert one.equal(two)
        check_certificate(costs, found[0], torch.full((6,), 400), torch.full((6,), 700))
    assert len(shares) >= 4 and max(shares) < 0.9, shares


def test_nothing_in_the_way_costs_nothing(monkeypatch):
    monkeypatch.setattr(assign, "as_gaps", None)
    costs = torch.rand(50, 3, generator=torch.manual_seed(0))
    labels, subsidies, counts = constrained_assign(costs, 1, 49)
    assert labels.equal(costs.argmin(1)) and not subsidies.any() and counts.sum() == 50


def test_ties_go_to_the_lowest_index():
    assert constrained_assign(torch.zeros(4, 3), 0).labels.tolist() == [0, 0, 0, 0]
    assert constrained_assign(torch.zeros(4, 3), 1).labels.tolist() == [1, 2, 0, 0]


@pytest.mark.parametrize("bounds", [(20, None), (0, 25), (20, 20), (5, 30)], ids=str)
def test_very_many_ties_are_settled_at_once(bounds, monkeypatch):
    monkeypatch.setattr(finish, "NEAR", 10)
    monkeypatch.setattr(assign, "PLAIN", finish.PLAIN._replace(shortest_paths=None))
    found = constrained_assign(torch.full((100, 5), 7.0), *bounds, impl="reference")
    assert (found.counts >= bounds[0]).all() and (found.counts <= (bounds[1] or 100)).all()
    assert not found.subsidies.any()


def test_settling_leaves_the_rest_to_paths(monkeypatch):
    """Ties lead from 0 to 1 and from 1 to 2 only: what 2 lacks has to pass through 1."""
    monkeypatch.setattr(finish, "NEAR", 4)
    costs = torch.tensor([[0.0, 0.0, 9.0]] * 20 + [[9.0, 0.0, 0.0]] * 10)
    found = constrained_assign(costs, 10, impl="reference")
    check_certificate(costs, found, torch.full((3,), 10), torch.full((3,), 30))
    assert total(costs, found.labels) == 0


def test_one_cluster_and_one_point_each():
    assert constrained_assign(torch.rand(5, 1), 5, 5).labels.tolist() == [0] * 5
    costs = torch.tensor([[1.0, 2.0, 9.0], [1.0, 5.0, 9.0], [1.0, 3.0, 4.0]])
    assert constrained_assign(costs, 1, 1).labels.tolist() == [1, 0, 2]
    assert [len(t) for t in constrained_assign(torch.empty(0, 3), 0)] == [0, 3, 3]


def test_constants_of_rows_and_order_of_clusters_change_nothing():
    rng = np.random.default_rng(0)
    costs = torch.from_numpy(np.round(rng.random((80, 6)) * 2**16)) / 2**10
    found = constrained_assign(costs, 12)
    constants = torch.from_numpy(rng.integers(-(2**30), 2**30, (80, 1)))
    assert constrained_assign(costs + constants, 12).labels.equal(found.labels)
    order = torch.randperm(6, generator=torch.manual_seed(0))
    assert order[constrained_assign(costs[:, order], 12).labels].equal(found.labels)


def test_a_distant_point_takes_no_digits_from_the_others():
    costs = torch.from_numpy(random_costs(np.random.default_rng(3), most=61))[:, :4]
    costs = torch.cat([costs, torch.full((1, costs.shape[1]), 2.0**40)])  # an outlier: a large constant
    share = len(costs) // costs.shape[1]
    found = constrained_assign(costs, share)
    check_certificate(costs, found, *size_bounds(*costs.shape, size_min=share))
    assert constrained_assign(costs[:-1], share - 1).labels.shape == (len(costs) - 1,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_dtype_is_read_as_the_numbers_that_it_holds(dtype):
    costs = torch.rand(60, 5, generator=torch.manual_seed(1), dtype=torch.float64).to(dtype)
    found = constrained_assign(costs, 11)
    assert found.labels.equal(constrained_assign(costs.double(), 11).labels)
    strided = torch.stack([costs, costs], -1)[..., 0].requires_grad_()
    again = constrained_assign(strided, 11)
    assert again.labels.equal(found.labels) and not again.subsidies.requires_grad
    assert not ascend(strided, found.subsidies, again.counts, again.counts).requires_grad


def test_tiny_and_huge_costs_scale():
    costs = torch.rand(40, 4, generator=torch.manual_seed(2), dtype=torch.float64)
    found = constrained_assign(costs, 10)
    for scale in (2.0**-900, 2.0**900):
        scaled = constrained_assign(costs * scale, 10)
        assert scaled.labels.equal(found.labels) and scaled.subsidies.equal(found.subsidies * scale)


def test_gaps_are_rounded_to_the_nearest_unit():
    unit = 2.0**-49  # of a spread of 1, which is the first that needs 50 bits
    costs = torch.tensor([[3.0, 3.0 + 1, 3.0], [0.0, 1.5 * unit + unit / 8, 0.4 * unit]], dtype=torch.float64)
    assert fixed.as_gaps(costs, fixed.spread_of(costs)).units.T.tolist() == [[0, 2**49, 0], [0, 2, 0]]


def test_a_spread_too_small_to_scale_is_a_tie():
    costs = torch.rand(40, 4, dtype=torch.float64) * 2.0**-1060
    assert not fixed.as_gaps(costs, fixed.spread_of(costs)).units.any()
    found = constrained_assign(costs, 9)
    assert (found.counts >= 9).all() and found.subsidies.isfinite().all()


def test_subsidies_are_a_start_that_saves_the_climb(monkeypatch):
    costs = torch.rand(90, 6, generator=torch.manual_seed(3))
    found = constrained_assign(costs, 15)
    monkeypatch.setattr(assign, "PLAIN", finish.PLAIN._replace(climb=lambda gaps, units, *_: (units, found.labels)))
    again = constrained_assign(costs, 15, subsidies=found.subsidies, impl="reference")
    assert again.labels.equal(found.labels) and again.subsidies.equal(found.subsidies)


def test_ascend_is_its_definition():
    costs = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 4.0], [0.0, 8.0]])
    lower, upper = torch.tensor([0, 2]), torch.tensor([4, 4])
    assert ascend(costs, torch.zeros(2), lower, upper).tolist() == [0, 2]  # the second nearest point is worth 2
    assert ascend(costs, torch.zeros(2), torch.tensor([0, 0]), torch.tensor([1, 4])).tolist() == [-4, 0]
    assert ascend(costs, torch.tensor([0.0, 9.0]), lower, upper).tolist() == [0, 4]  # two leave, and one for 4
    assert ascend(costs, torch.tensor([0.0, 9.0]), torch.tensor([0, 0]), upper).tolist() == [0, 0]  # nothing is asked
    assert ascend(costs, torch.zeros(2), lower, upper, rounds=0).tolist() == [0, 0]


def test_ascend_never_pays_too_much():
    rng = np.random.default_rng(5)
    for _ in range(20):
        costs = torch.from_numpy(random_costs(rng, dtype=np.float64))
        lower, upper = random_bounds(rng, "lower", *costs.shape)
        subsidies, zeros = torch.zeros(costs.shape[1]), torch.zeros(costs.shape[1]).double()
        best = least_cost(costs.numpy(), lower, upper)
        for _ in range(4):
            after = ascend(costs, subsidies, lower, upper)
            assert (after >= subsidies).all()
            subsidies = after
            dual = (costs - subsidies).amin(1).sum() + (subsidies * torch.where(subsidies > 0, lower, zeros)).sum()
            assert dual <= best + 1e-7


def test_subsidies_that_persist_balance_batches():
    generator = torch.manual_seed(4)
    x = torch.cat([torch.randn(900, 2, generator=generator), torch.randn(100, 2, generator=generator) + 3])
    costs = torch.cdist(x, torch.tensor([[0.0, 0.0], [3.0, 3.0], [4.0, 4.0]])).square()
    lower, upper = size_bounds(1000, 3, rho=1.25)
    subsidies = torch.zeros(3)
    for rows in torch.randperm(1000, generator=generator).split(100):
        subsidies = ascend(costs[rows], subsidies, *scaled_bounds(lower, upper, 1000, 100), rounds=2)
    sizes = torch.bincount((costs - subsidies).argmin(1), minlength=3)
    assert torch.bincount(costs.argmin(1), minlength=3).min() < 60 and sizes.min() > 200


@pytest.mark.parametrize(
    "n, k, rho, least",
    [
        (10, 5, 1, 2), (10, 3, 1.25, 3), (115, 10, 1.15, 10), (110, 10, 1.1, 10), (100, 10, 1e9, 1), (32, 32, 1, 1),
        (10, 3, fractions.Fraction(10, 9), 3), (1_000_000, 32, 1.25, 25_000),
        (1_000_001, 32, 1.25, 25_001), (0, 2, 2, 0),
    ],
)  # fmt: skip
def test_rho_is_the_smallest_integer_of_at_least_the_share(n, k, rho, least):
    lower, upper = size_bounds(n, k, rho=rho)
    assert lower.tolist() == [least] * k and upper.tolist() == [n] * k


@pytest.mark.parametrize(
    "n, k, rho, says",
    [
        (10, 3, 1, "so 4 points in each of 3 clusters, 12 in all, but there are 10: rho must be at least 10/9"),
        (10, 3, 1.11, "rho must be at least 10/9"),
        (10, 5, 0.99, "rho must be at least 1 here"),
        (3, 4, 5.0, "no rho is possible"),
        (10, 5, 0, "finite number above 0"), (10, 5, float("inf"), "finite"), (10, 5, float("nan"), "finite"),
        (10, 5, "2", "rho must be"), (10, 5, True, "rho must be"),
    ],
)  # fmt: skip
def test_rho_that_cannot_be(n, k, rho, says):
    with pytest.raises(ValueError, match=says):
        size_bounds(n, k, rho=rho)


def test_bounds_combine():
    lower, upper = size_bounds(20, 3, size_min=torch.tensor([0, 7, 5]), size_max=9, rho=2)
    assert lower.tolist() == [4, 7, 5] and upper.tolist() == [9, 9, 9]
    assert size_bounds(20, 3, size_max=50)[1].tolist() == [20] * 3
    for batch in range(1, 20):
        small, large = scaled_bounds(lower, upper, 20, batch)
        assert small.sum() <= batch <= large.sum() and (small <= large).all()


@pytest.mark.parametrize(
    "kwargs, says",
    [
        (dict(size_min=5), "size_min asks for 15 points in 3 clusters, but there are 10"),
        (dict(size_max=3), "size_max leaves room for 9 points in 3 clusters; there are 10"),
        (dict(size_min=4, size_max=3), "cluster 0 is to have at least 4 points and at most 3"),
        (dict(size_min=torch.tensor([0, 11, 0])), "cluster 1 is to have at least 11"),
        (dict(size_min=-1), "size_min must be at least 0"),
        (dict(size_min=1.5), "size_min must be an int"),
        (dict(size_max=torch.tensor([1, 2])), r"size_max must be .* shape \(3,\), got torch.int64 of \(2,\)"),
        (dict(size_max=torch.tensor([4.0, 4.0, 4.0])), "size_max must be"),
    ],
)
def test_bounds_that_cannot_be(kwargs, says):
    with pytest.raises(ValueError, match=says):
        size_bounds(10, 3, **kwargs)
    with pytest.raises(ValueError, match=says):
        constrained_assign(torch.zeros(10, 3), **{"size_min": 0, **kwargs})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_costs_that_are_no_numbers(bad):
    costs = torch.rand(10, 3)
    costs[7, 1] = bad
    for call in (constrained_assign, lambda *a: ascend(*a[:1], torch.zeros(3), torch.zeros(3).long(), *a[1:])):
        with pytest.raises(ValueError, match="costs must be finite, got NaN or infinity in row 7"):
            call(costs, torch.full((3,), 10) if call is not constrained_assign else 0)
    with pytest.raises(ValueError, match="row 7"):
        dissolve(costs, torch.zeros(10).long(), size_min=1)


def test_other_bad_arguments():
    costs, labels = torch.rand(10, 3), torch.zeros(10).long()
    for wrong in (torch.ones(10, 3).long(), torch.rand(10), torch.rand(10, 0), [[1.0]]):
        with pytest.raises(ValueError, match="costs must be"):
            constrained_assign(wrong, 1)
    for wrong in (torch.zeros(2), torch.zeros(3).long(), torch.tensor([0, float("nan"), 0])):
        with pytest.raises(ValueError, match="subsidies must be"):
            constrained_assign(costs, 1, subsidies=wrong)
    with pytest.raises(ValueError, match="differ by less than"):
        constrained_assign(torch.tensor([[-1e308, 1e308]], dtype=torch.float64), 0)
    with pytest.raises(ValueError, match="impl must be"):
        constrained_assign(costs, 1, impl="cuda")
    with pytest.raises(ValueError, match="rounds must be"):
        ascend(costs, torch.zeros(3), labels[:3], labels[:3] + 10, rounds=-1)
    for wrong, says in (
        (labels - 1, "labels must lie in 0..2"),
        (labels + 3, "labels must lie"),
        (labels[:9], "shape"),
    ):
        with pytest.raises(ValueError, match=says):
            dissolve(costs, wrong, size_min=2)
    with pytest.raises(ValueError, match="size of the largest cluster, 10, got 11"):
        dissolve(costs, labels, size_min=11)


def test_dissolve_sends_members_to_their_nearest_large_cluster():
    rng = np.random.default_rng(6)
    costs = torch.from_numpy(rng.random((60, 8)))
    labels = torch.from_numpy(rng.choice(8, 60, p=[0.3, 0.02, 0.2, 0.02, 0.3, 0.04, 0.02, 0.1]))
    counts = torch.bincount(labels, minlength=8).tolist()
    after = dissolve(costs, labels, size_min=5)
    large = [k for k in range(8) if counts[k] >= 5]
    assert 1 < len(large) < 8 - counts.count(0)
    for row, (old, new) in enumerate(zip(labels.tolist(), after.tolist(), strict=True)):
        assert new == (old if old in large else min(large, key=lambda k: costs[row, k].item()))
    smallest = min(counts[k] for k in large)
    assert dissolve(costs, labels, size_min=smallest).equal(after)  # as many points as the bound are enough
    assert dissolve(costs, labels, size_min=0).equal(labels)
    assert dissolve(costs[:0], labels[:0], size_min=3).shape == (0,)
