"""The estimators against scikit-learn's, and against what their definitions say."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import sklearn.cluster
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

import rsfast
from rsfast.kmeans.estimators.start import tolerance
from rsfast.kmeans.functional import batches, lloyd, loop, minibatch, minibatch_step

KINDS = (rsfast.KMeans, rsfast.MiniBatchKMeans)
EXPECTED_TO_FAIL = {
    "check_sample_weight_equivalence_on_dense_data": "the rows are shuffled there, and a seed draws by their order; "
    "scikit-learn expects its own k-means to fail too",
}


def blobs(n=400, d=6, k=8, dtype=np.float64, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) + 2 * rng.standard_normal((k, d))[rng.integers(k, size=n)] + offset
    return x.astype(dtype)


def theirs(x, init, sample_weight=None, **options):
    return sklearn.cluster.KMeans(len(init), init=init, n_init=1, **options).fit(x, sample_weight=sample_weight)


def assert_same_fit(ours, their, x):
    """Labels exactly; numbers within what float32 or float64 sums of the rows can differ by."""
    eps = np.finfo(x.dtype).eps
    np.testing.assert_array_equal(ours.labels_, their.labels_)
    assert ours.n_iter_ == their.n_iter_
    bound = eps * np.sqrt(len(x)) * np.abs(x).max()
    assert np.abs(ours.cluster_centers_ - their.cluster_centers_).max() <= bound
    assert abs(ours.inertia_ - their.inertia_) <= eps * len(x) * their.inertia_


@pytest.mark.parametrize("kind", KINDS)
def test_scikit_learns_own_checks_pass(kind):
    options = dict(max_iter=5) if kind is rsfast.KMeans else dict(max_iter=5, batch_size=10)
    estimator = kind(2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of data too small, and of not inheriting from BaseEstimator
        results = estimator_checks.check_estimator(
            estimator, expected_failed_checks=EXPECTED_TO_FAIL, on_fail="raise", on_skip=None
        )
        for check in estimator_checks._yield_clustering_checks(estimator):  # else only run on heirs of ClusterMixin
            check(kind.__name__, estimator)
    outcomes = [(r["check_name"], r["status"]) for r in results]
    assert sum(status == "passed" for _, status in outcomes) >= 50
    assert {name for name, status in outcomes if status == "xfail"} == set(EXPECTED_TO_FAIL)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_same_start_same_result(dtype, offset):
    x = blobs(dtype=dtype, offset=offset)
    assert_same_fit(rsfast.KMeans(8, init=x[:8]).fit(x), theirs(x, x[:8]), x)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_same_with_weights(dtype):
    x = blobs(dtype=dtype)
    w = np.random.default_rng(1).random(len(x)).astype(dtype) + 0.1
    assert_same_fit(rsfast.KMeans(8, init=x[:8]).fit(x, sample_weight=w), theirs(x, x[:8], w), x)


@pytest.mark.parametrize("max_iter", [1, 2, 5])
def test_same_where_it_is_cut_short(max_iter):
    x = blobs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_fit(rsfast.KMeans(8, init=x[:8], max_iter=max_iter).fit(x), theirs(x, x[:8], max_iter=max_iter), x)


@pytest.mark.parametrize("tol", [0, 1e-4, 1e-2, 0.1])
def test_tolerance_is_scaled_alike(tol):
    x = blobs(n=1500, offset=20.0) * np.array([1, 2, 3, 1, 0.1, 0])
    assert_same_fit(rsfast.KMeans(8, init=x[:8], tol=tol).fit(x), theirs(x, x[:8], tol=tol), x)


@pytest.mark.parametrize("lost", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_clusters_empty_at_the_start_go_to_the_farthest_rows(lost, weighted):
    x = blobs()
    init = np.concatenate([x[: 8 - lost], np.full((lost, 6), 1e3) + np.arange(lost)[:, None]])
    w = np.random.default_rng(2).random(len(x)) + 0.5 if weighted else None
    ours = rsfast.KMeans(8, init=init).fit(x, sample_weight=w)
    assert_same_fit(ours, theirs(x, init, w), x)
    assert (ours.counts_ > 0).all()


def test_farthest_rows_are_given_out_in_order():
    x = torch.tensor([[0.0], [10.0], [-20.0], [1.0], [-20.0]])
    got = lloyd(x, torch.tensor([[0.0], [90.0], [91.0], [92.0]]), max_iter=1)
    # rows 2 and 4 are as far, the first comes first; row 0, row 3 and centre 0 are what is left
    assert got.centers.flatten().tolist() == [0.5, -20.0, -20.0, 10.0]
    assert got.n_iter == 1


def test_a_row_without_weight_is_no_centre():
    x = torch.tensor([[0.0], [1.0], [500.0], [2.0]])
    got = lloyd(x, torch.tensor([[0.0], [1e4]]), weights=torch.tensor([1.0, 1, 0, 1]))
    assert got.centers.flatten().tolist() == [0.5, 2.0] and got.labels.tolist() == [0, 0, 1, 1]
    assert got.counts.tolist() == [2, 1] and got.inertia == 0.5


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_what_is_returned_belongs_together(precision):
    x = torch.from_numpy(blobs(n=700, dtype=np.float32))
    for kind in KINDS:
        found = kind(8, random_state=0, max_iter=3, precision=precision).fit(x)
        distances = torch.cdist(x.double(), found.cluster_centers_.double()).square()
        assert torch.equal(found.labels_, distances.argmin(1)) and torch.equal(found.predict(x), found.labels_)
        np.testing.assert_allclose(found.inertia_, distances.min(1).values.sum(), rtol=1e-6)
        np.testing.assert_allclose(found.score(x), -found.inertia_, rtol=1e-12)
        np.testing.assert_allclose(found.transform(x), distances.sqrt(), atol=1e-4)
        assert found.cluster_centers_.dtype == torch.float32 and found.labels_.dtype == torch.int64
        if kind is rsfast.KMeans:
            assert torch.equal(found.counts_, found.labels_.bincount().double())


def test_seldom_looks_change_nothing(monkeypatch):
    """On a GPU steps go on unseen after the end, or past an empty cluster: they are as if they had not been."""
    x = torch.from_numpy(blobs(dtype=np.float32))
    init = torch.cat([x[:6], torch.full((2, 6), 1e3)])
    options = dict(batch_size=50, max_steps=60, seed=3, max_no_improvement=4)

    def results(patience):
        monkeypatch.setattr(loop, "patience", lambda x: patience)
        monkeypatch.setattr(batches, "patience", lambda x: patience)
        ends = lloyd(x, init), lloyd(x, x[:8], max_iter=5), lloyd(x, x[:8], tol=1.0), lloyd(x, init, max_iter=1)
        return [*sum(ends, ()), *minibatch(x, init, **options)[:3], *minibatch(x, init, tol=0.05, **options)[:3]]

    expected = results(1)
    assert 1 < expected[-1] < expected[-4] < 60  # tol and patience both ended a run
    for patience in (2, 16):
        assert all(torch.equal(a, b) for a, b in zip(results(patience), expected, strict=True)), patience


def test_the_best_of_several_starts_is_kept():
    x = blobs()
    inertias = [rsfast.KMeans(8, init="random", n_init=n, random_state=1).fit(x).inertia_ for n in range(1, 11)]
    assert inertias == sorted(inertias, reverse=True) and inertias[0] > inertias[-1]
    assert rsfast.KMeans(8, init="random", random_state=1).fit(x).inertia_ == inertias[-1]  # auto


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_the_same_bits(kind):
    x = torch.from_numpy(blobs(dtype=np.float32))
    a, b, c = (kind(5, random_state=s, init="random").fit(x) for s in (7, 7, 8))
    assert torch.equal(a.cluster_centers_, b.cluster_centers_) and a.inertia_ == b.inertia_
    assert not torch.equal(a.cluster_centers_, c.cluster_centers_)
    torch.manual_seed(4)
    d = kind(5).fit(x)
    torch.manual_seed(4)
    assert torch.equal(d.cluster_centers_, kind(5).fit(x).cluster_centers_)
    for generator in (np.random.default_rng, np.random.RandomState, torch.Generator().manual_seed):
        e, f = (kind(5, random_state=generator(1)).fit(x) for _ in range(2))
        assert torch.equal(e.cluster_centers_, f.cluster_centers_)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_autocast_stay_outside(kind):
    x = torch.from_numpy(np.random.default_rng(0).random((400, 6), dtype=np.float32)) + 5  # nothing bf16 could decide
    plain = kind(5, random_state=0).fit(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = kind(5, random_state=0).fit(x.clone().requires_grad_())
        assert torch.equal(other.predict(x), plain.labels_)
    assert torch.equal(plain.cluster_centers_, other.cluster_centers_) and not other.cluster_centers_.requires_grad


def test_partial_fit_is_its_definition():
    x, w = blobs(n=240), np.random.default_rng(5).random(240)
    w[::7] = 0
    kmeans = rsfast.MiniBatchKMeans(6, init=x[:6], reassignment_ratio=0)
    centers, counts = x[:6].copy(), np.zeros(6)
    for number, start in enumerate(range(0, 240, 40)):
        rows, weight = x[start : start + 40], w[start : start + 40]
        kmeans.partial_fit(rows, sample_weight=weight)
        labels = ((rows[:, None] - centers) ** 2).sum(2).argmin(1)
        for k in range(6):
            added = weight[labels == k].sum()
            if added:
                centers[k] = counts[k] * centers[k] + (weight[labels == k, None] * rows[labels == k]).sum(0)
                counts[k] += added
                centers[k] /= counts[k]
        np.testing.assert_allclose(kmeans.cluster_centers_, centers, rtol=0, atol=1e-13)
        np.testing.assert_allclose(kmeans.counts_, counts, rtol=1e-13)
        now = ((rows[:, None] - centers) ** 2).sum(2)
        np.testing.assert_array_equal(kmeans.labels_, now.argmin(1))
        np.testing.assert_allclose(kmeans.inertia_, (weight * now.min(1)).sum(), rtol=1e-12)
        assert kmeans.n_steps_ == number + 1


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_partial_fit_is_scikit_learns(dtype):
    x = blobs(n=300, dtype=dtype)
    options = dict(init=x[:6], reassignment_ratio=0)
    ours, their = rsfast.MiniBatchKMeans(6, **options), sklearn.cluster.MiniBatchKMeans(6, n_init=1, **options)
    for start in range(0, 300, 50):
        for kmeans in (ours, their):
            kmeans.partial_fit(x[start : start + 50])
        np.testing.assert_array_equal(ours.labels_, their.labels_)
        np.testing.assert_allclose(ours.cluster_centers_, their.cluster_centers_, atol=100 * np.finfo(dtype).eps)
        np.testing.assert_array_equal(ours.counts_, their._counts)


def test_a_stream_goes_on_from_a_copy_bit_for_bit():
    x = torch.from_numpy(blobs(n=300, dtype=np.float32))
    first = rsfast.MiniBatchKMeans(6, random_state=2, reassignment_ratio=0.5).fit(x[:100])
    others = [pickle.loads(pickle.dumps(first)), copy.deepcopy(first)]
    for rows in x[100:].split(20):
        for kmeans in (first, *others):
            kmeans.partial_fit(rows)
    for other in others:
        assert torch.equal(other.cluster_centers_, first.cluster_centers_) and other.n_steps_ == first.n_steps_


def test_poor_centres_become_rows_of_the_batch():
    batch = torch.arange(8.0)[:, None] + 100
    centers, counts = torch.tensor([[104.0], [-1.0], [-2.0], [-3.0]]), torch.tensor([10.0, 1, 0, 5]).double()
    step = minibatch_step(batch, centers, counts, reassignment_ratio=0.25, order=torch.arange(8).flip(0))
    # all rows go to centre 0, which then counts 18: below 4.5 are 1 and 2, and 5 is the least of the rest
    assert step.centers[1:].flatten().tolist() == [107.0, 106.0, -3.0] and step.counts.tolist() == [18, 5, 5, 5]
    few = minibatch_step(batch[:3], centers, counts, reassignment_ratio=1.0)  # one at most: the least count
    assert few.centers[1:].flatten().tolist() == [-1.0, 100.0, -3.0] and few.counts.tolist() == [13, 1, 1, 5]
    assert minibatch_step(batch, centers, counts).counts.tolist() == [18, 1, 0, 5]


def test_poor_centres_are_looked_at_every_ten_rows_a_cluster():
    """Or at once, where one has no weight yet. 30 rows for 3 clusters; each batch of 8 goes to centre 0."""
    batch, stream = np.ones((8, 1)), rsfast.MiniBatchKMeans(3, init=[[1.0], [50.0], [60.0]], random_state=0)
    stream.partial_fit(np.array([[1.0], [1], [1], [1], [50], [60]]))  # all counts are 0: looked at, none is poor
    stream.set_params(reassignment_ratio=0.3)
    kept = [stream.partial_fit(batch).cluster_centers_[2, 0] == 60 for _ in range(4)]
    assert kept == [True, True, True, False]  # rows since: 8, 16, 24, 32

    state = batches._Loop(torch.zeros(20, 1), torch.zeros(3, 1), 8, 0.0, None)
    assert [state.ratio(0.5).item() for _ in range(2)] == [0.5, 0.5]  # as long as a count is 0
    state.counts += 1
    assert [state.ratio(0.5).item() for _ in range(8)] == [0, 0, 0, 0.5] * 2


def test_a_stream_keeps_its_seed():
    x = blobs(n=50)
    found = []
    for seed in (5, 5, 6):
        stream = rsfast.MiniBatchKMeans(6, init=x[:6] + 50 * np.arange(6)[:, None], random_state=seed)
        found.append(stream.partial_fit(x).partial_fit(x).partial_fit(x).cluster_centers_)
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    stream = rsfast.MiniBatchKMeans(6, init=x[:6] + 50 * np.arange(6)[:, None], random_state=5, reassignment_ratio=0)
    stream.partial_fit(x).set_params(reassignment_ratio=1)
    other = copy.deepcopy(stream)
    other._seed += 1
    assert not np.array_equal(stream.partial_fit(x).cluster_centers_, other.partial_fit(x).cluster_centers_)


def test_the_first_batch_tells_nothing_and_the_last_ones_end_it():
    """All rows lie on their centre from the second batch on: what follows is no improvement on nothing."""
    x = torch.zeros(20, 1)
    options = dict(batch_size=4, max_steps=50, reassignment_ratio=0)
    for patience in (1, 3):
        got = minibatch(x, torch.ones(1, 1), max_no_improvement=patience, **options)
        assert got.n_steps == 2 + patience
    assert minibatch(x, torch.ones(1, 1), max_no_improvement=None, **options).n_steps == 50
    assert minibatch(x, torch.ones(1, 1), max_no_improvement=None, tol=1e-9, **options).n_steps == 2


def test_a_batch_is_no_larger_than_the_data():
    found = rsfast.MiniBatchKMeans(2, max_iter=3, max_no_improvement=None, random_state=0).fit(blobs(n=60))
    assert found.n_steps_ == 3 and found.n_iter_ == 3 and found.counts_.sum() == 180
    found = rsfast.MiniBatchKMeans(2, max_iter=3, max_no_improvement=None, batch_size=25).fit(blobs(n=60))
    assert found.n_steps_ == 7 and found.n_iter_ == 3


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_tolerance_is_a_share_of_the_mean_variance(kind):
    x = (blobs(n=3000, offset=20.0) * np.array([1, 2, 3, 1, 0.1, 0])).astype(kind)
    expected = 0.5 * x.astype(np.float64).var(0).mean()
    np.testing.assert_allclose(tolerance(torch.from_numpy(x), 0.5), expected, rtol=1e-12)


def test_batches_are_drawn_by_weight():
    x, w = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.0, 0.0, 3.0])
    got = minibatch(x, x, batch_size=500, max_steps=4, max_no_improvement=None, reassignment_ratio=0, weights=w)
    assert got.counts[1] == 0 and got.counts.sum() == 2000
    assert abs(got.counts[2] - 1500) < 5 * (2000 * 3 / 16) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_of_rows_all_alike_one_cluster_is_found_and_said(kind):
    with pytest.warns(ConvergenceWarning, match=r"clusters \(1\).*n_clusters \(3\)"):
        found = rsfast.KMeans(3, random_state=0).fit(np.ones((10, 2)))
    assert found.inertia_ == 0 and (found.labels_ == found.labels_[0]).all() and found.n_iter_ <= 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isfinite(kind(3, random_state=0).fit(np.ones((10, 2))).cluster_centers_).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_one_cluster_and_as_many_as_rows(kind, init):
    x = blobs(n=12)
    one = kind(1, init=init, random_state=0, max_no_improvement=None) if kind is not rsfast.KMeans else kind(1)
    one.fit(x)
    np.testing.assert_allclose(one.cluster_centers_[0], x.mean(0), atol=1e-12 if kind is rsfast.KMeans else 1)
    assert not one.labels_.any()
    every = kind(12, init=init, random_state=0, **({} if kind is rsfast.KMeans else dict(reassignment_ratio=0))).fit(x)
    assert sorted(every.labels_) == list(range(12)) and every.inertia_ < 1e-24


def test_works_inside_scikit_learn():
    x = blobs(n=60)
    pipeline = make_pipeline(StandardScaler(), rsfast.KMeans(3, random_state=0))
    labels = pipeline.fit_predict(x)
    np.testing.assert_array_equal(pipeline.predict(x), labels)
    copied = clone(pipeline[-1])
    assert copied.get_params() == pipeline[-1].get_params() and not hasattr(copied, "labels_")
    assert pipeline.fit_transform(x).shape == (60, 3)
    assert list(pipeline.get_feature_names_out()) == ["kmeans0", "kmeans1", "kmeans2"]
    with pytest.raises(NotFittedError, match="KMeans is not fitted yet"):
        copied.predict(x)
    assert repr(rsfast.KMeans(3, tol=0.1)) == "KMeans(n_clusters=3, tol=0.1)"
    with pytest.raises(ValueError, match="'clusters' for estimator KMeans.*n_clusters"):
        copied.set_params(clusters=3)
