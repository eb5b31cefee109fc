"""Standardised features, as the released code clusters them, and the way back for centres."""

from typing import NamedTuple

import torch
from torch import Tensor

from rsfast.deblora.arrays import Rows


class Scaling(NamedTuple):
    """Mean and standard deviation of every column, fp64; a constant column is divided by 1."""

    mean: Tensor  # (D,)
    deviation: Tensor  # (D,)

    @classmethod
    def of(cls, rows: Rows, device: torch.device) -> "Scaling":
        """In one pass; as scikit-learn's StandardScaler: the deviation is that of the whole, over N."""
        shift, total, squares = None, 0.0, 0.0
        for _, part in rows.batches(device=device):
            part = part.double()
            shift = part[0] if shift is None else shift  # a common offset would cancel what is looked for
            part = part - shift
            total, squares = total + part.sum(0), squares + part.square().sum(0)
        mean = total / len(rows)
        deviation = (squares / len(rows) - mean.square()).clamp(min=0).sqrt()
        return cls(shift + mean, torch.where(deviation > 0, deviation, 1.0))

    def apply(self, x: Tensor) -> Tensor:
        """fp32 (fp64 of fp64 rows)."""
        kind = torch.promote_types(x.dtype, torch.float32)
        return (x.to(kind) - self.mean.to(kind)) / self.deviation.to(kind)

    def undo(self, centers: Tensor) -> Tensor:
        return (centers.double() * self.deviation + self.mean).to(centers)
