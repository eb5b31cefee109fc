"""From settings to what a comparison works on."""

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from rsfast.deblora.comparison.config import RunConfig, SettingError
from rsfast.deblora.comparison.methods import parse_methods
from rsfast.deblora.comparison.splits import checked_splits
from rsfast.deblora.comparison.tasks import FeatureTask, Task
from rsfast.deblora.data.features import LabelledFeatures, digits, load_features
from rsfast.deblora.data.loading import load_labelled
from rsfast.deblora.features.store import FeatureStore
from rsfast.deblora.probes.probe import hold_out

FEATURES = "features"  # of images, in the folder of results
DIGITS_IMBALANCE = 100.0


def opened(config: RunConfig, *, progress: bool = False, early: bool = True) -> tuple[RunConfig, Task]:
    """What ``config`` names, and the settings that it stands for.

    Args:
        config: Settings.
        progress: Show bars.
        early: Refuse numbers of clusters that the images are too few for before features are extracted, not after.

    Raises:
        FileNotFoundError, ValueError, TypeError: A file, folder, model or part is not there or does not fit, or a
            store is damaged.
    """
    if config.images is not None:
        return config, _images(config, progress, early)
    if config.features is None:
        imbalance = DIGITS_IMBALANCE if config.imbalance is None else config.imbalance
        return dataclasses.replace(config, imbalance=imbalance), FeatureTask(digits(), config)
    if Path(config.features).is_dir():
        return config, stored_task(FeatureStore(config.features), config, config.features)
    return config, FeatureTask(load_features(config.features), config)


def stored_task(store: FeatureStore, config: RunConfig, source: str) -> FeatureTask:
    """Features of a store, whose splits say which rows are for testing."""
    if store.classes is None or not len(store):
        lacking = "classes" if len(store) else "rows"
        raise ValueError(f"{source} must hold features of named classes, it has no {lacking}")
    store.verify()
    unknown = np.flatnonzero(store.labels < 0)
    if len(unknown):
        raise ValueError(f"{source}: every row needs a label, {store.names[unknown[0]]!r} has none")
    is_test, is_val = _parts(np.array(store.splits), store.labels, config.test_share, source)
    data = LabelledFeatures(store.features, store.labels, is_test, store.classes, source)
    return FeatureTask(data, config, is_val)


def _parts(splits: np.ndarray, labels: np.ndarray, test_share: float | None, source: str):
    """Test rows and validation rows. DOTA's test rows have no labels, so val is for testing where there is no test."""
    is_val = splits == "val"
    for name in ("test", "val"):
        if (splits == name).any():
            return splits == name, is_val & (name == "test")
    if test_share is None:
        known = ", ".join(sorted(set(splits.tolist()) - {""})) or "none"
        raise SettingError("test_share", f"{source} names no test rows: its splits are {known}; {{}} draws some")
    is_test = np.zeros(len(labels), bool)
    is_test[hold_out(labels, test_share)[1]] = True  # the same for every seed of training
    return is_test, np.zeros_like(is_test)


class _Rows(NamedTuple):
    """Of images, what :class:`Labelled` asks for."""

    labels: np.ndarray
    is_test: np.ndarray
    is_val: np.ndarray
    classes: Sequence[str]


def _images(config: RunConfig, progress: bool, early: bool) -> Task:
    from rsfast.deblora.comparison.images import IMAGES, ImageTask, lora_of  # with open_clip
    from rsfast.deblora.features.backbones import image_encoder
    from rsfast.deblora.features.extraction import extract_features
    from rsfast.models import add_lora

    methods = parse_methods(config.method)
    dataset = load_labelled(config.images, config.image_root, format=config.image_format)
    splits = [split or "" for split in dataset.splits or [""] * len(dataset)]
    parts = _parts(np.array(splits), dataset.labels, config.test_share, config.images)
    if early:  # before hours of extraction
        checked_splits(_Rows(dataset.labels, *parts, dataset.classes), config)
    model = backbone(config.model, config.pretrained)
    if config.pretrained is None:
        warnings.warn(f"pretrained is not given: {config.model} has random weights", stacklevel=4)
    encoder, transform = image_encoder(model)
    if any(method.step == "deblora" or method.trained in ("lora", "class-wise") for method in methods):
        widest = max((min(p.shape) for p in encoder.parameters() if p.ndim == 2), default=config.rank)
        if config.rank > widest:
            raise SettingError("rank", f"{{}} must be at most {widest}, of the model's widest layer; got {config.rank}")
        add_lora(copy.deepcopy(encoder), **lora_of(encoder, config))  # refuses what can have none
    store = extract_features(
        model, dataset, Path(config.out) / FEATURES, workers=config.workers,
        batch_size=config.batch_size or IMAGES,
        device=config.place(), precision=config.precision, progress=progress,
    )  # fmt: skip
    kept = np.setdiff1d(np.arange(len(dataset)), [left.index for left in store.left_out])
    return ImageTask(stored_task(store, config, config.images), dataset.subset(kept), encoder, transform, config)


def backbone(model: str, pretrained: str | None) -> nn.Module:
    """open_clip's image tower, or timm's model, of a name; SatMAE and Stable Diffusion from files.

    Args:
        model: open_clip's name or path of a ``.json`` config; timm's name; ``satmae``; ``stable-diffusion``.
        pretrained: For open_clip its tag or a weights file; for timm ``timm`` (its own weights) or a weights file; for
            the others the file or folder. None: random weights, which only a test wants.

    Raises:
        ValueError: No library knows the model, or weights are missing or do not fit.
    """
    import open_clip
    import timm

    if model in ("satmae", "stable-diffusion"):
        if pretrained is None:
            raise SettingError(
                "pretrained", f"{{}} must name the {'file' if model == 'satmae' else 'folder'} of {model}"
            )
        if model == "satmae":
            from rsfast.models import load_satmae

            return load_satmae(pretrained)
        from rsfast.deblora.features.diffusion import stable_diffusion_encoder

        return stable_diffusion_encoder(pretrained)
    if model.endswith(".json") or model in open_clip.list_models():
        from rsfast.harma.model import create

        return create(model, weights=pretrained).model.visual
    if timm.is_model(model):
        file = None if pretrained in (None, "timm") else pretrained
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(f"pretrained: there is no weights file {file}; 'timm' takes timm's own")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # random weights are the same when a run goes on
            made = timm.create_model(model, pretrained=pretrained == "timm", num_classes=0)
        if file is not None:
            _load_timm(made, model, file)
        return made
    raise SettingError(
        "model", f"{{}} must be of open_clip or timm, 'satmae' or 'stable-diffusion'; neither knows {model!r}"
    )


def _load_timm(made: nn.Module, name: str, file: str) -> None:
    """Weights from a file, which may have a classifier too."""
    from timm.models import load_checkpoint

    try:
        keys = load_checkpoint(made, file, strict=False)
    except Exception as error:  # unreadable, or of other shapes: torch, pickle, struct and zipfile say what
        raise SettingError(
            "pretrained", f"{{}}: {file} does not fit {name}: {type(error).__name__}: {error}"
        ) from error
    if keys is None:  # NumPy's files, which the model itself reads
        return
    heads = made.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    other = [*keys.missing_keys, *(key for key in keys.unexpected_keys if not key.startswith(heads))]
    if other:
        raise SettingError(
            "pretrained", f"{{}}: {file} does not fit {name}, which differs in {other[0]} and {len(other) - 1} more"
        )
