"""The gradients of many layers' factors, added up in one launch."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from rsfast._dispatch import HAS_TRITON, why_not_triton


@contextlib.contextmanager
def reduce_together(model: nn.Module | Iterable[Tensor], *, max_bytes: int = 2**28) -> Iterator[None]:
    r"""Around the forward pass of a model: backward adds up the gradients of all its LoRA factors in one launch.

    The kernels take the gradient of a factor, a sum over all tokens, in partial sums of chunks of tokens. Every layer
    adds up its own, in two launches. Of layers called in here, the partial sums wait for each other instead. Meant for
    small batches in many layers, where launches cost more than the work.

    Gradients are the same, bit for bit. They arrive in ``.grad`` at the end of backward, as views of one tensor for
    each device and dtype; so hooks of parameters, and DDP's exchange, run then and not during backward. Everything else
    is as without: accumulation, ``retain_graph``, layers used twice or not at all, checkpointing, frozen factors.

    It changes nothing for layers that run in plain PyTorch, for sums that products of cuBLAS take, in compiled regions,
    on another stream than the one it is entered on, and for factors that are other tensors inside a layer than in
    ``model.parameters()``, as FSDP makes them.

    Args:
        model: Its parameters with a ``lora_A`` or ``lora_B`` in the name take part (PEFT's too, after
            ``rsfast.models.patch_peft``). Or the factors themselves, as :func:`rsfast.lora_linear` takes them.
        max_bytes: What partial sums may take, for each device and dtype of factors; layers beyond it add up theirs at
            once. They are allocated when backward begins and live until it ends. For M tokens in 16 bits and a rank
            up to 32, a layer leaves ``4 ceil(M / 256) r N`` bytes for ``lora_B`` and, where K is 128 or more, at most
            ``1024 r`` bytes for each multiprocessor of the GPU for ``lora_A``.

    Raises:
        ValueError: There is no LoRA in the model, or ``max_bytes`` is no number of bytes.
        RuntimeError: It is active already.

    Deterministic: yes.

    Example:
        >>> import torch, rsfast
        >>> model = torch.nn.Sequential(*[rsfast.LoRALinear(torch.nn.Linear(4, 4), r=2) for _ in range(3)])
        >>> with rsfast.reduce_together(model):
        ...     loss = model(torch.ones(1, 4)).sum()
        >>> loss.backward()
        >>> model[0].lora_A.grad.shape
        torch.Size([2, 4])
    """
    if torch.compiler.is_compiling():
        yield
        return
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
        raise ValueError(f"max_bytes must be a number of bytes, 0 or more, got {max_bytes!r}")
    factors = _factors(model)
    if not HAS_TRITON:
        yield
        return
    from rsfast.lora.kernels.together import collected

    with collected([factor for factor in factors if _can_wait(factor)], max_bytes):
        yield


def _factors(model: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(model, nn.Module):
        named = model.named_parameters()
        factors = [factor for name, factor in named if {"lora_A", "lora_B"} & set(name.split("."))]
        if not factors:
            raise ValueError(f"model must have LoRA layers, but {type(model).__name__} has no lora_A or lora_B")
        return factors
    factors = list({id(factor): factor for factor in model}.values())
    if not factors or not all(isinstance(factor, Tensor) for factor in factors):
        kinds = sorted({type(factor).__name__ for factor in factors}) or "none"
        raise ValueError(f"model must be a module or tensors, the factors of LoRA layers, got {kinds}")
    return factors


def _can_wait(factor: Tensor) -> bool:
    """Plain tensors only: a sharded one is not what a layer's kernel gets."""
    plain = type(factor) in (Tensor, nn.Parameter) and factor.requires_grad
    return plain and not why_not_triton(factor) and not torch.is_inference_mode_enabled()
