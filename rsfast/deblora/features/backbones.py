"""From a model of any of the known kinds to one module that maps images to features."""

import hashlib
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn


class OpenClipEncoder(nn.Module):
    """The pooled and projected features of an image tower of open_clip; ``visual`` is the tower itself, no copy."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        features = self.visual(images)
        return features[0] if isinstance(features, tuple) else features  # with tokens, where the tower gives them too


class TimmEncoder(nn.Module):
    """What a timm model gives its classifier; ``model`` is the model itself, no copy."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)


def image_encoder(model: nn.Module | Callable) -> tuple[nn.Module | Callable, Callable | None]:
    """What maps images to features, and the transform from a PIL image to its input where that is known.

    - An open_clip model or its image tower: pooled, projected features, not normalised; open_clip's own evaluation
      transform, by the model's preprocessing config.
    - A timm model: ``forward_features``, then ``forward_head(pre_logits=True)``; timm's own evaluation transform, for
      the image size that the model was built with.
    - What has a ``default_transform`` of its own, as :class:`StableDiffusionEncoder` has: itself.
    - Any other callable, (B, 3, H, W) to (B, D): itself, and no transform.

    The encoder shares its weights with the model, so :func:`rsfast.models.add_lora` on the encoder puts LoRA into the
    model too, and what is trained is there.

    Raises:
        TypeError: ``model`` cannot be called.

    Example:
        >>> import timm, torch
        >>> from rsfast.deblora import image_encoder
        >>> encoder, transform = image_encoder(timm.create_model("test_vit", pretrained=False))
        >>> encoder(torch.zeros(2, 3, 160, 160)).shape
        torch.Size([2, 64])
    """
    if not callable(model):
        raise TypeError(f"model must be a module or a callable from images to features, got {type(model).__name__}")
    if hasattr(model, "default_transform"):
        return model, model.default_transform()
    if isinstance(model, nn.Module):
        visual = model.visual if hasattr(model, "encode_image") and hasattr(model, "visual") else model
        if isinstance(visual, nn.Module) and type(visual).__module__.startswith("open_clip."):
            return OpenClipEncoder(visual), _open_clip_transform(visual)
        if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
            return TimmEncoder(model), _timm_transform(model)
    return model, None


def _open_clip_transform(visual: nn.Module):
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(visual)), is_train=False)


def _timm_transform(model: nn.Module):
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:  # timm tells the size of the pretrained weights, whatever img_size the model was built with
        config["input_size"] = (config["input_size"][0], *size)
    return create_transform(**config, is_training=False)


@torch.no_grad()
def fingerprint(encoder: nn.Module | Callable) -> str:
    """Of a module its class, its layers with their settings, and every weight and buffer; of a callable its name."""
    digest = hashlib.blake2b(described(encoder).encode(), digest_size=16)
    if isinstance(encoder, nn.Module):
        for name, tensor in sorted({**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def described(thing) -> str:
    """Its text, without what changes from process to process."""
    name = getattr(thing, "__qualname__", None)
    text = f"{thing.__module__}.{name}" if name else repr(thing)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
