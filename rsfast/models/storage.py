"""Adapters on disk: one safetensors file and one JSON file in a folder."""

import json
import os
import pathlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from rsfast._files import replace
from rsfast.models.adapters import (
    OPTIONS,
    AdapterReport,
    Plan,
    attach,
    has_adapters,
    make_plan,
    make_report,
    plan_of,
    state_of,
)
from rsfast.models.towers import find_towers

FORMAT = 1
WEIGHTS, CONFIG = "adapters.safetensors", "adapters.json"


def save_adapters(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the adapters and ``logit_scale`` to ``folder``, which is made where it does not exist.

    ``adapters.safetensors`` holds every tensor once, named by tower and block (``visual.0.down.weight``), a sub-adapter
    that two blocks own under the first of them. ``adapters.json`` holds the options of :func:`add_adapters` and what
    the adapters need of a model. Each file is replaced as a whole or not at all.

    Raises:
        ValueError: The model has no adapters.
    """
    config = state_of(model).config
    tensors = {name: p.detach().cpu().contiguous() for name, p in named_parameters(model, plan_of(model)).items()}
    facts = {tower.name: tower.facts() for tower in find_towers(model, config["towers"])}
    text = json.dumps({"format": FORMAT, "adapters": config, "model": facts}, indent=2)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / WEIGHTS, lambda temporary: temporary.write_bytes(save(tensors)))
    replace(folder / CONFIG, lambda temporary: temporary.write_text(text + "\n"))


def load_adapters(model: nn.Module, folder: str | os.PathLike) -> AdapterReport:
    """Load what :func:`save_adapters` wrote; a model without adapters gets them, as the saved options say.

    Everything is checked before the model changes. The towers must agree in number of blocks, width, heads, kind of
    block and activation; the rest of the model may differ.

    Returns:
        As :func:`add_adapters`.

    Raises:
        FileNotFoundError: A file is missing; the message names it.
        ValueError: A file is damaged, a weight is not finite, or the adapters do not fit the model; the message names
            the file and what differs.
        TypeError, NotImplementedError: As :func:`add_adapters`.
    """
    folder = pathlib.Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; save_adapters writes {CONFIG} and {WEIGHTS}")
    saved = _read_config(folder / CONFIG)
    try:
        tensors = load((folder / WEIGHTS).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}") from None
    config = saved["adapters"]
    attached = has_adapters(model)
    facts = {tower.name: tower.facts() for tower in find_towers(model, config["towers"])}
    differing = _differences("model", saved["model"], facts)
    if attached:
        mine = state_of(model).config
        differing += _differences("adapters", *({k: c[k] for k in config if k != "freeze"} for c in (config, mine)))
    if differing:
        raise ValueError(f"the adapters in {folder} do not fit the model: {'; '.join(differing)}")
    try:
        plan = plan_of(model) if attached else make_plan(model, config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    parameters = named_parameters(model, plan)
    check_tensors(tensors, parameters, folder / WEIGHTS)
    if not attached:
        attach(model, plan)
    copy_tensors(tensors, parameters)
    return make_report(model)


def named_parameters(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """The parameters that are stored, by their names in the file; what several blocks own is there once."""
    names: dict[nn.Parameter, str] = {}
    for (tower, j), adapter in plan.adapters.items():
        for name, parameter in adapter.named_parameters():
            names.setdefault(parameter, f"{tower}.{j}.{name}")
    return {**{name: parameter for parameter, name in names.items()}, "logit_scale": model.logit_scale}


def check_tensors(tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], path: os.PathLike) -> None:
    """Refuse, by name, tensors that are missing, unknown, of another shape, of no floating dtype or not finite."""
    problems = [f"{name} is missing" for name in parameters if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in parameters]
    for name in tensors.keys() & parameters.keys():
        if tensors[name].shape != parameters[name].shape:
            expected, got = tuple(parameters[name].shape), tuple(tensors[name].shape)
            problems.append(f"{name} must have shape {expected}, got {got}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            problems.append(f"{name} must be floating point, got {tensor.dtype}")
        elif not tensor.double().isfinite().all():  # 8-bit floats have no isfinite of their own
            problems.append(f"{name} is not finite")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path}: {'; '.join(sorted(problems)[:8])}{more}")


@torch.no_grad()
def copy_tensors(tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """Copy checked tensors into parameters, into whatever dtype and device these have."""
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def _read_config(path: pathlib.Path) -> dict:
    """The saved options, with everything there that loading needs."""
    try:
        saved = json.loads(path.read_bytes())
    except ValueError as error:  # bad JSON and bad UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        got = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path} must be of format {FORMAT}, got {got!r}")
    for key, wanted in (("adapters", OPTIONS), ("model", ())):
        missing = (
            [key] if not isinstance(saved.get(key), dict) else [f"{key}.{k}" for k in wanted if k not in saved[key]]
        )
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
    options = {k: saved["adapters"][k] for k in OPTIONS}
    towers = options["towers"]
    if not isinstance(towers, list) or not all(isinstance(tower, str) for tower in towers):
        raise ValueError(f"{path}: adapters.towers must be a list of names, got {towers!r}")
    options["towers"] = tuple(towers)
    return {"adapters": options, "model": saved["model"]}


def _differences(prefix: str, saved, mine) -> list[str]:
    """Every leaf in which two nested dicts differ, by its path."""
    if isinstance(saved, dict) and isinstance(mine, dict):
        keys = dict.fromkeys([*saved, *mine])
        return [d for k in keys for d in _differences(f"{prefix}.{k}", saved.get(k), mine.get(k))]
    return [] if saved == mine else [f"{prefix} is {saved!r} in the file and {mine!r} here"]
