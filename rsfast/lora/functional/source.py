"""How the input of a layer was made, so that it need not be kept for backward."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rsfast.lora.reference import SOURCES


class Source(NamedTuple):
    """What a layer's input ``x`` was computed from, by tensors that others keep for their backward anyway.

    A linear layer with LoRA needs ``x`` again for the gradient of ``lora_A``. Given its source it keeps that instead,
    and ``x``, which a LayerNorm or an activation does not keep itself, is freed after the forward pass. It is computed
    again, rounded to the dtype it had. What the source says is believed: gradients of ``lora_A`` are wrong if ``x`` is
    something else.

    Attributes:
        function: ``layer_norm``, ``gelu`` (exact), ``gelu_tanh`` or ``quick_gelu``.
        input: Of the function, in the shape of ``x``, contiguous.
        mean: Of each row, for ``layer_norm``, as ``torch.native_layer_norm`` returns it; fp32.
        rstd: As above.
        weight: Of ``layer_norm``, or None.
        bias: As above.

    Example:
        >>> import torch, rsfast
        >>> layer, h = rsfast.LoRALinear(torch.nn.Linear(4, 3)), torch.randn(2, 4)
        >>> x = torch.nn.functional.gelu(h)
        >>> y = rsfast.lora_linear(
        ...     x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, 1.0, source=rsfast.Source("gelu", h)
        ... )
    """

    function: Literal["layer_norm", "gelu", "gelu_tanh", "quick_gelu"]
    input: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def note(self, x: Tensor) -> Tensor:
        """``x``, which tells the layers of this library that get it how it was made; what is computed from it does not.

        Writing into ``x`` or into the input takes the word back.
        """
        if not (x.is_inference() or self.input.is_inference()):  # of those nothing tells that they were written into
            x.lora_source = self, x._version, self.input._version
        return x

    @staticmethod
    def of(x: Tensor) -> "Source | None":
        """The source that ``x`` was given by :meth:`note`, if it still holds."""
        if torch.compiler.is_compiling():
            return None
        source, *versions = getattr(x, "lora_source", (None,))
        return source if source is not None and versions == [x._version, source.input._version] else None


def check_source(x: Tensor, source: Source) -> None:
    if source.function not in SOURCES:
        raise ValueError(f"source.function must be one of {', '.join(SOURCES)}, got {source.function!r}")
    if source.input.shape != x.shape or source.input.device != x.device:
        raise ValueError(
            f"source.input must be {tuple(x.shape)} on {x.device}, as x is, got {tuple(source.input.shape)} on "
            f"{source.input.device}"
        )
    if source.function == "layer_norm":
        rows = x.shape[:-1].numel()
        for name, tensor, size in (("mean", source.mean, rows), ("rstd", source.rstd, rows)):
            if tensor is None or tensor.numel() != size:
                got = None if tensor is None else tuple(tensor.shape)
                raise ValueError(f"source.{name} must have {size} elements, one for each row of x, got {got}")
        for name, tensor in (("weight", source.weight), ("bias", source.bias)):
            if tensor is not None and tensor.shape != x.shape[-1:]:
                raise ValueError(f"source.{name} must be ({x.shape[-1]},), got {tuple(tensor.shape)}")
