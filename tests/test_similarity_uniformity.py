"""What is special about the kernels of the uniformity loss: half of S in bands, and exponents that underflow."""

import pytest
import torch

import rsfast
from rsfast.testing import assert_within_budget
from tests.cases import BF16, FP16, FP32
from tests.pairs import features


def assert_is_the_reference(x, t, times=1.0):
    """Loss and gradient in the budget; ``times`` is the gradient of the loss."""
    results = []
    for impl, leaf in (("fused", x), ("reference", x.double()), ("reference", x)):
        leaf = leaf.detach().requires_grad_()
        loss = rsfast.uniformity_loss(leaf, t=t, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(times * loss, leaf)))
    for name, *result in zip(("loss", "dx"), *results, strict=True):
        assert_within_budget(*result, terms=max(x.shape), name=name)
    return results[0]


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("n", [16, 33, 47])
def test_bands_make_up_the_whole(monkeypatch, device, n, dtype):
    from rsfast.similarity.kernels import uniformity

    monkeypatch.setattr(uniformity, "BAND", 16)
    (x,) = features(n)
    assert_is_the_reference(x.detach().to(device, dtype), 2.0, times=-3.0)


@pytest.mark.parametrize("t", [0.1, 40.0, 300.0])
def test_far_features(device, t):
    """Two opposite ones: e^(-2t) is normal, nearly zero, zero in fp32. Their score is exact."""
    x = torch.tensor([[0.5, 0.5, 0.5, 0.5], [-0.5, -0.5, -0.5, -0.5]], device=device)
    loss, _ = assert_is_the_reference(x, t)
    torch.testing.assert_close(loss.item(), -4 * t, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype, norm", [(FP32, 32), (FP16, 32), (FP32, 6.5)])
def test_one_long_vector(monkeypatch, device, dtype, norm):
    """Scores could be as large as its square, but none is: all exponentials underflow, or some, in every band."""
    from rsfast.similarity.kernels import uniformity

    monkeypatch.setattr(uniformity, "BAND", 16)
    (x,) = features(37)
    x = x.detach().to(device, dtype)
    x[:, 0] = 0
    x[20] = torch.eye(12)[0] * norm
    assert uniformity.fwd(x, 2.0)[2] == 1
    assert_is_the_reference(x, 2.0)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_sharp_and_alike(device, dtype):
    """All equal: every pair has the same share, for a t at which one exponential overflows."""
    x = torch.tensor([[3.0, 4.0, 0.0]], device=device, dtype=dtype).repeat(20, 1)
    loss, dx = assert_is_the_reference(x, 8.0)
    assert loss == 2 * 8 * 24  # |x|^2 - 1
    torch.testing.assert_close(dx, (2 * 2 * 8.0 / 20 * x).to(dtype))


def test_half_of_the_scores_is_computed(monkeypatch, device):
    from rsfast.similarity.kernels import uniformity

    monkeypatch.setattr(uniformity, "BAND", 8)
    batch = uniformity.Batch(*(torch.ones(32, 8, device=device) for _ in "ab"), diagonal=True)
    assert sum(part.N * part.M for _, _, part in uniformity._blocks(batch)) == (32 * 32 + 4 * 8 * 8) / 2
