"""What every in-batch loss asks of its inputs, and does to them before an implementation is chosen."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast._dispatch import why_not_triton

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*KERNEL_DTYPES, torch.float64)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def why_not_pairs(features: Tensor) -> list[str]:
    """Reasons that hold for all kernels over the pairs of a batch; from metadata only, so it traces."""
    reasons = why_not_triton(features)
    if features.dtype not in KERNEL_DTYPES:
        reasons = [*reasons, f"the features are {features.dtype}; the kernels take fp32, fp16 and bf16"]
    return reasons


def prepared(*, normalize: bool, check_finite: bool, **features: Tensor) -> list[Tensor]:
    """The features, checked by the names they are given under; of unit norm if asked; in autocast's dtype inside it."""
    for name, x in features.items():
        if not isinstance(x, Tensor) or x.ndim != 2 or x.dtype not in DTYPES:
            raise ValueError(f"{name} must be floating point (N, D), got {_described(x)}")
        if x.shape[1] == 0:
            raise ValueError(f"{name} must be at least 1 wide, got shape {tuple(x.shape)}")
    (first, like), *others = features.items()
    if any(len(x) == 0 for x in features.values()):
        raise ValueError("the batch is empty: " + ", ".join(f"{len(x)} rows of {n}" for n, x in features.items()))
    for name, x in others:
        if x.shape[1] != like.shape[1]:
            raise ValueError(f"{name} must be {like.shape[1]} wide, as {first}, got {x.shape[1]}")
        if x.device != like.device:
            raise ValueError(f"{name} must have device {like.device}, as {first}, got {x.device}")
    if check_finite:
        for name, x in features.items():
            broken = ~x.detach().isfinite().all(1)
            if broken.any():
                row = broken.nonzero()[0].item()
                raise ValueError(f"{name} must be finite: {broken.sum()} of {len(x)} rows are not, the first is {row}")
    ready = {name: F.normalize(x, dim=-1) if normalize else x for name, x in features.items()}
    if like.device.type != "meta" and torch.is_autocast_enabled(like.device.type):
        low = torch.get_autocast_dtype(like.device.type)
        ready = {name: x if x.dtype == torch.float64 else x.to(low) for name, x in ready.items()}
    for name, x in ready.items():
        if x.dtype != ready[first].dtype:
            raise ValueError(f"{name} must have dtype {ready[first].dtype}, as {first}, got {x.dtype}")
    return list(ready.values())


def check_square(image_features: Tensor, text_features: Tensor) -> None:
    if len(image_features) != len(text_features):
        raise ValueError(f"text_features must have {len(image_features)} rows, one an image, got {len(text_features)}")
    check_not_alone(image_features, text_features)


def check_not_alone(one: Tensor, two: Tensor) -> None:
    if len(one) == len(two) == 1:
        raise ValueError("a batch needs 2 rows or more, got 1: a single pair has no negatives")


def check_offset(offset: int, queries: Tensor, keys: Tensor) -> None:
    if not 0 <= offset <= len(keys) - len(queries):
        raise ValueError(
            f"keys must hold row i + offset for each of {len(queries)} queries, "
            f"got offset {offset} and {len(keys)} keys"
        )


def check_ids_given(image_ids: Tensor | None, text_ids: Tensor | None) -> None:
    if text_ids is not None and image_ids is None:
        raise ValueError("image_ids are needed where text_ids are given, got None")


def prepared_ids(features: dict[str, Tensor], **ids: Tensor | None) -> list[Tensor | None]:
    """Ids as int64; ``features`` holds what they number, in the same order."""
    for (name, given), x in zip(ids.items(), features.values(), strict=True):
        if given is None:
            continue
        if not isinstance(given, Tensor) or given.shape != x.shape[:1] or given.dtype not in INTEGERS:
            raise ValueError(f"{name} must be {len(x)} integers, one a row, got {_described(given)}")
        if given.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, as the features are, got {given.device}")
    return [None if given is None else given.to(torch.int64) for given in ids.values()]


def prepared_number(name: str, value: Tensor, like: Tensor, *, positive: bool, check_finite: bool) -> Tensor:
    """A learned number as a 0-dim tensor on the features' device, in the dtype of the loss.

    One that lives on the CPU is looked at always, for that costs nothing, but not while a graph is traced.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"{name} must be a tensor that holds one floating point number, got {_described(value)}")
    if value.device != like.device and value.device.type != "cpu":
        raise ValueError(f"{name} must be on {like.device}, as the features are, or on the CPU, got {value.device}")
    if check_finite or (value.device.type == "cpu" and not torch.compiler.is_compiling()):
        number = value.item()
        if not math.isfinite(number) or (positive and number <= 0):
            raise ValueError(f"{name} must be {'positive and ' * positive}finite, got {number}")
    wide = torch.promote_types(like.dtype, torch.float32)
    return value.reshape(()).to(like.device, wide, non_blocking=True)


def check_range(
    name: str, value: float, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> None:
    """``low <= value <= high``, or ``low < value`` with ``above``; never infinite, never NaN."""
    if value is None or isinstance(value, str):
        raise ValueError(f"{name} must be a number, got {value!r}")
    finite = -math.inf < value < math.inf  # math.isfinite does not trace where a graph takes any value
    fits = finite and (low < value if above else low <= value) and value <= high
    if not fits:
        wanted = {
            (True, True): "a finite number",
            (False, True): f"{'above' if above else 'at least'} {low} and finite",
            (False, False): f"between {low} and {high}",
        }[low == -math.inf, high == math.inf]
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _described(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
