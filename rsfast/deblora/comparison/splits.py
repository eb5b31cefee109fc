"""Rows by what they are for, under every seed, and whether there are enough of them for the settings."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from rsfast.deblora.comparison.config import RunConfig, SettingError
from rsfast.deblora.comparison.methods import parse_methods
from rsfast.deblora.data.counts import ClassCounts, make_long_tailed
from rsfast.deblora.debiasing.clustering import MIN_CLUSTER_SIZE
from rsfast.deblora.probes.probe import hold_out
from rsfast.kmeans import size_bounds


class Labelled(Protocol):
    """Of a task, what rows are drawn by."""

    labels: np.ndarray
    is_test: np.ndarray
    is_val: np.ndarray
    classes: Sequence[str]


class Split(NamedTuple):
    """Rows by what they are for, and the classes' sizes among those of training."""

    fit: np.ndarray
    val: np.ndarray
    test: np.ndarray
    counts: ClassCounts


def split_rows(task: "Labelled", config: RunConfig, seed: int) -> Split:
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


def checked_splits(task: Labelled, config: RunConfig) -> dict[int, Split]:
    """Each seed's rows; :class:`SettingError` where they are too few for the settings."""
    splits = {seed: split_rows(task, config, seed) for seed in config.seeds}
    least = np.bincount(task.labels[~task.is_test & ~task.is_val], minlength=len(task.classes))
    least = least[least > 0].min()
    if config.imbalance is not None and config.imbalance > least:
        warnings.warn(
            f"imbalance is {least} and not {config.imbalance:g}: the smallest class has {least} training rows",
            stacklevel=3,
        )
    if any(method.step for method in parse_methods(config.method)):
        for split in splits.values():
            _check_clusters(len(split.fit), config)
    return splits


def _check_clusters(rows: int, config: RunConfig) -> None:
    if config.clusterer == "hdbscan" and rows < MIN_CLUSTER_SIZE:
        raise SettingError("clusterer", f"{{}} hdbscan needs at least {MIN_CLUSTER_SIZE} training rows, got {rows}")
    if config.clusterer not in ("kmeans", "minibatch"):
        return
    if config.clusters > rows:
        raise SettingError("clusters", f"{{}} must be at most {rows}, the training rows, got {config.clusters}")
    try:
        size_bounds(rows, config.clusters, rho=config.rho)
    except ValueError as error:
        raise SettingError("rho", f"{{}} does not fit the {rows} training rows: {error}") from error
