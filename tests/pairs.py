"""What the tests of the in-batch losses share: small batches, and equality up to rounding."""

import torch
import torch.nn.functional as F


def features(*rows, width=12, seed=0):
    """Of unit norm, in fp64."""
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(n, width, generator=g, dtype=torch.float64) for n in rows]
    return [F.normalize(x, dim=1).requires_grad_() for x in drawn]


def number(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def same_to_rounding(one, two, factor=64):
    """Whether two results differ by no more than sums in another order would in their precision."""
    one, two = torch.as_tensor(one), torch.as_tensor(two)
    assert one.shape == two.shape, (one.shape, two.shape)
    return (one - two).abs().max() <= factor * torch.finfo(one.dtype).eps * two.abs().max()


def same_gradients(one, two, leaves, **options):
    """Whether two losses and their gradients are the same up to rounding."""
    ours, theirs = torch.autograd.grad(one, leaves), torch.autograd.grad(two, leaves)
    return all(same_to_rounding(a, b, **options) for a, b in zip((one, *ours), (two, *theirs), strict=True))
