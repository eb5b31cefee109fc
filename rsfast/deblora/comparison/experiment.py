"""One method under one seed: rows drawn, an encoder trained, features de-biased, probed and measured."""

import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from rsfast.deblora.comparison.config import RunConfig
from rsfast.deblora.comparison.methods import Method
from rsfast.deblora.comparison.tasks import Task
from rsfast.deblora.data.counts import ClassCounts, make_long_tailed
from rsfast.deblora.debiasing.calibration import augment, auto_alpha, calibrate
from rsfast.deblora.debiasing.centers import debiased_centers
from rsfast.deblora.debiasing.clustering import Clusters, cluster_features
from rsfast.deblora.learning.learn import encode, learn_classes, learn_towards
from rsfast.deblora.learning.losses import balanced_weights
from rsfast.deblora.probes.by_name import PROBES
from rsfast.deblora.probes.metrics import class_distances, class_f1, grouped_f1
from rsfast.deblora.probes.probe import hold_out
from rsfast.harma.loading import mixed_seed, seed_generators

PARTS = ("fit", "val", "test")
SHOWN = 2000  # rows of the picture


class Split(NamedTuple):
    """Rows by what they are for, and the classes' sizes among those of training."""

    fit: np.ndarray
    val: np.ndarray
    test: np.ndarray
    counts: ClassCounts


class Debiased(NamedTuple):
    """What debLoRA makes of training features."""

    clusters: Clusters
    mu: np.ndarray  # (C, D)
    calibrated: np.ndarray  # (N, D)
    tail: list[int]  # classes that are moved, smallest first


class Outcome(NamedTuple):
    """A row of the table, F1 by class, what the probe's settings came to, and what the picture of calibration shows."""

    row: dict
    by_class: list[dict]
    probe: dict
    picture: dict[str, np.ndarray] | None


def split_rows(task: Task, config: RunConfig, seed: int) -> Split:
    """Training rows with the tail that is asked for, a share of each class set apart; test rows are all test rows."""
    train, test = np.flatnonzero(~task.is_test & ~task.is_val), np.flatnonzero(task.is_test)
    if config.imbalance is not None:
        train = train[make_long_tailed(task.labels[train], config.imbalance, seed)]
    counts = ClassCounts.from_labels(task.labels[train], classes=task.classes, groups=config.groups)
    if task.is_val.any():
        return Split(train, np.flatnonzero(task.is_val), test, counts)
    if not config.val_share:
        return Split(train, train[:0], test, counts)
    fit, val = hold_out(task.labels[train], config.val_share, seed=seed)
    return Split(train[fit], train[val], test, counts)


def debias(features: np.ndarray, labels: np.ndarray, config: RunConfig, seed: int) -> Debiased:
    """Clusters, de-biased centres and calibrated features: debLoRA's first two stages."""
    clusters = cluster_features(
        features, config.clusters, rho=config.rho, method=config.clusterer, seed=seed, device=config.place()
    )
    counts = np.bincount(labels)
    if config.center == "debiased":
        mu = debiased_centers(features, labels, clusters.assignments, clusters.centers)
    else:
        groups = labels if config.center == "class-mean" else np.zeros_like(labels)
        means = np.stack([features[groups == g].mean(0) for g in np.unique(groups)])
        mu = np.broadcast_to(means[0], (len(counts), features.shape[1])).copy()
        mu[np.unique(groups)] = means
    moved = np.flatnonzero((counts > 0) & (auto_alpha(counts) < 1)).tolist()
    return Debiased(clusters, mu, calibrate(features, labels, mu, config.alpha), sorted(moved, key=lambda c: counts[c]))


def compute(
    task: Task, split: Split, method: Method, config: RunConfig, seed: int, work: Path, progress: bool = False
) -> Outcome:
    """Run a method. The same seed gives every method the same rows, order, and starting weights of the same shape.

    Args:
        work: Folder for the checkpoints of trainings, from which a killed run continues.
    """
    start, picture = time.perf_counter(), None
    labels = {part: task.labels[getattr(split, part)] for part in PARTS}
    place = torch.device(config.place())
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        seed_generators(mixed_seed(seed, 2), place)
        adapt = _Adaptation(task, method, config, seed, work, progress)
        adapt.by_classes(split.fit, labels["fit"])
        if method.step == "deblora":
            picture = adapt.towards_calibrated(split.fit, labels["fit"])
        features = {part: adapt.features(getattr(split, part)) for part in PARTS}
    if method.step == "calibrate":
        found = debias(features["fit"], labels["fit"], config, seed)
        picture = _picture(features["fit"], labels["fit"], found, seed)
        features["fit"], labels["fit"] = augment(features["fit"], labels["fit"], found.calibrated)
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
    return Outcome(row, by_class, chosen, picture)


def _known(value):
    return None if value != value else value  # JSON has no NaN


class _Adaptation:
    """An encoder on its way; None stands for the frozen one, whose features are at hand."""

    def __init__(self, task: Task, method: Method, config: RunConfig, seed: int, work: Path, progress: bool):
        self.task, self.method, self.seed, self.work = task, method, seed, work
        given = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
        self.config = config = dataclasses.replace(config, **{**task.defaults._asdict(), **given})
        self.encoder: nn.Module | None = None
        self.place = dict(device=config.place(), precision=config.precision, progress=progress)
        self.options = self.place | dict(batch_size=config.batch_size, weight_decay=config.weight_decay, seed=seed)

    def by_classes(self, rows: np.ndarray, labels: np.ndarray) -> None:
        """What is trained with labels."""
        if self.method.trained is None:
            return
        classes = len(self.task.classes)
        self.encoder = self.task.encoder(self.method.trained)
        head = None if self.method.trained == "class-wise" else nn.Linear(self.task.frozen.shape[1], classes)
        learn_classes(
            self.encoder, head, self.task.inputs(rows), labels, loss=self.method.loss,
            counts=np.bincount(labels, minlength=classes), epochs=self.config.epochs,
            lr=self.config.lr / (10 if self.method.trained == "full" else 1), checkpoint=self.work / "classes.pt",
            **self.options,
        )  # fmt: skip

    def towards_calibrated(self, rows: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """The LoRA of debLoRA: the method's own, or a new one where it has none."""
        before = self.features(rows)
        found = debias(before, labels, self.config, self.seed)
        self.encoder = self.task.with_lora(self.encoder or self.task.encoder(None), self.method.trained)
        learn_towards(
            self.encoder, self.task.inputs(rows), found.calibrated,
            weights=_weights(labels, found.tail, self.config.target_set),
            epochs=self.config.deblora_epochs, lr=self.config.deblora_lr, checkpoint=self.work / "towards.pt",
            **self.options,
        )  # fmt: skip
        return _picture(before, labels, found, self.seed)

    def features(self, rows: np.ndarray) -> np.ndarray:
        if self.encoder is None:
            return np.asarray(self.task.frozen[rows], dtype=np.float32)
        if not len(rows):
            return np.empty((0, self.task.frozen.shape[1]), dtype=np.float32)
        return encode(self.encoder, self.task.inputs(rows), batch_size=self.task.at_once, **self.place)


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
