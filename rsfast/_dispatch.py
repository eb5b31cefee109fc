"""How an operation is registered with PyTorch, and how it picks an implementation."""

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

Impl = Literal["auto", "fused", "reference"]
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU, slowly

OLDEST = 80  # compute capability; before it there is neither bf16 nor the shared memory that the tiles take
HAS_TRITON = find_spec("triton") is not None


def register(schema: str, launch: Callable, fake: Callable):
    """Register ``launch`` as ``torch.ops.rsfast.<name>`` and return the overload to call."""
    name, _, signature = schema.partition("(")
    torch.library.define(f"rsfast::{name}", f"({signature}")
    torch.library.impl(f"rsfast::{name}", ("cpu", "cuda") if INTERPRET else "cuda", _where_it_lives(launch))
    torch.library.register_fake(f"rsfast::{name}", fake)
    return getattr(torch.ops.rsfast, name).default


def _where_it_lives(launch: Callable) -> Callable:
    """``launch`` on its tensors' GPU: Triton launches on the current one, whatever theirs is."""

    def run(*args):
        if forward_ad._current_level >= 0:  # the tangents would be dropped without a word
            raise NotImplementedError("the fused kernels have no forward-mode derivative: take impl='reference'")
        first = next(arg for arg in args if hasattr(arg, "is_cuda"))
        if not first.is_cuda:
            return launch(*args)
        with torch.cuda.device_of(first):
            return launch(*args)

    return run


class _Once(torch.autograd.Function):
    """A gradient as it is, whose own derivative is refused."""

    @staticmethod
    def forward(ctx, grad, mark):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError("the fused kernels have no second derivative: take impl='reference'")


def once_differentiable(backward: Callable) -> Callable:
    """For a backward whose gradients have no derivative; PyTorch's own lets them pass for constants."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        mark = torch.zeros((), requires_grad=True)
        return tuple(g if g is None else _Once.apply(g, mark) for g in results)

    return run


def why_not_triton(tensor: Tensor) -> list[str]:
    """Reasons Triton cannot run on this tensor's device."""
    if not HAS_TRITON:
        return ["Triton is not installed"]
    if not (tensor.is_cuda or INTERPRET):
        return [f"the input is on {tensor.device}, not on a GPU"]
    if torch.compiler.is_compiling():
        return []
    if tensor.is_cuda and capability(tensor.device) < OLDEST:
        major, minor = divmod(capability(tensor.device), 10)
        return [f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0 or newer"]
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return ["a transform of torch.func is active, which kernels do not take part in"]
    return []


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability as one number, 90 for sm_90. Interpreted kernels take the Hopper plan."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def use_fused(impl: Impl, why_not: list[str]) -> bool:
    """``auto`` may fall back, and never interprets; ``fused`` does what it says or raises."""
    if impl not in ("auto", "fused", "reference"):
        raise ValueError(f"impl must be 'auto', 'fused' or 'reference', got {impl!r}")
    if impl == "fused" and why_not:
        raise NotImplementedError("the fused kernel cannot run:\n  - " + "\n  - ".join(why_not))
    return not why_not and (impl == "fused" or (impl == "auto" and not INTERPRET))
