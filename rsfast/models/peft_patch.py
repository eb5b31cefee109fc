"""The fused path for the LoRA layers of an existing PEFT model, and back."""

from dataclasses import dataclass

from torch import nn

from rsfast._dispatch import Impl, use_fused
from rsfast.models.lora_windows import SWAPS


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch_peft` did.

    Attributes:
        swapped: Paths of the layers that take the fused path now.
        skipped: Paths of PEFT's other LoRA layers, which stay PEFT's, and why.
        dead: Paths of layers whose adapters cannot change the output, because their ``forward`` is never called.
    """

    swapped: tuple[str, ...]
    skipped: dict[str, str]
    dead: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"fused path in {len(self.swapped)} LoRA layers"]
        lines += [f"skipped {path}: {why}" for path, why in self.skipped.items()]
        if self.dead:
            lines.append(
                f"warning: the adapters of {len(self.dead)} layers train nothing, because their attention reads the "
                "weight and never calls the layer; target an nn.MultiheadAttention itself, and give torchvision's Swin "
                f"LoRA by add_lora: {', '.join(self.dead)}"
            )
        return "\n".join(lines)


def patch_peft(model: nn.Module, *, impl: Impl = "auto") -> PatchReport:
    """Give the LoRA layers of a PEFT model the fused path, in place; everything else about the model stays.

    The classes of ``peft.tuners.lora.Linear`` and ``MultiheadAttention`` instances are swapped for subclasses:
    parameters, ``state_dict`` keys and saved files are the same, and PEFT's functions (``set_adapter``,
    ``disable_adapter``, ``merge_adapter``, ``add_adapter``, ``merge_and_unload``) work as before. A linear layer is one
    :func:`rsfast.lora_linear`, several active adapters are stacked, ``adapter_names`` is one
    :func:`rsfast.batched_lora_linear`. fp32 adapters in a 16-bit model are rounded for the products, as under autocast;
    no fp32 copy of the input is made.

    An attention is computed from ``x W + LoRA`` without writing its weights. Differs from PEFT 0.21 there: PEFT adds
    ``out_proj``'s delta twice (huggingface/peft#3774) and ignores dropout; here the delta counts once, merged or not,
    and dropout is applied. So a model that was trained by PEFT's own attention gives other outputs when patched.

    Left alone, with the reason in the report: DoRA and other variants, quantised and wrapped base layers, embeddings
    and convolutions, ``lora_bias=True``, ``fan_in_fan_out=True``, merged attentions.

    Args:
        model: From ``get_peft_model`` or ``inject_adapter_in_model``.
        impl: As in :func:`rsfast.lora_linear`.

    Returns:
        What was swapped, what was not and why, and which adapters cannot fire.

    Raises:
        ImportError: peft is not installed.
        ValueError: ``model`` has no LoRA layer of PEFT, or is patched already. Nothing has changed.

    Example:
        >>> import peft, torch, rsfast.models
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU())
        >>> model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
        >>> rsfast.models.patch_peft(model).swapped
        ('base_model.model.0',)
        >>> rsfast.models.unpatch(model)
    """
    layers, fused = _layers(model)
    use_fused(impl, [])  # refuses an unknown impl
    if not layers:
        raise ValueError("model has no LoRA layer of PEFT; get_peft_model or inject_adapter_in_model makes them")
    if any(type(layer) in fused.ORIGINAL for layer in layers.values()):
        raise ValueError("model is patched already; unpatch takes it back")
    dead = _dead(model, layers)
    reasons = {path: fused.why_not(layer) for path, layer in layers.items() if path not in dead}
    for path in (path for path, why in reasons.items() if why is None):
        layers[path].__class__ = fused.PATCHED[type(layers[path])]
        layers[path].rsfast_impl = impl
    swapped = tuple(path for path, why in reasons.items() if why is None)
    return PatchReport(swapped, {path: why for path, why in reasons.items() if why}, dead)


def unpatch(model: nn.Module) -> None:
    """Give the layers that :func:`patch_peft` swapped their classes back.

    Raises:
        ImportError: peft is not installed.
        ValueError: ``model`` is not patched, or one of its attentions is merged: PEFT would take ``out_proj``'s delta
            off twice. Nothing has changed.
    """
    layers, fused = _layers(model)
    swapped = {path: layer for path, layer in layers.items() if type(layer) in fused.ORIGINAL}
    if not swapped:
        raise ValueError("model is not patched; patch_peft does that")
    for path, layer in swapped.items():
        if layer.merged and isinstance(layer, fused.MultiheadAttention):
            raise ValueError(f"{path} is merged, and PEFT takes out_proj's delta off twice: unmerge the model first")
    for layer in swapped.values():
        del layer.rsfast_impl
        layer.__class__ = fused.ORIGINAL[type(layer)]


def _layers(model: nn.Module):
    """PEFT's LoRA layers by path, and the module that knows how to swap them."""
    try:
        from rsfast.models import peft_layers
    except ImportError as error:
        raise ImportError(f"patch_peft and unpatch need peft, which cannot be imported: {error}") from None
    return {path: m for path, m in model.named_modules() if isinstance(m, peft_layers.LoraLayer)}, peft_layers


def _dead(model: nn.Module, layers: dict[str, nn.Module]) -> tuple[str, ...]:
    """What is read and never called: ``out_proj`` of ``nn.MultiheadAttention``, both layers of torchvision's Swin."""
    dead = []
    for path, module in model.named_modules():
        if getattr(type(module), "forward", None) in (w.forward for w in SWAPS):
            dead += [layer for name in ("qkv", "proj") if (layer := f"{path}.{name}".lstrip(".")) in layers]
        out_proj = f"{path}.out_proj".lstrip(".")
        parent, _, name = path.rpartition(".")
        own = name == "base_layer" and parent in layers  # the attention was targeted, and takes care of its out_proj
        calls_nothing = getattr(type(module), "forward", None) is nn.MultiheadAttention.forward
        if out_proj in layers and calls_nothing and not own:
            dead.append(out_proj)
    return tuple(dead)
