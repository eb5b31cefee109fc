"""One method under one seed: rows drawn, an encoder trained, features de-biased, probed and measured."""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from rsfast.deblora.comparison import held
from rsfast.deblora.comparison.config import RunConfig, SettingError
from rsfast.deblora.comparison.methods import Method
from rsfast.deblora.comparison.splits import Split
from rsfast.deblora.comparison.tasks import Task
from rsfast.deblora.debiasing.calibration import augment, auto_alpha, calibrate
from rsfast.deblora.debiasing.centers import NoiseWarning, debiased_centers
from rsfast.deblora.debiasing.clustering import Clusters, cluster_features
from rsfast.deblora.debiasing.composition import classes_of_noise
from rsfast.deblora.learning.learn import encode, learn_classes, learn_towards
from rsfast.deblora.learning.losses import balanced_weights
from rsfast.deblora.learning.steps import DivergedError
from rsfast.deblora.probes.by_name import PROBES
from rsfast.deblora.probes.metrics import class_distances, class_f1, grouped_f1
from rsfast.harma.loading import mixed_seed, seed_generators

PARTS = ("fit", "val", "test")
SHOWN = 2000  # rows of the picture
FAR = 10  # times the loss that is had without training: where a training is said to have gone wrong
LARGEST = float(np.finfo(np.float32).max) / 4  # a squared norm up to which fp32 has the distances between rows


class Debiased(NamedTuple):
    """What debLoRA makes of training features."""

    clusters: Clusters
    mu: np.ndarray  # (C, D)
    calibrated: np.ndarray  # (N, D)
    tail: list[int]  # classes that are moved, smallest first


class Outcome(NamedTuple):
    """A row of the table, F1 by class, the probe's settings, what the picture of calibration shows; and clusters:
    how many, of how many rows, what is noise, and the names of classes that are noise alone; where there are any."""

    row: dict
    by_class: list[dict]
    probe: dict
    picture: dict[str, np.ndarray] | None
    clusters: dict | None


def debias(features: np.ndarray, labels: np.ndarray, config: RunConfig, seed: int, work: Path) -> Debiased:
    """Clusters, de-biased centres and calibrated features: debLoRA's first two stages.

    Features in a file stay there, and so do those calibrated, in one under ``work``; but for the clusterers that need
    all rows in memory.
    """
    limit = held.HELD if config.clusterer == "minibatch" else max(held.HELD, features.nbytes)
    clusters = cluster_features(
        features, config.clusters, rho=config.rho, method=config.clusterer, seed=seed, device=config.place(),
        memory_limit=limit,
    )  # fmt: skip
    counts = np.bincount(labels)
    if config.center == "debiased":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoiseWarning)  # the outcome tells of it
            mu = debiased_centers(features, labels, clusters.assignments, clusters.centers)
    else:
        groups = labels if config.center == "class-mean" else np.zeros_like(labels)
        means = np.stack([features[groups == g].mean(0) for g in np.unique(groups)])
        mu = np.broadcast_to(means[0], (len(counts), features.shape[1])).copy()
        mu[np.unique(groups)] = means
    moved = np.flatnonzero((counts > 0) & (auto_alpha(counts) < 1)).tolist()
    out = held.in_file(work / "calibrated.f32", *features.shape) if isinstance(features, np.memmap) else None
    calibrated = calibrate(features, labels, mu, config.alpha, out=out)
    return Debiased(clusters, mu, calibrated, sorted(moved, key=lambda c: counts[c]))


def compute(
    task: Task, split: Split, method: Method, config: RunConfig, seed: int, work: Path, progress: bool = False
) -> Outcome:
    """Run a method. The same seed gives every method the same rows, order, and starting weights of the same shape.

    Args:
        work: Folder for the checkpoints of trainings, from which a killed run continues.
    """
    start, seen = time.perf_counter(), None  # features and what debLoRA made of them
    labels = {part: task.labels[getattr(split, part)] for part in PARTS}
    place = torch.device(config.place())
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        seed_generators(mixed_seed(seed, 2), place)
        adapt = _Adaptation(task, method, config, seed, work, progress)
        adapt.by_classes(split.fit, labels["fit"])
        if method.step == "deblora":
            seen = adapt.towards_calibrated(split.fit, labels["fit"])
        features = {part: adapt.features(getattr(split, part), part) for part in PARTS}
    if method.step == "calibrate":
        seen = features["fit"], debias(features["fit"], labels["fit"], config, seed, work)
    picture = clusters = None
    if seen is not None:
        picture = _picture(seen[0], labels["fit"], seen[1], seed)
        clusters = {"method": method.name, "seed": seed, **_told(seen[1].clusters, labels["fit"], task.classes)}
    if method.step == "calibrate":
        features["fit"], labels["fit"] = augment(features["fit"], labels["fit"], seen[1].calibrated)
    probe = PROBES[config.probe](
        features["fit"], labels["fit"], n_classes=len(task.classes), loss=method.loss, device=config.place(),
        val=(features["val"], labels["val"]) if len(split.val) else None,
        **{"seed": seed} if config.probe == "linear" else {},
    )  # fmt: skip
    predicted = probe.predict(features["test"])
    f1 = grouped_f1(labels["test"], predicted, split.counts, style=config.f1_style)
    distances = class_distances(features["test"], labels["test"])
    row = {
        "method": method.name, "seed": seed, **{name: f1[name] for name in ("head", "middle", "tail", "mean")},
        "inter": distances["inter"], "intra": distances["intra"], "seconds": time.perf_counter() - start,
    }  # fmt: skip
    row = {name: _known(value) for name, value in row.items()}
    single = class_f1(labels["test"], predicted, len(task.classes))
    by_class = [
        {"method": method.name, "seed": seed, "class": str(name), "train": int(n), "f1": _known(score)}
        for name, n, score in zip(task.classes, split.counts.counts, single.tolist(), strict=True)
    ]
    chosen = {"method": method.name, "seed": seed, **{name: _known(value) for name, value in probe.chosen.items()}}
    return Outcome(row, by_class, chosen, picture, clusters)


def _told(clusters: Clusters, labels: np.ndarray, classes: Sequence[str]) -> dict:
    alone = [str(classes[c]) for c in classes_of_noise(labels, clusters.assignments)]
    return {"clusters": len(clusters.centers), "rows": len(labels), "noise": clusters.noise, "classes_of_noise": alone}


def _known(value):
    return None if value != value else value  # JSON has no NaN


class _Adaptation:
    """An encoder on its way; None stands for the frozen one, whose features are at hand."""

    def __init__(self, task: Task, method: Method, config: RunConfig, seed: int, work: Path, progress: bool):
        self.task, self.method, self.seed, self.work = task, method, seed, work
        given = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
        self.config = config = dataclasses.replace(config, **{**task.defaults._asdict(), **given})
        self.encoder: nn.Module | None = None
        self.stage: _Stage | None = None  # of the training that was last
        self.place = dict(device=config.place(), precision=config.precision, progress=progress)
        self.options = self.place | dict(batch_size=config.batch_size, weight_decay=config.weight_decay, seed=seed)

    def by_classes(self, rows: np.ndarray, labels: np.ndarray) -> None:
        """What is trained with labels."""
        if self.method.trained is None:
            return
        classes = len(self.task.classes)
        self.encoder = self.task.encoder(self.method.trained)
        head = None if self.method.trained == "class-wise" else nn.Linear(self.task.frozen.shape[1], classes)
        lr = self.config.lr / (10 if self.method.trained == "full" else 1)
        with self._training(_Stage("training with labels", "lr", math.log(classes), [])) as losses:
            losses += learn_classes(
                self.encoder, head, self.task.inputs(rows), labels, loss=self.method.loss,
                counts=np.bincount(labels, minlength=classes), epochs=self.config.epochs, lr=lr,
                checkpoint=self.work / "classes.pt", **self.options,
            )  # fmt: skip

    def towards_calibrated(self, rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, Debiased]:
        """The LoRA of debLoRA: the method's own, or a new one where it has none."""
        before = self.features(rows, "before")
        found = debias(before, labels, self.config, self.seed, self.work)
        self.encoder = self.task.with_lora(self.encoder or self.task.encoder(None), self.method.trained)
        weights = _weights(labels, found.tail, self.config.target_set)
        moved, far = np.isin(labels, found.tail), np.zeros(len(labels))
        far[moved] = np.linalg.norm(found.calibrated[moved] - before[moved], axis=1)
        start = float(np.average(far, weights=weights))
        with self._training(_Stage("learning towards calibrated features", "deblora_lr", start, [])) as losses:
            losses += learn_towards(
                self.encoder, self.task.inputs(rows), found.calibrated, weights=weights,
                epochs=self.config.deblora_epochs, lr=self.config.deblora_lr, checkpoint=self.work / "towards.pt",
                **self.options,
            )  # fmt: skip
        return before, found

    def features(self, rows: np.ndarray, name: str) -> np.ndarray:
        """Of these rows, fp32; a file that holds them is called by the name."""
        if self.encoder is None:
            return held.taken(self.task.frozen, rows, self.work / f"{name}.f32")
        if not len(rows):
            return np.empty((0, self.task.frozen.shape[1]), dtype=np.float32)
        found = encode(self.encoder, self.task.inputs(rows), batch_size=self.task.at_once, **self.place)
        if self.stage is not None:
            self._look_at(found)
        return found

    def _look_at(self, found: np.ndarray) -> None:
        """What a training made, whose loss may be finite all the same."""
        start, losses = self.stage.start, self.stage.losses
        course = f"the loss went from {losses[0]:.3g} in epoch 1 to {losses[-1]:.3g} in epoch {len(losses)}"
        if not np.einsum("nd,nd->n", found, found).max() < LARGEST:
            raise self._diverged(f"{course}, and features are too large to be told apart, or not finite")
        if 0 < FAR * start < losses[-1]:
            warnings.warn(str(self._diverged(f"{course}, where it is {start:.3g} without training")), stacklevel=4)

    @contextlib.contextmanager
    def _training(self, stage: "_Stage"):
        """Where a training runs: it gives the list that takes its losses, and says what went wrong."""
        self.stage = stage
        try:
            yield stage.losses
        except DivergedError as error:
            raise self._diverged(f"the loss became {error.loss} in epoch {error.epoch}") from error

    def _diverged(self, how: str) -> SettingError:
        what, setting = self.stage.what, self.stage.setting
        if self.config.weight_decay > 1 < self.config.weight_decay * getattr(self.config, setting):
            setting = "weight_decay"
        where, given = f"{self.method.name}, seed {self.seed}", getattr(self.config, setting)
        return SettingError(setting, f"{where}: {what} diverged: {how}; lower {{}}, which is {given:g}")


class _Stage(NamedTuple):
    """A training: its name, the setting that decides its steps, the loss that is had without it, those of epochs."""

    what: str
    setting: str
    start: float
    losses: list[float]


def _weights(labels: np.ndarray, tail: list[int], target_set: str) -> np.ndarray | None:
    """How much each row counts in learning towards calibrated features."""
    if target_set == "all" or not tail:
        return None
    counts = np.bincount(labels)
    weights = balanced_weights(counts).numpy() if target_set == "balanced" else np.isin(np.arange(len(counts)), tail)
    return weights[labels].astype(np.float32)


def _picture(before: np.ndarray, labels: np.ndarray, found: Debiased, seed: int) -> dict[str, np.ndarray]:
    """Arguments of :func:`draw_calibration`: all rows of the tail, and some of the others."""
    draw = np.random.default_rng(mixed_seed(seed, 3))
    moved = np.isin(labels, found.tail)
    rows = np.concatenate([np.flatnonzero(moved), draw.permutation(np.flatnonzero(~moved))])[:SHOWN]
    return {
        "before": before[rows], "after": found.calibrated[rows], "labels": labels[rows],
        "centers": np.asarray(found.clusters.centers), "mu": found.mu, "tail": np.array(found.tail, dtype=np.int64),
    }  # fmt: skip
