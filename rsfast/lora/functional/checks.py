"""What the operations of this family refuse, and when their kernels cannot run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsfast._dispatch import why_not_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 256
Slices = tuple[tuple[int, int], ...]


def why_not_fused(x: Tensor, rank: int = 16, dtype: torch.dtype | None = None) -> list[str]:
    """Reasons the fused kernels cannot take these inputs; from metadata only, so it traces."""
    wants = {
        f"x is {x.dtype}; the kernels take fp32, fp16 and bf16": x.dtype in DTYPES and dtype in (None, *DTYPES),
        f"the rank is {rank}; the kernels take 1 to {MAX_RANK}": 1 <= rank <= MAX_RANK,
    }
    return why_not_triton(x) + [reason for reason, fine in wants.items() if not fine]


def working_dtype(x: Tensor) -> torch.dtype:
    """What products are taken in: autocast's dtype where that applies, else that of ``x``."""
    return torch.get_autocast_dtype(x.device.type) if in_autocast(x) else x.dtype


def in_autocast(x: Tensor) -> bool:
    """Whether autocast rounds ``x``: inside its region, but, as in PyTorch, not fp64; nor on a device without it."""
    device = x.device.type
    return device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device)


def check_floating(x: Tensor, name: str) -> None:
    if not x.ndim:
        raise ValueError(f"{name} must have at least one dimension, its width, got a number")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be a floating point tensor, got {x.dtype}")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating(x, "x")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be (N, {x.shape[-1]}) for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},) for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")
    autocast = in_autocast(x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype and not (autocast and tensor.is_floating_point()):
            raise ValueError(f"{name} must be {x.dtype}, as x is, outside autocast; got {tensor.dtype}")
        _check_device(x, name, tensor)


def check_factor(x: Tensor, name: str, factor: Tensor, ndim: int, axes: str) -> None:
    """One of ``lora_A`` and ``lora_B``, with or without an axis of adapters."""
    if factor.ndim != ndim:
        raise ValueError(f"{name} must be {axes}, got shape {tuple(factor.shape)}")
    autocast = in_autocast(x)
    if factor.dtype not in (x.dtype, torch.float32) and not (autocast and factor.is_floating_point()):
        raise ValueError(f"{name} must be {x.dtype}, as x is, or torch.float32; got {factor.dtype}")
    _check_device(x, name, factor)


def check_slices(slices: Slices | None, width: int | None) -> Slices | None:
    """Slices as tuples of two integers, in order and apart, within ``width`` columns; None if these end the width."""
    if slices is None:
        return None
    given = slices if isinstance(slices, Sequence) else (slices,)
    if not all(isinstance(each, Sequence) and len(each) == 2 and _integers(each) for each in given):
        raise ValueError(f"slices must be pairs of integers, where a range of columns starts and ends, got {slices!r}")
    slices = tuple((start, end) for start, end in given)
    ends = (0, *(end for _, end in slices))
    fine = all(last <= start < end for last, (start, end) in zip(ends[:-1], slices, strict=True))
    if not slices or not fine or (width is not None and ends[-1] > width):
        within = "from 0" if width is None else f"within 0 to {width}"
        raise ValueError(f"slices must be ranges of columns, in order and apart, {within}, got {slices}")
    return slices


def _integers(numbers: Sequence) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)


def check_ranks(lora_A: Tensor, lora_B: Tensor, slices: Slices | None, width: int, outputs: int) -> None:
    """The two factors against each other and against the layer, ``width`` in and ``outputs`` out."""
    rank, parts = lora_B.shape[-1], 1 if slices is None else len(slices)
    adapted = outputs if slices is None else sum(end - start for start, end in slices)
    adapters = tuple(lora_A.shape[:-2])
    wants = (("lora_A", lora_A, (*adapters, parts * rank, width)), ("lora_B", lora_B, (*adapters, adapted, rank)))
    for name, factor, shape in wants:
        if factor.shape != shape or not rank:
            raise ValueError(
                f"{name} must have shape {shape} for a layer of {width} inputs and {outputs} outputs, the other factor "
                f"and {parts} slice{'s' * (parts > 1)}, and a rank of 1 or more; got {tuple(factor.shape)}"
            )


def check_scaling(x: Tensor, scaling: Tensor, adapters: int) -> None:
    """One factor for each adapter."""
    if not isinstance(scaling, Tensor) or scaling.shape != (adapters,) or not scaling.is_floating_point():
        got = tuple(scaling.shape) if isinstance(scaling, Tensor) else type(scaling).__name__
        raise ValueError(f"scaling must be a floating point tensor of shape ({adapters},), one a adapter, got {got}")
    if scaling.requires_grad:
        raise ValueError("scaling must not require a gradient: it is a constant of the adapter")
    _check_device(x, "scaling", scaling)


def seed_on(x: Tensor, dropout_p: float, seed: Tensor | int | None) -> Tensor | None:
    """Dropout's seed as a tensor on the device of ``x``, drawn there if none is given; None without dropout."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    if not dropout_p:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), device=x.device)
    if not isinstance(seed, Tensor):
        if not _integers([seed]) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must be an integer of 64 bits or a tensor of one, got {seed!r}")
        return x.new_full((), seed, dtype=torch.int64)  # a kernel, so that a CUDA graph can hold it
    if seed.numel() != 1 or seed.dtype != torch.int64:
        raise ValueError(f"seed must be one int64, got {seed.dtype} of shape {tuple(seed.shape)}")
    _check_device(x, "seed", seed)
    return seed


def _check_device(x: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, as the input is, got {tensor.device}")
