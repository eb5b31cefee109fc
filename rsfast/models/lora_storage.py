"""LoRA on disk as PEFT lays it out, from PEFT's models to ours and back."""

import os
import pathlib
import warnings

import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from rsfast import BatchedLoRALinear, LoRALinear
from rsfast.models.lora import STATE, LoraReport, Place, lora_layers, place
from rsfast.models.lora_layout import (
    OUT,
    apart,
    compact,
    into_layer,
    of_layer,
    our_path,
    pair_of_projections,
    peft_path,
)
from rsfast.models.lora_sites import find_sites
from rsfast.models.peft_format import KEY, WEIGHTS, Factors, Options, read_folder, write_folder
from rsfast.models.storage import check_tensors


def save_lora(model: nn.Module, folder: str | os.PathLike, *, adapter: int | None = None) -> None:
    """Write the LoRA of a model as PEFT does: ``PeftModel.from_pretrained`` and :func:`load_lora` read it.

    ``adapter_model.safetensors`` holds the factors, ``adapter_config.json`` what PEFT needs to place them. PEFT has one
    LoRA for a fused projection: slices of it are written as one of the sum of their ranks, whose ``lora_B`` is zero
    outside each slice's block. On ``nn.MultiheadAttention`` PEFT has both projections or none, at one rank: the one of
    lower rank, or without LoRA, is filled up with zeros. Each file is replaced as a whole or not at all.

    Outputs in PEFT are the model's, but for ``nn.MultiheadAttention`` in PEFT 0.21, which counts ``out_proj``'s LoRA
    twice until :func:`patch_peft`. A warning names the layers where PEFT's LoRA cannot take part: in attentions other
    than ``nn.MultiheadAttention`` that keep or read their weights themselves. :func:`load_lora` reads those too.

    Args:
        model: With LoRA.
        folder: Made where it does not exist.
        adapter: Which one to write, of a model of several; a folder holds one.

    Raises:
        ValueError: The model has no LoRA, or ``adapter`` is missing, out of range, or given where there is one only.
        TypeError: ``model`` is wrapped, in DDP or ``torch.compile``: names in the file would be the wrapper's.

    Example:
        >>> import tempfile, torch, rsfast.models
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> report = rsfast.models.add_lora(model, r=2, targets=["0"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rsfast.models.save_lora(model, folder)
        ...     rsfast.models.load_lora(torch.nn.Sequential(torch.nn.Linear(6, 4)), folder).placed
        {'0': None}
    """
    _check_unwrapped(model)
    layers = lora_layers(model)
    if not layers:
        raise ValueError("model has no LoRA; add_lora puts it in")
    for path, layer in layers.items():
        _check_adapter(path, layer, adapter)
    names = {path: peft_path(model, path) for path in layers}
    found = {names[path]: of_layer(layer, adapter) for path, layer in layers.items()}
    attentions = sorted({name.removesuffix(OUT) for path, name in names.items() if name != path})
    for path in attentions:
        width = model.get_submodule(path).embed_dim
        found[path], found[path + OUT] = pair_of_projections(width, found.get(path), found.get(path + OUT))
    ours_alone = [path for path in layers if names[path] == path and not _is_called(model, path)]
    if ours_alone:
        warnings.warn(f"PEFT has no LoRA that takes part for {', '.join(ours_alone)}; load_lora has", stacklevel=2)
    write_folder(
        folder,
        found,
        modules=[path for path, _ in model.named_modules()],
        targets=[path for path in found if path.removesuffix(OUT) not in attentions or path in attentions],
        dropout=max(layer.dropout for layer in layers.values()),
        library=(type(model).__module__, type(model).__name__),
        slices={names[path]: layer.slices for path, layer in layers.items() if layer.slices is not None},
    )


def load_lora(model: nn.Module, folder: str | os.PathLike, *, adapter: int | None = None) -> LoraReport:
    """Load LoRA that :func:`save_lora` or PEFT wrote, of any rank and scaling for each layer.

    A model without LoRA gets it where the file has some and is frozen otherwise, as by :func:`add_lora`; into one that
    has LoRA the factors and scalings are copied, and every layer must fit. A LoRA over a fused projection is taken
    apart into the slices it was made of where it is zero outside their blocks, and else is one over the whole
    projection; factors that are zero throughout are none. Everything is checked before the model changes.

    On ``nn.MultiheadAttention`` the outputs are those of ``W + scaling B A``; PEFT 0.21 counts ``out_proj``'s twice.

    Args:
        model: As for :func:`add_lora`.
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter: Which of a model of several adapters is to become this one; a lower rank is filled up with zeros.

    Returns:
        As :func:`add_lora`.

    Raises:
        FileNotFoundError: A file is missing; the message names it.
        ValueError: A file is damaged or no plain LoRA (DoRA, a trained bias, ``modules_to_save``, ...), a factor is not
            finite or does not fit, or LoRA in the model is merged; the message names it. The model is as it was.
        TypeError: ``model`` is no ``nn.Module``, or is wrapped in DDP or ``torch.compile``.
    """
    _check_unwrapped(model)
    options, tensors, slices = read_folder(folder)
    file = pathlib.Path(folder) / WEIGHTS
    layers = lora_layers(model)
    if layers:
        return _load_into(model, layers, options, tensors, adapter, file)
    if adapter is not None:
        raise ValueError("adapter is for a model of several; add_lora(model, num_adapters=...) makes it one first")
    sites = {site.path: site for site in find_sites(model)}
    shapes = {path: site.weight.shape for path, site in sites.items() if not site.refusal}
    refusals = {path: site.refusal for path, site in sites.items() if site.refusal}
    found, places = {}, {}
    for name, (path, factors) in _factors(model, options, tensors, shapes, refusals, file).items():
        if factors.A.any() or factors.B.any():
            columns = sorted(c for c in sites[path].aliases.values() if c is not None)
            found[path], parts = apart(factors, slices.get(name), columns)
            rank = found[path].B.shape[1]
            places[list(sites).index(path)] = Place(parts, rank, factors.scaling * rank)
    if not places:
        raise ValueError(f"{file} has no LoRA that is not zero throughout")
    config = dict(r=options.r, alpha=options.lora_alpha, targets=tuple(found), dropout=options.lora_dropout)
    report = place(model, list(sites.values()), dict(sorted(places.items())), {**config, "num_adapters": 1}, skipped={})
    for path, layer in lora_layers(model).items():
        into_layer(layer, found[path], None)
    return report


def _load_into(model, layers, options, tensors, adapter, file) -> LoraReport:
    """Load into the LoRA that a model has."""
    shapes = {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}
    given = dict(_factors(model, options, tensors, shapes, {}, file).values())
    problems, found = [f"{path} is missing" for path in layers if path not in given], {}
    for path, layer in layers.items():
        _check_adapter(path, layer, adapter)
        if getattr(layer, "merged", False):
            raise ValueError(f"{path} is merged; unmerge_lora takes it out of the weights first")
        if path in given:
            found[path] = compact(given[path], layer.slices, layer.r if adapter is None else None)
            if found[path] is None or found[path].B.shape[1] > layer.r:
                parts = "" if layer.slices is None else f" in each of the slices {layer.slices} and zero elsewhere"
                most = "" if adapter is None else "at most "
                problems.append(f"{path} must be of rank {most}{layer.r}{parts}, got {len(given[path].A)} in all")
    if problems:
        _refuse(problems, file)
    for path, layer in layers.items():
        into_layer(layer, found[path], adapter)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return LoraReport({path: layer.slices for path, layer in layers.items()}, {}, trainable)


def _factors(
    model: nn.Module, options: Options, tensors: dict[str, Tensor], shapes: dict, refusals: dict, file: pathlib.Path
) -> dict[str, tuple[str, Factors]]:
    """What a file has, by PEFT's paths: ours, and the factors, checked against the ``shapes`` of the layers."""
    names: dict[str, list[str]] = {}
    problems, kinds = [], {path: type(module).__name__ for path, module in model.named_modules()}

    def kind_of(path: str) -> str:
        return f"it is a {kinds[path]}" if path in kinds else "the model has no such layer"

    for name in tensors:
        if match := KEY.fullmatch(name):
            names.setdefault(match[1], []).append(name)
        else:
            problems.append(f"{name} is no factor of a plain LoRA")
    ours = {name: our_path(name, shapes) for name in names}
    for name, path in [*ours.items()]:
        if path is None and not any(tensors[key].any() for key in names[name]):
            ours.pop(name)  # PEFT wants both projections of an attention, so the other is zeros
        elif path is None:
            problems.append(f"{name} cannot have LoRA here: {refusals.get(our_path(name, refusals)) or kind_of(name)}")
    if len({*ours.values()}) < len(ours):
        problems.append("two of its names mean one layer")
    if problems:
        _refuse(problems, file)
    expected = {}
    for name, path in ours.items():
        rank, (rows, columns) = options.rank(name.removesuffix(OUT)), shapes[path]
        for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            expected[f"base_model.model.{name}.lora_{letter}.weight"] = torch.empty(shape, device="meta")
    zeros = [key for name in names.keys() - ours.keys() for key in names[name]]
    check_tensors({key: t for key, t in tensors.items() if key not in zeros}, expected, file)
    return {
        name: (
            path,
            Factors(
                *(tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB"),
                options.scaling(name.removesuffix(OUT)),
            ),
        )
        for name, path in ours.items()
    }


def _refuse(problems: list[str], file: pathlib.Path) -> None:
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise ValueError(f"{file}: {'; '.join(problems[:8])}{more}")


def _check_unwrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(f"model must be an nn.Module, unwrapped from DDP, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("model must not be wrapped in torch.compile; give what was compiled, model._orig_mod")


def _check_adapter(path: str, layer: LoRALinear | BatchedLoRALinear, adapter: int | None) -> None:
    if isinstance(layer, LoRALinear):
        if adapter is not None:
            raise ValueError(f"adapter must be None for {path}, which has one LoRA only, got {adapter!r}")
    elif type(adapter) is not int or not 0 <= adapter < layer.num_adapters:
        raise ValueError(f"adapter must be 0 to {layer.num_adapters - 1}, one of those of {path}, got {adapter!r}")


def _is_called(model: nn.Module, path: str) -> bool:
    """Whether the model calls the layer at ``path`` without LoRA of ours too, so that PEFT's takes part."""
    parent, kind = model.get_submodule(path.rpartition(".")[0]), type(model.get_submodule(path))
    states = [(holder, getattr(holder, STATE)) for holder in model.modules() if hasattr(holder, STATE)]
    flagged = any(holder.get_submodule(flag) is parent for holder, state in states for flag in state.flags)
    read = flagged or isinstance(parent, nn.MultiheadAttention | ShiftedWindowAttention)
    return kind in (LoRALinear, BatchedLoRALinear) and not read
