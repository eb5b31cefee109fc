"""Rows that no cluster has, and classes of such rows alone: counted and told of."""

import json

import numpy as np
import pytest
import torch

from rsfast import cli
from rsfast.deblora import Clusters, ablate, classes_of_noise, cluster_features, debiased_centers, run
from rsfast.deblora.comparison.tasks import FeatureTask
from rsfast.deblora.data.features import LabelledFeatures
from tests.test_deblora_run import config


def scattered():
    """Two tight classes, and a third, small one whose rows lie far from everything."""
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [90, 90, 12])
    centres = np.array([[0.0] * 6, [9.0] * 6, [0.0] * 6])
    features = centres[labels] + 0.1 * draw.normal(size=(len(labels), 6))
    features[labels == 2] = 1000 * draw.normal(size=(12, 6))
    names = ["field", "river", "wreck"]
    return LabelledFeatures(features.astype(np.float32), labels, np.arange(len(labels)) % 3 == 0, names, "scattered")


def test_classes_of_noise():
    assert classes_of_noise([0, 0, 1, 1, 3], [0, -1, -1, -1, -1]) == [1, 3]
    assert classes_of_noise(torch.tensor([1, 1]), torch.tensor([0, -1]), n_classes=5) == []
    assert classes_of_noise([0, 1], [-1, -1]) == [0, 1]


def test_clusters_count_noise(tmp_path):
    found = cluster_features(scattered().features, method="dbscan")
    assert found.noise == (found.assignments < 0).sum() > 0 and f"{found.noise} noise" in repr(found)
    found.save(tmp_path / "c.npz")
    assert Clusters.load(tmp_path / "c.npz").noise == found.noise
    assert cluster_features(scattered().features, 4).noise == 0


def test_a_class_of_noise_alone_is_warned_of():
    x, centers = torch.tensor([[1.0], [3.0], [5.0], [7.0]]), torch.tensor([[2.0]])
    with pytest.warns(UserWarning, match="all rows of 1 class.es., 1, are noise: their centres are the means") as told:
        mu = debiased_centers(x, [0, 0, 1, 1], [0, 0, -1, -1], centers)
    assert mu.tolist() == [[2.0], [6.0]] and len(told) == 1 and told[0].filename == __file__
    many = torch.arange(30.0).view(30, 1)
    with pytest.warns(UserWarning, match=r"29 class.es., 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\., are noise"):
        debiased_centers(many, list(range(30)), [0] + [-1] * 29, centers)


@pytest.mark.filterwarnings("error:.*are noise")
def test_nobody_is_warned_of_noise_that_leaves_no_class_out():
    debiased_centers(torch.ones(3, 1), [0, 0, 2], [0, -1, 0], torch.tensor([[2.0]]))


@pytest.mark.filterwarnings("error:.*are noise")
def test_a_comparison_tells_of_it(tmp_path):
    settings = config(tmp_path, method="zero-shot,deblora,calibrate", clusterer="dbscan", imbalance=None, seeds=(0, 1))
    task = FeatureTask(scattered(), settings)
    found = run(settings, task).clusters
    assert [(row["method"], row["seed"]) for row in found] == [(m, s) for m in ("deblora", "calibrate") for s in (0, 1)]
    assert all(row["classes_of_noise"] == ["wreck"] and row["clusters"] == 2 for row in found)
    assert all(6 <= row["noise"] < row["rows"] == 102 for row in found)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["clusters"] == found
    assert run(settings, task).clusters == found  # also of a run that is there
    with pytest.warns(UserWarning, match="hdbscan is left out|imbalance"):
        swept = ablate(config(tmp_path / "a", method="calibrate", seeds=(0,)), task, sweeps=["clusterer"]).clusters
    assert {row["setting"]: row["noise"] > 0 for row in swept} == {
        "clusterer=kmeans": False, "clusterer=minibatch": False, "clusterer=dbscan": True,
    }  # fmt: skip
    assert json.loads((tmp_path / "a" / "run" / "ablations.json").read_text())["clusters"] == swept


def test_the_command_prints_it(tmp_path, capsys):
    data = scattered()
    np.savez(tmp_path / "f.npz", features=data.features, label=data.labels, is_test=data.is_test, classes=data.classes)
    arguments = ["deblora", "run", "--features", str(tmp_path / "f.npz"), "--clusters", "4", "--seeds", "0",
                 "--method", "calibrate", "--rank", "2", "--probe", "knn"]  # fmt: skip
    assert cli.main([*arguments, "--clusterer", "dbscan", "--out", str(tmp_path / "a")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "noise" in line)
    assert line.startswith("calibrate, seed 0: ") and line.endswith(
        "the de-biased centre of wreck, which no cluster has"
    )
    assert cli.main([*arguments, "--out", str(tmp_path / "b")]) == 0
    assert "noise" not in capsys.readouterr().out
