"""Settings that do not fit: refused by their name, or by their flag, in one line; and trainings that diverge."""

import numpy as np
import pytest

from rsfast import cli
from rsfast.deblora import run
from rsfast.deblora.comparison.tasks import FeatureTask
from tests.test_deblora_run import blobs, config, task

QUICK = ["--clusters", "4", "--imbalance", "20", "--seeds", "0", "--rank", "2", "--epochs", "2",
         "--deblora-epochs", "2", "--probe", "knn"]  # fmt: skip


@pytest.fixture
def features(tmp_path):
    data = blobs()
    path = tmp_path / "f.npz"
    np.savez(path, features=data.features, label=data.labels, is_test=data.is_test, classes=data.classes)
    return ["--features", str(path), "--out", str(tmp_path / "out")]


LABELS = "training with labels diverged: the loss"
TOWARDS = "learning towards calibrated features diverged: the loss"


@pytest.mark.parametrize(
    ("method", "flags", "told"),
    [
        ("lora", ["--lr", "1e30"], (LABELS, "became nan in epoch 2", "lower --lr, which is 1e+30")),
        ("clora", ["--lr", "1e9"], (LABELS, "in epoch 2, and features are too large", "lower --lr, which is 1e+09")),
        ("lora+deblora", ["--lr", "1e9"], (LABELS, "lower --lr, which is 1e+09")),
        ("deblora", ["--deblora-lr", "1e30"], (TOWARDS, "in epoch 2", "lower --deblora-lr, which is 1e+30")),
        ("deblora", ["--deblora-lr", "1e12"], (TOWARDS, "in epoch 2", "lower --deblora-lr, which is 1e+12")),
        ("lora", ["--weight-decay", "1e30"], (LABELS, "lower --weight-decay, which is 1e+30")),
    ],
)
def test_a_training_that_diverges_is_named(features, capsys, method, flags, told):
    assert cli.main(["deblora", "run", *features, *QUICK, "--method", method, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rsfast: {method}, seed 0: ")
    for words in told:
        assert words in line


def test_a_training_that_ends_far_from_where_it_began_is_told(tmp_path):
    settings = config(tmp_path, method="fine-tune", seeds=(1,), lr=1e9)
    with pytest.warns(UserWarning, match="fine-tune, seed 1: training with labels diverged: .* lower lr, which is 1e"):
        assert len(run(settings, task(settings)).rows) == 1


COUNTS = ("clusters", "rank", "epochs", "deblora-epochs", "batch-size")
NUMBERS = ("rho", "imbalance", "lora-alpha", "lr", "deblora-lr")
SHARES = ("val-share", "test-share", "alpha")
BAD = [
    *((flag, value, "a positive integer below 2**31") for flag in COUNTS for value in ("0", "-1", "nan", "1e30", "x")),
    *((flag, str(10**30), "a positive integer below 2**31") for flag in COUNTS),
    *((flag, value, "a") for flag in NUMBERS for value in ("0", "-1", "nan", "inf", "x")),
    *((flag, value, "1") for flag in SHARES for value in ("-1", "nan", "1e30", "x")),
    *(("weight-decay", value, "a number of at least 0") for value in ("-1", "nan", "inf", "x")),
    *(("workers", value, "an integer of at least 0") for value in ("-1", "nan", "1e30", str(10**30))),
    *(("seeds", value, "integers of at least 0") for value in ("-1", "nan", "1e30")),
    ("clusters", "100000", "at most 49, the training rows"),
    ("rank", "7", "at most 6, the width of the features"),
    ("method", "lor", "of zero-shot"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["run", "ablate"])
def test_a_flag_that_does_not_fit_is_named_in_one_line(features, tmp_path, capsys, command):
    given = ["deblora", command, *features, *QUICK]
    for flag, value, wanted in BAD:
        if command == "ablate" and (flag, value) in (("clusters", "100000"), ("rank", "7")):
            continue  # which a sweep of another value may mend
        assert cli.main([*given, f"--{flag}", value]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"rsfast: --{flag} must be ") and wanted in line, line
        assert "got " in line and any(shown in line for shown in (value.lstrip("-"), "1e+30")), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rho", "1.001"], "--rho does not fit the 49 training rows: rho=1.001 asks for at least N / (K rho) = 49"),
        (["--sweep", "lr"], "--sweep must be of clusters, rho, "),
        (["--clusterer", "hdbscan", "--method", "calibrate"], "hdbscan found no cluster, all 49 rows are noise"),
        (["--model", "ViT-B-32"], "--model is for images, which are not given"),
    ],
)
def test_what_the_data_cannot_have_is_said_by_its_flag(features, capsys, flags, told):
    command = "ablate" if "--sweep" in flags else "run"
    assert cli.main(["deblora", command, *features, *QUICK, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rsfast: {told}")


def test_hdbscan_needs_rows(tmp_path):
    settings = config(tmp_path, clusterer="hdbscan", imbalance=None, method="calibrate")
    with pytest.raises(ValueError, match="^clusterer hdbscan needs at least 15 training rows, got 6$"):
        run(settings, FeatureTask(blobs(classes=2, rows=6), settings))
    assert not (tmp_path / "run").exists()


def test_settings_are_named_as_python_names_them(tmp_path):
    for change, told in (
        (dict(deblora_lr="1"), "deblora_lr must be a positive number, got '1'"),
        (dict(alpha=True), "alpha must be 'auto' or a number from 0 to 1, got True"),
        (dict(val_share=None), "val_share must be at least 0 and below 1, got None"),
    ):
        with pytest.raises(ValueError, match=f"^{told}$"):
            config(tmp_path, **change)


def test_an_imbalance_that_the_classes_are_too_small_for_is_told(tmp_path):
    settings = config(tmp_path, imbalance=1e30, method="zero-shot")
    with pytest.warns(UserWarning, match="imbalance is 40 and not 1e.30: the smallest class has 40 training rows"):
        assert len(run(settings, task(settings)).rows) == 2
