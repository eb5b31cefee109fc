"""Features from an npz, scikit-learn's digits, tails of them, and what is refused."""

import numpy as np
import pytest

from rsfast.deblora import LabelledFeatures, digits, load_features, make_long_tailed


def arrays(**changes):
    made = dict(
        features=np.arange(24, dtype=np.float16).reshape(6, 4), label=np.array([0, 1, 2, 0, 1, 1], np.int16),
        is_test=np.array([0, 0, 1, 1, 0, 0], bool), classes=np.array(["a", "b", "c", "never"]),
    )  # fmt: skip
    return made | changes


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_as_it_is(tmp_path, save):
    save(tmp_path / "f.npz", **arrays(), more=np.zeros(3))
    data = load_features(str(tmp_path / "f.npz"))
    assert data.features.dtype == np.float16 and (data.features == arrays()["features"]).all()
    assert data.labels.dtype == np.int64 and data.labels.tolist() == [0, 1, 2, 0, 1, 1]
    assert data.is_test.dtype == bool and data.is_test.tolist() == [False, False, True, True, False, False]
    assert data.classes == ("a", "b", "c", "never") and data.source == str(tmp_path / "f.npz")
    save(
        tmp_path / "f.npz", **arrays(is_test=np.array([0, 0, 1, 1, 0, 0]), classes=np.array([b"a", b"b", b"\xc3\xa9"]))
    )
    again = load_features(tmp_path / "f.npz")
    assert again.is_test.tolist() == data.is_test.tolist() and again.classes == ("a", "b", "é")


NAN = arrays()["features"].copy()
NAN[1, 3], NAN[4, 0] = np.nan, np.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(features=NAN), r"features must be finite, got NaN or infinity in 2 row\(s\): 1, 4"),
        (dict(features=np.zeros(6, np.float32)), r"features must be of shape \(N, D\)"),
        (dict(features=np.zeros((6, 4), np.uint8)), "features must be of float16, float32 or float64"),
        (dict(label=np.zeros(5, int)), r"label must be of shape \(6,\), one integer per row, got \(5,\)"),
        (dict(label=np.array([0, 1, 4, 0, 1, 1])), r"label must be in 0..3, got 4 at index 2"),
        (dict(label=np.array([0, 1, -1, 0, 1, 1])), r"label must be in 0..3, got -1 at index 2"),
        (dict(label=np.zeros(6)), "label must be integers, got float64"),
        (dict(is_test=np.zeros(6, bool)), "is_test must mark some rows, not none"),
        (dict(is_test=np.ones(6, bool)), "is_test must mark some rows, not all"),
        (
            dict(is_test=np.ones(7, bool)),
            r"is_test must be \(6,\) booleans, one per row of features, got bool of \(7,\)",
        ),
        (dict(is_test=np.array([0, 1, 2, 0, 0, 0])), "is_test must be"),
        (dict(is_test=np.array([0, 0.5, 1, 0, 0, 0])), "is_test must be"),
        (dict(classes=np.array(["a", "b", "a"])), "classes must be names that differ"),
        (dict(classes=np.arange(3)), r"classes must be \(C,\) texts, got int64 of \(3,\)"),
        (dict(classes=np.array(["a", None, "c"], object)), "classes cannot be read: Object arrays cannot be loaded"),
    ],
)
def test_bad_npz(tmp_path, changes, message):
    np.savez(tmp_path / "f.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message) as caught:
        load_features(tmp_path / "f.npz")
    assert str(caught.value).startswith(f"{tmp_path / 'f.npz'}: ")


def test_what_is_no_npz(tmp_path):
    path = tmp_path / "f.npz"
    with pytest.raises(FileNotFoundError, match="features: there is no file .*f.npz"):
        load_features(path)
    path.write_text("no zip")
    with pytest.raises(ValueError, match="f.npz is no npz"):
        load_features(path)
    np.savez(path, features=arrays()["features"], labels=arrays()["label"])
    with pytest.raises(ValueError, match="no label and no is_test and no classes; it has features, labels"):
        load_features(path)
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes().replace(arrays()["features"].tobytes(), bytes(48)))
    with pytest.raises(ValueError, match="f.npz: features cannot be read: "):
        load_features(path)


def test_digits():
    data = digits()
    assert data.features.shape == (1797, 64) and data.features.dtype == np.float32
    assert data.features.min() == 0 and data.features.max() == 1
    assert np.bincount(data.labels[data.is_test]).tolist() == [50] * 10 and data.classes == tuple("0123456789")
    again = digits()
    assert (again.is_test == data.is_test).all() and (again.features == data.features).all()


def test_a_tail_of_the_training_rows_alone():
    size = 90
    labels, is_test = np.arange(size) % 3, np.arange(size) % 5 == 0
    data = LabelledFeatures(np.arange(size, dtype=np.float32)[:, None], labels, is_test, "abc", source="made")
    few = data.long_tailed(8, seed=3)
    row = few.features[:, 0].astype(int)  # which row it was
    assert (np.diff(row) > 0).all() and (few.labels == labels[row]).all() and (few.is_test == is_test[row]).all()
    assert few.is_test.sum() == is_test.sum() and (few.classes, few.source) == (("a", "b", "c"), "made")
    train = np.flatnonzero(~is_test)
    np.testing.assert_array_equal(row[~few.is_test], train[make_long_tailed(labels[train], 8, 3)])
    assert sorted(np.bincount(few.labels[~few.is_test]).tolist()) == [3, 8, 24]
    with pytest.raises(TypeError, match="made: features must be a NumPy array, got list"):
        LabelledFeatures([[1.0]], [0], [1], ["a"], source="made")
