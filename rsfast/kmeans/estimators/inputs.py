"""Tensors from what users hold, and back to the same kind."""

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsfast.kmeans.functional.checks import DTYPES, check_finite


class Given(NamedTuple):
    """Data as a tensor that shares its memory where it can, and the way back."""

    tensor: Tensor
    back: Callable[[Tensor], Any]


def rows(X: Any, name: str = "X") -> Given:
    """Finite (N, D) data of a dtype that kernels know; integers of NumPy become float64, as in scikit-learn."""
    given = taken(X, name)
    x = given.tensor
    if x.dim() != 2:
        raise ValueError(
            f"{name} must be of shape (n_samples, n_features), got {tuple(x.shape)}. Reshape your data: "
            f"{name}.reshape(1, -1) is one sample, {name}.reshape(-1, 1) one feature."
        )
    for count, what in zip(x.shape, ("sample", "feature"), strict=True):
        if not count:
            raise ValueError(f"{name} has 0 {what}(s) (shape={tuple(x.shape)}) while a minimum of 1 is required.")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be of fp32, fp16, bf16 or fp64, got {x.dtype}")
    check_finite(x, name)
    if x.stride(1) != 1:  # kernels read along rows
        x = x.contiguous()
    return Given(x, given.back)


def taken(X: Any, name: str) -> Given:
    if isinstance(X, Tensor):
        if X.layout != torch.strided:
            raise TypeError(f"{name} is a sparse tensor, but dense data is required: {name}.to_dense()")
        return Given(X.detach(), lambda t: t)
    if hasattr(X, "nnz") and hasattr(X, "toarray"):
        raise TypeError(f"{name} is a sparse matrix, but dense data is required: {name}.toarray()")
    if hasattr(X, "__dlpack__") and not isinstance(X, np.ndarray):
        return Given(torch.from_dlpack(X), _exporter(X))
    return Given(_from_numpy(np.asarray(X), name), lambda t: t.numpy(force=True))


def sample_weights(sample_weight: Any, x: Tensor) -> Tensor | None:
    """(N,) weights beside ``x``, finite, not negative and not all 0. None stays None; one number counts for all."""
    if sample_weight is None:
        return None
    name, dtype = "sample_weight", torch.promote_types(x.dtype, torch.float32)
    w = taken(sample_weight, name).tensor.to(x.device, dtype)
    if not w.dim():
        w = w.expand(len(x)).contiguous()
    if w.shape != (len(x),):
        raise ValueError(f"{name} must be of shape ({len(x)},), one number per row of X, got {tuple(w.shape)}")
    wrong = (~(w.isfinite() & (w >= 0))).nonzero()[:1, 0].tolist()
    for row in wrong:
        raise ValueError(f"{name} must be finite and not negative, got {w[row].item()} at index {row}")
    if not w.any():
        raise ValueError(f"{name} must contain at least one number other than zero: all weights are zero")
    return w


def _from_numpy(array: np.ndarray, name: str) -> Tensor:
    if array.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {name} has dtype {array.dtype}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in (np.float16, np.float32, np.float64):
        if array.dtype.kind not in "biufO":
            raise ValueError(f"{name} must be of numbers, got dtype {array.dtype}")
        array = array.astype(np.float64)
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):  # which tensors do not have
        array = array.copy()
    with warnings.catch_warnings():  # a tensor cannot be read-only, and nothing is written
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return torch.from_numpy(array)


def _exporter(X: Any) -> Callable[[Tensor], Any]:
    """``from_dlpack`` of X's library; without one, tensors stay tensors."""
    library = X.__array_namespace__() if hasattr(X, "__array_namespace__") else None
    library = library or sys.modules.get(type(X).__module__.partition(".")[0])
    return getattr(library, "from_dlpack", lambda t: t)
