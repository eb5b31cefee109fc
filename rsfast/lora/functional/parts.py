"""The two halves of a LoRA by themselves: down to the rank, and up again."""

from torch import Tensor

from rsfast._dispatch import Impl, use_fused
from rsfast.lora import reference
from rsfast.lora.functional.batch import AdapterBatch
from rsfast.lora.functional.checks import (
    Slices,
    check_factor,
    check_floating,
    check_scaling,
    check_slices,
    why_not_fused,
    working_dtype,
)
from rsfast.lora.functional.linear import batch_of


def lora_shrink(
    x: Tensor,  # (..., K)
    lora_A: Tensor,  # (r, K) or (G, r, K)
    scaling: float | Tensor = 1.0,  # or (G,)
    adapter_ids: Tensor | AdapterBatch | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:  # (..., r)
    r"""Down to the rank: :math:`s = \alpha A x`, with ``adapter_ids`` :math:`s_t = \alpha_g A_g x_t`, 0 for id -1.

    The first half of :func:`rsfast.lora_linear` and :func:`rsfast.batched_lora_linear`, whose arguments, precision,
    determinism and errors it shares; differentiable in ``x`` and ``lora_A``. Reads ``x`` once.

    Args:
        x: As in :func:`rsfast.lora_linear`.
        lora_A: With an axis of adapters if ``adapter_ids`` is given.
        scaling: A number; one for each adapter, as a tensor, if ``adapter_ids`` is given.
        adapter_ids: As in :func:`rsfast.batched_lora_linear`, or None.
        impl: As in :func:`rsfast.lora_linear`.

    Raises:
        ValueError: A shape, dtype, device or id does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Example:
        >>> import torch, rsfast
        >>> rsfast.lora_shrink(torch.ones(1, 4), torch.ones(2, 4), 0.5)
        tensor([[2., 2.]])
    """
    check_floating(x, "x")
    several = adapter_ids is not None
    check_factor(x, "lora_A", lora_A, 2 + several, "(G, r, K)" if several else "(r, K)")
    if lora_A.shape[-1] != x.shape[-1]:
        raise ValueError(f"lora_A must take {x.shape[-1]} features for x {tuple(x.shape)}, got {tuple(lora_A.shape)}")
    plan = batch = None
    if several:
        check_scaling(x, scaling, len(lora_A))
        batch, repeats = batch_of(x, adapter_ids, len(lora_A))
    elif isinstance(scaling, Tensor):
        raise ValueError(f"scaling must be a number without adapter_ids, got a tensor of {tuple(scaling.shape)}")
    dtype = working_dtype(x)
    if use_fused(impl, why_not_fused(x, lora_A.shape[-2], dtype)):
        from rsfast.lora import kernels

        plan = batch.plan(repeats) if several else None
        return kernels.lora_shrink(x.to(dtype), lora_A, scaling, plan)
    return reference.lora_shrink(
        x.to(dtype), lora_A.to(dtype), scaling.to(dtype) if several else scaling, batch.ids if several else None
    )


def lora_expand(
    s: Tensor,  # (..., r)
    lora_B: Tensor,  # (N, r) or (G, N, r)
    base: Tensor | None = None,  # (..., N)
    adapter_ids: Tensor | AdapterBatch | None = None,
    *,
    slices: Slices | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (..., N)
    r"""Up from the rank: :math:`y = y_0 + B s`, with ``adapter_ids`` :math:`y_t = y_{0,t} + B_g s_t`.

    The second half of :func:`rsfast.lora_linear` and :func:`rsfast.batched_lora_linear`, whose arguments, precision,
    determinism and errors it shares; differentiable in ``s``, ``lora_B`` and ``base``. ``base`` is left as it is.

    Args:
        s: As :func:`lora_shrink` returns it; of width S r with ``slices``.
        lora_B: With an axis of adapters if ``adapter_ids`` is given.
        base: What is added to, in ``s``'s dtype; None for zeros.
        adapter_ids: As in :func:`rsfast.batched_lora_linear`, or None. Rows of id -1 are those of ``base``.
        slices: As in :func:`rsfast.lora_linear`; without ``base`` the last one ends the output.
        impl: As in :func:`rsfast.lora_linear`.

    Raises:
        ValueError: A shape, dtype, device or id does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Example:
        >>> import torch, rsfast
        >>> rsfast.lora_expand(torch.ones(1, 2), torch.ones(3, 2), torch.ones(1, 3))
        tensor([[3., 3., 3.]])
    """
    check_floating(s, "s")
    several = adapter_ids is not None
    check_factor(s, "lora_B", lora_B, 2 + several, "(G, N, r)" if several else "(N, r)")
    dtype = working_dtype(s)
    if base is not None:
        check_floating(base, "base")
    slices = check_slices(slices, None if base is None else base.shape[-1])
    outputs = base.shape[-1] if base is not None else lora_B.shape[-2] if slices is None else slices[-1][1]
    adapted = outputs if slices is None else sum(end - start for start, end in slices)
    if lora_B.shape[-2] != adapted or s.shape[-1] != lora_B.shape[-1] * (1 if slices is None else len(slices)):
        raise ValueError(
            f"lora_B must have shape (..., {adapted}, r) for {outputs} outputs in {len(slices or (0,))} slice(s) "
            f"and s {tuple(s.shape)}, got {tuple(lora_B.shape)}"
        )
    if base is not None and (base.shape[:-1] != s.shape[:-1] or base.dtype != s.dtype or base.device != s.device):
        raise ValueError(
            f"base must be {s.dtype} of shape {(*s.shape[:-1], 'N')} on {s.device}, as s is, got {base.dtype} of "
            f"{tuple(base.shape)} on {base.device}"
        )
    if several:
        batch, repeats = batch_of(s, adapter_ids, len(lora_B))
    s, base = s.to(dtype), None if base is None else base.to(dtype)
    if use_fused(impl, why_not_fused(s, lora_B.shape[-1], dtype)):
        from rsfast.lora import kernels

        return kernels.lora_expand(s, lora_B, base, batch.plan(repeats) if several else None, slices, outputs)
    return reference.lora_expand(s, lora_B.to(dtype), base, batch.ids if several else None, slices)
