"""What the estimators take, give back, and refuse by name."""

import warnings

import numpy as np
import pytest
import scipy.sparse
import torch

import rsfast
from rsfast.kmeans.functional import lloyd, minibatch

KINDS = (rsfast.KMeans, rsfast.MiniBatchKMeans)
X = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32) * [1, 2, 3, 4]
X = X.astype(np.float32)


class Exported:
    """An array of another library: nothing but DLPack, and a namespace that takes it back."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self):
        return Library


class Library:
    from_dlpack = staticmethod(lambda t: Exported(torch.from_dlpack(t)))


class Unreturnable(Exported):
    __array_namespace__ = None


Unreturnable.__array_namespace__ = property(lambda self: (_ for _ in ()).throw(AttributeError()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tensors_come_back_as_tensors(kind, dtype, device):
    x = torch.from_numpy(X).to(device, dtype)
    found = kind(3, random_state=0).fit(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = dict(cluster_centers_=wide, labels_=torch.int64, counts_=torch.float64)
    for name, expected in kinds.items():
        got = getattr(found, name)
        assert isinstance(got, torch.Tensor) and got.dtype == expected and got.device == x.device, name
    assert found.predict(x).device == x.device and found.transform(x).dtype == wide
    assert isinstance(found.inertia_, float) and isinstance(found.n_iter_, int) and found.n_features_in_ == 4
    exact = kind(3, random_state=0).fit(x.double())  # 16-bit rows are the numbers they are
    if kind is rsfast.KMeans:
        assert torch.equal(exact.labels_, found.labels_)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_comes_back_as_numpy(kind):
    of_tensor = kind(3, random_state=0).fit(torch.from_numpy(X))
    for x, dtype in (
        (X, np.float32),
        (np.asfortranarray(X), np.float32),
        (np.repeat(X, 2, 0)[::2], np.float32),
        (X.astype(">f4"), np.float32),
        (X.astype(object), np.float64),
        (X.tolist(), np.float64),
    ):
        found = kind(3, random_state=0).fit(x)
        for name in ("cluster_centers_", "labels_", "counts_"):
            assert type(getattr(found, name)) is np.ndarray
        assert found.cluster_centers_.dtype == dtype and type(found.predict(x)) is np.ndarray
        np.testing.assert_array_equal(found.labels_, of_tensor.labels_)
        if dtype == np.float32:
            np.testing.assert_array_equal(found.cluster_centers_, of_tensor.cluster_centers_)
    integers = np.round(X).astype(np.int8)
    np.testing.assert_array_equal(kind(3, random_state=0).fit(integers).cluster_centers_,
                                  kind(3, random_state=0).fit(integers.astype(float)).cluster_centers_)  # fmt: skip
    np.testing.assert_array_equal(of_tensor.predict(X[::-1, ::-1]), of_tensor.predict(X[::-1, ::-1].copy()))
    half = kind(3, random_state=0).fit(X.astype(np.float16))
    assert half.cluster_centers_.dtype == np.float32


def test_what_has_dlpack_comes_back_through_it():
    of_tensor = rsfast.KMeans(3, random_state=0).fit(torch.from_numpy(X))
    for kind, back in ((Exported, Exported), (Unreturnable, torch.Tensor)):
        x = kind(torch.from_numpy(X))
        found = rsfast.KMeans(3, random_state=0).fit(x, sample_weight=Exported(torch.ones(60)))
        assert type(found.labels_) is back and type(found.predict(x)) is back
        centers = getattr(found.cluster_centers_, "tensor", found.cluster_centers_)
        torch.testing.assert_close(centers, of_tensor.cluster_centers_, rtol=1e-6, atol=1e-6)


def test_what_predicts_decides_what_comes_back():
    found = rsfast.KMeans(3, random_state=0).fit(X)
    labels = found.predict(torch.from_numpy(X))
    assert isinstance(labels, torch.Tensor) and np.array_equal(labels, found.labels_)
    stream = rsfast.MiniBatchKMeans(3, random_state=0).partial_fit(X[:30]).partial_fit(torch.from_numpy(X[30:]))
    assert isinstance(stream.cluster_centers_, torch.Tensor) and stream.counts_.sum() == 60


def test_strided_rows_and_read_only_memory_are_taken_as_they_lie():
    wide = np.concatenate([X, np.full_like(X, np.nan)], 1)
    of_part = rsfast.KMeans(3, random_state=0).fit(torch.from_numpy(wide)[:, :4])
    whole = rsfast.KMeans(3, random_state=0).fit(X)
    np.testing.assert_array_equal(of_part.cluster_centers_, whole.cluster_centers_)
    fixed = X.copy()
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(rsfast.KMeans(3, random_state=0).fit(fixed).labels_, whole.labels_)


@pytest.mark.parametrize("kind", KINDS)
def test_data_are_left_as_they_were(kind):
    x, w, init = X.copy(), np.ones(60), X[:3].copy()
    kind(3, init=init).fit(x, sample_weight=w)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(init, X[:3])
    assert (w == 1).all()


def bad(row, value):
    x = X.copy()
    x[row, 2] = value
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "x, options, weights, message",
    [
        (bad(17, np.nan), {}, None, "X must be finite, got NaN or infinity in row 17"),
        (bad(59, -np.inf), {}, None, "X must be finite, got NaN or infinity in row 59"),
        (X[:2], {}, None, "n_samples=2 should be >= n_clusters=3"),
        (X[:0], {}, None, r"0 sample\(s\) \(shape=\(0, 4\)\)"),
        (X[0], {}, None, r"got \(4,\). Reshape your data"),
        (X.astype(complex), {}, None, "Complex data not supported"),
        (X.astype(str), {}, None, "X must be of numbers, got dtype <U"),
        (torch.ones(5, 2, dtype=torch.int32), {}, None, "X must be of fp32, fp16, bf16 or fp64, got torch.int32"),
        (X, {}, np.ones(59), r"sample_weight must be of shape \(60,\).*got \(59,\)"),
        (X, {}, bad(17, -1.0)[:, 2], "sample_weight must be finite and not negative, got -.* at index"),
        (X, {}, np.where(np.arange(60) == 9, np.nan, 1), "sample_weight .* got nan at index 9"),
        (X, {}, np.zeros(60), "all weights are zero"),
        (X, dict(init=X[:3, :2]), None, r"init must be of shape \(3, 4\).*got \(3, 2\)"),
        (X, dict(init=X[:2]), None, r"init must be of shape \(3, 4\).*got \(2, 4\)"),
        (X, dict(init=bad(1, np.nan)[:3]), None, "init must be finite, got NaN or infinity in row 1"),
        (X, dict(init="best"), None, "init must be 'k-means\\+\\+', 'random' or an array"),
        (X, dict(n_clusters=0), None, "n_clusters must be an int of at least 1, got 0"),
        (X, dict(n_clusters=2.5), None, "n_clusters must be an int of at least 1, got 2.5"),
        (X, dict(n_init=0), None, "n_init must be an int of at least 1, got 0"),
        (X, dict(n_init="many"), None, "n_init must be an int of at least 1, got 'many'"),
        (X, dict(max_iter=0), None, "max_iter must be an int of at least 1, got 0"),
        (X, dict(tol=-1), None, "tol must be a number of at least 0, got -1"),
        (X, dict(tol=np.nan), None, "tol must be a number of at least 0, got nan"),
        (X, dict(precision="half"), None, "precision must be 'exact' or 'fast', got 'half'"),
        (X, dict(impl="slow"), None, "impl must be 'auto', 'fused' or 'reference', got 'slow'"),
        (X, dict(random_state=-1), None, "random_state must be .* got -1"),
        (X, dict(random_state="x"), None, "random_state must be .* got 'x'"),
        (X, dict(rho=0.9), None, "rho=0.9 asks for .* 23 points in each of 3 clusters, 69 in all, but there are 60"),
        (X, dict(size_min=21), None, "size_min asks for 63 points in 3 clusters, but there are 60"),
        (X, dict(size_max=19), None, "size_max leaves room for 57 points in 3 clusters; there are 60"),
        (X, dict(size_min=[1, 2]), None, r"size_min must be an int or an integer tensor of shape \(3,\)"),
    ],
)
def test_bad_input_is_refused_by_name_and_nothing_is_lost(kind, x, options, weights, message):
    kmeans = kind(3, random_state=0).fit(X)
    before = dict(kmeans.__dict__)
    kmeans.set_params(**options)
    with pytest.raises(ValueError, match=message):
        kmeans.fit(x, sample_weight=weights)
    for name in before:
        if name.endswith("_"):
            assert getattr(kmeans, name) is before[name], name


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch_size=0), "batch_size must be an int of at least 1, got 0"),
        (dict(init_size=2), "init_size must be an int of at least 3, got 2"),
        (dict(max_no_improvement=-1), "max_no_improvement must be an int of at least 0, got -1"),
        (dict(reassignment_ratio=1.5), "reassignment_ratio must be a number in 0..1, got 1.5"),
    ],
)
def test_bad_parameters_of_mini_batches(options, message):
    with pytest.raises(ValueError, match=message):
        rsfast.MiniBatchKMeans(3, **options).fit(X)


def test_a_bad_batch_leaves_the_stream_as_it_was():
    stream = rsfast.MiniBatchKMeans(3, random_state=0).partial_fit(X)
    before = dict(stream.__dict__)
    for x, message in (
        (bad(3, np.inf), "row 3"),
        (X[:, :3], "X has 3 features, but MiniBatchKMeans is expecting 4 features"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.partial_fit(x)
        with pytest.raises(ValueError, match=message):
            stream.predict(x)
    stream.size_min = 3
    with pytest.raises(ValueError, match="partial_fit takes rho"):
        stream.partial_fit(X)
    stream.size_min = None
    assert stream.__dict__ == before


def test_sparse_data_are_refused():
    for x in (scipy.sparse.csr_array(X), torch.from_numpy(X).to_sparse()):
        with pytest.raises(TypeError, match="sparse .*dense data is required"):
            rsfast.KMeans(3).fit(x)


def test_loops_refuse_by_name():
    x = torch.from_numpy(X)
    for call, message in (
        (lambda: lloyd(x, x[:3, :2]), r"centers must have shape \(K, 4\)"),
        (lambda: lloyd(x, x[:3], max_iter=0), "max_iter must be an int of at least 1, got 0"),
        (
            lambda: lloyd(x, x[:3], weights=-torch.ones(60)),
            "weights must be finite and at least 0, got -1.0 at index 0",
        ),
        (lambda: minibatch(x, x[:3], max_steps=True), "max_steps must be an int of at least 1, got True"),
        (lambda: minibatch(x, x[:3], max_steps=1, batch_size=0), "batch_size must be"),
        (lambda: rsfast.kmeans_plusplus(x, 61), r"n_clusters must be an int in 1..60, got 61"),
        (lambda: rsfast.kmeans_plusplus(x, 3, candidates=0), "candidates must be an int of at least 1, got 0"),
        (lambda: rsfast.kmeans_plusplus(x.log(), 3, check_finite=True), "x must be finite, got NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
