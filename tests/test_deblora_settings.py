"""Settings that do not fit: refused by their name, or by their flag, in one line; and trainings that diverge."""

import numpy as np
import pytest

from rsfast import cli
from rsfast.deblora import run
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
