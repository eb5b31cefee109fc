"""Labels equal a float64 argmin on data that is hard: ties, common offsets, scales at the ends of a dtype's range."""

import pytest
import torch

import rsfast
from tests.case import BF16, FP16, FP32
from tests.test_kmeans import each_impl, exact_labels

FEW, MANY = 9, 140  # clusters for both kinds of kernels
each_dtype = pytest.mark.parametrize(
    "dtype, clusters", [(FP32, FEW), (FP16, FEW), (BF16, FEW), (FP32, MANY), (BF16, MANY)]
)
each_size = pytest.mark.parametrize("clusters", (FEW, MANY))


def rows(n, d, clusters, seed=0):
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(clusters, d, generator=g)
    return torch.randn(n, d, generator=g) + centers[torch.randint(clusters, (n,), generator=g)], centers


def assert_exact(x, centers, impl, device, subsidies=None):
    x, centers = x.to(device), centers.to(device)
    subsidies = None if subsidies is None else subsidies.to(device)
    expected = exact_labels(x, centers, subsidies)
    found = rsfast.kmeans_assign(x, centers, subsidies=subsidies, impl=impl)
    assert torch.equal(found.labels, expected)
    return found.distances


@each_impl
@each_dtype
def test_offset_of_a_hundred_times_the_spread(dtype, clusters, impl, device):
    x, centers = rows(24, 24, clusters)
    assert_exact((x + 100).to(dtype), centers + 100, impl, device)


@each_impl
@each_dtype
def test_whole_numbers_tie_exactly(dtype, clusters, impl, device):
    g = torch.Generator().manual_seed(1)
    x, centers = (torch.randint(0, 3, (n, 5), generator=g).float() for n in (40, clusters))
    assert (centers.unique(dim=0).shape[0] < clusters) or clusters == 9
    assert_exact(x.to(dtype), centers, impl, device)


@each_impl
@each_dtype
def test_rows_midway_between_two_centres(dtype, clusters, impl, device):
    """The last bit of a row decides; scores in 16-bit parts cannot tell."""
    _, centers = rows(1, 24, clusters)
    centers = (centers * 8).round() / 8
    x = (centers[:, None] + centers[None, :8]).flatten(0, 1)[:40] / 2
    nudged = x.to(dtype).clone()
    nudged[::2] *= 1 + torch.finfo(dtype).eps
    assert_exact(nudged, centers, impl, device)


@each_impl
@each_dtype
def test_the_same_centre_several_times(dtype, clusters, impl, device):
    x, centers = rows(20, 24, clusters)
    assert_exact(x.to(dtype), centers[torch.arange(clusters) % 4], impl, device)
    assert_exact(x.to(dtype), centers[:1].expand(clusters, -1), impl, device)


@each_impl
@each_dtype
@pytest.mark.parametrize("scale", (1e-18, 1e18))
def test_very_small_and_very_large_numbers(scale, dtype, clusters, impl, device):
    if dtype == FP16:
        scale = {1e-18: 2.0**-20, 1e18: 2.0**13}[scale]
    x, centers = rows(20, 24, clusters)
    assert_exact((x * scale).to(dtype), centers * scale, impl, device)


@each_impl
@each_size
def test_fp16_near_its_end(clusters, impl, device):
    x, centers = rows(20, 24, clusters)
    x = (x * 64 + 65000).clamp(max=65504).half()
    assert_exact(x, centers * 64 + 65000, impl, device)


@each_impl
@each_dtype
def test_rows_and_centres_that_are_constant(dtype, clusters, impl, device):
    assert_exact(torch.full((5, 24), 7.0, dtype=dtype), torch.full((clusters, 24), 5.0), impl, device)
    assert_exact(torch.zeros(5, 24, dtype=dtype), torch.zeros(clusters, 24), impl, device)
    values = torch.arange(clusters)[:, None].expand(-1, 24) / 4.0
    assert_exact(values[torch.arange(20) % 9].to(dtype), values, impl, device)


@each_impl
@each_dtype
def test_rows_at_a_scale_that_centres_do_not_have(dtype, clusters, impl, device):
    x, centers = rows(20, 24, clusters)
    assert_exact((x * 1e4).clamp(-65504, 65504).to(dtype), centers * 1e-6, impl, device)
    assert_exact((x * 1e-4).to(dtype), centers * 1e6, impl, device)


@each_size
def test_numbers_whose_squares_leave_fp32(clusters, device):
    """``direct_scores`` round a common size away, where the reference can see further; so this is of the kernels."""
    x, centers = rows(8, 24, clusters)
    for rows_scale, scale, dtype in ((1e30, 1.0, FP32), (1e30, 1e30, BF16), (1.0, 1e30, FP32), (1e-30, 1.0, BF16)):
        there = (x * rows_scale).to(device, dtype), (centers * scale).to(device)
        assert torch.equal(rsfast.kmeans_assign(*there, impl="fused").labels, exact_labels(*there))


@each_impl
@each_dtype
def test_subsidies_of_any_size(dtype, clusters, impl, device):
    x, centers = rows(20, 24, clusters)
    g = torch.Generator().manual_seed(3)
    for scale in (1e-3, 1.0, 1e6):
        assert_exact(x.to(dtype), centers, impl, device, subsidies=scale * torch.randn(clusters, generator=g).double())
    tied = torch.zeros(clusters)
    centers[1:] = centers[0]
    tied[3] = 2.0**-30
    assert_exact(x.to(dtype), centers, impl, device, subsidies=tied)


@each_dtype
def test_distances_of_decided_rows_are_theirs(dtype, clusters, device):
    x, centers = rows(20, 24, clusters)
    centers[1::2] = centers[:-1:2][: len(centers[1::2])]
    x = x.to(dtype)
    distances = assert_exact(x, centers, "fused", device).cpu()
    gold = torch.cdist(x.double(), centers.double()).square().min(1).values
    torch.testing.assert_close(distances.double(), gold, rtol=1e-5, atol=1e-6)


def rows_with_several_nearest(groups):
    """Rows with four centres each whose distances differ in the last bits of fp32."""
    g = torch.Generator().manual_seed(2)
    x = (4 * torch.randn(groups, 24, generator=g)).bfloat16().float()
    apart = torch.randn(groups, 1, 24, generator=g) * (torch.randint(0, 2, (groups, 4, 24), generator=g) * 2 - 1)
    return x, (x[:, None] + apart).flatten(0, 1)


@pytest.mark.parametrize("groups", (8, 33))
@pytest.mark.parametrize("dtype", (FP32, FP16, BF16), ids=str)
def test_the_recheck_decides_labels(dtype, groups, device):
    """Without it some are wrong: so there is something to decide, and "fast" leaves it out."""
    x, centers = (t.to(device) for t in rows_with_several_nearest(groups))
    x = x.to(dtype)
    expected = exact_labels(x, centers)
    for function in (rsfast.kmeans_assign, rsfast.kmeans_step):
        assert torch.equal(function(x, centers, impl="fused").labels, expected)
        fast = function(x, centers, precision="fast", impl="fused").labels
        assert (fast != expected).any() and torch.equal(fast // 4, expected // 4)


@each_size
def test_rows_that_are_not_finite_get_some_label(clusters, device):
    x, centers = rows(20, 24, clusters)
    x[3], x[5, 2] = float("nan"), float("inf")
    labels = rsfast.kmeans_assign(x.to(device), centers.to(device), impl="fused").labels.cpu()
    assert labels.min() >= 0 and labels.max() < clusters
    others = torch.tensor([i not in (3, 5) for i in range(20)])
    assert torch.equal(labels[others], exact_labels(x, centers)[others])
