"""Random numbers, and k-means++: the distribution that is promised, in few passes."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

import rsfast
from rsfast.kmeans.functional import draws, plusplus

CHANCE = 1e-6  # of a red test where all is well, had the seeds not been fixed


def test_uniforms_are_splitmix64():
    """Its published first outputs for the seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state = draws._signed(1234567)
    z = torch.arange(1, 5) * draws._signed(draws._GOLDEN) + state
    for bits, factor in ((30, draws._FIRST), (27, draws._SECOND)):
        z = (z ^ draws._shifted(z, bits)) * draws._signed(factor)
    assert [n % 2**64 for n in (z ^ draws._shifted(z, 31)).tolist()] == expected
    assert draws._mixed(1234567 + draws._GOLDEN) == expected[0]


def test_uniforms_are_uniform_and_streams_are_independent():
    streams = torch.stack([draws.uniforms(seed, stream, 4000, "cpu") for seed in (0, 1) for stream in (0, 1, 2)])
    assert streams.min() >= 0 and streams.max() < 1 and streams.dtype == torch.float64
    for row in streams:
        assert stats.kstest(row.numpy(), "uniform").pvalue > CHANCE
    correlations = torch.corrcoef(torch.cat([streams[:, 1:], streams[:, :-1]])) - torch.eye(12)
    assert correlations.abs().max() < 5 / 4000**0.5
    assert torch.equal(draws.uniforms(0, 1, 10, "cpu"), streams[1, :10])


def test_weighted_draws_have_their_probabilities():
    uniform = draws.uniforms(3, 0, 20000, "cpu")
    for weights in ([0.0, 1, 0, 3, 2, 0], [0.0, 1e-300, 0, 3e-300, 2e-300, 0], [0.0, 1e307, 0, 3e307, 2e307, 0]):
        drawn = draws.Weighted(torch.tensor(weights, dtype=torch.float64)).rows(uniform)
        counts = torch.bincount(drawn, minlength=6)
        assert not counts[[0, 2, 5]].any()
        expected = 20000 * np.array([1, 3, 2]) / 6
        assert stats.chisquare(counts[[1, 3, 4]].numpy(), expected).pvalue > CHANCE
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draws.Weighted(torch.tensor([0.0, 1, 1, 0])).rows(ends).tolist() == [1, 2]
    assert draws.Weighted(torch.zeros(3)).rows(ends).tolist() == [3, 3]


def test_shuffled_rows_come_by_weight_without_replacement():
    orders = torch.stack([draws.shuffled(7, s, 4, "cpu", torch.tensor([1.0, 2, 0, 3])) for s in range(3000)])
    assert (orders[:, 3] == 2).all() and (orders.sort(1).values == torch.arange(4)).all()
    first = torch.bincount(orders[:, 0], minlength=4)[[0, 1, 3]].numpy()
    assert stats.chisquare(first, 3000 * np.array([1, 2, 3]) / 6).pvalue > CHANCE
    second = torch.bincount(orders[orders[:, 0] == 3][:, 1], minlength=4)[[0, 1]].numpy()
    assert stats.chisquare(second, second.sum() * np.array([1, 2]) / 3).pvalue > CHANCE


def chances(x, weights, k):
    """Of every ordered choice of k rows, by the definition of k-means++."""
    squared = (x[:, None] - x[None]) ** 2
    for rows in itertools.permutations(range(len(x)), k):
        chance, nearest = 1.0, np.ones(len(x))
        for row in rows:
            chance *= weights[row] * nearest[row] / (weights * nearest).sum()
            nearest = squared[row] if nearest.min() == 1 else np.minimum(nearest, squared[row])
        yield rows, chance


@pytest.mark.parametrize("candidates", [1, 2, 16])
def test_centres_have_exactly_the_distribution_of_kmeans_plusplus(candidates):
    x, weights = np.array([0.0, 1, 2, 4, 9]), np.array([1.0, 2, 1, 0.5, 1])
    rows = torch.from_numpy(x)[:, None]
    w, n = torch.from_numpy(weights), 900
    seen = {}
    for seed in range(n):
        found = rsfast.kmeans_plusplus(rows, 3, weights=w, random_state=seed, candidates=candidates)
        key = tuple(found.indices.tolist())
        seen[key] = seen.get(key, 0) + 1
        assert torch.equal(found.centers, rows[found.indices])
    likely = {key: chance for key, chance in chances(x, weights, 3) if n * chance >= 5}
    assert abs(sum(chance for _, chance in chances(x, weights, 3)) - 1) < 1e-12
    observed = [seen.get(key, 0) for key in likely]
    rest = 1 - sum(likely.values())
    expected = np.array([*likely.values(), rest]) * n
    assert stats.chisquare([*observed, n - sum(observed)], expected).pvalue > CHANCE


def test_few_passes_serve_many_centres(monkeypatch):
    """4 kinds of data take 2 to 4 passes for 32 centres with 32 candidates (kmeans++ itself: 32)."""
    passes = []
    assign = plusplus.kmeans_assign
    monkeypatch.setattr(plusplus, "kmeans_assign", lambda *a, **k: (passes.append(1), assign(*a, **k))[1])
    torch.manual_seed(0)
    x = torch.randn(3000, 16) + 4 * torch.randn(40, 16)[torch.randint(40, (3000,))]
    found = rsfast.kmeans_plusplus(x, 32, random_state=0)
    assert len(found.indices.unique()) == 32 and len(passes) <= 6
    passes.clear()
    rsfast.kmeans_plusplus(x, 32, random_state=0, candidates=1)
    assert len(passes) == 31


def test_rows_that_are_alike_are_drawn_once_and_the_rest_is_filled_up():
    x = torch.tensor([5.0, 5, 1, 5, 1, 3])[:, None].repeat(1, 3)
    for seed in range(20):
        found = rsfast.kmeans_plusplus(x, 5, random_state=seed)
        assert sorted(found.centers[:3, 0].tolist()) == [1, 3, 5] and len(found.indices.unique()) == 5
        rest = [row for row in range(6) if row not in found.indices[:3]]
        assert found.indices[3:].tolist() == rest[:2]
    only = rsfast.kmeans_plusplus(x, 3, weights=torch.tensor([0.0, 0, 1, 0, 1, 0]), random_state=0)
    assert only.indices[0] in (2, 4) and only.indices[1:].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_seeds_and_dtypes(dtype):
    torch.manual_seed(0)
    x = (100 * torch.randn(200, 8)).to(dtype)
    a, b, c = (rsfast.kmeans_plusplus(x, 10, random_state=s) for s in (1, 1, 2))
    assert torch.equal(a.indices, b.indices) and not torch.equal(a.indices, c.indices)
    assert a.centers.dtype == dtype and torch.equal(a.centers, x[a.indices])
    g = [rsfast.kmeans_plusplus(x, 10, random_state=torch.Generator().manual_seed(5)).indices for _ in range(2)]
    assert torch.equal(*g)


def test_random_starts_are_different_rows_with_weight():
    x = torch.arange(40.0)[:, None]
    weights = (torch.arange(40) % 2).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(20):
            options = dict(init="random", random_state=seed, max_iter=1, tol=1e9, n_init=1)
            found = rsfast.KMeans(20, **options).fit(x, sample_weight=weights)
            assert found.cluster_centers_.flatten().sort().values.tolist() == list(range(1, 40, 2))
