"""The run folder: everything that continuing or evaluating a run needs, written so that a crash loses nothing.

``config.json``: settings and open_clip config. ``metrics.jsonl``: a line a log step and an epoch. ``last.pt``: the
state to resume from. ``best.json``: the best epoch on the validation data, whose weights are in ``adapters/`` (HarMA)
or ``model.safetensors`` (full). ``base.safetensors``: the weights the run started from, unless open_clip has a tag for
them, so that a run never depends on a file that may move.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rsfast._files import load_state, replace, write_json
from rsfast.harma import model as models

CONFIG, METRICS, LAST, BEST = "config.json", "metrics.jsonl", "last.pt", "best.json"
ADAPTERS, FULL, BASE = "adapters", "model.safetensors", "base.safetensors"
STATE = {"step", "weights", "optimizer", "scaler", "best", "broken"}  # what last.pt holds


def save_last(run: Path, state: dict) -> None:
    replace(run / LAST, lambda temporary: torch.save(state, temporary))


def load_last(run: Path) -> dict:
    """The state to resume from."""
    path = run / LAST
    if not path.is_file():
        raise FileNotFoundError(f"resume: there is no checkpoint {path}")
    return load_state(path, STATE, "resume")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Tensors on the CPU, in one safetensors file; what has two names is written under both."""
    replace(path, lambda temporary: save_file({k: t.clone().contiguous() for k, t in tensors.items()}, temporary))


def save_best(run: Path, model: nn.Module, method: str, record: dict) -> None:
    from rsfast.models import save_adapters

    if method == "harma":
        save_adapters(model, run / ADAPTERS)
    elif method == "full":
        save_tensors({name: t.detach().cpu() for name, t in model.state_dict().items()}, run / FULL)
    write_json(run / BEST, record)


def read_config(run: str | Path) -> dict:
    """``config.json`` of a run."""
    path = Path(run) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{run} is no run folder, it has no {CONFIG}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    settings = config.get("settings") if isinstance(config, dict) else None
    if not isinstance(settings, dict) or "method" not in settings or not {"model", "name", "tag"} <= config.keys():
        raise ValueError(f"{path} lacks settings with a method, model, name or tag; rsfast did not write it")
    return config


def base_model(run: str | Path) -> models.Model:
    """The model that a run started from."""
    run, config = Path(run), read_config(run)
    if config["tag"]:
        return models.create(config["name"], weights=config["tag"])
    if not (run / BASE).is_file():
        raise FileNotFoundError(f"{run / BASE} is missing, the weights that the run started from")
    return models.create(config["model"], weights=run / BASE, name=config["name"])


def refuse_unfinished(run: str | Path) -> None:
    """Refuse a run without a best epoch."""
    if not (Path(run) / BEST).is_file():
        raise FileNotFoundError(f"{run} has no finished epoch yet, {BEST} is missing")


def load_run(run: str | Path) -> models.Model:
    """The best model of a run, on the CPU: ``.model`` and ``.tokenizer`` are what :func:`evaluate` wants.

    Raises:
        FileNotFoundError: ``run`` is no run folder, or no epoch of it is finished.
        ValueError: A file of it is damaged; the message names it.
    """
    from rsfast.models import load_adapters

    run, config = Path(run), read_config(run)
    method = config["settings"]["method"]
    refuse_unfinished(run)
    made = base_model(run)
    if method == "harma":
        load_adapters(made.model, run / ADAPTERS)
    elif method == "full":
        models.load_weights(made.model, run / FULL)
        made = made._replace(tag=None)
    return made
