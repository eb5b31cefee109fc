"""What the gated adapter promises, and which implementation keeps the promise."""

import torch
from torch import Tensor

from rsfast._dispatch import Impl, use_fused, why_not_triton
from rsfast.adapter import reference
from rsfast.adapter.reference import SharedWeights

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_LENGTH = 1024
BOTTLENECKS = (32, 256)


def gated_adapter(
    x: Tensor,  # (B, L, D)
    down_weight: Tensor,  # (R, D)
    down_bias: Tensor,  # (R,)
    in_proj_weight: Tensor,  # (3R, R)
    in_proj_bias: Tensor,  # (3R,)
    out_proj_weight: Tensor,  # (R, R)
    out_proj_bias: Tensor,  # (R,)
    up_weight: Tensor,  # (D, R)
    up_bias: Tensor,  # (D,)
    gate: Tensor,  # ()
    residual_gate: Tensor | None = None,  # ()
    *,
    shared: SharedWeights | None = None,
    lengths: Tensor | None = None,  # (B,)
    num_heads: int = 8,
    shared_heads: int | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (B, L, D)
    r"""HarMA's multimodal gated adapter with its residual and both gates, as one operation.

    .. math::
        h &= \mathrm{GELU}(W_d x + b_d), \quad z = \mathrm{MHA}(\mathrm{Share}(\mathrm{MHA}(h))), \\
        y &= x + \sigma(g_b) \, (W_u (\sigma(g) h + (1 - \sigma(g)) z) + b_u)

    Both attentions use the same weights. ``Share`` is the identity without ``shared``, else
    :math:`m + W_2 (\sigma(g_s) \mathrm{MHA}(p) + (1 - \sigma(g_s)) p) + b_2` with :math:`p = W_1 m + b_1`.

    Source: HarMA, arXiv 2404.18253, as its authors' code computes it (``MMadapter``, ``BiShareAdapter`` and the blend
    at the end of ``ResidualAttentionBlock``). Differs from upstream: tokens are on axis 1, the attention never mixes
    samples, and the residual and the block's gate are folded into one scaled sum, which is the same number.

    Args:
        x: Output of a block's MLP. fp32, fp16, bf16 (fp64 with the reference), any strides.
        down_weight: Projection to the bottleneck R. Parameters are in ``x``'s dtype or in fp32.
        down_bias: As above.
        in_proj_weight: Query, key and value projections, stacked as in ``nn.MultiheadAttention``.
        in_proj_bias: As above.
        out_proj_weight: Output projection of the attention.
        out_proj_bias: As above.
        up_weight: Projection back to D; zero at the start of training, so that ``y`` equals ``x``.
        up_bias: As above.
        gate: Mixes the bottleneck with the attention, before the sigmoid.
        residual_gate: Scales the adapter's contribution, before the sigmoid; None for no gate.
        shared: The sub-adapter's parameters.
        lengths: Integers on ``x``'s device. Tokens at or after a sample's length neither attend nor are attended to,
            and pass through unchanged; 0 passes a whole sample through. None: every token takes part, as in HarMA.
        num_heads: Heads of the attention; divides R.
        shared_heads: Heads of the shared sub-adapter's attention; divides R // 2. Default ``num_heads``.
        impl: ``auto`` uses the fused kernels where they can run; ``fused`` insists; ``reference`` is plain PyTorch.

    Returns:
        Tensor like ``x``.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
        NotImplementedError: ``impl="fused"`` and the kernels cannot run; every reason is listed.

    Precision: products in ``x``'s dtype (in autocast's, inside an autocast region), sums and softmax in fp32, TF32 off.
    Deterministic: yes, the backward too (fused). Memory saved for backward (fused): ``x`` itself and, per token in
    a 16-bit dtype, 6 R bytes plus 8 bytes a head; with ``shared`` R + 4 bytes a head more. All else is recomputed.

    Example:
        >>> import torch, rsfast
        >>> adapter = rsfast.GatedAdapter(64, bottleneck=32)
        >>> x = torch.randn(2, 5, 64)
        >>> torch.equal(adapter(x), x)  # the up-projection starts at zero
        True
    """
    weights = (
        down_weight, down_bias, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, up_weight, up_bias, gate,
    )  # fmt: skip
    shared_heads = num_heads if shared_heads is None else shared_heads
    _check(x, weights, residual_gate, shared, lengths, num_heads, shared_heads)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    options = dict(lengths=lengths, num_heads=num_heads, shared_heads=shared_heads)
    if use_fused(impl, why_not_fused(x, down_weight.shape[0], dtype=dtype)):
        from rsfast.adapter import kernels

        return kernels.gated_adapter(x, *weights, residual_gate, shared=shared, dtype=dtype, **options)
    weights = [w.to(dtype) for w in weights]
    residual_gate = None if residual_gate is None else residual_gate.to(dtype)
    shared = None if shared is None else SharedWeights(*(w.to(dtype) for w in shared))
    return reference.gated_adapter(x, *weights, residual_gate, shared=shared, **options)


def why_not_fused(x: Tensor, bottleneck: int = 128, *, dtype: torch.dtype | None = None) -> list[str]:
    """Reasons the fused kernels cannot take these inputs; from metadata only, so it traces."""
    low, high = BOTTLENECKS
    wants = {
        f"x is {x.dtype}; the kernels take fp32, fp16 and bf16": x.dtype in DTYPES and dtype in (None, *DTYPES),
        f"there are {x.shape[1]} tokens; the kernels take up to {MAX_LENGTH}": x.shape[1] <= MAX_LENGTH,
        f"the bottleneck is {bottleneck}; the kernels take {low} to {high}": low <= bottleneck <= high,
    }
    return why_not_triton(x) + [reason for reason, fine in wants.items() if not fine]


def _check(x, weights, residual_gate, shared, lengths, num_heads, shared_heads):
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, tokens, width), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating point tensor, got {x.dtype}")
    if weights[0].ndim != 2:
        raise ValueError(f"down_weight must be (bottleneck, width), got shape {tuple(weights[0].shape)}")
    width, bottleneck = x.shape[2], weights[0].shape[0]
    tensors = dict(zip(_expected(width, bottleneck), weights, strict=True))
    shapes = _expected(width, bottleneck)
    if residual_gate is not None:
        tensors["residual_gate"], shapes["residual_gate"] = residual_gate, ()
    if shared is not None:
        for name, shape in _expected(bottleneck, bottleneck // 2).items():
            tensors[f"shared.{name}"], shapes[f"shared.{name}"] = getattr(shared, name), shape
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{name} must have shape {shapes[name]} for x {tuple(x.shape)} and a bottleneck of {bottleneck}, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} must be {x.dtype}, as x is, or torch.float32; got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, as x is, got {tensor.device}")
    if num_heads < 1 or bottleneck % num_heads:
        raise ValueError(f"num_heads must divide the bottleneck of {bottleneck}, got {num_heads}")
    if shared is not None and (shared_heads < 1 or bottleneck % 2 or bottleneck // 2 % shared_heads):
        raise ValueError(f"shared_heads must divide half the bottleneck of {bottleneck}, got {shared_heads}")
    if lengths is None:
        return
    if lengths.shape != x.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"lengths must be {x.shape[0]} integers, one a sample, got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    if lengths.device != x.device:
        raise ValueError(f"lengths must be on {x.device}, as x is, got {lengths.device}")


def _expected(width: int, bottleneck: int) -> dict[str, tuple[int, ...]]:
    r, d = bottleneck, width
    return {
        "down_weight": (r, d), "down_bias": (r,), "in_proj_weight": (3 * r, r), "in_proj_bias": (3 * r,),
        "out_proj_weight": (r, r), "out_proj_bias": (r,), "up_weight": (d, r), "up_bias": (d,), "gate": (),
    }  # fmt: skip
