"""Random numbers that are a function of a seed and a number, so that CPU and GPU draw alike and nobody waits."""

import operator

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's
_MASK = 2**64 - 1


def seed_of(random_state) -> int:
    """A seed from an int, a generator of PyTorch or NumPy, or None: PyTorch's global generator."""
    if random_state is None or isinstance(random_state, torch.Generator):
        where = "cpu" if random_state is None else random_state.device
        return int(torch.randint(2**63 - 1, (), generator=random_state, device=where))
    for draw in ("integers", "randint"):  # of numpy.random's Generator and RandomState
        if hasattr(random_state, draw):
            return int(getattr(random_state, draw)(2**31 - 1))
    try:
        seed = operator.index(random_state)
    except TypeError:
        seed = -1
    if seed < 0:
        raise ValueError(f"random_state must be None, an int of at least 0 or a generator, got {random_state!r}")
    return seed


def child(seed: int, number: int) -> int:
    """Seed of an independent stream."""
    return _mixed(seed + _mixed(number + _GOLDEN))


def uniforms(seed: int, stream: int, count: int, device: torch.device) -> Tensor:
    """``count`` numbers of [0, 1) in float64, multiples of 2^-53, made where they are used."""
    z = torch.arange(1, count + 1, device=device) * _signed(_GOLDEN) + _signed(child(seed, stream))
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    return _shifted(z ^ _shifted(z, 31), 11).double() * 2.0**-53


def rows_of(uniform: Tensor, count: int) -> Tensor:
    """Row numbers below ``count``, each as likely."""
    return (uniform * count).long()


class Weighted:
    """Draws row i with probability ``weights_i / sum(weights)``.

    Sums are of integers, so that they do not depend on the order in which a GPU adds; a weight is rounded down to a
    multiple of 2^-62 of N times the largest.
    """

    def __init__(self, weights: Tensor):
        weights = weights.double()
        shares = weights / weights.max().clamp(min=torch.finfo(torch.float64).tiny)
        self.ends = (shares * 2.0 ** (62 - len(weights).bit_length())).long().cumsum(0)

    def rows(self, uniform: Tensor) -> Tensor:
        """One row number per number of [0, 1); row N, which there is not, where all weights are 0."""
        total = self.ends[-1]
        at = torch.minimum((uniform * total).long(), total - 1)
        return torch.searchsorted(self.ends, at.clamp(min=0), right=True)


def shuffled(seed: int, stream: int, count: int, device: torch.device, weights: Tensor | None = None) -> Tensor:
    """Row numbers in the order of draws without replacement, ``weights`` (those of 0 last) or all being as likely."""
    keys = -torch.log1p(-uniforms(seed, stream, count, device))  # an exponential race: the first ring first
    if weights is not None:
        keys = torch.where(weights > 0, keys / weights.double(), torch.inf)
    return keys.sort(stable=True).indices


def _mixed(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    """The int64 of the same bits."""
    z &= _MASK
    return z - 2**64 if z >> 63 else z


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical right shift."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
