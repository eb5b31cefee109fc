"""SatMAE's weights in a Vision Transformer of timm."""

import argparse
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of MAE's ViTs, by width; the weights do not tell
MEAN = (0.4182007312774658, 0.4214799106121063, 0.3991275727748871)  # of fMoW's RGB images, from SatMAE
STD = (0.28774282336235046, 0.27541765570640564, 0.2764017581939697)
DROPPED = re.compile(r"decoder_|mask_token$|head\.")  # what only pretraining or a classifier needs
GIVEN = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")  # tell the sizes


def load_satmae(
    path: str | os.PathLike,
    *,
    img_size: int | None = None,
    num_heads: int | None = None,
    global_pool: str | None = None,
) -> nn.Module:
    """A timm ``VisionTransformer`` without a head, with the weights of a checkpoint of SatMAE.

    For fMoW RGB, pretrained or finetuned (ViT-L/16 as published; the sizes are told from the weights). What only
    pretraining or the classifier needs is left out: ``decoder_*``, ``mask_token``, ``head``. All else must fit exactly.
    The temporal and the multi-spectral models have other embeddings, and are refused.

    Checked with files written here by the names and shapes of MAE's code; not against a published file.

    Args:
        path: A file of ``torch.save``, with the weights under ``model`` or by themselves. It is read with
            ``weights_only=True``; of other types only ``argparse.Namespace`` (the arguments of the training that made
            the file) is let in.
        img_size: Side of the images that the model is to take. Default: that of the weights. Another one has the
            position embeddings interpolated (timm's ``resample_abs_pos_embed``: bicubic, antialiased).
        num_heads: Default: that of MAE's models, by width: 12 for 768, 16 for 1024 and 1280.
        global_pool: ``"token"``: the class token behind the last norm; ``"avg"``: the mean of the patches' tokens,
            behind the norm for weights with ``norm``, before it for those with ``fc_norm``, as they were trained.
            Default: ``"avg"`` for weights with ``fc_norm``, else ``"token"``.

    Returns:
        The model on the CPU in fp32, in evaluation mode. Its ``pretrained_cfg`` has fMoW's mean and deviation, so that
        timm's transform, and with it :func:`rsfast.deblora.extract_features`, normalises as SatMAE does.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: It is damaged or not safe, weights are missing or not expected (all are listed), or an argument does
            not fit.
    """
    path = Path(path)
    weights = _read(path)
    unfit = [name for name in GIVEN if name not in weights]
    if unfit:
        raise ValueError(f"{path} holds no RGB model of SatMAE: it lacks {', '.join(unfit)}{_hint(weights)}")
    finetuned = "fc_norm.weight" in weights
    if global_pool not in (None, "token", "avg"):
        raise ValueError(f"global_pool must be token or avg, got {global_pool!r}")
    if finetuned and global_pool == "token":
        raise ValueError(f"global_pool must be avg: {path} was trained on the mean of tokens, it has no norm of them")
    width, channels, patch, other = weights["patch_embed.proj.weight"].shape
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    if side**2 + 1 != weights["pos_embed"].shape[1] or channels != 3 or patch != other:
        raise ValueError(f"{path} holds no model of square RGB images{_hint(weights)}")
    heads = num_heads if num_heads is not None else HEADS.get(width)
    if type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(f"num_heads must be a divisor of the width, {width}, got {num_heads!r}")
    if img_size is not None and (type(img_size) is not int or img_size < patch or img_size % patch):
        raise ValueError(f"img_size must be a multiple of {patch}, the size of a patch, got {img_size!r}")
    from timm.layers import resample_abs_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    size = img_size or side * patch
    with torch.device("meta"):
        model = VisionTransformer(
            size, patch, embed_dim=width, depth=_depth(weights), num_heads=heads, num_classes=0,
            mlp_ratio=len(weights["blocks.0.mlp.fc1.weight"]) / width, weight_init="skip", fc_norm=finetuned,
            global_pool=global_pool or ("avg" if finetuned else "token"),
        )  # fmt: skip
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [size // patch] * 2)
    wanted = model.state_dict()
    problems = {
        "lacks": [name for name in wanted if name not in weights],
        "has, not expected,": [name for name in weights if name not in wanted],
        "has of another shape": [n for n in wanted if n in weights and wanted[n].shape != weights[n].shape],
    }
    if any(problems.values()):
        text = "; ".join(f"it {what} {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{path} does not fit a Vision Transformer of width {width}: {text}{_hint(weights)}")
    model.load_state_dict(weights, assign=True)
    crop = 0.875 if size <= 224 else 1.0
    model.pretrained_cfg = dict(
        input_size=(3, size, size), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=crop, crop_mode="center"
    )
    return model.requires_grad_(True).eval()


def _read(path: Path) -> dict[str, Tensor]:
    """The weights in fp32, without what is dropped."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, struct and zipfile each have their own for damaged bytes
        raise ValueError(f"{path} is damaged or not safe to read: {type(error).__name__}: {error}") from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(f"{path} must hold weights by name, or a dictionary that has them under 'model'")
    return {name: w.float() for name, w in weights.items() if not DROPPED.match(name)}


def _depth(weights: dict[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in weights if re.match(r"blocks\.\d+\.", name))


def _hint(weights: dict[str, Tensor]) -> str:
    if any(name.startswith(("channel_embed", "patch_embed.0")) for name in weights):
        return " (it looks like SatMAE's multi-spectral model)"
    return ""
