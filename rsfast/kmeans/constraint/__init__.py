"""The size constraint: labels of least cost whose cluster sizes lie within bounds."""

from rsfast.kmeans.constraint.assign import Constrained, ascend, constrained_assign
from rsfast.kmeans.constraint.bounds import scaled_bounds, size_bounds
from rsfast.kmeans.constraint.certificate import certify
from rsfast.kmeans.constraint.dissolve import dissolve

__all__ = ["Constrained", "ascend", "certify", "constrained_assign", "dissolve", "scaled_bounds", "size_bounds"]
