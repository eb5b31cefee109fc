"""Clusters of features: in memory, over rows on disk within a bound of memory, killed and started again."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import rsfast
from rsfast import deblora
from rsfast.deblora.debiasing import streaming
from rsfast.deblora.debiasing.scaling import Scaling

K = 4


def blobs(n=240, dim=6, dtype=np.float32):
    """Rows about K places, most of them about the first."""
    g = np.random.default_rng(0)
    places = 8 * g.standard_normal((K, dim))
    return (places[np.minimum(g.integers(0, 3 * K, n), 3 * K - 1) // 3 * (g.random(n) > 0.4)]
            + g.standard_normal((n, dim))).astype(dtype)  # fmt: skip


def on_disk(tmp_path, x):
    np.save(tmp_path / "x.npy", x)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("centers", "assignments"))


@pytest.mark.parametrize("rho", [None, 1.0, 1.5])
@pytest.mark.parametrize("method", ["kmeans", "minibatch"])
def test_in_memory_it_is_the_estimator(method, rho):
    x = torch.from_numpy(blobs())
    found = deblora.cluster_features(x, K, method=method, rho=rho, seed=3, batch_size=64)
    model = dict(kmeans=rsfast.KMeans(K, rho=rho, random_state=3)).get(
        method, rsfast.MiniBatchKMeans(K, rho=rho, random_state=3, batch_size=64)
    )
    model.fit(x)
    assert found.centers.equal(model.cluster_centers_) and found.assignments.equal(model.labels_)
    assert found.counts.equal(found.assignments.bincount(minlength=K)) and found.method == method
    assert found.certified is (None if rho is None else True)
    assert rho is None or found.counts.min() >= 240 / (K * rho)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("rho", [None, 1.0, 1.5])
def test_over_rows_on_disk_labels_are_those_of_least_cost(tmp_path, rho, standardize):
    x = blobs(dtype=np.float64)
    x[:, 0] *= 100
    options = dict(rho=rho, batch_size=32, max_iter=5, standardize=standardize)
    found = deblora.cluster_features(on_disk(tmp_path, x), K, memory_limit=0, **options)
    assert found.method == "minibatch" and type(found.centers) is np.ndarray and found.centers.dtype == np.float64
    scale = x.std(0) if standardize else 1
    costs = torch.cdist(torch.from_numpy(x / scale), torch.from_numpy(found.centers / scale)).square()
    labels = torch.from_numpy(found.assignments)
    if rho is None:
        assert labels.equal(costs.argmin(1)) and found.certified is None
        return
    least = int(np.ceil(240 / (K * rho)))
    best = rsfast.kmeans.constrained_assign(costs, least).labels
    cost = [costs.gather(1, each[:, None]).sum().item() for each in (labels, best)]
    assert cost[0] == pytest.approx(cost[1], rel=1e-12)
    assert found.certified is True and found.counts.min() >= least


def test_every_row_is_drawn_once_a_pass(tmp_path):
    rows = deblora.as_rows(on_disk(tmp_path, blobs(103)))
    orders = []
    for seed in (0, 0, 1):
        model = rsfast.MiniBatchKMeans(K, batch_size=10, max_iter=2)
        stream, drawn = streaming.Stream(rows, model, seed, None, torch.device("cpu")), []
        for indices in stream._drawn():
            drawn.append(indices)
            stream.step += 1
        assert len(drawn) == 20  # 3 rows are left over, others in each pass
        first, second = torch.cat(drawn[:10]), torch.cat(drawn[10:])
        assert len(first.unique()) == len(second.unique()) == 100 and not first.equal(second)
        orders.append(first)
    assert orders[0].equal(orders[1]) and not orders[0].equal(orders[2])


def test_standardised_features_and_the_way_back():
    x = blobs(dtype=np.float64) + 1e6
    x[:, 2] = 5
    rows = deblora.as_rows(x)
    scaling = Scaling.of(rows, torch.device("cpu"))
    np.testing.assert_allclose(scaling.mean.numpy(), x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scaling.deviation.numpy(), np.where(x.std(0) > 0, x.std(0), 1), rtol=1e-9)
    np.testing.assert_allclose(scaling.undo(scaling.apply(rows.all())).numpy(), x, rtol=1e-12)
    x = blobs().astype(np.float64)
    x[:, 0] *= 1000  # which is all that counts, unless it is standardised
    plain, scaled = (deblora.cluster_features(x, K, rho=None, standardize=s) for s in (False, True))
    assert not np.array_equal(plain.assignments, scaled.assignments)
    means = np.stack([x[scaled.assignments == k].mean(0) for k in range(K)])
    np.testing.assert_allclose(scaled.centers, means, rtol=1e-5, atol=1e-5)


class Killed(Exception):
    pass


@pytest.mark.parametrize("rho", [None, 1.0])
def test_killed_and_started_again_gives_the_same_bits(tmp_path, monkeypatch, rho):
    x = on_disk(tmp_path, blobs(600))
    options = dict(rho=rho, batch_size=40, memory_limit=0, max_iter=3, seed=2, standardize=True, checkpoint_every=4)
    wanted = deblora.cluster_features(x, K, **options)
    advance, steps = streaming.Stream._advance, []

    def until_the_seventh(self, batch):
        steps.append(self.step)
        if len(steps) == 7:
            raise Killed
        advance(self, batch)

    monkeypatch.setattr(streaming.Stream, "_advance", until_the_seventh)
    checkpoint = tmp_path / "state"
    with pytest.raises(Killed):
        deblora.cluster_features(x, K, checkpoint=checkpoint, **options)
    found = deblora.cluster_features(x, K, checkpoint=checkpoint, **options)
    assert steps[:9] == [0, 1, 2, 3, 4, 5, 6, 4, 5]  # went on from the fourth
    assert same(found, wanted) and found.certified == wanted.certified
    ended = len(steps)
    assert same(deblora.cluster_features(x, K, checkpoint=checkpoint, **options), wanted) and len(steps) == ended
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "x.npy"]


def test_a_run_that_is_about_to_end_ends_there_when_started_again(tmp_path, monkeypatch):
    x = on_disk(tmp_path, blobs(600))
    options = dict(rho=None, batch_size=100, memory_limit=0, checkpoint_every=1)
    advance, steps = streaming.Stream._advance, []

    def counted(self, batch):
        steps.append(self.step)
        if kill and self.idle == 7:
            raise Killed
        advance(self, batch)

    monkeypatch.setattr(streaming.Stream, "_advance", counted)
    kill = False
    wanted = deblora.cluster_features(x, K, **options)
    last, kill = max(steps), True
    assert 10 < last < 100 * 6 - 1  # by patience, not by max_iter
    with pytest.raises(Killed):
        deblora.cluster_features(x, K, checkpoint=tmp_path / "state", **options)
    steps.clear()
    kill = False
    assert same(deblora.cluster_features(x, K, checkpoint=tmp_path / "state", **options), wanted)
    assert steps == list(range(last - 2, last + 1))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    x, checkpoint = blobs(), tmp_path / "state"
    options = dict(batch_size=40, memory_limit=0, max_iter=1, rho=1.5, checkpoint=checkpoint)
    deblora.cluster_features(on_disk(tmp_path, x), K, **options)
    before = checkpoint.read_bytes()
    for change, says in (
        (dict(seed=1), "seed was 0 and is 1"),
        (dict(rho=None), "rho was 1.5 and is None"),
        (dict(n_clusters=3), "n_clusters was 4 and is 3"),
        (dict(standardize=True), "standardize was False and is True"),
        (dict(max_iter=2), "max_iter was 1 and is 2"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint .*state is of other data or settings: {says}"):
            deblora.cluster_features(np.load(tmp_path / "x.npy", mmap_mode="r"), **{"n_clusters": K} | options | change)
    x[100, 3] += 1e-3
    with pytest.raises(ValueError, match="of other data or settings: checksum was"):
        deblora.cluster_features(on_disk(tmp_path, x), K, **options)
    assert checkpoint.read_bytes() == before
    checkpoint.write_bytes(before[:500])
    with pytest.raises(ValueError, match="state is damaged or no npz file"):
        deblora.cluster_features(np.load(tmp_path / "x.npy", mmap_mode="r"), K, **options)
    options["checkpoint"] = tmp_path / "nowhere" / "state"
    with pytest.raises(FileNotFoundError, match="nowhere/state is to be written to a folder that is not there"):
        deblora.cluster_features(np.load(tmp_path / "x.npy", mmap_mode="r"), K, **options)


MEASURED = """
import sys
import numpy as np, torch
from rsfast import deblora
from rsfast.deblora import arrays
torch.set_num_threads(1)
path, out = sys.argv[1:]
arrays.BATCH_BYTES = 2**20
def peak():  # not getrusage's, which a process inherits from the one that started it
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
def run(x, labels, out, memory_limit):
    found = deblora.cluster_features(x, 4, batch_size=512, max_iter=1, memory_limit=memory_limit, standardize=True)
    mu = deblora.debiased_centers(x, labels, found.assignments, found.centers)
    return deblora.calibrate(x, labels, mu, 0.5, tail=[1], out=out)
x = np.load(path, mmap_mode="r")
labels = np.arange(len(x)) % 2
run(x[:2000], labels[:2000], np.empty((2000, 256), np.float32), 0)  # libraries' own buffers
out = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=x.shape)
before = peak()
run(x, labels, out, 2**20)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_rows_on_disk_stay_there(tmp_path):
    """61 MB in and 61 MB out, of which half of one of them is never resident."""
    out = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(60_000, 256))
    g = np.random.default_rng(0)
    for part in np.split(out, 60):
        part[:] = g.standard_normal(part.shape, dtype=np.float32)
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "x.npy"), str(tmp_path / "out.npy")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < out.nbytes / 2, grown


def test_density_methods_know_noise():
    g = np.random.default_rng(1)
    x = np.concatenate([g.normal(0, 0.1, (40, 3)), g.normal(5, 0.1, (30, 3)), [[50.0, 50, 50], [-50, 50, 50]]])
    for method, options in (("dbscan", dict(eps=1.0)), ("hdbscan", dict(min_cluster_size=20)), ("dbscan", {})):
        options |= dict(standardize=True, n_components=2) if method == "hdbscan" else {}
        found = deblora.cluster_features(x, method=method, **options)
        assert found.assignments[-2:].tolist() == [-1, -1] and found.certified is None and found.method == method
        for k in range(len(found.centers)):
            mine = found.assignments == k
            assert found.counts[k] == mine.sum()
            np.testing.assert_allclose(found.centers[k], x[mine].mean(0), rtol=1e-12)
        if options:
            assert found.counts.tolist() == [40, 30]
            mu = deblora.debiased_centers(x, [0] * 40 + [1] * 32, found.assignments, found.centers)
            np.testing.assert_allclose(mu, found.centers, rtol=1e-12)  # noise has no weight
    half = deblora.cluster_features(torch.from_numpy(x).half(), method="dbscan", eps=1.0)
    assert half.centers.dtype == torch.float32 and half.counts.tolist() == [40, 30]
    with pytest.raises(ValueError, match="^dbscan found no cluster, all 72 rows are noise"):
        deblora.cluster_features(x, method="dbscan", eps=1e-6)


def test_what_was_found_goes_to_a_file_and_back(tmp_path):
    found = deblora.cluster_features(torch.from_numpy(blobs()), K, rho=1.5)
    found.save(tmp_path / "clusters")
    back = deblora.Clusters.load(tmp_path / "clusters")
    assert same(back, found) and back.certified is True and back.method == "kmeans" and back.settings == found.settings
    assert back.settings["rho"] == 1.5 and repr(back) == "Clusters(kmeans, 4 clusters, 240 rows, 0 noise)"
    assert [path.name for path in tmp_path.iterdir()] == ["clusters"]
    with pytest.raises(FileNotFoundError, match="there is no file .*none"):
        deblora.Clusters.load(tmp_path / "none")
    whole = (tmp_path / "clusters").read_bytes()
    for damaged in (whole[:200], b"", b"text", whole[:150] + b"\xff" * 8 + whole[158:]):
        (tmp_path / "clusters").write_bytes(damaged)
        with pytest.raises(ValueError, match="clusters is damaged or no npz file"):
            deblora.Clusters.load(tmp_path / "clusters")
    np.savez(tmp_path / "other.npz", centers=1)
    with pytest.raises(ValueError, match="other.npz lacks assignments, counts, about"):
        deblora.Clusters.load(tmp_path / "other.npz")


def test_rho_at_its_border():
    x = blobs(10)
    assert deblora.cluster_features(x, 4, rho=1.25).counts.min() >= 2
    with pytest.raises(ValueError, match="rho must be at least 5/4 here"):
        deblora.cluster_features(x, 4, rho=1.24)
    assert deblora.cluster_features(x, 10).counts.tolist() == [1] * 10


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(n_clusters=241), "n_clusters must be at most the number of rows, 240, got 241"),
        (dict(n_clusters=0), "n_clusters must be an int of at least 1, got 0"),
        (dict(rho=0.5), "rho=0.5 asks for at least"),
        (dict(rho=-1), "rho must be a finite number above 0"),
        (dict(method="means"), "method must be one of auto, kmeans"),
        (dict(seed=-1), "seed must be an int of at least 0"),
        (dict(max_iter=0), "max_iter must be an int of at least 1"),
        (dict(memory_limit=0, method="kmeans"), "method='kmeans' needs all rows in memory, 5760 bytes, more than mem"),
        (dict(memory_limit=0, method="dbscan"), "take method='minibatch', or a higher memory_limit"),
        (dict(memory_limit=0, batch_size=3), "batch_size must be at least n_clusters=4 for rows on disk, got 3"),
        (dict(checkpoint_every=0), "checkpoint_every must be an int of at least 1"),
        (dict(method="dbscan", eps=0.0), "eps must be a number above 0, got 0.0"),
        (dict(method="dbscan", min_samples=0), "min_samples must be an int of at least 1, got 0"),
        (dict(method="hdbscan", min_cluster_size=1), "min_cluster_size must be an int of at least 2, got 1"),
        (dict(method="hdbscan", max_cluster_size=0), "max_cluster_size must be an int of at least 2"),
        (dict(method="hdbscan", min_cluster_size=241), "min_cluster_size must be at most the number of rows, 240"),
        (dict(method="hdbscan", n_components=7), "n_components must be an int in 1..6, got 7"),
    ],
)
def test_what_cannot_be_clustered_is_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        deblora.cluster_features(on_disk(tmp_path, blobs()), **dict(n_clusters=K) | change)


def test_rows_that_are_not_finite_are_named(tmp_path):
    x = blobs()
    x[[7, 200], 1] = np.nan, np.inf
    for features in (x, torch.from_numpy(x), on_disk(tmp_path, x)):
        for method in ("minibatch", "dbscan") if features is x else ("minibatch",):
            with pytest.raises(ValueError, match=r"features must be finite, got NaN or infinity in 2 row\(s\): 7, 200"):
                deblora.cluster_features(features, K, method=method, memory_limit=0)
