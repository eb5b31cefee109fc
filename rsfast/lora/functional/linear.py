"""Linear layers with one LoRA, and with one for each sample or token: contract, checks, choice."""

from torch import Tensor

from rsfast._dispatch import Impl, use_fused
from rsfast.lora import reference
from rsfast.lora.functional.batch import AdapterBatch
from rsfast.lora.functional.checks import (
    Slices,
    check_factor,
    check_linear,
    check_ranks,
    check_scaling,
    check_slices,
    seed_on,
    why_not_fused,
    working_dtype,
)
from rsfast.lora.functional.source import Source, check_source


def lora_linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    lora_A: Tensor,  # (r, K)
    lora_B: Tensor,  # (N, r)
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    slices: Slices | None = None,
    source: Source | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (..., N)
    r"""Linear layer with low-rank adaptation, as one operation.

    .. math:: y = W x + b + \alpha \, B A \, \mathrm{dropout}(x)

    Source: LoRA, arXiv 2106.09685, Section 4.1; ``peft.tuners.lora.Linear`` computes the same. Differs from PEFT:
    nothing but the order of roundings, and dropout's random numbers.

    Args:
        x: fp32, fp16, bf16 (fp64 with the reference), any strides.
        weight: Of the layer; in ``x``'s dtype (any inside autocast). If it requires no gradient none is computed.
        bias: As ``weight``, or None.
        lora_A: Of rank r, 1 to 256 in the kernels. Both factors are in ``x``'s dtype or in fp32; fp32 factors are
            rounded for the products, their gradients are fp32, and ``x`` is never copied to fp32.
        lora_B: As above; zero at the start of training, so that ``y`` is the layer's output.
        scaling: :math:`\alpha`, PEFT's ``lora_alpha / r``. A number, without a gradient.
        dropout_p: Probability of dropping an element of the input of ``A``, at least 0 and below 1; rounded to a
            multiple of 2^-16. Here dropout is always applied; a layer passes 0 when it does not train.
        seed: One int64 on ``x``'s device, or an integer: the same seed drops the same elements of an input of the same
            shape, in every implementation, forward and backward. None draws one from PyTorch's generator of the device.
        slices: Ranges of output columns that have a LoRA each, in order and apart, as q, k and v in a fused
            projection: for ``S`` of them ``lora_A`` is ``(S r, K)``, one under the other, and ``lora_B`` ``(n, r)``
            with ``n`` columns in all of them. Columns in no slice are the layer's. None: one LoRA for all.
        source: What ``x`` was made from, a :class:`Source`; then it is kept for backward in place of ``x``. Only the
            fused implementation makes use of it, and not while ``weight`` is trained.
        impl: ``auto`` runs what is fastest for these sizes by the tables that come with the library or that
            ``rsfast tune`` wrote, products of cuBLAS where they say nothing; ``fused`` insists on the kernels;
            ``reference`` is plain PyTorch.

    Returns:
        Tensor like ``x`` with N features; in autocast's dtype inside an autocast region.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Precision: products in ``x``'s dtype (autocast's in autocast), sums in fp32, without TF32 in the kernels.
    Deterministic: yes, backward too (fused). Memory saved for backward (fused): ``x`` and ``weight`` themselves, r
    numbers a token and slice, with dropout one bit an element of ``x``.

    Example:
        >>> import torch, rsfast
        >>> x, W, A, B = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
        >>> rsfast.lora_linear(x, W, None, A, B, 0.5)[0]
        tensor([2.5000, 2.5000, 2.5000])
    """
    slices = _check_layer(x, weight, bias, lora_A, lora_B, slices)
    if isinstance(scaling, Tensor):
        raise ValueError(f"scaling must be a number, got a tensor of shape {tuple(scaling.shape)}")
    if source is not None:
        check_source(x, source)
    seed = seed_on(x, dropout_p, seed)
    dtype = working_dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if use_fused(impl, why_not_fused(x, lora_B.shape[-1], dtype)):
        from rsfast.lora import kernels

        return kernels.lora_linear(
            x, weight, bias, lora_A, lora_B, scaling, None, dropout_p, seed, slices, source, impl == "fused"
        )
    return reference.lora_linear(x, weight, bias, lora_A.to(dtype), lora_B.to(dtype), scaling, dropout_p, seed, slices)


def batched_lora_linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    lora_A: Tensor,  # (G, r, K)
    lora_B: Tensor,  # (G, N, r)
    scaling: Tensor,  # (G,)
    adapter_ids: Tensor | AdapterBatch,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    slices: Slices | None = None,
    source: Source | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (..., N)
    r"""Linear layer with a LoRA of its own for each sample or token, as one operation that trains all of them.

    .. math:: y_t = W x_t + b + \alpha_g \, B_g A_g \, \mathrm{dropout}(x_t), \qquad g = \mathrm{id}_t

    Tokens of id -1 get ``W x + b``, bit for bit what the same call returns where every id is -1.

    Source: LoRA, arXiv 2106.09685; several at once as in Punica, arXiv 2310.18547, which does not train.

    Args:
        x: As in :func:`lora_linear`.
        weight: As in :func:`lora_linear`.
        bias: As in :func:`lora_linear`.
        lora_A: G adapters of rank r. One of a lower rank has zeros in the rest, and keeps them: their gradients are 0.
        lora_B: As above.
        scaling: Of each adapter, without a gradient.
        adapter_ids: An :class:`AdapterBatch`, made once for all layers of a model; or its ids, int32 or int64: one a
            sample ``(x.shape[0],)`` or one a token ``x.shape[:-1]``, in any order, -1 for the layer alone.
        dropout_p: As in :func:`lora_linear`.
        seed: As in :func:`lora_linear`.
        slices: As in :func:`lora_linear`, with an axis of adapters in front.
        source: As in :func:`lora_linear`.
        impl: As in :func:`lora_linear`.

    Returns:
        As :func:`lora_linear`.

    Raises:
        ValueError: A shape, dtype, device or id does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Precision, determinism and memory: as :func:`lora_linear`.

    Example:
        >>> import torch, rsfast
        >>> x, W = torch.ones(3, 2), torch.eye(2)
        >>> A, B = torch.ones(2, 1, 2), torch.tensor([1.0, 10.0]).view(2, 1, 1).expand(2, 2, 1)
        >>> rsfast.batched_lora_linear(x, W, None, A, B, torch.ones(2), torch.tensor([1, -1, 0]))
        tensor([[21., 21.],
                [ 1.,  1.],
                [ 3.,  3.]])
    """
    slices = _check_layer(x, weight, bias, lora_A, lora_B, slices, "G, ")
    check_scaling(x, scaling, len(lora_A))
    batch, repeats = batch_of(x, adapter_ids, len(lora_A))
    if source is not None:
        check_source(x, source)
    seed = seed_on(x, dropout_p, seed)
    dtype = working_dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if use_fused(impl, why_not_fused(x, lora_B.shape[-1], dtype)):
        from rsfast.lora import kernels

        return kernels.lora_linear(
            x, weight, bias, lora_A, lora_B, scaling, batch.plan(repeats), dropout_p, seed, slices, source,
            impl == "fused",
        )  # fmt: skip
    return reference.batched_lora_linear(
        x, weight, bias, lora_A.to(dtype), lora_B.to(dtype), scaling.to(dtype), batch.ids, dropout_p, seed, slices
    )


def _check_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    slices: Slices | None,
    axis: str = "",
) -> Slices | None:
    """The slices, once the layer and its factors, with an ``axis`` of adapters or without, fit together."""
    check_linear(x, weight, bias)
    check_factor(x, "lora_A", lora_A, 3 if axis else 2, f"({axis}r, K)")
    check_factor(x, "lora_B", lora_B, 3 if axis else 2, f"({axis}N, r)")
    slices = check_slices(slices, len(weight))
    check_ranks(lora_A, lora_B, slices, x.shape[-1], len(weight))
    return slices


def batch_of(x: Tensor, adapter_ids: Tensor | AdapterBatch, adapters: int) -> tuple[AdapterBatch, int]:
    """The batch, and how many rows of ``x`` each of its ids stands for."""
    batch = adapter_ids if isinstance(adapter_ids, AdapterBatch) else AdapterBatch(adapter_ids, adapters)
    if batch.num_adapters != adapters:
        raise ValueError(f"adapter_ids is a batch for {batch.num_adapters} adapters, but there are {adapters}")
    if batch.ids.device != x.device:
        raise ValueError(f"adapter_ids must be on {x.device}, as x is, got {batch.ids.device}")
    if batch.ids.shape not in (x.shape[:1], x.shape[:-1]) or x.ndim < 2:
        raise ValueError(
            f"adapter_ids must be ({x.shape[0]},), one a sample, or {tuple(x.shape[:-1])}, one a token, for x "
            f"{tuple(x.shape)}; got {tuple(batch.ids.shape)}"
        )
    return batch, x.shape[1:-1].numel() if batch.ids.ndim == 1 else 1
