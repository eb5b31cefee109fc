"""Comparisons of a store that is too large for memory: what stays on disk, and that results are the same."""

import dataclasses

import numpy as np
import pytest

from rsfast.deblora import FeatureStore, RunConfig, run
from rsfast.deblora.comparison import experiment, held
from rsfast.deblora.comparison.sources import opened
from tests.test_deblora_run import QUICK, blobs, without_seconds


@pytest.fixture
def settings(tmp_path):
    data = blobs()
    splits = np.where(data.is_test, "test", "train").tolist()
    with FeatureStore.create(tmp_path / "store", 6, dtype="float16", classes=data.classes) as store:
        store.append(data.features, data.labels, splits=splits)
    more = dict(imbalance=20.0, seeds=(0,), method="zero-shot,lora,deblora,lora+deblora,calibrate", alpha=0.5)
    return RunConfig(out=str(tmp_path / "memory"), features=str(tmp_path / "store"), **QUICK | more)


def on_disk(settings, **change):
    return dataclasses.replace(settings, out=settings.out.replace("memory", "disk"), **change)


@pytest.mark.parametrize("probe", ["knn", "logistic", "linear"])
def test_rows_on_disk_give_the_same_results(settings, tmp_path, monkeypatch, probe):
    settings = dataclasses.replace(settings, probe=probe)
    expected = run(settings)
    monkeypatch.setattr(held, "HELD", 0)
    seen = {"cluster_features": [], "calibrate": [], "learn_towards": [], "learn_classes": []}

    def watched(own, calls):
        return lambda *args, **options: calls.append((args, options)) or own(*args, **options)

    for name, calls in seen.items():
        monkeypatch.setattr(experiment, name, watched(getattr(experiment, name), calls))
    result = run(on_disk(settings))
    assert without_seconds(result.rows) == without_seconds(expected.rows) and result.by_class == expected.by_class
    # the method in the middle goes on from what a map gave, which is in memory
    assert [isinstance(args[0], np.memmap) for args, _ in seen["cluster_features"]] == [True, False, True]
    assert [isinstance(options["out"], np.memmap) for _, options in seen["calibrate"]] == [True, False, True]
    assert [isinstance(args[2], np.memmap) for args, _ in seen["learn_towards"]] == [True, False]
    inputs = [args[1] for args, _ in seen["learn_towards"]] + [args[2] for args, _ in seen["learn_classes"]]
    assert len(inputs) == 4 and all(isinstance(one, held.PartInputs) and one.rows.on_disk for one in inputs)
    assert not list((tmp_path / "disk").rglob("*.f32"))


def test_batches_are_streamed(settings, monkeypatch):
    monkeypatch.setattr(held, "HELD", 0)
    clusters, own = [], experiment.cluster_features

    def seen(*args, **options):
        clusters.append(options["memory_limit"])
        return own(*args, **options)

    monkeypatch.setattr(experiment, "cluster_features", seen)
    assert len(run(on_disk(settings, method="calibrate", clusterer="minibatch")).rows) == 1 and clusters == [0]


def test_a_killed_training_of_rows_on_disk_goes_on(settings, monkeypatch):
    monkeypatch.setattr(held, "HELD", 0)
    settings = dataclasses.replace(settings, method="deblora")
    expected = run(settings).rows
    probe = experiment.PROBES["knn"]

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setitem(experiment.PROBES, "knn", killed)
    with pytest.raises(KeyboardInterrupt):
        run(on_disk(settings))
    monkeypatch.setitem(experiment.PROBES, "knn", probe)
    assert without_seconds(run(on_disk(settings)).rows) == without_seconds(expected)


def test_few_rows_and_rows_in_memory_are_taken_into_memory(settings, tmp_path, monkeypatch):
    _, task = opened(settings)
    rows = np.array([5, 3, 200])
    assert not isinstance(held.taken(task.frozen, rows, tmp_path / "a"), np.memmap) and not (tmp_path / "a").exists()
    monkeypatch.setattr(held, "HELD", 0)
    monkeypatch.setattr(held, "BATCH_BYTES", 48)  # two rows at a time
    found = held.taken(task.frozen, rows, tmp_path / "a")
    assert isinstance(found, np.memmap) and found.dtype == np.float32
    assert np.array_equal(found, np.asarray(task.frozen)[rows].astype(np.float32))
    assert not isinstance(held.taken(np.asarray(task.frozen).copy(), rows, tmp_path / "b"), np.memmap)
    one, other = (held.PartInputs(task.frozen, part) for part in (rows, rows[::-1].copy()))
    assert one.digest() != other.digest() and len(one) == 3
    assert np.array_equal(one.batch([1, 0], "cpu"), found[[1, 0]])
