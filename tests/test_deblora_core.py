"""Rows from any source, de-biased centres and calibration, against numbers computed by hand."""

import types

import numpy as np
import pytest
import torch

from rsfast import deblora
from rsfast.deblora.arrays import as_integers

X = np.arange(60, dtype=np.float32).reshape(12, 5)


def kinds(tmp_path):
    """The same rows in every kind that is taken."""
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    longer = np.lib.format.open_memmap(tmp_path / "y.npy", mode="w+", dtype=np.float32, shape=(15, 5))
    longer[3:] = X
    read_only = X.copy()
    read_only.flags.writeable = False
    return dict(
        tensor=torch.from_numpy(X.copy()), half=torch.from_numpy(X).half(),
        strided=torch.from_numpy(X).T.contiguous().T,
        numpy=X.copy(), read_only=read_only, backwards=X[::-1].copy()[::-1], mapped=mapped, view=longer[3:],
        plain_view=np.asarray(mapped), own_changes=np.load(tmp_path / "x.npy", mmap_mode="c"),
        store=types.SimpleNamespace(features=mapped),
    )  # fmt: skip


def test_rows_are_the_same_whatever_holds_them(tmp_path):
    on_disk = set()
    for name, features in kinds(tmp_path).items():
        rows, wanted = deblora.as_rows(features), torch.from_numpy(X)
        assert (len(rows), rows.dim, rows.nbytes) == (12, 5, 60 * rows.dtype.itemsize)
        starts, parts = zip(*rows.batches(5), strict=True)
        assert starts == (0, 5, 10) and torch.cat(parts).float().equal(wanted), name
        assert rows.all().float().equal(wanted) and rows.take(torch.tensor([7, 0, 7])).float().equal(wanted[[7, 0, 7]])
        kind = torch.Tensor if isinstance(features, torch.Tensor) else np.ndarray
        assert type(rows.back(torch.zeros(2))) is kind
        on_disk |= {name} if rows.on_disk else set()
    assert on_disk == {"mapped", "view", "plain_view", "store"}


def test_what_was_written_to_a_mapping_survives_that_its_pages_are_given_back(tmp_path):
    for name in ("view", "own_changes"):
        array = kinds(tmp_path)[name]
        array[2] = 77
        rows = deblora.as_rows(array)
        for _ in range(2):
            assert rows.all()[2].eq(77).all() and rows.take(torch.tensor([2])).eq(77).all()


def test_rows_that_are_not_finite_are_named(tmp_path):
    for name, array in kinds(tmp_path).items():
        if name in ("mapped", "plain_view", "store", "read_only"):
            continue
        array[3, 1], array[11, 4] = float("nan"), -float("inf")
        with pytest.raises(ValueError, match=r"here must be finite, got NaN or infinity in 2 row\(s\): 3, 11$"):
            deblora.as_rows(array, "here").check()
        array[:] = float("inf")
        with pytest.raises(ValueError, match=r"in 12 row\(s\): 0, 1, 2, 3, 4, \.\.\.$"):
            deblora.as_rows(array, "here").check()
        array[:] = 0
    big = torch.full((3, 5), 3e38)
    assert deblora.as_rows(big).check() == 0  # a sum of such rows would be infinite
    crc = deblora.as_rows(X).check(checksum=True)
    assert crc != deblora.as_rows(X[::-1].copy()).check(checksum=True)
    assert crc == deblora.as_rows(kinds(tmp_path)["mapped"]).check(checksum=True)


@pytest.mark.parametrize(
    "features, error, says",
    [
        ([[1.0]], TypeError, "must be a tensor, a NumPy array or a feature store, got list"),
        (np.zeros(3, np.float32), ValueError, r"\(N, D\) with N and D of at least 1, got \(3,\)"),
        (np.zeros((0, 3), np.float32), ValueError, r"got \(0, 3\)"),
        (np.zeros((2, 3), np.int64), ValueError, "in native byte order, got <i8"),
        (np.zeros((2, 3), ">f4"), ValueError, "got >f4"),
        (torch.zeros(2, 3, dtype=torch.int32), ValueError, "got torch.int32"),
        (torch.eye(3).to_sparse(), ValueError, "must be dense"),
    ],
)
def test_what_are_no_features_is_refused(features, error, says):
    with pytest.raises(error, match=f"features must be .*{says}|features {says}"):
        deblora.as_rows(features)


def test_integers_are_checked_by_index():
    assert as_integers(np.array([1, 2], np.uint8), "labels", 2).dtype == torch.int64
    for values, says in (
        ([1.0, 2.0], "labels must be integers, got float64"),
        ([True, False], "labels must be integers, got bool"),
        ([1, 2, 3], r"labels must be of shape \(2,\), one integer per row, got \(3,\)"),
        ([0, -1], "labels must be in 0..3, got -1 at index 1"),
        (torch.tensor([4, 0]), "labels must be in 0..3, got 4 at index 0"),
    ):
        with pytest.raises(ValueError, match=says):
            as_integers(values, "labels", 2, most=3)


CENTERS = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 12.0]])
LABELS, ASSIGNMENTS = [0, 0, 0, 0, 1, 1, 1, 3, 4], [0, 0, 1, 2, 1, -1, 2, 2, -1]  # class 2 is absent, class 4 is noise


def test_counts_of_classes_in_clusters():
    found = deblora.class_cluster_counts(LABELS, torch.tensor(ASSIGNMENTS), 6, 4)
    wanted = [[2, 1, 1, 0], [0, 1, 1, 0], [0] * 4, [0, 0, 1, 0], [0] * 4, [0] * 4]
    assert found.tolist() == wanted and found.dtype == torch.int64
    assert deblora.class_cluster_counts(LABELS, np.array(ASSIGNMENTS)).tolist() == [row[:3] for row in wanted[:5]]
    with pytest.raises(ValueError, match=r"labels must be of shape \(9,\), one integer per row, got \(8,\)"):
        deblora.class_cluster_counts(LABELS[1:], ASSIGNMENTS)
    with pytest.raises(ValueError, match="assignments must be in -1..1, got 2 at index 3"):
        deblora.class_cluster_counts(LABELS, ASSIGNMENTS, n_clusters=2)


@pytest.mark.filterwarnings("ignore:.*are noise")
def test_debiased_centers_by_hand():
    nan = float("nan")
    wanted = torch.tensor([[1.0, 3.0], [2.0, 6.0], [nan, nan], [0.0, 12.0], [nan, nan]])
    torch.testing.assert_close(
        deblora.debiased_centers(None, LABELS, ASSIGNMENTS, CENTERS), wanted, rtol=0, atol=0, equal_nan=True
    )
    features = np.full((9, 2), nan, np.float16)
    features[8] = 5, 7  # only the row of the class that is noise is read
    found = deblora.debiased_centers(features, LABELS, ASSIGNMENTS, CENTERS.numpy().astype(np.float64), n_classes=6)
    assert type(found) is np.ndarray and found.dtype == np.float64 and found[4].tolist() == [5, 7]
    np.testing.assert_array_equal(found[:4], wanted[:4].numpy())
    assert np.isnan(found[5]).all()
    features[8, 1] = np.inf
    with pytest.raises(ValueError, match=r"features must be finite, .* in 9 row\(s\): 0, 1, 2, 3, 4, "):
        deblora.debiased_centers(features, LABELS, ASSIGNMENTS, CENTERS)
    held = deblora.debiased_centers(features[:8], LABELS[:8], ASSIGNMENTS[:8], CENTERS)  # no class is noise
    torch.testing.assert_close(held, wanted[:4], rtol=0, atol=0, equal_nan=True)


def test_debiased_centers_of_one_cluster_as_released():
    options = dict(variant="cluster", n_classes=5)
    found = deblora.debiased_centers(None, LABELS, ASSIGNMENTS, CENTERS, **options)
    assert found[[0, 1, 3]].equal(CENTERS[[0, 1, 2]]) and found[[2, 4]].isnan().all()
    found = deblora.debiased_centers(None, LABELS, ASSIGNMENTS, CENTERS, chosen={1: 0, 4: 2}, **options)
    assert found[[0, 1, 3, 4]].equal(CENTERS[[0, 0, 2, 2]]) and found[2].isnan().all()


@pytest.mark.filterwarnings("ignore:.*are noise")
@pytest.mark.parametrize(
    "change, says",
    [
        (dict(features=torch.zeros(8, 2)), r"labels must be of shape \(8,\), one per row of features, got \(9,\)"),
        (dict(features=torch.zeros(9, 3)), "centers must be 3 wide, as features, got 2"),
        (dict(features=torch.full((9, 2), torch.nan)), "features must be finite"),
        (dict(centers=CENTERS * torch.inf), "centers must be finite"),
        (dict(centers=CENTERS[:2]), "assignments must be in -1..1, got 2 at index 3"),
        (dict(labels=LABELS[:-1] + [-1]), "labels must be at least 0, got -1 at index 8"),
        (dict(n_classes=3), "labels must be in 0..2, got 3 at index 7"),
        (dict(variant="nearest"), "variant must be 'weighted' or 'cluster'"),
        (dict(chosen={0: 1}), "chosen is for variant='cluster'"),
        (dict(chosen={9: 1}, variant="cluster"), "chosen classes must be in 0..4, got 9"),
        (dict(chosen={0: 7}, variant="cluster"), "chosen clusters must be in 0..2, got 7"),
    ],
)
def test_debiased_centers_refuse(change, says):
    given = dict(features=None, labels=LABELS, assignments=ASSIGNMENTS, centers=CENTERS) | change
    with pytest.raises(ValueError, match=says):
        deblora.debiased_centers(**given)


COUNTS = [100, 11, 10, 9, 1, 0]  # ir: 1, below 10, 10, above 10, 100, absent
TAILED = torch.arange(6).repeat_interleave(torch.tensor(COUNTS))


def test_alpha_at_its_border():
    assert deblora.auto_alpha(torch.tensor(COUNTS)).tolist() == [1, 1, 1, 0.9, 0.1, 0]
    assert deblora.auto_alpha(np.array([7, 7])).tolist() == [1, 1]
    million = 10 * 33_333_333
    assert (deblora.auto_alpha([million, 33_333_333, 33_333_332]) < 1).tolist() == [False, False, True]
    with pytest.raises(ValueError, match="counts must have a class with rows"):
        deblora.auto_alpha([0, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_calibration_by_hand(dtype):
    z = torch.randn(131, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    mu = torch.arange(18.0, dtype=torch.float64).view(6, 3)
    mu[[0, 1, 2, 5]] = torch.nan  # nobody goes there
    found = deblora.calibrate(z, TAILED, mu)
    assert found.dtype == dtype and found[:121].equal(z[:121])
    kind = torch.promote_types(dtype, torch.float32)
    wanted = (0.9 * z[121:130].to(kind) + 0.1 * mu[3].to(kind)), (0.1 * z[130:].to(kind) + 0.9 * mu[4].to(kind))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[121:], torch.cat(wanted).to(dtype), rtol=2 * eps, atol=2 * eps)


def test_calibration_of_named_classes():
    z, mu = torch.ones(131, 1).double(), torch.full((6, 1), 3.0).double()
    mean = {0.5: 2.0, 0.25: 2.5, 0.0: 3.0, 1.0: 1.0}
    for alpha, value in mean.items():
        found = deblora.calibrate(z, TAILED, mu, alpha)
        assert found[:121].eq(1).all() and found[121:].eq(value).all()  # without tail= those of ir > 10
        found = deblora.calibrate(z, TAILED.numpy(), mu.numpy(), alpha, tail=[1, 0])
        assert found[:111].eq(value).all() and found[111:].eq(1).all()
    assert deblora.calibrate(z, TAILED, mu, tail=range(6)).equal(deblora.calibrate(z, TAILED, mu))
    assert deblora.calibrate(z, TAILED, mu, tail=[]).equal(z)
    by_class = torch.tensor([0.5, 1, 1, 0.25, 0, 0])
    found = deblora.calibrate(z, TAILED, mu, by_class, tail=torch.arange(6))
    assert found[:100].eq(2).all() and found[100:121].eq(1).all() and found[121:130].eq(2.5).all() and found[130] == 3


def test_calibration_a_part_at_a_time(tmp_path):
    z = torch.randn(131, 3, generator=torch.Generator().manual_seed(1)).numpy()
    mu = np.arange(18.0).reshape(6, 3)
    wanted, before = deblora.calibrate(z, TAILED, mu), z.copy()
    assert type(wanted) is np.ndarray and wanted.dtype == np.float32 and not np.array_equal(wanted, z)
    starts, parts = zip(*deblora.calibrated_batches(z, TAILED, mu, batch_size=50), strict=True)
    assert starts == (0, 50, 100) and np.array_equal(torch.cat(parts).numpy(), wanted)
    out = np.lib.format.open_memmap(tmp_path / "out.npy", mode="w+", dtype=np.float32, shape=(131, 3))
    assert deblora.calibrate(z, TAILED, mu, out=out) is out and np.array_equal(np.load(tmp_path / "out.npy"), wanted)
    mapped = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert np.array_equal(deblora.calibrate(mapped, TAILED, mu), deblora.calibrate(wanted, TAILED, mu))
    tensor = torch.empty(131, 3)
    assert deblora.calibrate(z, TAILED, mu, out=tensor) is tensor and np.array_equal(tensor.numpy(), wanted)
    assert np.array_equal(z, before)


def test_calibration_from_store_to_store(tmp_path, monkeypatch):
    z = torch.randn(131, 3, generator=torch.Generator().manual_seed(1)).numpy()
    mu, names = np.arange(18.0).reshape(6, 3), [f"{i}.png" for i in range(131)]
    with deblora.FeatureStore.create(tmp_path / "from", 3) as store:
        store.append(z, labels=TAILED, names=names, splits=["train"] * 100 + ["test"] * 31)
    monkeypatch.setattr("rsfast.deblora.arrays.BATCH_BYTES", 50 * 12)
    with deblora.FeatureStore.create(tmp_path / "to", 3) as out:
        assert deblora.calibrate(store, store.labels, mu, out=out) is out
    assert np.array_equal(out.features, deblora.calibrate(z, TAILED, mu)) and out.names == names
    assert out.labels.tolist() == TAILED.tolist() and out.splits == store.splits
    for other, says in ((store, "another store than features"), (deblora.FeatureStore.create(tmp_path / "x", 2), "3")):
        with pytest.raises(ValueError, match=f"out must be .*{says}"):
            deblora.calibrate(store, store.labels, mu, out=other)
    with pytest.raises(TypeError, match="out must be an array, a tensor or a FeatureStore, got list"):
        deblora.calibrate(z, TAILED, mu, out=[])
    found = deblora.cluster_features(store, 4, memory_limit=0, max_iter=1, batch_size=32)
    assert found.method == "minibatch" and len(store) == 131


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(labels=TAILED[1:]), r"labels must be of shape \(131,\)"),
        (dict(mu=torch.zeros(4, 2)), "labels must be in 0..3, got 4 at index 130"),
        (dict(mu=torch.zeros(6, 3)), "mu must be 2 wide, as features, got 3"),
        (dict(mu=torch.full((6, 2), torch.nan)), r"mu must be finite .*class 3, of 9 row\(s\), is not"),
        (dict(features=torch.full((131, 2), torch.inf)), r"features must be finite, .* in 131 row\(s\)"),
        (dict(alpha="half"), "alpha must be 'auto', a number"),
        (dict(alpha=1.5), r"alpha must be in 0..1, got 1.5"),
        (dict(alpha=float("nan")), "alpha must be in 0..1"),
        (dict(alpha=[0.5, 0.5]), r"alpha must be a number or of shape \(6,\)"),
        (dict(tail=[6]), "tail must be in 0..5, got 6 at index 0"),
        (dict(out=np.zeros((131, 2))), "out must be like features, torch.float32 of .* got torch.float64 of"),
        (dict(out=torch.zeros(130, 2)), r"got torch.float32 of \(130, 2\)"),
    ],
)
def test_calibration_refuses_before_it_writes(change, says):
    out = torch.full((131, 2), 7.0)
    given = dict(features=torch.zeros(131, 2), labels=TAILED, mu=torch.zeros(6, 2), out=out) | change
    with pytest.raises(ValueError, match=says):
        deblora.calibrate(**given)
    assert out.eq(7).all()


def test_augmented_as_released():
    z = torch.randn(131, 2, generator=torch.Generator().manual_seed(2))
    moved = deblora.calibrate(z, TAILED, torch.zeros(6, 2), 0.5)
    features, labels = deblora.augment(z.numpy(), TAILED.numpy(), moved.numpy())
    assert np.array_equal(features, torch.cat([z, 0.5 * z[121:]])) and features.dtype == np.float32
    assert labels.tolist() == TAILED.tolist() + [3] * 9 + [4]
    assert len(deblora.augment(z, TAILED, moved, tail=[4])[1]) == 132
    with pytest.raises(ValueError, match="calibrated must be like features"):
        deblora.augment(z, TAILED, moved[1:])
