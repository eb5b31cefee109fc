"""Whole comparisons: the rows, the files, what a kill leaves, ablations and the command."""

import dataclasses
import json

import numpy as np
import pytest

from rsfast import cli
from rsfast.deblora import SWEEPS, FeatureStore, LabelledFeatures, RunConfig, ablate, run
from rsfast.deblora.comparison import ablation, experiment, running, tasks
from rsfast.deblora.comparison.experiment import _weights
from rsfast.deblora.comparison.sources import opened
from rsfast.deblora.comparison.splits import split_rows
from rsfast.deblora.comparison.tasks import FeatureTask

KEYS = ["method", "seed", "head", "middle", "tail", "mean", "inter", "intra", "seconds"]
QUICK = dict(clusters=4, epochs=2, deblora_epochs=2, rank=2, seeds=(0, 1), probe="knn", method="zero-shot,lora,deblora")


def blobs(classes=4, rows=60, dim=6):
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), rows)
    features = (draw.normal(size=(classes, dim)) * 2)[labels] + draw.normal(size=(len(labels), dim))
    names = [f"class {c}" for c in range(classes)]
    return LabelledFeatures(features.astype(np.float32), labels, np.arange(len(labels)) % 3 == 0, names, "blobs")


def config(tmp_path, **settings):
    return RunConfig(out=str(tmp_path / "run"), **QUICK | dict(imbalance=20.0) | settings)


def task(settings):
    return FeatureTask(blobs(), settings)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_every_method_gives_a_row(tmp_path):
    settings = config(tmp_path, method="all", seeds=(0,), alpha=0.5)
    seen = []
    result = run(settings, task(settings), report=seen.append)
    assert [row["method"] for row in result.rows] == [row["method"] for row in seen]
    assert len(result.rows) == 18 and all(list(row) == KEYS for row in result.rows)
    assert all(0 <= row[name] <= 100 for row in result.rows for name in ("head", "middle", "tail", "mean"))
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["rows"] == result.rows and len(found["by_class"]) == 18 * 4
    assert [probe["method"] for probe in found["probes"]] == [row["method"] for row in result.rows]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "calibration.npz", "calibration.png", "f1_by_class.png", "results.json",
    ]  # fmt: skip
    by_name = {row["method"]: row for row in result.rows}
    assert by_name["calibrate"]["inter"] == by_name["zero-shot"]["inter"]  # test features are as they are
    assert by_name["deblora"]["inter"] != by_name["zero-shot"]["inter"]


def test_rows_of_a_seed():
    settings = RunConfig(out="x", imbalance=20.0, val_share=0.25, rank=2)
    split = split_rows(task(settings), settings, 0)
    assert sorted(split.counts.counts.tolist()) == [2, 5, 15, 40]
    parts = [set(part.tolist()) for part in (split.fit, split.val, split.test)]
    assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]
    labels = blobs().labels
    assert sorted(np.bincount(labels[split.val], minlength=4).tolist()) == [
        1,
        1,
        4,
        10,
    ]  # a quarter, rounded, of two one
    assert len(split.test) == 80 and not (split.test % 3).any()
    other = split_rows(task(settings), settings, 1)
    assert set(other.fit.tolist()) != parts[0]


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    whole = config(tmp_path)
    expected = run(whole, task(whole)).rows
    cut = dataclasses.replace(whole, out=str(tmp_path / "cut"))
    calls, compute = [], running.compute

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(running, "compute", killed)
    with pytest.raises(KeyboardInterrupt):
        run(cut, task(cut))
    assert len(json.loads((tmp_path / "cut" / "results.json").read_text())["rows"]) == 3
    found = run(cut, task(cut)).rows
    assert len(calls) == 4 + 3 and without_seconds(found) == without_seconds(expected)
    assert run(cut, task(cut)).rows == found and len(calls) == 7  # all is there


def test_methods_and_seeds_can_be_added_and_nothing_else(tmp_path):
    first = config(tmp_path, method="lora", seeds=(1,))
    kept = run(first, task(first)).rows
    more = config(tmp_path, method="zero-shot,lora", seeds=(0, 1))
    found = run(more, task(more)).rows
    assert [(row["method"], row["seed"]) for row in found] == [
        ("zero-shot", 0), ("zero-shot", 1), ("lora", 0), ("lora", 1),
    ]  # fmt: skip
    assert found[3] == kept[0]
    before = (tmp_path / "run" / "results.json").read_bytes()
    for change in (dict(clusters=5), dict(imbalance=10.0), dict(probe="linear")):
        with pytest.raises(ValueError, match=f"other settings: {next(iter(change))} .* there and .* here"):
            run(config(tmp_path, **change), task(more))
    with pytest.raises(ValueError, match="other settings: data"):
        run(more, FeatureTask(blobs(rows=61), more))
    assert (tmp_path / "run" / "results.json").read_bytes() == before


@pytest.mark.parametrize(("content", "message"), [("{", "damaged"), ("[]", "is not of rsfast deblora run")])
def test_a_folder_of_something_else(tmp_path, content, message):
    settings = config(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run(settings, task(settings))


def test_weights_of_target_sets():
    labels = np.array([0, 0, 0, 1])
    assert _weights(labels, [1], "all") is None and _weights(labels, [], "tail") is None
    assert _weights(labels, [1], "tail").tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(_weights(labels, [1], "balanced"), [2 / 3, 2 / 3, 2 / 3, 2])


@pytest.mark.filterwarnings("ignore:.*is left out")
def test_ablations_vary_one_setting_at_a_time(tmp_path):
    settings = config(tmp_path, method="deblora", seeds=(0,))
    with pytest.warns(
        UserWarning, match="clusters=64 is left out: clusters must be at most 49, the training rows, got 64"
    ):
        found = ablate(settings, task(settings), sweeps=["clusters", "alpha", "rank"])
    names = [row["setting"] for row in found.rows]
    assert names[:2] == ["clusters=8", "clusters=16"] and "clusters=64" not in names  # fewer rows than that
    assert "alpha=auto" in names and not any(name.startswith("rank") for name in names)  # all above the width
    assert json.loads((tmp_path / "run" / "ablations.json").read_text())["rows"] == found.rows
    with pytest.warns(UserWarning, match="rank=8 is left out: rank must be at most 6"):
        assert ablate(settings, task(settings), sweeps=["clusters", "alpha", "rank"]).rows == found.rows
    with pytest.raises(ValueError, match="sweep must be of .* got 'lr'"):
        ablate(settings, task(settings), sweeps=["lr"])


def test_ablations_leave_out_what_the_data_cannot_have(tmp_path):
    settings = config(tmp_path, method="zero-shot,calibrate", seeds=(0,))
    with pytest.warns(UserWarning) as told:
        found = ablate(settings, task(settings), sweeps=["rho", "clusterer"])
    names = dict.fromkeys(row["setting"] for row in found.rows)
    assert list(names) == [
        "rho=none", "rho=1.25", "rho=2.0", "rho=4.0", "clusterer=kmeans", "clusterer=minibatch", "clusterer=dbscan",
    ]  # fmt: skip
    assert [str(one.message).split(":")[0] for one in told] == ["rho=1.0 is left out", "clusterer=hdbscan is left out"]
    assert "rows are noise" in str(told[1].message)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="can have none of the values; rank=8 is left out"):
        ablate(settings, task(settings), sweeps=["rank"])


def test_ablations_of_the_rank_change_the_rank(tmp_path, monkeypatch):
    settings = config(tmp_path, method="deblora,lora", seeds=(0,), lora_alpha=3.0)
    monkeypatch.setitem(SWEEPS, "rank", (1, 2, 3))
    made, low_rank = [], tasks.LowRankMap

    def seen(dim, **lora):
        made.append(lora)
        return low_rank(dim, **lora)

    monkeypatch.setattr(tasks, "LowRankMap", seen)
    ablate(settings, task(settings), sweeps=["rank"])
    assert made == [dict(r=r, alpha=3.0) for r in (1, 1, 2, 2, 3, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(clusters=200), "^clusters must be at most 49, the training rows, got 200"),
        (dict(rho=1.001), "^rho does not fit the 49 training rows: rho=1.001 asks for at least N / .K rho. = 49 / .4"),
        (dict(clusters=200, method="zero-shot,calibrate", clusterer="minibatch"), "^clusters must"),
        (dict(device="cuda:99"), "device cuda:99 was asked for|device 'cuda:99' cannot be used"),
        (dict(device="tpus"), "device 'tpus' cannot be used"),
        (dict(rank=7), "rank must be at most 6"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_done(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(config(tmp_path, **change), task(config(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_clusters_do_not_matter_where_there_are_none(tmp_path):
    for number, change in enumerate((dict(method="zero-shot"), dict(method="deblora", clusterer="dbscan"))):
        settings = config(tmp_path / str(number), clusters=200, seeds=(0,), **change)
        assert len(run(settings, task(settings)).rows) == 1


def test_a_class_that_only_some_seeds_take_rows_for(tmp_path, monkeypatch):
    settings = config(tmp_path, method="zero-shot", seeds=(0, 1))
    known = running.compute

    def without(task, split, method, config, seed, work, progress):
        if seed:  # nothing of class 3 is looked for, or found
            split = split._replace(
                fit=split.fit[task.labels[split.fit] != 3], test=split.test[task.labels[split.test] != 3]
            )
        return known(task, split, method, config, seed, work, progress)

    monkeypatch.setattr(running, "compute", without)
    found = run(settings, task(settings)).by_class
    assert len(found) == 8 and [row["class"] for row in found if row["f1"] is None] == ["class 3"]


def test_features_in_fp64_are_trained_on(tmp_path):
    data = blobs()
    wide = LabelledFeatures(data.features.astype(np.float64), data.labels, data.is_test, data.classes)
    one, other = (config(tmp_path / name, method="fine-tune,lora,clora,deblora", seeds=(0,)) for name in "ab")
    expected = without_seconds(run(one, FeatureTask(data, one)).rows)
    assert without_seconds(run(other, FeatureTask(wide, other)).rows) == expected


def test_work_of_other_settings_is_not_gone_on_with(tmp_path, monkeypatch):
    first, second = config(tmp_path, method="lora", epochs=3), config(tmp_path, method="lora", epochs=2)
    probe = experiment.PROBES["knn"]

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setitem(experiment.PROBES, "knn", killed)
    with pytest.raises(KeyboardInterrupt):  # the training's checkpoint is there, a row is not
        run(first, task(first))
    assert list((tmp_path / "run").rglob("classes.pt"))
    np.savez(tmp_path / "run" / "calibration.npz", of="an earlier run, whose results.json was removed")
    monkeypatch.setitem(experiment.PROBES, "knn", probe)
    alone = dataclasses.replace(second, out=str(tmp_path / "alone"))
    assert without_seconds(run(second, task(second)).rows) == without_seconds(run(alone, task(alone)).rows)
    assert not (tmp_path / "run" / "unfinished").exists() and not (tmp_path / "run" / "calibration.npz").exists()


def test_one_process_at_a_time(tmp_path):
    settings = config(tmp_path, method="zero-shot", seeds=(0, 1))

    def again(row):
        with pytest.raises(ValueError, match="is being written by another"):
            run(settings, task(settings))

    assert len(run(settings, task(settings), report=again).rows) == 2
    assert len(run(settings, task(settings)).rows) == 2  # it has been let go


def test_sweeps_share_the_settings_that_none_of_them_changes(tmp_path, monkeypatch):
    settings = config(tmp_path, method="calibrate", seeds=(0,))
    calls, compute = [], running.compute
    monkeypatch.setattr(running, "compute", lambda *args: calls.append(args) or compute(*args))
    rows = ablate(settings, task(settings), sweeps=["center", "target_set"]).rows
    assert len(rows) == 6 and len(calls) == 5
    base = [row for row in rows if row["setting"] in ("center=debiased", "target_set=balanced")]
    assert without_setting(base[0]) == without_setting(base[1])


def test_sweeps_read_the_features_once(tmp_path, monkeypatch):
    settings = config(tmp_path, method="zero-shot", seeds=(0,))
    calls, digest_of = [], running.digest_of
    for module in (running, ablation):
        monkeypatch.setattr(module, "digest_of", lambda task: calls.append(task) or digest_of(task))
    ablate(settings, task(settings), sweeps=["center", "target_set"])
    assert len(calls) == 1
    alone = run(dataclasses.replace(settings, out=str(tmp_path / "alone")), task(settings)).files[0]
    base = tmp_path / "run" / "base" / "results.json"
    assert json.loads(alone.read_text())["settings"] == json.loads(base.read_text())["settings"] and len(calls) == 2


def without_setting(row):
    return {name: value for name, value in row.items() if name != "setting"}


def test_features_from_a_file_a_store_and_nowhere(tmp_path):
    data = blobs()
    path = tmp_path / "f.npz"
    np.savez(path, features=data.features, label=data.labels, is_test=data.is_test, classes=data.classes)
    splits = np.where(data.is_test, "test", np.where(np.arange(len(data.labels)) % 3 == 1, "val", "train"))
    with FeatureStore.create(tmp_path / "store", 6, classes=data.classes) as store:
        store.append(data.features, data.labels, splits=splits.tolist())
    _, from_file = opened(config(tmp_path, features=str(path)))
    _, from_store = opened(config(tmp_path, features=str(tmp_path / "store")))
    assert np.array_equal(from_file.frozen, from_store.frozen) and not from_file.is_val.any()
    split = split_rows(from_store, config(tmp_path, imbalance=None), 0)
    assert [len(part) for part in split[:3]] == [80, 80, 80] and (split.val % 3 == 1).all()
    settings, digits = opened(RunConfig(out="x"))
    assert settings.imbalance == 100 and digits.frozen.shape[1] == 64


def test_other_validation_rows_are_other_data():
    settings, data = RunConfig(out="x", rank=2), blobs()
    val = np.arange(len(data.labels)) % 3 == 1
    parts = (None, np.zeros_like(val), val, np.roll(val, 1) & ~data.is_test)
    found = [running.digest_of(FeatureTask(data, settings, part)) for part in parts]
    assert found[0] == found[1] and len(set(found)) == 3


def test_a_damaged_store_is_refused(tmp_path):
    data = blobs()
    with FeatureStore.create(tmp_path / "store", 6, classes=data.classes) as store:
        store.append(data.features, data.labels, splits=np.where(data.is_test, "test", "train").tolist())
    content = bytearray((tmp_path / "store" / "features.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "store" / "features.bin").write_bytes(content)
    with pytest.raises(ValueError, match="store is damaged: features.bin, rows 0 to 239"):
        run(config(tmp_path, features=str(tmp_path / "store")))
    assert not (tmp_path / "run").exists()


def test_test_rows_can_be_drawn(tmp_path):
    data = blobs()
    with FeatureStore.create(tmp_path / "store", 6, classes=data.classes) as store:
        store.append(data.features, data.labels)
    with pytest.raises(ValueError, match="names no test rows: its splits are none; test_share draws some"):
        opened(config(tmp_path, features=str(tmp_path / "store")))
    _, found = opened(config(tmp_path, features=str(tmp_path / "store"), test_share=0.25))
    assert np.bincount(found.labels[found.is_test]).tolist() == [15] * 4


def test_the_command(tmp_path, capsys, monkeypatch):
    data = blobs()
    path = tmp_path / "f.npz"
    np.savez(path, features=data.features, label=data.labels, is_test=data.is_test, classes=data.classes)
    arguments = ["deblora", "run", "--features", str(path), "--clusters", "4", "--rho", "2", "--imbalance", "20",
                 "--seeds", "0", "1", "--method", "lora,deblora", "--epochs", "1", "--rank", "2", "--probe", "knn",
                 "--deblora-epochs", "1", "--out", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["method", "head", "middle", "tail"] and "±" in lines[1]
    assert [line.split()[0] for line in lines[1:3]] == ["lora", "deblora"] and lines[3].startswith("written: ")
    assert err.count("seed 1:") == 2
    assert cli.main([*arguments, "--rho", "none"]) == 2
    assert "rho 2.0 there and None here" in capsys.readouterr().err
    assert cli.main(["deblora", "run", "--features", str(tmp_path / "no.npz"), "--out", str(tmp_path / "b")]) == 2
    assert "no.npz" in capsys.readouterr().err and not (tmp_path / "b").exists()
    ablation = ["deblora", "ablate", *arguments[2:], "--out", str(tmp_path / "c"), "--sweep", "target_set"]
    drawn = []
    monkeypatch.setattr(running, "draw_calibration", lambda *_, embedding, **__: drawn.append(embedding))
    assert cli.main([*ablation, "--embedding", "tsne"]) == 0 and drawn == ["tsne"] * 3
    assert "target_set=tail" in capsys.readouterr().out


@pytest.mark.parametrize(("probe", "chosen"), [("logistic", "C"), ("linear", "epoch"), ("knn", "k")])
def test_what_was_chosen_for_a_probe_is_told(tmp_path, probe, chosen):
    settings = config(tmp_path, probe=probe, method="zero-shot", seeds=(1,))
    run(settings, task(settings))
    (found,) = json.loads((tmp_path / "run" / "results.json").read_text())["probes"]
    assert found["method"] == "zero-shot" and found["seed"] == 1 and found[chosen] > 0
