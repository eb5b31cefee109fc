"""Reading the adapters and the checkpoints that HarMA's own code writes."""

import os
import re
import warnings
from dataclasses import dataclass

import torch
from open_clip.model import CLIP, convert_to_custom_text_state_dict
from torch import Tensor, nn

from rsfast.models.adapters import AdapterReport, attach, has_adapters, make_plan, make_report, plan_of, state_of
from rsfast.models.harma_file import read_harma_file
from rsfast.models.storage import check_tensors, copy_tensors, named_parameters
from rsfast.models.towers import find_towers

NUM_HEADS = 8  # HarMA's, of both attentions; nothing in a checkpoint says it


def _pairs(theirs: str, ours: str) -> dict[str, str]:
    return {theirs + p: ours + p for p in ("weight", "bias")}


OWN = {
    **_pairs("img_proj_down.", "down."), **_pairs("img_proj_up.", "up."),
    **_pairs("multihead_attention.in_proj_", "in_proj."), **_pairs("multihead_attention.out_proj.", "out_proj."),
    "gate1": "gate",
}  # fmt: skip
SHARED = {
    f"BiShareAdapterxx.{theirs}": f"shared.{ours}"
    for theirs, ours in {
        **_pairs("l1.", "down."), **_pairs("l2.", "up."),
        **_pairs("multihead_attention1.in_proj_", "in_proj."), **_pairs("multihead_attention1.out_proj.", "out_proj."),
        "gate1": "gate",
    }.items()
}  # fmt: skip
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(gate1|mmadapter\..+)")
COPIES = ("MMadapter_img.", "MMadapter_text.", "BiShareAdapter.")


def convert_harma_adapter(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of HarMA's ``MMadapter`` to what ``GatedAdapter(...).load_state_dict`` takes.

    The gate of the block, HarMA's ``gate1`` outside the ``MMadapter``, is part of ours. Two forms are taken:

    - the adapter's own dict (``img_proj_down.weight`` ..., ``gate1`` being the adapter's), with the block's gate as
      ``block_gate`` if there is one;
    - the block's part of it (``mmadapter.img_proj_down.weight`` ..., ``gate1`` being the block's).

    Args:
        state_dict: Tensors by HarMA's names; they are passed on, not copied.

    Returns:
        Tensors by our names. ``shared.*`` is there where ``BiShareAdapterxx.*`` was: the adapter then needs a
        ``shared``. ``residual_gate`` is there where the block's gate was; without it load into
        ``GatedAdapter(residual_gate=False)``, which then equals HarMA's ``MMadapter`` without the block's blend.

    Raises:
        ValueError: A name is unknown or missing; the message lists them.

    Example:
        >>> from rsfast.models.harma_checkpoint import OWN  # HarMA's names, and ours
        >>> import torch, rsfast.models
        >>> adapter = rsfast.GatedAdapter(16, bottleneck=32)
        >>> harma = {theirs: adapter.state_dict()[ours] for theirs, ours in OWN.items()}
        >>> adapter.load_state_dict(rsfast.models.convert_harma_adapter({**harma, "block_gate": torch.tensor(0.1)}))
        <All keys matched successfully>
    """
    if any(name.startswith("mmadapter.") for name in state_dict):
        state_dict = {"block_gate" if n == "gate1" else n.removeprefix("mmadapter."): t for n, t in state_dict.items()}
    names = {**OWN, **SHARED, "block_gate": "residual_gate"}
    wanted = {**OWN, **SHARED} if state_dict.keys() & SHARED.keys() else OWN
    problems = [f"{name} is unknown" for name in state_dict if name not in names]
    problems += [f"{name} is missing" for name in wanted if name not in state_dict]
    if problems:
        raise ValueError(f"state_dict is not that of one HarMA adapter: {'; '.join(problems)}")
    return {names[name]: tensor for name, tensor in state_dict.items()}


@dataclass(frozen=True)
class HarmaReport:
    """What :func:`load_harma_checkpoint` did.

    Attributes:
        placed: The checkpoint's names that were loaded.
        not_placed: Those that were not, and why.
        missing: Tensors of the model for which the checkpoint had nothing; they are as they were.
        adapters: As from ``add_adapters``.
    """

    placed: tuple[str, ...]
    not_placed: dict[str, str]
    missing: tuple[str, ...]
    adapters: AdapterReport

    def __str__(self) -> str:
        lines = [f"placed {len(self.placed)} tensors of the checkpoint"]
        lines += [f"not placed: {name}: {why}" for name, why in self.not_placed.items()]
        lines += [f"not in the checkpoint: {name}" for name in self.missing]
        return "\n".join([*lines, str(self.adapters)])


def load_harma_checkpoint(model: nn.Module, path: str | os.PathLike) -> HarmaReport:
    """Load a whole checkpoint of HarMA's code, backbone included, into an open_clip model, in place.

    A model without adapters gets them as the file has them: image adapters without a sub-adapter and text adapters
    with one (``share="text"``) in what was released. ``logit_scale`` becomes ``log(1 / temp)``. The file is read with
    ``weights_only=True``; everything is checked before the model changes.

    Which model the checkpoint needs is not in its tensors: the released ``geo`` checkpoints (GeoRSCLIP) need
    ``ViT-B-32-quickgelu``, the ``vit`` ones ``ViT-B-32``. With the wrong one everything loads and the features are
    wrong. Where the file keeps HarMA's configuration and it says ``geo``, a model without QuickGELU gets a warning;
    configurations from before July 2024 say ``vit`` for both.

    Args:
        model: open_clip ``CLIP`` or ``CustomTextCLIP`` of the checkpoint's architecture.
        path: File with ``{"model": state_dict, ...}`` or a bare state dict.

    Returns:
        What was placed, what was not and why, and what the checkpoint lacked. A warning is given where the backbone
        was not loaded in full.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no such checkpoint, does not fit the model, or holds a weight that is not finite; the
            message names the file and the tensors.
        TypeError, NotImplementedError: As :func:`rsfast.models.add_adapters`.
    """
    state_dict, trained_on = read_harma_file(path)
    bare = {name: name.removeprefix("module.").removeprefix("model.") for name in state_dict}
    adapters: dict[tuple[str, int], dict[str, str]] = {}  # HarMA's names in a block, to names in the file
    backbone, placed, not_placed = {}, [], {}
    for name, short in bare.items():
        if match := BLOCK.fullmatch(short):
            key = ("visual" if match[1] else "text", int(match[2]))
            adapters.setdefault(key, {})[match[3]] = name
        elif short.startswith(COPIES):
            not_placed[name] = "HarMA's second name of what the blocks hold"
        elif short.endswith("attn_mask"):
            not_placed[name] = "a constant, which the model makes itself"
        elif short == "logit_scale" and "temp" in bare.values():
            not_placed[name] = "HarMA's temperature is temp"
        elif short not in ("temp", "logit_scale"):
            backbone[short] = name
    if not adapters:
        raise ValueError(f"{path} holds no adapters: no name ends in resblocks.<n>.mmadapter.*")

    tensors, config = _adapter_tensors(adapters, state_dict, path)
    plan = _fitting_plan(model, config, path)
    tensors |= _temperature({short: state_dict[name] for name, short in bare.items()}, model.logit_scale, path)
    missing = [] if "logit_scale" in tensors else ["logit_scale"]
    tensors.setdefault("logit_scale", model.logit_scale.detach())
    parameters = named_parameters(model, plan)
    check_tensors(tensors, parameters, path)
    placed += [n for n, short in bare.items() if BLOCK.fullmatch(short) or short in ("temp", "logit_scale")]

    mine = {n: t for n, t in model.state_dict().items() if ".adapter." not in n and n != "logit_scale"}
    ours = backbone if isinstance(model, CLIP) else convert_to_custom_text_state_dict(backbone)
    not_placed |= {name: "the model has no such tensor" for n, name in ours.items() if n not in mine}
    ours = {n: name for n, name in ours.items() if n in mine}
    check_tensors({n: state_dict[name] for n, name in ours.items()}, {n: mine[n] for n in ours}, path)

    if not has_adapters(model):
        attach(model, plan)
    copy_tensors(tensors, parameters)
    copy_tensors({n: state_dict[name] for n, name in ours.items()}, mine)
    placed = tuple(name for name in [*placed, *ours.values()] if name not in not_placed)
    missing += [name for name in mine if name not in ours]
    report = HarmaReport(placed, not_placed, tuple(missing), make_report(model))
    _warn(report, model, trained_on, path)
    return report


def _adapter_tensors(adapters, state_dict, path) -> tuple[dict[str, Tensor], dict]:
    """The adapters by our names, and the options of ``add_adapters`` that they were made with."""
    tensors, owning = {}, {"visual": set(), "text": set()}
    for (tower, j), names in sorted(adapters.items()):
        try:
            converted = convert_harma_adapter({short: state_dict[name] for short, name in names.items()})
        except ValueError as error:
            raise ValueError(f"{path}: block {j} of the {tower} tower: {error}") from None
        if "shared.gate" in converted:
            owning[tower].add(j)
        tensors |= {f"{tower}.{j}.{name}": tensor for name, tensor in converted.items()}
    towers = tuple(tower for tower in owning if any(key[0] == tower for key in adapters))
    everywhere = all(j in owning[tower] for tower, j in adapters)
    text_only = owning["text"] == {j for tower, j in adapters if tower == "text"} and not owning["visual"]
    if not any(owning.values()):
        share = None
    elif text_only:
        share = "text"
    elif everywhere:
        share = "both"
    else:
        raise ValueError(
            f"{path}: only blocks {owning} own a sub-adapter; expected all, all of the text tower, or none"
        )
    if share == "both":
        for name in [n for n in tensors if n.startswith("text.") and ".shared." in n]:
            twin = "visual" + name.removeprefix("text")
            if twin in tensors and not torch.equal(tensors[twin], tensors.pop(name)):
                raise ValueError(f"{path}: {name} and {twin} differ, but the towers share it")
    bottleneck = next(t for n, t in tensors.items() if n.endswith(".down.weight")).shape[0]
    return tensors, {
        "bottleneck": bottleneck, "num_heads": NUM_HEADS, "share": share, "towers": towers, "freeze": True,
        "skip_padding": False,
    }  # fmt: skip


def _fitting_plan(model, config, path):
    """The plan of the adapters that the model has, or of new ones; refuses others than the file's."""
    if not has_adapters(model):
        return make_plan(model, config)
    find_towers(model, config["towers"])
    mine = state_of(model).config
    differing = [
        f"{key} is {config[key]!r} in the file and {mine[key]!r} here"
        for key in ("bottleneck", "num_heads", "share", "towers")
        if config[key] != mine[key]
    ]
    if differing:
        raise ValueError(f"the adapters in {path} do not fit the model's: {'; '.join(differing)}")
    return plan_of(model)


def _temperature(tensors: dict[str, Tensor], logit_scale: Tensor, path) -> dict[str, Tensor]:
    """``logit_scale`` from HarMA's ``temp``, or from a bare model's own."""
    if "temp" not in tensors:
        return {"logit_scale": tensors["logit_scale"]} if "logit_scale" in tensors else {}
    temp = tensors["temp"].double()
    if temp.numel() != 1 or not 0 < temp.item() < float("inf"):
        raise ValueError(f"{path}: temp must be one positive number, got {temp.tolist()}")
    return {"logit_scale": -temp.log().reshape(logit_scale.shape)}


def _warn(report: HarmaReport, model: nn.Module, trained_on: str | None, path) -> None:
    unknown = [name for name, why in report.not_placed.items() if why == "the model has no such tensor"]
    if unknown or report.missing:
        warnings.warn(
            f"{path}: {len(unknown)} tensors found no place in the model ({', '.join(unknown[:3])}) and "
            f"{len(report.missing)} of the model's were not in the file ({', '.join(report.missing[:3])})",
            stacklevel=3,
        )
    activations = {tower.facts()["activation"] for tower in find_towers(model, ("visual", "text"))}
    if trained_on == "geo" and activations != {"QuickGELU"}:
        warnings.warn(
            f"{path} was trained on GeoRSCLIP, which needs a model with QuickGELU (ViT-B-32-quickgelu), "
            f"but this one has {', '.join(sorted(activations))}",
            stacklevel=3,
        )
