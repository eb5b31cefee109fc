"""PEFT's files, read and written without PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import collections
import json
import math
import os
import pathlib
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rsfast._files import replace, write_json

Slices = tuple[tuple[int, int], ...]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
SLICES = "rsfast.slices"  # in the header of the weights, which PEFT does not read
INITS = (True, False, "gaussian", "eva", "orthogonal")  # of lora_A and lora_B; the others change the layers' weights
READ = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias")
OF_NO_MATTER = {  # what the factors' own names, or their values, say already
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "target_modules",
    "task_type",
}  # fmt: skip


class Factors(NamedTuple):
    """A LoRA of one layer, as PEFT has it."""

    A: Tensor  # (R, K)
    B: Tensor  # (N, R)
    scaling: float


@dataclass(frozen=True)
class Options:
    """What an ``adapter_config.json`` says of the layers."""

    r: int
    lora_alpha: float
    lora_dropout: float
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def rank(self, path: str) -> int:
        return _by_pattern(self.rank_pattern, path, self.r)

    def scaling(self, path: str) -> float:
        rank = self.rank(path)
        return _by_pattern(self.alpha_pattern, path, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: dict, path: str, default):
    """The first of ``patterns`` that is all of a path, or its end after a dot; regular expressions, as in PEFT."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def read_folder(folder: str | os.PathLike) -> tuple[Options, dict[str, Tensor], dict[str, Slices]]:
    """Options, tensors by their names in the file, and the slices of those that :func:`write_folder` was given.

    Raises:
        FileNotFoundError: A file is missing; the message names it.
        ValueError: A file is damaged, or is of something else than plain LoRA; the message names the option.
    """
    folder = pathlib.Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; save_lora and PEFT write {CONFIG} and {WEIGHTS}")
    options = _read_options(folder / CONFIG)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            slices = json.loads((file.metadata() or {}).get(SLICES, "{}"))
            slices = {path: tuple((int(start), int(end)) for start, end in parts) for path, parts in slices.items()}
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}") from None
    return options, tensors, slices


def _read_options(path: pathlib.Path) -> Options:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:  # bad JSON and bad UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: peft_type must be 'LORA', got {got!r}")
    other = {k: v for k, v in config.items() if k not in OF_NO_MATTER and k not in READ and v}
    if config.get("bias", "none") != "none":
        other["bias"] = config["bias"]
    if config.get("init_lora_weights", True) not in INITS:
        other["init_lora_weights"] = config["init_lora_weights"]
    if other:
        raise ValueError(f"{path}: not plain LoRA: {', '.join(f'{k} is {v!r}' for k, v in other.items())}")
    given = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0} | {k: v for k, v in config.items() if v is not None}
    ranks, alphas = (given.get(k, {}) for k in ("rank_pattern", "alpha_pattern"))
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise ValueError(f"{path}: rank_pattern and alpha_pattern must be dicts, got {ranks!r} and {alphas!r}")
    for name, values, fits, wanted in (
        ("r, rank_pattern", [given["r"], *ranks.values()], lambda v: type(v) is int and v > 0, "positive integers"),
        ("lora_alpha, alpha_pattern", [given["lora_alpha"], *alphas.values()], _finite, "finite numbers"),
        ("lora_dropout", [given["lora_dropout"]], lambda v: _finite(v) and 0 <= v < 1, "at least 0 and below 1"),
    ):
        if not all(map(fits, values)):
            raise ValueError(f"{path}: {name} must be {wanted}, got {values}")
    for key in (*ranks, *alphas):
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{path}: {key!r} is no regular expression: {error}") from None
    return Options(given["r"], given["lora_alpha"], given["lora_dropout"], ranks, alphas, bool(given.get("use_rslora")))


def _finite(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write_folder(
    folder: str | os.PathLike,
    layers: dict[str, Factors],
    *,
    modules: list[str],
    targets: list[str],
    dropout: float,
    library: tuple[str, str],
    slices: dict[str, Slices],
) -> None:
    """Write the LoRA of ``layers``, by PEFT's paths; each file is replaced as a whole or not at all.

    Args:
        folder: Made where it does not exist.
        layers: The rank of every layer is that of its factors, its alpha the scaling times the rank.
        modules: Names of all of the model's modules, among which PEFT is to find the targets and nothing else.
        targets: Paths that PEFT is to target; every layer is one of them, or lies below one and has its rank.
        dropout: Of all.
        library: Module and name of the model's class.
        slices: Of a fused projection, by PEFT's path, to be read back by :func:`read_folder`.
    """
    ranks = {path: len(layers[path].A) for path in targets}
    alphas = {path: layers[path].scaling * ranks[path] for path in targets}
    alphas = {path: int(alpha) if alpha == int(alpha) else alpha for path, alpha in alphas.items()}  # as PEFT has them
    r, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    ends = [name for name in modules if name not in targets and name.endswith(tuple(f".{t}" for t in targets))]
    escaped = {path: re.escape(path) for path in targets}
    config = {
        "peft_type": "LORA",
        "auto_mapping": {"base_model_class": library[1], "parent_library": library[0]},
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": {f"^{escaped[path]}": n for path, n in ranks.items() if n != r},
        "alpha_pattern": {f"^{escaped[path]}": a for path, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        # PEFT takes a name for the end of any path, so what ends like another must be an expression
        "target_modules": "|".join(escaped.values()) if ends else targets,
    }
    tensors = {
        f"base_model.model.{path}.lora_{name}.weight": getattr(factors, name).detach().cpu().contiguous()
        for path, factors in layers.items()
        for name in "AB"
    }
    header = {"format": "pt"} | ({SLICES: json.dumps(slices)} if slices else {})
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / WEIGHTS, lambda temporary: temporary.write_bytes(save(tensors, header)))
    write_json(folder / CONFIG, config)
