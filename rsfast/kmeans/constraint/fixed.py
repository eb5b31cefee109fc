"""Costs as integers, in which the size constraint computes: sums are exact, and equal numbers are ties."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BITS = 50  # of the widest row: a gap less a subsidy is then exact in float64 too
FAR = 1 << 62  # more than any distance
CHUNK = 1 << 22  # elements of a temporary


class Gaps(NamedTuple):
    """How much more than its cheapest cluster each one costs a point, as integers."""

    units: Tensor  # (K, N) int64
    scale: Tensor  # () float64, a power of two: units per unit of cost

    def to_units(self, subsidies: Tensor) -> Tensor:
        """Subsidies of the costs' scale as integers; more than K of the widest gaps is of no use."""
        most = float(len(self.units) << bits(len(self.units)))
        return (subsidies.to(self.scale) * self.scale).clamp(-most, most).round().long()

    def from_units(self, subsidies: Tensor) -> Tensor:
        return subsidies.double() / self.scale


def as_gaps(costs: Tensor, spread: Tensor) -> Gaps:
    """Gaps of ``costs`` (N, K), of which no row is wider than ``spread`` (), float64."""
    n_clusters = costs.shape[1]
    exponent = (bits(n_clusters) - spread.frexp().exponent).clamp(max=1000)  # of a spread of nearly 0, still finite
    scale = torch.ldexp(torch.ones_like(spread), exponent)
    units = torch.empty(costs.shape[::-1], dtype=torch.int64, device=costs.device)
    for points in chunks(*units.shape):
        part = costs[points].double()
        units[:, points] = ((part - part.amin(1, keepdim=True)) * scale).round().long().T
    return Gaps(units, scale)


def spread_of(costs: Tensor) -> Tensor:
    """Width of the widest row of ``costs`` (N, K): float64, NaN or infinite where a cost is."""
    least, most = costs.aminmax(dim=1)
    return (most.double() - least.double()).max()


def bits(n_clusters: int) -> int:
    """Of the widest gap. A path adds up to 2 K of them, and stays below FAR."""
    return min(BITS, 59 - n_clusters.bit_length())


def chunks(n_clusters: int, n: int) -> Iterator[slice]:
    """Ranges of points whose (K, points) temporaries are small."""
    step = max(1, CHUNK // n_clusters)
    return (slice(start, start + step) for start in range(0, n, step))
