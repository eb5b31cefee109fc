"""The size constraint in the compiled library: the same integers as in PyTorch and NumPy, bit for bit."""

import ctypes

import numpy as np
import pytest
import torch

from rsfast import _dispatch, _extension
from rsfast.kmeans import ascend, constrained_assign
from rsfast.kmeans.constraint import ascent, finish, fixed, library, paths
from tests.test_kmeans_constraint import check_certificate, random_bounds, random_costs

pytestmark = pytest.mark.skipif(bool(_extension.missing()), reason="; ".join(_extension.missing()))


def problem(rng, kind, device, n=50, k=5, ties=False):
    """Gaps, subsidies and bounds as integers on the device."""
    costs = torch.from_numpy(np.round(rng.random((n, k)) * (4 if ties else 1 << 20))).to(device)
    lower, upper = (bound.to(device) for bound in random_bounds(rng, kind, n, k))
    units = fixed.as_gaps(costs, fixed.spread_of(costs)).units
    subsidies = torch.from_numpy(rng.integers(-1, 2, k) * rng.integers(0, 1 << 50, k)).to(device)
    return units, ascent.of_use(subsidies, lower, upper, n), lower, upper


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("kind", ["lower", "upper", "both", "equal"])
def test_climb(kind, ties, device):
    given = problem(np.random.default_rng([ord(kind[0]), ties]), kind, device, ties=ties)
    before = given[1].clone()
    for rounds in (0, 1, 3):
        theirs, ours = ascent.climb(*given, rounds), library.climb(*given, rounds)
        assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1])
    assert given[1].equal(before) and (rounds == 0 or not ours[0].equal(before))


@pytest.mark.parametrize("n, k", [(1, 1), (4096, 1), (4097, 2), (9000, 3), (40, 40)], ids=str)
def test_shapes(n, k, device):
    """Blocks that are full, nearly empty, and many; clusters more than a warp."""
    rng = np.random.default_rng([n, k])
    gaps, subsidies, lower, upper = problem(rng, "lower", device, n, k)
    theirs, ours = ascent.climb(gaps, subsidies, lower, upper, 2), library.climb(gaps, subsidies, lower, upper, 2)
    assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1])
    assert library.widths(gaps, *ours).equal(ascent.widths(gaps, *ours))
    for reach in (0, 1 << 47, 1 << 49, fixed.FAR):
        assert library.near(gaps, *ours, reach).equal(ascent.near(gaps, *ours, reach))


def test_a_settled_climb_stops(device):
    gaps, _, lower, upper = problem(np.random.default_rng(1), "lower", device, n=12, k=3)
    subsidies, labels = library.climb(gaps, torch.zeros_like(lower), lower, upper, 12)
    assert labels.equal(ascent.choose(gaps, subsidies).labels)
    assert library.climb(gaps, subsidies, lower, upper, 5)[0].equal(subsidies)


def test_shortest_paths_are_the_same_in_both_languages(monkeypatch):
    """From any start and with lists that run out, each call ends in the same state."""
    rng, ran_out, calls = np.random.default_rng(2), 0, 0

    def both(lower, upper, counts, subsidies, gaps, labels, reach):
        nonlocal ran_out, calls
        states = [[a.copy() for a in (counts, subsidies, gaps, labels)] for _ in range(2)]
        done = [
            f(lower, upper, *s, reach)
            for f, s in zip((paths.shortest_paths, library.shortest_paths), states, strict=True)
        ]
        assert done[0] is done[1] and all((a == b).all() for a, b in zip(*states, strict=True))
        for mine, new in zip((counts, subsidies, gaps, labels), states[0], strict=True):
            mine[:] = new
        ran_out, calls = ran_out + (not done[0]), calls + 1
        return done[0]

    way = finish.PLAIN._replace(shortest_paths=both)
    for trial in range(120):
        monkeypatch.setattr(finish, "NEAR", int(rng.choice([1, 8, 1 << 14])))
        costs = torch.from_numpy(random_costs(rng, ties=bool(trial % 2)))
        lower, upper = random_bounds(rng, ["lower", "upper", "both", "equal"][trial % 4], *costs.shape)
        units = fixed.as_gaps(costs, fixed.spread_of(costs)).units
        subsidies = torch.from_numpy(rng.integers(-(1 << 50), 1 << 50, len(units)) * (trial % 3 == 0))
        subsidies = ascent.of_use(subsidies, lower, upper, len(costs))
        finish.finish(units, subsidies, lower, upper, ascent.choose(units, subsidies).labels, way)
    assert ran_out > 10 and calls - ran_out > 50


def test_the_whole(device):
    rng = np.random.default_rng(3)
    for kind in ("lower", "upper", "both", "equal"):
        costs = torch.from_numpy(random_costs(rng, ties=kind == "both")).to(device)
        lower, upper = random_bounds(rng, kind, *costs.shape)
        found = constrained_assign(costs, lower, upper, impl="fused")
        check_certificate(costs, found, lower.to(device), upper.to(device))
        plain = constrained_assign(costs, lower, upper, impl="reference")
        assert all(a.equal(b) for a, b in zip(found, plain, strict=True))
        some = [ascend(costs, found.subsidies / 2, lower, upper, impl=i) for i in ("fused", "reference")]
        assert some[0].equal(some[1])


def test_what_the_library_refuses():
    def paths_of(labels, clusters=2, reach=0):
        call = _extension.function("rsf_shortest_paths", *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 7)
        arrays = [np.zeros(4, np.int64) for _ in range(5)] + [np.array(labels), np.zeros(1, np.int32)]
        return call(clusters, len(labels), reach, *(a.ctypes.data for a in arrays))

    assert paths_of([0, 1]) == 0
    for wrong in (dict(labels=[0, 2]), dict(labels=[-1]), dict(labels=[0], clusters=0), dict(labels=[0], reach=-1)):
        with pytest.raises(RuntimeError, match="rsf_shortest_paths .* out of range"):
            paths_of(**wrong)
    call = _extension.function("rsf_climb", *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 2)
    for sizes, says in (((0, 1, 1), "range"), ((4097, 1, 1), "range"), ((1, 2**31, 1), "range"), ((1, 1, 1), "small")):
        with pytest.raises(RuntimeError, match=says):
            call(*sizes, *[None] * 6, 16, 0)


def test_why_not(monkeypatch, device):
    monkeypatch.setattr(library, "MOST_POINTS", 5)
    with pytest.raises(NotImplementedError, match="there are 6 points; the kernels take up to 5"):
        constrained_assign(torch.zeros(6, 2, device=device), 0, impl="fused")
    with pytest.raises(NotImplementedError, match="there are 4097 clusters"):
        constrained_assign(torch.zeros(1, 4097, device=device), 0, impl="fused")
    monkeypatch.setattr(library, "INTERPRET", False)
    with pytest.raises(NotImplementedError, match="the costs are on cpu, not on a GPU"):
        constrained_assign(torch.zeros(2, 2), 0, impl="fused")


def test_auto_goes_on_where_the_first_use_fails_to_build(monkeypatch):
    """Before anything was built there is no reason against the library."""
    monkeypatch.setattr(_dispatch, "INTERPRET", False)
    monkeypatch.setattr(library, "why_not", lambda costs: [])
    monkeypatch.setattr(_extension, "missing", lambda device=None: [])
    monkeypatch.setattr(_extension, "_load", lambda: "nvcc refuses the compiler")
    costs = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    plain = constrained_assign(costs, 14, impl="reference")
    assert all(a.equal(b) for a, b in zip(constrained_assign(costs, 14), plain, strict=True))
    bounds = torch.full((4,), 14), torch.full((4,), 60)
    assert ascend(costs, torch.zeros(4), *bounds).equal(ascend(costs, torch.zeros(4), *bounds, impl="reference"))
    for insist in (
        lambda: constrained_assign(costs, 14, impl="fused"),
        lambda: ascend(costs, torch.zeros(4), *bounds, impl="fused"),
    ):
        with pytest.raises(NotImplementedError, match="nvcc refuses the compiler"):
            insist()


def test_without_a_gpu_an_installed_library_finds_the_paths(monkeypatch):
    """Nothing is built for it, and ``reference`` stays NumPy."""
    monkeypatch.setattr(library, "INTERPRET", False)
    installed, calls = _extension.library(), []
    monkeypatch.setattr(_extension, "_prebuilt", lambda: (installed, ""))
    monkeypatch.setattr(_extension, "library", lambda: pytest.fail("asked for a library of a GPU"))
    bind = _extension.bind
    monkeypatch.setattr(_extension, "bind", lambda found, name, *types: calls.append(name) or bind(found, name, *types))
    costs = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    plain = constrained_assign(costs, 14, impl="reference")
    assert not calls
    found = constrained_assign(costs, 14)
    assert set(calls) == {"rsf_shortest_paths"} and all(a.equal(b) for a, b in zip(found, plain, strict=True))
    monkeypatch.setattr(_extension, "_prebuilt", lambda: (None, "none was built at installation"))
    calls.clear()
    assert constrained_assign(costs, 14).labels.equal(plain.labels) and not calls
